"""Stage 5 of 8 (beside `sample.py`), the baselines: predictions of simpler rules and of five published methods.

Paper: 5.2, appendix C.1, C.3. Reads what `sample.py` evaluates on (its `evaluation_sets`) and writes files of
predictions `out/<scale>/samples/<experiment>/<method>-split<s>-draw<r>.npz` for `metrics.py`; with `--search`, a table
of validation errors `out/<scale>/search/<experiment>-<method>.json` instead. One file for each method; `simple.py` has
the rows without training, `fitting.py` what the trained ones share.

    python -m baselines toy --scale smoke
    python -m baselines linear                              # laptop scale: a minute
    python -m baselines leukemia --scale paper
    python -m baselines leukemia --methods cpa additive     # some rows only
    python -m baselines linear --methods condot --search    # Table 7's grid, chosen on validation conditions
Departures from the paper, marked where they happen: D32, D33, and those of the methods, D35 to D48.

MapPFN sees the training half of the held-out context as its interventional context only; a baseline is trained on it,
and on all other contexts (B.4).
"""

import dataclasses
import importlib
import itertools
import json
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import tyro
from jaxtyping import Float

import metrics
import scales
from baselines.simple import METHODS
from data import ABSENT, TRAIN, VALIDATION, EvaluationTask, Screen, evaluation_tasks, join_screens
from metrics import Predictions, finished, save_predictions
from scales import BadInput


@runtime_checkable
class Baseline(Protocol):
    """What every method offers, from the row that copies its input to a trained network."""

    def __init__(self, screen: Screen, rng: np.random.Generator):
        """Fit to the conditions that are TRAIN; the cells of the others are never looked at."""

    def predict(self, controls: Float[np.ndarray, "N D"], context: int, treatment: Float[np.ndarray, "D"],
                rng: np.random.Generator) -> Float[np.ndarray, "N D"]:
        """One predicted cell for each control cell of biological context `context`."""


# Rows that are handed true cells. [D33] paper: "observed"; released code: a second draw from the pool that
# the target was drawn from, so that the two share cells; here: also "oracle", true cells of which none is in the
# target, because that is what a perfect model would score.
REFERENCES = {"observed": "again", "oracle": "fresh"}

# Row -> file, class, and the options in which it differs from the method's row of the table of scales. Rows that end in
# "-released" show what a released default that we depart from gives; CondOT's, an ordinary random initialisation.
TRAINED = {
    "cpa": ("cpa", "CPA", {}),
    "condot": ("condot", "CondOT", {}),
    "mfm": ("mfm", "MFM", {}),
    "cellflow": ("cellflow", "CellFlow", {}),
    "state": ("state", "State", {}),
    "condot-released": ("condot", "CondOT", {"identity_init": False}),
    "mfm-released": ("mfm", "MFM", {"unseen": "random"}),
    "cellflow-released": ("cellflow", "CellFlow", {"condition_dropout": 0.9, "epsilon": 0.5}),
}
GRIDS = {  # Table 7
    "condot": {"hidden": (64, 128, 256), "layers": (2, 3, 4)},
    "mfm": {"neighbours": (0, 10, 50, 100), "embedding": (64, 128, 256)},
}
PUBLISHED = {"linear": ("condot", "mfm", "condot-released")}  # trained rows of Table 2; Table 3 has all


@dataclass(frozen=True)
class Settings:
    """Write the predictions of the baselines."""
    experiment: tyro.conf.Positional[str]               # linear, or a folder below out/<scale>/data
    methods: tuple[str, ...] = ()                       # rows to compute; if none, all the paper's and the simple ones
    search: bool = False                                # try Table 7's grid on validation conditions instead
    eval_cells: int = 200                               # cells per population that metrics compare (B.3)
    genes: int = 20                                     # linear: variables D (5.1)
    contexts: int = 1000                                # linear: graphs to train on (B.1)
    population: int = 500                               # linear: cells simulated per condition (B.1)
    held_out: int = 10                                  # linear: unseen graphs
    context: int = 8                                    # context experiments K (B.2); no baseline looks at them
    seeds: int = 3                                      # linear: fits of each trained row (Table 2)
    splits: int = 1                                     # random splits into train and test treatments (B.4)
    resamplings: int = 10                               # draws of cells per split (Table 3)
    seed: int = 0                                       # of the baselines' own randomness
    scale: str = "paper"                                # column of the table in scales.py
    out: Path = Path("out")                             # folder of all results


