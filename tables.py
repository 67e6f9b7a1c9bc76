"""Stage 8 of 8, the report: every table with the paper's value beside ours, every figure, and each claim of the paper.

Paper: section 6, Tables 1 to 4. Reads `samples/<experiment>/*.json` (metrics.py) and `*.npz`, `train/`, and
`figures/*.json` (figures.py) below out/<scale>, writes `report.md`, `report.json` and `prediction.png` there. No cell
is typed in: what was not run says why.

    python tables.py --scale smoke|laptop|paper     seconds
    python tables.py --reference                    identity and observed rows of Table 2 at the paper's own size, which
                                                    need no training: two minutes on a CPU core, into out/reference.md
Departures: D10, D32, D33 and those of the metrics, D27 to D31.
"""

import dataclasses
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import metrics
import scales
from baselines import predict_all, trained_class
from data import evaluation_tasks
from prior import linear_screen
from scales import BadInput

# The paper's numbers (arXiv 2601.21092, Tables 2 and 3): mean and standard deviation, MMD in thousandths.
COLUMNS = {  # metric -> heading and factor
    "wasserstein": ("W2 ↓", 1), "mmd": ("MMD e-3 ↓", 1000), "rmse": ("RMSE ↓", 1), "pds": ("PDS ↓", 1),
    "magnitude_ratio": ("MR", 1), "auprc": ("AUPRC ↑", 1), "variance_rmse": ("variance RMSE ↓", 1),
}
PAPER = {
    "linear": {
        "condot": ((13.85, 0.12), (5.14, 0.01), (0.15, 0.00), (0.11, 0.02), (0.09, 0.01)),
        "mfm": ((13.73, 0.16), (4.81, 0.19), (0.15, 0.01), (0.09, 0.03), (0.12, 0.00)),
        "mappfn": ((13.69, 0.05), (4.28, 0.06), (0.14, 0.00), (0.01, 0.01), (0.99, 0.02)),
        "identity": ((17.61, 0.14), (12.98, 0.35), (0.28, 0.01), (0.49, 0.01), (0.00, 0.00)),
        "observed": ((9.82, 0.08), (3.66, 0.06), (0.07, 0.00), (0.00, 0.00), (1.00, 0.00)),
    },
    "melanoma": {
        "cpa": ((15.57, 0.10), (140.09, 0.35), (0.13, 0.00), (0.49, 0.01), (0.68, 0.01), (0.04, 0.00)),
        "condot": ((22.09, 0.39), (7.11, 0.12), (0.10, 0.00), (0.06, 0.01), (0.05, 0.00), (0.34, 0.05)),
        "mfm": ((20.99, 0.14), (7.28, 0.13), (0.10, 0.00), (0.09, 0.02), (0.13, 0.00), (0.28, 0.04)),
        "cellflow": ((22.27, 0.59), (7.16, 0.17), (0.10, 0.00), (0.41, 0.01), (0.01, 0.00), (0.10, 0.02)),
        "state": ((20.52, 0.07), (7.82, 0.09), (0.08, 0.00), (0.07, 0.02), (0.94, 0.00), (0.33, 0.04)),
        "mappfn-unpaired": ((24.44, 0.31), (21.84, 1.28), (0.23, 0.01), (0.20, 0.02), (1.14, 0.01), (0.21, 0.03)),
        "mappfn-no-context": ((23.78, 0.16), (15.88, 0.19), (0.20, 0.00), (0.20, 0.01), (1.10, 0.01), (0.13, 0.02)),
        "mappfn-random": ((21.23, 0.11), (51.78, 0.80), (0.24, 0.00), (0.18, 0.02), (1.02, 0.01), (0.12, 0.02)),
        "mappfn-pretrained": ((22.75, 0.16), (10.07, 0.19), (0.13, 0.00), (0.17, 0.01), (1.00, 0.01), (0.34, 0.02)),
        "mappfn-finetuned": ((21.38, 0.12), (7.84, 0.14), (0.10, 0.00), (0.03, 0.01), (0.99, 0.00), (0.38, 0.03)),
        "identity": ((22.91, 0.18), (7.90, 0.17), (0.11, 0.00), (0.51, 0.02), (0.00, 0.00), (0.04, 0.01)),
        "observed": ((8.54, 0.10), (2.59, 0.07), (0.04, 0.00), (0.00, 0.00), (1.00, 0.00), (0.64, 0.06)),
    },
    "leukemia": {
        "cpa": ((12.41, 0.11), (78.74, 1.27), (0.17, 0.00), (0.50, 0.02), (0.61, 0.01), (0.15, 0.01)),
        "condot": ((17.92, 0.37), (26.51, 0.68), (0.27, 0.01), (0.54, 0.04), (0.19, 0.00), (0.14, 0.01)),
        "mfm": ((41.71, 0.26), (105.64, 0.73), (0.71, 0.00), (0.51, 0.02), (1.67, 0.01), (0.16, 0.01)),
        "cellflow": ((16.87, 0.37), (14.55, 0.46), (0.17, 0.00), (0.50, 0.01), (0.02, 0.00), (0.16, 0.01)),
        "state": ((15.27, 0.15), (15.28, 0.44), (0.17, 0.00), (0.47, 0.03), (0.83, 0.00), (0.17, 0.01)),
        "mappfn-random": ((14.95, 0.28), (24.47, 0.90), (0.19, 0.01), (0.54, 0.02), (0.82, 0.01), (0.16, 0.01)),
        "mappfn-pretrained": ((44.42, 0.23), (191.88, 1.46), (0.78, 0.00), (0.49, 0.01), (2.56, 0.02), (0.16, 0.01)),
        "mappfn-finetuned": ((16.32, 0.11), (12.24, 0.58), (0.15, 0.00), (0.42, 0.03), (0.91, 0.01), (0.18, 0.01)),
        "identity": ((16.72, 0.18), (13.17, 0.44), (0.14, 0.01), (0.49, 0.02), (0.00, 0.00), (0.18, 0.01)),
        "observed": ((10.29, 0.12), (2.59, 0.04), (0.04, 0.00), (0.03, 0.02), (0.99, 0.01), (0.91, 0.04)),
    },
}
ROWS = {  # in the order of the tables
    "cpa": "CPA", "condot": "CondOT", "mfm": "MFM", "cellflow": "CellFlow", "state": "STATE",
    "condot-released": "CondOT, random init", "cellflow-released": "CellFlow, released defaults",
    "mfm-released": "MFM, untrained column for unseen treatments",
    "mappfn": "MapPFN", "mappfn-random": "MapPFN (random init)", "mappfn-pretrained": "MapPFN (pre-trained)",
    "mappfn-finetuned": "MapPFN (fine-tuned)", "identity": "Identity", "observed": "Observed", "oracle": "Fresh oracle",
    "target-only": "Target only", "context-mean": "Context mean effect", "additive": "Additive",
    "target-gene": "Target gene", "bilinear-ridge": "Bilinear ridge", "constant-mean": "Constant mean",
}
ABLATIONS = {"mappfn-pretrained": "MapPFN (pre-trained)", "mappfn-unpaired": "– paired prior",
             "mappfn-no-context": "– interventional context"}  # Table 4
