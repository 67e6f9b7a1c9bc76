"""Stage 5 of 8 (beside `sample.py`), the baselines: predictions of simpler rules and of five published methods.

Paper: 5.2, B.4, appendix C.1, C.3. Reads a screen, and predicts what `sample.py` predicts; writes predictions
`out/<scale>/samples/<screen>/<row>-split<s>-draw<d>.npz` for `metrics.py`; with `--search`, a table of validation
errors `out/<scale>/search/<screen>-<row>.json` instead. One file for each method; `simple.py` has the rows without
training, `fitting.py` what the trained ones share.

    python -m baselines --screen toy --scale smoke
    python -m baselines --screen linear                              # laptop scale: minutes
    python -m baselines --screen leukemia --scale paper
    python -m baselines --screen leukemia --methods cpa additive     # some rows only
    python -m baselines --screen linear --methods condot --search    # Table 7's grid, chosen on validation conditions
Departures from the paper, marked where they happen: D32, D33, D55, and those of the methods, D35 to D48 and D54
(DEPARTURES.md).

MapPFN sees the known half of a held-out system as context experiments only; a baseline, which cannot be told of a
system in any other way, is trained on it, and on all other systems (B.4).

    paper    name here    shape     meaning
    Y^obs    controls     N D       control cells: a prediction has one cell for each
    psi      system       ()        number of the causal system in the screen
    t_q      treatment    D         one-hot times the do-value of the treatment whose cells are wanted

    P conditions to predict   N cells   D genes

A new baseline is a file with a class like `Baseline` and a line in TRAINED.
"""

import dataclasses
import importlib
import itertools
import json
import time
import zlib
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

import metrics
import prior
import scales
import tasks
from baselines import graph, simple
from baselines.simple import known_conditions
from scales import BadInput
from tasks import VALIDATION, Evaluation, Screen


@runtime_checkable
class Baseline(Protocol):
    """What every method offers, from the row that copies its input to a trained network."""

    def __init__(self, screen: Screen, rng: np.random.Generator):
        """Fit to the known conditions; the cells of the others are never looked at. Trained ones also take options."""

    def predict(self, controls: Float[np.ndarray, "N D"], system: int, treatment: Float[np.ndarray, "D"],
                rng: np.random.Generator) -> Float[np.ndarray, "N D"]:
        """One predicted cell for each control cell."""


class Row(NamedTuple):
    """A trained row of the tables."""
    method: str                  # file and class; the file is also its section of the table of scales
    of_expression: bool = False  # made for expression: left out on other data, as in Table 2


METHODS = {  # the simple rows: a class that is fitted to a screen, and predicts
    "identity": simple.Identity,
    "target-only": simple.TargetOnly,
    "system-mean": simple.SystemMean,
    "additive": simple.Additive,
    "target-gene": simple.TargetGene,
    "bilinear-ridge": simple.BilinearRidge,
    "constant-mean": simple.ConstantMean,
}
GRAPH = {  # told the causal graph, or its order only, of linear SCMs
    "known-graph": graph.KnownGraph,
    "known-order": graph.KnownOrder,
}
NEW_CELLS = (*GRAPH, "constant-mean")  # the others move control cells
UNFITTED = ("identity", "target-only", *GRAPH)  # of these, what no condition of the screen has a say in
TRAINED = {
    "cpa": Row("cpa.CPA", of_expression=True),
    "condot": Row("condot.CondOT"),
    "mfm": Row("mfm.MFM"),
    "cellflow": Row("cellflow.CellFlow", of_expression=True),
    "state": Row("state.State", of_expression=True),
}

# Rows that are handed true cells. [D33] paper: "observed"; released code: a second draw from the pool that
# the target was drawn from, so that the two share cells; here: also "oracle", true cells of which none is in the
# target, because that is what a perfect model would score.
REFERENCES = {"observed": "again", "oracle": "fresh"}


@dataclass(frozen=True)
class Settings(tasks.EvaluationSettings):
    """Write the predictions of the baselines."""
    methods: tuple[str, ...] = ()  # rows to compute; if none, all that suit the screen
    search: bool = False  # try Table 7's grid on validation conditions instead
    seeds: int = 1  # fits of each trained row, seeds 0, 1, ...; three on linear SCMs (Table 2)


