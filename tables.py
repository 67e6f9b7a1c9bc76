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
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import scales
from metrics import METRICS, prediction_files, up_to_date
from scales import BadInput

# The paper's numbers: data set -> row -> mean and standard deviation for each of PAPER_COLUMNS.
PAPER = json.loads((Path(__file__).parent / "results" / "paper.json").read_text())
PAPER_COLUMNS = tuple(PAPER.pop("columns"))
SOURCE = PAPER.pop("source")
PAPER_TITLES = {
    "linear": "Table 2. Linear SCMs",
    "leukemia": "Table 3. Leukemia (Papalexi et al., 2021)",
    "melanoma": "Table 3. Melanoma (Frangieh et al., 2021)",
}
ROWS = {  # in the order of the tables
    "cpa": "CPA", "condot": "CondOT", "mfm": "MFM", "cellflow": "CellFlow", "state": "STATE",
    "condot-released": "CondOT, random init",
    "mappfn": "MapPFN", "mappfn-random": "MapPFN (random init)", "mappfn-pretrained": "MapPFN (pre-trained)",
    "mappfn-finetuned": "MapPFN (fine-tuned)", "identity": "Identity", "observed": "Observed",
    "oracle": "Fresh oracle", "target-only": "Target only", "system-mean": "System mean effect",
    "additive": "Additive", "target-gene": "Target gene", "bilinear-ridge": "Bilinear ridge",
    "constant-mean": "Constant mean",
}
ABLATED = {"mappfn-unpaired": "– paired prior", "mappfn-no-context": "– interventional context"}  # Table 4 only
PUBLISHED = ("cpa", "condot", "mfm", "cellflow", "state")
# What a trained row has to beat. Not "constant-mean", which is no set of cells.
SIMPLE = ("identity", "target-only", "system-mean", "additive", "target-gene", "bilinear-ridge")
INPUTS = {  # Table 1
    "treatment": "treatment",
    "system": "number of the system",
    "controls": "control population (observational)",
    "context experiments": "context experiments (interventional)",
}
# The claims of section 6. Number, statement, screen (one of the paper's, or "real": the first of log-expression data
# that has the row), row, rivals, metrics: the row is held against the best of its rivals.
CLAIMS = [
    (1, "MapPFN is best on linear SCMs in every metric",
     "linear", "mappfn", ("condot", "mfm"), PAPER_COLUMNS[:5]),
    (2, "CondOT and MFM stay near identity on linear SCMs (MR about 0.1), MapPFN does not",
     "linear", "mappfn", ("condot", "mfm"), ("magnitude_ratio",)),
    (3, "Fine-tuned MapPFN has the best PDS, MR and AUPRC on real cells",
     "real", "mappfn-finetuned", PUBLISHED, ("pds", "magnitude_ratio", "auprc")),
    (4, "Pre-training helps: fine-tuned beats random initialisation in all but W2",
     "real", "mappfn-finetuned", ("mappfn-random",), PAPER_COLUMNS[1:]),
    (5, "Interventional context improves every metric (Table 4)",
     "real", "mappfn-pretrained", ("mappfn-no-context",), PAPER_COLUMNS),
    (6, "Zero-shot, MapPFN finds differentially expressed genes on par with the best baseline trained on real cells",
     "real", "mappfn-pretrained", PUBLISHED, ("auprc",)),
    (7, "The paired prior improves every metric (Table 4)",
     "real", "mappfn-pretrained", ("mappfn-unpaired",), PAPER_COLUMNS),
]
FIGURE_CLAIMS = [  # number, statement, figure that has the evidence
    (8, "The paired prior learns variances faster and better (Figure 2)", "variance"),
    (9, "Test-time augmentation raises AUPRC (Figure 3)", "tta"),
    (10, "More context experiments lower W2 (Figure 5a)", "context"),
    (11, "More cells than were trained with lower W2 (Figure 5b)", "cells"),
    (12, "The prior covers the range of real expression and fold changes (Figure 6)", "coverage"),
]


@dataclass(frozen=True)
class Settings:
    """Make the report of one scale from whatever was run."""
    scale: str = "laptop"  # column of the table in scales.py
    out: Path = Path("out")  # everything is below out/<scale>


# --------------------------------------------------------------------------------------------------- collecting results


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


