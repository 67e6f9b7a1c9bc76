"""Claims about simulator.py: where networks settle, what knock-outs reach, and how noise behaves."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import sergio_rs

import simulator
from simulator import Change

CHAIN = np.zeros((5, 5))  # row: target. A -> B -> C -> D activate, A -| E represses
CHAIN[[1, 2, 3], [0, 1, 2]], CHAIN[4, 0] = 4.0, -3.0
A, B, C, D, E = range(5)
DECAY, BASAL = np.array([0.5, 0.8, 1.0, 0.6, 0.9]), np.array([2.0, 0, 0, 0, 0])


def network(noise=0.5, hill=2.0):
    return simulator.pack(CHAIN, np.full((5, 5), hill), BASAL, DECAY, noise)


def means(k, cells=2000, steps=simulator.STEPS):
    return np.asarray(simulator.knock_outs(k, cells, steps, key=jr.key(0)).mean(axis=1))


def test_settles_where_it_should():
    """Without noise every gene of the wild type is at b / lambda, or half of its regulators' strength over lambda."""
    expected = np.where(BASAL > 0, BASAL, np.abs(CHAIN).sum(axis=1) / 2) / DECAY
    np.testing.assert_allclose(means(network(noise=0.0), 2)[0], expected, rtol=1e-4)


def test_effects_go_down_the_graph():
    """Knocking out A takes B, C and D down to nothing and E up to all of its strength; knocking out C moves D only."""
    wild, *knocked_out = means(network(noise=0.0), 2)
    np.testing.assert_allclose(knocked_out[A], [0, 0, 0, 0, 3 / DECAY[E]], atol=1e-3)
    moved = np.abs(knocked_out[C] - wild) > 1e-3
    assert moved.tolist() == [False, False, True, True, False]


def test_twins():
    """A cell has the same noise in every condition: a gene that is not downstream of the knock-out is the same, cell by
    cell; one that is differs."""
    cells = np.asarray(simulator.knock_outs(network(), 500, key=jr.key(1)))
    assert (cells >= 0).all() and (cells[1 + C][:, C] < 0.2).all()
    for gene in (A, B, E):
        np.testing.assert_array_equal(cells[1 + C][:, gene], cells[0][:, gene])
    assert np.abs(cells[1 + C][:, D] - cells[0][:, D]).mean() > 0.5


def test_cells_are_independent():
    """Means of 100 cells scatter by the standard deviation of a cell over ten; moments of one trajectory, which are
    alike, would have means that scatter much more."""
    found = [np.asarray(simulator.knock_outs(network(), 100, key=jr.key(seed)))[0] for seed in range(60)]
    scatter = np.std([cells.mean(axis=0) for cells in found], axis=0)
    expected = np.std(np.concatenate(found), axis=0) / 10
    assert (0.7 * expected < scatter).all() and (scatter < 1.4 * expected).all()


def test_noise_of_a_master_regulator():
    """Its variance is zeta^2 times its mean, as the equation has it: production and decay bring half each."""
    cells = np.asarray(simulator.knock_outs(network(noise=0.3), 20_000, 80, key=jr.key(3)))[0, :, A]
    assert cells.var() == pytest.approx(0.3**2 * cells.mean(), rel=0.06)  # less what is not yet forgotten


@pytest.mark.parametrize("noise, bias", [(0.5, 0.0), (1.5, 0.05)])
def test_shorter_steps(noise, bias):
    """Half the step: the same means, within four standard errors and, where noise is the prior's most and expression is
    often cut at 0, a twentieth of the mean."""
    k = network(noise)
    coarse, fine = (np.asarray(simulator.knock_outs(k, 8000, steps, key=jr.key(4))) for steps in (40, 80))
    error = np.sqrt((coarse.var(axis=1) + fine.var(axis=1)) / 8000)
    difference = np.abs(coarse.mean(axis=1) - fine.mean(axis=1))
    assert (difference < 4 * error + bias * fine.mean(axis=1) + 0.005).all()


