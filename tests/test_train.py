"""Claims about train.py: the loss, the update, what is random; stopping, looking and splitting change nothing."""

import csv
import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import scales
import train
from data import TEST, Task
from model import SLOTS, MapPFN
from prior import linear_screen
from scales import BadInput
from train import Settings, State

# ----------------------------------------------------------------------------------------------------- shared machinery


class Told(MapPFN):
    """A network that returns `say(y_tau, tau, slots, drop)`, to see what a loss hands to it."""

    say: object = eqx.field(static=True)

    def __init__(self, say):
        for field in dataclasses.fields(MapPFN):
            setattr(self, field.name, None)
        self.say = say

    def __call__(self, y_tau, tau, observed, context, context_treatments, query, slots, drop):
        return jnp.broadcast_to(self.say(y_tau, tau, slots, drop), y_tau.shape)


def random_tasks(seed: int, tasks: int, genes=5, cells=6, context=2) -> Task:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(0.5, 1.5, shape).astype(np.float32)
    return Task(normal(tasks, cells, genes), normal(tasks, context, cells, genes), normal(tasks, context, genes),
                normal(tasks, genes), normal(tasks, cells, genes))


def losses_of(say, tasks: Task, drop_condition: float) -> np.ndarray:
    """The loss of each task."""
    keys = jr.split(jr.key(0), len(tasks.query))
    return np.asarray(jax.jit(jax.vmap(lambda t, k: train.task_loss(Told(say), t, drop_condition, key=k)))(tasks, keys))


@pytest.fixture(scope="module")
def beginning(trained):
    """State of `trained` before its first update, as NumPy, since updates consume theirs; and the static part."""
    state, static = train.start(trained.settings, trained.folder / "none.eqx")
    return jax.tree.map(np.asarray, state), static


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("data",))


def spread(tree, *axes, devices=2):
    """Placed on the devices as train.train places the state (no axes) and the tasks (None, "data")."""
    return jax.device_put(tree, NamedSharding(mesh_of(devices), PartitionSpec(*axes)))


RATE = 1e-3  # learning rate of single updates


def run_update(update, state: State, tasks: Task, devices=2):
    """(state, loss, gradient norm) after one update on tasks [A, B, ...]."""
    tasks = spread(tasks, None, "data", devices=devices)
    return jax.device_get(update(spread(state, devices=devices), tasks, jr.key(7), RATE))


def micro_batches(tasks: Task, accumulate: int) -> Task:
    return Task(*(x.reshape(accumulate, -1, *x.shape[1:]) for x in tasks))


