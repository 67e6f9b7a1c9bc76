"""Stage 5 of 8, inference: solve the learnt flow from noise to cells, for every held-out condition of a screen.

Paper: equation 1, appendix A.4 (Dopri5, classifier-free guidance), C.3 and Table 7 (its weight), section 6 and Figure 3
(test-time augmentation). Reads `screens/<screen>/` and `train/<run>/` below out/<scale>, writes
`samples/<screen>/<row>-split<s>-draw<d>.npz` and, beside the model, `guidance.json`. Departure: D9.

    python sample.py --screen linear --model mappfn-seed0=linear-seed0      MapPFN on unseen linear SCMs: ROW=RUN
    python sample.py --screen leukemia --model grn                          zero-shot on real cells; the row is "grn"
    python sample.py --screen leukemia --model mappfn-pretrained=grn mappfn-finetuned=leukemia-finetuned
(a row takes 10 s at smoke and half a minute at laptop scale, on two CPU cores; paper scale has not been timed)

    paper   name here   shape   meaning
    Y_tau   y           N D     cells on their way from noise (tau 0) to data (tau 1)
    omega   guidance            1 conditional flow, 0 unconditional, above 1 exaggerates what the condition says

    P tasks (conditions that are predicted)   K context experiments   N cells   D genes   G genes of a larger screen
"""

import dataclasses
import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from tqdm import tqdm

import metrics
import model
import prior
import scales
import tasks
import train
from model import SLOTS
from scales import BadInput
from tasks import EvaluationSettings, Given, Screen


@dataclass(frozen=True)
class Settings(EvaluationSettings):
    """Predict the test conditions of a screen. Defaults are the paper's."""
    model: tuple[str, ...] = ()  # runs of train.py, each as ROW=RUN, or RUN: then the row of the tables has its name
    guidance: float | None = None  # omega (A.4); by default the best of Table 7's grid on validation tasks
    steps: int = 25  # Dopri5 steps of the flow [D9]
    counterfactual: bool = False  # what becomes of control cells, not new cells
    context: int | None = None  # K; by default as in training, or as many as there are
    context_gain: bool = False  # predict also with a context that says nothing (`uninformed`), for tables to compare
    training: bool = False  # predict the training conditions, each from the others: to choose a model of other data by


AT_ONCE = 16  # tasks that a GPU solves at a time: one alone leaves most of it idle
UNINFORMED = {"controls": 1, "exchanged": 2}  # how a context is made to say nothing, of how many experiments at least
CONDITIONS_ON = ("treatment", "controls", "context experiments")  # Table 1: what tasks.Given holds

# ------------------------------------------------------------------------------------------------------ the flow (A.4)


# Exercise 6
def guided_velocity(network: eqx.Module, condition: PyTree, guidance: float | Array, y: Float[Array, "N D"],
                    tau: Float[Array, ""], instead: PyTree | None = None) -> Float[Array, "N D"]:
    """Classifier-free guidance (Ho & Salimans, 2021): v_null + omega (v_condition - v_null), both in one batch.

    `instead`: a condition whose velocity takes the place of v_null.
    """
    def velocity(condition, drop):
        return network(y, tau, condition, drop)

    if isinstance(guidance, float) and guidance == 1:  # half of the work
        return velocity(condition, jnp.array(False))
    if instead is None:
        unconditional, conditional = jax.vmap(velocity, (None, 0))(condition, jnp.array([True, False]))
    else:
        both = jax.tree.map(lambda *pair: jnp.stack(pair), instead, condition)
        unconditional, conditional = jax.vmap(velocity, (0, None))(both, jnp.array(False))
    return unconditional + guidance * (conditional - unconditional)


