"""Claims about model.py: its size, its symmetries, its three streams, and that two ways to attend are one function."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import model
import scales
from model import SLOTS, MapPFN

GENES, WIDTH, DEPTH, CELLS, EXPERIMENTS = 5, 16, 2, 6, 3
POPULATIONS = {"observed": 0, "context": 1}  # argument -> axis of the cells
CONDITIONS = ("observed", "context", "context_treatments", "query", "slots")


def shapes(*sizes, **options):
    """A network without numbers: shapes only, which takes neither time nor memory."""
    return eqx.filter_eval_shape(lambda: MapPFN(*sizes, **options, key=jr.key(0)))


def build(attention="auto", remat=False, skip=False, film_query=False) -> MapPFN:
    """A tiny network of random numbers: its own take long to compile, and its FiLM of zero would hide the time."""
    rng = np.random.default_rng(0)
    fill = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x
    return jax.tree.map(fill, shapes(GENES, WIDTH, DEPTH, 2, 2, attention=attention, remat=remat, skip=skip,
                                     film_query=film_query))


def inputs(seed=0, experiments=EXPERIMENTS, generated=CELLS, cells=CELLS, drop=False) -> dict:
    """Random arguments of the network by name. Treatments are dense, so that no weight is multiplied by zero."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return {"y_tau": normal(generated, GENES), "tau": np.float32(rng.random()), "observed": normal(cells, GENES),
            "context": normal(experiments, cells, GENES), "context_treatments": normal(experiments, GENES),
            "query": normal(GENES), "slots": rng.permutation(SLOTS)[:experiments].astype(np.int32),
            "drop": np.array(drop)}


@pytest.fixture(scope="module")
def network() -> MapPFN:
    return build()


@pytest.fixture(scope="module")
def run(network):
    """The compiled network; `run(**inputs())`, or `run(other_network, ...)`."""
    call = eqx.filter_jit(lambda net, x: net(**x))
    return lambda net=network, **x: np.asarray(call(net, jax.tree.map(jnp.asarray, x)))


def same(a, b) -> bool:
    return np.allclose(a, b, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- size (A.1)


def test_paper_settings_have_about_25_million_parameters():
    """At 50 genes the paper's settings give 25.9M parameters, as 4x expansion does; 2x would give 19.6M."""
    s = scales.at("paper", "model", "grn")
    sizes = s["genes"], s["width"], s["depth"], s["heads"], s["registers"]
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes(*sizes)) if hasattr(x, "shape"))
    hidden_unit = 2 * s["width"] + 1  # weights to and from it, and its bias
    assert sizes == (50, 256, 8, 4, 8)
    assert total == pytest.approx(25.9e6, rel=0.02)
    assert total - s["depth"] * 3 * 2 * s["width"] * hidden_unit == pytest.approx(19.6e6, rel=0.02)


