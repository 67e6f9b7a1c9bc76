"""Claims about train.py: the loss, the update, what is random; stopping, looking and splitting change nothing."""

import csv
import dataclasses
import json
import re
import sys
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import model
import prior
import scales
import tasks
import train
from scales import BadInput
from tasks import TEST, TRAIN, VALIDATION, Given, Task
from train import Settings, State

class Told(eqx.Module):
    """A network that returns `say(y_tau, tau, drop)`, to see what a loss hands to it."""

    say: object = eqx.field(static=True)

    def condition(self, given, slots):
        return slots

    def __call__(self, y_tau, tau, condition, drop):
        return jnp.broadcast_to(self.say(y_tau, tau, drop), y_tau.shape)


def random_tasks(seed: int, count: int, genes=5, cells=6) -> Task:
    rng, shapes = np.random.default_rng(seed), ((cells, genes), (2, cells, genes), (2, genes), (genes,), (cells, genes))
    *given, target = (rng.normal(0.5, 1.5, (count, *shape)).astype(np.float32) for shape in shapes)
    return Task(Given(*given), target)


def losses_of(say, batch: Task, drop_condition=0.2) -> np.ndarray:
    """The loss of each task."""
    loss = jax.vmap(lambda task, key: train.task_loss(Told(say), task, drop_condition, key=key))
    return np.asarray(jax.jit(loss)(batch, jr.split(jr.key(0), len(batch.target))))


@pytest.mark.exercise3
def test_flow_of_some_cells_and_mean_of_all():
    """With --target-cells the flow is learnt from the first cells only, with --mean-loss the mean from all of them: its
    squared error, times the weight. A network that has no mean is refused."""
    class Mean(NamedTuple):
        mean: object

    class WithMean(Told):
        def condition(self, given, slots):
            return Mean(jnp.ones((2, 5)))

    batch = random_tasks(0, 1)
    task = jax.tree.map(lambda x: x[0], batch)
    more = task._replace(target=task.target + np.r_[0.0, 0, 1, 1, 1, 1][:, None].astype(np.float32))
    network = WithMean(lambda y_tau, tau, drop: 0.0)

    def loss(task, *settings, network=network):
        return float(train.task_loss(network, task, 0.0, *settings, key=jr.key(3)))

    assert loss(task, 2) == loss(more, 2) and loss(task) != loss(more)
    for each in (task, more):
        error = ((each.target.mean(axis=0) - 1) ** 2).mean()
        assert loss(each, 2, 0.5) - loss(each, 2) == pytest.approx(0.5 * error, rel=1e-4)
    with pytest.raises(BadInput, match="Told has no mean"):
        loss(task, 2, 0.5, network=Told(lambda y_tau, tau, drop: 0.0))


@pytest.fixture(scope="module")
def beginning(trained):
    """State of `trained` before its first update, as NumPy, since updates consume theirs; and the static part."""
    state, static = train.start(trained.settings, trained.folder / "none", trained.screen)
    return jax.tree.map(np.asarray, state), static


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("data",))


def spread(tree, *axes, devices=2):
    """Placed on the devices as train.train places the state (no axes) and the tasks (None, "data")."""
    return jax.device_put(tree, NamedSharding(mesh_of(devices), PartitionSpec(*axes)))


def run_update(update, state: State, batches: Task, devices=2):
    """(state, loss, gradient norm) after one update on tasks [A, B, ...]."""
    batches = spread(batches, None, "data", devices=devices)
    return jax.device_get(update(spread(state, devices=devices), batches, jr.key(7)))


def micro_batches(batch: Task, accumulate: int) -> Task:
    return jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)


def moments(state: State):
    """Adam's first moment: after one update, a tenth of the (clipped) gradient."""
    mu = state.optimiser[1].inner_state[0].mu
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(mu)])


def rows_of(folder) -> list[dict]:
    return list(csv.DictReader((folder / "log.csv").open()))


