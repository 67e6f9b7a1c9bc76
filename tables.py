"""Stage 8 of 8, the report: every table with the paper's value beside ours, every figure, and each claim's evidence.

Paper: section 6, Tables 1 to 4. Reads `samples/<screen>/*.json` (metrics.py), `figures/*.json` (figures.py) and
`times.csv` and `screens/<name>/not-run.txt` (run_all.sh) below out/<scale>, writes `report.md` and `report.json` there.
What has no name here appears under its own; what was not run says why; no cell is typed in.

    python tables.py --scale smoke|laptop|paper     seconds
Departures that the tables inherit: D10, D28, D32, D33.

    row      a line of a table: a method, its seeds taken together
    file     metrics of one row for one split, draw of cells and seed: `meta` and `metrics`
    unit     what rows are paired by: a held-out system if a file has several, else a split
"""

import importlib.metadata
import json
import platform
import re
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

import scales
from metrics import METRICS, prediction_files, up_to_date
from scales import BadInput

# The paper's numbers: data set -> row -> mean and standard deviation for each of PAPER_COLUMNS.
PAPER = json.loads((Path(__file__).parent / "results" / "paper.json").read_text())
PAPER_COLUMNS, SOURCE = tuple(PAPER.pop("columns")), PAPER.pop("source")
PAPER_TITLES = {"linear": "Table 2. Linear SCMs", "leukemia": "Table 3. Leukemia (Papalexi et al., 2021)",
                "melanoma": "Table 3. Melanoma (Frangieh et al., 2021)"}
ROWS = {  # in the order of the tables
    "cpa": "CPA", "condot": "CondOT", "mfm": "MFM", "cellflow": "CellFlow", "state": "STATE",
    "condot-released": "CondOT, random init", "mappfn": "MapPFN", "mappfn-random": "MapPFN (random init)",
    "mappfn-pretrained": "MapPFN (pre-trained)", "mappfn-finetuned": "MapPFN (fine-tuned)",
    "mappfn-unpaired": "– paired prior", "mappfn-no-context": "– interventional context",
    "identity": "Identity", "observed": "Observed", "oracle": "Fresh oracle",
    "target-only": "Target only", "system-mean": "System mean effect", "additive": "Additive",
    "target-gene": "Target gene", "bilinear-ridge": "Bilinear ridge", "constant-mean": "Constant mean",
}
ABLATED = ("mappfn-unpaired", "mappfn-no-context")  # Table 4 only
PUBLISHED = ("cpa", "condot", "mfm", "cellflow", "state")
# What a trained row has to beat. Not "constant-mean", which is no set of cells.
SIMPLE = ("identity", "target-only", "system-mean", "additive", "target-gene", "bilinear-ridge")
ADVANTAGE = ("Mean ± standard error of n paired differences (units: held-out systems, or splits) to the one that is "
             "hardest to beat; positive: better; MR: how much closer to 1.")
# The claims of section 6, in order: statement, screen (one of the paper's, or "real": the first of log-expression data
# that has the row), row, rivals, metrics. The row is held against the best of its rivals.
CLAIMS = [
    ("MapPFN is best on linear SCMs in every metric",
     "linear", "mappfn", ("condot", "mfm"), PAPER_COLUMNS[:5]),
    ("CondOT and MFM stay near identity on linear SCMs (MR about 0.1), MapPFN does not",
     "linear", "mappfn", ("condot", "mfm"), ("magnitude_ratio",)),
    ("Fine-tuned MapPFN has the best PDS, MR and AUPRC on real cells",
     "real", "mappfn-finetuned", PUBLISHED, ("pds", "magnitude_ratio", "auprc")),
    ("Pre-training helps: fine-tuned beats random initialisation in all but W2",
     "real", "mappfn-finetuned", ("mappfn-random",), PAPER_COLUMNS[1:]),
    ("Interventional context improves every metric (Table 4)",
     "real", "mappfn-pretrained", ("mappfn-no-context",), PAPER_COLUMNS),
    ("Zero-shot, MapPFN finds differentially expressed genes on par with the best baseline trained on real cells",
     "real", "mappfn-pretrained", PUBLISHED, ("auprc",)),
    ("The paired prior improves every metric (Table 4)",
     "real", "mappfn-pretrained", ("mappfn-unpaired",), PAPER_COLUMNS),
]
FIGURE_CLAIMS = {  # figure that has the evidence; numbered on
    "variance": "The paired prior learns variances faster and better (Figure 2)",
    "tta": "Test-time augmentation raises AUPRC (Figure 3)",
    "context": "More context experiments lower W2 (Figure 5a)",
    "cells": "More cells than were trained with lower W2 (Figure 5b)",
    "coverage": "The prior covers the range of real expression and fold changes (Figure 6)",
}


