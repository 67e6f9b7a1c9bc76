"""The three scales at a glance, and the few lines that every script shares.

`smoke` runs every stage in minutes and proves nothing but that it runs; `laptop` is small enough for two CPU cores and
large enough to learn; `paper` has the paper's own sizes and wants one 80 GB GPU. The paper's values are the defaults of
the dataclass of settings at the head of each script; this table holds what the other two scales change, and nothing
else. Any setting can be given on the command line: `python train.py --screen linear --scale laptop --width 128`.
A fourth, `dry`, is `paper` with one or two of everything (DRY): it shows on any machine that the paper's shapes go
through every stage. `python scales.py` prints the table.
"""

import contextlib
import dataclasses
import fcntl
import glob
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import tyro

SCALES = ("smoke", "laptop", "paper")  # the columns of TABLE; and "dry"

# Two numbers: smoke and laptop. A third is the paper's, where it is not the default of the dataclass, because the
# paper has another value for this kind of data. A section fills those of its names that a script has a setting for.
TABLE = {
    "train": {                 # every training of MapPFN (train.py)
        "width":                 (32,        64),            # embedding size E
        "depth":                 (2,          4),            # MMDiT blocks
        "heads":                 (2,          4),            # attention heads
        "registers":             (2,          8),            # register tokens
        "ema":                   (0.9,     0.99),            # decay of the averaged weights [D8]
        "film_query":            (True,    True),            # the query modulates every token [D34]
        "treatment_gain":        (10.0,    10.0),            # of the initial weights of the treatment stream [D11]
        "skip":                  (True,    True),            # predict what is to be added to N(0, I)'s velocity [D12]
        "remat":                 (False,  False),            # recompute activations to save memory
        "micro_batch":           (8,          8),            # tasks B of a micro-batch
        "accumulate":            (1,          1),            # micro-batches A of an update
        "learning_rate":         (2e-3,    2e-3),            # peak
        "cells":                 (16,        16),            # cells N of a population in a task
        "context":               (2,          4),            # context experiments K
    },
    "exchangeable": {          # the second network [D57]: with the prior panel and counterfactual cells what we
                               # recommend for screens of real cells (beyond.sh); its paper size: tried once
        "width":                 (12,        48,      128),
        "depth":                 (2,          3,        4),
        "heads":                 (2,          4,        8),
        "micro_batch":           (4,          8,       32),
        "accumulate":            (1,          1,        1),
        "learning_rate":         (2e-3,    2e-3,     5e-4),
        "cells":                 (32,       100,      200),
        "target_cells":          (8,         16,       32),
        "mean_loss":             (3.0,      3.0,      3.0),
        "no_knock_out":          (0.1,      0.1,      0.1),
        "updates":               (20,      2000,   50_000),
    },
    "linear": {                # linear SCMs (5.1, B.1): the screen, and training on it
        "genes":                 (8,         20,       20),  # variables D (5.1)
        "systems":               (128,     1000,     1000),  # random DAGs (B.1)
        "population":            (64,        64,      500),  # cells of a condition (B.1)
        "test_population":       (500,      500,      500),  # of a condition of a held-out DAG
        "validation":            (4,         16,       20),  # held-out DAGs for choices
        "test":                  (2,          6,       10),  # held-out DAGs for the tables [D10]
        "cells":                 (16,        16,      500),  # N (released code)
        "context":               (2,          4,        4),  # K (B.1)
        "updates":               (40,      2400,     6250),  # 50k micro-batches (A.2) [D1]
        "seeds":                 (1,          1,        3),  # trainings of each row of Table 2
    },
    "grn": {                   # the synthetic biological prior (5.1, B.2)
        "genes":                 (8,         20),            # D
        "systems":               (16,       800),            # random GRNs
        "population":            (64,       100),            # cells of a condition
        "test_population":       (64,       100),
        "validation":            (2,          8),            # held-out GRNs for choices
        "test":                  (2,          8),            # held-out GRNs for Figure 2
        "dropout":      ((0.0, 82.0), (0.0, 82.0)),          # range of the dropout percentile [D51]
        "updates":               (40,      5000),
        "snapshots":             (4,         10,       25),  # Figure 2: models kept on the way
    },
    "real": {                  # perturbation screens of real cells (B.3, B.4), and training on them
        "genes":                 (8,         20),            # D
        "min_cells":             (20,       200),            # fewest cells of a usable condition
        "splits":                (2,          5),            # random splits into train and test treatments
        "updates":               (32,       800,      375),  # at most [D55]; 3,000 iterations (A.3) [D1]
        "rates":            ((2e-3,),    (2e-3,),  (1e-4,)),  # learning rates to choose from [D55]
    },
    "finetune": {              # from a pre-trained model (A.3): as "real", but
        "learning_rate":         (1e-3,    1e-3,     5e-5),  # peak (A.3)
        "rates":            ((1e-3,), (1e-3, 3e-4), (5e-5,)),
    },
    "evaluate": {              # sampling, baselines, metrics
        "eval_cells":            (32,       100),            # cells of a population that metrics compare
        "draws":                 (1,          1),            # of cells, for each split
        "steps":                 (4,          5),            # Dopri5 steps [D9]
        "guidance":              (2.0,     None),            # weight; None: chosen on validation tasks (Table 7)
    },
    "figures": {               # how much each figure samples (figures.py says what for)
        "screens":               (1,          1),            # screens of each kind
        "splits":                (2,          3),
        "systems":               (2,          3),            # held-out systems of a split
        "tasks":                 (2,          4),            # test conditions of a system
        "cells":                 (16,        50),            # per population
        "contexts":              ((0, 2), (0, 1, 2, 4, 8)),  # Figure 5a: K
        "multiples":             ((1.0, 2.0), (0.25, 1.0, 2.0, 6.0)),  # Figure 5b: N
        "most_cells":            (48,       100),            # Figure 5b: given, at most
        "weights":               ((1.0, 2.0), (1.0, 1.5, 2.0, 2.5, 3.0)),  # of guidance
        "tta_draws":             (2,          6),            # Figure 3: draws of cells
        "snapshot_tasks":        (2,          6),            # Figure 2: tasks of each snapshot
        "ode_steps":             ((5, 10), (5, 10, 20, 50)),
        "ode_reference":         (20,       100),
        "ode_tasks":             (2,          2),
        "grns":                  (16,       100),            # Figure 6: systems of the prior
    },
    "cpa": {                   # the published baselines (baselines/): their own sizes are their defaults
        "width":                 (32,       128),
        "latent":                (8,         32),
        "adversary_width":       (16,        64),
        "embedding_gain":        (10.0,    10.0),
        "updates":               (50,      3000),            # at most; `patience` ends it sooner [D54]
        "validate_every":        (50,       200),            # updates between two validations
        "patience":              (1,          6),            # validations without a new best
        "batch":                 (32,       128),
        "learning_rate":         (2e-3,    2e-3),
        "adversary_learning_rate": (2e-3,  2e-3),
    },
    "condot": {
        "hidden":                (16,        64),
        "layers":                (2,          2),
        "updates":               (50,      1000),
        "validate_every":        (50,        50),
        "patience":              (1,          4),
        "batch":                 (32,        64),
        "learning_rate":         (1e-3,    1e-3),
    },
    "condot-linear": {         # linear SCMs
        "updates":               (50,    20_000,   50_000),  # (released code)
        "batch":                 (32,        64,      500),  # (released code)
        "validate_every":        (50,       400),
    },
    "mfm": {
        "neighbours":            (4,         10),
        "embedding":             (8,         32),
        "width":                 (32,       128),
        "layers":                (2,          3),
        "features":              (8,         32),
        "updates":               (50,      6000),
        "validate_every":        (50,       100),
        "patience":              (1,          6),
        "batch":                 (16,        32),
        "conditions":            (1,          4),
        "learning_rate":         (1e-3,    1e-3),
    },
    "mfm-linear": {            # linear SCMs
        "updates":               (50,    30_000,   25_000),  # (released code) [D37]
        "batch":                 (16,        32,      500),  # (released code)
        "validate_every":        (50,       500),
        "patience":              (1,         12),            # its validation error jumps up and down
    },
    "cellflow": {
        "embedding":             (16,        64),
        "width":                 (32,       128),
        "layers":                (2,          2),
        "updates":               (50,      3000),
        "validate_every":        (50,        50),
        "patience":              (1,          6),
        "batch":                 (16,        32),
        "conditions":            (2,          8),
        "learning_rate":         (1e-3,    1e-3),
    },
    "state": {
        "width":                 (16,        64),
        "depth":                 (1,          2),
        "heads":                 (2,          4),
        "sets":                  (2,          8),
        "updates":               (50,      3000),
        "validate_every":        (50,       100),
        "patience":              (1,          6),
        "batch":                 (16,        32),
        "learning_rate":         (1e-3,    1e-3),
    },
}

