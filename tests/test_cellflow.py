"""Claims about baselines/cellflow.py: cells are coupled by optimal transport, known effects are recovered."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.optimize

import metrics
from baselines import cellflow, fitting
from data import TEST, TRAIN, Screen, evaluation_tasks

GENES, POOL, CELLS, CONTEXTS, UNSEEN = 6, 60, 30, 3, 6  # treatment UNSEEN is trained on nowhere
SMALL = cellflow.Options(embedding=8, width=32, layers=2, updates=400, batch=16, conditions=4, learning_rate=5e-3)


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
    return cellflow.CellFlow(screen, np.random.default_rng(seed), options)


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


def test_the_context_decides():
    """An effect of opposite sign in two contexts is learnt, from the number of the context alone."""
    sign = np.array([1, -1, 1])[:, None, None]
    shifts = sign * np.broadcast_to(2.0 * (np.arange(GENES + 1) > 0)[:, None], (CONTEXTS, GENES + 1, GENES))
    screen = make_screen(shifts)
    method, cells = fit(screen), controls(screen)
    for context, way in enumerate((1, -1)):
        own = controls(screen, context)
        assert way * (predict(method, own, 1, context) - own).mean() == pytest.approx(2, abs=0.6)
    assert np.abs(predict(method, cells, 1, 1) - predict(method, cells, 1, 0)).max() > 0.5  # the same cells


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


# --------------------------------------------------------------------------------------------------------- the coupling


def pure_shift(n=24, genes=20, size=0.5, seed=0):
    """Cells, the same cells each moved by `size` in every gene and in another order, and where each of them went."""
    rng = np.random.default_rng(seed)
    x, order = rng.normal(0, 1, (n, genes)).astype(np.float32), rng.permutation(n)
    return jnp.asarray(x), jnp.asarray(x[order] + np.float32(size)), order.argsort()


def test_plan_is_a_coupling():
    """Rows and columns of the plan sum to 1/n, and it equals Sinkhorn's iteration written out."""
    x, y, _ = pure_shift()
    plan = cellflow.coupling(x, y, 0.1)
    np.testing.assert_allclose(plan.sum(0) * len(x), 1, atol=5e-3)
    np.testing.assert_allclose(plan.sum(1) * len(x), 1, atol=5e-3)
    cost = ((np.asarray(x, float)[:, None] - np.asarray(y, float)) ** 2).sum(-1)
    kernel, v = np.exp(-cost / cost.mean() / 0.1), np.ones(len(y))
    for _ in range(500):
        u = 1 / len(x) / (kernel @ v)
        v = 1 / len(y) / (u @ kernel)
    np.testing.assert_allclose(plan, u[:, None] * kernel * v, atol=1e-4)


def test_small_epsilon_is_the_assignment():
    """With a small epsilon the partners are those of the best one-to-one assignment, here of a random pair of sets."""
    rng = np.random.default_rng(1)
    x, y = (jnp.asarray(rng.normal(0, 1, (12, 5)).astype(np.float32)) for _ in range(2))
    cost = ((np.asarray(x)[:, None] - np.asarray(y)) ** 2).sum(-1)
    _, best = scipy.optimize.linear_sum_assignment(cost)
    drawn = cellflow.partners(cellflow.coupling(x, y, 0.003), key=jr.key(0))
    assert np.mean(np.asarray(drawn) == best) > 0.8


def test_default_epsilon_finds_the_pairs_of_a_shift():
    """Of a pure shift most mass is on the true pairs at the default epsilon, and hardly any at the released 1."""
    x, y, partner = pure_shift()
    mass = [float(cellflow.coupling(x, y, e)[np.arange(len(x)), partner].sum())
            for e in (cellflow.Options().epsilon, 1.0)]
    assert mass[0] > 0.7 and mass[1] < 0.2


def test_partners_follow_the_plan():
    """Partners are drawn row by row with the probabilities of the plan."""
    plan = jnp.array([[0.4, 0.1], [0.0, 0.5]])
    drawn = np.array([cellflow.partners(plan, key=k) for k in jr.split(jr.key(0), 400)])
    np.testing.assert_allclose((drawn == 1).mean(0), [0.2, 1], atol=0.06)


