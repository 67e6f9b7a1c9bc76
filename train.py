"""Stage 4 of 8, training: conditional flow matching on tasks from a prior, or from a real screen (fine-tuning).

Paper: Algorithm 1, equation 3, appendices A.2 (pre-training) and A.3 (fine-tuning). Departures: D1, D5, D6, D7, D8.
Reads `prior/` or `data/` below out/<scale>, writes `train/<run>/model.eqx` (EMA weights behind one line of JSON) and
`train/<run>/log.csv`; while it runs, `checkpoint.eqx` holds everything needed to go on from a stop.

    python train.py linear   --scale smoke|laptop|paper   pre-training on linear SCMs, made as it goes: 1 / 3 min / 8 h
    python train.py grn      --scale smoke|laptop|paper   pre-training on prior.py's GRNs:             1 / 7 min / 36 h
    python train.py finetune --dataset leukemia           from the GRN model, a run per split: 1 / 20 s each / 10 min
    python train.py scratch  --dataset leukemia           the same from random initialisation
(the times are for two CPU cores at smoke and laptop scale and, as the paper reports them, one 80 GB GPU at paper scale)

    Y_0   noise       N D     starting point of the flow, N(0, I)
    tau               one for each task, LogitNormal(0, 1)
    B tasks of a micro-batch   A micro-batches of an update   K context experiments   N cells   D genes
"""

import csv
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key, PRNGKeyArray, PyTree
from tqdm import tqdm

import scales
from data import TEST, VALIDATION, Screen, Task, load_screen, sample_tasks
from model import SLOTS, MapPFN, count_parameters
from prior import linear_screen, load_grn_screen
from scales import BadInput

SECTIONS = {  # of the table of scales, for each kind of run
    "linear": ("model", "linear"), "grn": ("model", "grn"), "finetune": ("model", "real"),
    "scratch": ("model", "real", "scratch"),
}


@dataclass(frozen=True)
class Settings:
    what: tyro.conf.Positional[Literal["linear", "grn", "finetune", "scratch"]]  # which run
    scale: str = "laptop"  # column of the table in scales.py
    seed: int = 0  # of everything random in this run
    dataset: str = "leukemia"  # finetune, scratch: folder below out/<scale>/data
    init: Path | None = None  # finetune: starting weights; default: the GRN run with seed 0
    unpaired: bool = False  # grn: the prior without counterfactual pairing (6, Table 4)
    name: str | None = None  # folder below train/; by default made of the kind of run and the seed
    out: Path = Path("out")  # everything is below out/<scale>
    # model
    genes: int = 50  # D
    width: int = 256  # E (A.1)
    depth: int = 8  # blocks (A.1)
    heads: int = 4  # (A.1)
    registers: int = 8  # (A.1)
    attention: str = "auto"  # plain, looped (CPU), cudnn (GPU), or auto
    skip: bool = False  # predict what is to be added to the velocity of N(0, I) [D12]
    film_query: bool = False  # the query modulates every token, as the time does [D34]
    treatment_gain: float = 1.0  # of the initial weights of the treatment stream [D11]
    remat: bool = True  # recompute activations in the backward pass: less memory (released code)
    # tasks
    contexts: int = 1000  # linear: random DAGs in memory at a time (B.1)
    refresh: int = 0  # linear: updates until they are replaced by new ones; 0: never
    population: int = 500  # linear: cells simulated per condition (B.1)
    cells: int = 200  # N (B.3)
    context: int = 8  # K (B.2)
    splits: int = 1  # finetune, scratch: one run for each split of the data
    # optimisation
    updates: int = 50_000  # optimiser steps
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


# ----------------------------------------------------------------------------------- the objective (eq. 3, Algorithm 1)


def task_loss(model: MapPFN, task: Task, drop_condition: float, *, key: PRNGKeyArray) -> Float[Array, ""]:
    """Flow-matching loss of a task: how far the velocity is from the straight line from noise to data (equation 3)."""
    key_tau, key_noise, key_drop, key_slots = jr.split(key, 4)
    tau = jax.nn.sigmoid(jr.normal(key_tau))  # LogitNormal(0, 1) (A.2)
    noise = jr.normal(key_noise, task.target.shape)  # Y_0
    y_tau = (1 - tau) * noise + tau * task.target
    slots = jr.permutation(key_slots, SLOTS)[: len(task.context)]  # random, so the order of experiments says nothing
    drop = jr.bernoulli(key_drop, drop_condition)  # trains the unconditional flow that guidance needs (A.2)
    velocity = model(y_tau, tau, task.observed, task.context, task.context_treatments, task.query, slots, drop)
    # [D5] paper: squared Frobenius norm (a sum); released code and here: the mean over cells and genes, which only
    # rescales the loss, so that the clipping threshold and the learning rate keep their meaning at every size.
    return jnp.mean((velocity - (task.target - noise)) ** 2)


