"""Stage 6 of 8, the metrics: compare predicted with true cells, one JSON file for each file of predictions.

Paper: 5.3, appendix C.2, equations 4 and 6-13. Reads `out/<scale>/samples/<screen>/*.npz`, which `sample.py` and
`baselines` write (the format is `Predictions` below), and writes a `.json` of the same name beside each.

    python metrics.py out/smoke/samples              # a folder with all folders below it, or single files
    python metrics.py out/laptop/samples/linear
    python metrics.py out/paper/samples
After 15 s of imports and compilation it takes 0.1 to 0.2 s a condition of 200 cells on two CPU cores, 0.02 s at 100.
Your own metric: a function, and its line in METRICS; files whose JSON lacks it are done again, and it is a column of
every table. Departure from the paper, marked where it happens: D28.

    paper        name here     shape     meaning
    Y^obs        controls      P N D     control cells
    Y            true          P N D     true cells under the treatment (`target` in files)
    Y-hat        predicted     P N D     predicted cells (`prediction` in files)
    mu, mu-hat   mu, mu_hat    P D       their means over cells
    l, p         fold_change, adjusted  P D  log2 fold change against control, Benjamini-Hochberg adjusted p-value
    Z, R         truth, score  P D       gene is differentially expressed in truth; how strongly the prediction says so

    P conditions, that is pairs of a system and a treatment   N, M, L cells   D genes

Two traps, both shown in `tests/test_metrics.py`. *W2 rewards shrinking*: with a few hundred cells in tens of genes,
most of it is the distance between any two samples of one distribution; cells pulled towards their mean beat a fresh
sample of the truth. Read it beside MMD and the variance error. *MR rewards fresh cells*: likewise, other control cells,
as they are, reach 0.93 on linear SCMs at the paper's size, and source cells shifted by exactly a small effect near 0.
"""

import functools
import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.spatial
import scipy.stats
import sklearn.metrics
import tyro
from jaxtyping import Float, Shaped

import scales
from scales import BadInput

EPSILON = 0.1                           # entropic regularisation, absolute: in squared units of the data (C.2)
GAMMAS = (10.0, 1.0, 0.1, 0.01, 0.001)  # inverse squared length scales of the Gaussian kernel (C.2)
P_VALUE = 0.01                          # tau_p = 2 in -log10 p (C.2)
FOLD_CHANGE = 0.2                       # tau_l, in |log2 fold change| (C.2)


class Predictions(NamedTuple):
    """The content of one file of predictions: one screen, row of the tables, split and draw of cells."""
    controls: Float[np.ndarray, "P N D"]     # control cells that differential expression is tested against
    source: Float[np.ndarray, "P N D"]       # control cells that the prediction was made from, for MR
    target: Float[np.ndarray, "P N D"]       # true cells
    prediction: Float[np.ndarray, "P N D"]
    treatments: Float[np.ndarray, "P D"]     # one-hot times the do-value
    expected: Float[np.ndarray, "P D"]       # true means, where a simulation knows them; else NaN
    systems: Shaped[np.ndarray, "P"]         # name of the system of each condition
    log_expression: bool                     # log1p data, for which AUPRC is defined
    meta: dict                               # screen, row, split, draw, seed, scale, revision, settings...
    twins: Float[np.ndarray, "P N D"] | None = None  # what each `source` cell would have been, where that is known


@functools.cache
def _sinkhorn_divergence():
    """OTT's solver, compiled once per pair of shapes. Imported here since `import ott` alone takes several seconds."""
    import jax
    from ott.tools.sinkhorn_divergence import sinkdiv

    def divergence(x, y):
        return sinkdiv(x, y, epsilon=EPSILON)[0]

    # No vmap: a batch iterates until its slowest problem has converged, so on a CPU a plain loop is at least as fast.
    return jax.jit(divergence)


