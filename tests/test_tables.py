"""Claims about tables.py: what stands in a cell, beside which number of the paper, and what if nothing was run."""

import json
import re

import numpy as np
import pytest

import claims
import judge
import scales
import tables
from claims import CLAIMS, FIGURE_CLAIMS, MARGINS, PUBLISHED
from metrics import METRICS
from scales import BadInput

HEAD = {"update": 7, "micro_batch": 2, "accumulate": 3, "parameters": 1234, "seconds": 5.0}  # of a checkpoint
near = pytest.approx


def result(folder, row, split=0, draw=0, systems=("all",), treatments=("a",), conditions=None, meta=None,
           log_expression=False, **values):
    """A file of predictions, by name only, and its metrics, all 0.5 but for `values`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{row}-split{split}-draw{draw}.json"
    file.with_suffix(".npz").write_bytes(b"not looked at")
    numbers = dict.fromkeys(METRICS, 0.5) | {"auprc": None} | values
    conditions = conditions or {name: [numbers[name]] * len(systems) for name in METRICS}
    numbers |= {"systems": systems, "treatments": treatments, "conditions": {"auprc": [None]} | conditions,
                "log_expression": log_expression}
    about = {"row": row, "split": split, "draw": draw, "revision": "abc", "title": f"Title of {folder.name}"}
    if folder.name in tables.PAPER:
        about["paper"] = folder.name
    if "-seed" in row:
        about["trained_seed"] = int(re.search(r"-seed(\d+)", row)[1])
    made_of = scales.checksum(file.with_suffix(".npz"))
    document = {"predictions": made_of, "meta": about | (meta or {}), "metrics": numbers}
    file.write_text(json.dumps(document))


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


def test_gain_of_the_context(linear, report):
    """Each training is compared with itself, in the same draw of cells: levels that differ from seed to seed leave no
    error, nor does a second draw; and the rows with an uninformed context are in no other table."""
    for seed, level in enumerate((0.2, 0.5, 0.9)):
        for row, draw, rmse in (("", 0, level), ("", 1, level - 0.1), ("~controls", 0, level + 0.125)):
            result(linear, f"mappfn-seed{seed}{row}", draw=draw, systems=("a", "b", "c"), treatments=("x",) * 3,
                   rmse=rmse, meta={"trained_seed": seed})
    text, document = report()
    item = document["context_gain"]["linear"]["mappfn~controls"]["rmse"]
    assert item["difference"] == near(0.125) and item["error"] == near(0) and item["trainings"] == 3
    assert "| MapPFN, over control cells as context |" in text and "+0.125 ± 0.000" in text
    assert [entry["row"] for entry in document["tables"]["linear"]["rows"]] == ["mappfn"]


def test_mean_and_spread(linear):
    """Three seeds with RMSE 0.1, 0.2 and 0.6 are 0.3 +- 0.2646 (n - 1), one row with one budget; MMD is in
    thousandths; beside them stand the paper's numbers."""
    for i, value in enumerate((0.1, 0.2, 0.6)):
        meta = {"training": HEAD | {"update": 5 + i, "stopped": i > 0}, "clipped_fraction": 0.125}
        result(linear, f"mappfn-seed{i}", rmse=value, mmd=value / 100, meta=meta)
    row, = tables.summarise(tables.collect(linear), ["mappfn"])
    assert (row["row"], row["title"], row["files"]) == ("mappfn", "MapPFN", 3)
    assert row["over"].endswith("3 seeds") and "auprc" not in row["metrics"]
    for metric, factor, paper in (("rmse", 1, [0.14, 0.00]), ("mmd", 10, [4.28, 0.06])):
        expected = {"mean": near(0.3 * factor), "sd": near(factor * 0.07**0.5), "n": 3, "paper": paper}
        assert row["metrics"][metric] == expected
    assert list(row["budget"].values()) == [6, "6 tasks", 1234, 5, "2 of 3", "12.5%"]


