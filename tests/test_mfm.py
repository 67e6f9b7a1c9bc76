"""Claims about baselines/mfm.py: a population's embedding is invariant, networks take turns, effects are recovered."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import metrics
from baselines import fitting, mfm
from data import TEST, TRAIN, Screen, evaluation_tasks

GENES, POOL, CELLS, CONTEXTS, UNSEEN = 6, 60, 30, 3, 6  # treatment UNSEEN is trained on nowhere
SMALL = mfm.Options(neighbours=3, embedding=8, width=32, layers=3, features=8, updates=400, batch=16, conditions=4,
                    learning_rate=5e-3)


def make_screen(shifts=None) -> Screen:
    """Treatment t is of gene t-1, cells of (c, t) are N(c, 1/4) + shifts[c, t]; by default shifts are those of t alone.
    In the last context the even treatments are TEST, as is UNSEEN everywhere."""
    rng = np.random.default_rng(0)
    effect = rng.normal(0, 2, (GENES + 1, GENES)) * (np.arange(GENES + 1) > 0)[:, None]
    shifts = np.broadcast_to(effect, (CONTEXTS, *effect.shape)) if shifts is None else shifts
    cells = rng.normal(0, 0.5, (CONTEXTS, GENES + 1, POOL, GENES)) + shifts[:, :, None]
    cells += np.arange(CONTEXTS)[:, None, None, None]
    split = np.full((CONTEXTS, GENES + 1), TRAIN)
    split[-1, 2::2] = split[:, UNSEEN] = TEST
    names = lambda letter, n: tuple(f"{letter}{i}" for i in range(n))
    start = np.arange(split.size).reshape(split.shape) * POOL
    return Screen(cells=cells.reshape(-1, GENES).astype(np.float32), start=start,
                  count=np.full(split.shape, POOL),
                  treatments=np.tile(np.eye(GENES + 1, dtype=np.float32)[:, 1:] * 0.8, (CONTEXTS, 1, 1)), split=split,
                  genes=names("g", GENES), context_names=names("c", CONTEXTS), treatment_names=names("t", GENES + 1),
                  log_expression=False)


def fit(screen, options=SMALL, seed=0):
    return mfm.MFM(screen, np.random.default_rng(seed), options)


def controls(screen, context=0, cells=CELLS):
    return screen.cells[screen.start[context, 0] :][:cells]


def one_hot(treatment) -> np.ndarray:
    return np.float32(0.8) * np.eye(GENES, dtype=np.float32)[treatment - 1]


def predict(method, cells, treatment, context=0):
    return method.predict(cells, context, one_hot(treatment), np.random.default_rng(0))


@pytest.fixture(scope="module")
def fitted():
    screen = make_screen()
    return screen, fit(screen)


# ------------------------------------------------------------------------------------------------------- what it learns


def test_shifts_are_recovered_in_a_held_out_context(fitted):
    """Treatments that do the same everywhere are right where not trained on: PDS 0, and as far as the truth."""
    screen, method = fitted
    tasks = evaluation_tasks(np.random.default_rng(1), screen, CELLS, 2)
    known = [i for i, query in enumerate(tasks.query) if not np.array_equal(query, one_hot(UNSEEN))]
    cells = np.array([method.predict(tasks.identity[i], int(tasks.context_index[i]), tasks.query[i],
                                     np.random.default_rng(0)) for i in known])
    assert len(known) == 2 and cells.dtype == np.float32
    assert metrics.pds(tasks.target[known], cells) == 0
    for i, predicted in zip(known, cells):
        assert metrics.rmse(predicted, tasks.target[i]) < 0.5 < 1 < metrics.rmse(tasks.identity[i], tasks.target[i])
        moved, effect = (x.mean(0) - tasks.identity[i].mean(0) for x in (predicted, tasks.target[i]))
        assert np.linalg.norm(moved) / np.linalg.norm(effect) == pytest.approx(1, abs=0.15)


def test_the_population_decides():
    """An effect of opposite sign in two populations is learnt, and a cell goes the way of its population."""
    sign = np.array([1, -1, 1])[:, None, None]
    shifts = sign * np.broadcast_to(2.0 * (np.arange(GENES + 1) > 0)[:, None], (CONTEXTS, GENES + 1, GENES))
    screen = make_screen(shifts)
    method = fit(screen)
    for context, way in enumerate((1, -1)):
        cells = controls(screen, context)
        moved = (predict(method, cells, 1, context) - cells).mean()
        assert way * moved == pytest.approx(2, abs=0.6)
    stranger = np.vstack([controls(screen, 1)[:1], controls(screen, 0)[1:]])
    alone = predict(method, controls(screen, 1), 1)[0]
    assert np.abs(predict(method, stranger, 1)[0] - alone).max() > 0.5


def test_treatments_give_different_cells(fitted):
    """Every two trained treatments give cells whose means are apart."""
    screen, method = fitted
    means = np.array([predict(method, controls(screen), t).mean(0) for t in range(1, UNSEEN)])
    apart = np.linalg.norm(means[:, None] - means, axis=-1)
    assert apart[~np.eye(len(means), dtype=bool)].min() > 1


def test_seed_and_training_cells_decide_everything():
    """The same seed gives the same cells bit for bit, with all test conditions' cells NaN; another does not."""
    screen = make_screen()
    cells = screen.cells.copy()
    for c, t in np.argwhere(screen.split == TEST):
        cells[screen.start[c, t] :][:POOL] = np.nan
    first, second, other = (predict(fit(s, seed=seed), controls(screen), 1)
                            for s, seed in ((screen, 0), (dataclasses.replace(screen, cells=cells), 0), (screen, 1)))
    assert np.array_equal(first, second) and not np.allclose(first, other)


