"""Claims about tables.py: what stands in a cell, beside which number of the paper, and what if nothing was run."""

import json
import os

import numpy as np
import pytest

import metrics
import scales
import tables
from scales import BadInput

HEAD = {"updates": 7, "micro_batch": 2, "accumulate": 3, "parameters": 1234, "seconds": 5.0}  # of a checkpoint
METRICS = ("wasserstein", "mmd", "rmse", "pds", "magnitude_ratio", "variance_rmse")


def result(folder, name: str, contexts=("all",), conditions=None, meta=None, **values):
    """A file of predictions, by name only, and its metrics, all 0.5 but for `values`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.npz").write_bytes(b"not looked at")
    content = {"auprc": None, "contexts": list(contexts), "conditions": conditions or {}}
    content |= dict.fromkeys(METRICS, 0.5) | values
    split = int(name.split("-split")[1].split("-")[0])
    about = {"method": name.split("-split")[0], "split": split, "seed": 0, "seconds": 1.5,
             "revision": "abc"} | (meta or {})
    (folder / f"{name}.json").write_text(json.dumps({"meta": about, "metrics": content}))


@pytest.fixture
def linear(tmp_path):
    """out/smoke/samples/linear"""
    return tmp_path / "smoke" / "samples" / "linear"


@pytest.fixture
def main(tmp_path, monkeypatch):
    """Run main(); returns the text of report.md and the content of report.json."""
    def run(scale="smoke", **changed):
        monkeypatch.setattr(scales, "parse", lambda *a: tables.Settings(scale=scale, out=tmp_path, **changed))
        tables.main()
        folder = tmp_path / scale
        return (folder / "report.md").read_text(), json.loads((folder / "report.json").read_text())
    return run


# ----------------------------------------------------------------------------------------------------------- one number


def test_mean_and_spread_by_hand(linear):
    """Three seeds with RMSE 0.1, 0.2 and 0.6 are 0.3 +- 0.2646 (n - 1); MMD is in thousandths."""
    for i, value in enumerate((0.1, 0.2, 0.6)):
        result(linear, f"mappfn-seed{i}-split0-draw0", rmse=value, mmd=value / 100,
               meta={"training": HEAD | {"seed": i}})
    row, = tables.summarise(tables.collect(linear), "linear")
    assert (row["row"], row["files"], row["seeds"], row["seconds"]) == ("mappfn", 3, [0, 1, 2], 4.5)
    rmse, mmd = row["metrics"]["rmse"], row["metrics"]["mmd"]
    assert (rmse["mean"], rmse["sd"], rmse["n"]) == (pytest.approx(0.3), pytest.approx(0.07**0.5), 3)
    assert (mmd["mean"], mmd["sd"]) == (pytest.approx(3), pytest.approx(10 * 0.07**0.5))
    assert rmse["paper"] == (0.14, 0.00) and mmd["paper"] == (4.28, 0.06)
    assert "auprc" not in row["metrics"]


def test_one_file_of_several_graphs_is_spread_over_graphs(linear):
    """Its conditions are averaged within each graph; one that is undefined (None) is left out, not zero."""
    result(linear, "identity-split0-draw0", contexts=["a", "a", "b", "b"],
           conditions={name: [1.0, 3.0, None, 6.0] for name in METRICS})
    row, = tables.summarise(tables.collect(linear), "linear")
    assert row["metrics"]["rmse"] == {"mean": 4.0, "sd": pytest.approx(8**0.5), "n": 2, "paper": (0.28, 0.01)}


def test_one_value_has_no_spread(linear):
    """A single file of a single context has a mean and no standard deviation."""
    result(linear, "oracle-split0-draw0", rmse=0.25)
    row, = tables.summarise(tables.collect(linear), "linear")
    assert row["metrics"]["rmse"] == {"mean": 0.25, "sd": None, "n": 1, "paper": None}
    assert tables.cell(row["metrics"]["rmse"]) == "0.250"


def test_what_a_cell_says():
    """Ours, and the paper's where it has a number; a dash, never nothing, where there is no value."""
    assert tables.cell({"mean": 13.7, "sd": 0.52, "n": 3, "paper": (13.69, 0.05)}) == "13.7 ± 0.5 (paper: 13.69 ± 0.05)"
    assert tables.cell({"mean": 0.1234, "sd": None, "n": 1, "paper": None}) == "0.123"
    assert tables.cell(None).strip()


