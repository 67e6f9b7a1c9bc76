"""Claims about tables.py: what stands in a cell, beside which number of the paper, and what if nothing was run."""

import json
import os

import pytest

import scales
import tables
from metrics import METRICS
from scales import BadInput

HEAD = {"updates": 7, "micro_batch": 2, "accumulate": 3, "parameters": 1234, "seconds": 5.0}  # of a checkpoint
near = pytest.approx


def result(folder, row, split=0, systems=("all",), conditions=None, meta=None, log_expression=False, **values):
    """A file of predictions, by name only, and its metrics, all 0.5 but for `values`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{row}-split{split}-draw0.json"
    file.with_suffix(".npz").write_bytes(b"not looked at")
    numbers = dict.fromkeys(METRICS, 0.5) | {"auprc": None} | values
    numbers |= {"systems": systems, "conditions": conditions or {}, "log_expression": log_expression}
    about = {"row": row, "split": split, "draw": 0, "revision": "abc", "title": f"Title of {folder.name}"}
    if folder.name in tables.PAPER:
        about["paper"] = folder.name
    file.write_text(json.dumps({"meta": about | (meta or {}), "metrics": numbers}))


@pytest.fixture
def linear(tmp_path):
    return tmp_path / "smoke" / "samples" / "linear"


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Run main(); returns the text of report.md and the content of report.json."""
    def run(scale="smoke"):
        monkeypatch.setattr(scales, "parse", lambda *a: tables.Settings(scale, tmp_path))
        tables.main()
        text = (tmp_path / scale / "report.md").read_text()
        return text, json.loads((tmp_path / scale / "report.json").read_text())
    return run


def test_mean_and_spread(linear):
    """Three seeds with RMSE 0.1, 0.2 and 0.6 are 0.3 +- 0.2646 (n - 1), one row with one budget; MMD is in
    thousandths; beside them stand the paper's numbers."""
    for i, value in enumerate((0.1, 0.2, 0.6)):
        meta = {"training": HEAD, "clipped_fraction": 0.125}
        result(linear, f"mappfn-seed{i}", rmse=value, mmd=value / 100, meta=meta)
    row, = tables.summarise(tables.collect(linear), ["mappfn"])
    assert (row["row"], row["title"], row["files"]) == ("mappfn", "MapPFN", 3)
    assert row["over"].endswith("3 seeds") and "auprc" not in row["metrics"]
    for metric, factor, paper in (("rmse", 1, [0.14, 0.00]), ("mmd", 10, [4.28, 0.06])):
        expected = {"mean": near(0.3 * factor), "sd": near(factor * 0.07**0.5), "n": 3, "paper": paper}
        assert row["metrics"][metric] == expected
    assert list(row["budget"].values()) == [7, "6 tasks", 1234, 5, "12.5%"]


def test_one_file_of_several_systems_is_spread_over_them(linear):
    """Its conditions are averaged within each system; an undefined one (None) is left out, not zero."""
    result(linear, "identity", systems=["a", "a", "b", "b"], conditions={"rmse": [1.0, 3.0, None, 6.0]})
    row, = tables.summarise(tables.collect(linear), ["identity"])
    assert row["metrics"]["rmse"] == {"mean": 4.0, "sd": near(8**0.5), "n": 2, "paper": [0.28, 0.01]}
    assert row["over"] == "2 held-out systems" and row["budget"] is None


def test_what_a_cell_says():
    """Three digits, the spread where there is one, and the paper's numbers where it has any."""
    entry = {"mean": 13.7, "sd": 0.52, "paper": [13.69, 0.05]}
    assert tables.cell(entry) == "13.7 ± 0.5 (paper: 13.69 ± 0.05)"
    for mean, text in {1.234: "1.23", 0.1234: "0.123", -1e-9: "0.000"}.items():
        assert tables.cell({"mean": mean, "sd": None, "paper": None}) == text


