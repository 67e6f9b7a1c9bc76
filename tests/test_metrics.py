"""Claims about metrics.py: agreement with independent code and with scanpy, closed forms, ties, known flaws, files.

Most populations are 40 cells of 5 genes, because the Sinkhorn solver is compiled anew for every other shape.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import metrics
import strength
from scales import BadInput

GOLDEN = Path(__file__).parent / "golden"


def close(expected, rel=1e-4, absolute=1e-9):
    return pytest.approx(expected, rel=rel, abs=absolute)


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def log_cells(seed: int, *shape: int) -> np.ndarray:
    """Sparse natural-log1p counts, with many ties."""
    return np.log1p(np.random.default_rng(seed).poisson(1.0, shape)).astype(np.float32)


def predictions(**changes) -> metrics.Predictions:
    cells = [normal(i, 2, 40, 5) for i in range(4)]
    meta = {"row": "identity", "settings": {"seed": 0, "out": "x"}}
    treatments = changes.pop("treatments", np.eye(5, dtype=np.float32)[:2])
    unknown = np.full_like(treatments, np.nan)
    return metrics.Predictions(*cells, treatments, unknown, np.array(["a", "b"]), False, meta)._replace(**changes)


def test_golden_values():
    """Every metric agrees with the values of independent code, to 1e-4."""
    a = np.load(GOLDEN / "metrics.npz")
    expected = json.loads((GOLDEN / "metrics.json").read_text())
    found = metrics.evaluate(predictions(controls=a["obs"], source=a["obs"], target=a["true"], prediction=a["pred"],
                                         treatments=a["treatment"], systems=np.repeat("a", 6), log_expression=True))
    for name in ("wasserstein", "mmd", "rmse", "variance_rmse", "magnitude_ratio"):
        assert found["conditions"][name] == close(expected[name])
        assert found[name] == close(np.mean(expected[name]))
    for name, value in expected["deg_auprc"].items() | {("pds", expected["pds"])}:
        assert found[name] == close(value)


def test_differential_expression_is_scanpys():
    """Our Wilcoxon test and fold change equal those of `scanpy.tl.rank_genes_groups`, with ties and silent genes."""
    anndata, scanpy = pytest.importorskip("anndata"), pytest.importorskip("scanpy")
    control, treated = log_cells(0, 2, 70, 9), log_cells(1, 2, 50, 9)
    treated[0, :, 0] += 0.5
    treated[0, :, 1] = control[1, :, 2] = control[0, :, 3] = treated[0, :, 3] = 0
    p, fold_change = metrics.differential_expression(control, treated)
    treated_badly = np.full_like(treated, -0.5)  # which is impossible, counts as silent: finite, and scanpy has NaN
    assert (np.round(metrics.differential_expression(control, treated_badly)[1][0, 4:] / 30) == -1).all()
    for i in range(2):
        data = anndata.AnnData(np.concatenate([control[i], treated[i]]))
        data.obs["group"] = ["control"] * 70 + ["treated"] * 50
        data.strings_to_categoricals()
        scanpy.tl.rank_genes_groups(data, "group", groups=["treated"], reference="control", method="wilcoxon")
        table = scanpy.get.rank_genes_groups_df(data, "treated").set_index("names").sort_index()
        np.testing.assert_allclose(p[i], table["pvals_adj"], rtol=1e-9)
        np.testing.assert_allclose(fold_change[i], table["logfoldchanges"], rtol=1e-4, atol=1e-5)
    assert (p < 0.01).any() and (p > 0.01).any()


def test_wasserstein_and_its_ratio():
    """A sample and its copy are |shift|^2 apart: no root is taken. MR is 1 for the truth, 0 for the control cells, and
    undefined where the truth is the control cells."""
    controls = normal(0, 40, 5)
    true = controls + np.array([3.0, 4, 0, 0, 0])
    assert metrics.wasserstein(controls, true) == close(25, rel=1e-3)
    assert metrics.magnitude_ratio(controls, true, true) == close(1)
    assert metrics.magnitude_ratio(controls, true, controls) == close(0, absolute=1e-5)
    assert np.isnan(metrics.magnitude_ratio(np.zeros((40, 5)), np.zeros((40, 5)), controls))


@pytest.mark.parametrize("name", ["wasserstein", "mmd", "rmse", "variance_rmse"])
def test_distances_are_symmetric_and_zero_on_the_diagonal(name):
    """Each distance is zero for x = y, else positive, equal both ways round, and blind to order and number of cells."""
    x, y, metric = normal(0, 40, 5), normal(1, 40, 5) + 0.3, getattr(metrics, name)
    assert metric(x, x) == close(0, absolute=1e-5) and metric(x, y) > 0.01
    assert metric(x, y) == close(metric(y, x)) == close(metric(x[::-1], y))
    assert metric(x, np.repeat(y, 2, axis=0)) == close(metric(x, y), rel=1e-3)


def test_moments_and_kernel_by_hand():
    """Means (1, 2) and (4, 6) differ by 3 and 4; variances (1, 0) and (0, 4) by 1 and 4. MMD of two points is their
    kernel's distance from 1, twice, in the mean over length scales."""
    x, y = np.array([[0.0, 2.0], [2.0, 2.0]]), np.array([[4.0, 4.0], [4.0, 8.0]])
    assert metrics.rmse(x, y) == close(np.sqrt((9 + 16) / 2))
    assert metrics.variance_rmse(x, y) == close(np.sqrt((1 + 16) / 2))
    kernel = np.exp(-8 * np.array([10, 1, 0.1, 0.01, 0.001])).mean()  # (0, 2) and (2, 4) are sqrt(8) apart
    assert metrics.mmd(x[:1], np.array([[2.0, 4.0]])) == close(2 - 2 * kernel)