# -------------------------------------------------------------------------------------------------------- the embedding


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


# ---------------------------------------------------------------------------------------------------- training and flow


def test_one_network_at_a_time():
    """A step is Adam's on the flow with the old encoder, then Adam's on the encoder with the new flow; by hand."""
    screen, options = make_screen(), dataclasses.replace(SMALL, learning_rate=0.02)
    data, key, adam = fitting.training_cells(screen), jr.key(3), optax.adam(options.learning_rate)
    encoder, flow = mfm.Encoder(GENES, 8, 3, key=jr.key(0)), mfm.Flow(GENES, options, key=jr.key(1))
    states = [adam.init(eqx.filter(m, eqx.is_inexact_array)) for m in (encoder, flow)]
    new_encoder, new_flow, *_, loss = *(result := eqx.filter_jit(mfm.make_step(options))(
        (encoder, flow, *states), data, jnp.asarray(0), key))[0], result[1]
    assert np.isfinite(loss)

    key_draw, key_time = jr.split(key)
    batches = jax.vmap(lambda k: fitting.draw(data, options.batch, key=k))(jr.split(key_draw, options.conditions))
    keys = jr.split(key_time, options.conditions)
    flow_gradient = eqx.filter_jit(eqx.filter_grad(lambda f, e: mfm.loss(e, f, batches, keys)))
    encoder_gradient = eqx.filter_jit(eqx.filter_grad(lambda e, f: mfm.loss(e, f, batches, keys)))
    adapted = lambda model, gradient, state: eqx.apply_updates(model, adam.update(gradient, state)[0])
    by_hand = adapted(flow, flow_gradient(flow, encoder), states[1])
    close = lambda a, b: np.mean([np.abs(x - y).mean() for x, y in zip(jax.tree.leaves(eqx.filter(a, eqx.is_array)),
                                                                      jax.tree.leaves(eqx.filter(b, eqx.is_array)))])
    assert close(by_hand, new_flow) < 1e-4 < close(flow, new_flow)  # the frozen frequencies of both are the same
    assert np.array_equal(flow.frequencies, new_flow.frequencies)
    assert close(adapted(encoder, encoder_gradient(encoder, by_hand), states[0]), new_encoder) < 1e-4
    assert close(adapted(encoder, encoder_gradient(encoder, flow), states[0]), new_encoder) > 1e-4


def test_solver_agrees_with_small_steps(fitted):
    """With a small tolerance the solver ends where 1000 midpoint steps of its velocity end, by default nearly there."""
    screen, method = fitted
    x, t = jnp.asarray(controls(screen)), jnp.asarray(one_hot(1))
    embedding = method.encoder(x)
    velocity = jax.vmap(method.flow, (0, None, None, None))

    @jax.jit
    def midpoint(x, i):
        half = x + velocity(x, i / 1000, embedding, t) / 2000
        return x + velocity(half, (i + 0.5) / 1000, embedding, t) / 1000, None

    end, _ = jax.lax.scan(midpoint, x, jnp.arange(1000.0))
    found = mfm.transport(method.encoder, method.flow, x, t, jnp.asarray(1e-6))
    np.testing.assert_allclose(found, end, atol=1e-3)
    np.testing.assert_allclose(predict(method, controls(screen), 1), end, atol=0.05)  # at the default tolerance, 1e-4


# -------------------------------------------------------------------------------------------------------- the odd cases


def test_unseen_treatment(fitted):
    """A treatment never trained on counts as no treatment, or as its initial column with `random`: finite both ways."""
    screen, method = fitted
    cells = controls(screen)
    nothing = method.predict(cells, 0, np.zeros(GENES, np.float32), np.random.default_rng(0))
    assert np.isfinite(nothing).all() and np.array_equal(predict(method, cells, UNSEEN), nothing)
    released = fit(screen, dataclasses.replace(SMALL, unseen="random", updates=0))
    moved = predict(released, cells, UNSEEN)
    assert np.isfinite(moved).all()
    assert not np.allclose(moved, released.predict(cells, 0, np.zeros(GENES, np.float32), np.random.default_rng(0)))


def test_number_of_the_context_is_ignored(fitted):
    """A context that was not in training is a population like any other."""
    screen, method = fitted
    assert np.array_equal(*(predict(method, controls(screen), 1, context) for context in (0, 99)))


@pytest.mark.parametrize("cells", [1, 2])
def test_fewer_cells_than_neighbours(fitted, cells):
    """A population smaller than the graph's K is a complete graph, a single cell its own only neighbour."""
    screen, method = fitted
    few = controls(screen, 0, cells)
    assert mfm.nearest(jnp.asarray(few), 3).shape == (cells, cells - 1)
    predicted = predict(method, few, 1)
    assert predicted.shape == few.shape and np.isfinite(predicted).all()


def test_constant_gene_single_control_cell_and_expression():
    """A constant gene and a context with one control cell can be fitted to; log-expression is never negative."""
    screen = make_screen()
    cells, start, count = screen.cells.copy() - 3, screen.start.copy(), screen.count.copy()
    cells[:, 0], count[0, 0] = 0, 1
    start[0, 1], count[0, 1] = 1, 2 * POOL - 1  # the other controls' rows: as many as before, so nothing recompiles
    screen = dataclasses.replace(screen, cells=cells, start=start, count=count, log_expression=True)
    predicted = predict(fit(screen), controls(screen, 1), 1)
    assert np.isfinite(predicted).all() and predicted.min() == 0 < predicted.max()
