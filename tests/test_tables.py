"""Claims about tables.py: what stands in a cell, beside which number of the paper, and what if nothing was run."""

import json
import os

import pytest

import scales
import tables
from metrics import METRICS
from scales import BadInput

HEAD = {"updates": 7, "micro_batch": 2, "accumulate": 3, "parameters": 1234, "seconds": 5.0}  # of a checkpoint


def result(folder, name: str, systems=("all",), conditions=None, meta=None, log_expression=False, **values):
    """A file of predictions, by name only, and its metrics, all 0.5 but for `values`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.npz").write_bytes(b"not looked at")
    numbers = dict.fromkeys(METRICS, 0.5) | {"auprc": None} | values
    numbers |= {"systems": systems, "conditions": conditions or {}, "log_expression": log_expression}
    row, split = name.split("-split")
    paper = folder.name if folder.name in tables.PAPER else None
    about = {"row": row, "split": int(split.split("-")[0]), "draw": 0, "seed": 0, "revision": "abc",
             "title": f"Title of {folder.name}", "paper": paper}
    (folder / f"{name}.json").write_text(json.dumps({"meta": about | (meta or {}), "metrics": numbers}))


@pytest.fixture
def linear(tmp_path):
    """out/smoke/samples/linear"""
    return tmp_path / "smoke" / "samples" / "linear"


@pytest.fixture
def main(tmp_path, monkeypatch):
    """Run main(); returns the text of report.md and the content of report.json."""
    def run(scale="smoke"):
        monkeypatch.setattr(scales, "parse", lambda *a: tables.Settings(scale, tmp_path))
        tables.main()
        folder = tmp_path / scale
        return (folder / "report.md").read_text(), json.loads((folder / "report.json").read_text())
    return run


def summary(folder) -> dict:
    """The only row of a screen."""
    results = tables.collect(folder)
    entry, = tables.summarise(results, results.rows)
    return entry


# ----------------------------------------------------------------------------------------------------------- one number


def test_mean_and_spread_by_hand(linear):
    """Three seeds with RMSE 0.1, 0.2 and 0.6 are 0.3 +- 0.2646 (n - 1); MMD is in thousandths; one budget for all."""
    for i, value in enumerate((0.1, 0.2, 0.6)):
        result(linear, f"mappfn-seed{i}-split0-draw0", rmse=value, mmd=value / 100, meta={"training": HEAD})
    row = summary(linear)
    assert (row["row"], row["title"], row["files"], row["over"]) == ("mappfn", "MapPFN", 3, "3 seeds")
    near = pytest.approx
    assert row["metrics"]["rmse"] == {"mean": near(0.3), "sd": near(0.07**0.5), "n": 3, "paper": (0.14, 0.00)}
    assert row["metrics"]["mmd"] == {"mean": near(3), "sd": near(10 * 0.07**0.5), "n": 3, "paper": (4.28, 0.06)}
    assert "auprc" not in row["metrics"]
    assert row["budget"] == {"updates": 7, "batch": "6 tasks", "parameters": 1234, "seconds": 5.0}


def test_one_file_of_several_systems_is_spread_over_them(linear):
    """Its conditions are averaged within each system; one that is undefined (None) is left out, not zero."""
    result(linear, "identity-split0-draw0", systems=["a", "a", "b", "b"],
           conditions=dict.fromkeys(METRICS, [1.0, 3.0, None, 6.0]))
    row = summary(linear)
    assert row["metrics"]["rmse"] == {"mean": 4.0, "sd": pytest.approx(8**0.5), "n": 2, "paper": (0.28, 0.01)}
    assert row["over"] == "2 held-out systems" and row["budget"] is None


@pytest.mark.parametrize("entry, text", [  # one value has no spread
    ({"mean": 13.7, "sd": 0.52, "paper": (13.69, 0.05)}, "13.7 ± 0.5 (paper: 13.69 ± 0.05)"),
    ({"mean": 0.1234, "sd": None, "paper": None}, "0.123"), ({"mean": -1e-9, "sd": None, "paper": None}, "0.000"),
    (None, "–"),
])
def test_what_a_cell_says(entry, text):
    """Ours, and the paper's where it has a number; a dash, never nothing, where there is no value."""
    assert tables.cell(entry) == text


@pytest.mark.parametrize("paper, row, metric, expected", [
    ("linear", "mappfn", "wasserstein", (13.69, 0.05)),
    ("linear", "observed", "magnitude_ratio", (1.00, 0.00)),
    ("melanoma", "mappfn-finetuned", "auprc", (0.38, 0.03)),
    ("melanoma", "mappfn-pretrained", "pds", (0.17, 0.01)),
    ("leukemia", "mappfn-random", "mmd", (24.47, 0.90)),
    ("leukemia", "mappfn-finetuned", "rmse", (0.15, 0.00)),
])
def test_numbers_of_the_paper(paper, row, metric, expected):
    """Tables 2 and 3 of the paper, read off again."""
    assert dict(zip(tables.PAPER_COLUMNS, tables.PAPER[paper][row]))[metric] == expected


