"""Stage 6 of 8, the metrics: compare predicted with true cells, one JSON file for each file of predictions.

Paper: 5.3, appendix C.2, equations 4 and 6-13. Reads `out/<scale>/samples/<experiment>/*.npz`, which `sample.py` and
`baselines.py` write (the format is `Predictions` below), and writes a `.json` of the same name beside each.

    python metrics.py out/smoke/samples              # a folder with all folders below it, or single files
    python metrics.py out/laptop/samples/linear
    python metrics.py out/paper/samples
After 15 s of imports and compilation it takes 0.1 to 0.2 s a condition of 200 cells on two CPU cores, 0.02 s at 100.
Departures from the paper, marked where they happen: D27 to D31.

    paper        name here     shape     meaning
    Y^obs        observed      P N D     control cells
    Y            true          P N D     true cells under the treatment (`target` in files)
    Y-hat        predicted     P N D     predicted cells (`prediction` in files)
    mu, mu-hat                 P D       their means over cells
    l, p                       P D       log2 fold change against control, Benjamini-Hochberg adjusted p-value
    Z, R         truth, score  P D       gene is differentially expressed in truth; how strongly the prediction says so

    P conditions, that is (biological context, treatment) pairs   N, M, L cells   D genes

Two traps, both shown in `tests/test_metrics.py`. *W2 rewards shrinking*: with a few hundred cells in tens of genes,
most of it is the distance between any two samples of one distribution, and cells pulled towards their mean score better
than a fresh sample of the truth. Read it beside MMD and the variance error. *MR rewards fresh cells*: for the same
reason, other control cells, left as they are, reach an MR of 0.93 on linear SCMs at the paper's size, and the source
cells shifted by a small effect, exactly right, one near 0: it tells reused cells from new more than it tells effects.
"""

import functools
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.spatial
import scipy.stats
import sklearn.metrics
import tyro
from jaxtyping import Float

import scales
from scales import BadInput

EPSILON = 0.1                           # entropic regularisation, absolute: in squared units of the data (C.2)
GAMMAS = (10.0, 1.0, 0.1, 0.01, 0.001)  # inverse squared length scales of the Gaussian kernel (C.2)
P_VALUE = 0.01                          # tau_p = 2 in -log10 p (C.2)
FOLD_CHANGE = 0.2                       # tau_l, in |log2 fold change| (C.2)


# ---------------------------------------------------------------------------- distributions and moments (C.2, eq. 4-11)


@functools.cache
def _sinkhorn_divergence():
    """OTT's solver, compiled once per pair of shapes. Imported here since `import ott` alone takes several seconds."""
    import jax
    from ott.tools.sinkhorn_divergence import sinkdiv

    # No vmap: a batch iterates until its slowest problem has converged, so on a CPU a plain loop is at least as fast.
    return jax.jit(lambda x, y: sinkdiv(x, y, epsilon=EPSILON)[0])


