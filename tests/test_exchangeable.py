"""Claims about exchangeable.py: what it does not depend on, what it depends on, and where it starts."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import exchangeable
import model
import sample
from exchangeable import LEAST, Exchangeable, partial_correlations
from model import SLOTS, Architecture
from scales import BadInput
from tasks import Given

GENES, CELLS, EXPERIMENTS, GENERATED = 6, 30, 3, 4
SMALL = Architecture(network="exchangeable.Exchangeable", width=12, depth=2, heads=2, remat=False)


@functools.cache
def network() -> Exchangeable:
    """Random numbers everywhere, also in what starts from zero. It is never told how many genes there will be."""
    outline, rng = model.outline(SMALL, 1), np.random.default_rng(0)

    def fill(x):
        return jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x

    return jax.tree.map(fill, outline)


def inputs(genes=GENES, experiments=EXPERIMENTS, cells=CELLS, generated=GENERATED) -> dict:
    """Random cells of an ordinary task: one-hot treatments, whose cells have moved; some values are zero."""
    rng = np.random.default_rng(1)
    treatments = 1.3 * np.eye(genes, dtype=np.float32)[: experiments + 1]
    controls = rng.normal(1, 1, (cells, genes)).clip(0)
    context = rng.normal(1, 1, (experiments, cells, genes)).clip(0) + rng.normal(0, 1, (experiments, 1, genes))
    x = {"controls": controls, "context": context, "y_tau": rng.normal(size=(generated, genes))}
    x = {name: array.astype(np.float32) for name, array in x.items()}
    return x | {"context_treatments": treatments[:experiments], "query": treatments[experiments],
                "tau": np.float32(0.4), "drop": np.array(False)}


@eqx.filter_jit
def compiled(network, x):
    given = Given(x["controls"], x["context"], x["context_treatments"], x["query"])
    condition = network.condition(given, jnp.arange(len(x["context"])))
    return network(x["y_tau"], x["tau"], condition, x["drop"])


def run(x, net=None) -> np.ndarray:
    return np.asarray(compiled(net or network(), jax.tree.map(jnp.asarray, x)))


def same(a, b) -> bool:
    return np.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_genes_have_no_number():
    """Genes in another order, in all that is given, give the same velocities in that order."""
    x, order = inputs(), np.array([3, 5, 0, 2, 1, 4])
    moved = {name: array[..., order] if array.ndim else array for name, array in x.items()}
    assert same(run(moved), run(x)[:, order]) and not same(run(moved), run(x))


def test_order_and_number_of_cells_and_experiments():
    """Given cells and experiments have no order, and a cell that is generated does not see the others; each cell given
    twice changes nothing."""
    x, expected = inputs(), run(inputs())
    back = x | {name: x[name][::-1] for name in ("context", "context_treatments", "controls")}
    assert same(run(back), expected)
    assert same(run(x | {"context": x["context"][:, ::-1]}), expected)
    assert same(run(x | {"y_tau": x["y_tau"][:2]}), expected[:2])
    twice = {"controls": np.repeat(x["controls"], 2, axis=0), "context": np.repeat(x["context"], 2, axis=1)}
    assert same(run(x | twice), expected)


@pytest.mark.parametrize("sizes", [{"genes": 4}, {"genes": 9}, {"experiments": 0}, {"experiments": 5}, {"cells": 2}])
def test_any_sizes(sizes):
    """The same weights take any number of genes, experiments and cells."""
    x = inputs(**sizes)
    assert run(x).shape == x["y_tau"].shape and np.isfinite(run(x)).all()


def test_everything_given_matters():
    """Each part of a task changes the answer: control cells, context, which gene was treated in it, query, time."""
    x = inputs()
    changes = {"controls": x["controls"] + 1, "context": x["context"] + 1,
               "context_treatments": x["context_treatments"][::-1], "query": np.roll(x["query"], 1),
               "tau": np.float32(0.6), "y_tau": x["y_tau"] + 1}
    for name, changed in changes.items():
        assert not same(run(x | {name: changed}), run(x)), name


def test_the_null_condition_drops_the_query_only():
    """Without condition no query is seen, but control cells and experiments are; that is not the query of zeros, which
    says that there is no knock-out."""
    x = inputs() | {"drop": np.array(True)}
    assert same(run(x | {"query": np.roll(x["query"], 1)}), run(x))
    assert not same(run(x | {"context": x["context"] + 1}), run(x))
    assert not same(run(x | {"query": np.zeros(GENES, np.float32), "drop": np.array(False)}), run(x))


def test_an_experiment_on_an_unmeasured_gene_counts():
    """A context experiment whose treatment is zero in all genes still changes the answer."""
    x = inputs()
    unmeasured = x | {"context_treatments": np.zeros_like(x["context_treatments"])}
    assert not same(run(unmeasured | {"context": 2 * x["context"]}), run(unmeasured))


def test_starts_as_the_gaussian_of_the_control_cells():
    """As initialised the flow carries noise onto the mean and spread of the control cells, and not more narrowly."""
    x, net = inputs(generated=2000), model.build(SMALL, GENES, key=jr.key(0))
    x["controls"][:, 2] = 1.5  # a constant gene
    y, steps = jr.normal(jr.key(1), (2000, GENES)), 200
    for i in range(steps):
        y = y + run(x | {"y_tau": y, "tau": np.float32((i + 0.5) / steps)}, net) / steps
    np.testing.assert_allclose(y.mean(axis=0), x["controls"].mean(axis=0), atol=0.1)
    np.testing.assert_allclose(y.std(axis=0), np.maximum(x["controls"].std(axis=0), LEAST), atol=0.1)


def test_partial_correlations_by_hand():
    """In a chain a -> b -> c the ends are correlated, and not so given b."""
    correlation = np.array([[1, 0.8, 0.64], [0.8, 1, 0.8], [0.64, 0.8, 1]])
    found = partial_correlations(jnp.asarray(correlation, jnp.float32))
    precision = np.linalg.inv(correlation + 0.1 * np.eye(3))
    assert found[0, 1] == pytest.approx(-precision[0, 1] / np.sqrt(precision[0, 0] * precision[1, 1]), abs=1e-5)
    assert abs(found[0, 2]) < 0.2 < found[0, 1]


def test_partial_correlations_of_many_genes_and_few_cells():
    """200 genes, half of them the same one, and 60 cells: the inverse is that of LAPACK in float64."""
    rng = np.random.default_rng(0)
    cells = rng.normal(size=(60, 200))
    cells[:, :100] = cells[:, :1]
    correlation = np.corrcoef(cells.T)
    precision = np.linalg.inv(correlation + 0.1 * np.eye(200))
    scale = np.sqrt(np.diag(precision))
    found = partial_correlations(jnp.asarray(correlation, jnp.float32))
    assert np.abs(found + precision / scale[:, None] / scale).max() < 1e-4


def test_nothing_calls_lapack():
    """On a CPU its batches can wait for each other for good when several devices call it at once (jaxlib 0.10)."""
    tasks = {name: jnp.stack([jnp.asarray(x)] * 8) for name, x in inputs().items()}
    program = eqx.filter_jit(eqx.filter_vmap(compiled, in_axes=(None, 0))).lower(network(), tasks).as_text()
    assert "dot_general" in program and "lapack" not in program


def test_how_strong_knock_outs_are_is_told():
    """Of every gene, also one that no experiment treats: the share of expression that was lost in the context, and what
    would be lost of its own. Nothing is, without experiments."""
    rng = np.random.default_rng(0)
    controls, hit = rng.poisson(5.0, (60, GENES)).astype(np.float32), np.eye(GENES, dtype=np.float32)[1:3]
    context = np.stack([controls * (1 - 0.6 * treatment) for treatment in hit])
    for experiments, lost in ((2, -0.6), (0, 0.0)):
        given = Given(*map(jnp.asarray, (controls, context[:experiments], hit[:experiments], hit[0])))
        features = exchangeable.of_pairs(given)
        np.testing.assert_allclose(features[..., 8], lost, rtol=1e-5)
        np.testing.assert_allclose(jnp.diag(features[..., 9]), lost * controls.mean(axis=0), rtol=1e-5)


def test_used_as_the_papers_network():
    """It is built by its name; `slots` say nothing; bad sizes are refused."""
    net = model.build(SMALL, GENES, key=jr.key(0))
    x = jax.tree.map(jnp.asarray, inputs())
    given = Given(x["controls"], x["context"], x["context_treatments"], x["query"])
    assert jax.tree.all(jax.tree.map(np.array_equal, net.condition(given, jnp.arange(3)),
                                     net.condition(given, SLOTS - 1 - jnp.arange(3))))
    assert model.count_parameters(net) == model.count_parameters(model.outline(SMALL, 50))
    with pytest.raises(BadInput, match="multiple of twice the number of heads"):
        model.build(Architecture(network="exchangeable.Exchangeable", width=10, heads=4), GENES, key=jr.key(0))


def test_the_sampler_asks_once_what_is_known_of_a_task(monkeypatch):
    """What neither noise nor time changes is computed once, and once more without the query for counterfactual cells,
    whatever the number of steps."""
    asked, whole = [], Exchangeable.condition

    def counted(*args):
        jax.debug.callback(lambda: asked.append(1))  # whenever it is computed, not when it is compiled
        return whole(*args)

    monkeypatch.setattr(Exchangeable, "condition", counted)
    x, net = jax.tree.map(jnp.asarray, inputs()), network()
    given = Given(x["controls"], x["context"], x["context_treatments"], x["query"])
    for source, times in ((None, 1), (given.controls, 2)):
        asked.clear()
        jax.jit(lambda key: sample.flow(net, given, 1.0, 7, CELLS, source, key=key))(jr.key(0))
        jax.effects_barrier()
        assert len(asked) == times
