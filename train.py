"""Stage 4 of 8, training: conditional flow matching on the tasks of a screen, from random weights or from a model.

Paper: Algorithm 1, equation 3, appendices A.2 (pre-training) and A.3 (fine-tuning). Departures: D1, D6, D7, D8.
Reads `screens/<name>/` below out/<scale>, writes `train/<run>/split-<s>/model.eqx` (EMA weights behind a line of JSON)
and `log.csv`; while it runs, `checkpoint.eqx` holds everything needed to go on from a stop. A screen of several splits
gives a run for each.

    python train.py --screen linear --scale smoke|laptop|paper    pre-training on linear SCMs: 10 s / 2 min / 8 h
    python train.py --screen grn --scale smoke|laptop|paper       pre-training on prior.py's GRNs: 10 s / 5 min / 36 h
    python train.py --screen leukemia --init grn --name leukemia-finetuned    fine-tuning: 5 s / 15 s / 10 min a split
    python train.py --screen leukemia --name leukemia-scratch                 the same from random initialisation
(the times are for two CPU cores at smoke and laptop scale and, as the paper reports them, one 80 GB GPU at paper scale)

    paper   name here   shape   meaning
    Y_0     noise       N D     starting point of the flow, N(0, I)
    Y_tau   y_tau       N D     (1 - tau) Y_0 + tau Y_q^int
    tau     tau                 one for each task, LogitNormal(0, 1)
    Y_q^int task.target N D     the cells to generate

    B tasks of a micro-batch   A micro-batches of an update   K context experiments   N cells   D genes
"""

import csv
import dataclasses
import functools
import os
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
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key, PRNGKeyArray, PyTree
from tqdm import tqdm

import model
import scales
import tasks
from model import SLOTS, Architecture
from scales import BadInput
from tasks import VALIDATION, Screen, Task


@dataclass(frozen=True)
class Settings(Architecture):
    """Train a network on the tasks of a screen.

    Defaults are the paper's; `python scales.py` lists what --scale changes.
    """
    screen: str = ""  # what is trained on: a folder below out/<scale>/screens
    scale: str = "laptop"  # column of the table in scales.py
    name: str = ""  # folder of the run below out/<scale>/train; default: the name of the screen
    init: str = ""  # fine-tuning: run whose model to start from
    seed: int = 0  # of everything random in this run; split s has seed + s
    out: Path = Path("out")  # everything is below out/<scale>
    # tasks
    cells: int = 200  # N (B.3)
    context: int = 8  # K (B.2)
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
    ema: float = 0.999  # decay of the averaged weights, which inference uses (A.2)
    drop_condition: float = 0.2  # probability of the null condition (A.2)
    # reporting; nothing below changes the result
    log_every: int = 20  # updates between rows of log.csv
    validate_every: int = 200  # updates between validation losses
    checkpoint_seconds: float = 60.0  # between checkpoints
    snapshots: int = 0  # EMA models kept on the way, for Figure 2


REPORTING = model.SPEED | {"log_every", "validate_every", "checkpoint_seconds", "out", "scale", "name", "snapshots"}


# ----------------------------------------------------------------------------------- the objective (eq. 3, Algorithm 1)


def task_loss(network: eqx.Module, task: Task, drop_condition: float, *, key: PRNGKeyArray) -> Float[Array, ""]:
    """Flow-matching loss of a task: how far the velocity is from the straight line from noise to data (equation 3)."""
    key_tau, key_noise, key_drop, key_slots = jr.split(key, 4)
    tau = jax.nn.sigmoid(jr.normal(key_tau))  # LogitNormal(0, 1) (A.2)
    noise = jr.normal(key_noise, task.target.shape)  # Y_0
    y_tau = (1 - tau) * noise + tau * task.target
    condition = model.prepare(network, task.given, key=key_slots)
    drop = jr.bernoulli(key_drop, drop_condition)  # trains the unconditional flow that guidance needs (A.2)
    velocity = network(y_tau, tau, condition, drop)
    # The paper has the squared Frobenius norm, a sum; here, as in the released code, it is the mean over cells and
    # genes, so that the clipping threshold and the learning rate keep their meaning at every size.
    return jnp.mean((velocity - (task.target - noise)) ** 2)


def batch_loss(network: eqx.Module, batch: Task, keys: Key[Array, " B"], drop_condition: float) -> Float[Array, ""]:
    """Mean loss of B tasks; `keys` has one key for each."""
    def one(task, key):
        return task_loss(network, task, drop_condition, key=key)

    return jnp.mean(jax.vmap(one)(batch, keys))


# ----------------------------------------------------------------------------------------------- one update (A.2, A.3)


