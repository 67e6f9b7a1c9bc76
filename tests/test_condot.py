"""Claims about baselines/condot.py: potentials are convex, the map starts as the identity and learns known shifts."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import metrics
from baselines import condot, fitting
from baselines.condot import CondOT, Options, Potential
from data import TEST, TRAIN, Screen

GENES, POOL = 4, 80
OPTIONS = Options(updates=300, batch=32, learning_rate=3e-3, inner=5, hidden=16)  # one for all fits: compiled once


def make_screen(contexts=2, *, log_expression=False) -> Screen:
    """Cells of (c, t) are N(3 + c, 1/4) plus the effect of t, which is of gene t-1. Gene 4 is never treated; the last
    treatment is TEST in the last context."""
    rng, treatments = np.random.default_rng(0), GENES
    cells = rng.normal(0, 0.5, (contexts, treatments, POOL, GENES)) + EFFECTS[:, None]
    cells += 3 + np.arange(contexts)[:, None, None, None]
    order, hot = np.arange(contexts * treatments).reshape(contexts, treatments), np.eye(treatments, GENES + 1)[:, 1:]
    split = np.full((contexts, treatments), TRAIN)
    split[-1, -1] = TEST
    names = lambda letter, n: tuple(f"{letter}{i}" for i in range(n))
    return Screen(cells=cells.reshape(-1, GENES).astype(np.float32), start=order * POOL,
                  count=np.full((contexts, treatments), POOL),
                  treatments=np.tile(hot, (contexts, 1, 1)).astype(np.float32), split=split, genes=names("g", GENES),
                  context_names=names("c", contexts), treatment_names=names("t", treatments),
                  log_expression=log_expression)


EFFECTS = np.array([[0, 0, 0, 0], [-2, 1, 0, 1], [1, -2, 1, 0], [0, 1.5, -2, -1]])


def cells_of(screen, context, treatment) -> np.ndarray:
    return screen.cells[screen.start[context, treatment] :][: screen.count[context, treatment]]


def fit(screen, seed=0, **changes) -> CondOT:
    return CondOT(screen, np.random.default_rng(seed), dataclasses.replace(OPTIONS, **changes))


def predict(method, controls, treatment, context=0) -> np.ndarray:
    return method.predict(controls, context, treatment, np.random.default_rng(0))


@pytest.fixture(scope="module")
def screen():
    return make_screen()


@pytest.fixture(scope="module")
def fitted(screen):
    return fit(screen)


def potential(seed=0, genes=GENES, **changes) -> Potential:
    return Potential(genes, dataclasses.replace(OPTIONS, **changes), key=jr.key(seed))


def random_weights(seed=0) -> Potential:
    """A potential far from any initialisation, with Wz >= 0."""
    f = potential(seed, identity_init=False)
    keys = iter(jr.split(jr.key(seed), len(jax.tree.leaves(f))))
    return condot.clamp(jax.tree.map(lambda x: x + 0.3 * jr.normal(next(keys), x.shape), f))


# ---------------------------------------------------------------------------------------------------------- potentials


@pytest.mark.parametrize("genes, hidden, layers", [(4, 16, 2), (20, 64, 4)])
def test_identity_at_the_start(genes, hidden, layers):
    """T(x) = x within 1e-3 for any treatment at initialisation; an ordinary initialisation is far from that."""
    x = jr.normal(jr.key(1), (50, genes)) + 1
    for seed, treatment in enumerate((jnp.zeros(genes), 1.5 * jnp.eye(genes)[2])):
        start = potential(seed, genes, hidden=hidden, layers=layers)
        np.testing.assert_allclose(condot._transport(start, x, treatment), x, atol=1e-3)
        ordinary = potential(seed, genes, hidden=hidden, layers=layers, identity_init=False)
        assert jnp.abs(condot._transport(ordinary, x, treatment) - x).mean() > 0.3


def test_convex_in_the_cell():
    """Whatever the weights, f with Wz >= 0 is nowhere above its chords in x; with a negative Wz it is somewhere."""
    def above(f):
        a, b = 3 * jr.normal(jr.key(1), (2, 500, GENES))
        value = jax.vmap(f, (0, None))
        t = jnp.eye(GENES)[0]
        return jnp.max(value((a + b) / 2, t) - (value(a, t) + value(b, t)) / 2)

    f = random_weights()
    assert above(f) < 1e-3
    negative = eqx.tree_at(lambda f: f.layers[-1].convex, f, -f.layers[-1].convex - 0.1)
    assert above(negative) > 0.1


def test_map_is_the_gradient():
    """T equals finite differences of the potential."""
    g, x, t, h = random_weights(), jr.normal(jr.key(1), (GENES,)), jnp.eye(GENES)[1], 1e-2
    slopes = [(g(x + h * e, t) - g(x - h * e, t)) / (2 * h) for e in jnp.eye(GENES)]
    np.testing.assert_allclose(condot.transport(g, x[None], t)[0], jnp.stack(slopes), rtol=2e-2, atol=2e-2)


def test_one_quadratic_is_an_affine_map():
    """If all quadratics are alike, T(x) = A'A (x - m): what the network computes, and what one writes down."""
    a, m = jr.normal(jr.key(1), (GENES, GENES)), jr.normal(jr.key(2), (GENES,))
    g = eqx.tree_at(lambda g: (g.roots, g.centres), potential(), (jnp.tile(a, (GENES, 1, 1)), jnp.tile(m, (GENES, 1))))
    x = 2 * jr.normal(jr.key(3), (30, GENES))
    np.testing.assert_allclose(condot.transport(g, x, jnp.eye(GENES)[1]), (x - m) @ (a.T @ a).T, rtol=1e-3, atol=2e-3)


