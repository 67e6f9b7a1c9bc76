"""Claims about judge.py: its intervals cover a difference that is known, and its words follow its numbers."""

import numpy as np
import pytest
import scipy.stats

import judge
from judge import Row

near = pytest.approx
CONDITIONS = [("s", f"t{i}") for i in range(9)]


def made(values, splits=None, seeds=1, **about) -> Row:
    """A row whose penalties are `values(seed, split, condition index)`, for the tested conditions of each split."""
    splits = splits or [range(9)]
    by_seed = {}
    for seed in range(seeds):
        by_seed[seed] = {}
        for j, tested in enumerate(splits):
            for i in tested:
                by_seed[seed][j, *CONDITIONS[i]] = values(seed, j, i)
    return Row(by_seed, **about)


def covered(item: dict, truth: float) -> bool:
    return item["low"] <= truth <= item["high"]


# ------------------------------------------------------------------------------------------------- simulated, and known


def test_overlapping_splits_of_a_retrained_method():
    """Nine treatments, four tested and five trained on in each of ten splits, training anew adds noise: an interval of
    s / sqrt(J) covers the true difference far less often than it says, the corrected one at least nine times in ten."""
    rng, corrected, naive = np.random.default_rng(0), 0, 0
    for _ in range(400):
        effects = 0.3 + rng.normal(size=9)  # treatments are a sample: the truth is 0.3
        splits = [rng.permutation(9)[:4] for _ in range(10)]
        level = rng.normal(0, 0.3, 10)  # of a training
        row = made(lambda seed, j, i: -effects[i] - level[j], splits, trained=True, fitted_to=5)
        item = judge.compare(row, made(lambda seed, j, i: 0.0, splits))
        assert (item["units"], item["n"], item["df"]) == ("splits", 10, near(9))
        corrected += covered(item, 0.3)
        half = scipy.stats.t.ppf(0.975, 9) * item["error"] / np.sqrt((1 / 10 + 4 / 5) / (1 / 10))
        naive += abs(item["difference"] - 0.3) <= half
    assert naive < 0.75 * 400 < 0.9 * 400 <= corrected


def test_conditions_of_a_method_that_is_not_retrained():
    """The same splits without training anew: the nine conditions are the units, and their interval covers."""
    rng, found = np.random.default_rng(1), 0
    for _ in range(400):
        effects = 0.3 + rng.normal(size=9)
        splits = [rng.permutation(9)[:4] for _ in range(10)]
        item = judge.compare(made(lambda seed, j, i: -effects[i], splits), made(lambda seed, j, i: 0.0, splits))
        assert item["units"] == "conditions" and item["n"] >= 8
        found += covered(item, 0.3)
    assert 0.92 * 400 <= found <= 0.98 * 400


def test_a_seed_moves_all_conditions_together():
    """Three trainings whose level differs by 1, conditions by 0.1: without the seeds' part the interval misses the true
    difference most of the time, with it about one time in twenty; df are near those of three seeds."""
    rng, found, without = np.random.default_rng(2), 0, 0
    for _ in range(400):
        level, noise = rng.normal(size=3), rng.normal(0, 0.1, size=9)
        row = made(lambda seed, j, i: -0.5 - level[seed] - noise[i], seeds=3, trained=True)
        rival = made(lambda seed, j, i: 0.0)
        item = judge.compare(row, rival)
        found += covered(item, 0.5)
        without += covered(judge.compare(row._replace(trained=False), rival), 0.5)
    assert without < 0.3 * 400 and found >= 0.92 * 400 and 2 <= item["df"] < 3


def test_units_of_one_split():
    """Systems if there are three, conditions if there are fewer; draws of cells were averaged before."""
    for systems, units in ((3, "held-out systems"), (2, "conditions")):
        keys = [(0, f"s{i % systems}", f"t{i}") for i in range(6)]
        row = Row({0: {key: float(i) for i, key in enumerate(keys)}})
        item = judge.compare(row, Row({0: dict.fromkeys(keys, 4.0)}))
        assert (item["units"], item["n"], item["difference"]) == (units, 3 if systems == 3 else 6, 1.5)
    assert item["error"] == near(np.std(range(6), ddof=1) / 6**0.5)
    assert judge.compare(row, Row({0: {(1, "s0", "t0"): 1.0}})) is None  # no common condition


# -------------------------------------------------------------------------------------------------------------- by hand


def test_what_is_read_from_files():
    """Two draws of a condition are averaged, an undefined one is left out; the pseudo-values of AUPRC get the mean that
    the tables show; a metric that has no conditions is one value for each split."""
    def file(draw, auprc, values, **meta):
        numbers = {"systems": ["s", "s"], "treatments": ["a", "b"], "auprc": auprc, "own": 7.0,
                   "conditions": {"auprc": values}}
        return {"meta": {"split": 0, "draw": draw, "trained_seed": 4, "fitted_to": 5} | meta, "metrics": numbers}

    files = [file(0, 0.5, [0.4, 1.0]), file(1, 0.7, [0.9, None])]
    row = judge.gather(files, "auprc", lambda value: -value)
    assert row == Row({4: {(0, "s", "a"): near(-(0.2 + 0.7) / 2), (0, "s", "b"): near(-0.8)}}, True, 5)
    assert judge.gather(files, "own", lambda value: value).by_seed == {4: {(0, "all", "all"): 7}}
    files = [file(0, None, [None, None])]
    assert judge.gather(files, "own", abs).mean() and not judge.compare(judge.gather(files, "auprc", abs), row)