def test_numbers_of_the_paper():
    """Rows of Tables 2 and 3, read off again; every number there is of a row and a metric known here."""
    for paper, row, expected in (("linear", "mappfn", [13.69, 4.28, 0.14, 0.01, 0.99]),
                                 ("melanoma", "mappfn-finetuned", [21.38, 7.84, 0.10, 0.03, 0.99, 0.38]),
                                 ("leukemia", "mappfn-random", [14.95, 24.47, 0.19, 0.54, 0.82, 0.16])):
        assert [mean for mean, _ in tables.PAPER[paper][row]] == expected
        assert tables.PAPER[paper].keys() <= tables.ROWS.keys()
    assert set(tables.PAPER_COLUMNS) <= METRICS.keys() and tables.PAPER.keys() == tables.PAPER_TITLES.keys()


def test_gap_closed():
    """Identity 0.5 and oracle 0.1: an RMSE of 0.2 closes three quarters, one of 0.7 minus a half."""
    table = []
    for row, value in {"identity": 0.5, "oracle": 0.1, "mappfn": 0.2, "additive": 0.7}.items():
        table.append({"row": row, "metrics": {"rmse": {"mean": value}}})
    assert tables.gap_closed(table) == {"mappfn": near(0.75), "additive": near(-0.5)}
    assert tables.gap_closed(table[:1] + table[2:]) == {}


@pytest.mark.parametrize("metric", ["auprc", "rmse", "magnitude_ratio"])
def test_paired_advantage(tmp_path, metric):
    """Better by 0.1, 0.2 and 0.3 is 0.2 with standard error 0.1 / sqrt(3): AUPRC higher, RMSE lower, MR closer to 1.
    A split that one row lacks is left out. The rival is the simple row that is hardest to beat, not a reference."""
    for split, more in enumerate((0.1, 0.2, 0.3)):
        result(tmp_path, "cpa", split, auprc=0.5 + more, rmse=0.5 - more, magnitude_ratio=1 - more)
        result(tmp_path, "additive", split, auprc=0.5, rmse=0.5, magnitude_ratio=1 + 2 * more)
        result(tmp_path, "identity", split, auprc=0.1, rmse=9, magnitude_ratio=9)
        result(tmp_path, "observed", split, auprc=0.9, rmse=0, magnitude_ratio=1)
    result(tmp_path, "additive", 3, auprc=0.9, rmse=0.9)
    rows = tables.collect(tmp_path).rows
    item, = tables.evidence(rows, "cpa", tables.SIMPLE, [metric])
    assert item.pop("what") == f"{METRICS[metric].heading} against Additive"
    assert item == {"metric": metric, "difference": near(0.2), "error": near(0.1 / 3**0.5), "n": 3}
    assert tables.advantage(rows, "additive", "cpa", metric)["difference"] == near(-0.2)
    assert tables.advantage(rows, "cpa", "mfm", metric) is None


def test_evidence_for_claims(report, linear, tmp_path):
    """A claim is held against the hardest rival, one of real cells on the first screen that has the row, one of a
    figure against what that figure says; without results it says why."""
    for split in range(3):
        for row, value in {"mappfn-seed0": 0.5, "condot-seed0": 0.9, "mfm-seed0": 0.2}.items():
            result(linear, row, split, rmse=value)
        for row, value in {"mappfn-pretrained": 0.5, "cpa": 0.3, "mfm": 0.4}.items():
            result(linear.parent / "own", row, split, log_expression=True, auprc=value)
    item = {"what": "1 to 8: W2", "difference": 2.0, "error": None, "n": 3}
    folder = tmp_path / "smoke" / "figures"
    folder.mkdir()
    (folder / "context.json").write_text(json.dumps({"title": "5a", "evidence": [item], "caption": "Caption."}))
    (folder / "tta.json").write_text('{"title": "tta", "not_run": "no GPU"}')
    text, document = report()
    found = {claim["number"]: claim for claim in document["claims"]}
    assert len(found) == 12
    assert "RMSE against MFM -0.300 ± 0.000 (n = 3)" in found[1]["found"]
    assert found[6]["evidence"][0]["difference"] == near(0.1) and "[own]" in found[6]["statement"]
    assert found[10]["found"] == "1 to 8: W2 +2.000 (n = 3)" and found[9]["found"] == "not run: no GPU"
    for claim in document["claims"]:
        assert claim["evidence"] or claim["found"].startswith("not run: ")
        assert f"| {claim['number']} | {claim['statement']} | {claim['found']} |" in text
    assert "![5a](figures/context.png)\n\nCaption." in text and "### tta\n\nnot run: no GPU" in text