PUBLISHED = ("cpa", "condot", "mfm", "cellflow", "state")
SIMPLE = ("identity", "target-only", "context-mean", "additive", "target-gene", "bilinear-ridge")
TITLES = {
    "linear": "Table 2. Linear SCMs", "leukemia": "Table 3. Leukemia (Papalexi et al., 2021)",
    "melanoma": "Table 3. Melanoma (Frangieh et al., 2021)", "toy": "Toy screen: simulated GRNs, not cells",
    "replicates": "Table 3, simple rows only: leukemia with its replicates as contexts",
}


@dataclass(frozen=True)
class Settings:
    """Make the tables of one scale."""
    scale: str = "laptop"  # column of the table in scales.py
    reference: bool = False  # instead: the rows of Table 2 that need no training, at the paper's size
    graphs: int = 10  # reference: number of random DAGs
    population: int | None = None  # reference: cells simulated per condition; default: the paper's 500 (B.1)
    seed: int = 0  # reference: of the graphs
    out: Path = Path("out")  # everything is below out/<scale>


# --------------------------------------------------------------------------------------------------- collecting results


def row_of(method: str) -> str:
    """Name of the row a file of predictions belongs to: the seeds of one method share one."""
    return method.split("-seed")[0]


def collect(folder: Path) -> dict[str, list[dict]]:
    """Row -> the results (meta and metrics) of all its files in `folder`. Raises BadInput if a file has no metrics."""
    rows: dict[str, list[dict]] = {}
    for file in sorted(folder.glob("*.npz")):
        result = file.with_suffix(".json")
        if not metrics.up_to_date(file):
            raise BadInput(f"{result}: missing, or older than {file.name}; make it with python metrics.py {folder}")
        found = json.loads(result.read_text())
        rows.setdefault(row_of(found["meta"]["method"]), []).append(found)
    return rows


def per_unit(results: list[dict], metric: str) -> dict[str, float]:
    """The value for each unit that methods can be paired by: a held-out graph, or a split of a screen.

    Draws of cells, seeds and conditions within a unit are averaged; units without a defined value are left out.
    """
    found: dict[str, list[float]] = {}
    for r in results:
        m, split = r["metrics"], f"split {r['meta'].get('split', 0)}"
        several = len(set(m.get("contexts", []))) > 1 and metric in m["conditions"]
        for unit, value in zip(m["contexts"], m["conditions"][metric]) if several else [(split, m[metric])]:
            if value is not None:
                found.setdefault(unit, []).append(value)
    return {unit: float(np.mean(values)) for unit, values in found.items()}