def moments(state: State):
    """Adam's first moment: after one update, a tenth of the (clipped) gradient."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.optimiser[1][0].mu)])


def rows_of(folder) -> list[dict]:
    rows = list(csv.DictReader((folder / "log.csv").open()))
    return [{k: v for k, v in row.items() if k != "tasks_per_second"} for row in rows]


# ------------------------------------------------------------------------------------------------ the objective (eq. 3)


def test_loss_of_a_network_that_says_nothing():
    """A velocity of zero has loss E|Y - Y_0|^2 per number: the second moment of the data, plus 1 of the noise."""
    tasks = random_tasks(0, 2000)
    losses = losses_of(lambda y, tau, slots, drop: 0, tasks, 0.2)
    assert losses.mean() == pytest.approx((tasks.target**2).mean() + 1, abs=float(5 * losses.std() / 2000**0.5))


def test_loss_of_the_true_velocity_is_zero():
    """With all target cells at c, v = (c - Y_tau) / (1 - tau) is exact: interpolation, time and target fit together."""
    tasks = random_tasks(0, 50)
    tasks = tasks._replace(target=np.full_like(tasks.target, 0.7))
    assert losses_of(lambda y, tau, slots, drop: (0.7 - y) / (1 - tau), tasks, 0.2).max() < 1e-6


def test_times_are_logit_normal():
    """tau = sigmoid(N(0, 1)), one for each task: its logit passes a test for the standard normal distribution."""
    tasks = random_tasks(0, 2000, genes=1, cells=1)
    tasks = tasks._replace(target=np.zeros_like(tasks.target))
    tau = np.sqrt(losses_of(lambda y, tau, slots, drop: 1e4 * tau, tasks, 0.2)) / 1e4  # but for the noise, of size 1e-4
    assert scipy.stats.kstest(scipy.special.logit(tau), "norm").pvalue > 0.01


@pytest.mark.parametrize("rate", [0.0, 0.2, 1.0])
def test_null_condition_at_its_rate(rate):
    """The condition is dropped in the given share of tasks (A.2)."""
    dropped = losses_of(lambda y, tau, slots, drop: 1e3 * drop, random_tasks(0, 4000, 1, 1), rate) > 1e5
    assert dropped.mean() == pytest.approx(rate, abs=4 * (rate * (1 - rate) / 4000) ** 0.5)


def test_slots_are_distinct_and_random():
    """Each task has K different slots, and every slot comes up."""
    tasks = random_tasks(0, 500, 1, 1)
    tasks = tasks._replace(target=np.zeros_like(tasks.target))
    said = losses_of(lambda y, tau, slots, drop: 1e3 * (1 + slots[0] + SLOTS * slots[1]), tasks, 0.2)
    second, first = np.divmod(np.round(np.sqrt(said) / 1e3).astype(int) - 1, SLOTS)
    assert (first != second).all()
    assert set(first) == set(second) == set(range(SLOTS))


# ------------------------------------------------------------------------------------------------ the update (A.2, A.3)


def test_schedule_warms_up_stays_and_decays():
    """Linear over the first 1%, at the peak, 1 - sqrt(progress) over the last 20%, nearly zero at the last update."""
    s = Settings("linear", updates=1000, learning_rate=2e-4)
    rate = np.array([train.schedule(s)(i) for i in range(1000)])
    np.testing.assert_allclose(rate[:10], 2e-4 * np.arange(1, 11) / 10, rtol=1e-5)
    np.testing.assert_allclose(rate[10:800], 2e-4, rtol=1e-5)
    np.testing.assert_allclose(rate[800:], 2e-4 * (1 - np.sqrt(np.arange(1, 201) / 200)), atol=2e-9)
    assert 0 < rate[-1] < 1e-5 * s.learning_rate  # not zero, so that the last batch counts
    assert (train.schedule(dataclasses.replace(s, updates=1))(0) >= 0) and np.isfinite(train.schedule(s)(5000))


def test_learning_rate_applied_is_the_one_intended(trained, beginning, tmp_path):
    """Training hands the schedule's rate to each update, to the last, and log.csv tells it. Adam's first step shows that
    it is applied: every number moves by just that much, whatever its gradient, and by its share of weight decay."""
    s, (state, _), used = trained.settings, beginning, []

    def update(state, tasks, key, rate):
        used.append(rate)
        return trained.update(state, tasks, key, rate)

    train.train(s, tmp_path, update_function=update)
    np.testing.assert_array_equal(used, [train.schedule(s)(i) for i in range(s.updates)])
    np.testing.assert_allclose([float(row["learning_rate"]) for row in rows_of(tmp_path)], used, rtol=1e-4)
    after, *_ = run_update(trained.update, state, micro_batches(random_tasks(1, 8), 1))
    before, now = (x.parameters.velocity_out.weight for x in (state, after))
    np.testing.assert_allclose(np.abs(now - before * (1 - RATE * s.weight_decay)), RATE, rtol=0.02)


def test_one_batch_can_be_overfitted(trained, beginning):
    """The same 8 tasks with the same noise, 100 times over: the loss falls from above 2.5 to less than a fifth."""
    state, tasks, losses = spread(beginning[0]), spread(micro_batches(random_tasks(2, 8), 1), None, "data"), []
    for _ in range(100):
        state, loss, _ = trained.update(state, tasks, jr.key(7), trained.settings.learning_rate)
        state = state._replace(update=spread(np.zeros((), np.int32)))  # the key of an update follows from its number
        losses.append(float(loss))
    assert losses[0] > 2.5 and losses[-1] < losses[0] / 5


def test_a_batch_can_be_split_at_will(like, trained, beginning):
    """8 tasks on two devices at once have the loss and gradient of 4 micro-batches of 2 tasks on one device:
    accumulation is a larger batch, and devices share it."""
    (state, static), tasks = beginning, random_tasks(3, 8)
    apart = train.make_update(like(accumulate=4, micro_batch=2), static, mesh_of(1))
    after, *numbers = run_update(trained.update, state, micro_batches(tasks, 1))
    other, *others = run_update(apart, state, micro_batches(tasks, 4), devices=1)
    np.testing.assert_allclose(numbers, others, rtol=1e-4)
    np.testing.assert_allclose(moments(after), moments(other), atol=1e-4 * np.abs(moments(after)).max())


def test_gradient_is_clipped_by_its_global_norm(trained, beginning):
    """The moment after one update is (1 - b1) times the gradient, cut to norm 1; the norm logged is the full one."""
    state, tasks = beginning[0], random_tasks(3, 8)
    tasks = tasks._replace(target=100 * tasks.target)
    after, _, norm = run_update(trained.update, state, micro_batches(tasks, 1))
    assert norm > 10
    assert np.linalg.norm(moments(after)) == pytest.approx(1 - trained.settings.b1, rel=1e-3)


def test_average_is_the_weighted_mean_of_the_weights(trained, beginning):
    """EMA in closed form: weight ema^(n - i) for update i, normalised, so that the start from zero does not count."""
    state, ema, seen = beginning[0], trained.settings.ema, []
    for seed in range(3):
        state, *_ = run_update(trained.update, state, micro_batches(random_tasks(seed, 8), 1))
        seen.append(state.parameters)
    weights = np.array([ema**2, ema, 1]) / (ema**2 + ema + 1)
    expected = jax.tree.map(lambda *x: np.tensordot(weights, np.stack(x), 1), *seen)
    averaged = train.averaged(trained.settings, jax.tree.map(jnp.asarray, state))
    for a, b in zip(jax.tree.leaves(averaged), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_no_key_is_used_twice(trained, beginning):
    """The loss of a task passes JAX's check for reuse of random keys."""
    parameters, static = beginning[0].parameters, beginning[1]
    task = Task(*(jnp.asarray(x[0]) for x in random_tasks(0, 1)))
    with jax.debug_key_reuse(True):
        loss = jax.jit(lambda p, key: train.task_loss(eqx.combine(p, static), task, 0.2, key=key))
        assert np.isfinite(loss(parameters, jr.key(0)))