@dataclass(frozen=True)
class Settings:
    """Make the report of one scale from whatever was run."""
    scale: str = "laptop"  # column of the table in scales.py
    out: Path = Path("out")  # everything is below out/<scale>


class Results(NamedTuple):
    """What was found of one screen."""
    name: str                     # its folder below samples/
    title: str
    paper: str | None             # which of the paper's data sets it is
    rows: dict[str, list[dict]]   # row -> its files


def collect(folder: Path) -> Results:
    """The results of one screen. Raises BadInput if a file has no metrics, or if its screen was made anew since."""
    rows, made = {}, {}
    for predictions in prediction_files((folder,)):
        path = predictions.with_suffix(".json")
        if not up_to_date(predictions):
            raise BadInput(f"{path}: missing, older than {predictions.name} or incomplete; make it with "
                           f"python metrics.py {folder}")
        file = json.loads(path.read_text())
        meta = file["meta"]
        rows.setdefault(meta["row"].split("-seed")[0], []).append(file)
        if made.setdefault(meta["split"], meta.get("fingerprint")) != meta.get("fingerprint"):
            raise BadInput(f"{predictions} predicts other data than the files before it; the screen was made anew: "
                           "delete what was predicted from the old one")
    title, paper = meta.get("title", folder.name), meta.get("paper")
    return Results(folder.name, PAPER_TITLES.get(paper, title), paper, rows)


def in_order(names, known) -> list[str]:
    """Those that are known here first, in their order, then the others by name."""
    return [name for name in known if name in names] + sorted(set(names) - set(known))


def per_unit(files: list[dict], metric: str) -> dict[str, float]:
    """The value for each unit that rows can be paired by: a held-out system if a file has several, else a split. Mean
    over draws of cells, seeds and conditions; units without a defined value are left out."""
    found: dict[str, list[float]] = {}
    for file in files:
        numbers = file["metrics"]
        names, values = [f"split {file['meta']['split']}"], [numbers[metric]]
        if len(set(numbers["systems"])) > 1 and metric in numbers["conditions"]:
            names, values = numbers["systems"], numbers["conditions"][metric]
        for name, value in zip(names, values):
            if value is not None:
                found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def spread(files: list[dict], metric: str) -> list[float]:
    """What a cell shows mean and sd of: a value for each file or, of a single file, for each of its systems."""
    if len(files) == 1:
        return list(per_unit(files, metric).values())
    return [file["metrics"][metric] for file in files if file["metrics"][metric] is not None]


def spread_over(files: list[dict]) -> str:
    """In words, what those values are of."""
    if len(files) == 1:
        return f"{len(set(files[0]['metrics']['systems']))} held-out systems"
    parts = []
    for key, name in {"split": "splits", "draw": "draws of cells", "row": "seeds"}.items():
        count = len({file["meta"][key] for file in files})
        if count > 1:
            parts.append(f"{count} {name}")
    return " x ".join(parts)


def penalty(metric: str, value: float) -> float:
    """A number that is smaller the better the value is."""
    return {"lower": value, "higher": -value, "one": abs(value - 1)}[METRICS[metric].better]


def advantage(rows: dict[str, list[dict]], a: str, b: str, metric: str) -> dict | None:
    """By how much row a beats row b (positive: better; MR: how much closer to 1), in the units of the tables: mean of
    the paired differences, its standard error, their number. None if fewer than two units are shared."""
    one, other = per_unit(rows.get(a, []), metric), per_unit(rows.get(b, []), metric)
    differences = []
    for unit in one:
        if unit in other:
            differences.append(penalty(metric, other[unit]) - penalty(metric, one[unit]))
    n = len(differences)
    if n < 2:
        return None
    differences = METRICS[metric].factor * np.array(differences)
    what = f"{METRICS[metric].heading} against {ROWS.get(b, b)}".replace("– ", "without ")
    return {"what": what, "metric": metric, "difference": float(differences.mean()),
            "error": float(differences.std(ddof=1) / np.sqrt(n)), "n": n}


