"""Stage 4 of 8, training: conditional flow matching on the tasks of a screen, from random weights or from a model.

Paper: Algorithm 1, equation 3, appendices A.2 (pre-training) and A.3 (fine-tuning). Departures: D1, D6, D7, D8, D52.
Reads `screens/<name>/` below out/<scale>, writes `train/<run>/split-<s>/model.eqx` (EMA weights behind a line of JSON)
and `log.csv`; while it runs, `checkpoint.eqx` holds everything needed to go on from a stop. A screen of several splits
gives a run for each.

    python train.py --screen linear --scale smoke|laptop|paper    pre-training on linear SCMs: 10 s / 2 min / 8 h
    python train.py --screen grn --scale smoke|laptop|paper       pre-training on prior.py's GRNs: 10 s / 5 min / 36 h
    python train.py --screen leukemia --init grn --name leukemia-finetuned    fine-tuning: 5 s / 1 min / 10 min a split
    python train.py --screen leukemia --name leukemia-scratch                 the same from random initialisation
(the times are for two CPU cores at smoke and laptop scale and, as the paper reports them, one 80 GB GPU at paper scale)
Several GPUs or machines: CLUSTER.md.

    paper   name here   shape   meaning
    Y_0     noise       N D     starting point of the flow, N(0, I)
    Y_tau   y_tau       N D     (1 - tau) Y_0 + tau Y_q^int
    tau     tau                 one for each task, LogitNormal(0, 1)
    Y_q^int task.target N D     the cells to generate

    B tasks of a micro-batch   A micro-batches of an update   K context experiments   N cells   D genes
"""

import contextlib
import csv
import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Key, PRNGKeyArray, PyTree
from tqdm import tqdm

import model
import prior
import scales
import tasks
from devices import here, join, own_share, placed, shardings, use_all_cores
from model import SLOTS, Architecture
from scales import BadInput
from tasks import TRAIN, VALIDATION, Screen, Task


@dataclass(frozen=True)
class Settings(Architecture):
    """Train a network on the tasks of a screen.

    Defaults are the paper's; `python scales.py` lists what --scale changes.
    """
    screen: str = ""  # what is trained on: a folder below out/<scale>/screens
    scale: str = "laptop"  # column of the table in scales.py
    name: str = ""  # folder of the run below out/<scale>/train; default: the name of the screen
    init: str = ""  # fine-tuning: run whose model to start from
    seed: int = 0  # of everything random in this run, less than 1,000; split s has seed + 1,000 s
    out: Path = Path("out")  # everything is below out/<scale>
    # tasks
    cells: int = 200  # N (B.3)
    context: int = 8  # K (B.2)
    target_cells: int = 0  # that the flow is learnt from, where a network needs many cells given; 0: N
    mean_loss: float = 0.0  # weight of the mean's error over all N cells, where a network has a mean (exchangeable.py)
    no_knock_out: float = 0.0  # share of tasks whose query is none: counterfactual cells start from that (sample.py)
    any_size: bool = False  # other K (up to --context) and D in each update, for a network that takes any: `sizes`
    fresh: int = 0  # updates after which other systems of the same prior are drawn to train on (prior.py); 0: never
    permute_genes: bool = False  # each task's genes in an order of its own; for priors, whose genes have no names [D52]
    # optimisation; an update is one optimiser step, the paper's "steps" are micro-batches [D1]
    updates: int = 50_000  # optimiser steps: 400k micro-batches (A.2)
    micro_batch: int = 32  # tasks B (released code)
    accumulate: int = 8  # micro-batches A of an update (released code)
    learning_rate: float = 1e-4  # peak (A.2)
    warmup: float = 0.01  # of the updates, linear (A.2)
    decay: float = 0.2  # of the updates, square root (A.2)
    b1: float = 0.9  # AdamW (released code)
    b2: float = 0.995  # AdamW; the paper is silent (released code)
    weight_decay: float = 1e-5  # AdamW; the paper is silent (released code)
    clip: float = 1.0  # global norm of the gradient (released code)
    ema: float = 0.999  # decay of the averaged weights, which inference uses (A.2), of every micro-batch [D8]
    drop_condition: float = 0.2  # probability of the null condition (A.2)
    rates: tuple[float, ...] = ()  # choose among these, and lengths up to --updates, by leaving conditions out [D55]
    choice: str = ""  # run whose choice is to be used again, for another seed of the same training
    guidance: float | None = None  # weight that sample.py is to use; by default it chooses one (Table 7)
    # reporting; nothing below changes the result
    log_every: int = 20  # updates between rows of log.csv
    validate_every: int = 200  # updates between validation losses
    checkpoint_seconds: float = 60.0  # between checkpoints
    snapshots: int = 0  # EMA models kept on the way, for Figure 2
    # more than one process, which SLURM and Open MPI tell us of: CLUSTER.md
    coordinator: str = ""  # host:port of process 0, where the others find it; the port is any free one
    processes: int = 1  # how many train together
    process: int = 0  # which of them this one is