def test_count_parameters_counts_each_once(network):
    """By hand: every matrix, bias and embedding of the tiny network."""
    e, d = WIDTH, GENES
    stream = (4 * e * e + 4 * e) + 3 * e * e + 2 * (e // 2) + (e * e + e) + (4 * e * e + 4 * e) + (4 * e * e + e)
    ends = 3 * (d * e + e) + 2 * (e * e + e) + (e * d + d)
    embeddings = 2 * d + 3 * e + 3 * e + SLOTS * e + 2 * e
    time = (4 * e * e + 4 * e) + (4 * e * e + e)
    assert model.count_parameters(network) == DEPTH * 3 * stream + ends + embeddings + time


def test_heads_that_do_not_divide_the_width_are_refused():
    """Width 30 cannot be shared by 4 heads."""
    with pytest.raises(scales.BadInput, match="width 30"):
        MapPFN(GENES, 30, 1, 4, 2, key=jr.key(0))


# ----------------------------------------------------------------------------------------------------- symmetries (4.1)


@pytest.mark.parametrize("population", POPULATIONS)
def test_order_of_given_cells_says_nothing(run, population):
    """A population is a set: permuting its cells leaves the velocity as it is."""
    x = inputs()
    order = np.random.default_rng(1).permutation(CELLS)
    shuffled = x | {population: np.take(x[population], order, POPULATIONS[population])}
    assert not same(x[population], shuffled[population])
    assert same(run(**x), run(**shuffled))


def test_generated_cells_are_equivariant(run):
    """Permuting the noise permutes the velocities with it, and nothing else."""
    x, order = inputs(), np.random.default_rng(1).permutation(CELLS)
    assert same(run(**x)[order], run(**x | {"y_tau": x["y_tau"][order]}))
    assert not same(run(**x), run(**x)[order])


def test_order_of_experiments_says_nothing_if_slots_follow(run):
    """Context experiments reordered together with treatments and slots give the same velocity."""
    x, order = inputs(), np.array([2, 0, 1])
    assert same(run(**x), run(**x | {name: x[name][order] for name in ("context", "context_treatments", "slots")}))


@pytest.mark.parametrize("moved", [("slots",), ("context",), ("context_treatments",)])
def test_slots_tie_cells_to_their_treatment(run, moved):
    """What slot an experiment has matters, and which treatment belongs to which cells matters more than rounding."""
    x, order = inputs(), np.array([2, 0, 1])
    assert np.abs(run(**x) - run(**x | {name: x[name][order] for name in moved})).max() > 1e-3


@pytest.mark.parametrize("name", CONDITIONS[:-1])
def test_every_input_matters(run, name):
    """Another observed population, context, treatment or query gives another velocity."""
    x = inputs()
    assert np.abs(run(**x) - run(**x | {name: inputs(seed=9)[name]})).max() > 1e-3


@pytest.mark.parametrize("experiments, generated", [(0, 6), (SLOTS, 4)])
def test_any_context_size_and_number_of_cells(run, experiments, generated):
    """The same weights take K = 0 and K = 10, and as many generated cells as asked for; both ways to attend agree."""
    x = inputs(experiments=experiments, generated=generated)
    velocity = run(**x)
    assert velocity.shape == (generated, GENES) and np.isfinite(velocity).all()
    assert same(velocity, run(build("plain"), **x))


# ------------------------------------------------------------------------------------------- null condition, time (A.2)


def test_null_condition_hides_every_input(run):
    """With drop=True the velocity depends on the noise and the time only; without, it is another."""
    x, other = inputs(drop=True), inputs(seed=9, drop=True)
    assert np.array_equal(run(**x), run(**x | {name: other[name] for name in CONDITIONS}))
    assert not same(run(**x), run(**x | {"y_tau": other["y_tau"]}))
    assert np.abs(run(**x) - run(**inputs())).max() > 1e-3


def test_time_enters_through_film_only(run, network):
    """FiLM starts at zero, where the time has no effect; once it is not zero, it has."""
    films = lambda net: [s.film for s in net.blocks.streams]
    fresh = eqx.tree_at(films, network, jax.jit(lambda: films(MapPFN(GENES, WIDTH, DEPTH, 2, 2, key=jr.key(0))))())
    early, late = (inputs() | {"tau": np.float32(tau)} for tau in (0.1, 0.9))
    assert np.array_equal(run(fresh, **early), run(fresh, **late))
    assert np.abs(run(**early) - run(**late)).max() > 1e-3


def test_treatment_gain_touches_the_treatment_stream_only():
    """[D11] It multiplies its values by the gain, its input weights by sqrt(D); queries, keys, other streams stay."""
    start = lambda net: (net.treatments_in.weight, net.cells_in.weight, *(s.qkv.weight for s in net.blocks.streams))
    draw = lambda gain: start(MapPFN(GENES, WIDTH, DEPTH, 2, 2, treatment_gain=gain, key=jr.key(0)))
    plain, large = (jax.jit(draw, static_argnums=0)(gain) for gain in (1.0, 10.0))
    ratios = [np.asarray(b / a) for a, b in zip(plain, large)]
    np.testing.assert_allclose(ratios[0], GENES**0.5, rtol=1e-5)
    for ratio in ratios[1:4]:
        np.testing.assert_allclose(ratio, 1, rtol=1e-5)
    np.testing.assert_allclose(ratios[4][:, : 2 * WIDTH], 1, rtol=1e-5)
    np.testing.assert_allclose(ratios[4][:, 2 * WIDTH :], 10, rtol=1e-5)


def test_gaussian_velocity_is_a_regression():
    """[D12] E[Y - Y_0 | Y_tau] for Y of N(0, I), against the least-squares slope of a simulation; zero at tau = 1/2."""
    y_0, y = np.random.default_rng(0).standard_normal((2, 200_000)).astype(np.float32)
    for tau in (0.1, 0.5, 0.8):
        y_tau = (1 - tau) * y_0 + tau * y
        slope = np.mean((y - y_0) * y_tau) / np.mean(y_tau**2)
        assert float(model.gaussian_velocity(jnp.ones((1, 1)), jnp.array(tau))[0, 0]) == pytest.approx(slope, abs=0.02)


def test_skip_adds_the_gaussian_velocity(run, network):
    """[D12] With skip the same weights give the same output, plus that velocity."""
    x = inputs()
    added = model.gaussian_velocity(jnp.asarray(x["y_tau"]), jnp.asarray(x["tau"]))
    assert same(run(build(skip=True), **x), run(**x) + added)


def test_film_by_query_is_a_direct_path_from_the_query(network):
    """[D34] With every attention output switched off, the query still reaches the velocity, unless the condition is
    dropped; without the flag it cannot."""
    mute = lambda net: eqx.tree_at(lambda n: [s.out.weight for s in n.blocks.streams], net,
                                   [jnp.zeros_like(s.out.weight) for s in net.blocks.streams])
    one, two = inputs(), inputs() | {"query": inputs(1)["query"]}
    for film_query, drop, reaches in ((True, False, True), (True, True, False), (False, False, False)):
        net, drop = mute(build(film_query=film_query)), {"drop": np.array(drop)}
        call = eqx.filter_jit(lambda x: net(**x))
        assert same(call(one | drop), call(two | drop)) != reaches


# ---------------------------------------------------------------------------------------------- attention and gradients


@pytest.mark.parametrize("tokens", [1, 66])
def test_looped_attention_is_plain_attention(tokens):
    """One head at a time, with the backward pass written out, gives the same values and gradients; large scores too."""
    *qkv, weight = np.random.default_rng(0).normal(0, 4, (4, tokens, 2, 4)).astype(np.float32)
    compiled = lambda f: jax.jit(jax.value_and_grad(lambda qkv: jnp.sum(weight * f(*qkv))))(qkv)
    for plain, looped in zip(*(jax.tree.leaves(compiled(f)) for f in (model.plain_attention, model.looped_attention))):
        np.testing.assert_allclose(plain, looped, rtol=1e-3, atol=1e-4 * np.abs(plain).max())


def test_padding_without_a_mask_changes_the_result():
    """[D3] 23 zero keys, rounding 41 tokens up to 64, take attention from the 41: outputs shrink by over a tenth."""
    q, k, v = jnp.asarray(np.random.default_rng(0).normal(size=(3, 41, 2, 8)), jnp.float32)
    pad = lambda x: jnp.pad(x, ((0, 23), (0, 0), (0, 0)))
    right, wrong = model.plain_attention(q, k, v), model.plain_attention(pad(q), pad(k), pad(v))[:41]
    assert np.linalg.norm(wrong) < 0.9 * np.linalg.norm(right)


@functools.cache
def loss_and_gradient(attention: str, remat: bool = False):
    """Of the whole network, under vmap over two tasks of which one has its condition dropped, compiled."""
    tasks = [inputs(seed, drop=drop) for seed, drop in ((0, False), (1, True))]
    tasks = jax.tree.map(lambda *x: jnp.stack(x), *tasks)
    weight = np.random.default_rng(2).normal(size=tasks["y_tau"].shape)
    loss = lambda net: jnp.sum(weight * jax.vmap(lambda x: net(**x))(tasks))
    value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss))(build(attention, remat))
    return float(value), gradient


