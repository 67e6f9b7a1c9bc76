"""Stage 8 of 8, the report: every table with the paper's value beside ours, every figure, and each claim's evidence.

Paper: section 6, Tables 1 to 4. Reads `samples/<screen>/*.json` (metrics.py), `figures/*.json` (figures.py) and
`times.csv` and `screens/<name>/not-run.txt` (run_all.sh) below out/<scale>, writes `report.md` and `report.json` there.
What has no name here appears under its own; what was not run says why; no cell is typed in.

    python tables.py --scale smoke|laptop|paper     seconds
Departures that the tables inherit: D10, D28, D32, D33.

    row      a line of a table: a method, its seeds taken together
    file     metrics of one row for one split, draw of cells and seed: `meta` and `metrics`
    item     a comparison of two rows in one metric, as judge.py makes it
"""

import importlib.metadata
import json
import platform
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import judge
import scales
from claims import CLAIMS, FIGURE_CLAIMS, SIMPLE, Claim, steps
from metrics import METRICS, prediction_files, up_to_date
from scales import BadInput

# The paper's numbers: data set -> row -> mean and standard deviation for each of PAPER_COLUMNS.
PAPER = json.loads((Path(__file__).parent / "results" / "paper.json").read_text())
PAPER_COLUMNS, SOURCE = tuple(PAPER.pop("columns")), PAPER.pop("source")
PAPER_TITLES = {"linear": "Table 2. Linear SCMs", "leukemia": "Table 3. Leukemia (Papalexi et al., 2021)",
                "melanoma": "Table 3. Melanoma (Frangieh et al., 2021)"}
ROWS = {  # in the order of the tables
    "cpa": "CPA", "condot": "CondOT", "mfm": "MFM", "cellflow": "CellFlow", "state": "STATE",
    "mappfn": "MapPFN", "mappfn-random": "MapPFN (random init)", "mappfn-pretrained": "MapPFN (pre-trained)",
    "mappfn-finetuned": "MapPFN (fine-tuned)", "recommended": "Recommended (exchangeable.py, prior panel)",
    "mappfn-unpaired": "– paired prior", "mappfn-no-context": "– interventional context",
    "identity": "Identity", "observed": "Observed", "oracle": "Fresh oracle",
    "target-only": "Target only", "system-mean": "System mean effect", "additive": "Additive",
    "target-gene": "Target gene", "bilinear-ridge": "Bilinear ridge", "constant-mean": "Constant mean",
    "chosen": "Chosen on training conditions",
    "known-graph": "Known graph, least squares", "known-order": "Known order, ridge",
}
# Of a row, what is predicted when its context tells nothing (sample.py): not a row, but the other side of its gain.
UNINFORMED = {"controls": "over control cells as context", "exchanged": "over exchanged treatments"}
ABLATED = ("mappfn-unpaired", "mappfn-no-context")  # Table 4 only
JUDGED = ("Differences: positive is better (MR: closer to 1). ± is the standard error, brackets: 95% interval, before "
          "correction; judge.py says what they allow for: conditions, overlapping splits (Nadeau and Bengio, 2003), "
          "trainings. Better, worse: p < 0.05 after Holm's correction over the metrics of a claim or row. A trained "
          "row with fewer than three trainings is undecided; the later ones use what was chosen for the first.")


@dataclass(frozen=True)
class Settings:
    """Make the report of one scale from whatever was run."""
    scale: str = "laptop"  # column of the table in scales.py
    out: Path = Path("out")  # everything is below out/<scale>
    beyond: bool = False  # of beyond.sh: its comparisons take the place of the paper's claims and figures


class Results(NamedTuple):
    """What was found of one screen."""
    name: str                     # its folder below samples/
    title: str
    paper: str | None             # which of the paper's data sets it is
    rows: dict[str, list[dict]]   # row -> its files
    penalties: dict               # (row, metric) -> judge.Row, as far as they were asked for


def collect(folder: Path) -> Results:
    """The results of one screen. Raises BadInput if a file has no metrics, or if its screen was made anew since."""
    rows, made = {}, {}
    for predictions in prediction_files((folder,)):
        path = predictions.with_suffix(".json")
        if not up_to_date(predictions):
            raise BadInput(f"{path}: missing, incomplete or of another {predictions.name}; make it with "
                           f"python metrics.py {folder}")
        file = json.loads(path.read_text())
        meta = file["meta"]
        rows.setdefault(re.sub(r"-seed\d+(?=~|$)", "", meta["row"]), []).append(file)
        if made.setdefault(meta["split"], meta.get("fingerprint")) != meta.get("fingerprint"):
            raise BadInput(f"{predictions} predicts other data than the files before it; the screen was made anew: "
                           "delete what was predicted from the old one")
    title, paper = meta.get("title", folder.name), meta.get("paper")
    return Results(folder.name, PAPER_TITLES.get(paper, title), paper, rows, {})


