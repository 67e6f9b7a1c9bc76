"""Claims about model.py: its size, its symmetries, its three streams, and that all ways to compute are one function."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import model
import scales
from attention import ATTENTION
from model import SLOTS, Architecture, MapPFN
from scales import BadInput
from tasks import Given

GENES, WIDTH, DEPTH, CELLS, EXPERIMENTS = 5, 16, 2, 6, 3
ORDER, CELL_ORDER = np.array([2, 0, 1]), np.array([4, 2, 0, 5, 3, 1])  # of experiments and cells; none in its place
TOLD = ("controls", "context", "context_treatments", "query")
SMALL = Architecture(width=WIDTH, depth=DEPTH, heads=2, registers=2, remat=False)


def shapes(**changes):
    """A network without numbers: shapes only, which takes neither time nor memory."""
    return model.outline(dataclasses.replace(SMALL, **changes), GENES)


def build(**changes) -> MapPFN:
    """A tiny network of random numbers: its own take long to compile, and its FiLM of zero would hide the time."""
    rng = np.random.default_rng(0)

    def fill(x):
        return jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x

    return jax.tree.map(fill, shapes(**changes))


def inputs(seed=0, experiments=EXPERIMENTS, generated=CELLS, drop=False) -> dict:
    """Random inputs of the network by name. Treatments are dense, so that no weight is multiplied by zero."""
    rng = np.random.default_rng(seed)
    sizes = {"y_tau": (generated,), "controls": (CELLS,), "context": (experiments, CELLS),
             "context_treatments": (experiments,), "query": ()}
    x = {name: rng.standard_normal((*size, GENES)).astype(np.float32) for name, size in sizes.items()}
    slots = rng.permutation(SLOTS)[:experiments].astype(np.int32)
    return x | {"tau": np.float32(rng.random()), "slots": slots, "drop": np.array(drop)}


def call(network, x: dict):
    given = Given(x["controls"], x["context"], x["context_treatments"], x["query"])
    return network(x["y_tau"], x["tau"], network.condition(given, x["slots"]), x["drop"])


compiled = eqx.filter_jit(call)


def run(network=None, **x) -> np.ndarray:
    return np.asarray(compiled(network or build(), jax.tree.map(jnp.asarray, x)))


def same(a, b) -> bool:
    return np.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_paper_settings_have_about_25_million_parameters():
    """At 50 genes the paper's settings give 25.9M parameters, as 4x expansion does; 2x would give 19.6M."""
    a = Architecture()
    total = model.count_parameters(model.outline(a, 50))
    assert (a.width, a.depth, a.heads, a.registers) == (256, 8, 4, 8)
    assert total == pytest.approx(25.9e6, rel=0.02)
    hidden_unit = 2 * a.width + 1  # weights to and from it, and its bias
    assert total - a.depth * 3 * 2 * a.width * hidden_unit == pytest.approx(19.6e6, rel=0.02)