# ---------------------------------------------------------------------------------------------------------------- rows


def trained_class(row: str) -> type:
    """The class of a trained row; imported only when asked for, so that the simple rows need no JAX."""
    file, name = TRAINED[row].method.split(".")
    return getattr(importlib.import_module(f"baselines.{file}"), name)


def options_of(row: str, scale: str, section: str, **changes):
    """Options of a trained row: the method's own, changed by the table of scales and by `changes`.

    `section` is that of the screen: linear SCMs have other numbers of updates (section "condot-linear").
    """
    method = TRAINED[row].method.split(".")[0]
    changed = scales.at(scale, method, f"{method}-{section}")
    return trained_class(row).Options(**changed | changes)


def make(row: str, scale: str, screen: Screen, rng: np.random.Generator, **changes) -> Baseline:
    """A fitted baseline. Raises BadInput if there is nothing to fit it to."""
    if row in METHODS | GRAPH:
        return (METHODS | GRAPH)[row](screen, rng)
    return trained_class(row)(screen, rng, options_of(row, scale, screen.made["section"], **changes))


def default_rows(screen: Screen) -> list[str]:
    """The simple rows, the references, and the trained rows that suit the data."""
    rows = [*METHODS, *REFERENCES]
    if screen.weights is not None:
        rows += GRAPH
    for name, row in TRAINED.items():
        if screen.log_expression or not row.of_expression:
            rows.append(name)
    return rows


def predict(row: str, baseline: Baseline | None, screen: Screen, evaluation: Evaluation,
            rng: np.random.Generator) -> metrics.Predictions:
    """The predictions of one row for all conditions, without `meta`. A row that is handed true cells has no baseline,
    and leaves out conditions that have no such cells."""
    given, target, names = evaluation.given, evaluation.target, np.array(screen.systems)[evaluation.system]
    known = given.query, evaluation.true_means(screen), names
    if row in REFERENCES:
        cells = getattr(evaluation, REFERENCES[row])
        arrays = given.controls, given.controls, target, cells, *known
        keep = np.isfinite(cells).all(axis=(1, 2))
        return metrics.Predictions(*(array[keep] for array in arrays), screen.log_expression, {})
    cells = np.empty_like(target)
    for p, system in enumerate(evaluation.system.tolist()):
        cells[p] = baseline.predict(evaluation.identity[p], system, given.query[p], rng)
    twins = None
    if row not in NEW_CELLS:
        twins = prior.twins(screen, evaluation, evaluation.identity)
    return metrics.Predictions(given.controls, evaluation.identity, target, cells, *known, screen.log_expression, {},
                               twins)


# ----------------------------------------------------------------------------------------------------------- the stage


def settings_of(s: Settings, row: str, screen: Screen) -> dict:
    """What a finished file must have been made with; how many rows, seeds and draws there are is no part of that."""
    kept = dataclasses.asdict(s) | {"data": screen.made["fingerprint"]}
    for name in ("methods", "search", "seeds", "draws", "out"):
        del kept[name]
    if row in TRAINED:
        kept["options"] = dataclasses.asdict(options_of(row, s.scale, screen.made["section"]))
    return kept


