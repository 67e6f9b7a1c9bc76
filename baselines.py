"""Stage 5 of 7 (beside `sample.py`), the baselines: predictions that need no large model, for every row of every table.

Paper: 5.2, appendix C.1. Reads what `sample.py` evaluates on (its `evaluation_sets`) and writes files of predictions
`out/<scale>/samples/<experiment>/<method>-split<s>-draw<r>.npz` for `metrics.py`.

    python baselines.py toy --scale smoke
    python baselines.py linear                       # laptop scale; seconds, most of them to build the data
    python baselines.py leukemia --scale paper
Departures from the paper, marked where they happen: D32, D33.

    symbol       name here           shape     meaning
    mu_c         control_means[c]    D         mean control cell of biological context c
    delta_ct     effects[r]          D         mean cell of the training condition r = (c, t), minus mu_c
    X_c          controls            N D       control cells to transform, others than the metrics compare with
    t            treatment           D         one-hot times the do-value, as the model gets it

    C contexts   T treatments   D genes   N cells   P test conditions   R training conditions

Most rows are X_c plus a shift, so the spread between cells is that of the control cells. In linear SCMs each condition
was divided by its own standard deviations and each context is another graph, so that effects hardly carry over, but for
one: the treated gene's own. The rows are computed all the same, and additive comes close to target only.
"""

import dataclasses
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import tyro
from jaxtyping import Float, Int

import scales
from data import CONTROL, TRAIN, EvaluationTask, Screen
from metrics import Predictions, finished, save_predictions
from scales import BadInput


class Baseline(Protocol):
    """What every method offers, from the row that copies its input to a trained network."""

    def __init__(self, screen: Screen, rng: np.random.Generator):
        """Fit to the conditions that are TRAIN; the cells of the others are never looked at."""

    def predict(self, controls: Float[np.ndarray, "N D"], context: int, treatment: Float[np.ndarray, "D"],
                rng: np.random.Generator) -> Float[np.ndarray, "N D"]:
        """One predicted cell for each control cell of biological context `context`."""


# ----------------------------------------------------------------------------------- what the training conditions tell


def treated_gene(treatments: Float[np.ndarray, "*batch D"]) -> Int[np.ndarray, "*batch"]:
    """Index of the treated gene; -1 if it is not among the genes."""
    return np.where(treatments.any(-1), np.abs(treatments).argmax(-1), -1)


class Effects:
    """Mean control cell of each context, and the effect delta_ct of each training condition, in float64."""

    def __init__(self, screen: Screen):
        mean = lambda c, t: screen.cells[screen.start[c, t] :][: screen.count[c, t]].mean(0, dtype=float)
        conditions = np.argwhere((screen.split == TRAIN) & (screen.count > 0))
        self.control_means = {c: mean(c, t) for c, t in conditions.tolist() if t == CONTROL}
        conditions = [(c, t) for c, t in conditions.tolist() if t != CONTROL and c in self.control_means]
        if not conditions:
            raise BadInput("no training condition, of a context that has control cells: nothing to fit a baseline to; "
                           "lower --min-cells, or use another split")
        self.contexts, treatments = np.array(conditions).T                                   # R, R
        self.genes = treated_gene(screen.treatments[self.contexts, treatments])              # R
        self.effects = np.array([mean(c, t) - self.control_means[c] for c, t in conditions])  # R D

    def of_context(self, context: int) -> Float[np.ndarray, "D"]:
        """Mean over the training treatments of the context; over all contexts if it has none."""
        same = self.contexts == context
        return self.effects[same if same.any() else slice(None)].mean(0)

    def of_gene(self, gene: int) -> Float[np.ndarray, "D"] | None:
        """Mean over the contexts in which the treatment of this gene is a training condition; None if in none."""
        same = self.genes == gene
        return self.effects[same].mean(0) if gene >= 0 and same.any() else None


# ------------------------------------------------------------------------------------------------ the simple rows (5.2)

# [D32] paper: identity and "observed" are the only rows besides trained methods; here: four more, because a
# trained method that does not beat a mean effect has learnt nothing about treatments.


class Identity:
    """Control cells as they are (5.2): no treatment does anything."""

    def __init__(self, screen: Screen, rng: np.random.Generator):
        self.log_expression = screen.log_expression

    def predict(self, controls: Float[np.ndarray, "N D"], context: int, treatment: Float[np.ndarray, "D"],
                rng: np.random.Generator) -> Float[np.ndarray, "N D"]:
        return controls


class TargetOnly(Identity):
    """Control cells with the treated gene at its do-value, or silent if it was knocked out: nothing lies downstream."""

    def predict(self, controls, context, treatment, rng):
        cells, gene = controls.copy(), treated_gene(treatment)
        if gene >= 0:
            cells[:, gene] = 0 if self.log_expression else treatment[gene]
        return cells


class ContextMean:
    """X_c plus the mean effect of the context's training treatments: the row to beat for unseen treatments."""

    def __init__(self, screen: Screen, rng: np.random.Generator):
        self.effects = Effects(screen)
        self.lowest = 0 if screen.log_expression else -np.inf  # expression is never negative

    def delta(self, context: int, treatment: Float[np.ndarray, "D"]) -> Float[np.ndarray, "D"]:
        return self.effects.of_context(context)

    def predict(self, controls: Float[np.ndarray, "N D"], context: int, treatment: Float[np.ndarray, "D"],
                rng: np.random.Generator) -> Float[np.ndarray, "N D"]:
        return np.maximum(controls + self.delta(context, treatment), self.lowest).astype(np.float32)