def test_nothing_vanishes(report, linear):
    """Screens, rows and inputs without a name here appear under their own, the paper's screens first; ablations have
    a table of their own; Table 1 says what each method is told. No cell is blank, no column without any value."""
    result(linear, "identity")
    own = linear.parent / "a-screen"
    result(own, "my-method", meta={"conditions_on": ["treatment", "dose"]})
    for row in ("mappfn-pretrained", "mappfn-unpaired"):
        result(own, row, meta={"training": HEAD, "conditions_on": ["treatment", "controls"]})
    result(linear, "mappfn", pds=None, variance_rmse=None)
    text, document = report()
    headings, _, *rows = text.split("## Table 2")[1].split("\n\n")[1].splitlines()
    assert "AUPRC" not in headings and "variance RMSE ↓" in headings and rows[0].count(" – |") == 2
    assert list(document["tables"])[1:4] == ["linear", "a-screen", "a-screen-ablations"]
    for line in ("## Title of a-screen (smoke", "| – paired prior | 0.5", "| my-method | 0.5",
                 "| MapPFN | treatment, controls |\n| my-method | treatment, dose |",
                 "| MapPFN (pre-trained) | 7 | 6 tasks | 1234 | 5 | 0.0% |"):
        assert "\n" + line in text


@pytest.mark.parametrize("scale", ["smoke", "laptop", "paper"])
def test_report_of_next_to_nothing(report, tmp_path, scale):
    """What was not run says why: the reason that the data stage left, or where predictions are missing. Every heading
    says that a small scale is not the paper's. A stage that took two attempts counts both; commas may be in its title.
    """
    for name in ("melanoma", "replicates"):
        note = tmp_path / scale / "screens" / name / "not-run.txt"
        note.parent.mkdir(parents=True)
        note.write_text(f"error: no {name}\n")
    (tmp_path / scale / "times.csv").write_text("prior,10\ntrain: SCMs, seed 0,5\nprior,2\n")
    text, document = report(scale)
    assert f"not run: no predictions in {tmp_path / scale / 'samples' / 'leukemia'}" in text
    assert "\n## replicates" in text and "\nnot run: no replicates\n" in text
    assert document["tables"]["melanoma"] == {"not_run": "no melanoma"}
    for line in text.splitlines():
        if line.startswith(("# ", "## ")):
            assert (f"({scale} scale, not comparable" in line) == (scale != "paper")
    assert document["seconds"] == {"prior": 12, "train: SCMs, seed 0": 5, "all": 17}
    assert "| all | 17 |" in text and f"jax {document['versions']['jax']}" in text


@pytest.mark.parametrize("problem, message", [
    ("missing", "identity-split0-draw0.json: missing, .*; make it with python metrics.py"),
    ("older", "identity-split0-draw0.json: missing, older than .*"),
    ("other data", "oracle-split0-draw0.npz predicts other data"),
])
def test_stale_results_are_refused(report, linear, problem, message):
    """Predictions without metrics, newer than they, or of a screen made anew are named; an earlier report stays."""
    result(linear, "identity", meta={"fingerprint": 1})
    text, _ = report()
    if problem == "missing":
        (linear / "identity-split0-draw0.json").unlink()
    elif problem == "older":
        os.utime(linear / "identity-split0-draw0.json", ns=(0, 0))
    else:
        result(linear, "oracle", meta={"fingerprint": 2})
    with pytest.raises(BadInput, match=message):
        report()
    assert (linear.parents[1] / "report.md").read_text() == text
