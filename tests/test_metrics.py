"""Claims about metrics.py: agreement with independent code and with scanpy, closed forms, ties, known flaws, files.

Most populations are 40 cells of 5 genes, because the Sinkhorn solver is compiled anew for every other shape.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

import metrics
import scales
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
    treatments = np.eye(5, dtype=np.float32)[:2]
    return metrics.Predictions(*cells, treatments, np.array(["a", "b"]), False, meta)._replace(**changes)


# ------------------------------------------------------------------------------------- agreement with other code


def test_golden_values():
    """Every metric agrees with the values of independent code, to 1e-4."""
    a = np.load(GOLDEN / "metrics.npz")
    expected = json.loads((GOLDEN / "metrics.json").read_text())
    systems = np.array(["one"] * len(a["obs"]))
    found = metrics.evaluate(metrics.Predictions(a["obs"], a["obs"], a["true"], a["pred"], a["treatment"], systems,
                                                 True, {}))
    for name in ("wasserstein", "mmd", "rmse", "variance_rmse", "magnitude_ratio"):
        assert found["conditions"][name] == close(expected[name])
        assert found[name] == close(np.mean(expected[name]))
    assert found["pds"] == close(expected["pds"]) == close(metrics.pds(a["true"], a["pred"]))
    assert {name: found[name] for name in expected["deg_auprc"]} == close(expected["deg_auprc"])


def test_differential_expression_is_scanpys():
    """Our Wilcoxon test and fold change equal those of `scanpy.tl.rank_genes_groups`, with ties and silent genes."""
    anndata, pandas, scanpy = (pytest.importorskip(name) for name in ("anndata", "pandas", "scanpy"))
    control, treated = log_cells(0, 2, 70, 9), log_cells(1, 2, 50, 9)
    treated[0, :, 0] += 0.5
    treated[0, :, 1] = control[1, :, 2] = control[0, :, 3] = treated[0, :, 3] = 0
    p, fold_change = metrics.differential_expression(control, treated)
    for i in range(2):
        data = anndata.AnnData(np.concatenate([control[i], treated[i]]))
        data.obs["group"] = pandas.Categorical(["control"] * 70 + ["treated"] * 50)
        scanpy.tl.rank_genes_groups(data, "group", groups=["treated"], reference="control", method="wilcoxon")
        table = scanpy.get.rank_genes_groups_df(data, "treated").set_index("names").sort_index()
        np.testing.assert_allclose(p[i], table["pvals_adj"], rtol=1e-9)
        np.testing.assert_allclose(fold_change[i], table["logfoldchanges"], rtol=1e-4, atol=1e-5)
    assert (p < 0.01).any() and (p > 0.01).any()


# --------------------------------------------------------------------------------------------------- closed forms


def test_wasserstein_of_a_shift():
    """Two Diracs, and a sample and its copy, are |shift|^2 apart: no root is taken."""
    point, shift = np.zeros((40, 5)), np.array([3.0, 4, 0, 0, 0])
    assert metrics.wasserstein(point, point + shift) == close(25)
    assert metrics.wasserstein(normal(0, 40, 5), normal(0, 40, 5) + shift) == close(25, rel=1e-3)


@pytest.mark.parametrize("metric", [metrics.wasserstein, metrics.mmd, metrics.rmse, metrics.variance_rmse])
def test_distances_are_symmetric_and_zero_on_the_diagonal(metric):
    """Each distance is zero for x = y, else positive, equal both ways round, and blind to order and number of cells."""
    x, y = normal(0, 40, 5), normal(1, 40, 5) + 0.3
    assert metric(x, x) == close(0, absolute=1e-5)
    assert metric(x, y) == close(metric(y, x)) == close(metric(x[::-1], y)) and metric(x, y) > 0.01
    assert metric(x, np.repeat(y, 2, axis=0)) == close(metric(x, y), rel=1e-3)


def test_mmd_is_a_double_loop():
    """MMD equals the plain double loop over cells and length scales."""
    x, y = normal(0, 5, 3), normal(1, 4, 3)

    def mean(a, b):
        kernels = [np.exp(-g * np.sum((p - q) ** 2)) for p in a for q in b for g in (10, 1, 0.1, 0.01, 0.001)]
        return np.mean(kernels)

    assert metrics.mmd(x, y) == close(mean(x, x) + mean(y, y) - 2 * mean(x, y))


def test_rmse_by_hand():
    """Means (1, 2) and (4, 6) differ by 3 and 4; variances (1, 0) and (0, 4) by 1 and 4."""
    x, y = np.array([[0.0, 2.0], [2.0, 2.0]]), np.array([[4.0, 4.0], [4.0, 8.0]])
    assert metrics.rmse(x, y) == close(np.sqrt((9 + 16) / 2))
    assert metrics.variance_rmse(x, y) == close(np.sqrt((1 + 16) / 2))


def test_magnitude_ratio_ends():
    """MR is 1 for the truth, 0 for the control cells, and undefined where the truth is the control cells."""
    controls, true = normal(0, 40, 5), normal(1, 40, 5) + 1
    assert metrics.magnitude_ratio(controls, true, true) == close(1)
    assert metrics.magnitude_ratio(controls, true, controls) == close(0, absolute=1e-5)
    assert np.isnan(metrics.magnitude_ratio(np.zeros((40, 5)), np.zeros((40, 5)), controls))


def populations(*means) -> np.ndarray:
    """P conditions of 40 cells, half of them at mean - 1 and half at mean + 1 in each of 5 genes."""
    return np.array(means)[:, None, None] + np.resize([-1.0, 1.0], 40)[:, None] + np.zeros(5)


@pytest.mark.parametrize("predicted, expected", [
    ((0, 1, 4), 0),                # each at its own truth
    ((1, 4, 0), 2 / 3),            # ranks 1/2, 1/2, 1: the first is 1 from 0, its own, and 0 from 1, and 3 from 4
    ((4, 4, 4), 1.5 / 3),          # one prediction for all: ranks 1, 1/2, 0
    ((0.5, 0.5, 4), 1 / 3),        # halfway between two truths: a tie counts against both
])
def test_pds_by_hand(predicted, expected):
    """PDS counts the other truths that are as close as the own one; one prediction for all treatments scores 1/2."""
    assert metrics.pds(populations(0, 1, 4), populations(*predicted)) == close(expected)


def test_pds_ties_survive_rounding():
    """If all truths coincide, every prediction is tied with all of them, although rounding makes the means differ."""
    cells = normal(0, 50, 7)
    true = np.stack([np.random.default_rng(i).permutation(cells) for i in range(4)])
    assert metrics.pds(true, np.stack([normal(i, 50, 7) for i in range(4)])) == 1


@pytest.mark.parametrize("systems, expected", [("aabb", 0), ("aaab", 0.5 / 3), ("aaaa", 2 / 3 / 4)])
def test_pds_ignores_other_systems(systems, expected):
    """The truths of other systems are no rivals, and a condition without any rival (the last b) does not count."""
    p = predictions(target=populations(0, 1, 0.2, 1.2), prediction=populations(0, 1, 0.1, 1.1))  # ties at 0.1 and 1.1
    found = metrics.pds_within_systems(p._replace(systems=np.array(list(systems))))
    assert np.nanmean(found) == close(expected)


# ----------------------------------------------------------------------------------------------------------- AUPRC


@pytest.fixture
def screen():
    """Two conditions, four genes: genes 0 and 1 move under the first treatment, gene 2 under the second."""
    controls, true = log_cells(0, 2, 100, 4), log_cells(1, 2, 100, 4)
    true[0, :, 0] = 0
    true[0, :, 1] += 1
    true[1, :, 2] += 1
    return controls, true, np.eye(4, dtype=np.float32)[[0, 3]]  # the second treatment does not move its own gene


def test_auprc_by_hand(screen):
    """The truth scores 1, control cells the base rate 3/8. Both conditions share one ranking: a wrong gene of the
    second ahead of a right one of the first costs, and likewise if only the two treated genes are scored."""
    controls, true, treatments = screen
    found = metrics.deg_auprc(controls, true, true, treatments)
    assert found["auprc"] == 1 and found["n_degs"] == 3 and found["base_rate"] == 3 / 8 and found["note"] == ""
    assert metrics.deg_auprc(controls, true, controls)["auprc"] == 3 / 8
    by_hand = 1 / 3 * 1 / 2 + 2 / 3 * 3 / 8  # precision 1/2 at recall 1/3, then 3/8
    assert found["target_only"] == close(by_hand)
    predicted = controls.copy()
    predicted[0, :, 0] += 0.5
    predicted[1, :, 3] += 2
    assert metrics.deg_auprc(controls, true, predicted)["auprc"] == close(by_hand)


def test_impossible_means_stay_finite(screen):
    """Genes that are silent, or predicted to be negative, get finite fold changes."""
    controls, treated = screen[0].copy(), screen[0].copy()
    controls[0, :, 0] = treated[0, :, 1] = controls[0, :, 2] = treated[0, :, 2] = 0
    treated[1] = -0.5
    p, fold_change = metrics.differential_expression(controls, treated)
    assert np.isfinite(fold_change).all() and np.isfinite(p).all()
    assert fold_change[0, 0] > 20 and fold_change[0, 1] < -20 and fold_change[0, 2] == 0
    assert (fold_change[1] < -20).all()


@pytest.mark.parametrize("log_expression, note", [(False, "not log-expression data"), (True, "undefined")])
def test_what_is_undefined_is_none(log_expression, note):
    """Without effect, rival or differentially expressed gene the result survives JSON, with None and no NaN."""
    cells = np.zeros((1, 40, 5))
    p = predictions(controls=cells, source=cells, target=cells, prediction=cells, log_expression=log_expression,
                    treatments=np.eye(5, dtype=np.float32)[:1], systems=np.array(["a"]))
    found = metrics.evaluate(p)
    assert json.loads(json.dumps(found, allow_nan=False)) == found and metrics.METRICS.keys() <= found.keys()
    assert found["auprc"] is found["target_only"] is found["pds"] is found["magnitude_ratio"] is None
    assert note in found["note"] and found["rmse"] == 0 and found["conditions"]["pds"] == [None]


# -------------------------------------------------------------------------------------- what the metrics get wrong


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


# ------------------------------------------------------------------------------------------------------------ files


def test_files_round_trip(tmp_path):
    """What was saved is what is loaded, and `finished` knows the same settings from others."""
    path = tmp_path / "new" / "a.npz"
    assert not metrics.finished(path, {})
    metrics.save_predictions(path, predictions())
    for saved, loaded in zip(predictions(), metrics.load_predictions(path)):
        assert np.array_equal(saved, loaded) if isinstance(saved, np.ndarray) else saved == loaded
    assert metrics.finished(path, {"seed": 0, "out": Path("x")})
    with pytest.raises(BadInput, match="seed 0, now 1"):
        metrics.finished(path, {"seed": 1, "out": Path("x")})


@pytest.mark.parametrize("name, array, message", [
    ("prediction", np.full((2, 40, 5), np.nan), "400 of the 400 values of 'prediction' are not finite"),
    ("target", np.zeros((3, 40, 5)), r"'target' has shape \(3, 40, 5\)"),
    ("controls", np.zeros((2, 0, 5)), "'controls' has shape"),
    ("systems", np.array(["a"]), "'systems'"),
])
def test_wrong_arrays_are_not_saved(tmp_path, name, array, message):
    """Arrays that do not fit, or are not finite, are refused by name, and no file is left behind."""
    with pytest.raises(BadInput, match=message):
        metrics.save_predictions(tmp_path / "a.npz", predictions(**{name: array}))
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_bad_input(tmp_path):
    """A missing, empty, truncated, altered or foreign file raises BadInput with its name, never anything else."""
    path = tmp_path / "a.npz"
    metrics.save_predictions(path, predictions())
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for length in (0, 1, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(BadInput, match="a.npz"):
            metrics.load_predictions(path)
    for position in rng.integers(len(whole), size=200):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            metrics.load_predictions(path)  # some bytes do not matter
        except BadInput as error:
            assert "a.npz" in str(error)
    np.savez(path, something=np.zeros(3))
    for wrong in (path, tmp_path / "none.npz"):
        with pytest.raises(BadInput, match=wrong.name):
            metrics.load_predictions(wrong)


def test_stage_writes_json_once(tmp_path, monkeypatch, capsys):
    """The stage writes one JSON beside each file, skips it while it is newer and complete, and renews it if the file
    is newer or a metric was added, which needs no more than its line in METRICS."""
    metrics.save_predictions(tmp_path / "linear" / "a.npz", predictions())
    (tmp_path / "linear" / ".1.a.npz").write_bytes(b"unfinished")
    monkeypatch.setattr(sys, "argv", ["metrics.py", str(tmp_path)])
    path = tmp_path / "linear" / "a.json"
    metrics.main()
    first = json.loads(path.read_text())
    assert first["meta"]["row"] == "identity" and first["metrics"]["systems"] == ["a", "b"]
    stamp = path.stat().st_mtime_ns
    metrics.main()
    assert path.stat().st_mtime_ns == stamp and "1 files, 1 of them already done" in capsys.readouterr().out
    os.utime(tmp_path / "linear" / "a.npz", ns=(stamp + 1, stamp + 1))
    metrics.main()
    assert path.stat().st_mtime_ns > stamp and json.loads(path.read_text()) == first

    def largest(x, y):
        return float(y.max())

    monkeypatch.setitem(metrics.METRICS, "largest", metrics.Metric("largest", 1, "lower", metrics.each(largest)))
    metrics.main()
    found = json.loads(path.read_text())["metrics"]
    assert found["largest"] == close(np.mean(found["conditions"]["largest"]))


@pytest.mark.parametrize("argument, message", [("", "no .npz file in this folder"), ("a.npz", "no such file")])
def test_command_line_says_what_is_missing(tmp_path, monkeypatch, argument, message):
    """Without predictions the command ends with one line that names the path, not with a traceback."""
    monkeypatch.setattr(sys, "argv", ["metrics.py", str(tmp_path / argument)])
    with pytest.raises(SystemExit, match=f"^error: {tmp_path / argument}: {message}"):
        scales.run(metrics.main)