def evidence(rows: dict[str, list[dict]], row: str, rivals, wanted) -> list[dict]:
    """In each metric, the advantage of the row over the rival that is hardest to beat."""
    found = []
    for metric in wanted:
        items = filter(None, [advantage(rows, row, rival, metric) for rival in rivals])
        found += sorted(items, key=itemgetter("difference"))[:1]
    return found


def summarise(results: Results, rows: list[str]) -> list[dict]:
    """One entry for each of these rows, as report.json holds it: for each metric our mean, sd and n and the paper's
    numbers; what the spread is over; the budget of a trained row."""
    table = []
    for row in rows:
        files = results.rows[row]
        paper = dict(zip(PAPER_COLUMNS, PAPER.get(results.paper, {}).get(row, ())))
        numbers = {}
        for name, metric in METRICS.items():
            values = metric.factor * np.array(spread(files, name))
            if len(values):
                sd = float(values.std(ddof=1)) if len(values) > 1 else None
                numbers[name] = {"mean": float(values.mean()), "sd": sd, "n": len(values), "paper": paper.get(name)}
        table.append({"row": row, "title": ROWS.get(row, row), "metrics": numbers, "files": len(files),
                      "over": spread_over(files), "budget": budget(files),
                      "revisions": sorted({file["meta"]["revision"] for file in files})})
    return table


def budget(files: list[dict]) -> dict | None:
    """What a trained row was given, the seconds of a fit (mean), and the share clipped to zero; None for other rows."""
    meta = files[0]["meta"]
    if "training" in meta:  # MapPFN: the header of its checkpoint
        fit = meta["training"]
        seconds = np.mean([file["meta"]["training"]["seconds"] for file in files])
        size = f"{fit['micro_batch'] * fit['accumulate']} tasks"
    elif "options" in meta:
        fit = meta | meta["options"]
        seconds = np.mean([file["meta"]["fit_seconds"] for file in files])
        size = f"{fit['batch']} cells"
    else:
        return None
    clipped = np.mean([file["meta"].get("clipped_fraction", 0) for file in files])
    return {"updates": fit["updates"], "of": size, "parameters": fit["parameters"],
            "seconds a fit": round(float(seconds)), "negative, clipped": f"{clipped:.1%}"}


def gap_closed(table: list[dict]) -> dict[str, float]:
    """Share of the RMSE between identity (0) and fresh oracle (1) that a row closes; beyond both it leaves [0, 1]."""
    rmse = {entry["row"]: entry["metrics"]["rmse"]["mean"] for entry in table}
    if not {"identity", "oracle"} <= rmse.keys():
        return {}
    start, end = rmse.pop("identity"), rmse.pop("oracle")
    rmse.pop("observed", None)
    return {row: (start - value) / (start - end) for row, value in rmse.items()}


