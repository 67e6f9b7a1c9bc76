"""Claims about baselines/state.py: shifts are recovered, cells see each other, their order says nothing."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats
from scipy.spatial.distance import cdist

import metrics
from baselines import fitting, state
from data import TEST, TRAIN, Screen

GENES, CONTEXTS, TREATMENTS, POOL = 5, 3, 5, 60
LEVELS = (0.0, 2.0, 1.0)  # of the contexts: the last one, with the test conditions, lies between the others
OPTIONS = state.Options(width=32, depth=1, heads=2, sets=8, batch=20, updates=500, learning_rate=3e-3)

LEVEL = jnp.zeros(GENES)  # where an untrained network starts


def make_screen(log_expression=False, value=0.8, level=0) -> Screen:
    """Cells N(level + its own + shift of t, 1/4) of context c, treatment t of gene t-1, never of the last gene; in the
    last context treatments 1 and 2 are TEST."""
    rng = np.random.default_rng(0)
    cells = rng.normal(0, 0.5, (CONTEXTS, TREATMENTS, POOL, GENES)) + shifts()[:, None] + level
    cells += np.array(LEVELS)[:, None, None, None]
    split = np.full((CONTEXTS, TREATMENTS), TRAIN)
    split[-1, [1, 2]] = TEST
    hot = np.broadcast_to(np.eye(TREATMENTS, GENES + 1)[:, 1:] * value, (CONTEXTS, TREATMENTS, GENES))
    names = lambda letter, n: tuple(f"{letter}{i}" for i in range(n))
    return Screen(cells=cells.reshape(-1, GENES).astype(np.float32),
                  start=POOL * np.arange(CONTEXTS * TREATMENTS).reshape(CONTEXTS, TREATMENTS),
                  count=np.full((CONTEXTS, TREATMENTS), POOL), treatments=hot.astype(np.float32), split=split,
                  genes=names("g", GENES), context_names=names("c", CONTEXTS), treatment_names=names("t", TREATMENTS),
                  log_expression=log_expression)


def shifts() -> np.ndarray:
    """T D: every treatment has its own large effect, control has none."""
    effect = np.random.default_rng(7).choice([-2.0, 2.0], (TREATMENTS, GENES))
    effect[0] = 0
    return effect


def of(screen, context, treatment):
    return screen.cells[screen.start[context, treatment] :][:POOL]


def predict(model, screen, treatment, context=CONTEXTS - 1, controls=None, seed=1):
    """From control cells of the last context unless told otherwise; `treatment` is a number or a vector."""
    controls = of(screen, CONTEXTS - 1, 0) if controls is None else controls
    vector = np.eye(GENES + 1, dtype=np.float32)[treatment, 1:] * 0.8 if isinstance(treatment, int) else treatment
    return model.predict(controls, context, vector, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def screen():
    return make_screen()


@pytest.fixture(scope="module")
def model(screen):
    return state.State(screen, np.random.default_rng(0), OPTIONS)


@pytest.fixture(scope="module")
def network():
    return state.initial_state(LEVEL, False, OPTIONS, jr.key(0))[0]


def with_options(model, **changed):
    """The fitted model, used with other options."""
    other = object.__new__(state.State)
    vars(other).update(vars(model), options=dataclasses.replace(model.options, **changed))
    return other


def cells_of(seed, n=20, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=(n, GENES)), jnp.float32)


# ----------------------------------------------------------------------------------------------------- what it predicts


def test_shifts_are_recovered(model, screen):
    """Treatments that were trained on in other contexts only move the control cells of this one by their own shift, and
    keep about their spread."""
    controls, tests = of(screen, 2, 0), (1, 2)
    cells = np.stack([predict(model, screen, t) for t in tests])
    moved, truth = cells.mean(1) - controls.mean(0), shifts()[list(tests)]
    np.testing.assert_allclose(moved, truth, atol=0.6)  # of 2
    ratio = np.linalg.norm(moved, axis=-1) / np.linalg.norm(truth, axis=-1)
    np.testing.assert_allclose(ratio, 1, atol=0.2)
    assert metrics.pds(np.stack([of(screen, 2, t) for t in tests]), cells) == 0
    assert cells.var(1).mean() == pytest.approx(0.25, rel=0.4)
    assert cells.min() < -1  # SCM values may be negative


def test_unseen_treatments(model, screen):
    """A gene never treated in training predicts control cells, or with "random" what its column happens to hold."""
    unseen = np.eye(GENES, dtype=np.float32)[-1]
    assert np.array_equal(predict(model, screen, unseen), predict(model, screen, 0))
    assert not np.allclose(predict(with_options(model, unseen="random"), screen, unseen), predict(model, screen, 0))


def test_the_context_is_in_the_cells(model, screen):
    """The index of the context is not used; control cells of another context are answered otherwise."""
    controls = of(screen, 2, 0)
    assert np.array_equal(predict(model, screen, 1, context=99), predict(model, screen, 1))
    elsewhere = predict(model, screen, 1, controls=of(screen, 0, 0))
    moved = predict(model, screen, 1, controls=controls).mean(0) - elsewhere.mean(0)
    assert (moved > 0.4).all()  # the contexts are 1 apart


def test_sets_have_the_size_of_training(model, screen):
    """Cells are answered in sets of the trained size: two at once as one by one, a lone cell as copies of itself."""
    controls = of(screen, 2, 0)[:40]
    both = predict(model, screen, 1, controls=controls)
    parts = [predict(model, screen, 1, controls=part) for part in (controls[:20], controls[20:])]
    np.testing.assert_allclose(both, np.concatenate(parts), atol=1e-5)
    lone, copies = (predict(model, screen, 1, controls=controls[:1].repeat(n, 0)) for n in (1, 20))
    assert lone.shape == (1, GENES)
    np.testing.assert_allclose(lone[0], copies[0], atol=1e-5)
    assert predict(model, screen, 1, controls=controls[:23]).shape == (23, GENES)


# ---------------------------------------------------------------------------------------------------------- the network


def test_permuted_cells_permute_the_outputs(network):
    """No cell knows its position."""
    x, t, order = cells_of(0), jnp.eye(GENES)[1], np.random.default_rng(0).permutation(20)
    np.testing.assert_allclose(network(x[order], t), network(x, t)[order], atol=1e-5)


def test_every_cell_sees_every_other(network):
    """Another last cell changes the first one's answer, another first cell the last one's: there is no mask."""
    x, t = cells_of(0), jnp.eye(GENES)[1]
    for changed, seen in ((-1, 0), (0, -1)):
        y = x.at[changed].add(5)
        assert np.abs(network(y, t)[seen] - network(x, t)[seen]).max() > 1e-4


def test_a_block_by_another_route(network):
    """A block equals the same in NumPy: softmax attention of normalised cells, then a gated network, both added."""
    block, h = network.blocks[0], np.random.default_rng(0).normal(size=(7, OPTIONS.width))
    weights = lambda linear: np.asarray(linear.weight, float).T
    normal = lambda x: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    q, k, v = np.split(normal(h) @ weights(block.qkv), 3, axis=1)
    attended = []
    for head in np.split(np.arange(OPTIONS.width), OPTIONS.heads):
        scores = np.exp(q[:, head] @ k[:, head].T / np.sqrt(len(head)))
        attended.append(scores / scores.sum(1, keepdims=True) @ v[:, head])
    middle = h + np.concatenate(attended, axis=1) @ weights(block.out)
    gate, value = np.split(normal(middle) @ weights(block.expand), 2, axis=1)
    expected = middle + (gate / (1 + np.exp(-gate)) * value) @ weights(block.contract)
    np.testing.assert_allclose(block(jnp.asarray(h, jnp.float32)), expected, atol=1e-4)


def test_only_expression_is_rectified(network):
    """With log-expression data no output is below zero; the same network for SCM values has negative ones."""
    rectified = state.initial_state(LEVEL, True, OPTIONS, jr.key(0))[0]
    plain, cut = (np.asarray(n(cells_of(0), jnp.eye(GENES)[1])) for n in (network, rectified))
    assert (plain < 0).any()
    np.testing.assert_allclose(cut, np.maximum(plain, 0), atol=1e-6)


def test_rectified_genes_start_alive():
    """On log-expression data an untrained network starts around the mean of the training cells, with no gene cut off;
    started near zero instead, some genes are zero in all cells."""
    level, x = jnp.full(GENES, 2.0), cells_of(0)
    options = [dataclasses.replace(OPTIONS, start_at_mean=choice) for choice in (True, False)]
    starts = [state.initial_state(level, True, o, jr.key(0))[0] for o in options]
    mean, zero = (network(x, jnp.eye(GENES)[1]) for network in starts)
    assert (mean > 0).all() and (zero == 0).all(0).any()


def test_width_and_heads_must_fit():
    """Heads that do not divide the width are refused with both numbers."""
    with pytest.raises(ValueError, match="width 32 .* heads .3."):
        state.initial_state(LEVEL, False, dataclasses.replace(OPTIONS, heads=3), jr.key(0))


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


def test_one_update_is_finite_and_clipped(screen):
    """After one update all weights are finite and have moved by Adam's rate; a large gradient is clipped before it."""
    data, options = fitting.training_cells(screen, controls_too=True), dataclasses.replace(OPTIONS, depth=1)
    before = state.initial_state(LEVEL, False, options, jr.key(0))
    after, loss = eqx.filter_jit(state.make_step(options))(before, data, jnp.asarray(0), jr.key(1))
    old, new = (jax.tree.leaves(eqx.filter(s[0], eqx.is_array)) for s in (before, after))
    assert np.isfinite(loss) and all(np.isfinite(x).all() for x in new)
    assert all(0 < np.abs(x - y).max() < 1.1 * options.learning_rate for x, y in zip(new, old))
    tree = jnp.full(4, 100.0)
    moments = state.optimiser(options).update(tree, state.optimiser(options).init(tree))[1][1][0]
    assert float(jnp.linalg.norm(moments.mu)) == pytest.approx(0.1 * options.clip, rel=1e-4)  # Adam's (1 - b1) times it