def batch_loss(model: MapPFN, tasks: Task, keys: Key[Array, " B"], drop_condition: float) -> Float[Array, ""]:
    """Mean loss of B tasks; `keys` has one key for each."""
    return jnp.mean(jax.vmap(lambda t, k: task_loss(model, t, drop_condition, key=k))(tasks, keys))


# ----------------------------------------------------------------------------------------------- one update (A.2, A.3)


class State(NamedTuple):
    """All that training carries from update to update; keys and tasks follow from the seed and the update's number."""
    parameters: PyTree
    optimiser: PyTree
    average: PyTree  # EMA of the parameters, biased towards zero until `averaged` corrects it
    update: Array


def schedule(s: Settings) -> Callable[[int], float]:
    """Rate of each update. Warm-up, stable, decay: linear up, constant, then peak * (1 - sqrt(progress)) to zero (A.2).

    [D1] paper: "steps"; released code: the schedule counts updates but the run's length counts micro-batches, so
    warm-up is 8 times too long and the decay is never reached; here both count updates and the decay ends with the run.
    """
    warmup, decay = max(1, round(s.warmup * s.updates)), max(1, round(s.decay * s.updates))

    def rate(update):
        rising = (update + 1) / warmup  # not zero at the first update
        progress = np.clip((update + 1 - (s.updates - decay)) / decay, 0, 1)
        return s.learning_rate * min(rising, 1) * (1 - np.sqrt(progress) * (1 - 1e-6))

    return rate


def make_optimiser(s: Settings) -> optax.GradientTransformation:
    """AdamW on gradients clipped by their global norm, at a learning rate of 1: `update` scales its result.

    [D6] paper: silent; released code: clips each micro-batch; here: clips the accumulated gradient once per update, as
    the threshold is meant for the step that is taken.
    """
    adamw = optax.adamw(1.0, b1=s.b1, b2=s.b2, weight_decay=s.weight_decay)
    return optax.chain(optax.clip_by_global_norm(s.clip), adamw)


def make_update(s: Settings, static: MapPFN, mesh: Mesh) -> Callable:
    """The jitted update: (state, tasks [A, B, ...], key, learning rate) -> (state, loss, gradient norm).

    The rate is an argument, so that runs of other lengths and rates, but the same sizes, share one compiled program.

    Data parallel: each device of `mesh` computes the gradient of its share of every micro-batch; the optimiser sees the
    mean over devices. A laptop's cores work as devices too: two of them, one thread each, beat one with two threads.
    """
    optimiser = make_optimiser(s)
    each, split = PartitionSpec(), PartitionSpec(None, "data")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(each, split, split), out_specs=each, check_vma=False)
    def gradient(parameters, tasks, keys):
        loss = lambda p, t, k: batch_loss(eqx.combine(p, static), t, k, s.drop_condition)

        def accumulate(total, micro_batch):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(parameters, *micro_batch)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, parameters))
        total, _ = jax.lax.scan(accumulate, zero, (tasks, keys))
        return jax.lax.pmean(jax.tree.map(lambda x: x / s.accumulate, total), "data")

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: State, tasks: Task, key: PRNGKeyArray, learning_rate: Float[Array, ""] | float):
        keys = jr.split(jr.fold_in(key, state.update), (s.accumulate, s.micro_batch))
        loss, gradients = gradient(state.parameters, tasks, keys)
        changes, optimiser_state = optimiser.update(gradients, state.optimiser, state.parameters)
        parameters = jax.tree.map(lambda p, change: p + learning_rate * change, state.parameters, changes)
        average = jax.tree.map(lambda a, p: s.ema * a + (1 - s.ema) * p, state.average, parameters)
        return State(parameters, optimiser_state, average, state.update + 1), loss, optax.global_norm(gradients)

    return update


def averaged(s: Settings, state: State) -> PyTree:
    """The EMA weights that inference uses (A.2).

    [D8] paper, released code: no correction; here: divided by 1 - ema^n, so that an average that started from zero does
    not remember it, and a run of a few hundred updates can be used.
    """
    return jax.tree.map(lambda a: a / (1 - s.ema ** state.update.astype(jnp.float32)), state.average)


# ----------------------------------------------------------------------------------------------------- sources of tasks