@pytest.mark.exercise7
@pytest.mark.parametrize("true, predicted, systems, expected", [
    ((0, 1, 4), (0, 1, 4), "aaa", 0),            # each at its own truth
    ((0, 1, 4), (1, 4, 0), "aaa", 2 / 3),        # ranks 1/2, 1/2, 1
    ((0, 1, 4), (4, 4, 4), "aaa", 1.5 / 3),      # one prediction for all: ranks 1, 1/2, 0
    ((0, 1, 4), (0.5, 0.5, 4), "aaa", 1 / 3),    # halfway between two truths: a tie counts against both
    ((1, 1, 1), (0.1, 0.7, 5), "aaa", 1),        # no truth differs from another
    ((0, 1, 0.2, 1.2), (0, 1, 0.1, 1.1), "aaaa", 2 / 3 / 4),  # ties at 0.1 and 1.1
    ((0, 1, 0.2, 1.2), (0, 1, 0.1, 1.1), "aabb", 0),          # not if those are of another system
    ((0, 1, 0.2, 1.2), (0, 1, 0.1, 1.1), "aaab", 0.5 / 3),    # b has no rival and does not count
])
def test_pds_by_hand(true, predicted, systems, expected):
    """PDS counts the other truths of the same system that are as close as the own one, also where rounding makes equal
    means differ."""
    cells = np.resize([-1.0, 1.0], 40)[:, None] + np.zeros(5)  # mean 0
    target = np.array(true)[:, None, None] + cells
    for i in range(len(true)):
        target[i] = np.random.default_rng(i).permutation(target[i])
    p = predictions(target=target, prediction=np.array(predicted)[:, None, None] + cells)
    found = metrics.pds_within_systems(p._replace(systems=np.array(list(systems))))
    assert np.nanmean(found) == close(expected)


@pytest.mark.exercise7
def test_auprc_by_hand():
    """The truth scores 1, control cells the base rate 3/8. Both conditions share one ranking: a wrong gene of the
    second ahead of a right one of the first costs, and likewise if only the two treated genes are scored."""
    controls, true = log_cells(0, 2, 100, 4), log_cells(1, 2, 100, 4)
    true[0, :, 0] = 0
    true[0, :, 1] += 1
    true[1, :, 2] += 1
    treatments = np.eye(4, dtype=np.float32)[[0, 3]]  # the second does not move its own gene
    found = metrics.deg_auprc(controls, true, true, treatments)
    by_hand = 1 / 3 * 1 / 2 + 2 / 3 * 3 / 8  # precision 1/2 at recall 1/3, then 3/8
    assert found.pop("conditions").tolist() == [1, 1]
    assert found == {"auprc": 1, "n_degs": 3, "base_rate": 3 / 8, "target_only": close(by_hand), "note": ""}
    assert metrics.deg_auprc(controls, true, controls)["auprc"] == 3 / 8
    predicted = controls.copy()
    predicted[0, :, 0] += 0.5
    predicted[1, :, 3] += 2
    assert metrics.deg_auprc(controls, true, predicted)["auprc"] == close(by_hand)