@pytest.mark.parametrize("experiment, row, metric, expected", [
    ("linear", "mappfn", "wasserstein", (13.69, 0.05)), ("linear", "identity", "mmd", (12.98, 0.35)),
    ("linear", "observed", "magnitude_ratio", (1.00, 0.00)), ("linear", "mappfn", "pds", (0.01, 0.01)),
    ("melanoma", "mappfn-finetuned", "auprc", (0.38, 0.03)), ("melanoma", "mappfn-random", "mmd", (51.78, 0.80)),
    ("melanoma", "mappfn-pretrained", "pds", (0.17, 0.01)), ("melanoma", "identity", "wasserstein", (22.91, 0.18)),
    ("leukemia", "mappfn-pretrained", "magnitude_ratio", (2.56, 0.02)), ("leukemia", "observed", "auprc", (0.91, 0.04)),
    ("leukemia", "mappfn-random", "wasserstein", (14.95, 0.28)), ("leukemia", "mappfn-finetuned", "rmse", (0.15, 0.00)),
])
def test_numbers_of_the_paper(experiment, row, metric, expected):
    """Tables 2 and 3 of the paper, read off again."""
    assert dict(zip(tables.COLUMNS, tables.PAPER[experiment][row]))[metric] == expected


def test_every_row_of_the_paper_is_a_row_here():
    """No number of the paper belongs to a row or a table that is never printed, and each is a pair."""
    for experiment, rows in tables.PAPER.items():
        assert experiment in tables.TITLES and rows.keys() <= tables.ROWS.keys() | tables.ABLATIONS.keys()
        assert {len(row) for row in rows.values()} == {5 if experiment == "linear" else 6}
        assert all(len(pair) == 2 for row in rows.values() for pair in row)


def test_gap_closed_by_hand(linear):
    """Identity 0.5 and oracle 0.1: an RMSE of 0.2 closes three quarters, one of 0.7 minus a half."""
    values = {"identity": 0.5, "oracle": 0.1, "mappfn-seed0": 0.2, "additive": 0.7, "observed": 0.05}
    for name, value in values.items():
        result(linear, f"{name}-split0-draw0", rmse=value)
    table = tables.summarise(tables.collect(linear), "linear")
    assert tables.gap_closed(table) == {"mappfn": pytest.approx(0.75), "additive": pytest.approx(-0.5)}
    assert tables.gap_closed([row for row in table if row["row"] != "oracle"]) == {}


def test_paired_advantage_by_hand(tmp_path):
    """Three splits, AUPRC better by 0.1, 0.2 and 0.3: 0.2 with standard error 0.1 / sqrt(3); an RMSE lower by as
    much is as good; of MR the distance to 1 counts. A split that one row lacks is left out."""
    for split, more in enumerate((0.1, 0.2, 0.3)):
        result(tmp_path, f"cpa-split{split}-draw0", auprc=0.5 + more, rmse=0.5 - more, magnitude_ratio=1 - more)
        result(tmp_path, f"additive-split{split}-draw0", auprc=0.5, rmse=0.5, magnitude_ratio=1 + 2 * more)
    result(tmp_path, "additive-split3-draw0", auprc=0.9, rmse=0.9)
    rows = tables.collect(tmp_path)
    expected = (pytest.approx(0.2), pytest.approx(0.1 / 3**0.5), 3)
    assert all(tables.advantage(rows, "cpa", "additive", m) == expected for m in ("auprc", "rmse", "magnitude_ratio"))
    assert tables.advantage(rows, "additive", "cpa", "auprc")[0] == pytest.approx(-0.2)
    assert tables.advantage(rows, "cpa", "mfm", "auprc") is None


def test_the_best_simple_row_is_the_one_to_beat(tmp_path):
    """Best is highest AUPRC and lowest RMSE; constant mean and references are no competitors."""
    for row, value in {"additive": 0.3, "target-only": 0.4, "constant-mean": 0.9, "observed": 0.95}.items():
        result(tmp_path, f"{row}-split0-draw0", auprc=value, rmse=value)
    rows = tables.collect(tmp_path)
    assert (tables.best_simple(rows, "auprc"), tables.best_simple(rows, "rmse")) == ("target-only", "additive")


@pytest.mark.parametrize("found, expected", [
    ([(0.3, 0.1, 9), (0.1, 0.01, 9)], "reproduced"), ([(0.3, 0.1, 9), (-0.1, 0.01, 9)], "in part"),
    ([(0.1, 0.1, 9), (-0.3, 0.1, 9)], "not reproduced"), ([(0.1, 0.1, 9), (-0.1, 0.1, 9)], "undecided"),
])
def test_verdicts(found, expected):
    """Two standard errors decide: all better, some better, none better and one worse, nothing beyond them."""
    assert tables.verdict(found).startswith(expected)


