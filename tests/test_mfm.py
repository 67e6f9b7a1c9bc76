"""Claims about baselines/mfm.py: a population's embedding is invariant, networks take turns, populations decide."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from test_baselines import GENES, OPTIONS, SYSTEMS, fit, fitted, make_screen, moved_by, one_hot

from baselines import fitting, mfm

SMALL = OPTIONS["mfm"]


def opposite_screen():
    """Every treatment moves cells up by 2, but down in the system in the middle."""
    shifts = np.full((SYSTEMS, GENES + 1, GENES), 2.0) * np.array([1, -1, 1])[:, None, None]
    shifts[:, 0] = 0
    return make_screen(shifts)


def midpoint(velocity, cells, steps=1000):
    """The ODE by many small steps."""
    def step(x, i):
        half = x + velocity(x, i / steps) / (2 * steps)
        return x + velocity(half, (i + 0.5) / steps) / steps, None

    return jax.jit(lambda x: jax.lax.scan(step, x, jnp.arange(float(steps)))[0])(cells)


def test_the_population_decides():
    """An effect of opposite sign in two populations is learnt, and a cell goes the way of its population."""
    screen = opposite_screen()
    method = fit("mfm", screen)
    for system, way in enumerate((1, -1)):
        cells = screen.pool(system, 0)
        assert way * (moved_by(method, 1, cells=cells) - cells).mean() == pytest.approx(2, abs=0.6)
    stranger = np.vstack([screen.pool(1, 0)[:1], screen.pool(0, 0)[1:]])
    at_home = moved_by(method, 1, cells=screen.pool(1, 0))[0]
    assert np.abs(moved_by(method, 1, cells=stranger)[0] - at_home).max() > 0.5


@pytest.mark.parametrize("neighbours", [0, 3])
def test_embedding(neighbours):
    """The embedding has length 1, ignores the order of cells, differs between populations, and equals plain loops."""
    encoder = mfm.Encoder(GENES, 8, neighbours, key=jr.key(0))
    x, y = (np.random.default_rng(s).normal(s, 1, (12, GENES)).astype(np.float32) for s in range(2))
    phi = encoder(jnp.asarray(x))
    assert float(jnp.linalg.norm(phi)) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(encoder(jnp.asarray(x[::-1].copy())), phi, atol=1e-5)
    assert np.abs(encoder(jnp.asarray(y)) - phi).max() > 1e-2
    distance = np.linalg.norm(x[:, None] - x, axis=-1)
    near = distance.argsort(axis=1)[:, : neighbours + 1]  # the cell itself comes first
    h = x
    for layer in encoder.layers:
        h = np.array([np.maximum(np.asarray(layer.weight) @ h[index].mean(0) + layer.bias, 0) for index in near])
    np.testing.assert_allclose(phi, h.mean(0) / np.linalg.norm(h.mean(0)), atol=1e-5)


def test_a_dead_embedding_is_finite():
    """If every ReLU is off the embedding is zero, and so is its gradient: no NaN."""
    encoder = mfm.Encoder(GENES, 8, 3, key=jr.key(0))
    encoder = eqx.tree_at(lambda e: e.layers[1].bias, encoder, jnp.full(8, -100.0))
    value, gradient = eqx.filter_value_and_grad(lambda e: e(jnp.ones((5, GENES))).sum())(encoder)
    assert value == 0 and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def distance(a, b) -> float:
    """Mean absolute difference of two networks' parameters."""
    leaves = zip(jax.tree.leaves(eqx.filter(a, eqx.is_array)), jax.tree.leaves(eqx.filter(b, eqx.is_array)))
    return np.mean([np.abs(x - y).mean() for x, y in leaves])


def test_one_network_at_a_time():
    """A step is Adam's on the flow with the old encoder, then Adam's on the encoder with the new flow; by hand."""
    data, key = fitting.training_cells(make_screen()), jr.key(3)
    (adam, _), step = mfm.MFM.make_step(SMALL)
    encoder, flow = networks = mfm.MFM.build(SMALL, jnp.zeros(GENES), SYSTEMS, False, key=jr.key(0))
    states = tuple(adam.init(eqx.filter(network, eqx.is_inexact_array)) for network in networks)
    ((new_encoder, new_flow), _), loss = eqx.filter_jit(step)((networks, states), data, jnp.asarray(0), key)
    assert np.isfinite(loss)

    draw = jax.jit(lambda key: mfm.draw(data, SMALL, key=key))
    key_flow, key_encoder = jr.split(key)

    def by_hand(loss, model, other, state):
        batches, keys = draw(key_flow if model is flow else key_encoder)
        gradient = eqx.filter_jit(eqx.filter_grad(loss))(model, other, batches, keys)
        return eqx.apply_updates(model, optax.adam(SMALL.learning_rate).update(gradient, state)[0])

    expected = by_hand(mfm.flow_loss, flow, encoder, states[1])
    assert distance(expected, new_flow) < 1e-4 < distance(flow, new_flow)
    assert np.array_equal(flow.frequencies, new_flow.frequencies)  # frozen
    assert distance(by_hand(mfm.encoder_loss, encoder, expected, states[0]), new_encoder) < 1e-4
    assert distance(by_hand(mfm.encoder_loss, encoder, flow, states[0]), new_encoder) > 1e-4


def test_solver_agrees_with_small_steps():
    """The solver ends nearly where 1000 midpoint steps of its velocity end."""
    encoder, flow = fitted("mfm").networks
    cells, treatment = jnp.asarray(make_screen().pool(2, 0)), jnp.asarray(one_hot(1))
    embedding, velocity = encoder(cells), jax.vmap(flow, (0, None, None, None))
    end = midpoint(lambda x, t: velocity(x, t, embedding, treatment), cells)
    np.testing.assert_allclose(moved_by(fitted("mfm"), 1), end, atol=0.05)  # at the default tolerance, 1e-4


@pytest.mark.parametrize("cells", [1, 2])
def test_fewer_cells_than_neighbours(cells):
    """A population smaller than the graph's K is a complete graph, a single cell its own only neighbour."""
    few = make_screen().pool(0, 0)[:cells]
    assert mfm.nearest(jnp.asarray(few), 3).shape == (cells, cells - 1)
    assert np.isfinite(moved_by(fitted("mfm"), 1, cells=few)).all()


def test_frozen_frequencies_are_no_parameters():
    """What is never trained is not counted."""
    method = fitted("mfm")
    assert method.parameters == fitting.count_parameters(method.networks) - SMALL.features * GENES