def units(results: list[dict], metric: str) -> list[float]:
    """The values whose mean and spread a cell shows: one for each file (split, draw or seed).

    One file of several contexts (Table 2 with a single seed, whose held-out graphs are contexts) gives one for each.
    """
    if len(results) == 1:
        return list(per_unit(results, metric).values())
    values = [r["metrics"][metric] for r in results]
    return [v for v in values if v is not None]


def advantage(rows: dict[str, list[dict]], a: str, b: str, metric: str) -> tuple[float, float, int] | None:
    """By how much row a beats row b (positive: better): mean over shared units, its standard error, their number.

    Better is higher for AUPRC, closer to 1 for MR, lower otherwise. None if fewer than two units are shared.
    """
    score = {"auprc": lambda v: v, "magnitude_ratio": lambda v: -abs(v - 1)}.get(metric, lambda v: -v)
    one, other = (per_unit(rows.get(row, []), metric) for row in (a, b))
    differences = [score(one[u]) - score(other[u]) for u in one if u in other]
    if len(differences) < 2:
        return None
    return float(np.mean(differences)), float(np.std(differences, ddof=1) / len(differences) ** 0.5), len(differences)


def best_simple(rows: dict[str, list[dict]], metric: str) -> str | None:
    """The simple row that is best on average; constant mean is none, since it is no set of cells."""
    mean = lambda row: np.mean(list(per_unit(rows[row], metric).values()) or [np.nan])
    order = {"auprc": lambda v: -v, "magnitude_ratio": lambda v: abs(v - 1)}.get(metric, lambda v: v)
    known = {row: order(mean(row)) for row in SIMPLE if row in rows}
    known = {row: value for row, value in known.items() if np.isfinite(value)}
    return min(known, key=known.get) if known else None


def summarise(rows: dict[str, list[dict]], experiment: str, titles: dict[str, str] | None = None) -> list[dict]:
    """One entry a row, in the order of `titles` (ROWS): for each metric our mean, sd and n, the paper's mean and sd."""
    table = []
    for row, title in (titles or ROWS).items():
        if row not in rows:
            continue
        entry = {"row": row, "title": title, "metrics": {}}
        paper = dict(zip(COLUMNS, PAPER.get(experiment, {}).get(row, ())))
        for metric, (_, factor) in COLUMNS.items():
            values = factor * np.array(units(rows[row], metric))
            if len(values):
                sd = float(values.std(ddof=1)) if len(values) > 1 else None
                ours = {"mean": float(values.mean()), "sd": sd, "n": len(values)}
                entry["metrics"][metric] = ours | {"paper": paper.get(metric)}
        metas = [r["meta"] for r in rows[row]]
        entry |= {"files": len(metas), "seconds": round(sum(m.get("seconds", 0) for m in metas), 1),
                  "seeds": sorted({m["training"]["seed"] if "training" in m else m["seed"] for m in metas}),
                  "revisions": sorted({m["revision"] for m in metas})}
        entry["budget"] = budget(metas)
        clipped = [m["clipped_fraction"] for m in metas if "clipped_fraction" in m]
        entry["clipped_fraction"] = float(np.mean(clipped)) if clipped else None
        table.append(entry)
    return table


def budget(metas: list[dict]) -> dict | None:
    """Updates, parameters and seconds of the fits (mean over them) that a trained row stands for; None for others."""
    if "training" in metas[0]:  # MapPFN: the header of its checkpoint
        head = metas[0]["training"]
        return {"updates": head["updates"], "batch": f"{head['micro_batch'] * head['accumulate']} tasks",
                "parameters": head.get("parameters"), "seconds": head.get("seconds")}
    if "options" in metas[0]:
        fits = list({(m["split"], m["seed"]): m["fit_seconds"] for m in metas}.values())  # one fit for all draws
        return {"updates": metas[0]["options"]["updates"], "batch": f"{metas[0]['options']['batch']} cells",
                "parameters": metas[0]["parameters"], "seconds": float(np.mean(fits))}
    return None


def gap_closed(table: list[dict]) -> dict[str, float]:
    """Share of the RMSE between identity (0) and fresh oracle (1) that a row closes; beyond both it leaves [0, 1]."""
    value = {e["row"]: e["metrics"]["rmse"]["mean"] for e in table}
    if not {"identity", "oracle"} <= value.keys():
        return {}
    gap = value["identity"] - value["oracle"]
    return {row: (value["identity"] - v) / gap for row, v in value.items()
            if row not in ("identity", "oracle", "observed")}


# -------------------------------------------------------------------------------------------------------------- writing


