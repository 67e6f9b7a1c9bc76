"""The three scales at a glance, and the few lines that every script shares.

`smoke` runs every stage in minutes and proves nothing but that it runs; `laptop` is small enough for two CPU cores and
large enough to learn; `paper` holds the paper's own values (with the section that states them) and wants one 80 GB GPU.
Any value can be overridden on the command line: `python train.py linear --scale laptop --width 64`.
`python scales.py` prints the table.
"""

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import tyro

SCALES = ("smoke", "laptop", "paper")

# An update is one optimiser step on `micro_batch * accumulate` tasks. The paper's "steps" are micro-batches: [D1].
TABLE = {
    "model": {                 # smoke   laptop     paper
        "width":                 (32,        64,      256),  # embedding size E (A.1)
        "depth":                 (2,          4,        8),  # MMDiT blocks (A.1)
        "heads":                 (2,          4,        4),  # attention heads, of width / heads each (A.1)
        "registers":             (2,          8,        8),  # register tokens of the noise stream (A.1)
        "ema":                   (0.9,     0.99,    0.999),  # decay of the averaged weights (A.2)
        "skip":                  (True,    True,    False),  # predict what is to be added to N(0, I)'s velocity [D12]
        "film_query":            (True,    True,    False),  # the query modulates every token, as the time does [D34]
        "treatment_gain":        (10.0,    10.0,      1.0),  # of the initial weights of the treatment stream [D11]
        "remat":                 (False,  False,     True),  # recompute activations to save memory (released code)
    },
    "linear": {                # linear SCM prior (5.1, B.1)
        "genes":                 (8,         20,       20),  # variables D (5.1)
        "contexts":              (32,       256,     1000),  # random DAGs held in memory at a time (B.1)
        "refresh":               (16,        32,        0),  # updates until they are replaced by new ones; 0: never
        "population":            (64,        64,      500),  # cells simulated per condition (B.1)
        "cells":                 (16,        16,      500),  # cells N of a population in a task (released code)
        "context":               (2,          4,        4),  # context experiments K (B.1)
        "updates":               (40,      2400,     6250),  # 50k micro-batches (A.2) [D1]
        "micro_batch":           (8,          8,       32),  # tasks per micro-batch (released code)
        "accumulate":            (1,          1,        8),  # micro-batches per update (released code)
        "learning_rate":         (2e-3,    2e-3,     1e-4),  # peak (A.2)
    },
    "grn": {                   # synthetic biological prior (5.1, B.2)
        "genes":                 (8,         20,       50),  # genes D (B.2)
        "contexts":              (16,       800,     6000),  # random GRNs (B.2)
        "population":            (64,       100,      200),  # cells simulated per condition (B.2)
        "cells":                 (16,        16,      200),  # cells N of a population in a task (B.2)
        "context":               (2,          4,        8),  # context experiments K (B.2)
        "updates":               (40,      6000,    50000),  # 400k micro-batches (A.2) [D1]
        "micro_batch":           (8,          8,       32),  # (released code)
        "accumulate":            (1,          1,        8),  # (released code)
        "learning_rate":         (2e-3,    2e-3,     1e-4),  # peak (A.2)
    },
    "real": {                  # fine-tuning on, and splitting of, real cells (A.3, B.3, B.4)
        "genes":                 (8,         20,       50),  # genes D (B.3)
        "min_cells":             (20,       200,      200),  # fewest cells of a usable treatment (released code)
        "splits":                (2,         10,        1),  # random splits into train and test treatments (B.4)
        "cells":                 (16,        16,      200),  # cells N of a population in a task (B.3)
        "context":               (2,          4,        8),  # context experiments K (B.2)
        "updates":               (10,       100,      375),  # 3,000 iterations (A.3) [D1]
        "micro_batch":           (8,          8,       32),  # (released code)
        "accumulate":            (1,          1,        8),  # (released code)
        "learning_rate":         (1e-3,    1e-3,     5e-5),  # peak (A.3)
    },
    "scratch": {               # real cells only, from random initialisation: as "real", but
        "learning_rate":         (2e-3,    2e-3,     1e-4),  # peak (A.2)
    },
    "evaluate": {              # sampling and metrics (A.4, 6, C.2)
        "held_out":              (2,          6,       10),  # unseen DAGs of Table 2 [D10]
        "steps":                 (4,          5,       25),  # Dopri5 steps, six evaluations each [D9]
        "guidance":              (2.0,     None,     None),  # weight (A.4); None: searched on validation (Table 7)
        "eval_cells":            (32,       100,      200),  # cells per population that metrics compare (B.3)
        "seeds":                 (1,          1,        3),  # trainings per row of Table 2 (Table 2)
        "resamplings":           (1,          1,       10),  # draws of cells per split in Table 3 (Table 3)
    },
    "figures": {               # how much each figure samples (figures.py says what for)
        "screens":               (1,          1,        2),  # real screens that are sampled from
        "splits":                (2,          3,        1),
        "graphs":                (2,          3,       10),  # held-out linear SCMs
        "tasks":                 (2,          4,      100),  # test conditions of each split or graph, at most
        "cells":                 (16,        50,      200),  # per population
        "contexts":              ((0, 2), (0, 1, 2, 4, 8), (0, 1, 2, 4, 8, 10)),  # Figure 5a: K
        "multiples":             ((1.0, 2.0), (0.25, 1.0, 2.0, 6.0), (0.25, 0.5, 1.0, 2.0, 4.0, 6.0)),  # Figure 5b: N
        "weights":               ((1.0, 2.0), (1.0, 1.5, 2.0, 2.5, 3.0), (1.0, 1.5, 2.0, 2.5, 3.0)),  # guidance (C.3)
        "ode_steps":             ((5, 10), (5, 10, 20, 50), (5, 10, 20, 50)),
        "most_cells":            (48,       100,      400),  # Figure 5b: given, at most
        "draws":                 (2,          3,       10),  # Figure 3: of cells
        "snapshots":             (4,         10,      200),  # Figure 2: EMA models kept during pre-training
        "snapshot_tasks":        (2,          6,       64),  # Figure 2: for each of them
        "smoothing":             (0.5,      0.5,     0.95),  # Figure 2: alpha of the moving average
        "ode_tasks":             (2,          2,        4),
        "ode_reference":         (20,       100,      100),  # Dopri5 steps to compare with
        "grns":                  (16,       100,      200),  # Figure 6: of the prior
    },
    "cpa": {                   # the published baselines: their own sizes at paper scale (see each file)
        "width":                 (32,       128,      256),
        "latent":                (8,         32,       64),
        "adversary_width":       (16,        64,      128),
        "embedding_gain":        (10.0,    10.0,      1.0),
        "updates":               (50,      1500,    20000),
        "batch":                 (32,       128,      512),
        "learning_rate":         (2e-3,    2e-3,     1e-3),
        "adversary_learning_rate": (2e-3,  2e-3,     1e-3),
    },
    "condot": {
        "hidden":                (16,        64,       64),  # {64, 128, 256} (Table 7)
        "updates":               (50,       500,   100000),
        "batch":                 (32,        64,      256),
        "learning_rate":         (1e-3,    1e-3,     1e-4),
    },
    "mfm": {
        "neighbours":            (4,         10,       10),  # {0, 10, 50, 100} (Table 7)
        "embedding":             (8,         32,       64),  # {64, 128, 256} (Table 7)
        "width":                 (32,       128,      512),
        "layers":                (2,          3,        7),
        "features":              (8,         32,      128),
        "updates":               (50,      1500,    50000),
        "batch":                 (16,        32,      200),
        "conditions":            (1,          4,        1),
        "learning_rate":         (1e-3,    1e-3,     1e-4),
    },
    "cellflow": {
        "embedding":             (16,        64,      256),
        "width":                 (32,       128,     1024),
        "layers":                (2,          2,        3),
        "updates":               (50,       500,    10000),
        "batch":                 (16,        32,      200),
        "conditions":            (2,          8,       20),
        "learning_rate":         (1e-3,    1e-3,     5e-5),
    },
    "state": {
        "width":                 (16,        64,      256),
        "depth":                 (1,          2,        4),
        "heads":                 (2,          4,        4),
        "sets":                  (2,          8,       16),
        "updates":               (50,       800,    40000),
        "batch":                 (16,        32,      200),
        "learning_rate":         (1e-3,    1e-3,     1e-4),
    },
}