class State(NamedTuple):
    """All that training carries from update to update; keys and tasks follow from the seed and the update's number."""
    parameters: PyTree
    optimiser: PyTree
    average: PyTree  # EMA of the parameters, biased towards zero until `averaged` corrects it
    update: Array


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

    Data parallel: each device of `mesh` computes the gradient of its share of every micro-batch; the optimiser sees the
    mean over devices. A laptop's cores work as devices too: two of them, one thread each, beat one with two threads.
    """
    optimiser = make_optimiser(s)
    each, share = PartitionSpec(), PartitionSpec(None, "data")

    def loss(parameters, batch, keys):
        return batch_loss(eqx.combine(parameters, static), batch, keys, s.drop_condition)

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
        average = optax.incremental_update(parameters, state.average, 1 - s.ema)
        new = State(parameters, optimiser_state, average, state.update + 1)
        return new, loss, optax.tree.norm(gradients)

    return update


def averaged(s: Settings, state: State) -> PyTree:
    """The EMA weights that inference uses (A.2).

    [D8] paper, released code: no correction; here: divided by 1 - ema^n, so that an average that started from zero does
    not remember it, and a run of a few hundred updates can be used.
    """
    weight = 1 - s.ema ** state.update.astype(jnp.float32)
    return jax.tree.map(lambda average: average / weight, state.average)


# ---------------------------------------------------------------------------------------------------- tasks of a run


def update_tasks(s: Settings, screen: Screen, update: int, share: range | None = None) -> Task:
    """The tasks [A, B, ...] of an update, or of those B of each micro-batch that are in `share`: the same whenever, by
    whichever process and however often they are asked for, since each has a generator of its own."""
    share = range(s.micro_batch) if share is None else share
    generators = []
    for i in range(s.accumulate):
        generators += [scales.generator("tasks", s.seed, update, i * s.micro_batch + j) for j in share]
    batch = tasks.sample_tasks(generators, screen, len(generators), s.cells, s.context, permute=s.permute_genes)
    return jax.tree.map(lambda x: x.reshape(s.accumulate, len(share), *x.shape[1:]), batch)


def validation_tasks(s: Settings, screen: Screen, count: int = 64) -> Task | None:
    """Tasks of VALIDATION conditions, fixed for a run; None if there are none. Test conditions are never touched."""
    if not (screen.split == VALIDATION).any():
        return None
    rng = scales.generator("validation", s.seed)
    return tasks.sample_tasks(rng, screen, count, s.cells, s.context, VALIDATION)


def make_validation(s: Settings, static: PyTree, batch: Task | None) -> Callable[[State], float]:
    """Loss of the EMA weights on these tasks, always with the same times and noise, and never without condition. It
    computes, and changes nothing.

    [D7] paper: silent; released code: a validation batch goes through the training step and so updates weights, also on
    the real cells that zero-shot results are reported on; here it is a function of the state that returns a number.
    """
    if batch is None:
        return lambda state: float("nan")
    keys = jr.split(scales.key("validation", s.seed), len(batch.target))

    @jax.jit
    def mean_loss(parameters, batch, keys):
        def one(task_key):
            return task_loss(eqx.combine(parameters, static), task_key[0], 0.0, key=task_key[1])

        return jnp.mean(jax.lax.map(one, (batch, keys), batch_size=s.micro_batch))

    return lambda state: float(mean_loss(averaged(s, state), batch, keys))


# -------------------------------------------------------------------------------------------------------------- one run

LOG = ("update", "tasks", "loss", "validation_loss", "learning_rate", "gradient_norm", "tasks_per_second")


class Log:
    """log.csv: one row per logging step. After a stop, the rows that came after the checkpoint are dropped."""

    def __init__(self, path: Path, update: int):
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

    def row(self, **values) -> None:
        """Append one row, and see that it reaches the disk."""
        self.writer.writerow(values)
        self.file.flush()


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
        decisive["weights"] = model.checksum(model.model_file(s, s.init, s.screen, tasks.split_number(folder)))
    return decisive


def check_same(path: Path, head: dict, wanted: dict) -> None:
    """Raise BadInput unless the model or checkpoint was made with the same settings, from the same data."""
    scales.check_made(path, {name: head.get(name) for name in wanted}, wanted)


def start(s: Settings, folder: Path, screen: Screen) -> tuple[State, PyTree]:
    """State to begin or to go on with, and the network's static part."""
    network = model.build(s, len(screen.genes), key=scales.key("initialisation", s.seed))
    parameters, static = eqx.partition(network, eqx.is_inexact_array)
    if s.init:
        weights = initial_weights(s, folder, len(screen.genes))
        parameters = jax.tree.unflatten(jax.tree.structure(parameters), weights)
    average = jax.tree.map(jnp.zeros_like, parameters)
    state = State(parameters, make_optimiser(s).init(parameters), average, jnp.zeros((), int))
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
    if head["genes"] != genes:
        raise BadInput(f"{path}: a model of {head['genes']} genes, but the data have {genes}; "
                       f"prepare them with --genes {head['genes']}")
    return jax.tree.leaves(eqx.filter(pretrained, eqx.is_inexact_array))