def assert_same_gradient(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-4)
    leaves = [jax.tree.leaves(eqx.filter(gradient, eqx.is_array)) for _, gradient in (one, other)]
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(a).max() + 1e-3))


def test_looped_network_is_plain_network():
    """Loss and all gradients agree through the entire network, under vmap and jit."""
    assert_same_gradient(loss_and_gradient("plain"), loss_and_gradient("looped"))


def test_rematerialisation_changes_no_number():
    """Recomputing the activations gives the loss and gradients that keeping them gives."""
    assert_same_gradient(loss_and_gradient("plain"), loss_and_gradient("plain", remat=True))


def test_every_parameter_learns():
    """Every number has a gradient, but for what nobody reads: the queries, and all after attention, of the last block's
    cell and treatment streams (only the noise stream goes on to the output), and the slots that are not in use."""
    _, gradient = loss_and_gradient("plain")
    last = lambda get: lambda tree: [get(stream)[-1] for stream in tree.blocks.streams[1:]]  # both streams, last block
    unread = [
        *(last(lambda s, part=part, kind=kind: getattr(getattr(s, part), kind))
          for part in ("out", "expand", "contract") for kind in ("weight", "bias")),
        last(lambda s: s.film.weight[:, 2 * WIDTH:]), last(lambda s: s.film.bias[:, 2 * WIDTH:]),
        last(lambda s: s.qkv.weight[:, :WIDTH]), last(lambda s: s.q_norm.weight),
    ]
    for get in unread:
        assert all((np.asarray(x) == 0).all() for x in get(gradient))
    alive = [np.asarray(x) != 0 for x in jax.tree.leaves(gradient)]
    dead = sum(x.size for get in unread for x in get(gradient))
    unused = np.setdiff1d(np.arange(SLOTS), inputs()["slots"])  # of the task whose condition is not dropped
    assert not np.asarray(gradient.slot)[unused].any()
    assert sum((~x).sum() for x in alive) == dead + len(unused) * WIDTH