def run_key(seed: int, use: Literal["initialisation", "updates", "validation"]) -> PRNGKeyArray:
    """The key of one run for one use."""
    return jr.fold_in(jr.key(seed), ("initialisation", "updates", "validation").index(use))


def seeded(*numbers: int) -> np.random.Generator:
    """A generator of its own for each tuple of numbers."""
    return np.random.default_rng(np.random.SeedSequence([len(numbers), *numbers]))  # NumPy pads with 0: (1, 0) is (1,)


TASKS, GRAPHS, HELD_OUT = range(3)  # the last number of a seed: what it is used for


class Source:
    """Training tasks of one run: `source(update)` is the same whenever and however often it is asked."""

    def __init__(self, s: Settings, screen: Screen | None):
        self.s, self.screen, self.generation = s, screen, None

    def __call__(self, update: int) -> Task:
        """Tasks [A, B, ...] of this update."""
        s = self.s
        if s.what == "linear":  # on the fly: a new set of graphs every `refresh` updates
            generation = update // s.refresh if s.refresh else 0
            if generation != self.generation:
                self.screen = linear_screen(seeded(s.seed, generation, GRAPHS), s.contexts, s.genes, s.population)
                self.generation = generation
        tasks = sample_tasks(seeded(s.seed, update, TASKS), self.screen, s.accumulate * s.micro_batch,
                             s.cells, s.context)
        return Task(*(x.reshape(s.accumulate, s.micro_batch, *x.shape[1:]) for x in tasks))


def validation_tasks(s: Settings, screen: Screen | None, tasks: int = 64) -> Task | None:
    """Held-out tasks, fixed for a run: unseen DAGs, unseen GRNs, or validation conditions; None if there are none."""
    rng = seeded(s.seed, 0, HELD_OUT)
    if s.what == "linear":
        screen = linear_screen(rng, tasks, s.genes, s.population)
        return sample_tasks(rng, screen, tasks, s.cells, s.context)
    split = TEST if s.what == "grn" else VALIDATION  # held-out GRNs; of real cells, test conditions are never touched
    return sample_tasks(rng, screen, tasks, s.cells, s.context, split) if (screen.split == split).any() else None


def make_validation(s: Settings, static: MapPFN, tasks: Task | None) -> Callable[[State], float]:
    """Loss of the EMA weights on `tasks`, always with the same times and noise. It computes, and changes nothing.

    [D7] paper: silent; released code: a validation batch goes through the training step and so updates weights, also on
    the real cells that zero-shot results are reported on; here it is a function of the state that returns a number.
    """
    if tasks is None:
        return lambda state: float("nan")
    keys = jr.split(run_key(s.seed, "validation"), len(tasks.query))

    @jax.jit
    def loss(parameters, tasks, keys):
        one = lambda t_k: task_loss(eqx.combine(parameters, static), t_k[0], 0.0, key=t_k[1])
        return jnp.mean(jax.lax.map(one, (tasks, keys), batch_size=s.micro_batch))

    return lambda state: float(loss(averaged(s, state), tasks, keys))


# ---------------------------------------------------------------------------------------------------------- checkpoints


REPORTING = {"log_every", "validate_every", "checkpoint_seconds", "out", "attention", "remat", "splits", "init",
             "scale", "name", "snapshots"}


def header(s: Settings) -> dict:
    """The settings that decide the result."""
    return {k: v for k, v in dataclasses.asdict(s).items() if k not in REPORTING}


def write_leaves(path: Path, head: dict, tree: PyTree) -> None:
    """One line of JSON, then the arrays (Equinox's format), under a temporary name until complete."""
    with scales.atomic(path) as temporary, open(temporary, "wb") as file:
        file.write((json.dumps(head) + "\n").encode())
        eqx.tree_serialise_leaves(file, tree)


def read_leaves(path: Path, like: Callable[[dict], PyTree]) -> tuple[dict, PyTree]:
    """What `write_leaves` wrote; `like` makes a tree of the right shapes from the header. Raises BadInput."""
    if not path.is_file():
        raise BadInput(f"{path}: no such checkpoint; train.py writes it")
    with open(path, "rb") as file:
        try:
            head = json.loads(file.readline())
            return head, eqx.tree_deserialise_leaves(file, like(head))
        except BadInput:  # raised by `like`, about the settings; it is a ValueError too
            raise
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, EOFError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BadInput(f"{path}: not a checkpoint of this program, or damaged ({reason}); "
                           "delete it to train anew") from None