def collect_all(samples: Path) -> list[Results]:
    """Every screen that has predictions: the paper's in its order, then the others by name."""
    found = []
    for folder in sorted(samples.glob("*/")):
        if any(folder.glob("[!.]*.npz")):
            found.append(collect(folder))
    ordered = []
    for paper in PAPER:
        ordered += [results for results in found if results.paper == paper]
    return ordered + [results for results in found if results.paper not in PAPER]


def per_unit(files: list[dict], metric: str) -> dict[str, float]:
    """The value for each unit that rows can be paired by: a held-out system if a file has several, else a split.

    Draws of cells, seeds and conditions within a unit are averaged; units without a defined value are left out.
    """
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
    """The values whose mean and standard deviation a cell shows: one for each file (split, draw or seed).

    One file of several systems (Table 2 with a single seed) gives one for each of them.
    """
    if len(files) == 1:
        return list(per_unit(files, metric).values())
    values = [file["metrics"][metric] for file in files]
    return [value for value in values if value is not None]


def spread_over(files: list[dict]) -> str:
    """In words, what those values are of."""
    if len(files) == 1:
        systems = len(set(files[0]["metrics"]["systems"]))
        return f"{systems} held-out systems" if systems > 1 else "one file"
    parts = []
    for name, key in {"splits": "split", "draws of cells": "draw", "seeds": "row"}.items():
        count = len({file["meta"][key] for file in files})
        if count > 1:
            parts.append(f"{count} {name}")
    return " x ".join(parts)


def penalty(metric: str, value: float) -> float:
    """A number that is smaller the better the value is."""
    if METRICS[metric].better == "higher":
        return -value
    if METRICS[metric].better == "one":
        return abs(value - 1)
    return value


def advantage(rows: dict[str, list[dict]], a: str, b: str, metric: str) -> tuple[float, float, int] | None:
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
    return float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(n)), n


def best_simple(rows: dict[str, list[dict]], metric: str) -> str | None:
    """The simple row that is best on average."""
    found = {}
    for row in SIMPLE:
        values = list(per_unit(rows.get(row, []), metric).values())
        if values:
            found[row] = penalty(metric, float(np.mean(values)))
    return min(found, key=found.get, default=None)


# --------------------------------------------------------------------------------------- what the lines of a table say


def title_of(row: str) -> str:
    """Its name in the tables; a row that is not known here has its own."""
    return (ROWS | ABLATED).get(row, row)


def summarise(results: Results, rows) -> list[dict]:
    """One entry for each of these rows that there is: for each metric our mean, sd and n and the paper's numbers, what
    the spread is over, and the budget."""
    table = []
    for row in rows:
        files = results.rows.get(row)
        if not files:
            continue
        paper = dict(zip(PAPER_COLUMNS, PAPER.get(results.paper, {}).get(row, ())))
        numbers = {}
        for name, metric in METRICS.items():
            values = metric.factor * np.array(spread(files, name))
            if len(values):
                sd = float(values.std(ddof=1)) if len(values) > 1 else None
                numbers[name] = {"mean": float(values.mean()), "sd": sd, "n": len(values), "paper": paper.get(name)}
        clipped = np.mean([file["meta"].get("clipped_fraction", 0) for file in files])
        table.append({"row": row, "title": title_of(row), "metrics": numbers, "files": len(files),
                      "over": spread_over(files), "budget": budget(files), "clipped_fraction": float(clipped),
                      "revisions": sorted({file["meta"]["revision"] for file in files})})
    return table


def budget(files: list[dict]) -> dict | None:
    """Updates, parameters and seconds of the fits (mean over them) that a trained row stands for; None for others."""
    meta = files[0]["meta"]
    if "training" in meta:  # MapPFN: the header of its checkpoint
        head = meta["training"]
        return {"updates": head["updates"], "batch": f"{head['micro_batch'] * head['accumulate']} tasks",
                "parameters": head["parameters"], "seconds": head["seconds"]}
    if "options" in meta:
        fits = {}  # one for all draws of cells
        for file in files:
            fits[file["meta"]["split"], file["meta"]["row"]] = file["meta"]["fit_seconds"]
        return {"updates": meta["options"]["updates"], "batch": f"{meta['options']['batch']} cells",
                "parameters": meta["parameters"], "seconds": float(np.mean(list(fits.values())))}
    return None