def in_order(names, known) -> list[str]:
    """Those that are known here first, in their order, then the others by name."""
    return [name for name in known if name in names] + sorted(set(names) - set(known))


def spread(files: list[dict], metric: str) -> list[float]:
    """What a cell shows mean and sd of: a value for each file or, of a single file, for each of its systems (AUPRC is
    one number of all of them). What is not defined is left out."""
    pairs = [(i, file["metrics"][metric]) for i, file in enumerate(files)]
    numbers = files[0]["metrics"]
    if len(files) == 1 and metric in numbers["conditions"] and metric != "auprc":
        pairs = zip(numbers["systems"], numbers["conditions"][metric])
    return list(judge.averages(pair for pair in pairs if pair[1] is not None).values())


def spread_over(files: list[dict]) -> str:
    """In words, what those values are of."""
    if len(files) == 1:
        return f"{len(set(files[0]['metrics']['systems']))} held-out systems"
    parts = []
    for key, name in {"split": "splits", "draw": "draws of cells", "trained_seed": "seeds"}.items():
        count = len({file["meta"].get(key) for file in files})
        if count > 1:
            parts.append(f"{count} {name}")
    return " x ".join(parts)


def penalty(metric: str, value: float) -> float:
    """A number that is smaller the better the value is, in the units of the tables."""
    return METRICS[metric].factor * {"lower": value, "higher": -value, "one": abs(value - 1)}[METRICS[metric].better]


def evidence(results: Results, row: str, rivals, wanted) -> dict[str, list[dict]]:
    """For each metric, the row's comparisons with those of its rivals that there are."""
    found: dict[str, list[dict]] = {}
    for metric in wanted:
        for name in (row, *rivals):
            if name in results.rows and (name, metric) not in results.penalties:
                results.penalties[name, metric] = judge.gather(results.rows[name], metric, partial(penalty, metric))
        for rival in rivals:
            rows = results.penalties.get((row, metric)), results.penalties.get((rival, metric))
            item = judge.compare(*rows) if None not in rows else None
            if item:
                names = {"metric": metric, "row": row, "rival": rival}
                what = f"{METRICS[metric].heading} against {ROWS.get(rival, rival)}".replace("– ", "without ")
                found.setdefault(metric, []).append({"what": what} | names | item)
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
    """What a trained row was given, the seconds of a fit (mean), whether its validation loss had stopped improving by
    then, and the share clipped to zero; None for other rows."""
    metas = [file["meta"] for file in files]
    if "training" in metas[0]:  # MapPFN: the header of its checkpoint
        fits = [meta["training"] for meta in metas]
        updates, seconds = [fit["update"] for fit in fits], [fit["seconds"] for fit in fits]
        size = f"{fits[0]['micro_batch'] * fits[0]['accumulate']} tasks"
    elif "options" in metas[0]:
        fits = [meta | meta["options"] for meta in metas]
        updates, seconds = [meta["updates"] for meta in metas], [meta["fit_seconds"] for meta in metas]
        size = f"{fits[0]['batch']} cells"
    else:
        return None
    stopped = [fit["stopped"] for fit in fits if fit.get("stopped") is not None]
    clipped = np.mean([meta.get("clipped_fraction", 0) for meta in metas])
    return {"updates": round(float(np.mean(updates))), "of": size, "parameters": fits[0]["parameters"],
            "seconds a fit": round(float(np.mean(seconds))),
            "had stopped improving": f"{sum(stopped)} of {len(stopped)}" if stopped else "not asked",
            "negative, clipped": f"{clipped:.1%}"}


