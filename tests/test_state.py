"""Claims about baselines/state.py: cells see each other, their order says nothing."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import scipy.stats
from scipy.spatial.distance import cdist
from test_baselines import GENES, OPTIONS, SYSTEMS, fitted, make_screen, moved_by

from baselines import fitting, state

SMALL = OPTIONS["state"]
HOT = jnp.eye(GENES)[1]


def build(level=0.0, log_expression=False, **changes):
    options = dataclasses.replace(SMALL, **changes)
    network, = state.State.build(options, jnp.full(GENES, level), SYSTEMS, log_expression, key=jr.key(0))
    return network


apply = eqx.filter_jit(lambda network, *inputs: network(*inputs))


def cells_of(seed, n=20, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=(n, GENES)), jnp.float32)


def test_spread_is_learnt():
    """Predicted cells of a treatment vary as true cells do, and SCM values may be negative."""
    cells = moved_by(fitted("state"), 2)
    assert cells.var(0).mean() == pytest.approx(0.25, rel=0.4) and cells.min() < -0.5


def test_the_system_is_in_the_cells():
    """Control cells of another system are answered otherwise."""
    screen = make_screen()
    apart = moved_by(fitted("state"), 1, 1).mean(0) - moved_by(fitted("state"), 1, 0).mean(0)
    assert (apart > 0.8).all()  # the systems are 2 apart
    assert np.array_equal(moved_by(fitted("state"), 1, 0, screen.pool(1, 0)), moved_by(fitted("state"), 1, 1))


def test_sets_have_the_size_of_training():
    """Cells are answered in sets of the trained size: two at once as one by one, a lone cell as copies of itself."""
    controls = make_screen().pool(2, 0)

    def answer(cells):
        return moved_by(fitted("state"), 1, cells=cells)

    parts = [answer(controls[:20]), answer(controls[20:40])]
    np.testing.assert_allclose(answer(controls[:40]), np.concatenate(parts), atol=1e-5)
    np.testing.assert_allclose(answer(controls[:1])[0], answer(controls[:1].repeat(20, 0))[0], atol=1e-5)
    assert answer(controls[:23]).shape == (23, GENES)


# ---------------------------------------------------------------------------------------------------------- the network


def test_cells_have_no_place_but_see_each_other():
    """Permuting cells permutes the outputs; another last cell changes the first one's answer, and the other way
    round: there is no mask."""
    network, x, order = build(), cells_of(0), np.random.default_rng(0).permutation(20)
    np.testing.assert_allclose(apply(network, x[order], HOT), apply(network, x, HOT)[order], atol=1e-5)
    for changed, seen in ((-1, 0), (0, -1)):
        assert np.abs(apply(network, x.at[changed].add(5), HOT) - apply(network, x, HOT))[seen].max() > 1e-4


def test_a_block_by_another_route():
    """A block equals the same in NumPy: softmax attention of normalised cells, then a gated network, both added."""
    block, h = build().blocks[0], np.random.default_rng(0).normal(size=(7, SMALL.width))

    def times(x, linear):
        return x @ np.asarray(linear.weight, float).T

    def normal(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)

    q, k, v = np.split(times(normal(h), block.qkv), 3, axis=1)
    attended = []
    for head in np.split(np.arange(SMALL.width), SMALL.heads):
        scores = np.exp(q[:, head] @ k[:, head].T / np.sqrt(len(head)))
        attended.append(scores / scores.sum(1, keepdims=True) @ v[:, head])
    middle = h + times(np.concatenate(attended, axis=1), block.out)
    gate, value = np.split(times(normal(middle), block.expand), 2, axis=1)
    expected = middle + times(gate / (1 + np.exp(-gate)) * value, block.contract)
    np.testing.assert_allclose(apply(block, jnp.asarray(h, jnp.float32)), expected, atol=1e-4)


def test_only_expression_is_rectified():
    """With log-expression data no output is below zero; the same network for SCM values has negative ones."""
    plain, cut = (np.asarray(apply(build(log_expression=flag), cells_of(0), HOT)) for flag in (False, True))
    assert (plain < 0).any()
    np.testing.assert_allclose(cut, np.maximum(plain, 0), atol=1e-6)


def test_rectified_genes_start_alive():
    """On log-expression data an untrained network starts around the mean of the training cells, with no gene cut off;
    started near zero instead, some genes are zero in all cells."""
    mean, zero = (apply(build(2.0, True, start_at_mean=choice), cells_of(0), HOT) for choice in (True, False))
    assert (mean > 0).all() and (zero == 0).all(0).any()


def test_width_and_heads_must_fit():
    """Heads that do not divide the width are refused with both numbers."""
    with pytest.raises(ValueError, match="width 32 .* heads .3."):
        build(heads=3)


# ------------------------------------------------------------------------------------------------------------- the loss


def test_energy_distance_by_other_routes():
    """It equals SciPy's distances of all pairs, and in one dimension half the square of SciPy's energy distance."""
    x, y = cells_of(0, 20), cells_of(1, 30, 2.0)
    expected = cdist(x, y).mean() - cdist(x, x).mean() / 2 - cdist(y, y).mean() / 2
    assert float(state.energy_distance(x, y)) == pytest.approx(expected, rel=1e-4)
    line = float(state.energy_distance(x[:, :1], y[:, :1]))
    assert line == pytest.approx(scipy.stats.energy_distance(x[:, 0], y[:, 0]) ** 2 / 2, rel=1e-3)


def test_energy_distance_of_a_set_with_itself():
    """It is zero, in any order of the cells, and its gradient is finite: equal cells do not make NaN."""
    x = cells_of(0)
    value, gradient = jax.value_and_grad(state.energy_distance)(x, x[::-1])
    assert float(value) == pytest.approx(0, abs=1e-6) and float(state.energy_distance(x, x + 1)) > 0.1
    assert np.isfinite(gradient).all()


def test_one_update_is_finite_and_clipped():
    """After one update all weights are finite and have moved by Adam's rate; a large gradient is clipped before it."""
    data, network = fitting.training_cells(make_screen(), controls_too=True), build()
    (adam,), step = state.State.make_step(SMALL)
    before = (network,), (adam.init(eqx.filter(network, eqx.is_inexact_array)),)
    ((after,), _), loss = eqx.filter_jit(step)(before, data, jnp.asarray(0), jr.key(1))
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), *(eqx.filter(n, eqx.is_array) for n in (network, after)))
    assert np.isfinite(loss) and all(0 < m < 1.1 * SMALL.learning_rate for m in jax.tree.leaves(moved))
    tree = jnp.full(4, 100.0)
    first_moment = optax.tree_utils.tree_get(adam.update(tree, adam.init(tree))[1], "mu")
    assert float(jnp.linalg.norm(first_moment)) == pytest.approx(0.1 * SMALL.clip, rel=1e-4)  # (1 - b1) times it
