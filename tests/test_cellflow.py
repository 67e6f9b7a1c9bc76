"""Claims about baselines/cellflow.py: cells are coupled by optimal transport, a system is known by its number."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.optimize
from test_baselines import (GENES, LEVELS, OPTIONS, SYSTEMS, fit, fitted, make_screen, moved_by, one_hot)
from test_mfm import midpoint, opposite_screen

from baselines import cellflow, fitting

SMALL = OPTIONS["cellflow"]


def test_the_system_decides():
    """An effect of opposite sign in two systems is learnt, from the number of the system alone."""
    screen = opposite_screen()
    method = fit("cellflow", screen)
    for system, way in enumerate((1, -1)):
        cells = screen.pool(system, 0)
        assert way * (moved_by(method, 1, system, cells) - cells).mean() == pytest.approx(2, abs=0.6)
    cells = screen.pool(0, 0)
    assert np.abs(moved_by(method, 1, 1, cells) - moved_by(method, 1, 0, cells)).max() > 0.5


# --------------------------------------------------------------------------------------------------------- the coupling


def pure_shift(n=24, genes=20, size=0.5):
    """Cells, the same cells each moved by `size` in every gene and in another order, and where each of them went."""
    rng = np.random.default_rng(0)
    x, order = rng.normal(0, 1, (n, genes)).astype(np.float32), rng.permutation(n)
    return jnp.asarray(x), jnp.asarray(x[order] + np.float32(size)), order.argsort()


def squared_distances(x, y) -> np.ndarray:
    return ((np.asarray(x, float)[:, None] - np.asarray(y, float)) ** 2).sum(-1)


def test_plan_is_a_coupling():
    """Rows and columns of the plan sum to 1/n, and it equals Sinkhorn's iteration written out."""
    x, y, _ = pure_shift()
    plan = cellflow.coupling(x, y, 0.1)
    np.testing.assert_allclose(plan.sum(0) * len(x), 1, atol=5e-3)
    np.testing.assert_allclose(plan.sum(1) * len(x), 1, atol=5e-3)
    cost = squared_distances(x, y)
    kernel, v = np.exp(-cost / cost.mean() / 0.1), np.ones(len(y))
    for _ in range(500):
        u = 1 / len(x) / (kernel @ v)
        v = 1 / len(y) / (u @ kernel)
    np.testing.assert_allclose(plan, u[:, None] * kernel * v, atol=1e-4)


def test_small_epsilon_is_the_assignment():
    """With a small epsilon the partners are those of the best one-to-one assignment, here of a random pair of sets."""
    x, y = jnp.asarray(np.random.default_rng(1).normal(size=(2, 12, 5)), jnp.float32)
    _, best = scipy.optimize.linear_sum_assignment(squared_distances(x, y))
    drawn = cellflow.partners(cellflow.coupling(x, y, 0.003), key=jr.key(0))
    assert np.mean(np.asarray(drawn) == best) > 0.8


def test_default_epsilon_finds_the_pairs_of_a_shift():
    """Of a pure shift most mass is on the true pairs at the default epsilon, and hardly any at the released 1."""
    x, y, partner = pure_shift()
    for epsilon, low, high in ((cellflow.Options().epsilon, 0.7, 1), (1.0, 0, 0.2)):
        assert low < cellflow.coupling(x, y, epsilon)[np.arange(len(x)), partner].sum() < high


def test_partners_follow_the_plan():
    """Partners are drawn row by row with the probabilities of the plan."""
    plan = jnp.array([[0.4, 0.1], [0.0, 0.5]])
    drawn = jax.vmap(lambda key: cellflow.partners(plan, key=key))(jr.split(jr.key(0), 400))
    np.testing.assert_allclose((drawn == 1).mean(0), [0.2, 1], atol=0.06)


def test_coupling_stays_in_the_system():
    """Control and treated cells that are coupled are of one system, the one that the batch names."""
    screen = make_screen(np.zeros((SYSTEMS, GENES + 1, GENES)))
    data = fitting.training_cells(dataclasses.replace(screen, cells=screen.cells * 10))
    batch = jax.jit(lambda key: fitting.draw_many(data, 16, 50, key=key))(jr.key(0))
    for cells in (batch.controls, batch.treated):
        np.testing.assert_allclose(cells.mean((1, 2)), 10 * LEVELS[batch.system], atol=4)
    assert len(np.unique(batch.system)) == SYSTEMS


# ---------------------------------------------------------------------------------------------------- training and flow


@pytest.mark.parametrize("rate, kept", [(0.9, 0.1), (0.0, 1.0)])
def test_dropout_is_for_training_only(rate, kept):
    """With a key most of the encoding is dropped at 0.9 and none at 0; without a key none ever is."""
    options = dataclasses.replace(SMALL, embedding=500, condition_dropout=rate)
    model = cellflow.Velocity(GENES, SYSTEMS, options, key=jr.key(0))
    hots = jnp.asarray(one_hot(1)), jax.nn.one_hot(0, SYSTEMS)
    assert np.mean(np.asarray(model.condition(*hots, key=jr.key(1))) != 0) == pytest.approx(kept, abs=0.05)
    assert (np.asarray(model.condition(*hots)) != 0).all()


def test_solver_agrees_with_small_steps():
    """The adaptive solver ends where 1000 midpoint steps of the same velocity end, to 1e-3; a cell alone goes where it
    goes among others."""
    model, = fitted("cellflow").networks
    cells = make_screen().pool(2, 0)
    condition = model.condition(jnp.asarray(one_hot(1)), jax.nn.one_hot(2, SYSTEMS))
    velocity = jax.vmap(model, (0, None, None))
    end = midpoint(lambda x, t: velocity(x, t, condition), jnp.asarray(cells))
    np.testing.assert_allclose(moved_by(fitted("cellflow"), 1), end, atol=1e-3)
    np.testing.assert_allclose(moved_by(fitted("cellflow"), 1, cells=cells[:1]), end[:1], atol=2e-3)


def test_unseen_system():
    """A system never trained on counts as none at all, whatever its number."""
    screen = make_screen()
    split = screen.split.copy()
    split[1, 1:] = -1
    method = fit("cellflow", dataclasses.replace(screen, split=split), updates=0)
    assert list(method.told[-1].systems) == [True, False, True]
    unknown = moved_by(method, 1, 1)
    assert np.isfinite(unknown).all() and np.array_equal(unknown, moved_by(method, 1, 99, screen.pool(1, 0)))
    assert not np.allclose(unknown, moved_by(method, 1, 0, screen.pool(1, 0)))