def test_one_file_of_several_systems_is_spread_over_them(linear):
    """Its conditions are averaged within each system; an undefined one (None) is left out, not zero."""
    result(linear, "identity", systems="aabb", treatments="wxyz", conditions={"rmse": [1.0, 3.0, None, 6.0]})
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
    assert all(row in tables.ROWS for claim in CLAIMS for pair in claim.pairs for row in (pair[0], *pair[1]))
    for paper, margin in MARGINS.items():
        assert max(tables.PAPER[paper][row][5][1] for row in PUBLISHED) == margin
    assert set(tables.PAPER_COLUMNS) <= METRICS.keys() and tables.PAPER.keys() == tables.PAPER_TITLES.keys()


def test_chosen_on_training_conditions(tmp_path, report):
    """In each split the row that is better on the training conditions of that split, whatever the test ones say."""
    for row, on_training, on_test in (("a", (0.1, 0.4), (0.8, 0.5)), ("b", (0.2, 0.3), (0.7, 0.6))):
        for split in range(2):
            for name, rmse in (("wet-training", on_training[split]), ("wet", on_test[split])):
                result(tmp_path / "smoke" / "samples" / name, f"{row}-seed0", split=split, rmse=rmse)
    text, document = report()
    chosen = next(entry for entry in document["tables"]["wet"]["rows"] if entry["row"] == "chosen")
    assert chosen["metrics"]["rmse"]["mean"] == near((0.8 + 0.6) / 2)
    assert "Chosen: a in split 0, b in split 1." in text and chosen["over"] == "2 splits"


def test_gap_closed():
    """Identity 0.5 and oracle 0.1: an RMSE of 0.2 closes three quarters, one of 0.7 minus a half; in squares more."""
    table = []
    for row, value in {"identity": 0.5, "oracle": 0.1, "mappfn": 0.2, "additive": 0.7}.items():
        table.append({"row": row, "metrics": {"rmse": {"mean": value}}})
    assert tables.gap_closed(table) == {"mappfn": near(0.75), "additive": near(-0.5)}
    assert tables.gap_closed(table, power=2) == {"mappfn": near(0.21 / 0.24), "additive": near(-1)}
    assert tables.gap_closed(table[:1] + table[2:]) == {}


@pytest.mark.parametrize("metric", ["auprc", "rmse", "magnitude_ratio"])
def test_advantage(tmp_path, metric):
    """Better by 0.1, 0.2 and 0.3 in three treatments is 0.2 with standard error 0.1 / sqrt(3): AUPRC higher, RMSE
    lower, MR closer to 1. A condition that one row lacks is left out."""
    for split, more in enumerate((0.1, 0.2, 0.3)):
        about = {"treatments": [f"t{split}"]}
        result(tmp_path, "target-gene", split, **about, auprc=0.5 + more, rmse=0.5 - more, magnitude_ratio=1 - more)
        result(tmp_path, "additive", split, **about, auprc=0.5, rmse=0.5, magnitude_ratio=1 + 2 * more)
    result(tmp_path, "additive", 3, auprc=0.9, rmse=0.9, treatments=["t3"])
    results = tables.collect(tmp_path)
    item, = tables.evidence(results, "target-gene", ("additive", "absent"), [metric])[metric]
    assert item["what"] == f"{METRICS[metric].heading} against Additive"
    assert (item["difference"], item["error"], item["n"]) == (near(0.2), near(0.1 / 3**0.5), 3)
    item, = tables.evidence(results, "additive", ("target-gene",), [metric])[metric]
    assert item["difference"] == near(-0.2)
    assert tables.evidence(results, "additive", ("mfm",), [metric]) == {}


def conditions_of(rng, base, noise, count):
    """Values of each metric for some conditions: `base` worse than perfect, and noise."""
    found = {}
    for name, metric in METRICS.items():
        worse = base + noise * rng.normal(size=count)
        found[name] = list({"lower": worse, "higher": 1 - worse, "one": 1 + worse}[metric.better])
    return found