@pytest.mark.parametrize("prior", ["linear", "grn"])
def test_paper_update_lowers_for_cuda(prior):
    """The update at the paper's full size is traced and lowered for an NVIDIA GPU, from shapes alone."""
    s = Settings(prior, **{k: v for k, v in scales.at("paper", "model", prior).items()}, attention="plain")
    shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    parameters, static = eqx.partition(eqx.filter_eval_shape(lambda: train.build(s)), shape)
    state = jax.eval_shape(lambda p: State(p, train.make_optimiser(s).init(p), jax.tree.map(jnp.zeros_like, p),
                                           jnp.zeros((), int)), parameters)
    batch, n, k, d = (s.accumulate, s.micro_batch), s.cells, s.context, s.genes
    sizes = (n, d), (k, n, d), (k, d), (d,), (n, d)
    tasks = Task(*(jax.ShapeDtypeStruct(batch + size, jnp.float32) for size in sizes))
    update = train.make_update(s, static, mesh_of(1))
    exported = jax.export.export(update, platforms=["cuda"])(state, tasks, jax.eval_shape(lambda: jr.key(0)),
                                                             jax.ShapeDtypeStruct((), jnp.float32))
    assert exported.platforms == ("cuda",)
    assert f"tensor<{s.micro_batch}x{k}x{n}x{d}xf32>" in exported.mlir_module()
    assert [x.shape for x in exported.out_avals[:-2]] == [x.shape for x in jax.tree.leaves(state)]