def check(s: Settings) -> None:
    """Raise BadInput for a setting that cannot be used, before any work."""
    scales.check_least(s, {"updates": 1, "micro_batch": 1, "accumulate": 1, "cells": 1, "context": 0, "seed": 0,
                           "log_every": 1, "validate_every": 1, "snapshots": 0, "learning_rate": 1e-12, "clip": 1e-12})
    for name in ("warmup", "decay", "drop_condition"):
        if not 0 <= getattr(s, name) <= 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(s, name)}: expected a share, from 0 to 1")
    if not 0 <= s.ema < 1:
        raise BadInput(f"--ema {s.ema}: expected at least 0 and less than 1")
    if s.context > SLOTS:
        raise BadInput(f"--context {s.context}: the model has {SLOTS} context slots")
    if s.micro_batch % jax.device_count():
        raise BadInput(f"--micro-batch {s.micro_batch}: must be a multiple of the number of devices, "
                       f"{jax.device_count()}")
    scales.check_name(s.name)
    scales.check_name(s.init)


def train(s: Settings, folder: Path, screen: Screen, update_function: Callable | None = None) -> Callable:
    """Train, or go on, until `folder/model.eqx` is written; returns the jitted update for runs of the same shape.

    Raises BadInput if the folder holds a run with other settings, or if the screen does not fit the model.
    """
    mesh = Mesh(np.array(jax.devices()), ("data",))
    first = update_tasks(s, screen, 0)  # a bad combination of screen, K and N shows here, before anything is written
    state, static = start(s, folder, screen)
    head = header(s, folder, screen) | {"revision": scales.revision()}
    head["parameters"] = model.count_parameters(state.parameters)
    update = update_function or make_update(s, static, mesh)
    validate = make_validation(s, static, validation_tasks(s, screen))
    key, done = scales.key("updates", s.seed), int(state.update)
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    share = NamedSharding(mesh, PartitionSpec(None, "data"))
    print(f"{folder}: {s.updates} updates of {s.accumulate} x {s.micro_batch} tasks of {len(screen.genes)} genes, "
          f"{first.target.shape[-2]} cells, K = {s.context}; {head['parameters'] / 1e6:.2f}M parameters, {mesh.size} x "
          f"{jax.devices()[0].device_kind}" + (f"; going on from update {done}" if done else ""), flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    log, saved = Log(folder / "log.csv", done), time.monotonic()
    bar = tqdm(total=s.updates, initial=done, unit="update", smoothing=0.05, mininterval=2)
    losses, logged_at, logged = [], time.monotonic(), done
    for i in range(done + 1, s.updates + 1):
        batches = jax.device_put(update_tasks(s, screen, i - 1), share)
        state, loss, norm = update(state, batches, key)
        losses.append(loss)
        if i % s.log_every == 0 or i == s.updates:
            mean = float(np.mean(jax.device_get(losses)))
            if not np.isfinite(mean):
                raise BadInput(f"{folder}: the loss is {mean} at update {i}; lower --learning-rate")
            speed = (i - logged) * s.micro_batch * s.accumulate / (time.monotonic() - logged_at)
            row = {"update": i, "tasks": i * s.micro_batch * s.accumulate, "loss": f"{mean:.6g}",
                   "learning_rate": f"{rate_applied(state):.6g}", "gradient_norm": f"{float(norm):.4g}",
                   "tasks_per_second": f"{speed:.1f}"}
            if i % s.validate_every == 0 or i == s.updates:
                row["validation_loss"] = f"{validate(state):.6g}"
            log.row(**row)
            bar.set_postfix_str(f"loss {mean:.4f}, {speed:.0f} tasks/s", refresh=False)
            losses, logged_at, logged = [], time.monotonic(), i
            if time.monotonic() - saved > s.checkpoint_seconds and i < s.updates:  # only right after a row of the log
                model.write_leaves(folder / "checkpoint.eqx", head | {"update": i}, state)
                saved = time.monotonic()
        if i * s.snapshots // s.updates > (i - 1) * s.snapshots // s.updates:  # evenly over the run
            model.write_leaves(folder / "snapshots" / f"update-{i}.eqx", head | {"update": i}, averaged(s, state))
        bar.update()
    bar.close()
    model.write_leaves(folder / "model.eqx", head | {"update": s.updates}, averaged(s, state))
    (folder / "checkpoint.eqx").unlink(missing_ok=True)
    return update


# ------------------------------------------------------------------------------------------------------------ the stage


def use_all_cores(share: int) -> None:
    """Make each CPU core a device of its own, as many as divide `share`. No effect where there is a GPU."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    while share % cores:
        cores -= 1
    jax.config.update("jax_num_cpu_devices", cores)


def sections(s: Settings) -> tuple[str, ...]:
    """Of the table of scales: of every training, of the screen, and of fine-tuning."""
    return "train", tasks.section_of(s), "finetune" if s.init else ""


def main() -> None:
    """Train on each split of the screen, skipping what is finished."""
    s = scales.parse(Settings, sections)
    if s.micro_batch > 0:
        use_all_cores(s.micro_batch)
    check(s)
    update = None
    for path in tasks.splits(s):
        screen, split = tasks.load_screen(path), tasks.split_number(path)
        run = dataclasses.replace(s, seed=s.seed + split)
        folder = model.run_folder(s, s.name or s.screen, split)
        finished = folder / "model.eqx"
        if finished.is_file():
            check_same(finished, model.load_model(finished)[0], header(run, folder, screen))
            print(f"{folder}: already trained")
            continue
        update = train(run, folder, screen, update)


if __name__ == "__main__":
    scales.run(main)