def test_penalty_by_hand():
    """The penalty is the norm of the negative entries; where there are none it is 0, and its gradient is not NaN."""
    g = potential()
    value, gradient = jax.value_and_grad(condot.negative_norm)(g)
    assert value == 0 and all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(gradient))
    bad = eqx.tree_at(lambda g: g.layers[1].convex, g, g.layers[1].convex.at[0, :2].set(jnp.array([-3.0, -4.0])))
    assert condot.negative_norm(bad) == pytest.approx(5)


# ------------------------------------------------------------------------------------------------------------ training


def test_f_stays_convex(screen):
    """After every single update f's Wz are >= 0, at a rate at which some would not be, and all values are finite."""
    options = dataclasses.replace(OPTIONS, learning_rate=0.1, inner=1)
    f, g, adam = potential(0), potential(1), condot.optimiser(options)
    state, data = (f, g, adam.init(f), adam.init(g)), fitting.training_cells(screen)
    step, zeros = eqx.filter_jit(condot.make_step(options)), 0
    for i in range(8):
        state, loss = step(state, data, jnp.asarray(i), jr.key(i))
        weights = jnp.concatenate([layer.convex.ravel() for layer in state[0].layers])
        assert jnp.all(weights >= 0) and jnp.isfinite(loss)
        zeros += int((weights == 0).sum())
        if i == 0:
            assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(eqx.filter(state, eqx.is_inexact_array)))
    assert zeros > 0


def test_shifts_are_recovered(screen, fitted):
    """Each treatment's own shift is learnt, also in the nearby context where it was not measured."""
    controls = cells_of(screen, 1, 0)
    true = np.stack([cells_of(screen, 1, t) for t in range(1, GENES)])
    predicted = np.stack([predict(fitted, controls, screen.treatments[1, t], 1) for t in range(1, GENES)])
    assert predicted.dtype == np.float32
    assert metrics.pds(true, predicted) == 0
    for t, p in zip(true, predicted):
        moved, effect = p.mean(0) - controls.mean(0), t.mean(0) - controls.mean(0)
        assert moved @ effect / (effect @ effect) == pytest.approx(1, abs=0.25)  # neither too far nor too short
        assert metrics.rmse(t, p) < 0.4 < 1 < metrics.rmse(t, controls)


def test_the_other_potential_goes_back(screen, fitted):
    """grad_x f brings moved cells back most of the way to where they were."""
    controls, treatment = jnp.asarray(cells_of(screen, 0, 0)), jnp.asarray(screen.treatments[0, 1])
    moved = condot.transport(fitted.g, controls, treatment)
    back = condot.transport(fitted.f, moved, treatment)
    assert jnp.abs(back - controls).mean() < 0.6 * jnp.abs(moved - controls).mean()


def test_seed_and_test_cells(screen, fitted):
    """The seed reproduces the fit exactly, another does not, and cells of test conditions change nothing."""
    cells, rows = screen.cells.copy(), slice(screen.start[1, -1], None)
    cells[rows] = 100
    x, t = cells_of(screen, 0, 0), screen.treatments[0, 1]
    expected = predict(fitted, x, t)
    assert np.array_equal(predict(fit(dataclasses.replace(screen, cells=cells)), x, t), expected)
    assert not np.array_equal(predict(fit(screen, seed=1), x, t), expected)


def test_unseen_treatment(screen, fitted):
    """A gene never treated in training is no treatment at all, or its random one-hot if asked; cells remain finite."""
    x, never = cells_of(screen, 0, 0), np.eye(GENES, dtype=np.float32)[-1]
    nothing = predict(fitted, x, 0 * never)
    assert np.array_equal(predict(fitted, x, never), nothing) and np.isfinite(nothing).all()
    as_initialised = predict(fit(screen, unseen="random"), x, never)
    assert np.isfinite(as_initialised).all() and np.abs(as_initialised - nothing).mean() > 0.01


def test_edges(screen, fitted):
    """One cell alone goes where it goes among others, in any context, even an unknown one."""
    x, t = cells_of(screen, 0, 0), screen.treatments[0, 1]
    np.testing.assert_allclose(predict(fitted, x[:1], t, context=99), predict(fitted, x, t)[:1], atol=1e-4)


def test_small_training_data():
    """A single control cell, a gene that is constant and log-expression data give finite cells that are >= 0."""
    screen = make_screen(log_expression=True)
    cells, count = screen.cells.copy(), screen.count.copy()
    cells[:, 0], count[0, 0] = 0, 1
    screen = dataclasses.replace(screen, cells=cells, count=count)
    predicted = predict(fit(screen), cells_of(screen, 0, 0) - 3, screen.treatments[0, 1])
    assert predicted.shape == (1, GENES) and np.isfinite(predicted).all() and (predicted >= 0).all()