# ------------------------------------------------------------------------------------------ tasks, and what is held out


def test_source_repeats_itself(like):
    """The tasks of an update are the same whenever they are asked for, and those of no other update."""
    s = like(refresh=2)
    forward, backward = train.Source(s, None), train.Source(s, None)
    tasks = [forward(i) for i in range(4)]
    for i in reversed(range(4)):
        assert all(np.array_equal(a, b) for a, b in zip(tasks[i], backward(i)))
    assert len({t.target.tobytes() for t in tasks}) == 4
    assert tasks[0].target.shape == (1, 8, 6, 5)


def test_accumulated_micro_batches_are_different_tasks(like):
    """Tasks come as [A, B, ...], no two alike."""
    tasks = train.Source(like(accumulate=2, micro_batch=3), None)(0)
    assert tasks.context.shape == (2, 3, 2, 6, 5)
    assert len({cells.tobytes() for cells in tasks.target.reshape(6, -1)}) == 6


def test_validation_graphs_are_not_trained_on(like):
    """No do-value, which is drawn anew for each graph, of the validation tasks occurs in any generation of training."""
    s = like()
    values = lambda tasks: set(tasks.query.max(-1).ravel().tolist()) - {0.0}
    source = train.Source(s, None)
    seen = set().union(*(values(source(i)) for i in range(s.updates)))
    assert len(seen) > 100 and not seen & values(train.validation_tasks(s, None))


def test_validation_takes_held_out_conditions(like, beginning):
    """GRNs are checked on the held-out ones; real cells on validation conditions, never on test ones, or not at all."""
    screen = linear_screen(np.random.default_rng(0), 4, 5, 32, held_out=2)
    tasks, test = train.validation_tasks(like(what="grn"), screen), screen.treatments[screen.split == TEST]
    assert all((query == test).all(-1).any() for query in tasks.query)
    assert train.validation_tasks(like(what="scratch"), screen) is None
    state, static = beginning
    assert np.isnan(train.make_validation(like(what="scratch"), static, None)(state))


# ----------------------------------------------------------------------------------------------- stops, files, mistakes


def test_validation_changes_nothing(trained, beginning, like, tmp_path):
    """It leaves the state as it was, bit for bit, and is always the same number."""
    state, static = beginning
    state, *_ = run_update(trained.update, state, micro_batches(random_tasks(0, 8), 1))
    state = jax.tree.map(jnp.asarray, state)
    before = jax.tree.map(np.array, state)
    validate = train.make_validation(trained.settings, static, train.validation_tasks(trained.settings, None))
    assert validate(state) == validate(state) > 0
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True))


def test_training_learns_and_ends_tidily(trained):
    """The loss of unseen graphs falls below what a velocity of zero has; no temporary file or checkpoint stays."""
    rows = rows_of(trained.folder)
    assert [int(r["update"]) for r in rows] == list(range(1, 121)) and rows[-1]["tasks"] == "960"
    assert float(rows[-1]["validation_loss"]) < 0.95 * float(rows[0]["loss"])
    assert {f.name for f in trained.folder.iterdir()} == {"model.eqx", "log.csv"}


def test_another_seed_is_another_model(trained, like):
    """Weights, tasks and noise change with the seed."""
    first, second = (train.Source(like(seed=seed), None)(0).target for seed in (0, 1))
    assert not np.array_equal(first, second)


class Stop(Exception):
    """Stands for a power cut."""