def write(s: Settings, row: str, seed: int, split: int, screen: Screen, draws: dict[int, Evaluation]) -> None:
    """Write one row of one split, except what is finished; it is fitted once for all draws of cells.

    A trained row is `<row>-seed<k>`, and the same fit whatever other seeds there are.
    """
    kept, label = settings_of(s, row, screen), row
    if row in TRAINED:
        label = f"{row}-seed{seed}"
    todo = {}
    for draw, evaluation in draws.items():
        path = tasks.samples_file(s, label, split, draw)
        if not metrics.finished(path, kept):
            todo[path] = draw, evaluation
    if not todo:
        print(f"{label}-split{split}: already done", flush=True)
        return
    numbers = s.seed, split, seed, zlib.crc32(row.encode())
    start, baseline, about = time.perf_counter(), None, {}
    if row in TRAINED or row in METHODS and row not in UNFITTED:
        about["fitted_to"] = int(known_conditions(screen)[:, 1:].sum())
    if row not in REFERENCES:
        baseline = make(row, s.scale, screen, scales.generator("baseline", *numbers))
    if row in TRAINED:
        about |= {"options": kept["options"], "parameters": baseline.parameters,
                  "conditions_on": baseline.conditions_on, "trained_seed": seed, "updates": baseline.updates,
                  "stopped": baseline.stopped, "validation": baseline.validation,
                  "fit_seconds": round(time.perf_counter() - start, 2)}
    for path, (draw, evaluation) in todo.items():
        p = predict(row, baseline, screen, evaluation, scales.generator("baseline", *numbers, draw))
        if not len(p.target):
            print(f"{path.stem}: not run: no condition has cells besides the target's", flush=True)
            continue
        seconds = round(time.perf_counter() - start, 3)
        meta = {"screen": s.screen, "title": screen.made["title"], "paper": screen.made.get("paper"),
                "row": label, "split": split, "draw": draw, "seed": s.seed, "scale": s.scale,
                "revision": scales.revision(), "settings": kept, "fingerprint": screen.made["fingerprint"],
                "genes": screen.genes, "seconds": seconds}
        metrics.save_predictions(path, p._replace(meta=meta | about))
        print(f"{path.stem}: {len(p.target)} of {len(evaluation.system)} conditions, {seconds} s", flush=True)
        start = time.perf_counter()


# -------------------------------------------------------------------------------- the search of options (C.3, Table 7)


def search(s: Settings, row: str, screen: Screen) -> None:
    """Fit every setting of Table 7's grid, write the RMSE on validation conditions; test conditions are never used.

    Where there is none, training conditions are left out in turn, and a setting is fitted once for each of them [D55].
    """
    grid = trained_class(row).grid
    results = []
    for values in itertools.product(*grid.values()):
        options, errors = dict(zip(grid, values)), []
        for fold in tasks.folds(screen):
            evaluation = tasks.evaluation_tasks(fold, s.eval_cells, 0, s.seed, split=VALIDATION)
            rng = scales.generator("baseline", s.seed)
            p = predict(row, make(row, s.scale, fold, rng, **options), fold, evaluation, rng)
            errors += [metrics.rmse(true, predicted) for true, predicted in zip(p.target, p.prediction)]
        results.append({"options": options, "validation_rmse": float(np.mean(errors))})
        print(f"{row} {options}: RMSE {np.mean(errors):.4f} on {len(errors)} validation conditions", flush=True)
    best = min(results, key=lambda result: result["validation_rmse"])
    path = s.out / s.scale / "search" / f"{s.screen}-{row}.json"
    found = {"row": row, "best": best, "all": results, "revision": scales.revision()}
    with scales.atomic(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1))
    print(f"best: {best['options']}; written to {path}; set it in the table of scales.py", flush=True)


def searched_rows(s: Settings) -> list[str]:
    """The rows that have a grid. Raises BadInput if another one was asked for."""
    have = [row for row in TRAINED if trained_class(row).grid]
    for row in s.methods:
        if row not in have:
            raise BadInput(f"--search --methods {row}: Table 7 has a grid for {' and '.join(have)} only")
    return list(s.methods) or have


def sections(s: Settings) -> tuple[str, ...]:
    """Of the table of scales."""
    return tasks.section_of(s), "evaluate"


def main() -> None:
    """Write all rows of all splits and draws of one screen, or search the options of some."""
    s = scales.parse(Settings, sections)
    known = (*METHODS, *REFERENCES, *GRAPH, *TRAINED)
    unknown = sorted(set(s.methods) - set(known))
    if unknown:
        raise BadInput(f"--methods {' '.join(unknown)}: expected some of {', '.join(known)}")
    print(f"{s}\nrevision {scales.revision()}, numpy {np.__version__}", flush=True)
    if s.search:
        screen = tasks.load_screen(tasks.splits(s)[0])
        for row in searched_rows(s):
            search(s, row, screen)
        return
    for split, group in itertools.groupby(tasks.evaluations(s, context=0), key=lambda entry: entry[0]):
        draws = {}
        for _, draw, screen, evaluation in group:
            draws[draw] = evaluation
        for row in s.methods or default_rows(screen):
            seeds = s.seeds if row in TRAINED else 1
            with scales.alone(tasks.samples_file(s, row, split, 0).with_name(row)):
                for seed in range(seeds):
                    write(s, row, seed, split, screen, draws)