def check_same(path: Path, head: dict, s: Settings) -> None:
    """Raise BadInput unless the file was made with the same settings."""
    other = {k: head.get(k) for k, v in header(s).items() if head.get(k) != v}
    if other:
        wanted = ", ".join(f"{k} {header(s)[k]} (there: {v})" for k, v in other.items())
        raise BadInput(f"{path}: made with other settings: {wanted}; "
                       "use another --out, or delete its folder to train anew")


ARCHITECTURE = "genes", "width", "depth", "heads", "registers", "skip", "film_query"  # what the shapes follow from


def build(s: Settings | dict, seed: int = 0) -> MapPFN:
    """A randomly initialised model of the size that the settings, or a checkpoint's header, say."""
    s = dataclasses.asdict(s) if isinstance(s, Settings) else s | {"attention": "auto", "remat": False}
    return MapPFN(s["genes"], s["width"], s["depth"], s["heads"], s["registers"], attention=s["attention"],
                  remat=s["remat"], skip=s["skip"], film_query=s["film_query"], treatment_gain=s["treatment_gain"],
                  key=run_key(seed, "initialisation"))


def load_model(path: Path) -> tuple[dict, MapPFN]:
    """Header and EMA model of a finished run. Raises BadInput if the file is missing or damaged."""
    return read_leaves(path, lambda head: outline(*(head[name] for name in ARCHITECTURE)))


@functools.cache
def outline(*sizes: int | bool) -> MapPFN:
    """A model with these values of ARCHITECTURE, shapes only: its numbers would take seconds to make."""
    return eqx.filter_eval_shape(build, dict(zip(ARCHITECTURE, sizes)) | {"treatment_gain": 1.0})


# -------------------------------------------------------------------------------------------------------------- one run


LOG = ("update", "tasks", "loss", "validation_loss", "learning_rate", "gradient_norm", "tasks_per_second")


class Log:
    """log.csv: one row per logging step. After a stop, the rows that came after the checkpoint are dropped."""

    def __init__(self, path: Path, update: int):
        rows = []
        if update and path.is_file():
            rows = [r for r in csv.DictReader(path.open()) if r["update"].isdigit() and int(r["update"]) <= update]
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
    rows = list(csv.DictReader(log.open())) if log.is_file() else []
    tasks = np.diff([0, *(int(r["tasks"]) for r in rows)])
    return round(float(sum(tasks / [max(float(r["tasks_per_second"]), 1e-9) for r in rows])), 1)


def start(s: Settings, path: Path) -> tuple[State, MapPFN]:
    """State to begin or to go on with, and the model's static part."""
    model = build(s, s.seed)
    if s.what == "finetune":
        source = s.init or s.out / s.scale / "train" / "grn-seed0" / "model.eqx"
        head, model = load_model(source)
        wrong = [f"{k} {head.get(k)}, not {getattr(s, k)}" for k in ARCHITECTURE if head.get(k) != getattr(s, k)]
        if wrong:
            raise BadInput(f"{source}: a checkpoint of another configuration: {'; '.join(wrong)}")
        model = eqx.combine(eqx.filter(model, eqx.is_inexact_array), build(s))
    parameters, static = eqx.partition(model, eqx.is_inexact_array)
    state = State(parameters, make_optimiser(s).init(parameters), jax.tree.map(jnp.zeros_like, parameters),
                  jnp.zeros((), int))
    if path.is_file():
        head, state = read_leaves(path, lambda head: check_same(path, head, s) or state)
    return state, static