@pytest.mark.exercise3
def test_the_objective_in_closed_form():
    """(Eq. 3) A velocity of zero has loss E|Y - Y_0|^2: the second moment of the data, plus 1. With all target cells at
    c, v = (c - Y_tau) / (1 - tau) is exact: interpolation, time and target fit together. tau = sigmoid(N(0, 1)), one a
    task, and the condition is dropped in the given share of tasks (A.2)."""
    batch = random_tasks(0, 2000)
    losses = losses_of(lambda y, tau, drop: 0, batch)
    assert losses.mean() == pytest.approx((batch.target**2).mean() + 1, abs=float(5 * losses.std() / 2000**0.5))
    constant = batch._replace(target=np.full_like(batch.target, 0.7))
    assert losses_of(lambda y, tau, drop: (0.7 - y) / (1 - tau), constant).max() < 1e-4
    tau = np.sqrt(losses_of(lambda y, tau, drop: 1e4 * tau, batch)) / 1e4  # but for Y - Y_0, which is 1e-4 of it
    assert scipy.stats.kstest(scipy.special.logit(tau), "norm").pvalue > 0.01
    for rate in (0.0, 0.2, 1.0):
        dropped = losses_of(lambda y, tau, drop: 1e3 * drop, batch, rate) > 1e5
        assert dropped.mean() == pytest.approx(rate, abs=4 * (rate * (1 - rate) / 2000) ** 0.5)


@pytest.mark.exercise5
def test_schedule_warms_up_stays_and_decays():
    """Linear over the first 1%, at the peak, 1 - sqrt(progress) over the last 20%, nearly zero at the last update."""
    s = Settings(updates=1000, learning_rate=2e-4)
    rate = np.asarray(train.schedule(s)(np.arange(1000)))
    np.testing.assert_allclose(rate[:10], 2e-4 * np.arange(1, 11) / 10, rtol=1e-5)
    np.testing.assert_allclose(rate[10:800], 2e-4, rtol=1e-5)
    np.testing.assert_allclose(rate[800:], 2e-4 * (1 - np.sqrt(np.arange(1, 201) / 200)), atol=2e-9)
    assert 0 < rate[-1] < 1e-5 * s.learning_rate  # not zero, so that the last batch counts
    assert np.isfinite(train.schedule(dataclasses.replace(s, updates=1))(0)) and np.isfinite(train.schedule(s)(5000))


def test_an_update_has_the_rate_intended_and_a_clipped_gradient(trained, beginning):
    """log.csv tells the schedule's rate, read back from the optimiser, of each update to the last. Adam's first step
    shows that it is applied: every number moves by just that much, whatever its gradient, and by its weight decay. The
    moment after it is (1 - b1) times the gradient, cut to norm 1; the norm logged is the full one."""
    s, state = trained.settings, beginning[0]
    logged = [float(row["learning_rate"]) for row in rows_of(trained.folder)]
    np.testing.assert_allclose(logged, train.schedule(s)(np.arange(s.updates)), rtol=1e-4)
    batch = random_tasks(3, 8)
    batch = batch._replace(target=100 * batch.target)
    after, _, norm = run_update(trained.update, state, micro_batches(batch, 1))
    before, now = (x.parameters.velocity_out.weight for x in (state, after))
    np.testing.assert_allclose(np.abs(now - before * (1 - logged[0] * s.weight_decay)), logged[0], rtol=0.02)
    assert norm > 10 and np.linalg.norm(moments(after)) == pytest.approx(1 - s.b1, rel=1e-3)


def test_one_batch_can_be_overfitted(trained, beginning):
    """The same 8 tasks with the same noise, 100 times over: the loss falls from above 2.5 to less than a fifth."""
    state, batch, losses = spread(beginning[0]), spread(micro_batches(random_tasks(2, 8), 1), None, "data"), []
    for _ in range(100):
        state, loss, _ = trained.update(state, batch, jr.key(7))
        state = state._replace(update=spread(np.zeros((), np.int32)))  # the key of an update follows from its number
        losses.append(float(loss))
    assert losses[0] > 2.5 and losses[-1] < losses[0] / 5