# Exercise 6
def flow(network: eqx.Module, given: Given, guidance: float | Array, steps: int, cells: int,
         source: Float[Array, "N D"] | None = None, *, key: PRNGKeyArray) -> Float[Array, "N D"]:
    """Cells of one task: the ODE dY = v dtau from noise at 0 to data at 1, in `steps` equal Dopri5 steps (A.4).

    `source`, counterfactual cells [D57]: what each of these control cells would be under the query, not new cells. The
    flow can be inverted, so the noise that a cell comes from is found by solving from 1 to 0 without a knock-out
    (abduction); from there on the query acts, and guidance exaggerates how it differs from no knock-out. What the
    network gets wrong about a screen cancels: a query of no knock-out returns the cell, in 25 steps to 1e-3 (root mean
    square, of the checkpoint in the box on leukemia; in 10 steps to 0.011, which moves no metric by a hundredth of it;
    in 5 to 0.032).

    [D9] paper: silent; released code: 100 steps, that is 601 evaluations of the network; here: 25 steps (151), from
    which no value differs by 1e-3 (`tests/test_sample.py`). Laptop scale makes do with 5 (31), to save time.
    """
    key_noise, key_slots = jr.split(key)
    condition, instead = model.prepare(network, given, key=key_slots), None
    start = jr.normal(key_noise, (cells, given.controls.shape[-1]))

    def solve(y, begin, end, condition, guidance, instead):
        def velocity(tau, y, _):
            return guided_velocity(network, condition, guidance, y, tau, instead)

        solution = diffrax.diffeqsolve(diffrax.ODETerm(velocity), diffrax.Dopri5(), t0=begin, t1=end, y0=y,
                                       dt0=(end - begin) / steps, max_steps=steps + 1, throw=False)
        return solution.ys[-1]  # what fails is not finite, and refused

    if source is not None:
        instead = model.prepare(network, given._replace(query=jnp.zeros_like(given.query)), key=key_slots)
        start = solve(source, 1.0, 0.0, instead, 1.0, None)
    return solve(start, 0.0, 1.0, condition, guidance, instead)


@eqx.filter_jit
def flows(network: eqx.Module, given: Given, guidance: float | Array, steps: int, cells: int, keys: Array,
          source: Float[Array, "P N D"] | None = None) -> Array:
    """`flow` of some tasks, as many on each device."""
    parameters, static = eqx.partition(network, eqx.is_array)
    mesh, share = Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), share), out_specs=share, check_vma=False)
    def each(parameters, mine):
        network = eqx.combine(parameters, static)

        def one(given, key, source):
            return flow(network, given, guidance, steps, cells, source, key=key)

        if len(mine[1]) == 1:  # as below, without an axis of one, which is faster on a CPU
            return one(*jax.tree.map(lambda x: x[0], mine))[None]
        return jax.vmap(one)(*mine)

    return each(parameters, (given, keys, source))


def generate(network: eqx.Module, given: Given, guidance: float = 2.0, steps: int = 25, cells: int | None = None,
             at_once: int | None = None, source: Float[np.ndarray, "P N D"] | None = None, *,
             key: PRNGKeyArray) -> Float[np.ndarray, "P N D"]:
    """Predicted cells of P tasks, as many per task as its populations have unless `cells` says otherwise; or what
    becomes of the control cells `source` (`flow`).

    A task's cells depend on its own content and its place in the list only, not on the other tasks or the devices.
    Each device solves `at_once` tasks at a time; by default AT_ONCE on a GPU, and one on a CPU's core.
    """
    if steps < 1:
        raise BadInput(f"--steps {steps}: expected at least 1")
    if at_once is None:
        at_once = 1 if jax.default_backend() == "cpu" else AT_ONCE
    count, devices = len(given.query), jax.device_count()
    while at_once > 1 and at_once * devices >= 2 * count:  # there are not so many: half would be for nothing
        at_once //= 2
    together = at_once * devices
    keys = jax.vmap(lambda i: jr.fold_in(key, i))(np.arange(count))
    omega = float(guidance)
    if omega != 1:
        omega = jnp.asarray(omega, jnp.float32)  # an array, so that another weight compiles nothing
    found = []
    for first in range(0, count, together):
        # Always as many tasks at a time, the last one again if need be, so that another P compiles nothing.
        turn = np.minimum(np.arange(first, first + together), count - 1)
        some = Given(*(field[turn] for field in given))
        start = None if source is None else source[turn]
        found.append(flows(network, some, omega, steps, cells or given.controls.shape[1], keys[turn], start))
    return np.concatenate(found)[:count]