def test_pseudo_values_by_hand():
    """The area of all three conditions is 5/6, without the first 1/2, without the second or the third 1. Pseudo-values
    are 3 x 5/6 minus twice those; where without a condition nothing is to be found, there is none."""
    truth, score = np.array([[1, 0], [0, 0], [1, 0]]), np.array([[4, 0], [3, 0], [2, 0]])
    whole = 1 / 2 + 1 / 2 * 2 / 3  # precision 1 at recall 1/2, then 2/3
    found = metrics.pseudo_values(truth, score)
    assert found == close([3 * whole - 2 * 1 / 2, 3 * whole - 2, 3 * whole - 2 * 1])
    assert np.isnan(metrics.pseudo_values(truth[:1] * 0, score[:1])).all()
    assert np.isnan(metrics.pseudo_values(truth[:2], score[:2])[0])  # the other has nothing to be found


@pytest.mark.parametrize("log_expression, note", [(False, "not log-expression data"), (True, "undefined")])
def test_what_is_undefined_is_none(log_expression, note):
    """Without effect, rival or differentially expressed gene the result survives JSON, with None and no NaN."""
    cells = np.zeros((1, 40, 5))
    found = metrics.evaluate(metrics.Predictions(cells, cells, cells, cells, cells[0, :1], cells[0, :1] * np.nan,
                                                 np.array(["a"]), log_expression, {}))
    assert json.loads(json.dumps(found, allow_nan=False)) == found and metrics.METRICS.keys() <= found.keys()
    assert found["auprc"] is found["target_only"] is found["pds"] is found["magnitude_ratio"] is None
    assert note in found["note"] and found["rmse"] == 0 and found["conditions"]["pds"] == [None]


def test_off_target_r2():
    """0 if nothing but the treated variable moves and 1 for the truth, from few cells as from many, whatever they are
    of the treated one; None without true means."""
    rng = np.random.default_rng(0)
    treatments = 1.3 * np.eye(5)[:3]
    expected = rng.normal(0, 0.5, (3, 5)) * (treatments == 0) + treatments

    def found(means, cells=8, repeats=400):
        noise = rng.standard_normal((repeats, 3, cells, 5)) + 99 * (treatments != 0)[:, None]
        return np.mean([metrics.off_target_r2(predictions(
            prediction=means[:, None] + each, treatments=treatments, expected=expected)).mean() for each in noise])

    assert found(np.zeros((3, 5))) == pytest.approx(0, abs=0.1)
    assert found(expected) == pytest.approx(1, abs=0.1) and found(expected, 1000, 2) == pytest.approx(1, abs=0.1)
    assert found(expected / 2) == pytest.approx(0.75, abs=0.1) and found(-expected) == pytest.approx(-3, abs=0.2)
    assert metrics.evaluate(predictions())["off_target_r2"] is None


def test_twin_rmse():
    """Cell by cell, without the treated variable: twins themselves are at 0, in another order they are not; None for
    new cells."""
    twins = normal(8, 2, 40, 5)
    moved = twins + np.array([[[9, 0, 0, 0, 2.0]], [[0, 9, 0, 0, 2.0]]], np.float32)
    p = predictions(prediction=moved, twins=twins)
    assert metrics.twin_rmse(p) == pytest.approx(1.0) and metrics.twin_rmse(p._replace(prediction=twins)).max() == 0
    assert metrics.twin_rmse(p._replace(prediction=twins[:, ::-1])).min() > 1
    assert metrics.evaluate(predictions())["twin_rmse"] is None


def test_w2_rewards_shrinking():
    """In W2 a fresh sample of the truth loses to the same cells shrunk by 0.7, or to a point; not so in variances."""
    true, fresh = normal(0, 200, 50, scale=0.45), normal(1, 200, 50, scale=0.45)
    for factor, expected in {1: 13.1, 0.7: 10.2, 0: 10.1}.items():
        assert metrics.wasserstein(true, factor * fresh) == close(expected, rel=0.03)
    assert metrics.variance_rmse(true, fresh) < 0.5 * metrics.variance_rmse(true, 0.7 * fresh)


def test_mr_rewards_fresh_cells():
    """For an effect of 0.3 standard deviations in 5 of 50 genes, MR is near 1 for fresh control cells without any
    effect, and near 0 for the source cells with the exact effect. MR is measured from the cells of `source`."""
    delta = np.where(np.arange(50) < 5, 0.3, 0).astype(np.float32)
    source, true, fresh = normal(0, 1, 200, 50), normal(1, 1, 200, 50) + delta, normal(2, 1, 200, 50)
    p = predictions(controls=fresh, source=source, target=true)
    assert metrics.magnitude_ratios(p._replace(prediction=fresh))[0] > 0.9
    assert metrics.magnitude_ratios(p._replace(prediction=source + delta))[0] < 0.1