def test_partial_knock_outs():
    """Half of the dose is half of the expression; half of the activity leaves the gene and halves what its targets see;
    a cell that escapes is as the wild type."""
    k = network(noise=0.0, hill=1.0)
    whole, half = jnp.ones(5), jnp.ones(5).at[A].set(0.5)
    wild, less, idle = (simulator.steady_state(k, Change(*change))
                        for change in ((whole, whole), (half, whole), (whole, half)))
    assert less[A] == pytest.approx(wild[A] / 2) and less[B] == pytest.approx(wild[B] * 2 / 3)  # 1/3 of 4, not 1/2
    assert idle[A] == wild[A] and idle[B] == pytest.approx(less[B])
    dose = jnp.ones((5, 1, 3)).at[A, :, :2].set(0.0)  # the third cell escapes
    cells, = simulator.conditions(k, Change(dose, jnp.ones((5, 1, 1))), 3, key=jr.key(0))
    np.testing.assert_allclose(cells[2], wild, rtol=1e-4)
    np.testing.assert_allclose(cells[:2, :4], 0, atol=1e-3)


def test_networks_of_as_many_genes_compile_once():
    """Edges are filled up to a common number, with some that have no strength."""
    more = CHAIN.copy()
    more[4, 1] = 1.0
    few, many = (simulator.pack(s, np.full((5, 5), 2.0), BASAL, DECAY, 0.5) for s in (CHAIN, more))
    assert few.source.shape == many.source.shape == (5,) and (few.strength != 0).sum() == 4


# ------------------------------------------------------------------------- against sergio-rs, on the same networks

NETWORK = np.zeros((7, 7))  # A -> B -> C -> D as above; F and G regulate E together with A
NETWORK[[1, 2, 3, 4, 4, 4], [0, 1, 2, 0, 5, 6]] = 4.0, 3.0, 5.0, 2.0, 3.0, 4.0
HILL = np.full((7, 7), 2.0)
HILL[[1, 3, 4], [0, 2, 5]] = 1.0, 3.0, 1.0
SPEEDS, RATE = np.array([0.5, 0.8, 1.0, 0.6, 0.9, 0.7, 0.75]), 2.0


def theirs(knocked_out: int | None, cells: int, seed: int, noise=0.7) -> np.ndarray:
    """Expression by sergio-rs, before technical noise; a gene that is knocked out is 0."""
    genes = [sergio_rs.Gene(f"{i:04}", speed) for i, speed in enumerate(SPEEDS)]
    grn = sergio_rs.GRN()
    for target, source in np.argwhere(NETWORK):
        grn.add_interaction(genes[source], genes[target], NETWORK[target, source], None, int(HILL[target, source]))
    grn.set_mrs()
    rates = sergio_rs.MrProfile.from_random(grn, 1, (RATE - 2e-6, RATE - 1e-6), (RATE, RATE + 1e-6), 1)
    if knocked_out is not None:
        grn, rates = grn.ko_perturbation(f"{knocked_out:04}", rates)
    frame = sergio_rs.Sim(grn, cells, 150, 10, 0.01, noise, seed).simulate(rates)
    found = np.zeros((cells, 7))
    present = [int(name) for name in frame.drop_in_place("Genes")]
    found[:, present] = frame.to_numpy().T
    return found


def ours(cells: int, seed: int, noise=0.7) -> np.ndarray:
    """The same by our simulator, for control and all knock-outs."""
    k = simulator.pack(NETWORK, HILL, np.where(NETWORK.any(axis=1), 0, RATE), SPEEDS, noise)
    return np.asarray(simulator.sergio_knock_outs(k, jnp.full(7, RATE), cells, key=jr.key(seed)))


@pytest.fixture(scope="module")
def long() -> tuple[np.ndarray, dict]:
    """8,000 cells of ours in all conditions, and as many of sergio-rs in control and the knock-outs of A and C."""
    return ours(8000, 0), {t: theirs(None if t == 0 else t - 1, 8000, 5) for t in (0, 1 + A, 1 + C)}