def clip_expression(cells: Float[np.ndarray, "P N D"],
                    log_expression: bool) -> tuple[Float[np.ndarray, "P N D"], float]:
    """Log-expression cannot be negative: set what is to zero, and say which fraction that was. SCM values stay."""
    if not log_expression:
        return cells.astype(np.float32), 0.0
    return np.maximum(cells, 0).astype(np.float32), float((cells < 0).mean())


# ------------------------------------------------------------------------------------- the guidance weight (Table 7)

GUIDANCE = (1.0, 1.5, 2.0, 2.5, 3.0)


def guidance_of(s, file: Path) -> float:
    """The weight with the lowest RMSE (equation 11) on validation tasks of the model's own screen, never on test ones.

    It is kept in `guidance.json` beside the model. On a screen too small for validation conditions, `choose.py` has
    chosen it before the training [D55], and the model's header has it; if not even that, it is 2 (A.4).
    """
    head, network = model.load_model(file)
    if head["guidance"] is not None:
        return head["guidance"]
    record, weights = file.with_name("guidance.json"), scales.checksum(file)
    found = scales.read_json(record)
    if found.get("weights") == weights:  # else the model was trained anew
        return found["guidance"]
    screen = tasks.load_screen(s.out / s.scale / "screens" / head["screen"] / file.parent.name)
    errors = validation_errors(s, head, network, screen)
    best = min(errors, key=errors.get) if errors else 2.0
    about = {"guidance": best, "validation_rmse": errors, "weights": weights, "revision": scales.revision()}
    with scales.atomic(record) as temporary:
        temporary.write_text(json.dumps(about))
    return best


def validation_errors(s, head: dict, network: eqx.Module, screen: Screen) -> dict[float, float]:
    """RMSE of each weight, with the same tasks and noise; empty if there are no validation conditions."""
    names = {field.name for field in dataclasses.fields(train.Settings)} & head.keys()
    batch = train.validation_tasks(train.Settings(**{name: head[name] for name in names}), screen)
    errors = {}
    if batch is not None:
        for weight in GUIDANCE:
            cells = generate(network, batch.given, weight, s.steps, key=scales.key("validation", head["seed"]))
            cells, _ = clip_expression(cells, screen.log_expression)
            distances = [metrics.rmse(true, predicted) for true, predicted in zip(batch.target, cells)]
            errors[weight] = float(np.mean(distances))
    return errors


# ----------------------------------------------------------------------------- test-time augmentation (6, Figure 3)


def gene_subsets(rng: np.random.Generator, genes: int, size: int, subsets: int,
                 always: Int[np.ndarray, "treated"]) -> Int[np.ndarray, "subsets size"]:
    """Random overlapping subsets of `size` out of G genes.

    `always` (the treated genes, without which a treatment has no one-hot) are in each; the others take turns in random
    order, so that all are in equally many, give or take one. Raises BadInput if the subsets are too few for all genes.
    """
    others = np.setdiff1d(np.arange(genes), always)
    room = size - len(always)
    if not 0 <= room <= len(others) <= subsets * room:
        raise BadInput(f"{subsets} subsets of {size} genes cannot cover {genes} genes of which {len(always)} are in "
                       "all of them; use more subsets, or fewer context experiments")
    result, queue = [], []  # a queue of reshuffled rounds
    for _ in range(subsets):
        chosen = []
        while len(chosen) < room:
            waiting = [gene for gene in queue if gene not in chosen]  # one that is in already waits for the next subset
            if waiting:
                queue.remove(waiting[0])
                chosen.append(waiting[0])
            else:
                queue += rng.permutation(others).tolist()
        result.append(rng.permutation([*always, *chosen]))
    return np.array(result, dtype=int)


