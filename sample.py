"""Stage 5 of 8, inference: solve the learnt flow from noise to cells, for every held-out condition of an experiment.

Paper: appendix A.4 (Dopri5, classifier-free guidance), C.3 and Table 7 (its weight), section 6 and Figure 3 (test-time
augmentation), B.4 (what is held out). Reads `train/<run>/model.eqx` and `data/`, writes `train/<run>/guidance.json` and
`samples/<experiment>/<method>-split<s>-draw<r>.npz` below out/<scale>; the baselines write their rows beside them,
from the same tasks. Departures: D9, D10, D50.

    python sample.py linear   --scale smoke|laptop|paper   MapPFN on unseen linear SCMs           20 s / 1 min / -
    python sample.py leukemia --scale smoke|laptop|paper   MapPFN random, pre-trained, fine-tuned 20 s / 4 min / -
(two CPU cores; paper scale has not been timed)

    Y_tau     y            N D   cells on their way from noise (tau 0) to data (tau 1)
    omega     guidance           1 conditional flow, 0 unconditional, above 1 exaggerates what the condition says
    P tasks (conditions that are predicted)   K context experiments   N cells   D genes   G genes of a larger screen
"""

import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray
from tqdm import tqdm

import scales
import train
from data import EvaluationTask, Screen, Task, evaluation_tasks, load_screen
from metrics import Predictions, finished, rmse, save_predictions
from model import SLOTS, MapPFN
from prior import linear_screen
from scales import BadInput

VARIANTS = {  # of MapPFN: the name of the row -> the training run; {} is the data set and the split
    "mappfn-random": "scratch-{}", "mappfn-pretrained": "grn-seed0", "mappfn-finetuned": "finetune-{}",  # Table 3
    "mappfn-unpaired": "grn-unpaired-seed0", "mappfn-no-context": "grn-no-context",  # Table 4, where they were trained
}


@dataclass(frozen=True)
class Settings:
    experiment: tyro.conf.Positional[str]  # what is predicted: linear, or a folder below out/<scale>/data
    scale: str = "laptop"  # column of the table in scales.py
    seed: int = 0  # of the noise, and of the held-out graphs and draws of cells
    guidance: float | None = None  # omega (A.4); by default the best of Table 7's grid on validation tasks
    steps: int = 25  # Dopri5 steps of the flow [D9]
    genes: int = 20  # linear: variables D (5.1)
    context: int = 8  # K (B.1, B.2)
    eval_cells: int = 200  # cells per population, given and generated (B.3)
    held_out: int = 10  # linear: unseen graphs [D10]
    seeds: int = 3  # linear: models, trained from different seeds (Table 2)
    splits: int = 1  # real cells: random splits (B.4)
    resamplings: int = 10  # real cells: draws of cells per split (Table 3)
    out: Path = Path("out")  # everything is below out/<scale>


SECTIONS = {"linear": ("linear", "evaluate")}  # of the table of scales; other experiments: ("real", "evaluate")

# ------------------------------------------------------------------------------------------------------ the flow (A.4)


def guided_velocity(model: MapPFN, task: Task, slots: Array, guidance: float | Array, y: Float[Array, "N D"],
                    tau: Float[Array, ""]) -> Float[Array, "N D"]:
    """Classifier-free guidance (Ho & Salimans, 2021): v_null + omega (v_condition - v_null), both in one batch."""
    one = lambda drop: model(y, tau, task.observed, task.context, task.context_treatments, task.query, slots, drop)
    if isinstance(guidance, float) and guidance == 1:
        return one(jnp.array(False))
    unconditional, conditional = jax.vmap(one)(jnp.array([True, False]))
    return unconditional + guidance * (conditional - unconditional)


def flow(model: MapPFN, task: Task, guidance: float | Array, steps: int | Array, cells: int, *,
         key: PRNGKeyArray) -> Float[Array, "N D"]:
    """Cells of one task: the ODE dY = v dtau from noise at 0 to data at 1, in `steps` equal Dopri5 steps (A.4).

    [D9] paper: silent; released code: 100 steps, that is 601 evaluations of the network; here: 25 steps (151), from
    which no value differs by 1e-3 (`tests/test_sample.py`). Laptop scale makes do with 5 (31), to save time.
    """
    key_noise, key_slots = jr.split(key)
    slots = jr.permutation(key_slots, SLOTS)[: len(task.context)]
    field = diffrax.ODETerm(lambda tau, y, _: guided_velocity(model, task, slots, guidance, y, tau))
    solver, noise = diffrax.Dopri5(), jr.normal(key_noise, (cells, task.target.shape[-1]))

    def step(i, y_state):
        y, state = y_state
        y, _, _, state, _ = solver.step(field, i / steps, (i + 1) / steps, y, None, state, made_jump=False)
        return y, state

    # Not diffrax.diffeqsolve: its checks call back to Python, and JAX does not keep such compiled code for other stages.
    return jax.lax.fori_loop(0, steps, step, (noise, solver.init(field, jnp.zeros(()), 1 / steps, noise, None)))[0]