def cell(entry: dict | None, paper: bool = True) -> str:
    """`ours ± sd` and, where the paper has a number and it is wanted, `(paper ± sd)`."""
    if entry is None:
        return "–"
    digits = 1 if entry["mean"] >= 10 else 2 if entry["mean"] >= 1 else 3
    ours = f"{entry['mean'] + 0.0:.{digits}f}".replace("-0.000", "0.000")
    ours += f" ± {entry['sd']:.{digits}f}" if entry["sd"] is not None else ""
    return ours + (f" (paper: {entry['paper'][0]:.2f} ± {entry['paper'][1]:.2f})" if paper and entry["paper"] else "")


def markdown(table: list[dict], wanted: tuple[str, ...] = tuple(COLUMNS), paper: bool = True) -> list[str]:
    """The lines of one table; columns without any value are left out."""
    shown = [m for m in wanted if any(m in e["metrics"] for e in table)]
    lines = ["| | " + " | ".join(COLUMNS[m][0] for m in shown) + " |", "|---" * (1 + len(shown)) + "|"]
    return lines + [f"| {e['title']} | " + " | ".join(cell(e["metrics"].get(m), paper) for m in shown) + " |"
                    for e in table]


def comparison(rows: dict[str, list[dict]], table: list[dict]) -> list[str]:
    """The lines of a table: each trained row against the best simple row, metric by metric, in paired differences."""
    shown = [m for m in COLUMNS if m != "variance_rmse" and any(m in e["metrics"] for e in table)]
    best = {m: best_simple(rows, m) for m in shown}
    trained = [e for e in table if e["budget"]]
    if not trained or not all(best.values()):
        return []
    headings = " | ".join(f"{COLUMNS[m][0]} vs {ROWS[best[m]]}" for m in shown)
    lines = [f"| better than the best simple row by | {headings} |", "|---" * (1 + len(shown)) + "|"]
    for e in trained:
        cells = []
        for m in shown:
            found = advantage(rows, e["row"], best[m], m)
            cells.append(f"{found[0] * COLUMNS[m][1]:+.3f} ± {found[1] * COLUMNS[m][1]:.3f}" if found else "–")
        lines.append(f"| {e['title']} | " + " | ".join(cells) + " |")
    count = max((found[2] for e in trained for m in shown if (found := advantage(rows, e["row"], best[m], m))),
                default=0)
    return [*lines, "", f"Paired differences, mean ± standard error over {count} units (held-out graphs, or splits); "
            "positive: the trained row is better. MR: how much closer to 1."] if count else []


def budgets(table: list[dict]) -> list[str]:
    """The lines of a table of what each trained row was given."""
    number = lambda value, form: "–" if value is None else format(value, form)
    lines = ["| trained row | updates | of | parameters | seconds a fit |", "|---" * 5 + "|"]
    rows = [f"| {e['title']} | {b['updates']:,} | {b['batch']} | {number(b['parameters'], ',')} | "
            f"{number(b['seconds'], '.0f')} |" for e in table if (b := e["budget"])]
    return [*lines, *rows] if rows else []


def caption(table: list[dict], experiment: str) -> str:
    """What the ± is, and how much was clipped."""
    most = max(e["files"] for e in table)
    unit = "held-out graphs (rows with several seeds: seeds)" if experiment == "linear" else "splits and draws of cells"
    count = max(m["n"] for e in table for m in e["metrics"].values())
    text = f"Mean ± standard deviation over {count} {unit}; up to {most} files a row."
    clipped = [f"{e['title']} {e['clipped_fraction']:.1%}" for e in table if e["clipped_fraction"]]
    return text + (f" Negative expression clipped to zero: {', '.join(clipped)}." if clipped else "")


def why_missing(root: Path, experiment: str) -> str:
    """The reason that a stage left behind, or the command that would make the results."""
    note = root / "data" / experiment / "not-run.txt"
    if note.is_file():
        return note.read_text().strip().removeprefix("error: ")
    return f"no predictions in {root / 'samples' / experiment}"


def environment() -> dict:
    """Versions, git revision and machine."""
    import jax  # imported late: everything else here needs no device

    packages = ("jax", "equinox", "diffrax", "optax", "ott-jax", "numpy", "scipy", "scanpy", "sergio-rs")
    return {"revision": scales.revision(), "python": platform.python_version(), "machine": platform.machine(),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "versions": {p: importlib.metadata.version(p) for p in packages}}


def stage_times(root: Path) -> dict[str, float]:
    """Seconds of each stage, as run_all.sh measured them; a stage that took several attempts is summed."""
    times: dict[str, float] = {}
    if (root / "times.csv").is_file():
        for line in (root / "times.csv").read_text().splitlines():
            stage, _, seconds = line.rpartition(",")  # a title may contain commas
            times[stage] = times.get(stage, 0) + float(seconds)
    return times


