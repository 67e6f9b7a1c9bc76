"""Stage 7 of 7, the tables: Table 2 and Table 3 with the paper's value beside ours, as Markdown and JSON.

Paper: section 6, Tables 2 and 3. Reads `samples/<experiment>/*.json` (metrics.py) and `*.npz` below out/<scale>, writes
`tables.md`, `tables.json` and `prediction.png` there. No cell is typed in: what was not run says why.

    python tables.py --scale smoke|laptop|paper     seconds
    python tables.py --reference                    the identity and observed rows of Table 2 at the paper's own size, which
                                                    need no training: two minutes on a CPU core, into out/reference.md
Departures: D10 and those of the metrics, D27 to D31.
"""

import dataclasses
import importlib.metadata
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import metrics
import scales
from baselines import METHODS, REFERENCES, predict_all
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
        "mappfn": ((13.69, 0.05), (4.28, 0.06), (0.14, 0.00), (0.01, 0.01), (0.99, 0.02)),
        "identity": ((17.61, 0.14), (12.98, 0.35), (0.28, 0.01), (0.49, 0.01), (0.00, 0.00)),
        "observed": ((9.82, 0.08), (3.66, 0.06), (0.07, 0.00), (0.00, 0.00), (1.00, 0.00)),
    },
    "melanoma": {
        "mappfn-random": ((21.23, 0.11), (51.78, 0.80), (0.24, 0.00), (0.18, 0.02), (1.02, 0.01), (0.12, 0.02)),
        "mappfn-pretrained": ((22.75, 0.16), (10.07, 0.19), (0.13, 0.00), (0.17, 0.01), (1.00, 0.01), (0.34, 0.02)),
        "mappfn-finetuned": ((21.38, 0.12), (7.84, 0.14), (0.10, 0.00), (0.03, 0.01), (0.99, 0.00), (0.38, 0.03)),
        "identity": ((22.91, 0.18), (7.90, 0.17), (0.11, 0.00), (0.51, 0.02), (0.00, 0.00), (0.04, 0.01)),
        "observed": ((8.54, 0.10), (2.59, 0.07), (0.04, 0.00), (0.00, 0.00), (1.00, 0.00), (0.64, 0.06)),
    },
    "leukemia": {
        "mappfn-random": ((14.95, 0.28), (24.47, 0.90), (0.19, 0.01), (0.54, 0.02), (0.82, 0.01), (0.16, 0.01)),
        "mappfn-pretrained": ((44.42, 0.23), (191.88, 1.46), (0.78, 0.00), (0.49, 0.01), (2.56, 0.02), (0.16, 0.01)),
        "mappfn-finetuned": ((16.32, 0.11), (12.24, 0.58), (0.15, 0.00), (0.42, 0.03), (0.91, 0.01), (0.18, 0.01)),
        "identity": ((16.72, 0.18), (13.17, 0.44), (0.14, 0.01), (0.49, 0.02), (0.00, 0.00), (0.18, 0.01)),
        "observed": ((10.29, 0.12), (2.59, 0.04), (0.04, 0.00), (0.03, 0.02), (0.99, 0.01), (0.91, 0.04)),
    },
}
ROWS = {  # in the order of the tables
    "mappfn": "MapPFN", "mappfn-random": "MapPFN (random init)", "mappfn-pretrained": "MapPFN (pre-trained)",
    "mappfn-finetuned": "MapPFN (fine-tuned)", "identity": "Identity", "observed": "Observed", "oracle": "Fresh oracle",
    "target-only": "Target only", "context-mean": "Context mean effect", "additive": "Additive",
    "constant-mean": "Constant mean",
}
TITLES = {
    "linear": "Table 2. Linear SCMs", "leukemia": "Table 3. Leukemia (Papalexi et al., 2021)",
    "melanoma": "Table 3. Melanoma (Frangieh et al., 2021)", "toy": "Toy screen: simulated GRNs, not cells",
}