def test_coupling_stays_in_context():
    """Control and treated cells that are coupled are of one biological context."""
    screen = make_screen(np.zeros((CONTEXTS, GENES + 1, GENES)))
    screen = dataclasses.replace(screen, cells=screen.cells * 0.01 + np.round(np.repeat(
        np.arange(CONTEXTS), (GENES + 1) * POOL))[:, None].astype(np.float32) * 100)
    draw = jax.jit(jax.vmap(lambda key: fitting.draw(fitting.training_cells(screen), 16, key=key)))
    batch = draw(jr.split(jr.key(0), 50))
    context = np.round(np.asarray(batch.controls) / 100).astype(int)
    assert np.array_equal(context, np.round(np.asarray(batch.treated) / 100).astype(int))
    assert (context == np.asarray(batch.context)[:, None, None]).all() and len(np.unique(context)) == CONTEXTS


# ---------------------------------------------------------------------------------------------------- training and flow


def test_dropout_is_for_training_only():
    """With a key most of the encoding is dropped at 0.9 and none at 0; without a key none ever is."""
    for rate, kept in ((0.9, 0.1), (0.0, 1.0)):
        options = dataclasses.replace(SMALL, embedding=500, condition_dropout=rate)
        model = cellflow.Velocity(GENES, CONTEXTS, options, key=jr.key(0))
        hots = jnp.asarray(one_hot(1)), jax.nn.one_hot(0, CONTEXTS)
        assert np.mean(np.asarray(model.condition(*hots, key=jr.key(1))) != 0) == pytest.approx(kept, abs=0.05)
        assert (np.asarray(model.condition(*hots)) != 0).all()


def test_solver_agrees_with_small_steps(fitted):
    """The adaptive solver ends where 1000 midpoint steps of the same velocity end, to 1e-3."""
    screen, method = fitted
    x, t = jnp.asarray(controls(screen)), jnp.asarray(one_hot(1))
    condition = method.model.condition(t, jax.nn.one_hot(0, CONTEXTS))
    velocity = jax.vmap(method.model, (0, None, None))

    @jax.jit
    def midpoint(x, i):
        half = x + velocity(x, i / 1000, condition) / 2000
        return x + velocity(half, (i + 0.5) / 1000, condition) / 1000, None

    end, _ = jax.lax.scan(midpoint, x, jnp.arange(1000.0))
    np.testing.assert_allclose(predict(method, controls(screen), 1), end, atol=1e-3)


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


def test_unseen_context():
    """A context never trained on counts as none at all, whatever its number, and what it is predicted is finite."""
    screen = make_screen()
    split = screen.split.copy()
    split[1, 1:] = TEST
    screen = dataclasses.replace(screen, split=split)
    method, cells = fit(screen, dataclasses.replace(SMALL, updates=0)), controls(screen)
    assert list(method.known_contexts) == [True, False, True]
    unknown = predict(method, cells, 1, 1)
    assert np.isfinite(unknown).all() and np.array_equal(unknown, predict(method, cells, 1, 99))
    assert not np.allclose(unknown, predict(method, cells, 1, 0))


def test_a_single_cell(fitted):
    """One control cell is carried to where it is carried among others: each cell has its own path."""
    screen, method = fitted
    one = predict(method, controls(screen, 0, 1), 1)
    np.testing.assert_allclose(one, predict(method, controls(screen), 1)[:1], atol=2e-3)


def test_constant_gene_single_control_cell_and_expression():
    """A constant gene and a context with one control cell can be fitted to; log-expression is never negative."""
    screen = make_screen()
    cells, start, count = screen.cells.copy() - 3, screen.start.copy(), screen.count.copy()
    cells[:, 0], count[0, 0] = 0, 1
    start[0, 1], count[0, 1] = 1, 2 * POOL - 1  # the other controls' rows: as many as before, so nothing recompiles
    screen = dataclasses.replace(screen, cells=cells, start=start, count=count, log_expression=True)
    predicted = predict(fit(screen), controls(screen, 1), 1)
    assert np.isfinite(predicted).all() and predicted.min() == 0 < predicted.max()
