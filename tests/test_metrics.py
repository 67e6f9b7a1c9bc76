"""Claims about metrics.py: agreement with independent code and with scanpy, closed forms, ties, known flaws, files.

Most populations are 40 cells of 5 genes, because the Sinkhorn solver is compiled anew for every other shape.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import install_import_hook

with install_import_hook("metrics", "beartype.beartype"):
    import metrics
import scales
from scales import BadInput

GOLDEN = Path(__file__).parent / "golden"
close = lambda expected, rel=1e-4, absolute=1e-9: pytest.approx(expected, rel=rel, abs=absolute)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "metrics.npz") as file:
        return dict(file), json.loads((GOLDEN / "metrics.json").read_text())


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def log_cells(seed: int, *shape: int) -> np.ndarray:
    """Sparse natural-log1p counts, with many ties."""
    return np.log1p(np.random.default_rng(seed).poisson(1.0, shape)).astype(np.float32)


# ------------------------------------------------------------------------------------- agreement with other code


def test_golden_values(golden):
    """Every metric agrees with the values of independent code, to 1e-4."""
    a, expected = golden
    found = metrics.evaluate(a["obs"], a["true"], a["pred"], a["treatment"], True)
    for name in ("wasserstein", "mmd", "rmse", "variance_rmse", "magnitude_ratio"):
        assert found["conditions"][name] == close(expected[name])
        assert found[name] == close(np.mean(expected[name]))
    assert found["pds"] == close(expected["pds"])
    assert {name: found[name] for name in expected["deg_auprc"]} == close(expected["deg_auprc"])
    assert metrics.pds(a["true"], a["pred"]) == close(expected["pds"])


def test_evaluate_is_json(golden):
    """The result of `evaluate` survives JSON unchanged, with None and no NaN where Table 2 has no AUPRC."""
    a, _ = golden
    one = [a[name][:1] for name in ("obs", "true", "pred", "treatment")]
    found = metrics.evaluate(*one, False)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["auprc"] is None and found["pds"] is None and found["rmse"] > 0
    found = metrics.evaluate(one[0], one[0], one[0], one[3], True)  # no effect at all
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["auprc"] is None and found["target_only"] is None and "undefined" in found["note"]


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


def test_wasserstein_of_two_points():
    """Between two Diracs the transport cost is the squared distance: no root is taken."""
    point = np.zeros((40, 5))
    assert metrics.wasserstein(point, point + [3, 4, 0, 0, 0]) == close(25)


def test_wasserstein_of_a_shift():
    """A sample and the same sample shifted by delta are |delta|^2 apart."""
    x, delta = normal(0, 40, 5), np.array([1.0, 2, 0, 0, 0])
    assert metrics.wasserstein(x, (x + delta).astype(np.float32)) == close(5, rel=1e-3)


@pytest.mark.parametrize("metric", [metrics.wasserstein, metrics.mmd, metrics.rmse, metrics.variance_rmse])
def test_distances_are_symmetric_and_zero_on_the_diagonal(metric):
    """Each distance is zero for x = y, else positive, equal both ways round, and blind to order and number of cells."""
    x, y = normal(0, 40, 5), normal(1, 40, 5) + 0.3
    assert metric(x, x) == close(0, absolute=1e-5)
    assert metric(x, y) == close(metric(y, x)) and metric(x, y) > 0.01
    assert metric(x, y) == close(metric(x[::-1], y))
    assert metric(x, np.repeat(x, 2, axis=0)) == close(0, absolute=1e-4)  # every cell twice: the same distribution
    assert metric(x, np.repeat(y, 2, axis=0)) == close(metric(x, y), rel=1e-3)


def test_mmd_is_a_double_loop():
    """MMD equals the plain double loop over cells, and for two Diracs 2 - 2 k, each averaged over length scales."""
    x, y = normal(0, 5, 3), normal(1, 4, 3)
    kernel = lambda a, b: np.mean([np.exp(-gamma * np.sum((a - b) ** 2)) for gamma in (10, 1, 0.1, 0.01, 0.001)])
    mean = lambda a, b: sum(kernel(p, q) for p in a for q in b) / (len(a) * len(b))
    assert metrics.mmd(x, y) == close(mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert metrics.mmd(x[:1], y[:1]) == close(2 - 2 * kernel(x[0], y[0]))


def test_rmse_by_hand():
    """Means (1, 2) and (4, 6) differ by 3 and 4; variances (1, 0) and (0, 4) by 1 and 4."""
    x, y = np.array([[0.0, 2.0], [2.0, 2.0]]), np.array([[4.0, 4.0], [4.0, 8.0]])
    assert metrics.rmse(x, y) == close(np.sqrt((9 + 16) / 2))
    assert metrics.variance_rmse(x, y) == close(np.sqrt((1 + 16) / 2))


def test_magnitude_ratio_ends():
    """MR is 1 for the truth, 0 for the observed cells, and undefined where the truth is the observed cells."""
    observed, true = normal(0, 40, 5), normal(1, 40, 5) + 1
    assert metrics.magnitude_ratio(observed, true, true) == close(1)
    assert metrics.magnitude_ratio(observed, true, observed) == close(0, absolute=1e-5)
    point = np.zeros((40, 5))
    assert np.isnan(metrics.magnitude_ratio(point, point, observed))


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


def test_pds_ignores_other_contexts():
    """In `evaluate` the truths of other biological contexts are no rivals."""
    true, predicted = populations(0, 1, 0.2, 1.2), populations(0, 1, 0.1, 1.1)
    run = lambda contexts: metrics.evaluate(true, true, predicted, np.zeros((4, 5)), False, contexts)["pds"]
    assert run(np.array(["a", "a", "b", "b"])) == 0 and run(None) > 0
    assert run(np.array(["a", "a", "a", "b"])) == close(1 / 6)  # 0.1 is as close to 0 as to 0.2; b has no rival


# ----------------------------------------------------------------------------------------------------------- AUPRC


@pytest.fixture(scope="module")
def screen():
    """Two conditions, four genes: genes 0 and 1 move under the first treatment, gene 2 under the second."""
    observed, true = log_cells(0, 2, 100, 4), log_cells(1, 2, 100, 4)
    true[0, :, 0] = 0
    true[0, :, 1] += 1
    true[1, :, 2] += 1
    return observed, true, np.eye(4, dtype=np.float32)[[0, 3]]  # the second treatment does not move its own gene


def test_auprc_of_the_truth_is_one(screen):
    """A perfect prediction ranks every differentially expressed gene above all others."""
    observed, true, treatments = screen
    found = metrics.deg_auprc(observed, true, true, treatments)
    assert found["auprc"] == 1 and found["n_degs"] == 3 and found["base_rate"] == 3 / 8 and found["note"] == ""


def test_target_only_by_hand(screen):
    """Two genes of eight are scored, one of them rightly: precision 1/2 at recall 1/3, then 3/8 for the other 2/3."""
    found = metrics.deg_auprc(*screen[:2], screen[0], screen[2])
    assert found["target_only"] == close(1 / 3 * 1 / 2 + 2 / 3 * 3 / 8)
    assert np.isnan(metrics.deg_auprc(*screen[:2], screen[0])["target_only"])


def test_auprc_by_hand(screen):
    """Both conditions share one ranking: a wrong gene of the second that is ahead of a right one of the first costs.

    Scores: gene 3 of the second condition (wrong), then gene 0 of the first (right), all others 0: precision 1/2 at
    recall 1/3, then 3/8. Each condition alone would give another number.
    """
    observed, true, _ = screen
    predicted = observed.copy()
    predicted[0, :, 0] += 0.5
    predicted[1, :, 3] += 2
    assert metrics.deg_auprc(observed, true, predicted)["auprc"] == close(1 / 3 * 1 / 2 + 2 / 3 * 3 / 8)


def test_auprc_of_identity_is_the_base_rate(screen):
    """The observed cells as prediction rank all genes alike."""
    found = metrics.deg_auprc(screen[0], screen[1], screen[0])
    assert found["auprc"] == found["base_rate"]


def test_auprc_without_positives(screen):
    """Without any differentially expressed gene AUPRC is undefined, which is said and does not crash."""
    observed, _, treatments = screen
    found = metrics.deg_auprc(observed, observed, observed, treatments)
    assert found["n_degs"] == 0 and np.isnan(found["auprc"]) and "undefined" in found["note"]


def test_impossible_means_stay_finite(screen):
    """Genes that are silent, or predicted to be negative, get finite fold changes."""
    observed, treated = screen[0].copy(), screen[0].copy()
    observed[0, :, 0] = treated[0, :, 1] = observed[0, :, 2] = treated[0, :, 2] = 0
    treated[1] = -0.5
    p, fold_change = metrics.differential_expression(observed, treated)
    assert np.isfinite(fold_change).all() and np.isfinite(p).all()
    assert fold_change[0, 0] > 20 and fold_change[0, 1] < -20 and fold_change[0, 2] == 0
    assert (fold_change[1] < -20).all()


# -------------------------------------------------------------------------------------- what the metrics get wrong


def test_w2_rewards_shrinking():
    """In W2 a fresh sample of the truth loses to the same cells shrunk by 0.7, or to a point; not so in variances."""
    true, fresh = normal(0, 200, 50, scale=0.45), normal(1, 200, 50, scale=0.45)
    assert metrics.wasserstein(true, fresh) == close(13.1, rel=0.03)
    assert metrics.wasserstein(true, 0.7 * fresh) == close(10.2, rel=0.03)
    assert metrics.wasserstein(true, 0 * fresh) == close(10.1, rel=0.03)
    assert metrics.variance_rmse(true, fresh) < 0.5 * metrics.variance_rmse(true, 0.7 * fresh)


def test_mr_rewards_fresh_cells():
    """For an effect of 0.3 standard deviations in 5 of 50 genes, MR is near 1 for fresh control cells without any
    effect, and near 0 for the observed control cells with the exact effect."""
    delta = np.where(np.arange(50) < 5, 0.3, 0).astype(np.float32)
    observed, true, fresh = normal(0, 200, 50), normal(1, 200, 50) + delta, normal(2, 200, 50)
    assert metrics.magnitude_ratio(observed, true, fresh) > 0.9
    assert metrics.magnitude_ratio(observed, true, observed + delta) < 0.1


# ------------------------------------------------------------------------------------------------------------ files


def predictions(**changes) -> metrics.Predictions:
    cells = [normal(i, 2, 40, 5) for i in range(4)]
    meta = {"method": "identity", "settings": {"seed": 0, "out": "x"}}
    treatments, contexts = np.eye(5, dtype=np.float32)[:2], np.array(["a", "b"])
    return metrics.Predictions(*cells, treatments, contexts, False, meta)._replace(**changes)


def test_files_round_trip(tmp_path):
    """What was saved is what is loaded, and `finished` knows the same settings from others."""
    path = tmp_path / "new" / "a.npz"
    assert not metrics.finished(path, {})
    metrics.save_predictions(path, predictions())
    for saved, loaded in zip(predictions(), metrics.load_predictions(path)):
        assert np.array_equal(saved, loaded) if isinstance(saved, np.ndarray) else saved == loaded
    assert metrics.finished(path, {"seed": 0, "out": Path("x")})
    with pytest.raises(BadInput, match="seed: 0, now 1"):
        metrics.finished(path, {"seed": 1, "out": Path("x")})


@pytest.mark.parametrize("changes, message", [
    ({"prediction": np.full((2, 40, 5), np.nan, np.float32)}, "400 of the 400 values of 'prediction' are not finite"),
    ({"target": np.zeros((3, 40, 5), np.float32)}, r"'target' has shape \(3, 40, 5\)"),
    ({"observed": np.zeros((2, 0, 5), np.float32)}, "'observed' has shape"),
    ({"contexts": np.array([0])}, "'contexts'"),
])
def test_wrong_arrays_are_not_saved(tmp_path, changes, message):
    """Arrays that do not fit, or are not finite, are refused by name, and no file is left behind."""
    with pytest.raises(BadInput, match=message):
        metrics.save_predictions(tmp_path / "a.npz", predictions(**changes))
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_bad_input(tmp_path):
    """A missing, empty, truncated, altered or foreign file raises BadInput with its name, never anything else."""
    path = tmp_path / "a.npz"
    with pytest.raises(BadInput, match="no such file"):
        metrics.load_predictions(path)
    metrics.save_predictions(path, predictions())
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for length in (0, 1, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(BadInput, match="a.npz"):
            metrics.load_predictions(path)
    for position in rng.integers(len(whole), size=300):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            metrics.load_predictions(path)  # some bytes do not matter
        except BadInput as error:
            assert "a.npz" in str(error)
    np.savez(path, something=np.zeros(3))
    with pytest.raises(BadInput, match="a.npz"):
        metrics.load_predictions(path)


def test_stage_writes_json_once(tmp_path, monkeypatch, capsys):
    """The stage writes one JSON beside each file, skips it while it is newer, and renews it when the file is."""
    metrics.save_predictions(tmp_path / "linear" / "a.npz", predictions())
    (tmp_path / "linear" / ".1.a.npz").write_bytes(b"unfinished")
    monkeypatch.setattr(sys, "argv", ["metrics.py", str(tmp_path)])
    metrics.main()
    path = tmp_path / "linear" / "a.json"
    first = json.loads(path.read_text())
    assert first["meta"]["method"] == "identity" and first["metrics"]["wasserstein"] > 0
    stamp = path.stat().st_mtime_ns
    metrics.main()
    assert path.stat().st_mtime_ns == stamp and "1 files, 1 of them already done" in capsys.readouterr().out
    os.utime(tmp_path / "linear" / "a.npz", ns=(stamp + 1, stamp + 1))
    metrics.main()
    assert path.stat().st_mtime_ns > stamp and json.loads(path.read_text()) == first


def test_command_line_says_what_is_missing(tmp_path, monkeypatch):
    """On a folder without predictions the command ends with one line that names it, not with a traceback."""
    monkeypatch.setattr(sys, "argv", ["metrics.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"^error: {tmp_path}: no .npz file in this folder"):
        scales.run(metrics.main)