@dataclass(frozen=True)
class Settings:
    """Make the tables of one scale."""
    scale: str = "laptop"  # column of the table in scales.py
    reference: bool = False  # instead: the rows of Table 2 that need no training, at the paper's size
    graphs: int = 10  # reference: number of random DAGs
    seed: int = 0  # reference: of the graphs
    out: Path = Path("out")  # everything is below out/<scale>


# ------------------------------------------------------------------------------------------------------ collecting results


def row_of(method: str) -> str:
    """Name of the row a file of predictions belongs to: the seeds of one method share one."""
    return method.split("-seed")[0]


def collect(folder: Path) -> dict[str, list[dict]]:
    """Row -> the results (meta and metrics) of all its files in `folder`. Raises BadInput for a file without metrics."""
    rows: dict[str, list[dict]] = {}
    for file in sorted(folder.glob("*.npz")):
        result = file.with_suffix(".json")
        if not metrics.up_to_date(file):
            raise BadInput(f"{result}: missing, or older than {file.name}; make it with python metrics.py {folder}")
        rows.setdefault(row_of(json.loads(result.read_text())["meta"]["method"]), []).append(json.loads(result.read_text()))
    return rows


def units(results: list[dict], metric: str) -> list[float]:
    """The values whose mean and spread a cell shows: one for each file (split, draw or seed).

    One file of several contexts (the simple rows of Table 2, whose held-out graphs are contexts) gives one for each context.
    """
    only = results[0]["metrics"]
    if len(results) == 1 and len(set(only.get("contexts", []))) > 1 and metric in only["conditions"]:
        contexts = np.array(only["contexts"])
        values = np.array(only["conditions"][metric], float)  # None -> NaN
        return [float(np.nanmean(values[contexts == c])) for c in np.unique(contexts)]
    values = [r["metrics"][metric] for r in results]
    return [v for v in values if v is not None]


def summarise(rows: dict[str, list[dict]], experiment: str) -> list[dict]:
    """One entry a row, in the order of ROWS: for each metric our mean, sd and n, and the paper's mean and sd."""
    table = []
    for row, title in ROWS.items():
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
        clipped = [m["clipped_fraction"] for m in metas if "clipped_fraction" in m]
        entry["clipped_fraction"] = float(np.mean(clipped)) if clipped else None
        table.append(entry)
    return table


def gap_closed(table: list[dict]) -> dict[str, float]:
    """Share of the RMSE between identity (0) and the fresh oracle (1) that each row closes; beyond both it leaves [0, 1]."""
    value = {e["row"]: e["metrics"]["rmse"]["mean"] for e in table}
    if not {"identity", "oracle"} <= value.keys():
        return {}
    gap = value["identity"] - value["oracle"]
    return {row: (value["identity"] - v) / gap for row, v in value.items() if row not in ("identity", "oracle", "observed")}


# ---------------------------------------------------------------------------------------------------------------- writing


def cell(entry: dict | None) -> str:
    """`ours ± sd` and, where the paper has a number, `(paper ± sd)`."""
    if entry is None:
        return "–"
    digits = 1 if entry["mean"] >= 10 else 2 if entry["mean"] >= 1 else 3
    ours = f"{entry['mean'] + 0.0:.{digits}f}".replace("-0.000", "0.000") + (f" ± {entry['sd']:.{digits}f}" if entry["sd"] is not None else "")
    return ours + (f" (paper: {entry['paper'][0]:.2f} ± {entry['paper'][1]:.2f})" if entry["paper"] else "")


def markdown(table: list[dict]) -> list[str]:
    """The lines of one table; columns without any value are left out."""
    shown = [m for m in COLUMNS if any(m in e["metrics"] for e in table)]
    lines = ["| | " + " | ".join(COLUMNS[m][0] for m in shown) + " |", "|---" * (1 + len(shown)) + "|"]
    return lines + [f"| {e['title']} | " + " | ".join(cell(e["metrics"].get(m)) for m in shown) + " |" for e in table]


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
    return note.read_text().strip().removeprefix("error: ") if note.is_file() else f"no predictions in {root / 'samples' / experiment}"


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
    figure.suptitle(f"{TITLES[p.meta['experiment']]}, {p.meta['scale']} scale, first test condition of split 0", fontsize=10)
    with scales.atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    return True