def test_count_parameters_counts_each_once():
    """By hand: every matrix, bias and embedding of the tiny network."""
    e, d = WIDTH, GENES
    stream = (4 * e * e + 4 * e) + 3 * e * e + 2 * (e // 2) + (e * e + e) + (4 * e * e + 4 * e) + (4 * e * e + e)
    ends = 3 * (d * e + e) + 2 * (e * e + e) + (e * d + d)
    embeddings = 2 * d + 3 * e + 3 * e + SLOTS * e + 2 * e
    time = (4 * e * e + 4 * e) + (4 * e * e + e)
    assert model.count_parameters(shapes()) == DEPTH * 3 * stream + ends + embeddings + time


@pytest.mark.parametrize("changes, named", [
    ({"width": 30, "heads": 4}, "30"), ({"heads": 0}, "heads"), ({"depth": 0}, "depth"),
    ({"registers": -1}, "registers"),
    ({"attention": "flash"}, "flash"), ({"precision": "half"}, "half"),
    ({"network": "nowhere.Net"}, "nowhere.Net"), ({"network": "Net"}, "Net")])
def test_impossible_networks_are_refused(changes, named):
    """Sizes that do not fit, and names that do not exist, are named."""
    with pytest.raises(BadInput, match=named):
        model.build(dataclasses.replace(SMALL, **changes), GENES, key=jr.key(0))


@pytest.mark.parametrize("names, axis, order", [
    (["controls"], 0, CELL_ORDER), (["context"], 1, CELL_ORDER),
    (["context", "context_treatments", "slots"], 0, ORDER)])
def test_order_says_nothing(names, axis, order):
    """A population is a set: permuting its cells leaves the velocity as it is. So do context experiments reordered
    together with treatments and slots."""
    x = inputs()
    moved = x | {name: np.take(x[name], order, axis) for name in names}
    assert not any(same(x[name], moved[name]) for name in names)
    assert same(run(**x), run(**moved))


def test_generated_cells_are_equivariant():
    """Permuting the noise permutes the velocities with it, and nothing else."""
    x = inputs()
    assert same(run(**x)[CELL_ORDER], run(**x | {"y_tau": x["y_tau"][CELL_ORDER]}))
    assert not same(run(**x), run(**x)[CELL_ORDER])


def test_every_input_matters():
    """Other control cells, context, treatments or query give another velocity, not by rounding. Slots tie cells to
    their treatment: what slot an experiment has matters, and which treatment belongs to which cells."""
    x, other = inputs(), inputs(seed=9)
    changed = [{name: other[name]} for name in TOLD]
    moved = [{name: x[name][ORDER]} for name in ("slots", "context", "context_treatments")]
    for change in changed + moved:
        assert np.abs(run(**x) - run(**x | change)).max() > 1e-3, (list(change), change in moved)


@pytest.mark.parametrize("experiments, generated", [(0, 6), (SLOTS, 4)])
def test_any_context_size_and_number_of_cells(experiments, generated):
    """The same weights take K = 0 and K = 10, and as many generated cells as asked for; both ways to attend agree."""
    x = inputs(experiments=experiments, generated=generated)
    velocity = run(**x)
    assert velocity.shape == (generated, GENES) and np.isfinite(velocity).all()
    assert same(velocity, run(build(attention="plain"), **x))


class Slots(eqx.Module):
    """A network whose condition is its slots."""

    def condition(self, given, slots):
        return slots


def test_slots_are_distinct_and_random():
    """[D4] Each task has K different slots, and every slot comes up in every place."""
    given = Given(*(jnp.asarray(inputs()[name]) for name in Given._fields))
    draw = jax.jit(jax.vmap(lambda key: model.prepare(Slots(), given, key=key)))
    slots = np.asarray(draw(jr.split(jr.key(0), 500)))
    assert all(len(set(row)) == EXPERIMENTS for row in slots)
    assert all(set(column) == set(range(SLOTS)) for column in slots.T)


def test_null_condition_hides_every_input():
    """With drop=True the velocity depends on the noise and the time only; without, it is another."""
    x, other = inputs(drop=True), inputs(seed=9, drop=True)
    assert np.array_equal(run(**x), run(**x | {name: other[name] for name in (*TOLD, "slots")}))
    assert not same(run(**x), run(**x | {"y_tau": other["y_tau"]}))
    assert np.abs(run(**x) - run(**inputs())).max() > 1e-3


@pytest.mark.exercise4
def test_time_enters_through_film_only():
    """FiLM starts at zero, where the time has no effect; once it is not zero, it has."""
    def films(network) -> list:
        return [getattr(network.blocks, stream).film for stream in ("noise", "cells", "treatments")]

    start = jax.jit(lambda: films(model.build(SMALL, GENES, key=jr.key(0))))()
    fresh = eqx.tree_at(films, build(), start)
    early, late = (inputs() | {"tau": np.float32(tau)} for tau in (0.1, 0.9))
    assert np.array_equal(run(fresh, **early), run(fresh, **late))
    assert np.abs(run(**early) - run(**late)).max() > 1e-3


def test_treatment_gain_touches_the_treatment_stream_only():
    """[D11] It multiplies its values by the gain, its input weights by sqrt(D); queries, keys, other streams stay."""
    def start(gain):
        net = model.build(dataclasses.replace(SMALL, treatment_gain=gain), GENES, key=jr.key(0))
        blocks = (net.blocks.noise, net.blocks.cells, net.blocks.treatments)
        return net.treatments_in.weight, net.cells_in.weight, *(stream.qkv.weight for stream in blocks)

    plain, large = (jax.jit(start, static_argnums=0)(gain) for gain in (1.0, 10.0))
    ratios = [np.asarray(b / a) for a, b in zip(plain, large)]
    *ratios, last = ratios
    for ratio, expected in zip([*ratios, last[:, : 2 * WIDTH], last[:, 2 * WIDTH :]], (GENES**0.5, 1, 1, 1, 1, 10)):
        np.testing.assert_allclose(ratio, expected, rtol=1e-5)


def test_gaussian_velocity_is_a_regression(rng):
    """[D12] E[Y - Y_0 | Y_tau] for Y of N(0, I), against the slope of a simulation; it is what skip adds."""
    y_0, y = rng.standard_normal((2, 200_000)).astype(np.float32)
    for tau in (0.1, 0.5, 0.8):
        y_tau = (1 - tau) * y_0 + tau * y
        slope = np.mean((y - y_0) * y_tau) / np.mean(y_tau**2)
        assert float(model.gaussian_velocity(jnp.ones((1, 1)), jnp.array(tau))[0, 0]) == pytest.approx(slope, abs=0.02)
    x = inputs()
    added = model.gaussian_velocity(jnp.asarray(x["y_tau"]), jnp.asarray(x["tau"]))
    assert same(run(build(skip=True), **x), run(**x) + added)


@pytest.mark.exercise4
def test_film_by_query_is_a_direct_path_from_the_query():
    """[D34] With every attention output switched off, the query still reaches the velocity, unless the condition is
    dropped; without the flag it cannot."""
    def outputs(net):
        return [net.blocks.noise.out.weight, net.blocks.cells.out.weight, net.blocks.treatments.out.weight]

    one, two = inputs(), inputs() | {"query": inputs(1)["query"]}
    for film_query, drop, reaches in ((True, False, True), (True, True, False), (False, False, False)):
        net, drop = build(film_query=film_query), {"drop": np.array(drop)}
        net = eqx.tree_at(outputs, net, [jnp.zeros_like(weight) for weight in outputs(net)])
        assert same(run(net, **one | drop), run(net, **two | drop)) != reaches


@functools.cache
def loss_and_gradient(**changes):
    """Of the whole network, under vmap over two tasks of which one has its condition dropped, compiled."""
    both = [inputs(seed, drop=drop) for seed, drop in ((0, False), (1, True))]
    both = jax.tree.map(lambda *x: jnp.stack(x), *both)
    weight = np.random.default_rng(2).normal(size=both["y_tau"].shape)

    def loss(network):
        return jnp.sum(weight * jax.vmap(lambda x: call(network, x))(both))

    value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss))(build(**changes))
    return float(value), gradient