def gap_closed(table: list[dict], power: int = 1) -> dict[str, float]:
    """Share of the RMSE between identity (0) and fresh oracle (1) that a row closes; beyond both it leaves [0, 1].
    Squares (`power` 2) add up: what is right of half of all variables, all else as of identity, is half."""
    rmse = {entry["row"]: entry["metrics"]["rmse"]["mean"] ** power for entry in table}
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
    """`what: outcome, +difference [95% interval], n = number of units; ...`, as far as there are these."""
    parts = []
    for item in items:
        text = f"{item['what']}: {item['outcome']}, {item['difference']:+.3f}"
        if item.get("low") is not None:
            text += f" [{item['low']:+.3f}, {item['high']:+.3f}]"
        if item.get("n"):
            text += f", n = {item['n']} {item['units']}"
        parts.append(text)
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
            if "conditions_on" in files[0]["meta"] and "~" not in row:
                method = "mappfn" if row.startswith("mappfn") else row.removesuffix("-identity")
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
    squares = gap_closed(table, power=2)
    document["tables"][name] = {"rows": table, "rmse_gap_closed": gap, "squared_rmse_gap_closed": squares}
    over, budgets, compared = {}, [], []
    for entry in table:
        over.setdefault(entry["over"], []).append(entry["title"])
        if entry["budget"]:
            found = evidence(results, entry["row"], SIMPLE, METRICS)
            entry["advantage"] = judge.decide([judge.hardest(items) for items in found.values()])
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
        shares = ", ".join(f"{ROWS.get(row, row)} {share:.0%} ({squares[row]:.0%})" for row, share in gap.items())
        lines += [f"Share of the RMSE between identity and fresh oracle that is closed (of its square): {shares}.", ""]
    if "chosen" in rows:
        lines += [f"Chosen: {', '.join(f'{row} in split {split}' for split, row in choices(results).items())}.", ""]
    lines += gain_lines(results, rows, document)
    if budgets:
        headings = ["better than the best simple row by", *(heading(metric) for metric in METRICS)]
        lines += [*grid(headings, compared), "", *grid(given, budgets), ""]
    return lines


def add_chosen(results: Results, training: Results) -> None:
    """One row more: in each split, the row that has the least RMSE on its training conditions, each predicted from the
    others (sample.py --training). No test condition of that split has a say."""
    files = []
    for split in sorted({file["meta"]["split"] for files in training.rows.values() for file in files}):
        errors = {}
        for row in sorted(training.rows.keys() & results.rows.keys()):
            own = [file["metrics"]["rmse"] for file in training.rows[row] if file["meta"]["split"] == split]
            errors[row] = float(np.mean(own)) if own else np.inf
        best = min(errors, key=errors.get)
        files += [file for file in results.rows[best] if file["meta"]["split"] == split]
    results.rows["chosen"] = files


def choices(results: Results) -> dict[int, str]:
    """Split -> the row that was chosen there."""
    chosen = {}
    for file in results.rows["chosen"]:
        chosen[file["meta"]["split"]] = re.sub(r"-seed\d+$", "", file["meta"]["row"])
    return chosen


def gain_lines(results: Results, rows: list[str], document: dict) -> list[str]:
    """What a row's metrics owe to its context: by how much they are better than those of the same networks with control
    cells in the place of all experiments, and with the treatments of the experiments exchanged (sample.py)."""
    lines, found = [], {}
    for row in rows:
        for how, words in UNINFORMED.items():
            if f"{row}~{how}" not in results.rows:
                continue
            without = results.rows[f"{row}~{how}"]
            drawn = {file["meta"]["draw"] for file in without}  # only the first draw of cells has such a file
            informed = [file for file in results.rows[row] if file["meta"]["draw"] in drawn]
            items = {}
            for metric in METRICS:
                both = [judge.gather(files, metric, partial(penalty, metric)) for files in (informed, without)]
                item = judge.compare_uses(*both)
                if item and np.isfinite(item["difference"]):
                    items[metric] = item
            found[f"{row}~{how}"] = items
            cells = dict.fromkeys(METRICS, "–")
            for metric, item in items.items():
                error = "" if item["error"] is None else f" ± {item['error']:.3f}"
                cells[metric] = f"{item['difference']:+.3f}{error}"
            lines.append([f"{ROWS.get(row, row)}, {words}", *cells.values()])
    if not lines:
        return []
    document["context_gain"] = document.get("context_gain", {}) | {results.name: found}
    return [*grid(["context gain (± standard error)", *(heading(metric) for metric in METRICS)], lines), ""]


def advantages(items: list[dict]) -> list[str]:
    """The cells of a trained row: in each metric, its advantage over the simple row that is named; what is not by
    chance says so."""
    cells = dict.fromkeys(METRICS, "–")
    for item in items:
        error = "" if item["error"] is None else f" ± {item['error']:.3f}"
        outcome = f", {item['outcome']}" * (item["outcome"] in ("better", "worse"))
        cells[item["metric"]] = f"{item['difference']:+.3f}{error} ({ROWS[item['rival']]}{outcome})"
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