REPORTING = model.SPEED | {"log_every", "validate_every", "checkpoint_seconds", "out", "scale", "name", "snapshots",
                           "rates", "choice", "coordinator", "processes", "process"}
SPLIT_SEEDS = 1000  # between the seeds of two splits, so that no split of one run has the seed of a split of another


# ----------------------------------------------------------------------------------- the objective (eq. 3, Algorithm 1)


# Exercise 3
def task_loss(network: eqx.Module, task: Task, drop_condition: float, target_cells: int = 0, mean_loss: float = 0.0, *,
              key: PRNGKeyArray) -> Float[Array, ""]:
    """Flow-matching loss of a task: how far the velocity is from the straight line from noise to data (equation 3).

    `mean_loss` [D57]: a few cells say little of their mean, which is most of what a knock-out changes, and all of them
    cost nothing where the network has the mean before it has seen any cell. Raises BadInput for one that has not.
    """
    key_tau, key_noise, key_drop, key_slots = jr.split(key, 4)
    tau = jax.nn.sigmoid(jr.normal(key_tau))  # LogitNormal(0, 1) (A.2)
    target = task.target[:target_cells] if target_cells else task.target
    noise = jr.normal(key_noise, target.shape)  # Y_0
    y_tau = (1 - tau) * noise + tau * target
    condition = model.prepare(network, task.given, key=key_slots)
    drop = jr.bernoulli(key_drop, drop_condition)  # trains the unconditional flow that guidance needs (A.2)
    velocity = network(y_tau, tau, condition, drop)
    # The paper has the squared Frobenius norm, a sum; here, as in the released code, it is the mean over cells and
    # genes, so that the clipping threshold and the learning rate keep their meaning at every size.
    loss = jnp.mean((velocity - (target - noise)) ** 2)
    if mean_loss:
        if "mean" not in getattr(condition, "_fields", ()):
            raise BadInput(f"--mean-loss {mean_loss}: {type(network).__name__} has no mean; leave it out")
        loss += mean_loss * jnp.mean((condition.mean[drop.astype(int)] - task.target.mean(axis=0)) ** 2)
    return loss


def batch_loss(network: eqx.Module, batch: Task, keys: Key[Array, " B"], drop_condition: float, target_cells: int = 0,
               mean_loss: float = 0.0) -> Float[Array, ""]:
    """Mean loss of B tasks; `keys` has one key for each."""
    def one(task, key):
        return task_loss(network, task, drop_condition, target_cells, mean_loss, key=key)

    return jnp.mean(jax.vmap(one)(batch, keys))


# ----------------------------------------------------------------------------------------------- one update (A.2, A.3)


class State(NamedTuple):
    """All that training carries from update to update; keys and tasks follow from the seed and the update's number."""
    parameters: PyTree
    optimiser: PyTree
    average: PyTree  # EMA of the parameters, biased towards zero until `averaged` corrects it
    update: Array


# Exercise 5
def schedule(s: Settings) -> optax.Schedule:
    """Rate of each update. Warm-up, stable, decay: linear up, constant, then peak * (1 - sqrt(progress)) to zero (A.2).

    [D1] paper: "steps"; released code: the schedule counts updates but the run's length counts micro-batches, so
    warm-up is 8 times too long and the decay is never reached; here both count updates and the decay ends with the run.
    """
    warmup = max(1, round(s.warmup * s.updates))
    decay = max(1, round(s.decay * s.updates))

    def rate(update):
        rising = jnp.minimum((update + 1) / warmup, 1)  # not zero at the first update
        progress = jnp.clip((update + 1 - (s.updates - decay)) / decay, 0, 1)
        falling = 1 - jnp.sqrt(progress) * (1 - 1e-6)  # not zero at the last
        return s.learning_rate * rising * falling

    return rate