def augmented(network: eqx.Module, given: Given, size: int, subsets: int, rng: np.random.Generator,
              guidance: float = 2.0, steps: int = 25, *, key: PRNGKeyArray) -> Float[np.ndarray, "M G"]:
    """Cells of one task [no batch axis] with more genes G than the model's D = `size`: predict each subset, pool per
    gene.

    A gene's cells from all subsets that contain it are pooled (6); each gene then keeps a random M of its own, M being
    what the rarest gene has, so that the result is an array. Its rows are not joint cells: use it for per-gene
    statistics.
    """
    treatments = np.vstack([given.query[None], given.context_treatments])
    treated = np.flatnonzero(treatments.any(axis=0))
    chosen = gene_subsets(rng, len(given.query), size, subsets, treated)
    batch = Given(*(np.stack([field[..., genes] for genes in chosen]) for field in given))
    cells = generate(network, batch, guidance, steps, key=key)  # subsets N D
    pools = []
    for gene in range(len(given.query)):
        subset, column = np.nonzero(chosen == gene)
        pools.append(rng.permutation(cells[subset, :, column].ravel()))
    fewest = min(len(pool) for pool in pools)
    return np.stack([pool[:fewest] for pool in pools], axis=1)


# ------------------------------------------------------------------------------------------------------------ the stage


def most_experiments(screen: Screen, most: int = SLOTS, split: int = tasks.TEST) -> int:
    """Largest K, up to `most`, that every task can have whose query is of `split`."""
    asked = (screen.split[:, 1:] == split).any(axis=1)
    known = np.isin(screen.split[asked, 1:], tasks.KNOWN).sum(axis=1)
    return int(min([most, *(known - (split in tasks.KNOWN))]))  # a query is no experiment of its own


def uninformed(given: Given, how: str) -> Given:
    """The same tasks with a context that says nothing of the treatments, although it looks like one: what is predicted
    no worse from it was not learnt in context.

    controls: control cells take the place of the cells of every experiment.
    exchanged: the experiments exchange their treatments in turn. (In linear SCMs a treated variable is constant in its
    own cells, which still say what was done.)
    """
    if how == "controls":
        return given._replace(context=np.repeat(given.controls[:, None], given.context.shape[1], axis=1))
    return given._replace(context_treatments=np.roll(given.context_treatments, 1, axis=1))


class Job(NamedTuple):
    """One file of predictions that is to be written."""
    row: str        # of the tables
    context: str    # "", or how it is made uninformed
    run: str        # of train.py
    file: Path      # the model
    screen: Screen
    split: int
    draw: int


def jobs(s: Settings) -> list[Job]:
    """What is to be predicted. Raises BadInput before any work if a model is missing or does not fit the data."""
    if not s.model:
        raise BadInput("--model: name a run of train.py, or several, as RUN or ROW=RUN")
    found = []
    for word in s.model:
        row, _, run = word.rpartition("=")
        row = row or run
        scales.check_name(row)
        scales.check_name(run)
        for folder in tasks.splits(s):
            split, screen = tasks.split_number(folder), tasks.load_screen(folder)
            file = model.model_file(s, run, s.screen, split)
            head, network = model.load_model(file)
            genes = head["genes"]
            if s.training and head["screen"] == s.screen:
                raise BadInput(f"--training: {file} was trained on these conditions; name a model of other data")
            if s.counterfactual and not head.get("no_knock_out"):
                raise BadInput(f"{file}: was trained without --no-knock-out, so it does not know what no knock-out is; "
                               "train it with --no-knock-out 0.1, or leave out --counterfactual")
            if (s.context or 0) > model.slots_of(network):
                raise BadInput(f"--context {s.context}: the model has {SLOTS} context slots")
            most = most_experiments(screen, model.slots_of(network), asked_of(s))
            if (s.context or 0) > most:
                raise BadInput(f"--context {s.context}: {folder} has only {most} experiments beside a query")
            if genes != len(screen.genes) and not model.takes_any_genes(network):
                raise BadInput(f"{file}: a model of {genes} genes, but the data have {len(screen.genes)}")
            for draw in range(s.draws):
                found.append(Job(row, "", run, file, screen, split, draw))
            experiments = min(head["context"] if s.context is None else s.context, most)
            for how, fewest in UNINFORMED.items():
                if s.context_gain and experiments >= fewest:
                    found.append(Job(f"{row}~{how}", how, run, file, screen, split, 0))
    return found