# ------------------------------------------------------------------------------------------------- what it is fitted to


def test_reproduces_and_never_looks_at_test_cells(model, screen):
    """The same seed gives the same cells bit for bit, whatever test conditions hold; another seed does not."""
    cells = screen.cells.copy()
    for c, t in np.argwhere(screen.split == TEST):
        cells[screen.start[c, t] :][:POOL] = np.nan
    again = state.State(dataclasses.replace(screen, cells=cells), np.random.default_rng(0), OPTIONS)
    other = state.State(screen, np.random.default_rng(1), OPTIONS)
    assert np.isnan(cells).any() and again.parameters == model.parameters > 0
    assert np.array_equal(predict(model, screen, 1), predict(again, screen, 1))
    assert not np.allclose(predict(model, screen, 1), predict(other, screen, 1))


def test_awkward_screens():
    """One context, one control cell, a constant gene, log-expression: cells are finite and not below zero."""
    wide = make_screen(log_expression=True, value=1, level=4)
    cells = np.maximum(wide.cells, 0)
    cells[:, 3] = 0
    count = wide.count[:1].copy()
    count[0, 0] = 1
    screen = Screen(cells, wide.start[:1], count, wide.treatments[:1], wide.split[:1], wide.genes,
                    wide.context_names[:1], wide.treatment_names, True)
    model = state.State(screen, np.random.default_rng(0), dataclasses.replace(OPTIONS, updates=50))
    for n in (1, 7):
        found = predict(model, screen, 1, controls=cells[:1].repeat(n, 0))
        assert found.shape == (n, GENES) and found.dtype == np.float32
        assert np.isfinite(found).all() and (found >= 0).all()
    assert (found[:, [0, 1, 2, 4]] > 0).any()