def gap_closed(table: list[dict]) -> dict[str, float]:
    """Share of the RMSE between identity (0) and fresh oracle (1) that a row closes; beyond both it leaves [0, 1]."""
    rmse = {entry["row"]: entry["metrics"]["rmse"]["mean"] for entry in table}
    if not {"identity", "oracle"} <= rmse.keys():
        return {}
    start, end = rmse.pop("identity"), rmse.pop("oracle")
    rmse.pop("observed", None)
    return {row: (start - value) / (start - end) for row, value in rmse.items()}


def grid(headings: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
    return [line.replace("|  |", "| |") for line in lines]


def cell(entry: dict | None, paper: bool = True) -> str:
    """`ours ± sd` and, where the paper has a number and it is wanted, `(paper: mean ± sd)`."""
    if entry is None:
        return "–"
    digits = 3
    if entry["mean"] >= 1:
        digits = 2
    if entry["mean"] >= 10:
        digits = 1
    text = f"{entry['mean']:.{digits}f}".replace("-0.000", "0.000")
    if entry["sd"] is not None:
        text += f" ± {entry['sd']:.{digits}f}"
    if paper and entry["paper"]:
        text += " (paper: {:.2f} ± {:.2f})".format(*entry["paper"])
    return text


def heading(metric: str) -> str:
    """With an arrow to where better is."""
    return METRICS[metric].heading + {"lower": " ↓", "higher": " ↑", "one": ""}[METRICS[metric].better]


def markdown(table: list[dict], wanted: tuple[str, ...] = tuple(METRICS), paper: bool = True) -> list[str]:
    """The lines of one table; columns without any value are left out."""
    shown = [metric for metric in wanted if any(metric in entry["metrics"] for entry in table)]
    rows = []
    for entry in table:
        rows.append([entry["title"]] + [cell(entry["metrics"].get(metric), paper) for metric in shown])
    return grid(["", *map(heading, shown)], rows)


def caption(table: list[dict]) -> str:
    """What the ± is, and how much was clipped."""
    over, clipped = {}, []
    for entry in table:
        over.setdefault(entry["over"], []).append(entry["title"])
        if entry["clipped_fraction"]:
            clipped.append(f"{entry['title']} {entry['clipped_fraction']:.1%}")
    most = max(over, key=lambda text: len(over[text]))
    text = f"Mean ± standard deviation over {most}"
    for other, titles in over.items():
        if other != most:
            text += f" ({', '.join(titles)}: {other})"
    if clipped:
        text += f". Negative expression clipped to zero: {', '.join(clipped)}"
    return text + "."


def comparison(rows: dict[str, list[dict]], trained: list[dict]) -> list[str]:
    """The lines of a table: each trained row against the best simple row, metric by metric, in paired differences."""
    headings, lines, most = ["better than the best simple row by"], [], 0
    best = {}
    for metric in METRICS:
        rival = best_simple(rows, metric)
        if rival is not None:
            best[metric] = rival
            headings.append(f"{heading(metric)} vs {title_of(rival)}")
    for entry in trained:
        lines.append([entry["title"]])
        for metric, rival in best.items():
            mean, error, n = advantage(rows, entry["row"], rival, metric) or (None, None, 0)
            lines[-1].append(f"{mean:+.3f} ± {error:.3f}" if n else "–")
            most = max(most, n)
    if not most:
        return []
    return [*grid(headings, lines), "",
            f"Paired differences, mean ± standard error over {most} units (held-out systems, or splits); positive: the "
            "trained row is better. MR: how much closer to 1.", ""]


def budgets(trained: list[dict]) -> list[str]:
    """The lines of a table of what each trained row was given."""
    rows = []
    for entry in trained:
        given = entry["budget"]
        rows.append([entry["title"], f"{given['updates']:,}", given["batch"], f"{given['parameters']:,}",
                     f"{given['seconds']:.0f}"])
    if not rows:
        return []
    return [*grid(["trained row", "updates", "of", "parameters", "seconds a fit"], rows), ""]


# ---------------------------------------------------------------------------------------------- sections of the report


def inputs_section(screens: list[Results], document: dict, tag: str) -> list[str]:
    """Table 1: what each method is told besides the cells that it transforms, as its predictions say."""
    found = {}
    for results in screens:
        for row, files in results.rows.items():
            if "conditions_on" in files[0]["meta"]:
                method = "mappfn" if row.startswith("mappfn") else row.removesuffix("-released")
                found[method] = files[0]["meta"]["conditions_on"]
    document["tables"]["inputs"] = found
    if not found:
        return []
    lines = []
    for method in [*ROWS, *sorted(found.keys() - ROWS.keys())]:
        if method in found:
            lines.append([title_of(method)] + ["yes" if word in found[method] else "no" for word in INPUTS])
    return [f"## Table 1. What each method conditions on{tag}", "", *grid(["", *INPUTS.values()], lines), ""]


def screen_sections(results: Results, document: dict, tag: str) -> list[str]:
    """Table 2 or 3, or one like those, with all that belongs to it, and Table 4; the numbers go into `document`."""
    unknown = sorted(results.rows.keys() - ROWS.keys() - ABLATED.keys())
    table, lines = summarise(results, [*ROWS, *unknown]), []
    gap = gap_closed(table)
    document["tables"][results.name] = {"rows": table, "rmse_gap_closed": gap}
    if table:
        trained = [entry for entry in table if entry["budget"]]
        lines = [f"## {results.title}{tag}", "", *markdown(table), "", caption(table), ""]
        if gap:
            shares = ", ".join(f"{title_of(row)} {share:.0%}" for row, share in gap.items())
            lines += [f"Share of the RMSE between identity and fresh oracle that is closed: {shares}.", ""]
        lines += comparison(results.rows, trained) + budgets(trained)
    if ABLATED.keys() & results.rows.keys():
        table = summarise(results, ["mappfn-pretrained", *ABLATED])
        document["tables"][f"{results.name}-ablations"] = {"rows": table}
        title = results.title.split(". ", 1)[-1]
        lines += [f"## Table 4. Ablations, {title}{tag}", "", *markdown(table), "", caption(table), ""]
    return lines


def missing_sections(root: Path, screens: list[Results], document: dict, tag: str) -> list[str]:
    """The paper's data sets, and any that could not be made, of which there is no result: why."""
    reasons = {name: f"no predictions in {root / 'samples' / name}" for name in PAPER}
    for note in sorted((root / "screens").glob("*/not-run.txt")):
        reasons[note.parent.name] = note.read_text().strip().removeprefix("error: ")
    for results in screens:
        reasons.pop(results.name, None)
        reasons.pop(results.paper, None)
    lines = []
    for name, reason in reasons.items():
        lines += [f"## {PAPER_TITLES.get(name, name)}{tag}", "", f"not run: {reason}", ""]
        document["tables"][name] = {"not_run": reason}
    return lines


def figure_section(root: Path, document: dict) -> list[str]:
    """Every figure with its caption, or the reason why there is none."""
    for file in sorted((root / "figures").glob("*.json")):
        document["figures"][file.stem] = json.loads(file.read_text())
    lines = ["## Figures", ""]
    for name, figure in sorted(document["figures"].items(), key=lambda item: item[1]["title"]):
        lines += [f"### {figure['title']}", ""]
        if "not_run" in figure:
            lines += [f"not run: {figure['not_run']}", ""]
        else:
            lines += [f"![{figure['title']}](figures/{name}.png)", "", figure["caption"], ""]
    return lines if document["figures"] else []


def evidence(rows: dict[str, list[dict]], row: str, rivals: tuple[str, ...], wanted: tuple[str, ...]) -> list[dict]:
    """By how much the row is better than the best of its rivals, in each metric."""
    found = []
    for metric in wanted:
        known = {}
        for rival in rivals:
            difference = advantage(rows, row, rival, metric)
            if difference is not None:
                known[rival] = difference
        if known:
            rival = min(known, key=known.get)  # the hardest one to beat
            mean, error, n = known[rival]
            what = f"{METRICS[metric].heading} against {title_of(rival).replace('– ', 'without ')}"
            found.append({"what": what, "difference": mean, "error": error, "n": n})
    return found


def claims(screens: list[Results], figures: dict) -> list[dict]:
    """Number, statement and evidence of each claim; `not_run` says why there is none."""
    found = []
    for number, statement, screen, row, rivals, wanted in CLAIMS:
        claim = {"number": number, "statement": statement, "evidence": [], "not_run": "no such rows to compare"}
        for results in screens:
            real = row in results.rows and results.rows[row][0]["metrics"]["log_expression"]
            if results.paper == screen or (screen == "real" and real):
                claim["statement"] += f" [{results.name}]"
                claim["evidence"] = evidence(results.rows, row, rivals, wanted)
                break
        found.append(claim)
    for number, statement, name in FIGURE_CLAIMS:
        figure = figures.get(name, {"not_run": "no such figure"})
        found.append({"number": number, "statement": statement, "evidence": figure.get("evidence", []),
                      "not_run": figure.get("not_run", "too few values in the figure")})
    for claim in found:
        if claim["evidence"]:
            del claim["not_run"]
    return found


def claim_section(document: dict, tag: str) -> list[str]:
    """What is claimed, and the evidence."""
    rows = []
    for claim in document["claims"]:
        parts = []
        for item in claim["evidence"]:
            error = "" if item["error"] is None else f" ± {item['error']:.3f}"
            parts.append(f"{item['what']} {item['difference']:+.3f}{error} (n = {item['n']})")
        text = "; ".join(parts) or f"not run: {claim['not_run']}"
        rows.append([str(claim["number"]), claim["statement"], text])
    return [f"## What the paper claims, and what was found{tag}", "",
            "Evidence: by how much the first is better than the best of the others, mean ± standard error of n paired "
            "differences (positive: better; MR: how much closer to 1).", "",
            *grid(["", "claim", "evidence"], rows), ""]


def environment() -> dict:
    """Versions, git revision and machine."""
    import jax  # imported late: everything else here needs no device

    packages = ("jax", "equinox", "diffrax", "optax", "ott-jax", "numpy", "scipy", "scanpy", "sergio-rs")
    return {"revision": scales.revision(), "python": platform.python_version(), "machine": platform.machine(),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "versions": {package: importlib.metadata.version(package) for package in packages}}


def stage_times(root: Path) -> dict[str, float]:
    """Seconds of each stage, as run_all.sh measured them; a stage that took several attempts is summed."""
    times: dict[str, float] = {}
    if (root / "times.csv").is_file():
        for line in (root / "times.csv").read_text().splitlines():
            stage, _, seconds = line.rpartition(",")  # a title may contain commas
            times[stage] = times.get(stage, 0) + float(seconds)
    return times


def listed(values: dict) -> str:
    """name value, name value."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def run_section(document: dict) -> list[str]:
    """With what, how long and with which settings all of it was run."""
    lines = ["## Run", "", f"Revision {document['revision']}, {document['device']}, Python {document['python']}, "
             f"{listed(document['versions'])}.", ""]
    times = document["seconds"]
    if times:
        rows = []
        for stage, seconds in (times | {"all": sum(times.values())}).items():
            rows.append([stage, f"{seconds:.0f}"])
        lines += [*grid(["stage", "seconds"], rows), ""]
    lines += ["Settings that this scale changes, as in `scales.py`:", ""]
    for section, values in document["settings"].items():
        if values:
            lines.append(f"- {section}: {listed(values)}")
    return lines


def main() -> None:
    """Make the report of a scale from whatever was run."""
    s = scales.parse(Settings, lambda s: ())
    root = s.out / s.scale
    title, tag = "# Report", ""
    if s.scale != "paper":
        title = f"# Report at {s.scale} scale: smaller than, and not comparable with, the paper's"
        tag = f" ({s.scale} scale, not the paper's)"
    document = {"scale": s.scale, "tables": {}, "figures": {}, "seconds": stage_times(root)} | environment()
    document["settings"] = {section: scales.at(s.scale, section) for section in scales.TABLE}
    screens = collect_all(root / "samples")
    lines = [title, "", *inputs_section(screens, document, tag)]
    for results in screens:
        lines += screen_sections(results, document, tag)
    lines += missing_sections(root, screens, document, tag)
    lines += figure_section(root, document)
    document["claims"] = claims(screens, document["figures"])
    lines += claim_section(document, tag) + run_section(document)
    text = "\n".join(lines) + "\n"
    for name, content in {"report.md": text, "report.json": json.dumps(document, indent=1)}.items():
        with scales.atomic(root / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    print(f"{text}written to {root / 'report.md'} and report.json")


if __name__ == "__main__":
    scales.run(main)