def test_every_row_of_the_paper_is_a_row_here():
    """No number of the paper belongs to a row or a metric that has no name, and each is a pair."""
    assert set(tables.PAPER_COLUMNS) <= METRICS.keys() and tables.PAPER.keys() == tables.PAPER_TITLES.keys()
    for paper, rows in tables.PAPER.items():
        assert rows.keys() <= tables.ROWS.keys() | tables.ABLATED.keys()
        for row in rows.values():
            assert len(row) == (5 if paper == "linear" else 6) and all(len(pair) == 2 for pair in row)


def test_gap_closed_by_hand():
    """Identity 0.5 and oracle 0.1: an RMSE of 0.2 closes three quarters, one of 0.7 minus a half."""
    table = []
    for row, value in {"identity": 0.5, "oracle": 0.1, "mappfn": 0.2, "additive": 0.7, "observed": 0.05}.items():
        table.append({"row": row, "metrics": {"rmse": {"mean": value}}})
    assert tables.gap_closed(table) == {"mappfn": pytest.approx(0.75), "additive": pytest.approx(-0.5)}
    assert tables.gap_closed(table[:1] + table[2:]) == {}


def test_paired_advantage_by_hand(tmp_path):
    """Three splits, AUPRC better by 0.1, 0.2 and 0.3: 0.2 with standard error 0.1 / sqrt(3); an RMSE lower by as
    much is as good; of MR the distance to 1 counts. A split that one row lacks is left out."""
    for split, more in enumerate((0.1, 0.2, 0.3)):
        result(tmp_path, f"cpa-split{split}-draw0", auprc=0.5 + more, rmse=0.5 - more, magnitude_ratio=1 - more)
        result(tmp_path, f"additive-split{split}-draw0", auprc=0.5, rmse=0.5, magnitude_ratio=1 + 2 * more)
    result(tmp_path, "additive-split3-draw0", auprc=0.9, rmse=0.9)
    rows = tables.collect(tmp_path).rows
    for metric in ("auprc", "rmse", "magnitude_ratio"):
        mean, error, n = tables.advantage(rows, "cpa", "additive", metric)
        assert (mean, error, n) == (pytest.approx(0.2), pytest.approx(0.1 / 3**0.5), 3)
    assert tables.advantage(rows, "additive", "cpa", "auprc")[0] == pytest.approx(-0.2)
    assert tables.advantage(rows, "cpa", "mfm", "auprc") is None


def test_the_best_simple_row_is_the_one_to_beat(tmp_path):
    """Best is highest AUPRC and lowest RMSE; constant mean and references are no competitors."""
    for row, value in {"additive": 0.3, "target-only": 0.4, "constant-mean": 0.9, "observed": 0.95}.items():
        result(tmp_path, f"{row}-split0-draw0", auprc=value, rmse=value)
    rows = tables.collect(tmp_path).rows
    assert (tables.best_simple(rows, "auprc"), tables.best_simple(rows, "rmse")) == ("target-only", "additive")


def test_evidence_for_claims(main, linear, tmp_path):
    """A claim is held against the hardest rival, one of real cells on the first screen that has the row, one of a
    figure against what that figure says; without results it says why."""
    for split in range(3):
        for row, value in {"mappfn-seed0": 0.5, "condot-seed0": 0.9, "mfm-seed0": 0.2 + 0.01 * split}.items():
            result(linear, f"{row}-split{split}-draw0", rmse=value)
        for row, value in {"mappfn-pretrained": 0.5, "cpa": 0.3, "mfm": 0.4}.items():
            result(linear.parent / "own", f"{row}-split{split}-draw0", log_expression=True, auprc=value)
    item = {"what": "linear SCMs, 1 to 8: W2", "difference": 2.0, "error": None, "n": 3}
    (tmp_path / "smoke" / "figures").mkdir()
    for name, content in {"context": {"evidence": [item], "caption": "Caption."}, "tta": {"not_run": "no GPU"}}.items():
        (tmp_path / "smoke" / "figures" / f"{name}.json").write_text(json.dumps({"title": name} | content))
    text, document = main()
    found = {claim["number"]: claim for claim in document["claims"]}
    assert list(found) == list(range(1, 13))
    rmse = found[1]["evidence"][2]
    assert (rmse["what"], rmse["difference"], rmse["n"]) == ("RMSE against MFM", pytest.approx(-0.29), 3)
    assert "[own]" in found[6]["statement"] and "AUPRC against MFM +0.100 ± 0.000 (n = 3)" in text
    assert "linear SCMs, 1 to 8: W2 +2.000 (n = 3)" in text and found[9]["not_run"] == "no GPU"
    assert found[3]["not_run"] and found[12]["not_run"] == "no such figure"
    assert "![context](figures/context.png)\n\nCaption." in text and "### tta\n\nnot run: no GPU" in text