def test_a_batch_can_be_split_at_will(like, trained, beginning):
    """8 tasks on two devices at once have the loss and gradient of 8 micro-batches of one task on one device:
    accumulation is a larger batch, and devices share it. [D8] The average decays by 0.999 with each micro-batch, by
    0.999^8 with the update, and what inference uses after a first update are its weights."""
    (state, static), batch = beginning, random_tasks(3, 8)
    s = like(accumulate=8, micro_batch=1, ema=0.999)
    apart = train.make_update(s, static, mesh_of(1))
    after, *numbers = run_update(trained.update, state, micro_batches(batch, 1))
    other, *others = run_update(apart, state, micro_batches(batch, 8), devices=1)
    np.testing.assert_allclose(numbers, others, rtol=1e-4)
    np.testing.assert_allclose(moments(after), moments(other), atol=1e-4 * np.abs(moments(after)).max())
    averaged = train.averaged(s, jax.tree.map(jnp.asarray, other))
    for weights, average, used in zip(*map(jax.tree.leaves, (other.parameters, other.average, averaged))):
        np.testing.assert_allclose(average, (1 - 0.999**8) * weights, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(used, weights, rtol=1e-4, atol=1e-5)


@pytest.mark.exercise5
def test_average_is_the_weighted_mean_of_the_weights(trained, beginning):
    """[D8] EMA in closed form: weight ema^(n - i) for update i, normalised, so that the start from zero is gone."""
    state, ema, seen = beginning[0], trained.settings.ema, []
    for seed in range(3):
        state, *_ = run_update(trained.update, state, micro_batches(random_tasks(seed, 8), 1))
        seen.append(state.parameters)
    weights = np.array([ema**2, ema, 1]) / (ema**2 + ema + 1)
    expected = jax.tree.map(lambda *x: np.tensordot(weights, np.stack(x), 1), *seen)
    averaged = train.averaged(trained.settings, jax.tree.map(jnp.asarray, state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), averaged, expected)


def test_no_key_is_used_twice(beginning):
    """The loss of a task passes JAX's check for reuse of random keys."""
    parameters, static = beginning[0].parameters, beginning[1]
    task = jax.tree.map(lambda x: jnp.asarray(x[0]), random_tasks(0, 1))
    with jax.debug_key_reuse(True):
        loss = jax.jit(lambda p, key: train.task_loss(eqx.combine(p, static), task, 0.2, key=key))
        assert np.isfinite(loss(parameters, jr.key(0)))


def multiplications(text: str) -> dict[str, int]:
    """Of all matrix products in a lowered program, by the type of their factors; a loop's body counts once."""
    total = {"f32": 0, "bf16": 0}
    pattern = r"contracting_dims = \[([\d, ]*)\].*: \(tensor<(\S+)x(f32|bf16)>, tensor<\S+x\3>\) -> tensor<(\S+)x\w+>"
    for summed, left, kind, out in re.findall(pattern, text):
        sizes = [int(left.split("x")[int(axis)]) for axis in summed.split(",") if axis.strip()]
        total[kind] += int(np.prod([*map(int, out.split("x")), *sizes]))
    assert len(re.findall(pattern, text)) == text.count("stablehlo.dot_general")
    return total


@pytest.mark.parametrize("section, genes, tokens", [("linear", 20, 3013), ("grn", 50, 2017)])
def test_paper_update_lowers_for_cuda(section, genes, tokens, monkeypatch):
    """The update at the paper's full size is traced and lowered for an NVIDIA GPU, from shapes alone. Attention is
    cuDNN's, forwards, again for the backward pass, and backwards, and no T x T scores are stored; of all other
    multiplications over 98% have factors in bfloat16. States keep their shapes."""
    # Lowering asks for the version of cuDNN, which a machine without a GPU need not have.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 90_000)
    fields = {field.name for field in dataclasses.fields(Settings)}
    changed = {name: value for name, value in scales.at("paper", section).items() if name in fields}
    s = Settings(**changed, attention="cudnn", precision="bfloat16")
    parameters, static = eqx.partition(model.outline(s, genes), lambda x: isinstance(x, jax.ShapeDtypeStruct))
    state = jax.eval_shape(lambda p: State(p, train.make_optimiser(s).init(p), jax.tree.map(jnp.zeros_like, p),
                                           jnp.zeros((), int)), parameters)
    batch, n, k = (s.accumulate, s.micro_batch), s.cells, s.context
    fields = [jax.ShapeDtypeStruct(batch + size, jnp.float32)
              for size in ((n, genes), (k, n, genes), (k, genes), (genes,), (n, genes))]
    batches = Task(Given(*fields[:4]), fields[4])
    traced = train.make_update(s, static, mesh_of(1)).trace(state, batches, jax.eval_shape(lambda: jr.key(0)))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert s.updates * s.accumulate == {"linear": 50_000, "grn": 400_000}[section]
    assert f"tensor<{s.micro_batch}x{k}x{n}x{genes}xf32>" in text
    assert [x.shape for x in jax.tree.leaves(traced.out_info)[:-2]] == [x.shape for x in jax.tree.leaves(state)]
    calls = re.findall(r"@__cudnn\$(\w+)", text)
    assert sorted(calls) == ["fmhaSoftmax", "fmhaSoftmax", "fmhaSoftmaxBackward"]
    padded = -(-tokens // 64) * 64
    assert f"x{padded}x4x64xbf16" in text and f"{tokens}x{tokens}" not in text and f"{padded}x{padded}" not in text
    work = multiplications(text)
    assert s.depth * work["bf16"] > 0.98 * (s.depth * work["bf16"] + work["f32"])


def test_tasks_of_an_update_are_its_own(like, trained):
    """They are the same whenever they are asked for, come as [A, B, ...], no two alike, and change with the seed."""
    s, seen = like(accumulate=2, micro_batch=3), set()
    for update in (0, 1):
        batches = train.update_tasks(s, trained.screen, update)
        assert batches.given.context.shape == (2, 3, 2, 6, 5)
        assert np.array_equal(batches.target, train.update_tasks(s, trained.screen, update).target)
        seen |= {cells.tobytes() for cells in batches.target.reshape(6, 6, 5)}
    assert len(seen) == 12
    other = train.update_tasks(like(accumulate=2, micro_batch=3, seed=1), trained.screen, 0)
    assert not {cells.tobytes() for cells in other.target.reshape(6, 6, 5)} & seen


def test_shares_are_parts_of_the_whole(like, trained):
    """What processes draw, each for its share of the micro-batches, is together what one would have drawn alone."""
    s = like(accumulate=2, micro_batch=4)
    parts = [train.update_tasks(s, trained.screen, 3, share) for share in (range(0, 1), range(1, 4))]
    together = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *parts)
    assert jax.tree.all(jax.tree.map(np.array_equal, together, train.update_tasks(s, trained.screen, 3)))


def test_genes_are_permuted_in_training_only(like, trained):
    """[D52] With permuted genes the tasks of an update are the ones without, each with columns in an order of its own;
    validation tasks keep theirs."""
    plain, other = (train.update_tasks(like(permute_genes=on), trained.screen, 0) for on in (False, True))
    orders = set()
    for before, after in zip(plain.target[0], other.target[0]):
        order = np.argmax((before[:, :, None] == after[:, None]).all(0), axis=0)  # new gene -> old gene
        np.testing.assert_array_equal(before[:, order], after)
        orders.add(tuple(order.tolist()))
    assert len(orders) > 5 and all(sorted(order) == list(range(5)) for order in orders)
    same = [train.validation_tasks(like(permute_genes=on), trained.screen).target for on in (False, True)]
    np.testing.assert_array_equal(*same)


def test_a_network_of_any_size_meets_every_size(like, trained):
    """Each update has one K and one D, the same whenever it is asked for; all K up to the largest, by powers of two,
    and all genes or half, come up."""
    s, found = like(any_size=True, context=3), set()
    for update in range(60):
        batch = train.update_tasks(s, trained.screen, update)
        context, genes = batch.given.context_treatments.shape[-2:]
        assert batch.target.shape[-1] == genes and train.sizes(s, 5, update) == (context, genes)
        found.add((context, genes))
    assert found == {(context, genes) for context in (1, 2, 3) for genes in (5, 2)}
    assert train.sizes(like(any_size=True, context=0), 5, 0)[0] == 0 and train.sizes(s, 1, 0)[1] == 1
    train.check(like(any_size=True, network="exchangeable.Exchangeable", context=16))  # more than there are slots


def test_held_out_graphs_are_not_trained_on(like, trained):
    """All that training is given are TRAIN conditions; queries of validation VALIDATION ones, of graphs that are not
    trained on at all (do-values, drawn for each graph, tell). Without such conditions there is no validation loss."""
    screen = trained.screen

    def values(treatments):
        return set(np.asarray(treatments).max(-1).ravel().tolist()) - {0.0}

    seen = set()
    for update in range(40):
        given = train.update_tasks(like(), screen, update).given
        seen |= values(given.query) | values(given.context_treatments)
    assert seen <= values(screen.treatments[screen.split == TRAIN]) and len(seen) > 70
    batch = train.validation_tasks(like(), screen)
    assert values(batch.given.query) <= values(screen.treatments[screen.split == VALIDATION])
    assert not (values(batch.given.context_treatments) | values(batch.given.query)) & seen
    assert not values(screen.treatments[screen.split == TEST]) & (seen | values(batch.given.query))
    without = dataclasses.replace(screen, split=np.where(screen.split == VALIDATION, TEST, screen.split))
    assert train.validation_tasks(like(), without) is None
    assert np.isnan(train.make_validation(like(), None)(None, None))


def test_validation_changes_nothing(trained, beginning):
    """[D7] It leaves the state as it was, bit for bit, and is always the same number."""
    state, static = beginning
    state, *_ = run_update(trained.update, state, micro_batches(random_tasks(0, 8), 1))
    state = jax.tree.map(jnp.asarray, state)
    before = jax.tree.map(np.array, state)
    s = trained.settings
    validate, held_out = train.make_validation(s, static), train.validation_tasks(s, trained.screen)
    assert validate(state, held_out) == validate(state, held_out) > 0
    assert jax.tree.all(jax.tree.map(np.array_equal, before, state))


def test_training_learns_and_ends_tidily(trained, beginning):
    """The loss of unseen graphs falls below what the untrained network has; no temporary file or checkpoint stays."""
    rows = rows_of(trained.folder)
    assert [int(row["update"]) for row in rows] == list(range(1, 121)) and rows[-1]["tasks"] == "960"
    s, (state, static) = trained.settings, beginning
    untrained = state._replace(average=jax.tree.map(lambda x: (1 - s.ema) * x, state.parameters), update=jnp.array(1))
    validate, held_out = train.make_validation(s, static), train.validation_tasks(s, trained.screen)
    assert float(rows[-1]["validation_loss"]) < 0.97 * validate(untrained, held_out)
    assert {file.name for file in trained.folder.iterdir()} == {"model.eqx", "log.csv"}
    head, network = model.load_model(trained.folder / "model.eqx")
    assert head["width"] == 16 and head["learning_rate"] == 3e-3 and head["revision"] == scales.revision()
    assert head["fingerprint"] == trained.screen.made["fingerprint"] and head["screen"] == "dags"
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(eqx.filter(network, eqx.is_array)))