@pytest.mark.parametrize("looking", [{}, {"log_every": 7, "validate_every": 28}], ids=["same settings", "looking more"])
def test_killed_and_resumed_is_undisturbed(trained, like, tmp_path, monkeypatch, looking):
    """Stopped after a checkpoint, a run goes on to the very same model, byte for byte, and log, but for its speed.

    So does one that looks at the validation tasks more often and logs means of 7 updates, of each exactly those 7."""
    source, s = train.Source.__call__, like(**looking)

    def stopping(self, update):
        if update == 25:
            raise Stop
        return source(self, update)

    monkeypatch.setattr(train.Source, "__call__", stopping)
    clock = iter(range(10**6))
    monkeypatch.setattr(train.time, "monotonic", lambda: 25.0 * next(clock))  # it is saved every few updates
    with pytest.raises(Stop):
        train.train(s, tmp_path, update_function=trained.update)
    monkeypatch.undo()
    assert 0 < json.loads((tmp_path / "checkpoint.eqx").open("rb").readline())["update"] <= 25
    train.train(s, tmp_path, update_function=trained.update)
    assert (tmp_path / "model.eqx").read_bytes() == (trained.folder / "model.eqx").read_bytes()
    expected, logged = rows_of(trained.folder), rows_of(tmp_path)
    assert [int(r["update"]) for r in logged] == [*range(s.log_every, s.updates, s.log_every), s.updates]
    for row in logged:
        end = int(row["update"])
        for name in ("tasks", "learning_rate", "gradient_norm"):
            assert row[name] == expected[end - 1][name]
        mean = np.mean([float(r["loss"]) for r in expected[(end - 1) // s.log_every * s.log_every : end]])
        assert float(row["loss"]) == pytest.approx(mean, rel=1e-5)


def test_finished_run_is_skipped(trained, like, monkeypatch, capsys):
    """The same command again does no work; with other settings it is refused, and names the setting."""
    monkeypatch.setattr(train, "train", lambda *a: pytest.fail("trained again"))
    monkeypatch.setattr(train, "use_all_cores", lambda micro_batch: None)  # the devices are chosen already
    monkeypatch.setattr(scales, "parse", lambda *a: trained.settings)
    train.main()
    assert "already trained" in capsys.readouterr().out
    monkeypatch.setattr(scales, "parse", lambda *a: like(clip=0.5))
    with pytest.raises(BadInput, match=r"other settings: clip 0\.5 \(there: 1\.0\)"):
        train.main()


@pytest.fixture
def stopped(trained, beginning, tmp_path):
    """A folder with the checkpoint of a run that was stopped, and says so, at update 7."""
    state = jax.tree.map(jnp.asarray, beginning[0])
    state = state._replace(update=jnp.full_like(state.update, 7))
    train.write_leaves(tmp_path / "checkpoint.eqx", train.header(trained.settings) | {"update": 7}, state)
    return tmp_path


def test_checkpoint_of_other_settings_is_refused(like, stopped):
    """The message names the setting with both values, does not speak of damage, and the checkpoint stays."""
    with pytest.raises(BadInput) as caught:
        train.start(like(clip=0.5), stopped / "checkpoint.eqx")
    assert "clip 0.5 (there: 1.0)" in str(caught.value) and "damaged" not in str(caught.value)
    assert (stopped / "checkpoint.eqx").exists()


def test_reporting_may_change_on_resuming(like, stopped):
    """How often is logged, validated and saved does not decide the result."""
    state, _ = train.start(like(log_every=3, validate_every=9, checkpoint_seconds=1.5), stopped / "checkpoint.eqx")
    assert int(state.update) == 7  # it goes on, and does not begin anew


@pytest.mark.parametrize("damage", [
    lambda x: b"", lambda x: x[: len(x) // 2], lambda x: x[:-1], lambda x: x[:40],
    lambda x: b"\x80\x81" + x, lambda x: b"3\n" + x,
    lambda x: x[: x.index(b"\n") + 1], lambda x: x.replace(b'"width": 16', b'"width": 32'), lambda x: b"{}\n" + x,
], ids=["empty", "half", "last byte", "header", "binary", "a number", "header only", "other width", "empty header"])
@pytest.mark.parametrize("file", ["model.eqx", "checkpoint.eqx"])
def test_damaged_file_is_refused(trained, stopped, tmp_path, file, damage):
    """A truncated or foreign file ends in a message with its name, whatever is wrong with it."""
    whole = (trained.folder if file == "model.eqx" else stopped) / file
    path = tmp_path / f"damaged-{file}"
    path.write_bytes(damage(whole.read_bytes()))
    with pytest.raises(BadInput, match=f"damaged-{file}"):
        train.load_model(path) if file == "model.eqx" else train.start(trained.settings, path)


def test_missing_model_is_refused(tmp_path):
    """Loading what is not there names the file and the script that writes it."""
    with pytest.raises(BadInput, match="model.eqx: no such checkpoint; train.py"):
        train.load_model(tmp_path / "model.eqx")


def test_model_survives_writing(trained):
    """The loaded model has the weights and the settings that were written."""
    head, model = train.load_model(trained.folder / "model.eqx")
    assert head["width"] == 16 and head["learning_rate"] == 3e-3 and head["revision"] == scales.revision()
    leaves = jax.tree.leaves(eqx.filter(model, eqx.is_array))
    assert isinstance(model, MapPFN) and all(np.isfinite(x).all() for x in leaves)


def test_fine_tuning_starts_from_the_weights(trained, like, tmp_path):
    """Fine-tuning begins at the pre-trained EMA weights, with a new optimiser and average."""
    state, _ = train.start(like(what="finetune", init=trained.folder / "model.eqx"), tmp_path / "none.eqx")
    _, model = train.load_model(trained.folder / "model.eqx")
    weights = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    for a, b in zip(jax.tree.leaves(state.parameters), weights, strict=True):
        assert np.array_equal(a, b)
    assert int(state.update) == 0 and not any(np.any(x) for x in jax.tree.leaves(state.average))


def test_fine_tuning_from_another_width_is_refused(trained, like, tmp_path):
    """The message names the file, the setting and both values."""
    with pytest.raises(BadInput, match="model.eqx: a checkpoint of another configuration: width 16, not 32"):
        train.start(like(what="finetune", width=32, init=trained.folder / "model.eqx"), tmp_path / "none.eqx")


@pytest.mark.parametrize("changed, message", [
    ({"genes": 7}, "the data have 5 genes, the model 7"), ({"micro_batch": 3}, "micro-batch 3: must be a multiple of"),
    ({"context": 11}, "context 11: the model has 10"), ({"context": 5}, "training experiments"),
])
def test_what_does_not_fit_is_refused_before_work(like, tmp_path, changed, message):
    """Wrong genes, batch or context end in a message before anything is compiled or written."""
    screen = linear_screen(np.random.default_rng(0), 4, 5, 32, held_out=2)
    with pytest.raises(BadInput, match=message):
        train.train(like(what="scratch", **changed), tmp_path / "run", screen)
    assert not (tmp_path / "run").exists()


def test_missing_data_are_refused(like, tmp_path):
    """Fine-tuning without prepared data names the file and the command that makes it."""
    with pytest.raises(BadInput, match="split-0.h5ad: no such file; prepare it with python data.py --dataset leukemia"):
        train.runs(like(what="finetune", out=tmp_path))


def test_diverged_training_says_so(trained, like, tmp_path):
    """A loss that is not a number ends the run with a message, not with a model."""
    nothing = lambda state, tasks, key, rate: (state, jnp.array(np.nan), jnp.array(1.0))
    with pytest.raises(BadInput, match="loss is nan at update 1; lower --learning-rate"):
        train.train(like(), tmp_path, update_function=nothing)
    assert not (tmp_path / "model.eqx").exists()


def test_one_run_for_each_split(like, tmp_path):
    """Splits are separate runs with their own seeds, folders and files."""
    s = like(what="scratch", out=tmp_path, splits=2)
    (tmp_path / "smoke" / "data" / "leukemia").mkdir(parents=True)
    (tmp_path / "smoke" / "data" / "leukemia" / "split-0.h5ad").touch()
    runs = train.runs(s)
    assert [r.seed for r, _, _ in runs] == [0, 1]
    assert [folder.name for _, folder, _ in runs] == ["scratch-leukemia-split0", "scratch-leukemia-split1"]
    assert [file.name for _, _, file in runs] == ["split-0.h5ad", "split-1.h5ad"]