def test_a_claim_is_held_against_the_hardest_opponent(tmp_path):
    """MapPFN beats CondOT but not MFM: the evidence names MFM."""
    for split in range(3):
        for row, value in {"mappfn-seed0": 0.5, "condot-seed0": 0.9, "mfm-seed0": 0.2 + 0.01 * split}.items():
            result(tmp_path, f"{row}-split{split}-draw0", rmse=value)
    outcome, evidence = tables.judge(tables.collect(tmp_path), "mappfn", ("condot", "mfm"), ("rmse",))
    assert outcome == "not reproduced" and "MFM" in evidence and "-0.29" in evidence


def test_claims_of_figures_by_hand():
    """More context lowers W2 in every unit: reproduced; more cells raise it: not; augmentation and coverage from their
    numbers; a figure that was not run says why."""
    curve = lambda values, trained: {"data": {"experiments": {"linear": {"x": [1, 4, 8], "trained": trained, "values": {
        "mappfn": {"wasserstein": values}, "identity": {"wasserstein": [[9.0, 0.0, 0.0]] * 3}}}}}}
    density = lambda *values: {"expression": {"density": values}, "change": {"density": values}}
    figures = {"context": curve([[3.0, 2.0, 1.0], [3.1, 2.0, 1.0], [2.9, 2.0, 1.0]], 4),
               "cells": curve([[0.0, 1.0, 2.0], [0.0, 1.0, 2.1], [0.0, 1.0, 2.2]], 4),
               "tta": {"data": {"screens": {"s": {"values": [
                   {"augmented": 0.5 + i / 100, "single": 0.3} for i in range(3)]}}}},
               "coverage": {"data": {"distributions": {"GRN prior": density(1, 1, 0), "leukemia": density(1, 1, 2)}}},
               "variance": {"not_run": "no unpaired prior"}}
    found = {number: (outcome, evidence) for number, _, outcome, evidence in tables.figure_claims(figures)}
    assert found[8] == ("not run", "no unpaired prior")
    assert found[9][0] == "reproduced" and "+0.210" in found[9][1]
    assert (found[10][0] == "reproduced" and "1 to 8: W2 lower by +2.000" in found[10][1]
            and "identity" not in found[10][1])
    assert found[11][0] == "not reproduced" and "4 to 8: W2 lower by -1.100" in found[11][1]
    assert found[12][0] == "not reproduced" and "50.0%" in found[12][1]


# ----------------------------------------------------------------------------------------------------------- the tables


def test_no_cell_is_blank(main, linear):
    """Rows with different metrics share a table: each cell has a number or a dash; empty columns are left out."""
    result(linear, "mappfn-seed1-split0-draw0", variance_rmse=None)
    result(linear, "identity-split0-draw0", pds=None)
    text, document = main()
    rows = [line for line in text.split("## Table 2")[1].split("\n\n")[1].splitlines() if line.startswith("| ")]
    assert len(rows) == 3
    assert all(cell.strip() for line in rows for cell in line.strip("|").split("|")[1:])
    assert len({line.count("|") for line in rows}) == 1
    assert "AUPRC" not in rows[0] and "variance RMSE" in rows[0]
    assert [row["row"] for row in document["tables"]["linear"]["rows"]] == ["mappfn", "identity"]
    assert document["versions"].keys() >= {"jax", "equinox", "diffrax"} and document["revision"]


@pytest.mark.parametrize("scale", ["smoke", "laptop"])
def test_small_scales_say_so(main, tmp_path, scale):
    """The title and the heading of every table name the scale and that it is not the paper's."""
    for experiment in ("linear", "toy"):
        result(tmp_path / scale / "samples" / experiment, "identity-split0-draw0")
    text, _ = main(scale)
    title, *headings = [line for line in text.splitlines() if line.startswith("## ") or line.startswith("# ")]
    headings.remove("## Run")
    assert f"at {scale} scale" in title and "not comparable" in title
    assert len(headings) == 6 and all(f"({scale} scale, not the paper's)" in line for line in headings)


def test_paper_scale_makes_no_excuse(main, tmp_path):
    """At paper scale headings stand for themselves."""
    result(tmp_path / "paper" / "samples" / "linear", "identity-split0-draw0")
    text, _ = main("paper")
    assert "# Report\n" in text and "## Table 2. Linear SCMs\n" in text and "not the paper's" not in text


def test_what_was_not_run_says_why(main, tmp_path):
    """The reason that the data stage left is printed, or else where predictions are missing; a toy needs no excuse."""
    note = tmp_path / "smoke" / "data" / "melanoma" / "not-run.txt"
    note.parent.mkdir(parents=True)
    note.write_text("error: no network\n")
    text, document = main()
    assert "not run: no network" in text
    assert f"not run: no predictions in {tmp_path / 'smoke' / 'samples' / 'leukemia'}" in text
    assert document["tables"]["melanoma"] == {"not_run": "no network"}
    assert "Toy" not in text