# ------------------------------------------------------------------------- the rows that need no training (Table 2)


def reference(s: Settings) -> None:
    """Identity, observed and fresh oracle on linear SCMs of the paper's size: D = 20, 500 cells, 200 of them compared."""
    rng = np.random.default_rng(np.random.SeedSequence([s.seed, s.graphs]))
    rows: dict[str, list[dict]] = {row: [] for row in ("identity", "observed", "oracle", "target-only")}
    start, paper = time.perf_counter(), scales.at("paper", "linear", "evaluate")
    for _ in tqdm(range(s.graphs), unit="graph"):
        screen = linear_screen(rng, 1, paper["genes"], paper["population"], held_out=1)
        tasks = evaluation_tasks(rng, screen, paper["eval_cells"], 0)
        for row, results in rows.items():
            p = predict_all(row, screen, tasks, rng)
            values = metrics.evaluate(p.observed, p.target, p.prediction, p.treatments, False, source=p.source)
            results.append({"meta": {"seed": s.seed, "revision": scales.revision()}, "metrics": values})
    table = summarise(rows, "linear")
    lines = ["# Reference rows of Table 2 at the paper's size, without training", "",
             f"{s.graphs} random graphs, seed {s.seed}, mean ± standard deviation over graphs; "
             f"{time.perf_counter() - start:.0f} s; revision {scales.revision()}.", "", *markdown(table), ""]
    write(s.out / "reference.md", "\n".join(lines))
    write(s.out / "reference.json", json.dumps({"graphs": s.graphs, "seed": s.seed, "rows": table} | environment(), indent=1))
    print("\n".join(lines) + f"\nwritten to {s.out / 'reference.md'}")


def main() -> None:
    """Make all tables of a scale from whatever was run."""
    s = scales.parse(Settings, ())
    if s.reference:
        return reference(s)
    root = s.out / s.scale
    note = "" if s.scale == "paper" else f" at {s.scale} scale: smaller than, and not comparable with, the paper's"
    lines, document = [f"# Tables{note}", ""], {"scale": s.scale, "tables": {}}
    for experiment, title in TITLES.items():
        rows = collect(root / "samples" / experiment)
        if experiment == "toy" and not rows:
            continue
        lines += [f"## {title}" + (f" ({s.scale} scale, not the paper's)" if note else ""), ""]
        if not rows:
            reason = why_missing(root, experiment)
            lines += [f"not run: {reason}", ""]
            document["tables"][experiment] = {"not_run": reason}
            continue
        table, gap = summarise(rows, experiment), {}
        lines += [*markdown(table), "", caption(table, experiment), ""]
        if gap := gap_closed(table):
            closed = ", ".join(f"{ROWS[row]} {100 * share:.0f}%" for row, share in gap.items())
            lines += [f"Share of the RMSE between identity and fresh oracle that is closed: {closed}.", ""]
        document["tables"][experiment] = {"rows": table, "rmse_gap_closed": gap}
    document |= environment() | {"seconds": stage_times(root)}
    lines += ["## Run", "", f"Revision {document['revision']}, {document['device']}, Python {document['python']}, "
              + ", ".join(f"{k} {v}" for k, v in document["versions"].items()) + ".", ""]
    if document["seconds"]:
        lines += ["| stage | seconds |", "|---|---|", *(f"| {k} | {v:.0f} |" for k, v in document["seconds"].items()),
                  f"| all | {sum(document['seconds'].values()):.0f} |", ""]
    if picture(root, root / "prediction.png"):
        lines += ["![A prediction against the truth](prediction.png)", ""]
    write(root / "tables.md", "\n".join(lines))
    write(root / "tables.json", json.dumps(document, indent=1))
    print("\n".join(lines) + f"\nwritten to {root / 'tables.md'}, tables.json and prediction.png")


if __name__ == "__main__":
    scales.run(main)