def grid(headings: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table."""
    lines = ["| " + " | ".join(headings).strip() + " |", "|---" * len(headings) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
    return lines


def said(items: list[dict]) -> str:
    """`what +difference ± standard error (n = number); ...`"""
    parts = []
    for item in items:
        error = "" if item["error"] is None else f" ± {item['error']:.3f}"
        parts.append(f"{item['what']} {item['difference']:+.3f}{error} (n = {item['n']})")
    return "; ".join(parts)


def cell(entry: dict | None, paper: bool = True) -> str:
    """`ours ± sd` and, where the paper has a number and it is wanted, `(paper: mean ± sd)`."""
    if entry is None:
        return "–"
    digits = 3 - (entry["mean"] >= 1) - (entry["mean"] >= 10)
    text = f"{entry['mean']:.{digits}f}".replace("-0.000", "0.000")
    if entry["sd"] is not None:
        text += f" ± {entry['sd']:.{digits}f}"
    if paper and entry["paper"]:
        text += " (paper: {:.2f} ± {:.2f})".format(*entry["paper"])
    return text


def heading(metric: str) -> str:
    """With an arrow to where better is."""
    return METRICS[metric].heading + {"lower": " ↓", "higher": " ↑", "one": ""}[METRICS[metric].better]


def markdown(table: list[dict], wanted=tuple(METRICS), paper: bool = True) -> list[str]:
    """The lines of one table; columns without any value are left out."""
    headings, rows = [""], [[entry["title"]] for entry in table]
    for metric in wanted:
        if any(metric in entry["metrics"] for entry in table):
            headings.append(heading(metric))
            for row, entry in zip(rows, table):
                row.append(cell(entry["metrics"].get(metric), paper))
    return grid(headings, rows)


# ----------------- sections of the report: each returns its lines and puts its numbers into `document`, the report.json


def inputs_section(screens: list[Results], document: dict) -> list[str]:
    """Table 1: what each method is told besides the cells that it transforms, as its predictions say."""
    found = {}
    for results in screens:
        for row, files in results.rows.items():
            if "conditions_on" in files[0]["meta"]:
                method = "mappfn" if row.startswith("mappfn") else row.removesuffix("-released")
                found[method] = files[0]["meta"]["conditions_on"]
    document["tables"]["inputs"] = found
    lines = []
    for method in in_order(found, ROWS):
        lines.append([ROWS.get(method, method), ", ".join(found[method])])
    return ["## Table 1. What each method conditions on", "", *grid(["method", "conditions on"], lines), ""]


def table_section(results: Results, rows: list[str], name: str, title: str, document: dict) -> list[str]:
    """Table 2, 3 or 4, or one like those, with all that belongs to it."""
    table = summarise(results, rows)
    gap = gap_closed(table)
    document["tables"][name] = {"rows": table, "rmse_gap_closed": gap}
    over, budgets, compared = {}, [], []
    for entry in table:
        over.setdefault(entry["over"], []).append(entry["title"])
        if entry["budget"]:
            entry["advantage"] = evidence(results.rows, entry["row"], SIMPLE, METRICS)
            budgets.append([entry["title"], *map(str, entry["budget"].values())])
            given = ["trained row", *entry["budget"]]
            compared.append([entry["title"], *advantages(entry["advantage"])])
    most = max(over, key=lambda text: len(over[text]))
    spreads = most
    for text, titles in over.items():
        if text != most:
            spreads += f"; {text} ({', '.join(titles)})"
    lines = [f"## {title}", "", *markdown(table), "", f"Mean ± standard deviation over {spreads}.", ""]
    if gap:
        shares = ", ".join(f"{ROWS.get(row, row)} {share:.0%}" for row, share in gap.items())
        lines += [f"Share of the RMSE between identity and fresh oracle that is closed: {shares}.", ""]
    if budgets:
        headings = ["better than the best simple row by", *(heading(metric) for metric in METRICS)]
        lines += [*grid(headings, compared), "", ADVANTAGE, "", *grid(given, budgets), ""]
    return lines


def advantages(items: list[dict]) -> list[str]:
    """The cells of a trained row: in each metric, its advantage over the simple row that is named."""
    cells = dict.fromkeys(METRICS, "–")
    for item in items:
        rival = item["what"].split(" against ")[1]
        cells[item["metric"]] = f"{item['difference']:+.3f} ± {item['error']:.3f} ({rival})"
    return list(cells.values())


def missing_sections(root: Path, screens: list[Results], document: dict) -> list[str]:
    """The paper's data sets, and any that could not be made, of which there is no result: why."""
    reasons = {name: f"no predictions in {root / 'samples' / name}" for name in PAPER}
    for note in sorted((root / "screens").glob("*/not-run.txt")):
        reasons[note.parent.name] = note.read_text().strip().removeprefix("error: ")
    for results in screens:
        reasons.pop(results.name, None)
        reasons.pop(results.paper, None)
    lines = []
    for name, reason in reasons.items():
        lines += [f"## {PAPER_TITLES.get(name, name)}", "", f"not run: {reason}", ""]
        document["tables"][name] = {"not_run": reason}
    return lines


def figure_section(root: Path, document: dict) -> list[str]:
    """Every figure with its caption, or the reason why there is none."""
    for file in (root / "figures").glob("*.json"):
        try:
            document["figures"][file.stem] = dict(json.loads(file.read_text()))
        except ValueError:
            raise BadInput(f"{file}: damaged; delete it and run figures.py again") from None
    lines = ["## Figures", ""]
    for name, figure in sorted(document["figures"].items(), key=lambda item: item[1]["title"]):
        lines += [f"### {figure['title']}", ""]
        if "not_run" in figure:
            lines += [f"not run: {figure['not_run']}", ""]
        else:
            lines += [f"![{figure['title']}](figures/{name}.png)", "", figure["caption"], ""]
    return lines


def claim_section(screens: list[Results], document: dict) -> list[str]:
    """What is claimed, and the evidence, or why there is none."""
    claims = []
    for statement, screen, row, rivals, wanted in CLAIMS:
        items = []
        for results in screens:
            real = row in results.rows and results.rows[row][0]["metrics"]["log_expression"]
            if results.paper == screen or (screen == "real" and real):
                statement += f" [{results.name}]"
                items = evidence(results.rows, row, rivals, wanted)
                break
        claims.append((statement, items, "no such rows to compare"))
    for name, statement in FIGURE_CLAIMS.items():
        figure = {"evidence": [], "not_run": "no such figure, or too few values in it"}
        figure |= document["figures"].get(name, {})
        claims.append((statement, figure["evidence"], figure["not_run"]))
    lines = []
    for number, (statement, items, reason) in enumerate(claims, 1):
        found = said(items) or f"not run: {reason}"
        lines.append([str(number), statement, found])
        document["claims"].append({"number": number, "statement": statement, "evidence": items, "found": found})
    return ["## What the paper claims, and what was found", "", ADVANTAGE, "",
            *grid(["", "claim", "evidence"], lines), ""]


def run_section(root: Path, document: dict) -> list[str]:
    """With what and how long all of it was run. A stage that took several attempts is summed."""
    import jax  # imported late: everything else here needs no device

    versions = {"python": platform.python_version()}
    for package in ("jax", "equinox", "diffrax", "optax", "ott-jax", "numpy", "scipy", "scanpy", "sergio-rs"):
        versions[package] = importlib.metadata.version(package)
    times: dict[str, float] = {}
    if (root / "times.csv").is_file():  # by run_all.sh
        for line in (root / "times.csv").read_text().splitlines():
            stage, _, seconds = line.rpartition(",")  # a title may contain commas
            if seconds.isdigit():
                times[stage] = times.get(stage, 0) + int(seconds)
        times["all"] = sum(times.values())
    document |= {"revision": scales.revision(), "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
                 "machine": platform.machine(), "versions": versions, "seconds": times}
    listed = ", ".join(f"{package} {version}" for package, version in versions.items())
    return ["## Run", "", f"Revision {document['revision']}, {document['device']}, {listed}.", "",
            *grid(["stage", "seconds"], [[stage, f"{seconds:.0f}"] for stage, seconds in times.items()])]


def main() -> None:
    """Make the report of a scale from whatever was run."""
    s = scales.parse(Settings, lambda s: ())
    root = s.out / s.scale
    if not root.is_dir():
        raise BadInput(f"{root}: no such folder, so there is nothing to report; run_all.sh makes it")
    document = {"scale": s.scale, "tables": {}, "figures": {}, "claims": []}
    document["settings"] = {section: scales.at(s.scale, section) for section in scales.TABLE}
    names = {file.parent.name for file in root.glob("samples/*/[!.]*.npz")}
    screens = [collect(root / "samples" / name) for name in in_order(names, PAPER)]
    lines = ["# Report", "", f"Numbers of the paper: {SOURCE}.", "", *inputs_section(screens, document)]
    for results in screens:
        rows = in_order(results.rows.keys() - ABLATED, ROWS)
        if rows:
            lines += table_section(results, rows, results.name, results.title, document)
        if results.rows.keys() & ABLATED:
            title = "Table 4. Ablations, " + results.title.split(". ", 1)[-1]
            rows = in_order(results.rows.keys() & {"mappfn-pretrained", *ABLATED}, ROWS)
            lines += table_section(results, rows, f"{results.name}-ablations", title, document)
    lines += missing_sections(root, screens, document) + figure_section(root, document)
    lines += claim_section(screens, document) + run_section(root, document)
    tag = f" ({s.scale} scale, not comparable with the paper's)"
    if s.scale == "paper":
        tag = ""
    text = re.sub("(?m)^(##? .*)$", rf"\1{tag}", "\n".join(lines) + "\n")
    for name, content in {"report.md": text, "report.json": json.dumps(document, indent=1)}.items():
        with scales.atomic(root / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    print(f"{text}written to {root / 'report.md'} and report.json")


if __name__ == "__main__":
    scales.run(main)