# What `dry` changes of `paper`: how many of everything, and no shape of a task, a cell or a network. Evaluations are
# few, because one at the paper's size takes seconds on a CPU, and `costs.py` multiplies.
DRY = {
    "train": {"updates": 1, "micro_batch": 2, "accumulate": 1, "rates": ()},
    "linear": {"systems": 2, "validation": 0, "test": 1, "seeds": 1},
    "grn": {"systems": 2, "validation": 0, "test": 1, "snapshots": 1},
    "real": {"splits": 1, "toy_treatments": 20, "rates": ()},
    "finetune": {"rates": ()},
    "evaluate": {"draws": 1, "steps": 1, "guidance": 1.0},
    "figures": {"screens": 1, "systems": 1, "tasks": 2, "contexts": (0, 8), "multiples": (1.0,), "weights": (2.0,),
                "subsets": 3, "tta_draws": 1, "snapshot_tasks": 2, "ode_steps": (1,), "ode_reference": 2,
                "ode_tasks": 1, "grns": 2},
    "cpa": {"updates": 50},
    "condot": {"updates": 50},
    "mfm": {"updates": 50, "conditions": 1},
    "cellflow": {"updates": 50, "conditions": 1},
    "state": {"updates": 50, "sets": 1},
}


def at(scale: str, *sections: str) -> dict:
    """What the named sections of TABLE change at `scale`; later sections win, unknown ones change nothing.

    At `dry` that is all that they change at `paper`, and what DRY has for them over it.
    """
    column = SCALES.index("paper" if scale == "dry" else scale)
    changed = {}
    for section in sections:
        for name, row in TABLE.get(section, {}).items():
            if column < len(row):
                changed[name] = row[column]
    for section in sections:
        if scale == "dry":
            changed |= DRY.get(section, {})
    return changed