def wasserstein(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M D"]) -> float:
    """The tables' "W2" (eq. 8): Sinkhorn divergence on squared Euclidean cost, in squared units of the data.

    Symmetric, and zero for x = y, up to the solver's tolerance (about 1e-5 of the value). For cells many standard
    deviations apart the solver stops at 2,000 iterations, which costs less than 1e-4 of the value.
    """
    # [D27] paper: eq. 6 takes the square root of each transport cost; released code: OTT's divergence of
    # the squared cost, without a root; here: the same, because only so do the tables' values come out.
    return float(_sinkhorn_divergence()(np.asarray(x, np.float32), np.asarray(y, np.float32)))


def mmd(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M D"]) -> float:
    """Squared maximum mean discrepancy (eq. 9), Gaussian kernel (eq. 10), mean over five length scales.

    The expectations include each cell's kernel with itself (V-statistic): never negative, zero for x = y, but positive,
    at most 1/N + 1/M, in expectation over two samples of one distribution.
    """
    squared = [scipy.spatial.distance.cdist(a, b, "sqeuclidean") for a, b in ((x, x), (y, y), (x, y))]
    xx, yy, xy = (np.mean([np.exp(-gamma * d).mean() for gamma in GAMMAS]) for d in squared)
    return float(xx + yy - 2 * xy)


def rmse(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M D"]) -> float:
    """Root mean square over genes of the difference of means (eq. 11)."""
    return float(np.sqrt(np.mean((x.mean(0, dtype=float) - y.mean(0, dtype=float)) ** 2)))


def variance_rmse(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M D"]) -> float:
    """Root mean square over genes of the difference of variances. Not in the paper: shows what W2 rewards."""
    return float(np.sqrt(np.mean((x.var(0, dtype=float) - y.var(0, dtype=float)) ** 2)))


def magnitude_ratio(observed: Float[np.ndarray, "N D"], true: Float[np.ndarray, "M D"],
                    predicted: Float[np.ndarray, "L D"]) -> float:
    """MR (eq. 4): how far the prediction is from the control cells, over how far the truth is; NaN if that is zero.

    1 for a perfect prediction (and for many others); 0 only for the observed cells themselves.
    """
    effect = wasserstein(observed, true)
    return wasserstein(observed, predicted) / effect if effect > 0 else float("nan")


# ----------------------------------------------------------------------------------------- discrimination (C.2, eq. 12)


def pds_ranks(true: Float[np.ndarray, "P N D"], predicted: Float[np.ndarray, "P M D"]) -> Float[np.ndarray, "P"]:
    """For each prediction, the share of the *other* true means that are as close to it as its own; NaN if P = 1."""
    mu, mu_hat = true.mean(1, dtype=float), predicted.mean(1, dtype=float)
    distance = np.linalg.norm(mu_hat[:, None] - mu[None], axis=-1)  # P P, predicted by true
    # A tie counts against the prediction (<=); the factor keeps it a tie when rounding makes its two sides differ.
    closer = distance <= np.diag(distance)[:, None] * (1 + 1e-9)
    others = len(mu) - 1
    return (closer.sum(1) - 1) / others if others else np.full(1, np.nan)


def pds(true: Float[np.ndarray, "P N D"], predicted: Float[np.ndarray, "P M D"]) -> float:
    """Perturbation discrimination score (eq. 12): 0 perfect, 1 worst, 1/2 for one prediction for all treatments."""
    return float(pds_ranks(true, predicted).mean())


# ------------------------------------------------------------------------- differentially expressed genes (C.2, eq. 13)


def differential_expression(control: Float[np.ndarray, "P N D"], treated: Float[np.ndarray, "P M D"],
                            ) -> tuple[Float[np.ndarray, "P D"], Float[np.ndarray, "P D"]]:
    """Adjusted p-values and log2 fold changes of treated against control cells, natural log1p data.

    Equal to `scanpy.tl.rank_genes_groups(method="wilcoxon")` up to rounding (a test says so), and many times faster.
    """
    # [D29] paper: a Wilcoxon rank-sum test; released code: scanpy's, which by default does not correct the
    # variance for ties; here: the same, because the tables do. Equal zeros are ties: sparse genes get too large a p.
    n, m = treated.shape[1], control.shape[1]
    ranks = scipy.stats.rankdata(np.concatenate([treated, control], axis=1), axis=1)
    z = (ranks[:, :n].sum(1) - n * (n + m + 1) / 2) / np.sqrt(n * m * (n + m + 1) / 12)
    adjusted = scipy.stats.false_discovery_control(2 * scipy.stats.norm.sf(np.abs(z)), axis=1)  # over the genes

    # [D30] paper: ratio of means; released code: scanpy's ratio of expm1(mean of log1p), nearly of geometric
    # means; here: the same, because the tables do. Its 1e-9 keeps silent genes finite: silent on one side |l| is up to
    # 30, so that an exact zero ranks first; on both sides l = 0. A negative mean is impossible and counts as silent.
    level = lambda cells: np.expm1(np.maximum(cells.mean(1, dtype=float), 0)) + 1e-9
    return adjusted, np.log2(level(treated) / level(control))


def deg_auprc(observed: Float[np.ndarray, "P N D"], true: Float[np.ndarray, "P M D"],
              predicted: Float[np.ndarray, "P L D"], treatments: Float[np.ndarray, "P D"] | None = None) -> dict:
    """Area under the precision-recall curve for finding differentially expressed genes (C.2); log-expression data only.

    Returns `auprc`; `base_rate`, the area of a random ranking; `target_only`, that of a predictor that scores only the
    treated gene (NaN without `treatments`); `n_degs`, how many of the P D genes are to be found; `note`, empty unless
    there are none of them: then both areas are NaN.
    """
    p, fold_change = differential_expression(observed, true)
    truth = (p < P_VALUE) & (np.abs(fold_change) > FOLD_CHANGE)  # Z, P D
    p, fold_change = differential_expression(observed, predicted)
    score = np.abs(fold_change) * (p < P_VALUE)                  # R, P D

    # [D31] paper: speaks of one perturbation; released code: one ranking of the genes of all conditions;
    # here: the same, because a condition without differentially expressed genes has no curve of its own.
    def area(s):
        return float(sklearn.metrics.average_precision_score(truth.ravel(), s.ravel())) if truth.any() else float("nan")

    return {"auprc": area(score), "base_rate": float(truth.mean()),
            "target_only": float("nan") if treatments is None else area(treatments != 0), "n_degs": int(truth.sum()),
            "note": "" if truth.any() else "no gene is differentially expressed in truth: AUPRC is undefined"}


# ------------------------------------------------------------------------------------------------------ all of them


def evaluate(observed: Float[np.ndarray, "P N D"], true: Float[np.ndarray, "P M D"],
             predicted: Float[np.ndarray, "P L D"], treatments: Float[np.ndarray, "P D"], log_expression: bool,
             contexts: np.ndarray | None = None, source: Float[np.ndarray, "P N D"] | None = None) -> dict:
    """Every metric: the mean over conditions under its name, the P single values under `conditions`; ready for JSON.

    `source` are the control cells that a prediction was made from, where they are others than `observed`: MR asks how
    far from *them* it has gone, which gives identity its 0 (Table 2).

    None stands for what is not defined: MR without an effect, PDS without a rival, AUPRC without differentially
    expressed genes or on data that are not log-expression (as in Table 2). Means are over the conditions that remain.
    """
    # [D28] paper: a single held-out context; here: where there are several (`contexts`, P), the true
    # means of other contexts are no rivals, because they can be told apart without knowing the treatment.
    contexts = np.zeros(len(true), int) if contexts is None else contexts
    ranks = np.empty(len(true))
    for context in np.unique(contexts):
        of_it = contexts == context
        ranks[of_it] = pds_ranks(true[of_it], predicted[of_it])
    conditions = {metric.__name__: [metric(y, y_hat) for y, y_hat in zip(true, predicted)]
                  for metric in (wasserstein, mmd, rmse, variance_rmse)}
    conditions["magnitude_ratio"] = [magnitude_ratio(*cells) for cells
                                     in zip(observed if source is None else source, true, predicted)]
    conditions["pds"] = list(ranks)

    finite = lambda values: [float(v) if np.isfinite(v) else None for v in values]
    mean = lambda values: float(np.mean(kept)) if (kept := [v for v in values if v is not None]) else None
    conditions = {name: finite(values) for name, values in conditions.items()}
    genes = {"auprc": None, "base_rate": None, "target_only": None, "n_degs": None, "note": "not log-expression data"}
    if log_expression:
        genes = deg_auprc(observed, true, predicted, treatments)
        genes |= {name: finite([genes[name]])[0] for name in ("auprc", "target_only")}
    return {name: mean(values) for name, values in conditions.items()} | genes | {"conditions": conditions}


# ------------------------------------------------------------------------------------------------ files of predictions


class Predictions(NamedTuple):
    """The content of one file of predictions: one experiment, method, split and draw of cells."""
    observed: Float[np.ndarray, "P N D"]     # control cells that differential expression is tested against
    source: Float[np.ndarray, "P N D"]       # control cells that the prediction was made from, for MR
    target: Float[np.ndarray, "P N D"]       # true cells
    prediction: Float[np.ndarray, "P N D"]
    treatments: Float[np.ndarray, "P D"]     # one-hot times the do-value
    contexts: np.ndarray                     # P, number or name of the biological context
    log_expression: bool                     # log1p data, for which AUPRC is defined
    meta: dict                               # experiment, method, split, resampling, seed, scale, revision, settings...


def check_predictions(path: str | Path, p: Predictions) -> None:
    """Raises BadInput if the arrays do not fit together or a number is not finite."""
    if p.treatments.ndim != 2 or p.contexts.shape != p.treatments.shape[:1]:
        raise BadInput(f"{path}: 'treatments' {p.treatments.shape} and 'contexts' {p.contexts.shape} do not fit "
                       "together; expected conditions x genes and conditions; write the file again")
    for name in ("observed", "source", "target", "prediction"):
        array = getattr(p, name)
        if array.ndim != 3 or array.size == 0 or array.shape[::2] != p.treatments.shape:
            raise BadInput(f"{path}: '{name}' has shape {array.shape}; expected conditions x cells x genes that fit "
                           f"'treatments' {p.treatments.shape}; write the file again")
        if bad := np.sum(~np.isfinite(array)):
            raise BadInput(f"{path}: {bad} of the {array.size} values of '{name}' are not finite; if a model made "
                           "them, it has diverged: train it again with a lower --learning-rate")


def save_predictions(path: str | Path, p: Predictions) -> None:
    """Write `path` (.npz), whole or not at all. Raises BadInput as `check_predictions` does."""
    check_predictions(path, p)
    arrays = {name: np.asarray(getattr(p, name), np.float32) for name in Predictions._fields[:5]}
    with scales.atomic(path) as temporary:
        np.savez_compressed(temporary, **arrays, contexts=p.contexts, log_expression=p.log_expression,
                            meta=json.dumps(p.meta, default=str))


def load_predictions(path: str | Path) -> Predictions:
    """Read what `save_predictions` wrote. Raises BadInput for a file that is missing, damaged or of another kind."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file; sample.py and baselines.py write files of predictions")
    try:
        with np.load(path) as file:
            p = Predictions(**{name: file[name] for name in Predictions._fields})
        p = p._replace(log_expression=bool(p.log_expression), meta=dict(json.loads(str(p.meta))))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, NotImplementedError,
            zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"{path}: not a readable file of predictions ({error}); delete it and write it again") from error
    check_predictions(path, p)
    return p


def finished(path: str | Path, settings: dict) -> bool:
    """Whether `path` holds predictions made with these settings. Raises BadInput if it was made with others."""
    if not Path(path).exists():
        return False
    then, now = load_predictions(path).meta.get("settings", {}), json.loads(json.dumps(settings, default=str))
    changed = [f"{k}: {then.get(k)}, now {now.get(k)}" for k in sorted(then | now) if then.get(k) != now.get(k)]
    if changed:
        raise BadInput(f"{path} has other settings ({'; '.join(changed)}): move it away or give another --out")
    return True


# --------------------------------------------------------------------------------------------------------- the stage


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
        files = sorted(f for f in path.rglob("*.npz") if not f.name.startswith(".")) if path.is_dir() else [path]
        if not files:
            raise BadInput(f"{path}: no .npz file in this folder; sample.py and baselines.py write them")
        found += files
    return list(dict.fromkeys(found))


def up_to_date(path: Path) -> bool:
    """Whether the metrics of this file exist and are not older than it."""
    result = path.with_suffix(".json")
    return result.exists() and path.exists() and result.stat().st_mtime_ns >= path.stat().st_mtime_ns


def main() -> None:
    """Compute the metrics of all files that do not have them yet."""
    files = prediction_files(tyro.cli(Settings).paths)
    waiting = [path for path in files if not up_to_date(path)]
    done = len(files) - len(waiting)
    print(f"metrics, revision {scales.revision()}: {len(files)} files, {done} of them already done", flush=True)
    for path in waiting:  # a bad file shows before the long work
        load_predictions(path)
    for path in waiting:
        p = load_predictions(path)
        result = evaluate(p.observed, p.target, p.prediction, p.treatments, p.log_expression, p.contexts, p.source)
        result["contexts"] = [str(c) for c in p.contexts]
        with scales.atomic(path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps({"meta": p.meta, "metrics": result}, indent=1, allow_nan=False) + "\n")
        print(path.stem, *(f"{name} {v:.3g}" for name, v in result.items() if isinstance(v, float)), flush=True)


if __name__ == "__main__":
    scales.run(main)