def write(path: Path, text: str) -> None:
    """Write a text file whole, or not at all."""
    with scales.atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def picture(root: Path, path: Path) -> bool:
    """Draw a prediction against the truth: means of all genes, and the cells of the treated and the most changed gene.

    The first test condition of the best available experiment; nothing is chosen for its looks. False if there is none.
    """
    wanted = (("leukemia", "mappfn-finetuned"), ("toy", "mappfn-finetuned"), ("linear", "mappfn-seed0"))
    files = [root / "samples" / experiment / f"{method}-split0-draw0.npz" for experiment, method in wanted]
    files = [file for file in files if file.is_file()]
    if not files:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    p = metrics.load_predictions(files[0])
    observed, target, prediction, treatment = p.observed[0], p.target[0], p.prediction[0], p.treatments[0]
    gene, genes = int(np.flatnonzero(treatment)[0]), p.meta["genes"]
    effect, predicted = target.mean(0) - observed.mean(0), prediction.mean(0) - observed.mean(0)
    changed = int(np.argmax(np.where(np.arange(len(effect)) == gene, 0, np.abs(effect))))
    unit = "log expression" if p.log_expression else "standard deviations"
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    axes[0].axline((0, 0), slope=1, color="0.7", lw=1, zorder=0)
    axes[0].scatter(effect, predicted, s=18, color="0.2")
    axes[0].scatter(effect[gene], predicted[gene], s=60, facecolors="none", edgecolors="C3",
                    label=f"{genes[gene]} (treated)")
    axes[0].set(xlabel=f"true change of the mean [{unit}]", ylabel="predicted change",
                title=f"do({genes[gene]}), all genes")
    axes[0].legend(frameon=False)
    for axis, g in zip(axes[1:], (gene, changed)):
        bins = np.histogram_bin_edges(np.concatenate([x[:, g] for x in (observed, target, prediction)]), 20)
        axis.hist(observed[:, g], bins, label="control", color="0.8", histtype="stepfilled")
        axis.hist(target[:, g], bins, label="truth", color="C0", histtype="step", lw=2)
        axis.hist(prediction[:, g], bins, label="MapPFN", color="C3", histtype="step", lw=2, ls="--")
        axis.set(xlabel=f"{genes[g]} [{unit}]", ylabel=f"cells of {len(target)}",
                 title="treated gene" if g == gene else "most changed other gene")
    axes[1].legend(frameon=False)
    figure.suptitle(f"{TITLES[p.meta['experiment']]}, {p.meta['scale']} scale, first test condition of split 0",
                    fontsize=10)
    with scales.atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    return True


# --------------------------------------------------------------------------------------- the paper's claims (section 6)

DISTANCES = ("wasserstein", "mmd", "rmse")
# Number, statement, experiment (leukemia stands for any real screen), row a, rows that it must beat, in which metrics.
COMPARISONS = [
    (1, "MapPFN is best on linear SCMs in every metric", "linear", "mappfn", ("condot", "mfm"),
     (*DISTANCES, "pds", "magnitude_ratio")),
    (3, "Fine-tuned MapPFN has the best PDS, MR and AUPRC on real cells", "real", "mappfn-finetuned",
     PUBLISHED, ("pds", "magnitude_ratio", "auprc")),
    (4, "Pre-training helps: fine-tuned beats random initialisation in all but W2", "real", "mappfn-finetuned",
     ("mappfn-random",), ("mmd", "rmse", "pds", "magnitude_ratio", "auprc")),
    (5, "Interventional context improves every metric (Table 4)", "real", "mappfn-pretrained", ("mappfn-no-context",),
     (*DISTANCES, "pds", "magnitude_ratio", "auprc")),
    (7, "The paired prior improves every metric (Table 4)", "real", "mappfn-pretrained", ("mappfn-unpaired",),
     (*DISTANCES, "pds", "magnitude_ratio", "auprc")),
]


def verdict(found: list[tuple[float, float, int]]) -> str:
    """Reproduced if all advantages exceed two standard errors; in part if some do; undecided if none do either way."""
    above = [mean > 2 * error for mean, error, _ in found]
    below = [mean < -2 * error for mean, error, _ in found]
    if all(above):
        return "reproduced"
    if any(above):
        return "in part"
    return "not reproduced" if any(below) else "undecided: all within two standard errors"