def at(scale: str, *sections: str) -> dict:
    """The settings of the named sections of TABLE at `scale`; later sections win."""
    return {name: row[SCALES.index(scale)] for section in sections for name, row in TABLE[section].items()}


class BadInput(ValueError):
    """What the user gave cannot be used. `run` prints the message, and nothing else, and exits with status 1."""


def run(main, *arguments) -> None:
    """Call `main`; a BadInput, or an operating-system error such as a full disk, ends in one line and status 1."""
    try:
        main(*arguments)
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")


def parse(settings_class, sections, argv: list[str] | None = None):
    """Command line -> frozen settings. `--scale` (default: laptop) picks a column of TABLE, other flags override it.

    `sections` names the sections that fill the fields, or is a function of the positional word to those names. The
    class's own defaults, for what TABLE does not list, are the paper's.
    """
    argv = sys.argv[1:] if argv is None else argv
    given = [a.split("=", 1)[1] if "=" in a else (argv[i + 1 : i + 2] or [""])[0]
             for i, a in enumerate(argv) if a == "--scale" or a.startswith("--scale=")]
    scale = given[-1] if given else "laptop"
    if scale not in SCALES:
        raise BadInput(f"--scale {scale}: expected one of {', '.join(SCALES)}")
    if callable(sections):
        if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
            raise BadInput("name what to run before the options; --help lists it")
        sections = sections(argv[0])
    column, default = at(scale, *sections) | {"scale": scale}, {}
    for field in dataclasses.fields(settings_class):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.name in column or required:
            default[field.name] = column.get(field.name, tyro.MISSING)
    return tyro.cli(settings_class, default=settings_class(**default), args=argv)


@contextlib.contextmanager
def atomic(path: str | Path):
    """Yield a temporary path beside `path`; on success rename it to `path`, so a half-written file is never seen."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # keeps the suffix, which some writers look at
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def revision() -> str:
    """Short git revision of the code, with `+` if files were changed since, or `unknown` outside a repository."""
    here = Path(__file__).parent
    git = lambda *a: subprocess.run(["git", *a], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    for section, rows in TABLE.items():
        print(f"{section:24}" + "".join(f"{s:>10}" for s in SCALES))
        for name, row in rows.items():
            print(f"  {name:22}" + "".join(f"  {str(v).replace(' ', ''):>8}" for v in row))