def trained_class(row: str) -> type:
    """The class of a trained row; imported only when asked for, so that the simple rows need no JAX."""
    file, name, _ = TRAINED[row]
    return getattr(importlib.import_module(f"baselines.{file}"), name)


def make(method: str, scale: str, screen: Screen, rng: np.random.Generator, **changes):
    """A fitted baseline: a simple one, or a trained one with the options of `scale` and `changes`."""
    if method in METHODS:
        return METHODS[method](screen, rng)
    file, _, own = TRAINED[method]
    options = importlib.import_module(f"baselines.{file}").Options(**scales.at(scale, file) | own | changes)
    return trained_class(method)(screen, rng, options)


def predict_with(baseline: Baseline, screen: Screen, tasks: EvaluationTask, rng: np.random.Generator) -> Predictions:
    """The predictions of a fitted baseline for all conditions, without `meta`."""
    cells = np.array([baseline.predict(controls, int(c), treatment, rng) for controls, c, treatment
                      in zip(tasks.identity, tasks.context_index, tasks.query)])
    names = np.array(screen.context_names)[tasks.context_index]
    return Predictions(tasks.observed, tasks.identity, tasks.target, cells, tasks.query,
                       names, screen.log_expression, {})


def reference(row: str, screen: Screen, tasks: EvaluationTask) -> Predictions:
    """The row that is handed true cells; conditions without further cells have no oracle and are left out."""
    cells = getattr(tasks, REFERENCES[row])
    keep = np.isfinite(cells).all((1, 2))
    names = np.array(screen.context_names)[tasks.context_index]
    return Predictions(tasks.observed[keep], tasks.observed[keep], tasks.target[keep], cells[keep], tasks.query[keep],
                       names[keep], screen.log_expression, {})


def predict_all(row: str, screen: Screen, tasks: EvaluationTask, rng: np.random.Generator,
                scale: str = "paper") -> Predictions:
    """The predictions of one row for all conditions, without `meta`."""
    if row in REFERENCES:
        return reference(row, screen, tasks)
    return predict_with(make(row, scale, screen, rng), screen, tasks, rng)


# ----------------------------------------------------------------------------------------------------------- the stage


def training_screen(s: Settings, screen: Screen) -> Screen:
    """What is trained on. Linear SCMs: the first graphs that MapPFN was trained on, behind those of `screen`."""
    if s.experiment != "linear":
        return screen
    import train
    from prior import linear_screen

    graphs = linear_screen(train.seeded(s.seed, 0, train.GRAPHS), s.contexts, s.genes, s.population)
    return join_screens(screen, graphs)  # behind, so that the contexts of `screen` keep their numbers


def write(s: Settings, rows: tuple[str, ...], split: int, screen: Screen,
          draws: list[tuple[int, EvaluationTask]]) -> None:
    """Write the files of one split, except those that are finished. Each row is fitted once for all draws of cells."""
    kept = {k: v for k, v in dataclasses.asdict(s).items() if k not in ("methods", "search", "out")}
    training = None
    for row, seed in itertools.chain.from_iterable(
            [(row, i) for i in range(s.seeds if row in TRAINED and s.experiment == "linear" else 1)] for row in rows):
        label = row if not (row in TRAINED and s.experiment == "linear") else f"{row}-seed{seed}"
        folder = s.out / s.scale / "samples" / s.experiment
        todo = [(draw, tasks) for draw, tasks in draws
                if not finished(folder / f"{label}-split{split}-draw{draw}.npz", kept)]
        if not todo:
            print(f"{label}-split{split}: already done", flush=True)
            continue
        start = time.perf_counter()
        generator = lambda *n: np.random.default_rng([s.seed, split, seed, zlib.crc32(row.encode()), *n])
        about = {}
        if row not in REFERENCES:
            training = training or training_screen(s, screen)
            baseline = make(row, s.scale, training, generator(0))
            if row in TRAINED:
                about = {"options": dataclasses.asdict(baseline.options), "parameters": baseline.parameters,
                         "fit_seconds": round(time.perf_counter() - start, 2)}
        for draw, tasks in todo:
            rng = generator(1, draw)
            p = reference(row, screen, tasks) if row in REFERENCES else predict_with(baseline, screen, tasks, rng)
            if not len(p.target):
                print(f"{label}-split{split}-draw{draw}: not run: no condition has cells besides the target's",
                      flush=True)
                continue
            meta = {"experiment": s.experiment, "method": label, "split": split, "resampling": draw, "seed": seed,
                    "scale": s.scale, "revision": scales.revision(), "settings": kept,
                    "seconds": round(time.perf_counter() - start, 3)} | about
            save_predictions(folder / f"{label}-split{split}-draw{draw}.npz", p._replace(meta=meta))
            start = time.perf_counter()
        print(f"{label}-split{split}: {len(p.target)} of {len(tasks.query)} conditions, {meta['seconds']} s",
              flush=True)