class Additive(ContextMean):
    """X_c plus the treatment's mean effect in the contexts where it was trained on, or else the context's mean effect:
    the row to beat across contexts."""

    def delta(self, context, treatment):
        effect = self.effects.of_gene(int(treated_gene(treatment)))
        return self.effects.of_context(context) if effect is None else effect


class ConstantMean(ContextMean):
    """Every cell at mu_c plus the context's mean effect: a check on the metrics (see W2), never a competitor."""

    def predict(self, controls, context, treatment, rng):
        mean = self.effects.control_means[context] + self.delta(context, treatment)
        return np.maximum(np.broadcast_to(mean, controls.shape), self.lowest).astype(np.float32)


METHODS = {"identity": Identity, "target-only": TargetOnly, "context-mean": ContextMean, "additive": Additive,
           "constant-mean": ConstantMean}

# Rows that are handed true cells. [D33] paper: "observed"; released code: a second draw from the pool that
# the target was drawn from, so that the two share cells; here: also "oracle", true cells of which none is in the
# target, because that is what a perfect model would score.
REFERENCES = {"observed": "again", "oracle": "fresh"}


# ----------------------------------------------------------------------------------------------------------- the stage


@dataclass(frozen=True)
class Settings:
    """Write the predictions of the simple baselines."""
    experiment: tyro.conf.Positional[str]               # linear, or a folder below out/<scale>/data
    methods: tuple[str, ...] = (*METHODS, *REFERENCES)  # rows to compute
    eval_cells: int = 200                               # cells per population that metrics compare (B.3)
    genes: int = 20                                     # linear: variables D (5.1)
    held_out: int = 10                                  # linear: unseen graphs
    context: int = 8                                    # context experiments K (B.2); no simple row looks at them
    splits: int = 1                                     # random splits into train and test treatments (B.4)
    resamplings: int = 10                               # draws of cells per split (Table 3)
    seed: int = 0                                       # of the baselines' own randomness
    scale: str = "paper"                                # column of the table in scales.py
    out: Path = Path("out")                             # folder of all results


def predict_all(method: str, screen: Screen, tasks: EvaluationTask, rng: np.random.Generator) -> Predictions:
    """The predictions of one row for all conditions, without `meta`."""
    keep = np.ones(len(tasks.query), bool)
    if method in REFERENCES:
        cells = getattr(tasks, REFERENCES[method])
        keep = np.isfinite(cells).all((1, 2))  # NaN: a condition without further cells has no oracle
    else:
        baseline = METHODS[method](screen, rng)
        cells = np.array([baseline.predict(controls, int(c), treatment, rng) for controls, c, treatment
                          in zip(tasks.identity, tasks.context_index, tasks.query)])
    names = np.array(screen.context_names)[tasks.context_index]
    source = tasks.observed if method in REFERENCES else tasks.identity
    return Predictions(tasks.observed[keep], source[keep], tasks.target[keep], cells[keep], tasks.query[keep], names[keep],
                       screen.log_expression, {})


def write(settings: Settings, split: int, resampling: int, screen: Screen, tasks: EvaluationTask) -> None:
    """Write the files of one split and draw, except for those that are finished."""
    kept = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("methods", "out")}
    for method in settings.methods:
        name = f"{method}-split{split}-draw{resampling}"
        path = settings.out / settings.scale / "samples" / settings.experiment / f"{name}.npz"
        if finished(path, kept):
            print(f"{name}: already done", flush=True)
            continue
        start = time.perf_counter()
        rng = np.random.default_rng([settings.seed, split, resampling, zlib.crc32(method.encode())])
        predictions = predict_all(method, screen, tasks, rng)
        if not len(predictions.target):
            print(f"{name}: not run: no condition has cells besides the target's", flush=True)
            continue
        meta = {"experiment": settings.experiment, "method": method, "split": split, "resampling": resampling,
                "seed": settings.seed, "scale": settings.scale, "revision": scales.revision(), "settings": kept,
                "seconds": round(time.perf_counter() - start, 3)}
        save_predictions(path, predictions._replace(meta=meta))
        print(f"{name}: {len(predictions.target)} of {len(tasks.query)} conditions, {meta['seconds']} s", flush=True)


def main() -> None:
    """Write all rows of all splits and draws of one experiment."""
    from sample import evaluation_sets  # here, so that the rows above can be imported without a model

    sections = lambda word: ("linear" if word == "linear" else "real", "evaluate")
    settings = scales.parse(Settings, sections)
    if unknown := set(settings.methods) - {*METHODS, *REFERENCES}:
        raise BadInput(f"--methods {' '.join(sorted(unknown))}: expected some of {', '.join((*METHODS, *REFERENCES))}")
    print(f"{settings}\nrevision {scales.revision()}, numpy {np.__version__}", flush=True)
    for split, resampling, screen, tasks in evaluation_sets(settings.experiment, settings):
        write(settings, split, resampling, screen, tasks)


if __name__ == "__main__":
    scales.run(main)