def train(s: Settings, folder: Path, screen: Screen | None = None, update_function: Callable | None = None) -> Callable:
    """Train, or go on, until `folder/model.eqx` is written; returns the jitted update for runs of the same shape.

    Raises BadInput if the folder holds a run with other settings, or if the screen does not fit the model.
    """
    mesh = Mesh(np.array(jax.devices()), ("data",))
    if s.micro_batch % mesh.size:
        raise BadInput(f"--micro-batch {s.micro_batch}: must be a multiple of the number of devices, {mesh.size}")
    if s.context > SLOTS:
        raise BadInput(f"--context {s.context}: the model has {SLOTS} context slots")
    if screen is not None and len(screen.genes) != s.genes:
        raise BadInput(f"the data have {len(screen.genes)} genes, the model {s.genes}; "
                       f"prepare them with --genes {s.genes}")
    source, valid = Source(s, screen), validation_tasks(s, screen)
    first = source(0)  # a bad combination of screen, K and N shows here, before anything is written
    state, static = start(s, folder / "checkpoint.eqx")
    done, key, rate = int(state.update), run_key(s.seed, "updates"), schedule(s)
    update = update_function or make_update(s, static, mesh)
    validate = make_validation(s, static, valid)
    shard = NamedSharding(mesh, PartitionSpec(None, "data"))
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    print(f"{folder}: {s.updates} updates of {s.accumulate} x {s.micro_batch} tasks of {first.query.shape[-1]} genes, "
          f"{s.cells} cells, K = {s.context}; {count_parameters(state.parameters) / 1e6:.2f}M parameters, "
          f"{mesh.size} x {jax.devices()[0].device_kind}" + (f"; going on from update {done}" if done else ""),
          flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    log, saved = Log(folder / "log.csv", done), time.monotonic()
    bar = tqdm(total=s.updates, initial=done, unit="update", smoothing=0.05, mininterval=2)
    losses, since = [], (time.monotonic(), done)
    for i in range(done, s.updates):
        state, loss, norm = update(state, jax.device_put(source(i), shard), key, rate(i))
        losses.append(loss)
        last = i + 1 == s.updates
        if (i + 1) % s.log_every == 0 or last:
            mean, now = float(np.mean(jax.device_get(losses))), time.monotonic()
            if not np.isfinite(mean):
                raise BadInput(f"{folder}: the loss is {mean} at update {i + 1}; lower --learning-rate")
            speed = (i + 1 - since[1]) * s.micro_batch * s.accumulate / (now - since[0])
            check = validate(state) if (i + 1) % s.validate_every == 0 or last else None
            log.row(update=i + 1, tasks=(i + 1) * s.micro_batch * s.accumulate, loss=f"{mean:.6g}",
                    validation_loss="" if check is None else f"{check:.6g}", gradient_norm=f"{float(norm):.4g}",
                    learning_rate=f"{rate(i):.6g}", tasks_per_second=f"{speed:.1f}")
            bar.set_postfix_str(f"loss {mean:.4f}, {speed:.0f} tasks/s", refresh=False)
            losses, since = [], (time.monotonic(), i + 1)
        if s.snapshots and (i + 1) * s.snapshots // s.updates > i * s.snapshots // s.updates:
            write_leaves(folder / "snapshots" / f"update-{i + 1}.eqx", header(s) | {"update": i + 1},
                         averaged(s, state))
        if not losses and not last and time.monotonic() - saved > s.checkpoint_seconds:  # right after a row of the log
            write_leaves(folder / "checkpoint.eqx", header(s) | {"update": i + 1}, state)
            saved = time.monotonic()
        bar.update()
    bar.close()
    about = {"revision": scales.revision(), "parameters": count_parameters(state.parameters)}
    write_leaves(folder / "model.eqx", header(s) | about, averaged(s, state))
    (folder / "checkpoint.eqx").unlink(missing_ok=True)
    return update


def runs(s: Settings) -> list[tuple[Settings, Path, Path | None]]:
    """The runs that one command stands for: settings, folder, and the file of real cells."""
    root = s.out / s.scale
    if s.what in ("linear", "grn"):
        name = s.name or s.what + "-unpaired" * s.unpaired + f"-seed{s.seed}"
        return [(s, root / "train" / name, None)]
    files = [root / "data" / s.dataset / f"split-{i}.h5ad" for i in range(s.splits)]
    if not files[0].is_file():
        raise BadInput(f"{files[0]}: no such file; "
                       f"prepare it with python data.py --dataset {s.dataset} --scale {s.scale}")
    return [(dataclasses.replace(s, seed=s.seed + i), root / "train" / f"{s.what}-{s.dataset}-split{i}", file)
            for i, file in enumerate(files)]


def grn_screen(s: Settings) -> Screen:
    """The GRNs that prior.py wrote; one in fifty is held out, with half of its treatments as TEST."""
    return load_grn_screen(s.out / s.scale / ("prior" + "-unpaired" * s.unpaired), held_out=max(1, s.contexts // 50))


def use_all_cores(micro_batch: int) -> None:
    """Make each CPU core a device of its own, as many as divide the micro-batch. No effect where there is a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jax.config.update("jax_num_cpu_devices", max(n for n in range(1, cores + 1) if micro_batch % n == 0))


def main() -> None:
    """Train whatever the command line names, skipping what is finished."""
    s = scales.parse(Settings, lambda what: SECTIONS.get(what, ()))
    use_all_cores(s.micro_batch)
    update = None
    for run, folder, file in runs(s):
        if (folder / "model.eqx").is_file():
            check_same(folder / "model.eqx", load_model(folder / "model.eqx")[0], run)
            print(f"{folder}: already trained")
            continue
        screen = grn_screen(s) if s.what == "grn" else load_screen(file) if file else None
        update = train(run, folder, screen, update)


if __name__ == "__main__":
    scales.run(main)