def validation_screen(screen: Screen, rng: np.random.Generator) -> Screen:
    """The screen with its VALIDATION conditions; if it has none, one training condition of each context becomes one."""
    if (screen.split == VALIDATION).any():
        return screen
    split = screen.split.copy()
    for c in np.flatnonzero((split[:, 1:] == TRAIN).sum(1) > 1):
        split[c, rng.choice(1 + np.flatnonzero(split[c, 1:] == TRAIN))] = VALIDATION
    return dataclasses.replace(screen, split=split)


def search(s: Settings, row: str, screen: Screen) -> None:
    """Fit every setting of Table 7's grid, write the RMSE on validation conditions; test conditions are never used."""
    if row not in GRIDS:
        raise BadInput(f"--search --methods {row}: Table 7 has a grid for {' and '.join(GRIDS)} only")
    rng = np.random.default_rng([s.seed, zlib.crc32(b"search")])
    screen = validation_screen(screen, rng)
    tasks, training, results = (evaluation_tasks(rng, screen, s.eval_cells, 0, VALIDATION),
                                training_screen(s, screen), [])
    for values in itertools.product(*GRIDS[row].values()):
        options = dict(zip(GRIDS[row], values))
        p = predict_with(make(row, s.scale, training, np.random.default_rng(s.seed), **options), screen, tasks, rng)
        error = float(np.mean([metrics.rmse(a, b) for a, b in zip(p.target, p.prediction)]))
        results.append({"options": options, "validation_rmse": error})
        print(f"{row} {options}: RMSE {error:.4f} on {len(p.target)} validation conditions", flush=True)
    best = min(results, key=lambda r: r["validation_rmse"])
    path = s.out / s.scale / "search" / f"{s.experiment}-{row}.json"
    with scales.atomic(path) as temporary:
        temporary.write_text(json.dumps({"row": row, "best": best, "all": results, "revision": scales.revision()},
                                        indent=1))
    print(f"best: {best['options']}; written to {path}; set it in the table of scales.py", flush=True)


def main() -> None:
    """Write all rows of all splits and draws of one experiment, or search the options of some."""
    from sample import evaluation_sets  # here, so that the simple rows can be imported without a model

    sections = lambda word: ("linear" if word == "linear" else "real", "evaluate")
    s = scales.parse(Settings, sections)
    known = (*METHODS, *TRAINED, *REFERENCES)
    if unknown := set(s.methods) - set(known):
        raise BadInput(f"--methods {' '.join(sorted(unknown))}: expected some of {', '.join(known)}")
    rows = s.methods or (*METHODS, *REFERENCES, *PUBLISHED.get(s.experiment, TRAINED))
    print(f"{s}\nrevision {scales.revision()}, numpy {np.__version__}", flush=True)
    sets = evaluation_sets(s.experiment, s)
    for split, group in itertools.groupby(sets, key=lambda entry: entry[0]):
        draws = [(draw, screen, tasks) for _, draw, screen, tasks in group]
        if s.search:
            return [search(s, row, draws[0][1]) for row in s.methods or GRIDS] and None
        write(s, rows, split, draws[0][1], [(draw, tasks) for draw, _, tasks in draws])