def made_up(folder, quality, systems, splits, log_expression, draws, seeds, fitted_to=0):
    """Made-up predictions of a screen, whose `splits` have these treatments: rows of a certain quality, each training a
    little different."""
    rng = np.random.default_rng(0)
    for row, base in quality.items():
        trained = row in PUBLISHED or row.startswith("mappfn")
        for seed in range(seeds if trained else 1):
            level = base + 0.01 * rng.normal()
            for split, treatments in enumerate(splits):
                for draw in range(draws):
                    conditions = conditions_of(rng, level, 0.02, len(systems))
                    if not log_expression:
                        conditions["auprc"] = [None] * len(systems)
                    values = {name: float(np.mean(found)) for name, found in conditions.items() if found[0] is not None}
                    meta = {"fitted_to": fitted_to * (row not in ZERO_SHOT)} if trained else {}
                    name = f"{row}-seed{seed}" if trained else row
                    result(folder, name, split, draw, systems, treatments, conditions, meta, log_expression, **values)


ZERO_SHOT = ("mappfn-pretrained", "mappfn-no-context", "mappfn-unpaired")
REAL = {"mappfn-finetuned": 0.1, "mappfn-pretrained": 0.3, "mappfn-random": 0.4, "mappfn-no-context": 0.2,
        "mappfn-unpaired": 0.3, "cpa": 0.3, "condot": 0.31, "mfm": 0.3, "cellflow": 0.5, "state": 0.5, "identity": 0.6}


def test_paper_sizes_are_judged(report, linear):
    """One split of 24 conditions in one system with ten draws, ten graphs with six conditions, and three trainings of
    each row: every claim of the tables has an outcome that is right, and every item of it an error and p. Leukemia
    does not speak for melanoma."""
    systems = [f"g{i}" for i in range(10) for _ in range(6)]
    quality = {"mappfn": 0.1, "mfm": 0.3, "condot": 0.4, "target-only": 0.3, "identity": 0.5}
    made_up(linear, quality, systems, [[f"x{i % 6}" for i in range(60)]], False, 1, 3)
    treatments = [f"t{i}" for i in range(24)]
    made_up(linear.parent / "melanoma", REAL, ["all"] * 24, [treatments], True, 10, 3, fitted_to=90)
    _, document = report()
    outcomes = {}
    for claim in document["claims"][:7]:
        found = {of_screen["screen"]: of_screen for of_screen in claim["judged"]}
        outcomes[claim["number"]] = found.pop("linear" if claim["number"] < 3 else "melanoma")
        assert all(of_screen["outcome"].startswith("not run") for of_screen in found.values())
        for item in outcomes[claim["number"]]["items"]:
            assert item["error"] > 0 and item["p_holm"] <= 1 and item["n"] in (10, 24)
    found = {number: of_screen["outcome"] for number, of_screen in outcomes.items()}
    assert found[1] == found[3] == found[4] == "holds" and found[6] == "holds"
    assert found[2].startswith("holds in 2 of 3") and "Target only, MR against MFM" in found[2]
    assert found[5] == "worse" and found[7] == "not told apart" and outcomes[4]["items"][0]["trainings"] == 3


def test_splits_are_judged(report, linear):
    """Five overlapping splits: rows that are fitted to each anew are compared over splits, one model for all of them
    over conditions. With one training of each they are undecided, and the numbers stand there all the same."""
    splits = [[f"t{(split + i) % 9}" for i in range(4)] for split in range(5)]
    made_up(linear.parent / "leukemia", REAL, ["all"] * 4, splits, True, 1, 1, fitted_to=5)
    _, document = report()
    claims = [{of["screen"]: of for of in claim["judged"]}["leukemia"] for claim in document["claims"][2:7]]
    assert [claim["outcome"] for claim in claims] == ["undecided"] * 5
    assert all(item["error"] > 0 for claim in claims for item in claim["items"])
    units = [(claim["items"][0]["units"], claim["items"][0]["n"]) for claim in claims]
    assert units == [("splits", 5), ("splits", 5), ("conditions", 8), ("splits", 5), ("conditions", 8)]


