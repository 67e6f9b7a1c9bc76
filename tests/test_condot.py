"""Claims about baselines/condot.py: potentials are convex, the map starts as the identity."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from test_baselines import GENES, OPTIONS, fitted, make_screen, one_hot

from baselines import condot, fitting

SMALL = OPTIONS["condot"]
transport = eqx.filter_jit(condot.transport)


def potential(seed=0, **changes) -> condot.Potential:
    return condot.Potential(GENES, dataclasses.replace(SMALL, **changes), key=jr.key(seed))


def test_identity_at_the_start():
    """T(x) = x within 1e-3 for any treatment at initialisation; an ordinary initialisation is far from that."""
    x = jr.normal(jr.key(1), (50, GENES)) + 1
    for seed, treatment in enumerate((jnp.zeros(GENES), 1.5 * jnp.eye(GENES)[2])):
        np.testing.assert_allclose(transport(potential(seed), x, treatment), x, atol=1e-3)
        assert jnp.abs(transport(potential(seed, identity_init=False), x, treatment) - x).mean() > 0.3


def test_convex_and_its_gradient():
    """Whatever the weights, f with Wz >= 0 is nowhere above its chords in x, and with a negative Wz it is somewhere;
    T equals finite differences of f."""
    start = potential(identity_init=False)
    keys = iter(jr.split(jr.key(0), len(jax.tree.leaves(start))))
    f = condot.clamp(jax.tree.map(lambda x: x + 0.3 * jr.normal(next(keys), x.shape), start))
    t, (a, b) = jnp.eye(GENES)[1], 3 * jr.normal(jr.key(1), (2, 200, GENES))
    value = eqx.filter_jit(jax.vmap(lambda f, x: f(x, t), (None, 0)))

    def above(f):
        return jnp.max(value(f, (a + b) / 2) - (value(f, a) + value(f, b)) / 2)

    assert above(f) < 1e-3
    assert above(eqx.tree_at(lambda f: f.layers[-1].convex, f, -f.layers[-1].convex - 0.1)) > 0.1
    x, step = a[0] / 3, 1e-2 * jnp.eye(GENES)
    slopes = (value(f, x + step) - value(f, x - step)) / 2e-2
    np.testing.assert_allclose(transport(f, x[None], t)[0], slopes, rtol=2e-2, atol=2e-2)


def test_one_quadratic_is_an_affine_map():
    """If all quadratics are alike, T(x) = A'A (x - m): what the network computes, and what one writes down."""
    a, m = jr.normal(jr.key(1), (GENES, GENES)), jr.normal(jr.key(2), (GENES,))
    g = eqx.tree_at(lambda g: (g.roots, g.centres), potential(), (jnp.tile(a, (GENES, 1, 1)), jnp.tile(m, (GENES, 1))))
    x = 2 * jr.normal(jr.key(3), (50, GENES))
    np.testing.assert_allclose(transport(g, x, jnp.eye(GENES)[1]), (x - m) @ (a.T @ a).T, rtol=1e-3, atol=5e-3)


def test_penalty_by_hand():
    """The penalty is the norm of the negative entries; where there are none it is 0, and its gradient is not NaN."""
    g = potential()
    value, gradient = jax.value_and_grad(condot.negative_norm)(g)
    assert value == 0 and all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(gradient))
    bad = eqx.tree_at(lambda g: g.layers[1].convex, g, g.layers[1].convex.at[0, :2].set(jnp.array([-3.0, -4.0])))
    assert condot.negative_norm(bad) == pytest.approx(5)


def test_f_stays_convex():
    """After every single update f's Wz are >= 0, at a rate at which some would not be, and all values are finite."""
    (adam, _), step = condot.CondOT.make_step(dataclasses.replace(SMALL, learning_rate=0.1, inner=1))
    networks = potential(0), potential(1)
    state = networks, (adam.init(networks[0]), adam.init(networks[1]))
    data, step, zeros = fitting.training_cells(make_screen()), eqx.filter_jit(step), 0
    for i in range(8):
        state, loss = step(state, data, jnp.asarray(i), jr.key(i))
        weights = jnp.concatenate([layer.convex.ravel() for layer in state[0][0].layers])
        assert jnp.all(weights >= 0) and jnp.isfinite(loss)
        zeros += int((weights == 0).sum())
    assert zeros > 0


def test_the_other_potential_goes_back():
    """grad_x f brings moved cells back most of the way to where they were."""
    f, g = fitted("condot").networks
    controls, treatment = jnp.asarray(make_screen().pool(0, 0)), jnp.asarray(one_hot(1))
    moved = transport(g, controls, treatment)
    back = transport(f, moved, treatment)
    assert jnp.abs(back - controls).mean() < 0.6 * jnp.abs(moved - controls).mean()