@pytest.mark.parametrize("condition", [0, 1 + A, 1 + C])
def test_means_spreads_and_correlations_are_sergio_s(long, condition):
    """Of control and of two knock-outs, one of which leaves an orphan: within Monte-Carlo error of trajectories whose
    correlation time is about 1 / lambda, that is 100 to 200 steps, so that 8,000 cells are worth 400 or more."""
    mine, other = long[0][condition], long[1][condition]
    moved = np.abs(mine.mean(axis=0) - other.mean(axis=0))
    error = np.sqrt((mine.var(axis=0) + other.var(axis=0)) / 400)
    assert (moved <= 4 * error).all()
    np.testing.assert_allclose(mine.std(axis=0), other.std(axis=0), rtol=0.2)
    present = other.std(axis=0) > 0
    correlations = [np.corrcoef(cells[:, present].T) for cells in (mine, other)]
    np.testing.assert_allclose(*correlations, atol=0.2)


def test_sergio_moves_direct_targets_only(long):
    """Knocking out A: B, an orphan, is produced at a rate of its own, E loses a third of its regulators, C and D stay,
    in both simulators, and unlike in the causal prior."""
    for control, knocked_out in ((long[0][0], long[0][1 + A]), (long[1][0], long[1][1 + A])):
        before, after = control.mean(axis=0), knocked_out.mean(axis=0)
        assert after[A] == 0 and after[B] == pytest.approx(RATE / SPEEDS[B], rel=0.1)
        assert after[E] / before[E] == pytest.approx(7 / 9, rel=0.1)
        np.testing.assert_allclose(after[[C, D]], before[[C, D]], rtol=0.15)
    causal = simulator.pack(NETWORK, HILL, np.where(NETWORK.any(axis=1), 0, RATE), SPEEDS, 0.0)
    wild, without_a = np.asarray(simulator.knock_outs(causal, 2, key=jr.key(0)))[[0, 1 + A], 0]
    assert (without_a[[B, C, D]] < 0.01 * wild[[B, C, D]]).all()


def test_cells_are_moments_of_one_trajectory():
    """Means of 100 cells differ from seed to seed as much as sergio-rs's do, and far more than those of independent
    cells would."""
    mine, other = (np.array([simulate(100, seed) for seed in range(40)])
                   for simulate in (lambda n, seed: ours(n, seed)[0], lambda n, seed: theirs(None, n, seed)))
    independent = np.sqrt(mine.var(axis=1).mean(axis=0) / 100)
    spreads = [cells.mean(axis=1).std(axis=0, ddof=1) for cells in (mine, other)]
    assert np.mean(spreads[0] / spreads[1]) == pytest.approx(1, abs=0.25)
    assert (spreads[0] > 2 * independent).all()


def test_knock_outs_share_noise_as_in_sergio(long):
    """Two knock-outs agree cell by cell in what neither of them reaches, control with none; so it is in sergio-rs."""
    for cells in long:
        assert np.corrcoef(cells[1 + A][:, 6], cells[1 + C][:, 6])[0, 1] > 0.95
        assert abs(np.corrcoef(cells[0][:, 6], cells[1 + C][:, 6])[0, 1]) < 0.3


def test_technical_noise_is_sergio_s():
    """Against sergio-rs on the same expression: share of zeros, mean and spread of a cell's counts, and the mean counts
    of each gene but outliers agree, at three percentiles of dropout; a dead cell has no counts."""
    rng = np.random.default_rng(0)
    expression = rng.lognormal(1, 1, (1, 2000, 20))
    for dropout in (0.0, 45.0, 80.0):
        ours = simulator.technical_noise(rng, expression, 0.8, (5.0, 0.5), dropout)[0]
        theirs = sergio_rs.add_technical_noise_custom(np.ascontiguousarray(expression[0].T), 0.8, 5.0, 0.5, 8.0, dropout,
                                                      1).T.astype(float)
        assert (ours == 0).mean() == pytest.approx((theirs == 0).mean(), abs=0.02)
        logs = [np.log1p(counts.sum(axis=1)) for counts in (ours, theirs)]
        assert logs[0].mean() == pytest.approx(logs[1].mean(), abs=0.06)
        assert logs[0].std() == pytest.approx(logs[1].std(), rel=0.1)
        ratio = ours.mean(axis=0) / theirs.mean(axis=0)
        assert (np.abs(np.log(ratio)) < 0.25).sum() >= 17  # of 20; the library makes outliers of other genes
    dead = np.concatenate([expression, np.zeros_like(expression)])
    counts = simulator.technical_noise(rng, dead, 0.8, (5.0, 0.5), 60.0)
    assert counts[0].any() and not counts[1].any()