def judged(claim: Claim, screens: list[Results], document: dict) -> list[dict]:
    """What came of a claim on each screen that it is about: outcome, which names rows that are not there, and items."""
    found, waiting = [], set(PAPER) & claim.wanted.keys()
    if "real" in claim.wanted:
        waiting |= PAPER.keys() - {"linear"}
    for results in screens:
        margin = claim.margin.get(results.paper, max(claim.margin.values(), default=0.0))
        real = any(files[0]["metrics"]["log_expression"] for files in results.rows.values())
        wanted = claim.wanted.get(results.paper) or (claim.wanted.get("real", ()) if real else ())
        items, absent = [], []
        for row, rivals in claim.pairs:
            absent += [name for name in (row, *rivals) if name not in results.rows]
            of_row = evidence(results, row, rivals, wanted)
            for comparisons in of_row.values():
                items.append(judge.hardest(comparisons, margin))
                if len(claim.pairs) > 1:
                    items[-1]["what"] = f"{ROWS.get(row, row)}, {items[-1]['what']}"
        if items:
            waiting.discard(results.paper)
            outcome = judge.verdict(judge.decide(items, margin if claim.margin else None))
            if absent:
                outcome += f" (without {', '.join(ROWS.get(row, row) for row in absent)}, not run)"
            found.append({"screen": results.name, "outcome": outcome, "items": items})
    for name in sorted(waiting):
        reason = document["tables"].get(name, {}).get("not_run", "no such rows to compare")
        found.append({"screen": name, "outcome": f"not run: {reason}", "items": []})
    return found


def judged_by_figure(figure: dict) -> list[dict]:
    """What came of a claim on each screen in a figure, whose items are decided already."""
    by_screen: dict[str, list[dict]] = {}
    for item in figure.get("evidence", []):
        by_screen.setdefault(item["screen"], []).append(item)
    if not by_screen:
        reason = figure.get("not_run", "no such figure, or too few values in it")
        return [{"screen": "all", "outcome": f"not run: {reason}", "items": []}]
    found = []
    for screen, items in by_screen.items():
        found.append({"screen": screen, "outcome": judge.verdict(items), "items": items})
    return found


def claim_section(screens: list[Results], document: dict, beyond: bool = False) -> list[str]:
    """What the paper says, or what beyond.sh asks, and what came of it on each screen."""
    claims = []
    for claim in steps() if beyond else CLAIMS:
        found = judged(claim, screens, document)
        if beyond:  # what was not asked for is not missing
            found = [of_screen for of_screen in found if of_screen["items"]]
        if found:
            claims.append((claim.says, claim.asks, found))
    for name, (says, asks) in {} if beyond else FIGURE_CLAIMS.items():
        claims.append((says, asks, judged_by_figure(document["figures"].get(name, {}))))
    lines = [f"## What {'is asked' if beyond else 'the paper claims'}, and what was found", "", JUDGED, ""]
    for number, (says, asks, found) in enumerate(claims, 1):
        document["claims"].append({"number": number, "paper": says, "asked": asks, "judged": found})
        rows = []
        for of_screen in found:
            rows.append([of_screen["screen"], of_screen["outcome"], said(of_screen["items"]) or "–"])
        lines += [f"### {number}. \"{says}\"", "", f"{asks}:", "", *grid(["screen", "outcome", "evidence"], rows), ""]
    return lines


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
    by_name = {results.name: results for results in screens}
    for results in screens:
        if f"{results.name}-training" in by_name:
            add_chosen(results, by_name[f"{results.name}-training"])
    lines = ["# Report", "", f"Numbers of the paper: {SOURCE}.", "", *inputs_section(screens, document)]
    for results in screens:
        rows = in_order({row for row in results.rows.keys() - ABLATED if "~" not in row}, ROWS)
        if rows:
            lines += table_section(results, rows, results.name, results.title, document)
        if results.rows.keys() & ABLATED:
            title = "Table 4. Ablations, " + results.title.split(". ", 1)[-1]
            rows = in_order(results.rows.keys() & {"mappfn-pretrained", *ABLATED}, ROWS)
            lines += table_section(results, rows, f"{results.name}-ablations", title, document)
    if not s.beyond:
        lines += missing_sections(root, screens, document) + figure_section(root, document)
    lines += claim_section(screens, document, s.beyond) + run_section(root, document)
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
