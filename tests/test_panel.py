"""Claims about panel.py: screens that look as laboratories make them."""

import numpy as np
import pytest

import panel
import prior
import scales
import simulator
import tasks
from tasks import ABSENT

GENES = 40


def strengths(seed=0) -> np.ndarray:
    return prior.sample_network(scales.generator("prior", 0, seed), GENES).strength


def test_pathways_have_many_targets_and_no_cycle():
    """Each factor has at least a twentieth of the genes as targets, no gene is its own ancestor, and nobody signals to
    two factors, or is one."""
    for seed in range(8):
        before = strengths(seed)
        strength, factors, signals_to = panel.add_pathways(np.random.default_rng(seed), before)
        assert ((strength[:, factors] != 0).sum(axis=0) >= 0.04 * GENES).all()
        reached = panel.reaches(strength != 0) & ~np.eye(GENES, dtype=bool)
        assert not (reached & reached.T).any()
        assert set(signals_to) - {-1} == set(factors.tolist()) and (signals_to[factors] == -1).all()
        np.testing.assert_array_equal(strength[:, np.setdiff1d(range(GENES), factors)],
                                      before[:, np.setdiff1d(range(GENES), factors)])


def test_a_signal_silences_its_factor_and_not_its_mrna():
    """Gene 2 signals to factor 0: its knock-out lowers what factor 0 drives as the factor's own does, and leaves the
    mRNA of the factor as it was; cells that escape are as before."""
    strength = np.zeros((4, 4))
    strength[[1, 3], 0] = 4.0
    rates = np.array([3.0, 0, 2.0, 0])
    k = simulator.pack(strength, np.full((4, 4), 2.0), rates, np.ones(4), 0.0)
    change = panel.changes(np.random.default_rng(1), np.array([0, 2]), np.array([-1, -1, 0, -1]), 4, 300)
    cells = np.asarray(simulator.conditions(k, change, 300, key=scales.key("prior", 0)))
    control, factor, signal, nothing = cells
    np.testing.assert_allclose(nothing, control)
    np.testing.assert_allclose(signal[:, 0], control[:, 0])
    lower = [(treated[:, 1] < 0.99 * control[:, 1]).mean() for treated in (factor, signal)]
    assert min(lower) >= 1 - panel.ESCAPE - 0.1 and min(lower) > 0.5
    escaped = signal[:, 1] > 0.99 * control[:, 1]
    np.testing.assert_allclose(signal[escaped], control[escaped], rtol=1e-4)


def test_screens_differ_in_how_much_a_knock_out_leaves():
    """The mRNA that is left is alike for the genes of a screen, and anything from none to all over screens."""
    left = []
    for seed in range(60):
        change = panel.changes(np.random.default_rng(seed), np.arange(6), np.full(6, -1), 7, 50)
        dose = np.asarray(change.dose)
        left.append([dose[gene, gene + 1].min() for gene in range(6)])
    left = np.array(left)
    assert left.std(axis=1).mean() < 0.2 < np.ptp(left.mean(axis=1)) and left.min() == 0 and left.max() == 1


def test_perturbed_genes_are_members_of_pathways_mostly():
    strength, factors, signals_to = panel.add_pathways(np.random.default_rng(3), strengths())
    members = np.concatenate([factors, np.flatnonzero(signals_to >= 0)])
    chosen = [panel.choose_perturbed(np.random.default_rng(seed), strength, members, 20) for seed in range(40)]
    share = [np.isin(perturbed, members).mean() for perturbed in chosen]
    assert np.mean(share) > len(members) / GENES + 0.2
    assert all(panel.PERTURBED[0] <= len(perturbed) == len(set(perturbed)) <= 20 for perturbed in chosen)


def test_panel_screen(tmp_path):
    """A screen of log-expression whose unperturbed genes have no condition, perturbed genes first, as data.py has
    them; what is held out can be predicted from two others; the same seed gives the same cells."""
    s = prior.Settings("panel", genes=10, systems=3, validation=1, test=1, population=40, test_population=30,
                       out=tmp_path, workers=1)
    prior.make_grn(s, prior.screen_folder(s))
    screen = tasks.load_screen(prior.screen_folder(s))
    measured = screen.count[:, 1:] > 0
    assert screen.log_expression and (screen.cells >= 0).all() and (screen.count[:, 0] > 0).all()
    assert (measured.sum(axis=1) >= panel.PERTURBED[0]).all()
    assert (np.diff(measured.astype(int), axis=1) <= 0).all()  # perturbed genes first
    assert ((screen.split[:, 1:] == ABSENT) == ~measured).all()
    assert len(tasks.evaluation_tasks(screen, 20, 4).target)
    again = prior.simulate_own(s, 1, 40)
    np.testing.assert_array_equal(again[0], screen.pool(1, 0))


@pytest.mark.parametrize("what", ["sergio", "causal"])
def test_other_priors_of_ours(tmp_path, what):
    """They are counts, and one network depends on its number only."""
    s = prior.Settings(what, genes=5, out=tmp_path)
    one, again, other = (prior.simulate_own(s, number, 30) for number in (1, 1, 2))
    assert len(one) == 6 and all(np.issubdtype(counts.dtype, np.integer) for counts in one)
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one[0], other[0])