@pytest.mark.parametrize("age", ["missing", "older"])
def test_stale_metrics_are_refused(linear, age):
    """Predictions without metrics, or newer than they, end in a message with the command that makes them."""
    result(linear, "identity-split0-draw0")
    file = linear / "identity-split0-draw0.json"
    os.utime(file, ns=(0, 0)) if age == "older" else file.unlink()
    with pytest.raises(BadInput, match="draw0.json: missing, or older than .*; make it with python metrics.py"):
        tables.collect(linear)


def test_clipping_is_told(linear):
    """The share of negative expression that was set to zero stands under the table."""
    result(linear, "mappfn-pretrained-split0-draw0", meta={"clipped_fraction": 0.125})
    table = tables.summarise(tables.collect(linear), "leukemia")
    assert "MapPFN (pre-trained) 12.5%" in tables.caption(table, "leukemia")


def test_stage_times_are_summed(main, tmp_path):
    """A stage that took two attempts counts both; a title may contain commas."""
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / "times.csv").write_text("prior,10\ntrain: linear SCMs, seed 0,5\nprior,2\n")
    text, document = main()
    assert document["seconds"] == {"prior": 12, "train: linear SCMs, seed 0": 5}
    assert "| prior | 12 |" in text and "| all | 17 |" in text


def test_tables_are_written_whole(main, linear, monkeypatch, tmp_path):
    """Predictions without metrics leave the tables of an earlier run as they were."""
    result(linear, "identity-split0-draw0")
    text, _ = main()
    (linear / "oracle-split0-draw0.npz").write_bytes(b"")
    with pytest.raises(BadInput):
        main()
    assert (tmp_path / "smoke" / "report.md").read_text() == text


def test_picture_of_a_prediction(linear, tmp_path):
    """Drawn from the first test condition of MapPFN's first file; without one there is no picture, and no error."""
    assert not tables.picture(tmp_path / "smoke", tmp_path / "prediction.png")
    rng, p = np.random.default_rng(0), 2
    cells = lambda shift: rng.normal(shift, 1, (p, 9, 4)).astype(np.float32)
    meta = {"experiment": "linear", "scale": "smoke", "genes": ["a", "b", "c", "d"]}
    metrics.save_predictions(linear / "mappfn-seed0-split0-draw0.npz", metrics.Predictions(
        cells(0), cells(0), cells(1), cells(1), np.eye(4, dtype=np.float32)[:p], np.array(["x", "x"]), False, meta))
    assert tables.picture(tmp_path / "smoke", tmp_path / "prediction.png")
    assert (tmp_path / "prediction.png").read_bytes().startswith(b"\x89PNG")


def test_reference_rows(main, tmp_path, monkeypatch):
    """--reference evaluates identity, observed, oracle and target only, on graphs of the paper's size (here: tiny)."""
    small = {"genes": 4, "population": 40, "eval_cells": 10}
    monkeypatch.setattr(scales, "at", lambda scale, *sections: small if scale == "paper" else pytest.fail(scale))

    def wasserstein(x, y):  # in place of the solver, which takes long to compile
        return float(((x.mean(0) - y.mean(0)) ** 2).sum())

    monkeypatch.setattr(metrics, "wasserstein", wasserstein)
    monkeypatch.setattr(scales, "parse", lambda *a: tables.Settings(out=tmp_path, reference=True, graphs=3))
    tables.main()
    document = json.loads((tmp_path / "reference.json").read_text())
    assert [row["row"] for row in document["rows"]] == ["identity", "observed", "oracle", "target-only"]
    rmse = {row["row"]: row["metrics"]["rmse"] for row in document["rows"]}
    assert all(value["n"] == 3 for value in rmse.values()) and rmse["identity"]["mean"] > rmse["observed"]["mean"]
    assert "paper: 17.61 ± 0.14" in (tmp_path / "reference.md").read_text()

    # Fewer cells to draw from: two draws share more of them, in a file of its own.
    again = lambda n: tables.Settings(out=tmp_path, reference=True, graphs=3, population=n)
    monkeypatch.setattr(scales, "parse", lambda *a: again(12))
    tables.main()
    fewer = {row["row"]: row["metrics"] for row in json.loads((tmp_path / "reference-12.json").read_text())["rows"]}
    assert fewer["observed"]["rmse"]["mean"] < 0.7 * rmse["observed"]["mean"]
    assert document == json.loads((tmp_path / "reference.json").read_text())
    monkeypatch.setattr(scales, "parse", lambda *a: again(9))
    with pytest.raises(BadInput, match="--population 9: expected at least 10"):
        tables.main()