def test_other_systems_as_it_goes(trained, like, tmp_path, monkeypatch):
    """With --fresh 2, updates 3 and 4 are on systems that the screen has not, 5 on others again; the same for whoever
    begins there, others for another training. Real cells, and a fork's own prior, cannot be drawn anew."""
    met, update_tasks = [], train.update_tasks

    def noted(s, screen, *rest):
        met.append(screen.cells[:3].sum())
        return update_tasks(s, screen, *rest)

    monkeypatch.setattr(train, "update_tasks", noted)
    train.train(like(updates=5, fresh=2), tmp_path / "a", trained.screen)
    assert met[1] == met[2] == trained.screen.cells[:3].sum() and met[3] == met[4] and len(set(met)) == 3
    second = prior.another(trained.screen, like().seed, 2)
    assert prior.another(trained.screen, like().seed + 1, 2).cells[:3].sum() != met[5]
    assert second.cells[:3].sum() == met[5] and (second.split == tasks.TRAIN).all()
    assert len(second.systems) == 16 and second.made["section"] == trained.screen.made["section"]
    made = trained.screen.made
    real = dataclasses.replace(trained.screen, made=made | {"settings": {"source": "a.h5ad"}})
    with pytest.raises(BadInput, match="--fresh 2: dags is of no prior of prior.py"):
        train.train(like(fresh=2), tmp_path / "b", real)
    with pytest.raises(BadInput, match="--fresh: Mine is of no prior of prior.py"):
        prior.another(dataclasses.replace(trained.screen, made=made | {"title": "Mine"}), 0, 1)