def judge(rows: dict[str, list[dict]], a: str, others: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[str, str]:
    """Verdict and evidence: row a against the best of the others in each metric, in paired differences."""
    found = {}
    for metric in wanted:
        known = {b: value for b in others if (value := advantage(rows, a, b, metric))}
        if known:
            b = min(known, key=lambda b: known[b][0])  # the hardest one to beat
            found[metric] = (b, known[b])
    if not found:
        return "not run", "no paired results"
    evidence = []
    for metric, (b, (mean, error, _)) in found.items():
        heading, factor = COLUMNS[metric]
        name = ROWS.get(b) or ABLATIONS[b].removeprefix("– ") + " removed"
        evidence.append(f"{heading.split(' ')[0]} {mean * factor:+.3f} ± {error * factor:.3f} (vs {name})")
    return verdict([v for _, v in found.values()]), ", ".join(evidence)


def other_claims(everything: dict) -> list[tuple[int, str, str, str]]:
    """The claims that are no comparison of two rows: number, statement, verdict, evidence."""
    claims, real = [], next((e for e in ("leukemia", "melanoma", "toy") if everything[e]), None)
    statement = "CondOT and MFM stay near identity on linear SCMs (MR about 0.1), MapPFN does not"
    mr = {row: np.mean(list(per_unit(r, "magnitude_ratio").values())) for row, r in everything["linear"].items()}
    if {"condot", "mfm", "mappfn"} <= mr.keys():
        claims.append((2, statement,
                       "reproduced" if max(mr["condot"], mr["mfm"]) < 0.3 < mr["mappfn"] else "not reproduced",
                       f"MR {mr['condot']:.2f}, {mr['mfm']:.2f} and {mr['mappfn']:.2f}; other control cells would give "
                       f"{mr.get('oracle', float('nan')):.2f} for the truth itself"))
    else:
        claims.append((2, statement, "not run", "no such rows"))
    statement = ("Zero-shot, MapPFN finds differentially expressed genes on par with the best baseline "
                 "trained on real cells")
    trained = [row for row in PUBLISHED if real and row in everything[real]]
    if trained and "mappfn-pretrained" in everything[real]:
        found = {row: advantage(everything[real], "mappfn-pretrained", row, "auprc") for row in trained}
        found = {row: value for row, value in found.items() if value}
        if found:
            row = min(found, key=lambda row: found[row][0])
            mean, error, n = found[row]
            claims.append((6, statement, "reproduced" if mean > -2 * error else "not reproduced",
                           f"AUPRC {mean:+.3f} ± {error:.3f} against {ROWS[row]}, {n} units"))
    return claims


def spread(differences: list[float]) -> tuple[float, float, int]:
    """Mean, standard error and number."""
    n = len(differences)
    return float(np.mean(differences)), float(np.std(differences, ddof=1) / n**0.5) if n > 1 else float("inf"), n


def figure_claims(figures: dict) -> list[tuple[int, str, str, str]]:
    """The claims that a figure shows: number, statement, verdict, evidence. A figure that was not run says so."""
    def sweep(name: str, first: Callable, statement: str, number: int):
        """W2 at the sweep's first value minus W2 at its last, for each curve, paired within held-out graph or split."""
        found, text = [], []
        for experiment, e in figures[name]["data"]["experiments"].items():
            start = first(e)
            for row, values in e["values"].items():
                if row != "identity" and start < len(e["x"]) - 1:
                    found.append(spread([unit[start] - unit[-1] for unit in values["wasserstein"]]))
                    mean, error, _ = found[-1]
                    label = "linear SCMs" if row == "linear" else f"{experiment} {row}"
                    text.append(f"{label}, {e['x'][start]} to {e['x'][-1]}: W2 lower by {mean:+.3f} ± {error:.3f}")
        return number, statement, verdict(found) if found else "not run", "; ".join(text) or "too few values"

    def variance(statement: str, number: int):
        """Variance correlation of the paired minus the unpaired run, over the last third of their snapshots."""
        curves = {(c["run"], c["place"]): np.array(c["values"], float) for c in figures["variance"]["data"]["curves"]}
        places, found, text = sorted({place for _, place in curves}), [], []
        for place in places:
            if ("paired", place) in curves and ("unpaired", place) in curves:
                tail = max(2, len(curves["paired", place]) // 3)  # the last third of the snapshots of one run each
                points = {run: curves[run, place].reshape(len(curves[run, place]), -1).mean(1)
                          for run in ("paired", "unpaired")}
                one, other = (points[run][-tail:] for run in ("paired", "unpaired"))
                found.append(spread(list(one - other)))
                text.append(f"{place}: {one.mean():.2f} against {other.mean():.2f}, "
                            f"last {tail} snapshots of one run each")
        return number, statement, verdict(found) if found else "not run", "; ".join(text) or "one prior only"

    def augmentation(statement: str, number: int):
        """AUPRC with augmentation minus that of single passes, paired within draws of cells."""
        values = [v for units in figures["tta"]["data"]["screens"].values() for v in units["values"]
                  if v["augmented"] is not None and v["single"] is not None]
        if len(values) < 2:
            return number, statement, "not run", "no draw with a differentially expressed gene"
        found = spread([v["augmented"] - v["single"] for v in values])
        one, other = (np.std([v[k] for v in values], ddof=1) for k in ("augmented", "single"))
        text = f"AUPRC {found[0]:+.3f} ± {found[1]:.3f} over {found[2]} draws; sd {one:.3f} with, {other:.3f} without"
        return number, statement, verdict([found]), text

    def coverage(statement: str, number: int):
        """Share of the real histograms' mass in bins where the prior has any."""
        found = figures["coverage"]["data"]["distributions"]
        prior, covered = found["GRN prior"], {}
        for name in found.keys() - {"GRN prior", "toy screen (simulated)"}:
            for what in ("expression", "change"):
                mass = np.array(found[name][what]["density"])
                covered[name, what] = float(mass[np.array(prior[what]["density"]) > 0].sum() / mass.sum())
        text = ", ".join(f"{name} {what} {share:.1%}" for (name, what), share in sorted(covered.items()))
        outcome = "not run" if not covered else "reproduced" if min(covered.values()) > 0.95 else "not reproduced"
        return (number, statement, outcome,
                f"share in bins that the prior reaches: {text}" if covered else "no real screen")

    claims = []
    for name, make, statement, number in (
            ("variance", variance, "The paired prior learns variances faster and better (Figure 2)", 8),
            ("tta", augmentation, "Test-time augmentation raises AUPRC (Figure 3)", 9),
            ("context", lambda *a: sweep("context", lambda e: e["x"].index(1) if 1 in e["x"] else 0, *a),
             "More context experiments lower W2 (Figure 5a)", 10),
            ("cells",
             lambda *a: sweep("cells", lambda e: e["x"].index(e["trained"]) if e["trained"] in e["x"] else 0, *a),
             "More cells than were trained with lower W2 (Figure 5b)", 11),
            ("coverage", coverage, "The prior covers the range of real expression and fold changes (Figure 6)", 12)):
        known = name in figures and "not_run" not in figures[name]
        reason = figures.get(name, {}).get("not_run", "no such figure")
        claims.append(make(statement, number) if known else (number, statement, "not run", reason))
    return claims


def checklist(everything: dict, document: dict, tag: str) -> list[str]:
    """The findings of section 6, each with a verdict and the figures that say so."""
    real = next((e for e in ("leukemia", "melanoma", "toy") if everything[e]), "leukemia")
    claims = other_claims(everything) + figure_claims(document["figures"])
    for number, statement, experiment, a, others, wanted in COMPARISONS:
        experiment = real if experiment == "real" else experiment
        claims.append((number, f"{statement} [{experiment}]", *judge(everything[experiment], a, others, wanted)))
    document["claims"] = [dict(zip(("number", "statement", "verdict", "evidence"), claim)) for claim in sorted(claims)]
    return [f"## What the paper claims, and what was found{tag}", "",
            "Evidence: by how much the first is better, mean ± standard error of paired differences "
            "(positive: better).", "",
            "| | claim | here | evidence |", "|---|---|---|---|",
            *(f"| {c['number']} | {c['statement']} | **{c['verdict']}** | {c['evidence']} |"
              for c in document["claims"]), ""]


# ------------------------------------------------------------------------- the rows that need no training (Table 2)


def reference(s: Settings) -> None:
    """Identity, observed and fresh oracle on linear SCMs of the paper's size: D = 20, 500 cells, 200 compared.

    With another population the files have another name: it decides how many cells observed shares with the target.
    """
    rng = np.random.default_rng(np.random.SeedSequence([s.seed, s.graphs]))
    rows: dict[str, list[dict]] = {row: [] for row in ("identity", "observed", "oracle", "target-only")}
    start, paper = time.perf_counter(), scales.at("paper", "linear", "evaluate")
    population, name = s.population or paper["population"], f"reference-{s.population}" if s.population else "reference"
    if population < paper["eval_cells"]:
        raise BadInput(f"--population {population}: expected at least {paper['eval_cells']}, the cells that are compared")
    for _ in tqdm(range(s.graphs), unit="graph"):
        screen = linear_screen(rng, 1, paper["genes"], population, held_out=1)
        tasks = evaluation_tasks(rng, screen, paper["eval_cells"], 0)
        for row, results in rows.items():
            p = predict_all(row, screen, tasks, rng)
            values = metrics.evaluate(p.observed, p.target, p.prediction, p.treatments, False, source=p.source)
            results.append({"meta": {"seed": s.seed, "revision": scales.revision()}, "metrics": values})
    table = summarise(rows, "linear")
    lines = ["# Reference rows of Table 2 at the paper's size, without training", "",
             f"{s.graphs} random graphs, {population} cells a condition, seed {s.seed}, mean ± standard deviation over "
             f"graphs; {time.perf_counter() - start:.0f} s; revision {scales.revision()}.", "", *markdown(table), ""]
    write(s.out / f"{name}.md", "\n".join(lines))
    about = {"graphs": s.graphs, "population": population, "seed": s.seed}
    write(s.out / f"{name}.json", json.dumps(about | {"rows": table} | environment(), indent=1))
    print("\n".join(lines) + f"\nwritten to {s.out / name}.md")


def table_1(document: dict, tag: str) -> list[str]:
    """What each method is told besides the cells that it transforms, as its class declares (a test checks it)."""
    takes = {ROWS[row]: set(trained_class(row).conditions_on) for row in PUBLISHED}
    takes["MapPFN"] = {"treatment", "controls", "context experiments"}  # the fields of data.Task
    columns = {"treatment": "treatment", "context": "number of the biological context",
               "controls": "control population (observational)",
               "context experiments": "context experiments (interventional)"}
    document["tables"]["inputs"] = {row: sorted(known) for row, known in takes.items()}
    mark = lambda known, column: "yes" if column in known else "no"
    return [f"## Table 1. What each method conditions on{tag}", "",
            "| | " + " | ".join(columns.values()) + " |", "|---" * 5 + "|",
            *(f"| {row} | " + " | ".join(mark(known, c) for c in columns) + " |" for row, known in takes.items()), ""]


def section(document: dict, name: str, title: str, rows: dict, experiment: str,
            titles: dict | None = None) -> list[str]:
    """The lines of one table with all that belongs to it; its numbers go into `document`."""
    table = summarise(rows, experiment, titles)
    gap = gap_closed(table)
    document["tables"][name] = {"rows": table, "rmse_gap_closed": gap}
    lines = [f"## {title}", "", *markdown(table), "", caption(table, experiment), ""]
    if gap:
        closed = ", ".join(f"{(titles or ROWS)[row]} {100 * share:.0f}%" for row, share in gap.items())
        lines += [f"Share of the RMSE between identity and fresh oracle that is closed: {closed}.", ""]
    for more in () if titles else (comparison(rows, table), budgets(table)):
        lines += [*more, ""] if more else []
    return lines


def figures(root: Path, document: dict) -> list[str]:
    """Every figure with its caption, or the reason why there is none."""
    lines = []
    for file in sorted((root / "figures").glob("*.json")):
        content = json.loads(file.read_text())
        document["figures"][file.stem] = content
        lines += [f"### {content['title']}", ""]
        lines += [f"not run: {content['not_run']}", ""] if "not_run" in content else [
            f"![{content['title']}](figures/{file.stem}.png)", "", content["caption"], ""]
    return ["## Figures", "", *lines] if lines else []


def main() -> None:
    """Make the report of a scale from whatever was run."""
    s = scales.parse(Settings, ())
    if s.reference:
        return reference(s)
    root, small = s.out / s.scale, s.scale != "paper"
    title = "Report" + f" at {s.scale} scale: smaller than, and not comparable with, the paper's" * small
    tag = f" ({s.scale} scale, not the paper's)" * small
    document = {"scale": s.scale, "tables": {}, "figures": {}}
    lines = [f"# {title}", "", *table_1(document, tag)]
    everything = {experiment: collect(root / "samples" / experiment) for experiment in TITLES}
    for experiment, heading in TITLES.items():
        if rows := everything[experiment]:
            lines += section(document, experiment, heading + tag, rows, experiment)
            if any(row in rows for row in list(ABLATIONS)[1:]):
                title = f"Table 4. Ablations, {heading.split('. ')[-1]}{tag}"
                lines += section(document, f"{experiment}-ablations", title, rows, experiment, ABLATIONS)
        elif experiment not in ("toy", "replicates"):
            reason = why_missing(root, experiment)
            lines += [f"## {heading}{tag}", "", f"not run: {reason}", ""]
            document["tables"][experiment] = {"not_run": reason}
    lines += figures(root, document)
    lines += checklist(everything, document, tag)
    document |= environment() | {"seconds": stage_times(root),
                                 "settings": {k: scales.at(s.scale, k) for k in scales.TABLE}}
    lines += ["## Run", "", f"Revision {document['revision']}, {document['device']}, Python {document['python']}, "
              + ", ".join(f"{k} {v}" for k, v in document["versions"].items()) + ".", ""]
    if document["seconds"]:
        lines += ["| stage | seconds |", "|---|---|", *(f"| {k} | {v:.0f} |" for k, v in document["seconds"].items()),
                  f"| all | {sum(document['seconds'].values()):.0f} |", ""]
    lines += ["Settings, as in `scales.py`:", ""]
    lines += [f"- {part}: " + ", ".join(f"{k} {v}" for k, v in values.items())
              for part, values in document["settings"].items()]
    if picture(root, root / "prediction.png"):
        lines += ["", "![A prediction against the truth](prediction.png)"]
    write(root / "report.md", "\n".join(lines) + "\n")
    write(root / "report.json", json.dumps(document, indent=1))
    print("\n".join(lines) + f"\nwritten to {root / 'report.md'}, report.json and prediction.png")


if __name__ == "__main__":
    scales.run(main)