def test_files_round_trip(tmp_path):
    """What was saved is what is loaded, and `finished` knows the same settings from others."""
    path = tmp_path / "new" / "a.npz"
    assert not metrics.finished(path, {})
    metrics.save_predictions(path, predictions())
    for p in (predictions(), predictions(twins=normal(5, 2, 40, 5))):
        metrics.save_predictions(path, p)
        for saved, loaded in zip(p, metrics.load_predictions(path)):
            np.testing.assert_array_equal(saved, loaded)  # NaN is NaN
    assert metrics.finished(path, {"seed": 0, "out": Path("x")})
    with pytest.raises(BadInput, match="seed 0, now 1"):
        metrics.finished(path, {"seed": 1, "out": Path("x")})


@pytest.mark.parametrize("name, array, message", [
    ("prediction", np.full((2, 40, 5), np.nan), "400 of the 400 values of 'prediction' are not finite"),
    ("target", np.zeros((3, 40, 5)), r"'target' has shape \(3, 40, 5\)"),
    ("systems", np.array(["a"]), "'systems'"),
])
def test_wrong_arrays_are_not_saved(tmp_path, name, array, message):
    """Arrays that do not fit, or are not finite, are refused by name, and no file is left behind."""
    with pytest.raises(BadInput, match=message):
        metrics.save_predictions(tmp_path / "a.npz", predictions(**{name: array}))
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_bad_input(tmp_path, main):
    """A missing, truncated, altered or foreign file, or an empty folder, is BadInput with its name."""
    metrics.save_predictions(tmp_path / "a.npz", predictions())
    whole = (tmp_path / "a.npz").read_bytes()
    for position in np.random.default_rng(0).integers(len(whole), size=100):
        flipped = bytes([whole[position] ^ 0xFF])
        (tmp_path / "b.npz").write_bytes(whole[:position] + flipped + whole[position + 1 :])
        try:
            metrics.load_predictions(tmp_path / "b.npz")  # some bytes do not matter
        except BadInput as error:
            assert "b.npz" in str(error)
    np.savez(tmp_path / "foreign.npz", something=np.zeros(3))
    (tmp_path / "cut.npz").write_bytes(whole[:-1])
    for name in ("foreign.npz", "cut.npz", "none.npz"):
        with pytest.raises(BadInput, match=name):
            metrics.load_predictions(tmp_path / name)
    (tmp_path / "folder").mkdir()
    for name in ("none.npz", "folder"):
        with pytest.raises(BadInput, match=name):
            main(metrics, tmp_path / name)


def test_stage_writes_json_once(tmp_path, monkeypatch, main, capsys):
    """The stage writes one JSON beside each file, skips it while it is of that very file and complete, and renews it if
    the file is another one or a metric was added, which needs no more than its line in METRICS."""
    file, path = tmp_path / "linear" / "a.npz", tmp_path / "linear" / "a.json"
    metrics.save_predictions(file, predictions())
    (tmp_path / "linear" / ".1.a.npz").write_bytes(b"unfinished")
    main(metrics, tmp_path)
    first, stamp = json.loads(path.read_text()), path.stat().st_mtime_ns
    assert first["meta"]["row"] == "identity" and first["metrics"]["systems"] == ["a", "b"]
    main(metrics, tmp_path)
    assert path.stat().st_mtime_ns == stamp and "1 of them already done" in capsys.readouterr().out
    metrics.save_predictions(file, predictions(prediction=normal(9, 2, 40, 5)))
    os.utime(file, ns=(0, 0))  # whatever its time
    main(metrics, tmp_path)
    first, before = json.loads(path.read_text()), first
    assert first["metrics"]["rmse"] != before["metrics"]["rmse"]
    assert first["metrics"]["treatments"] == ["0", "1"]
    path.write_text(json.dumps(first | {"metrics": first["metrics"] | {"conditions": {}}}))  # an older version's
    main(metrics, tmp_path)
    assert json.loads(path.read_text()) == first
    added = metrics.Metric("again", 1, "lower", metrics.each(metrics.rmse))
    monkeypatch.setitem(metrics.METRICS, "again", added)
    main(metrics, tmp_path)
    assert json.loads(path.read_text())["metrics"]["again"] == first["metrics"]["rmse"]


def test_change_of_the_treated_gene():
    """Cells in which only the treated gene moves, by -0.5 in truth and by -0.2 as predicted."""
    controls = np.full((2, 40, 5), 2, np.float32)
    treatments = np.eye(5, dtype=np.float32)[:2]
    p = predictions(controls=controls, source=controls, target=controls - 0.5 * treatments[:, None],
                    prediction=controls - 0.2 * treatments[:, None], treatments=treatments)
    before, true, predicted = strength.own_change(p)
    assert before == close([2, 2])
    assert true == close([-0.5, -0.5])
    assert predicted == close([-0.2, -0.2])