def asked_of(s: Settings) -> int:
    """The part of a screen whose conditions are predicted."""
    return tasks.TRAIN if s.training else tasks.TEST


def fitted_to(s: Settings, head: dict, screen: Screen) -> int:
    """Conditions of this split that the model was trained on; none of a screen that it has never seen."""
    if head["screen"] != s.screen:
        return 0
    return int((screen.split[:, 1:] == tasks.TRAIN).sum())


def predict(s: Settings, job: Job, settings: dict) -> metrics.Predictions:
    """The cells of all test conditions of one split and draw, with all that tells where they come from."""
    started, screen = time.perf_counter(), job.screen
    head, network = model.load_model(job.file)
    guidance = s.guidance
    if guidance is None:
        guidance = guidance_of(s, job.file)
    # As many context experiments as in training, if there are; a model trained without is used without (Table 4).
    wanted = head["context"] if s.context is None else s.context
    context = min(wanted, most_experiments(screen, model.slots_of(network), asked_of(s)))
    evaluation = tasks.evaluation_tasks(screen, s.eval_cells, context, s.seed, job.draw, asked_of(s))
    given = uninformed(evaluation.given, job.context) if job.context else evaluation.given
    key = scales.key("sampling", s.seed, job.split, job.draw)
    source = evaluation.identity if s.counterfactual else None  # the cells that simple rules are applied to
    cells = generate(network, given, guidance, s.steps, source=source, key=key)
    cells, clipped = clip_expression(cells, screen.log_expression)
    spent = train.seconds(job.file.with_name("log.csv")) + head.get("choice_seconds", 0)
    training = head | {"seconds": spent}
    title, paper = screen.made["title"], screen.made.get("paper")
    if s.training:
        title, paper = f"{title}, training conditions", None  # nothing that the paper has a number for
    meta = {"screen": s.screen, "title": title, "paper": paper, "row": job.row,
            "split": job.split, "draw": job.draw, "seed": s.seed, "scale": s.scale, "revision": scales.revision(),
            "settings": settings, "fingerprint": screen.made["fingerprint"], "genes": screen.genes, "model": job.run,
            "guidance": guidance, "clipped_fraction": clipped, "training": training, "conditions_on": CONDITIONS_ON,
            "trained_seed": head["seed"] % train.SPLIT_SEEDS, "fitted_to": fitted_to(s, head, screen),
            "seconds": round(time.perf_counter() - started, 1)}
    controls, names = evaluation.given.controls, np.array(screen.systems)[evaluation.system]
    twins = None if source is None else prior.twins(screen, evaluation, source)
    return metrics.Predictions(controls, controls if source is None else source, evaluation.target, cells,
                               evaluation.given.query, evaluation.true_means(screen), names, screen.log_expression,
                               meta, twins)


def main() -> None:
    """Predict every test condition with the named runs of train.py, skipping the files that are finished."""
    s = scales.parse(Settings, lambda s: (tasks.section_of(s), "evaluate"))
    train.use_all_cores(2)  # tasks are solved two at a time
    todo = jobs(s)
    apart = "out", "model", "draws", "context_gain"  # say which files are written, and not what is in them
    kept = {name: value for name, value in dataclasses.asdict(s).items() if name not in apart}
    place = dataclasses.replace(s, screen=f"{s.screen}-training") if s.training else s
    print(f"sample.py {json.dumps(kept)}, revision {scales.revision()}, {jax.device_count()} x "
          f"{jax.devices()[0].device_kind}: {len(todo)} files", flush=True)
    for job in tqdm(todo, unit="file"):
        path = tasks.samples_file(place, job.row, job.split, job.draw)
        settings = kept | {"weights": scales.checksum(job.file), "data": job.screen.made["fingerprint"]}
        with scales.alone(path.with_name(job.row)):
            if not metrics.finished(path, settings):
                metrics.save_predictions(path, predict(s, job, settings))
    print(f"predictions in {path.parent}", flush=True)


if __name__ == "__main__":
    scales.run(main)