# ----------------------------------------------------------------------------------------------------------- the report


def test_no_cell_is_blank(main, linear):
    """Rows with different metrics share a table: each cell has a number or a dash; empty columns are left out."""
    result(linear, "mappfn-seed1-split0-draw0", variance_rmse=None, meta={"clipped_fraction": 0.125})
    result(linear, "identity-split0-draw0", pds=None)
    text, document = main()
    rows = text.split("## Table 2")[1].split("\n\n")[1].splitlines()
    assert len(rows) == 4 and len({line.count("|") for line in rows}) == 1 and "–" in rows[2] + rows[3]
    assert all(cell.strip() for line in rows[1:] for cell in line.strip("|").split("|"))
    assert "AUPRC" not in rows[0] and "variance RMSE ↓" in rows[0]
    assert "clipped to zero: MapPFN 12.5%" in text
    assert document["versions"].keys() >= {"jax", "equinox", "diffrax"} and document["revision"]


def test_nothing_vanishes(main, linear):
    """Screens, rows and metrics without a name here appear under their own, the paper's screens first; ablations
    have a table of their own; Table 1 says what each method is told."""
    result(linear, "identity-split0-draw0")
    own = linear.parent / "a-screen"
    result(own, "my-method-split0-draw0", meta={"conditions_on": ["treatment", "system"]})
    for row in ("mappfn-pretrained", "mappfn-unpaired"):
        result(own, f"{row}-split0-draw0", meta={"training": HEAD, "conditions_on": ["treatment", "controls"]})
    text, document = main()
    assert list(document["tables"])[1:4] == ["linear", "a-screen", "a-screen-ablations"]
    assert [row["row"] for row in document["tables"]["a-screen"]["rows"]] == ["mappfn-pretrained", "my-method"]
    assert "## Title of a-screen (smoke" in text and "\n| my-method | " in text and "| – paired prior | " in text
    inputs = text.split("## Table 1")[1].split("\n\n")[1].splitlines()
    assert inputs[2:] == ["| MapPFN | yes | no | yes | no |", "| my-method | yes | yes | no | no |"]
    assert "| MapPFN (pre-trained) | 7 | 6 tasks | 1,234 | 5 |" in text


@pytest.mark.parametrize("scale", ["smoke", "laptop", "paper"])
def test_small_scales_say_so(main, tmp_path, scale):
    """Title and headings of tables name the scale and that it is not the paper's; at paper scale there is no excuse."""
    result(tmp_path / scale / "samples" / "linear", "identity-split0-draw0")
    text, _ = main(scale)
    tables_only = [line for line in text.splitlines() if line.startswith("## Table")]
    assert len(tables_only) == 3 and "## Table 2. Linear SCMs" in tables_only[0]
    small = scale != "paper"
    assert all((f"({scale} scale, not the paper's)" in line) == small for line in tables_only)
    assert (f"at {scale} scale" in text.splitlines()[0] and "not comparable" in text) == small


def test_what_was_not_run_says_why(main, tmp_path):
    """The reason that the data stage left is printed, or else where predictions are missing."""
    for name in ("melanoma", "replicates"):
        note = tmp_path / "smoke" / "screens" / name / "not-run.txt"
        note.parent.mkdir(parents=True)
        note.write_text(f"error: no {name}\n")
    text, document = main()
    assert "## replicates (smoke scale, not the paper's)\n\nnot run: no replicates" in text
    assert f"not run: no predictions in {tmp_path / 'smoke' / 'samples' / 'leukemia'}" in text
    assert document["tables"]["melanoma"] == {"not_run": "no melanoma"}


@pytest.mark.parametrize("problem, message", [
    ("missing", "identity-split0-draw0.json: missing, .*; make it with python metrics.py"),
    ("older", "identity-split0-draw0.json: missing, older than .*"),
    ("other data", "oracle-split0-draw0.npz predicts other data"),
])
def test_stale_results_are_refused(main, linear, problem, message):
    """Predictions without metrics, or newer than they, or of a screen that was made anew, are named, and the report of
    an earlier run stays as it was."""
    result(linear, "identity-split0-draw0", meta={"fingerprint": 1})
    text, _ = main()
    file = linear / "identity-split0-draw0.json"
    if problem == "missing":
        file.unlink()
    elif problem == "older":
        os.utime(file, ns=(0, 0))
    else:
        result(linear, "oracle-split0-draw0", meta={"fingerprint": 2})
    with pytest.raises(BadInput, match=message):
        main()
    assert (linear.parents[1] / "report.md").read_text() == text


def test_stage_times_are_summed(main, tmp_path):
    """A stage that took two attempts counts both; a title may contain commas."""
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / "times.csv").write_text("prior,10\ntrain: linear SCMs, seed 0,5\nprior,2\n")
    text, document = main()
    assert document["seconds"] == {"prior": 12, "train: linear SCMs, seed 0": 5}
    assert "| prior | 12 |" in text and "| all | 17 |" in text