def make_optimiser(s: Settings) -> optax.GradientTransformation:
    """AdamW on gradients clipped by their global norm; its state says which learning rate was applied.

    [D6] paper: silent; released code: clips each micro-batch; here: clips the accumulated gradient once per update, as
    the threshold is meant for the step that is taken.
    """
    adamw = optax.inject_hyperparams(optax.adamw, static_args=("b1", "b2", "weight_decay"))
    adamw = adamw(learning_rate=schedule(s), b1=s.b1, b2=s.b2, weight_decay=s.weight_decay)
    return optax.chain(optax.clip_by_global_norm(s.clip), adamw)


def rate_applied(state: State) -> float:
    """The learning rate of the last update, read back from the optimiser's state."""
    return float(state.optimiser[1].hyperparams["learning_rate"])


def make_update(s: Settings, static: PyTree, mesh: Mesh) -> Callable:
    """The jitted update: (state, tasks [A, B, ...], key) -> (state, loss, gradient norm).

    Data parallel: each device of `mesh`, in whatever process, computes the gradient of its share of every micro-batch;
    all apply the same optimiser to the mean over devices. A laptop's cores work as devices too: two of them, one thread
    each, beat one with two threads.
    """
    optimiser = make_optimiser(s)
    each, share = PartitionSpec(), PartitionSpec(None, "data")

    def loss(parameters, batch, keys):
        network = eqx.combine(parameters, static)
        return batch_loss(network, batch, keys, s.drop_condition, s.target_cells, s.mean_loss)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(each, share, share), out_specs=each, check_vma=False)
    def gradient(parameters, batches, keys):
        def accumulate(total, micro_batch):
            new = jax.value_and_grad(loss)(parameters, *micro_batch)
            return jax.tree.map(jnp.add, total, new), None

        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, parameters)
        total, _ = jax.lax.scan(accumulate, zero, (batches, keys))
        mean = jax.tree.map(lambda x: x / s.accumulate, total)
        return jax.lax.pmean(mean, "data")

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: State, batches: Task, key: PRNGKeyArray):
        keys = jr.split(jr.fold_in(key, state.update), (s.accumulate, s.micro_batch))
        loss, gradients = gradient(state.parameters, batches, keys)
        changes, optimiser_state = optimiser.update(gradients, state.optimiser, state.parameters)
        parameters = optax.apply_updates(state.parameters, changes)
        average = optax.incremental_update(parameters, state.average, 1 - s.ema**s.accumulate)  # [D8]
        new = State(parameters, optimiser_state, average, state.update + 1)
        return new, loss, optax.tree.norm(gradients)

    return update


# Exercise 5
def averaged(s: Settings, state: State) -> PyTree:
    """The EMA weights that inference uses (A.2).

    [D8] paper: a decay of 0.999, of what it does not say; released code: of every micro-batch, without correction;
    here: of every micro-batch too, so ema^A of an update, and divided by 1 - ema^(A n), so that an average that started
    from zero does not remember it, and a run of a few hundred updates can be used.
    """
    weight = 1 - s.ema ** (s.accumulate * state.update.astype(jnp.float32))
    return jax.tree.map(lambda average: average / weight, state.average)


# ---------------------------------------------------------------------------------------------------- tasks of a run