def wasserstein(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M D"]) -> float:
    """The tables' "W2" (eq. 8): Sinkhorn divergence on squared Euclidean cost, in squared units of the data. Zero for
    x = y up to the solver's tolerance, about 1e-5; for cells many deviations apart its 2,000 iterations cost 1e-4."""
    # Paper: eq. 6 takes the square root of each transport cost; released code: OTT's divergence of the squared cost,
    # without a root; here as released, because only so do the tables' values come out.
    divergence = _sinkhorn_divergence()
    return float(divergence(np.asarray(x, np.float32), np.asarray(y, np.float32)))


def mean_kernel(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M D"]) -> float:
    """Gaussian kernel (eq. 10), mean over all pairs of cells and over the length scales."""
    squared = scipy.spatial.distance.cdist(x, y, "sqeuclidean")
    total = 0.0
    for gamma in GAMMAS:
        total += np.exp(-gamma * squared).mean()
    return float(total / len(GAMMAS))


def mmd(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M D"]) -> float:
    """Squared maximum mean discrepancy (eq. 9), Gaussian kernel, mean over five length scales. Includes each cell's
    kernel with itself (V-statistic): zero for x = y, but up to 1/N + 1/M for two samples of one distribution."""
    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def rmse(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M D"]) -> float:
    """Root mean square over genes of the difference of means (eq. 11)."""
    difference = x.mean(0, dtype=float) - y.mean(0, dtype=float)
    return float(np.sqrt(np.mean(difference**2)))


def variance_rmse(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M D"]) -> float:
    """Root mean square over genes of the difference of variances. Not in the paper: shows what W2 rewards."""
    difference = x.var(0, dtype=float) - y.var(0, dtype=float)
    return float(np.sqrt(np.mean(difference**2)))


def magnitude_ratio(controls: Float[np.ndarray, "N D"], true: Float[np.ndarray, "M D"],
                    predicted: Float[np.ndarray, "L D"]) -> float:
    """MR (eq. 4): how far the prediction is from the control cells, over how far the truth is; NaN if that is zero.
    1 for a perfect prediction (and for many others); 0 only for the control cells themselves."""
    effect = wasserstein(controls, true)
    if effect <= 0:
        return float("nan")
    return wasserstein(controls, predicted) / effect


# Exercise 7
def pds_ranks(true: Float[np.ndarray, "P N D"], predicted: Float[np.ndarray, "P M D"]) -> Float[np.ndarray, "P"]:
    """PDS (eq. 12) of each prediction: the share of the *other* true means that are as close to it as its own, NaN if
    P = 1. 0 perfect, 1 worst; one prediction for all treatments has a mean of 1/2."""
    others = len(true) - 1
    if others == 0:
        return np.full(1, np.nan)
    mu, mu_hat = true.mean(1, dtype=float), predicted.mean(1, dtype=float)
    distance = np.linalg.norm(mu_hat[:, None] - mu[None], axis=-1)  # P P, predicted by true
    own = np.diag(distance)[:, None]
    # A tie counts against the prediction (<=); the factor keeps it a tie when rounding makes its two sides differ.
    closer = distance <= own * (1 + 1e-9)
    return (closer.sum(1) - 1) / others


def pds(true: Float[np.ndarray, "P N D"], predicted: Float[np.ndarray, "P M D"]) -> float:
    """Perturbation discrimination score: the mean of these ranks."""
    return float(pds_ranks(true, predicted).mean())


# ------------------------------------------------------------------------- differentially expressed genes (C.2, eq. 13)


def level(cells: Float[np.ndarray, "P N D"]) -> Float[np.ndarray, "P D"]:
    """Expression of each gene in a population, back on the scale of counts."""
    # Paper: ratio of means; released code: scanpy's ratio of expm1(mean of log1p), nearly of geometric means; here as
    # released, because the tables are. Its 1e-9 keeps silent genes finite: silent on one side |l| is up to 30, so that
    # an exact zero ranks first; on both sides l = 0. A negative mean is impossible and counts as silent.
    return np.expm1(np.maximum(cells.mean(1, dtype=float), 0)) + 1e-9


def differential_expression(controls: Float[np.ndarray, "P N D"], treated: Float[np.ndarray, "P M D"],
                            ) -> tuple[Float[np.ndarray, "P D"], Float[np.ndarray, "P D"]]:
    """Adjusted p-values and log2 fold changes of treated against control cells, natural log1p data: as from
    `scanpy.tl.rank_genes_groups(method="wilcoxon")` up to rounding (a test says so), and many times faster."""
    # Paper: a Wilcoxon rank-sum test; released code: scanpy's, which by default does not correct the variance for
    # ties; here as released, because the tables are. Equal zeros are ties: sparse genes get too large a p.
    n, m = treated.shape[1], controls.shape[1]
    ranks = scipy.stats.rankdata(np.concatenate([treated, controls], axis=1), axis=1)
    rank_sum = ranks[:, :n].sum(1)  # P D
    expected = n * (n + m + 1) / 2
    deviation = np.sqrt(n * m * (n + m + 1) / 12)
    p_value = 2 * scipy.stats.norm.sf(np.abs(rank_sum - expected) / deviation)
    adjusted = scipy.stats.false_discovery_control(p_value, axis=1)  # over the genes
    return adjusted, np.log2(level(treated) / level(controls))


def precision_recall_area(truth: Shaped[np.ndarray, "P D"], score: Shaped[np.ndarray, "P D"]) -> float:
    """Area under the precision-recall curve, all conditions in one ranking; NaN if there is nothing to be found."""
    # Paper: speaks of one perturbation; released code: one ranking of the genes of all conditions; here as released,
    # because a condition without differentially expressed genes has no curve of its own.
    if not truth.any():
        return float("nan")
    return float(sklearn.metrics.average_precision_score(truth.ravel(), score.ravel()))


def pseudo_values(truth: Shaped[np.ndarray, "P D"], score: Shaped[np.ndarray, "P D"]) -> Float[np.ndarray, "P"]:
    """Jackknife: P times the area minus P - 1 times the one without condition i, for each i; NaN where that is not
    defined, and everywhere if all that is to be found is in one condition. Each says what its condition contributes;
    their spread gives the error of the area (Tukey, 1958)."""
    conditions, found = len(truth), []
    whole = precision_recall_area(truth, score)
    if truth.any(axis=1).sum() < 2:  # what the others contribute says nothing of its spread
        return np.full(conditions, np.nan)
    for i in range(conditions):
        without = precision_recall_area(np.delete(truth, i, axis=0), np.delete(score, i, axis=0))
        found.append(conditions * whole - (conditions - 1) * without)
    return np.array(found)


# Exercise 7
def deg_auprc(controls: Float[np.ndarray, "P N D"], true: Float[np.ndarray, "P M D"],
              predicted: Float[np.ndarray, "P L D"], treatments: Float[np.ndarray, "P D"] | None = None) -> dict:
    """Area under the precision-recall curve for finding differentially expressed genes (C.2); log-expression data only.

    Returns `auprc`; `base_rate`, that of a random ranking; `target_only`, that of a ranking by "is treated" (NaN
    without `treatments`); `n_degs`, how many genes are to be found; `note`: why both areas are NaN if there are none;
    `conditions`, the P pseudo-values of `auprc`.
    """
    p, fold_change = differential_expression(controls, true)
    truth = (p < P_VALUE) & (np.abs(fold_change) > FOLD_CHANGE)  # Z, P D
    p, fold_change = differential_expression(controls, predicted)
    score = np.abs(fold_change) * (p < P_VALUE)                  # R, P D

    target_only, note = float("nan"), ""
    if treatments is not None:
        target_only = precision_recall_area(truth, treatments != 0)
    if not truth.any():
        note = "no gene is differentially expressed in truth: AUPRC is undefined"
    return {"auprc": precision_recall_area(truth, score), "base_rate": float(truth.mean()),
            "target_only": target_only, "n_degs": int(truth.sum()), "note": note,
            "conditions": pseudo_values(truth, score)}


def each(distance: Callable) -> Callable:
    """A distance between two populations as a metric of a file: its value for each of the P conditions."""
    def compute(p: Predictions) -> Float[np.ndarray, "P"]:
        return np.array([distance(*cells) for cells in zip(p.target, p.prediction)])

    return compute


def magnitude_ratios(p: Predictions) -> Float[np.ndarray, "P"]:
    """MR of each condition: how far from the cells it was made from, which gives identity its 0 (Table 2)."""
    return np.array([magnitude_ratio(*cells) for cells in zip(p.source, p.target, p.prediction)])


def pds_within_systems(p: Predictions) -> Float[np.ndarray, "P"]:
    """Rank of each condition among those of its own system."""
    # [D28] paper: a single held-out context; here: where there are several systems, the true means of the others
    # are no rivals, because they can be told apart without knowing the treatment.
    ranks = np.empty(len(p.target))
    for system in np.unique(p.systems):
        own = p.systems == system
        ranks[own] = pds_ranks(p.target[own], p.prediction[own])
    return ranks


def pooled_auprc(p: Predictions) -> dict:
    """`deg_auprc` of all conditions together; None where it is not defined, as in Table 2."""
    if not p.log_expression:
        return {"auprc": None, "base_rate": None, "target_only": None, "n_degs": None,
                "note": "not log-expression data", "conditions": np.full(len(p.target), np.nan)}
    return deg_auprc(p.controls, p.target, p.prediction, p.treatments)


def off_target_r2(p: Predictions) -> Float[np.ndarray, "P"]:
    """Share of what knock-outs do to *other* variables that is predicted: 1 - error / effect, both squares summed over
    all variables but the treated one, against the mean of infinitely many cells (linear SCMs; NaN for others).

    0 is to say that nothing else moves, 1 is perfect. M cells have a mean with an error of variance / M of its own, by
    which the squared error is reduced, so that it says nothing of M. This holds for counterfactual cells too: what they
    are made of is a draw of its own (tasks.evaluation_tasks), if there are twice as many control cells.
    The mean of the P values is R2: the effect is the mean one of all conditions."""
    off = p.treatments == 0
    error = (p.prediction.mean(axis=1, dtype=float) - p.expected) ** 2
    error -= p.prediction.var(axis=1, dtype=float, ddof=1) / p.prediction.shape[1]
    effect = np.mean((p.expected**2 * off).sum(axis=1))
    return 1 - (error * off).sum(axis=1) / effect


def twin_rmse(p: Predictions) -> Float[np.ndarray, "P"]:
    """How far each predicted cell is from what the control cell that it was made from would have been: root mean square
    over cells and all variables but the treated one. NaN where that is not known, or cells are new ones."""
    if p.twins is None:
        return np.full(len(p.target), np.nan)
    off = (p.treatments == 0)[:, None]
    squared = ((p.prediction - p.twins) ** 2 * off).mean(axis=(1, 2), dtype=float)
    return np.sqrt(squared / off.mean(axis=(1, 2)))


class Metric(NamedTuple):
    """A column of the tables."""
    heading: str
    factor: float      # of the values in tables, as 1000 for thousandths
    better: str        # "lower", "higher", or "one": the closer to 1 the better
    compute: Callable  # of Predictions: P values; or, if only all of them together have one, a dict that holds it,
    #                    and may hold `conditions`, P pseudo-values


METRICS = {
    "wasserstein": Metric("W2", 1, "lower", each(wasserstein)),
    "mmd": Metric("MMD e-3", 1000, "lower", each(mmd)),
    "rmse": Metric("RMSE", 1, "lower", each(rmse)),
    "pds": Metric("PDS", 1, "lower", pds_within_systems),
    "magnitude_ratio": Metric("MR", 1, "one", magnitude_ratios),
    "auprc": Metric("AUPRC", 1, "higher", pooled_auprc),
    "variance_rmse": Metric("variance RMSE", 1, "lower", each(variance_rmse)),
    "off_target_r2": Metric("off-target R2", 1, "higher", off_target_r2),
    "twin_rmse": Metric("twin RMSE", 1, "lower", twin_rmse),
}


def defined(value):
    """None, which JSON has, in place of NaN, which it has not."""
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def treated_genes(p: Predictions) -> list[str]:
    """The name of each condition's treated gene; its number, where the file does not name the genes."""
    genes = p.meta.get("genes") or range(p.treatments.shape[1])
    return [str(genes[i]) for i in np.abs(p.treatments).argmax(axis=1).tolist()]


def evaluate(p: Predictions) -> dict:
    """For JSON, every metric: its number under its name, and under `conditions` its P values where it has them, with
    the `systems` and `treatments` that they belong to. None stands for what is not defined; means are over the
    conditions that remain."""
    numbers, conditions = {}, {}
    for name, metric in METRICS.items():
        found = metric.compute(p)
        if isinstance(found, dict):
            values = found.pop("conditions", None)
            numbers |= found
        else:
            values, kept = found, found[np.isfinite(found)]
            numbers[name] = float(kept.mean()) if len(kept) else None
        if values is not None:
            conditions[name] = [defined(value) for value in values.tolist()]
    numbers = {name: defined(value) for name, value in numbers.items()}
    return numbers | {"log_expression": bool(p.log_expression), "systems": p.systems.tolist(),
                      "treatments": treated_genes(p), "conditions": conditions}


# ------------------------------------------------------------------------------------------------ files of predictions


def check_predictions(path: str | Path, p: Predictions) -> None:
    """Raises BadInput if the arrays do not fit together or a number is not finite."""
    if p.treatments.ndim != 2 or p.systems.shape != p.treatments.shape[:1]:
        raise BadInput(f"{path}: 'treatments' {p.treatments.shape} and 'systems' {p.systems.shape} do not fit "
                       "together; expected conditions x genes and conditions; write the file again")
    for name in ("controls", "source", "target", "prediction"):
        array = getattr(p, name)
        if array.ndim != 3 or array.size == 0 or array.shape[::2] != p.treatments.shape:
            raise BadInput(f"{path}: '{name}' has shape {array.shape}; expected conditions x cells x genes that fit "
                           f"'treatments' {p.treatments.shape}; write the file again")
        bad = np.sum(~np.isfinite(array))
        if bad:
            raise BadInput(f"{path}: {bad} of the {array.size} values of '{name}' are not finite; if a model made "
                           "them, it has diverged: train it again with a lower --learning-rate")


def save_predictions(path: str | Path, p: Predictions) -> None:
    """Write `path` (.npz), whole or not at all. Raises BadInput as `check_predictions` does."""
    check_predictions(path, p)
    arrays = p._asdict()
    for name in ("controls", "source", "target", "prediction", "treatments", "expected"):
        arrays[name] = np.asarray(arrays[name], np.float32)
    if p.twins is None:
        del arrays["twins"]
    arrays["meta"] = json.dumps(p.meta, default=str)
    with scales.atomic(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def load_predictions(path: str | Path) -> Predictions:
    """Read what `save_predictions` wrote. Raises BadInput for a file that is missing, damaged or of another kind."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file; sample.py and baselines write files of predictions")
    try:
        with np.load(path) as file:
            p = Predictions(**{name: file[name] for name in Predictions._fields if name != "twins" or name in file})
        meta = dict(json.loads(str(p.meta)))
        p = p._replace(log_expression=bool(p.log_expression), meta=meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, NotImplementedError,
            zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"{path}: not a readable file of predictions ({error}); if sample.py or "
                       "baselines wrote it, delete it and write it again") from error
    check_predictions(path, p)
    return p


def finished(path: str | Path, settings: dict) -> bool:
    """Whether `path` holds predictions made with these settings. Raises BadInput if it was made with others."""
    if not Path(path).exists():
        return False
    scales.check_made(path, load_predictions(path).meta.get("settings", {}), settings)
    return True


@dataclass(frozen=True)
class Settings:
    """Write the metrics of files of predictions beside them, as JSON."""
    paths: tyro.conf.Positional[tuple[Path, ...]]  # files of predictions (.npz), or folders that contain them


def prediction_files(paths: tuple[Path, ...]) -> list[Path]:
    """All files that are named or contained, without temporary ones. Raises BadInput if a path leads to none."""
    if not paths:
        raise BadInput("name a file of predictions or a folder of them, such as out/laptop/samples")
    found = []
    for path in paths:
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.rglob("*.npz") if not file.name.startswith("."))
        if not files:
            raise BadInput(f"{path}: no .npz file in this folder; sample.py and baselines write them")
        found += files
    return list(dict.fromkeys(found))  # each once


def up_to_date(path: Path) -> bool:
    """Whether all metrics of this very file of predictions exist, with those of its conditions."""
    document = scales.read_json(path.with_suffix(".json"))
    if not path.exists() or document.get("predictions") != scales.checksum(path):
        return False
    found = document.get("metrics", {})
    return METRICS.keys() | {"treatments"} <= found.keys() and "auprc" in found.get("conditions", {})


def main() -> None:
    """Compute the metrics of all files that do not have them yet."""
    files = prediction_files(tyro.cli(Settings).paths)
    waiting = [path for path in files if not up_to_date(path)]
    done = len(files) - len(waiting)
    print(f"metrics, revision {scales.revision()}: {len(files)} files, {done} of them already done", flush=True)
    for path in waiting:  # a bad file shows before the long work
        load_predictions(path)
    for path in waiting:
        with scales.alone(path.with_name("metrics")):
            p = load_predictions(path)
            numbers = evaluate(p)
            document = {"predictions": scales.checksum(path), "meta": p.meta, "metrics": numbers}
            text = json.dumps(document, indent=1, allow_nan=False)
            with scales.atomic(path.with_suffix(".json")) as temporary:
                temporary.write_text(text + "\n")
        shown = [f"{name} {numbers[name]:.3g}" for name in METRICS if numbers[name] is not None]
        print(path.stem, *shown, flush=True)


if __name__ == "__main__":
    scales.run(main)