@pytest.mark.parametrize("other", [{"attention": "looped"}, {"attention": "plain", "remat": True}])
def test_ways_to_compute_change_no_number(other):
    """A loop over heads, and recomputing activations, give the loss and all gradients of the plain network."""
    (value, gradient), (value_2, gradient_2) = loss_and_gradient(attention="plain"), loss_and_gradient(**other)
    assert value == pytest.approx(value_2, rel=1e-4)
    leaves = [jax.tree.leaves(eqx.filter(g, eqx.is_array)) for g in (gradient, gradient_2)]
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(a).max() + 1e-3))


def relative(a, b) -> float:
    """Distance of all numbers of two trees, relative to the first."""
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]) for tree in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def check_bfloat16(attention: str) -> None:
    """With products in bfloat16 velocity and gradient are other numbers, by less than 2%."""
    x, exact = inputs(), {"attention": "plain", "precision": "float32"}
    rounded = {"attention": attention, "precision": "bfloat16"}
    with jax.default_matmul_precision("highest"):  # a GPU rounds even in float32
        velocity, (_, gradient) = run(build(**exact), **x), loss_and_gradient(**exact)
    assert 1e-4 < relative(velocity, run(build(**rounded), **x)) < 0.02
    assert 1e-4 < relative(gradient, loss_and_gradient(**rounded)[1]) < 0.02


@pytest.mark.parametrize("attention", ["looped", "plain", "cudnn"])
def test_bfloat16_changes_little(attention, monkeypatch):
    """[D56] Of the whole network under vmap; cuDNN's attention with another kernel, which runs on a CPU."""
    flash = functools.partial(ATTENTION["cudnn"], implementation="xla")
    monkeypatch.setitem(ATTENTION, "cudnn", flash)
    check_bfloat16(attention)


def test_every_parameter_learns():
    """Every number has a gradient, but for what nobody reads: the queries, and all after attention, of the last block's
    cell and treatment streams (only the noise stream goes on to the output), and the slots that are not in use."""
    _, gradient = loss_and_gradient(attention="plain")
    unread = []
    for stream in (gradient.blocks.cells, gradient.blocks.treatments):
        for part in (stream.out, stream.expand, stream.contract):
            unread += [part.weight[-1], part.bias[-1]]
        unread += [stream.film.weight[-1][2 * WIDTH:], stream.film.bias[-1][2 * WIDTH:],
                   stream.qkv.weight[-1][:WIDTH], stream.q_norm.weight[-1]]
    assert all((np.asarray(x) == 0).all() for x in unread)
    unused = np.setdiff1d(np.arange(SLOTS), inputs()["slots"])  # of the task whose condition is not dropped
    assert not np.asarray(gradient.slot)[unused].any()
    zeros = sum((np.asarray(x) == 0).sum() for x in jax.tree.leaves(eqx.filter(gradient, eqx.is_array)))
    assert zeros == sum(x.size for x in unread) + len(unused) * WIDTH


def test_a_file_is_read_whole_or_refused(tmp_path):
    """A network that was written is read back with its header, number for number. A missing, truncated or foreign file
    ends in a message with its name, whatever is wrong with it."""
    file, network, head = tmp_path / "bad.eqx", build(), dataclasses.asdict(SMALL) | {"genes": GENES, "screen": "x"}
    model.write_leaves(file, head, network)
    found, read = model.load_model(file)
    assert found == head
    assert jax.tree.all(jax.tree.map(np.array_equal, eqx.filter(network, eqx.is_array), eqx.filter(read, eqx.is_array)))
    x = file.read_bytes()
    other_width, first = x.replace(b'"width": 16', b'"width": 32'), x.index(b"\n") + 1
    for damaged in (b"", x[: len(x) // 2], x[:-1], x[:40], b"\x80\x81" + x, b"3\n" + x, x[:first], other_width,
                    b"{}\n" + x, None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        with pytest.raises(BadInput, match="bad.eqx"):
            model.load_model(file)