def test_variances_are_added():
    """1 with 4 df and 3 with 2 df: error 2, df 16 / (1 / 4 + 9 / 2); the interval is where p passes 5%."""
    item = judge.t_test(1.5, [(1, 4), (3, 2)])
    assert item["error"] == 2 and item["df"] == near(16 / 4.75)
    assert judge.t_test((item["high"] - item["low"]) / 2, [(4, item["df"])])["p"] == near(0.05)
    assert judge.t_test(0.0, [(0, 4)])["p"] == 1 and judge.t_test(0.1, [(0, 4)])["p"] == 0
    assert judge.t_test(0.1, [])["error"] is None


def test_holm_by_hand():
    """0.01 x 3, 0.02 x 2, 0.03 x 1, which does not fall; the order of the answer is that of the question."""
    assert judge.holm([0.03, 0.01, 0.02]) == [near(0.04), near(0.03), near(0.04)]
    assert judge.holm([0.6, 0.4]) == [near(0.8), near(0.8)] and judge.holm([]) == []


def item(difference, error=1.0, trainings=None, what="x") -> dict:
    return judge.t_test(float(difference), [(error**2, 20)]) | {"trainings": trainings, "what": what}


def test_outcomes():
    """Clear differences are better and worse, small ones are not told apart, two trainings of either row are too few,
    and a difference that is clear alone is not among ten."""
    items = judge.decide([item(9), item(-9), item(0.5), item(9, trainings=2), item(9, trainings=3)])
    assert [i["outcome"] for i in items] == ["better", "worse", "not told apart", "undecided", "better"]
    assert judge.decide([item(2.5)])[0]["outcome"] == "better"
    assert judge.decide([item(2.5) for _ in range(10)])[0]["outcome"] == "not told apart"
    alone = judge.t_test(3.0, []) | {"trainings": None, "what": "one unit"}
    assert judge.decide([alone])[0]["outcome"] == "undecided"


def test_on_par_needs_precision():
    """0.02 below with a margin of 0.05: on par with a small error, not with a large one, which an earlier rule (above
    minus two errors) passed the more easily the larger it was; clearly below the margin is worse."""
    outcomes = [judge.decide([item(-0.02, error)], margin=0.05)[0]["outcome"] for error in (0.01, 0.05, 1)]
    assert outcomes == ["on par", "not told apart", "not told apart"]
    assert judge.decide([item(-0.2, 0.01)], margin=0.05)[0]["outcome"] == "worse"
    bound = judge.decide([item(-0.02, 0.01)], margin=0.05)[0]["bound"]
    assert bound == near(-0.02 - scipy.stats.t.ppf(0.95, 20) * 0.01)


def test_hardest_of_several_rivals():
    """Not the smallest difference, but the least certain one; a loss is corrected for the number of rivals."""
    found = judge.hardest([item(1, 0.1, what="near"), item(2, 5, what="unsure")])
    assert found["what"] == "unsure" and found["p"] == item(2, 5)["p"]
    found = judge.hardest([item(-2.4), item(3), item(4)])
    assert found["p"] == near(3 * item(-2.4)["p"])


def test_no_loss_is_hidden():
    """The verdict names every item in which the claim does not hold, losses first."""
    items = [item(9, what="RMSE against A"), item(0.1, what="PDS against A"), item(-9, what="W2 against B"), item(9)]
    assert judge.verdict(judge.decide(items)) == "holds in 2 of 4; worse: W2; not told apart: PDS"
    items = [item(-9, what="MR against A"), item(9, what="MR against B")]
    assert judge.verdict(judge.decide(items)) == "holds in 1 of 2; worse: MR against A"
    assert judge.verdict(judge.decide([item(9), item(8)])) == "holds"
    assert judge.verdict(judge.decide([item(9, trainings=1), item(-9, trainings=1)])) == "undecided"


def test_trainings_and_draws():
    """Three trainings of each are compared by Welch's test; less spread is seen by Pitman and Morgan's, whatever the
    level, and nothing where both are the same."""
    few, many = [1.0, 2.0, 3.0], [5.0, 5.1, 5.2]
    found = judge.two_samples(many, few)
    expected = scipy.stats.ttest_ind(many, few, equal_var=False)
    assert found["p"] == near(expected.pvalue) and found["df"] == near(expected.df) and found["trainings"] == 3
    assert judge.two_samples(many[:1], few)["p"] is None
    rng = np.random.default_rng(0)
    steady = rng.normal(0, 0.1, 10)
    found, = judge.decide([judge.less_spread(list(7 + steady), list(rng.normal(0, 3, 10)))])
    assert found["outcome"] == "better" and found["difference"] > 1
    assert judge.less_spread(list(steady), list(steady))["p"] is None