# --------------------------------------------------------------------------------------------- command line and errors


class BadInput(ValueError):
    """What the user gave cannot be used. `run` prints the message, and nothing else, and exits with status 1."""


def run(main) -> None:
    """Call `main`; a BadInput, an error of the operating system such as a full disk, or too little memory ends in one
    line and status 1."""
    try:
        main()
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")
    except MemoryError as error:
        sys.exit(f"error: not enough memory: {error}; ask for less")


def parse(settings_class, sections, argv: list[str] | None = None):
    """Command line -> frozen settings. `--scale` picks a column of TABLE, which other flags override.

    `sections` is a function of the settings, as far as the command line alone gives them, to the sections of TABLE
    that fill in the rest. Raises BadInput for a scale that does not exist, for a number outside LIMITS, and for the
    name of a folder that would lie elsewhere.
    """
    argv = sys.argv[1:] if argv is None else argv
    given = tyro.cli(settings_class, args=argv)
    check_numbers(given)
    for field in dataclasses.fields(given):
        if str(getattr(given, field.name)).startswith("~"):  # no shell expands --out=~/here
            raise BadInput(f"--{field.name.replace('_', '-')} {getattr(given, field.name)}: '~' is no folder here; "
                           "write the path in full")
    for name in PLACES:
        check_name(getattr(given, name, None) or "")
    scale = getattr(given, "scale", "paper")
    if scale not in (*SCALES, "dry"):
        raise BadInput(f"--scale {scale}: expected one of {', '.join(SCALES)}, dry")
    fields = {field.name for field in dataclasses.fields(settings_class)}
    changed = {name: value for name, value in at(scale, *sections(given)).items() if name in fields}
    return tyro.cli(settings_class, default=dataclasses.replace(given, **changed), args=argv)


# Of every number on every command line: the least and the most that can be meant. Of several numbers, each of them.
LIMITS = {
    "seed": (0, 10**6), "seeds": (1, 99), "updates": (1, 10**8), "splits": (1, 999), "draws": (1, 999),
    # data and priors
    "genes": (3, 10**6), "systems": (1, 10**6), "validation": (0, 10**5), "test": (0, 10**5), "population": (1, 10**6),
    "test_population": (1, 10**6), "dropout": (0, 100), "min_cells": (2, 10**6), "toy_treatments": (0, 10**4),
    "workers": (1, 4096), "num_shards": (1, 10**5), "shard": (-1, 10**5),
    # networks and training
    "width": (1, 10**5), "depth": (1, 1000), "heads": (1, 1000), "registers": (0, 10**4), "treatment_gain": (1e-6, 1e6),
    "cells": (1, 10**5), "context": (0, 1000), "target_cells": (0, 10**5), "mean_loss": (0, 1e6),
    "micro_batch": (1, 10**5), "fresh": (0, 10**8),
    "accumulate": (1, 10**5), "learning_rate": (1e-12, 10), "rates": (1e-12, 10),
    "warmup": (0, 1), "decay": (0, 1), "drop_condition": (0, 1), "no_knock_out": (0, 1), "ema": (0, 1 - 1e-9),
    "b1": (0, 1 - 1e-9), "b2": (0, 1 - 1e-9), "weight_decay": (0, 10), "clip": (1e-12, 1e6),
    "log_every": (1, 10**8), "validate_every": (1, 10**8), "checkpoint_seconds": (0, 1e9), "snapshots": (0, 10**5),
    "processes": (1, 10**5), "process": (0, 10**5),
    # sampling and figures
    "guidance": (0, 100), "weights": (0, 100), "steps": (1, 10**5), "eval_cells": (1, 10**5), "screens": (1, 99),
    "tasks": (1, 10**6), "contexts": (0, 1000), "multiples": (1e-3, 1e3), "most_cells": (1, 10**5),
    "subsets": (1, 10**4), "experiments": (1, 10**4), "tta_draws": (1, 999), "snapshot_tasks": (1, 10**5),
    "ode_steps": (1, 10**5), "ode_reference": (1, 10**5), "ode_tasks": (1, 10**4), "grns": (1, 10**6),
}
PLACES = "screen", "name", "init", "choice"  # settings that are names of folders