@pytest.mark.parametrize("looking", [{}, {"log_every": 7, "validate_every": 28}], ids=["same settings", "looking more"])
def test_killed_and_resumed_is_undisturbed(trained, like, tmp_path, monkeypatch, looking):
    """Stopped after a checkpoint, a run goes on to the very same model, byte for byte, and log, but for its speed. So
    does one that looks at the validation tasks more often and logs means of 7 updates, of each exactly those 7."""
    s, made = like(**looking), train.update_tasks

    def stopping(s, screen, update, share):
        return made(s, screen, update, share) if update != 25 else sys.exit("a power cut")

    monkeypatch.setattr(train, "update_tasks", stopping)
    clock = iter(range(10**6))
    monkeypatch.setattr(train.time, "monotonic", lambda: 25.0 * next(clock))  # it is saved every few updates
    with pytest.raises(SystemExit):
        train.train(s, tmp_path, trained.screen, trained.update)
    monkeypatch.undo()
    assert 0 < json.loads((tmp_path / "checkpoint.eqx").open("rb").readline())["update"] <= 25
    train.train(s, tmp_path, trained.screen, trained.update)
    assert (tmp_path / "model.eqx").read_bytes() == (trained.folder / "model.eqx").read_bytes()
    expected, logged = rows_of(trained.folder), rows_of(tmp_path)
    assert [int(row["update"]) for row in logged] == [*range(s.log_every, s.updates, s.log_every), s.updates]
    for row in logged:
        end = int(row["update"])
        for name in ("tasks", "learning_rate", "gradient_norm"):
            assert row[name] == expected[end - 1][name]
        losses = [float(r["loss"]) for r in expected[(end - 1) // s.log_every * s.log_every : end]]
        assert float(row["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_checkpoint_goes_on_with_the_same_settings_only(trained, beginning, like, tmp_path):
    """How often is logged or saved may change; what decides the result, the data among it, may not; damage is named."""
    state, file = beginning[0]._replace(update=np.full_like(beginning[0].update, 7)), tmp_path / "checkpoint.eqx"
    head = train.header(trained.settings, tmp_path, trained.screen)
    model.write_leaves(file, head, jax.tree.map(jnp.asarray, state))
    state, _ = train.start(like(log_every=3, validate_every=9, checkpoint_seconds=1.5), tmp_path, trained.screen)
    assert int(state.update) == 7  # it goes on, and does not begin anew
    other = dataclasses.replace(trained.screen, made=trained.screen.made | {"fingerprint": 1})
    for settings, screen, named in ((like(clip=0.5), trained.screen, "clip"), (like(), other, "fingerprint")):
        with pytest.raises(BadInput, match=named):
            train.start(settings, tmp_path, screen)
    whole = file.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:-1]):
        file.write_bytes(damaged)
        with pytest.raises(BadInput, match="checkpoint.eqx"):
            train.start(trained.settings, tmp_path, trained.screen)


def test_one_run_for_each_split_and_none_twice(trained, like, main, monkeypatch, capsys):
    """Splits are separate runs with their own seeds, folders and files. The same command again does no work; with other
    settings it is refused, and names the setting."""
    asked, runs, here = iter((like(), like(clip=0.5), like(name="two"))), [], tasks.splits(like())
    monkeypatch.setattr(scales, "parse", lambda *a: next(asked))
    monkeypatch.setattr(train, "train", lambda run, folder, *rest: runs.append((run.seed, folder.name)))
    main(train)
    assert "already trained" in capsys.readouterr().out
    with pytest.raises(BadInput, match="clip 1.0, now 0.5"):
        main(train)
    assert not runs
    numbers = iter((0, 1))
    monkeypatch.setattr(tasks, "splits", lambda s: 2 * here)
    monkeypatch.setattr(tasks, "split_number", lambda folder: next(numbers))
    main(train)
    assert runs == [(0, "split-0"), (1000, "split-1")]  # no seed of a run is one of another's splits


def test_fine_tuning_starts_from_the_weights(trained, like, tmp_path):
    """Fine-tuning begins at the pre-trained EMA weights, with a new optimiser and average. A model that does not fit is
    refused. A run on this screen has a model for each split; what another split was trained on may be tested here."""
    s, screen = like(screen="other", init="dags"), trained.screen
    state, _ = train.start(s, tmp_path / "split-0", screen)
    _, network = model.load_model(trained.folder / "model.eqx")
    assert jax.tree.all(jax.tree.map(np.array_equal, state.parameters, eqx.filter(network, eqx.is_inexact_array)))
    assert int(state.update) == 0 and not any(np.any(x) for x in jax.tree.leaves(state.average))
    seven = dataclasses.replace(screen, genes=tuple("abcdefg"))
    for settings, data, message in (
            (dataclasses.replace(s, width=32), screen, "model.eqx: a model with width 16, not 32"),
            (s, seven, "a model of 5 genes, but the data have 7")):
        with pytest.raises(BadInput, match=message):
            train.start(settings, tmp_path / "split-0", data)
    assert model.model_file(s, "dags", "dags", 0) == model.model_file(s, "dags", "leukemia", 3)
    for *asked, missing in (("dags", "dags", 3, "split-3/model.eqx"), ("nothing", "leukemia", 0, "nothing/split-0")):
        with pytest.raises(BadInput, match=missing):
            model.model_file(s, *asked)


@pytest.mark.parametrize("changed", [{"micro_batch": 3}, {"context": 11}, {"target_cells": 7}, {"any_size": True},
                                     {"seed": 1000}])
def test_unusable_settings_are_refused(like, changed):
    """Each does not fit the others, or the machine: the message names the setting, before any work. (Numbers that can
    never be meant: test_faults.py.)"""
    name, = changed
    with pytest.raises(BadInput, match=name.replace("_", "-")):
        train.check(like(**changed))


def test_a_run_that_cannot_succeed_says_so(like, trained, tmp_path):
    """Too many context experiments, or a screen that is not there, end in a message before anything is written; a loss
    that is not a number ends the run with a message, not with a model."""
    with pytest.raises(BadInput, match="--context 5"):
        train.train(like(context=5), tmp_path / "run", trained.screen)
    assert not (tmp_path / "run").exists()
    with pytest.raises(BadInput, match="--screen nothing.*dags"):
        tasks.splits(like(screen="nothing"))
    with pytest.raises(BadInput, match="loss is nan"):
        train.train(like(), tmp_path, trained.screen, lambda state, *a: (state, jnp.array(np.nan), jnp.array(1.0)))
    assert not (tmp_path / "model.eqx").exists()