def sizes(s: Settings, genes: int, update: int) -> tuple[int, int]:
    """K and D of an update. With `any_size`, K is 1, 2, 4, ... or --context, and D all genes or half: few shapes, since
    each is compiled."""
    if not s.any_size:
        return s.context, genes
    rng, context = scales.generator("updates", s.seed, update), [s.context]
    while context[0] > 1:
        context.insert(0, 2 ** ((context[0] - 1).bit_length() - 1))  # the next smaller power of two
    return int(rng.choice(context)), int(rng.choice([genes, max(1, genes // 2)]))


def update_tasks(s: Settings, screen: Screen, update: int, share: range | None = None) -> Task:
    """The tasks [A, B, ...] of an update, or of those B of each micro-batch that are in `share`: the same whenever, by
    whichever process and however often they are asked for, since each has a generator of its own."""
    share = range(s.micro_batch) if share is None else share
    generators = []
    for i in range(s.accumulate):
        generators += [scales.generator("tasks", s.seed, update, i * s.micro_batch + j) for j in share]
    context, genes = sizes(s, len(screen.genes), update)
    batch = tasks.sample_tasks(generators, screen, len(generators), s.cells, context, permute=s.permute_genes,
                               no_knock_out=s.no_knock_out, genes=genes if s.any_size else 0)
    return jax.tree.map(lambda x: x.reshape(s.accumulate, len(share), *x.shape[1:]), batch)


def validation_tasks(s: Settings, screen: Screen, count: int = 64) -> Task | None:
    """Tasks of VALIDATION conditions, fixed for a run; None if there are none. Test conditions are never touched."""
    if not (screen.split == VALIDATION).any():
        return None
    rng = scales.generator("validation", s.seed)
    context = min(s.context, tasks.most_context(screen))  # with any_size not every system has as many
    return tasks.sample_tasks(rng, screen, count, s.cells, context, VALIDATION)


def make_validation(s: Settings, static: PyTree) -> Callable[[State, Task | None], float]:
    """Loss of the EMA weights on tasks, NaN if there are none, always with the same times and noise, and never without
    condition. It computes, and changes nothing.

    [D7] paper: silent; released code: a validation batch goes through the training step and so updates weights, also on
    the real cells that zero-shot results are reported on; here it is a function of the state that returns a number.
    """
    @jax.jit
    def mean_loss(parameters, batch, keys):
        def one(task_key):
            return task_loss(eqx.combine(parameters, static), task_key[0], 0.0, key=task_key[1])

        return jnp.mean(jax.lax.map(one, (batch, keys), batch_size=s.micro_batch))

    def validate(state, batch):
        if batch is None:
            return float("nan")
        keys = jr.split(scales.key("validation", s.seed), len(batch.target))
        return float(mean_loss(averaged(s, state), batch, keys))

    return validate


# -------------------------------------------------------------------------------------------------------------- one run

LOG = ("update", "tasks", "loss", "validation_loss", "learning_rate", "gradient_norm", "tasks_per_second")


class Log:
    """log.csv: one row per logging step. After a stop, the rows that came after the checkpoint are dropped."""

    def __init__(self, path: Path, update: int, s: Settings):
        self.tasks_of_update, self.update, self.time = s.micro_batch * s.accumulate, update, time.monotonic()
        rows = []
        if update and path.is_file():
            for row in csv.DictReader(path.open()):
                if (row["update"] or "").isdigit() and int(row["update"]) <= update:
                    rows.append(row)
        with scales.atomic(path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, LOG)
            writer.writeheader()
            writer.writerows(rows)
        self.file = path.open("a", newline="")
        self.writer = csv.DictWriter(self.file, LOG)

    def row(self, update: int, loss: float, validation: float | None, rate: float, norm: float) -> str:
        """Append one row, and see that it reaches the disk; returns it in a few words."""
        speed = (update - self.update) * self.tasks_of_update / (time.monotonic() - self.time)
        row = {"update": update, "tasks": update * self.tasks_of_update, "loss": f"{loss:.6g}",
               "learning_rate": f"{rate:.6g}", "gradient_norm": f"{norm:.4g}", "tasks_per_second": f"{speed:.1f}"}
        if validation is not None:
            row["validation_loss"] = f"{validation:.6g}"
        self.writer.writerow(row)
        self.file.flush()
        self.update, self.time = update, time.monotonic()
        return f"loss {loss:.4f}, {speed:.0f} tasks/s"


def seconds(log: Path) -> float:
    """Seconds of training that log.csv tells of, whatever stops there were."""
    total, before = 0.0, 0
    if log.is_file():
        for row in csv.DictReader(log.open()):
            total += (int(row["tasks"]) - before) / max(float(row["tasks_per_second"]), 1e-9)
            before = int(row["tasks"])
    return round(total, 1)


def header(s: Settings, folder: Path, screen: Screen) -> dict:
    """What decides the result: settings, the data, by a fingerprint of their values, and the weights to start from."""
    decisive = {name: value for name, value in dataclasses.asdict(s).items() if name not in REPORTING}
    decisive |= {"genes": len(screen.genes), "fingerprint": screen.made["fingerprint"]}
    if s.init:
        decisive["weights"] = scales.checksum(model.model_file(s, s.init, s.screen, tasks.split_number(folder)))
    return decisive


def check_same(path: Path, head: dict, wanted: dict) -> None:
    """Raise BadInput unless the model or checkpoint was made with the same settings, from the same data."""
    scales.check_made(path, {name: head.get(name) for name in wanted}, wanted)


def begin(s: Settings, folder: Path, screen: Screen) -> tuple[State, PyTree]:
    """State before the first update, and the network's static part."""
    network = model.build(s, len(screen.genes), key=scales.key("initialisation", s.seed))
    parameters, static = eqx.partition(network, eqx.is_inexact_array)
    if s.init:
        weights = initial_weights(s, folder, len(screen.genes))
        parameters = jax.tree.unflatten(jax.tree.structure(parameters), weights)
    average = jax.tree.map(jnp.zeros_like, parameters)
    return State(parameters, make_optimiser(s).init(parameters), average, jnp.zeros((), int)), static


def start(s: Settings, folder: Path, screen: Screen) -> tuple[State, PyTree]:
    """State to begin or to go on with, and the network's static part."""
    state, static = begin(s, folder, screen)
    path = folder / "checkpoint.eqx"
    if path.is_file():
        def like(head):
            check_same(path, head, header(s, folder, screen))
            return state

        _, state = model.read_leaves(path, like)
    return state, static


def initial_weights(s: Settings, folder: Path, genes: int) -> list[Array]:
    """The weights that fine-tuning starts from. Raises BadInput if they are of another architecture."""
    path = model.model_file(s, s.init, s.screen, tasks.split_number(folder))
    head, pretrained = model.load_model(path)
    for field in dataclasses.fields(Architecture):
        name, wanted = field.name, getattr(s, field.name)
        if name not in model.SPEED | {"treatment_gain"} and head[name] != wanted:
            raise BadInput(f"{path}: a model with {name} {head[name]}, not {wanted}")
    if head["genes"] != genes and not model.takes_any_genes(pretrained):
        raise BadInput(f"{path}: a model of {head['genes']} genes, but the data have {genes}; "
                       f"prepare them with --genes {head['genes']}")
    return jax.tree.leaves(eqx.filter(pretrained, eqx.is_inexact_array))


def check(s: Settings) -> None:
    """Raise BadInput for a setting that cannot be used, before any work."""
    if s.seed >= SPLIT_SEEDS:
        raise BadInput(f"--seed {s.seed}: expected less than {SPLIT_SEEDS}")
    if s.target_cells > s.cells:
        raise BadInput(f"--target-cells {s.target_cells}: expected at most --cells, {s.cells}")
    network = model.outline(model.architecture(s), 2)
    if s.context > model.slots_of(network):
        raise BadInput(f"--context {s.context}: the model has {SLOTS} context slots")
    if s.any_size and not model.takes_any_genes(network):
        raise BadInput(f"--any-size: {s.network} has weights of its own for each gene; use exchangeable.Exchangeable")
    if s.micro_batch % jax.device_count():
        raise BadInput(f"--micro-batch {s.micro_batch}: must be a multiple of the number of devices, "
                       f"{jax.device_count()}")
    if jax.local_device_count() * jax.process_count() != jax.device_count():
        raise BadInput(f"{jax.local_device_count()} devices of {jax.device_count()} here, with {jax.process_count()} "
                       "processes: all must have the same number")


def train(s: Settings, folder: Path, screen: Screen, update_function: Callable | None = None,
          about: dict | None = None) -> Callable:
    """Train, or go on, until `folder/model.eqx` is written, with `about` in its header; returns the jitted update for
    runs of the same shape.

    Raises BadInput if the folder holds a run with other settings, or if the screen does not fit the model.
    """
    chief = jax.process_index() == 0  # it writes and prints; the others compute
    mesh, everywhere, shared = shardings()
    share = own_share(s.micro_batch)
    if s.fresh and "what" not in screen.made.get("settings", {}):
        raise BadInput(f"--fresh {s.fresh}: {s.screen} is of no prior of prior.py; only those can be drawn anew")
    first = update_tasks(s, screen, 0, share)  # a bad screen, K or N shows here, before anything is written
    state, static = start(s, folder, screen)
    head = header(s, folder, screen) | {"revision": scales.revision()} | (about or {})
    head["screen_settings"] = screen.made.get("settings")  # of prior.py or data.py
    head["parameters"] = model.count_parameters(state.parameters)
    update = update_function or make_update(s, static, mesh)
    validate, held_out = make_validation(s, static), validation_tasks(s, screen)
    key, done = scales.key("updates", s.seed), int(state.update)
    state = placed(state, everywhere)
    if chief:
        print(f"{folder}: {s.updates} updates of {s.accumulate} x {s.micro_batch} tasks of {len(screen.genes)} genes, "
              f"{first.target.shape[-2]} cells, K = {s.context}; {head['parameters'] / 1e6:.2f}M parameters, "
              f"{mesh.size} x {jax.devices()[0].device_kind}" + (f"; going on from update {done}" if done else ""),
              flush=True)
        log = Log(folder / "log.csv", done, s)

    saved, losses, training, block = time.monotonic(), [], screen, 0
    bar = tqdm(total=s.updates, initial=done, unit="update", smoothing=0.05, mininterval=2, disable=not chief)
    for i in range(done + 1, s.updates + 1):
        if s.fresh and block != (i - 1) // s.fresh:
            block = (i - 1) // s.fresh
            training = prior.another(screen, s.seed, block)
        drawn = update_tasks(s, training, i - 1, share)
        state, loss, norm = update(state, placed(drawn, shared), key)
        losses.append(loss)
        logging = i % s.log_every == 0 or i == s.updates
        if logging:
            mean, losses = float(np.mean(jax.device_get(losses))), []
            if not np.isfinite(mean):
                raise BadInput(f"{folder}: the loss is {mean} at update {i}; lower --learning-rate")
        if logging and chief:
            validation = validate(here(state), held_out) if i % s.validate_every == 0 or i == s.updates else None
            bar.set_postfix_str(log.row(i, mean, validation, rate_applied(state), float(norm)), refresh=False)
            if time.monotonic() - saved > s.checkpoint_seconds and i < s.updates:  # only right after a row of the log
                model.write_leaves(folder / "checkpoint.eqx", head | {"update": i}, here(state))
                saved = time.monotonic()
        if chief and i * s.snapshots // s.updates > (i - 1) * s.snapshots // s.updates:  # evenly over the run
            kept = folder / "snapshots" / f"update-{i}.eqx"
            model.write_leaves(kept, head | {"update": i}, averaged(s, here(state)))
        bar.update()
    bar.close()
    if chief:
        model.write_leaves(folder / "model.eqx", head | {"update": s.updates}, averaged(s, here(state)))
        (folder / "checkpoint.eqx").unlink(missing_ok=True)
    multihost_utils.sync_global_devices("the model is written")  # nobody goes on before
    return update


# ------------------------------------------------------------------------------------------------------------ the stage


def sections(s: Settings) -> tuple[str, ...]:
    """Of the table of scales: of every training, of the screen, of a network in a file of its own, of fine-tuning."""
    return "train", tasks.section_of(s), s.network.split(".")[0], "finetune" if s.init else ""


def settled(s: Settings, folder: Path, screen: Screen) -> tuple[Settings, dict]:
    """The settings of a run where its screen has a say, K and what choose.py chooses; what the header says of that."""
    about, most = {}, s.context
    if (screen.split == TRAIN).any():
        most = tasks.most_context(screen, some=s.any_size)
    if 0 < most < s.context:
        print(f"{folder}: K = {most} instead of {s.context}: that is how many experiments there are beside a query")
        s = dataclasses.replace(s, context=most)
    if s.rates:
        import choose  # here, as it imports this file

        choice = choose.chosen(s, folder, screen)
        about["stopped"] = choice["stopped"]  # had the validation loss stopped improving?
        about["choice_seconds"] = choice["seconds"]
        s = dataclasses.replace(s, **{name: choice[name] for name in ("updates", "learning_rate", "guidance")})
    return s, about


def train_split(s: Settings, screen: Screen, folder: Path, compiled: dict) -> None:
    """Train on one split, unless that is done."""
    run, about = settled(s, folder, screen)
    finished = folder / "model.eqx"
    if finished.is_file():
        check_same(finished, model.load_model(finished)[0], header(run, folder, screen))
        if jax.process_index() == 0:
            print(f"{folder}: already trained")
        return
    size = run.updates, run.learning_rate, run.context
    compiled[size] = train(run, folder, screen, compiled.get(size), about)


def main() -> None:
    """Train on each split of the screen, skipping what is finished."""
    s = scales.parse(Settings, sections)
    share = s.micro_batch // join(s)  # of this process
    if share > 0:
        use_all_cores(share)
    check(s)
    if s.rates and jax.process_count() > 1:
        raise BadInput("--rates: one process chooses; give several the --learning-rate and --updates that it chose")
    compiled = {}  # updates of runs that differ in nothing but their data
    for path in tasks.splits(s):
        split = tasks.split_number(path)
        run = dataclasses.replace(s, seed=s.seed + SPLIT_SEEDS * split)
        folder = model.run_folder(s, s.name or s.screen, split)
        with scales.alone(folder) if jax.process_index() == 0 else contextlib.nullcontext():
            train_split(run, tasks.load_screen(path), folder, compiled)


if __name__ == "__main__":
    scales.run(main)