def check_numbers(s) -> None:
    """Raise BadInput for the first number of the settings that is outside LIMITS, before any work."""
    for field in dataclasses.fields(s):
        value = getattr(s, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                check_number(field.name, number)


def check_number(name: str, number: int | float) -> None:
    """Raise BadInput for a number outside LIMITS."""
    least, most = LIMITS[name]
    if not least <= number <= most:  # not a number is refused too
        raise BadInput(f"--{name.replace('_', '-')} {number}: expected {least} to {most}")


def check_name(name: str) -> None:
    """Raise BadInput unless this can be the name of a folder or file, here and nowhere else."""
    if Path(name).name != name or name == "..":
        raise BadInput(f"'{name}': expected the name of a folder, without '/'")


# ------------------------------------------------------------------------------------------------------------ files


def runs(process: int) -> bool:
    """Is there a process of this number on this machine?"""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic(path: str | Path):
    """Yield a temporary path beside `path`; on success rename it to `path`, so a half-written file is never seen.

    A folder may be made under the temporary path as well as a file. What a killed process has left is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".*.partial.{glob.escape(path.name)}"):
        process = left.name.split(".")[1]
        if process.isdecimal() and not runs(int(process)):
            remove(left)
    temporary = path.with_name(f".{os.getpid()}.partial.{path.name}")  # keeps the suffix, which some writers look at
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:  # such as a full disk
        raise OSError(f"{path}: cannot be written: {str(error.strerror or error).splitlines()[0]}") from error
    finally:
        remove(temporary)


def checksum(path: str | Path) -> int:
    """Tells one file from another that was made anew in its place."""
    found = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            found = zlib.crc32(block, found)
    return found


@contextlib.contextmanager
def alone(path: str | Path):
    """While this lasts, a second process that wants to make the same file or folder ends in BadInput. A process that is
    killed leaves nothing that has to be tidied up."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{path}: another process is making it; wait until it has ended, or give another --out "
                           "or --name") from None
        yield


def read_json(path: Path) -> dict:
    """What a file of JSON says; nothing if it is not there or damaged, so that it is made again."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError):
        print(f"{path}: damaged; it is made again", flush=True)
        return {}


def check_made(path: str | Path, then: dict, now: dict) -> None:
    """Raise BadInput, naming what differs, unless what is at `path` was made with the settings `now`."""
    now = json.loads(json.dumps(now, default=str))  # as it would come back from a file
    changed = []
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            changed.append(f"{name} {then.get(name)}, now {now.get(name)}")
    if changed:
        raise BadInput(f"{path} was made with other settings ({'; '.join(changed)}): "
                       "move it away or delete it, or give another --out")


def revision() -> str:
    """Short git revision of the code, with `+` if files were changed since, or `unknown` outside a repository."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]  # a run that is killed just now leaves none behind
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ----------------------------------------------------------------------------------------------------------- randomness

# What a random number is used for. Numbers for different uses never come from the same stream, whatever the seed.
STREAMS = ("prior", "split", "tasks", "validation", "evaluation", "experiments", "sampling", "baseline", "figure",
        "initialisation", "updates")


def generator(use: str, *numbers: int) -> np.random.Generator:
    """NumPy's generator for one use and one tuple of numbers (the seed first), such as ("tasks", seed, update)."""
    return np.random.default_rng([STREAMS.index(use), len(numbers), *numbers])  # length: NumPy pads with zeros


def key(use: str, *numbers: int):
    """JAX's random key, likewise."""
    import jax.random as jr  # here, so that the prior and the data need no JAX

    return jr.key(int(generator(use, *numbers).integers(2**31)))


if __name__ == "__main__":
    for section, rows in TABLE.items():
        print(f"{section:24}" + "".join(f"{scale:>10}" for scale in SCALES))
        for name, row in rows.items():
            cells = [str(value).replace(" ", "") for value in row] + ["default"]
            print(f"  {name:22}" + "".join(f"  {value:>8}" for value in cells[:3]))
    print("\ndry: as paper, but")
    for section, values in DRY.items():
        print(f"{section:24}" + ", ".join(f"{name} {value}" for name, value in values.items()))