@eqx.filter_jit
def _flows(model, tasks, keys, guidance, steps, cells):
    """`flow` for one task on each device."""
    parameters, static = eqx.partition(model, eqx.is_array)
    share, mesh = PartitionSpec("data"), Mesh(np.array(jax.devices()), ("data",))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), share), out_specs=share, check_vma=False)
    def each(parameters, tasks_keys):
        task, key = jax.tree.map(lambda x: x[0], tasks_keys)
        return flow(eqx.combine(parameters, static), task, guidance, steps, cells, key=key)[None]

    return each(parameters, (tasks, keys))


def in_pieces(tasks: Task, index: Int[np.ndarray, "pieces size"]) -> Task:
    """P tasks -> P * pieces tasks: one for each row of `index`, which says which cells of all populations it has."""
    def divided(x):  # P ... N D -> (P pieces) ... size D
        x = np.moveaxis(x[..., index, :], -3, 1)
        return x.reshape(len(x) * len(index), *x.shape[2:])

    again = lambda x: np.repeat(x, len(index), axis=0)
    return Task(divided(tasks.observed), divided(tasks.context), again(tasks.context_treatments), again(tasks.query),
                divided(tasks.target))


def generate(model: MapPFN, tasks: Task | EvaluationTask, guidance: float = 2.0, steps: int = 25,
             cells: int | None = None, at_once: int | None = None, *, key: PRNGKeyArray) -> Float[np.ndarray, "P N D"]:
    """Predicted cells of P tasks, as many per task as its populations have unless `cells` says otherwise.

    `at_once`: give and generate at most this many cells at a time, and pool them [D50]. A task's cells depend on its own
    content and its place in the list only, not on the other tasks or the devices.
    """
    tasks, given = Task(*tasks[: len(Task._fields)]), tasks.observed.shape[1]
    cells, size = cells or given, min(at_once or given, given)
    if size < given:
        # [D50] paper, released code: as many cells as in training; here: so too, although laptop scale trains on 16 and
        # evaluates 100. The network meets what it was trained on; the ledger says how little that changed.
        index = np.arange(-(-max(cells, given) // size) * size).reshape(-1, size) % given  # the last one begins anew
        pooled = generate(model, in_pieces(tasks, index), guidance, steps, key=key)
        return pooled.reshape(len(tasks.query), -1, tasks.query.shape[1])[:, :cells]
    count, devices = len(tasks.query), jax.device_count()
    keys = jax.vmap(lambda i: jr.fold_in(key, i))(np.arange(count))
    # Arrays, and always as many tasks at a time, so that other values and other P compile nothing.
    guidance, steps = 1.0 if guidance == 1 else jnp.asarray(guidance, jnp.float32), jnp.asarray(steps)
    turns = [np.minimum(np.arange(i, i + devices), count - 1) for i in range(0, count, devices)]  # filled up
    found = [_flows(model, Task(*(x[turn] for x in tasks)), keys[turn], guidance, steps, cells) for turn in turns]
    return np.concatenate([np.asarray(x) for x in found])[:count]


def clip_expression(cells: Float[np.ndarray, "P N D"],
                    log_expression: bool) -> tuple[Float[np.ndarray, "P N D"], float]:
    """Log-expression cannot be negative: set what is to zero, and say which fraction that was. SCM values stay."""
    negative = cells < 0 if log_expression else np.zeros_like(cells, bool)
    return np.where(negative, 0, cells).astype(np.float32), float(negative.mean())


# ------------------------------------------------------------------------------------- the guidance weight (Table 7)

GUIDANCE = (1.0, 1.5, 2.0, 2.5, 3.0)


def chosen_guidance(s: "Settings", file: Path, head: dict, model: MapPFN, screen: Screen | None) -> float:
    """The weight with the lowest RMSE (equation 11) on validation tasks of the model's own training, never on test ones.

    It is kept in `guidance.json` beside the model. A screen too small for validation conditions leaves a fine-tuned model
    with the weight of the model that it came from, and one that was never pre-trained with 2 (A.4).
    """
    record = file.with_name("guidance.json")
    if record.is_file():
        return json.loads(record.read_text())["guidance"]
    fields = {f.name for f in dataclasses.fields(train.Settings)}
    run = train.Settings(**{k: v for k, v in head.items() if k in fields}, scale=s.scale, out=s.out)
    tasks, errors = train.validation_tasks(run, train.grn_screen(run) if run.what == "grn" else screen), {}
    if tasks is not None:
        for weight in GUIDANCE:  # the same tasks and the same noise for each
            cells = generate(model, tasks, weight, s.steps, key=jr.key(s.seed))
            cells, _ = clip_expression(cells, run.what != "linear")
            errors[weight] = float(np.mean([rmse(true, predicted) for true, predicted in zip(tasks.target, cells)]))
        best = min(errors, key=errors.get)
    else:
        source = file.parents[1] / "grn-seed0" / "guidance.json"
        best = json.loads(source.read_text())["guidance"] if run.what == "finetune" and source.is_file() else 2.0
    with scales.atomic(record) as temporary:
        temporary.write_text(json.dumps({"guidance": best, "validation_rmse": errors, "revision": scales.revision()}))
    return best


# ----------------------------------------------------------------------------- test-time augmentation (6, Figure 3)


def gene_subsets(rng: np.random.Generator, genes: int, size: int, subsets: int, always: np.ndarray) -> np.ndarray:
    """Random overlapping subsets of `size` out of G genes, as indices [subsets, size].

    `always` (the treated genes, without which a treatment has no one-hot) are in each; the others take turns in random
    order, so that all are in equally many, give or take one. Raises BadInput if the subsets are too few for all genes.
    """
    others = np.setdiff1d(np.arange(genes), always)
    room = size - len(always)
    if not 0 <= room <= len(others) <= subsets * room:
        raise BadInput(f"{subsets} subsets of {size} genes cannot cover {genes} genes of which {len(always)} are in "
                       "all of them; use more subsets, or fewer context experiments")
    # A queue of reshuffled rounds; a gene that is in the current subset already waits for the next.
    result, queue = [], []
    for _ in range(subsets):
        chosen = []
        while len(chosen) < room:
            if not (waiting := [g for g in queue if g not in chosen]):
                queue += list(rng.permutation(others))
                continue
            queue.remove(waiting[0])
            chosen.append(waiting[0])
        result.append(rng.permutation(np.concatenate([always, chosen]).astype(int)))
    return np.array(result)


def augmented(model: MapPFN, task: Task, size: int, subsets: int, rng: np.random.Generator, guidance: float = 2.0,
              steps: int = 25, at_once: int | None = None, *, key: PRNGKeyArray) -> Float[np.ndarray, "M G"]:
    """Cells of one task [unbatched] with more genes G than the model's D = `size`: predict each subset, pool per gene.

    A gene's cells from all subsets that contain it are pooled (6); each gene then keeps a random M of its own, M being
    what the rarest gene has, so that the result is an array. Its rows are not joint cells: use it for per-gene statistics.
    """
    treated = np.unique(np.argwhere(np.vstack([task.query[None], task.context_treatments]))[:, 1])
    chosen = gene_subsets(rng, len(task.query), size, subsets, treated)
    tasks = Task(*(np.stack([x[..., genes] for genes in chosen]) for x in task))
    cells = generate(model, tasks, guidance, steps, at_once=at_once, key=key)  # subsets N D
    pools = []
    for gene in range(len(task.query)):
        subset, column = np.nonzero(chosen == gene)
        pools.append(rng.permutation(cells[subset, :, column].ravel()))
    return np.stack([pool[: min(map(len, pools))] for pool in pools], axis=1)


# -------------------------------------------------------------------------------------- what is predicted (B.1, B.4)


def evaluation_sets(experiment: str, s) -> Iterator[tuple[int, int, Screen, EvaluationTask]]:
    """(split, resampling, screen, tasks) of an experiment; all methods are given the same.

    Linear SCMs have one "split": `held_out` graphs that no model has seen, with half of their treatments as test (B.4).
    Raises BadInput where the data are missing.
    """
    if experiment == "linear":
        # [D10] released code: one graph, whose other treatments join the training data; here: several, all unseen.
        screen = linear_screen(train.seeded(s.seed, 0, train.HELD_OUT + 1), s.held_out, s.genes, 500, s.held_out)
        rng = train.seeded(s.seed, 0, train.HELD_OUT + 2)
        yield 0, 0, screen, evaluation_tasks(rng, screen, s.eval_cells, s.context)
        return
    for split in range(s.splits):
        file = s.out / s.scale / "data" / experiment / f"split-{split}.h5ad"
        if not file.is_file():
            raise BadInput(f"{file}: no such file; prepare it with "
                           f"python data.py --dataset {experiment} --scale {s.scale}")
        screen = load_screen(file)
        for draw in range(s.resamplings):
            rng = train.seeded(s.seed, split, draw, train.HELD_OUT + 2)
            yield split, draw, screen, evaluation_tasks(rng, screen, s.eval_cells, s.context)


def model_files(s: Settings, split: int) -> dict[str, Path]:
    """Name of each row of MapPFN -> the model that makes it."""
    folder = s.out / s.scale / "train"
    if s.experiment == "linear":
        return {f"mappfn-seed{i}": folder / f"linear-seed{i}" / "model.eqx" for i in range(s.seeds)}
    files = {row: folder / run.format(f"{s.experiment}-split{split}") / "model.eqx" for row, run in VARIANTS.items()}
    optional = "mappfn-unpaired", "mappfn-no-context"
    return {row: file for row, file in files.items() if file.is_file() or row not in optional}


def main() -> None:
    """Predict every test condition with every trained variant, skipping the files that are finished."""
    s = scales.parse(Settings, lambda word: SECTIONS.get(word, ("real", "evaluate")))
    train.use_all_cores(2)
    kept = {k: v for k, v in dataclasses.asdict(s).items() if k != "out"}
    print(f"sample.py {json.dumps(kept)}, revision {scales.revision()}, {jax.device_count()} x "
          f"{jax.devices()[0].device_kind}", flush=True)
    sets = list(evaluation_sets(s.experiment, s))
    bar = tqdm(total=sum(len(tasks.query) * len(model_files(s, split)) for split, _, _, tasks in sets), unit="task")
    for split, draw, screen, tasks in sets:
        for row, (method, file) in enumerate(model_files(s, split).items()):
            path = s.out / s.scale / "samples" / s.experiment / f"{method}-split{split}-draw{draw}.npz"
            if finished(path, kept):
                bar.update(len(tasks.query))
                continue
            started = time.perf_counter()
            head, model = train.load_model(file)
            if head["genes"] != len(screen.genes):
                raise BadInput(f"{file}: a model of {head['genes']} genes, but the data have {len(screen.genes)}")
            k = tasks.context.shape[1] if head["context"] else 0  # trained without context: used without (Table 4)
            given = tasks._replace(context=tasks.context[:, :k], context_treatments=tasks.context_treatments[:, :k])
            key = jr.key(int(train.seeded(s.seed, split, draw, row).integers(2**31)))
            guidance = chosen_guidance(s, file, head, model, screen) if s.guidance is None else s.guidance
            cells = generate(model, given, guidance, s.steps, at_once=head["cells"], key=key)
            cells, clipped = clip_expression(cells, screen.log_expression)
            seconds = train.seconds(file.with_name("log.csv"))
            meta = {"experiment": s.experiment, "method": method, "split": split, "resampling": draw, "seed": s.seed,
                    "scale": s.scale, "revision": scales.revision(), "settings": kept, "clipped_fraction": clipped,
                    "guidance": guidance,
                    "seconds": round(time.perf_counter() - started, 1), "training": head | {"seconds": seconds},
                    "genes": screen.genes}
            names = np.array(screen.context_names)[tasks.context_index]
            save_predictions(path, Predictions(tasks.observed, tasks.observed, tasks.target, cells, tasks.query, names,
                                               screen.log_expression, meta))
            bar.set_postfix_str(method + f", {clipped:.1%} negative values clipped" * (clipped > 0), refresh=False)
            bar.update(len(tasks.query))
    bar.close()
    print(f"predictions in {s.out / s.scale / 'samples' / s.experiment}", flush=True)


if __name__ == "__main__":
    scales.run(main)