def test_claims_of_figures(report, linear, tmp_path):
    """What a figure has decided is said screen by screen; a rival that is missing is named; without results a claim
    says why. The paper's words stand beside all of it."""
    for row in ("mappfn-seed0", "condot-seed0"):
        result(linear, row, rmse=0.2 + 0.3 * (row[0] == "c"))
    item = judge.t_test(2.0, [(0.01, 20)]) | {"trainings": None, "n": 21, "units": "conditions"}
    items = []
    for screen, sign in (("one", 1), ("other", -1)):
        items += judge.decide([item | {"what": "W2", "screen": screen, "difference": 2.0 * sign}])
    folder = tmp_path / "smoke" / "figures"
    folder.mkdir()
    (folder / "context.json").write_text(json.dumps({"title": "5a", "evidence": items, "caption": "Caption."}))
    (folder / "tta.json").write_text('{"title": "tta", "not_run": "no GPU"}')
    text, document = report()
    found = {claim["number"]: claim for claim in document["claims"]}
    assert len(found) == len(CLAIMS) + len(FIGURE_CLAIMS) == 12
    assert [of["outcome"] for of in found[10]["judged"]] == ["holds", "worse"]
    assert "| one | holds | W2: better, +2.000 [+1.791, +2.209], n = 21 conditions |" in text
    assert "(without MFM, not run) | W2 against CondOT: undecided" in text and "| all | not run: no GPU | – |" in text
    for claim in document["claims"]:
        assert f'### {claim["number"]}. "{claim["paper"]}"' in text and claim["judged"]
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
                 "| MapPFN (pre-trained) | 7 | 6 tasks | 1234 | 5 | not asked | 0.0% |"):
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
    ("changed", "identity-split0-draw0.json: missing, incomplete or of another identity-split0-draw0.npz"),
    ("other data", "oracle-split0-draw0.npz predicts other data"),
])
def test_stale_results_are_refused(report, linear, problem, message):
    """Predictions without metrics, with those of others, or of a screen made anew are named; an earlier report stays."""
    result(linear, "identity", meta={"fingerprint": 1})
    text, _ = report()
    if problem == "missing":
        (linear / "identity-split0-draw0.json").unlink()
    elif problem == "changed":
        (linear / "identity-split0-draw0.npz").write_bytes(b"other predictions")
    else:
        result(linear, "oracle", meta={"fingerprint": 2})
    with pytest.raises(BadInput, match=message):
        report()
    assert (linear.parents[1] / "report.md").read_text() == text


def test_comparisons_beyond_the_paper():
    """Each network from prior to prior, each prior from network to network, tuned and not, on real screens; the second
    network against all else on linear SCMs; nothing twice."""
    found = claims.steps()
    pairs = [(row, rivals) for claim in found for row, rivals in claim.pairs]
    assert len(pairs) == len(set(pairs)) == 2 * 4 + 5 + 2 + 1 + 4 + 4
    assert ("mappfn-panel", ("mappfn-causal",)) in pairs and ("exchangeable-grn", ("mappfn-grn",)) in pairs
    for claim in found:
        row = claim.pairs[0][0]
        if row in ("exchangeable", "exchangeable-cf"):
            assert claim.wanted.keys() == {"linear"} and set(claim.wanted["linear"]) <= METRICS.keys()
        else:
            assert claim.wanted == {"real": claims.ALL}


def test_report_beyond_the_paper(tmp_path, monkeypatch):
    """The comparisons take the place of the paper's claims; rows that are not there are named."""
    folder = tmp_path / "smoke" / "samples" / "leukemia"
    for seed in range(3):
        for row, rmse in (("mappfn-panel", 0.5), ("exchangeable-panel", 0.25)):
            result(folder, f"{row}-seed{seed}", treatments=("a", "b"), systems=("s", "s"), rmse=rmse,
                   log_expression=True)
    monkeypatch.setattr(scales, "parse", lambda *a: tables.Settings("smoke", tmp_path, beyond=True))
    tables.main()
    text = (tmp_path / "smoke" / "report.md").read_text()
    assert "The exchangeable network is better than the paper's" in text and CLAIMS[0].says not in text
    assert "RMSE against mappfn-panel: better, +0.250" in text and "not run" not in text
