"""What `run_all.sh paper` costs: work, memory, disk and hours of every stage, told without a GPU.

Paper: A.2, A.3 (8 h for linear SCMs and 36 h for GRNs on one 80 GB GPU). Reads the settings of all scripts at paper
scale (counts.py), and `screens/`, `memory.csv`, `times.csv` of the dry run, `run_all.sh paper --dry`, as far as they
are there. Writes `costs.md` and `costs.json` (with --before, `costs-before`) below out/<scale>.

    python costs.py [--before]    two minutes on two CPU cores; before products and attention were made cheaper

How often anything runs follows from the settings. What it costs once comes from XLA:

    FLOPs    of the program of one task as it is handed to the compiler, with loops written out, because XLA counts the
             body of a loop once. Blocks are equal, so networks of one and of two tell all (tests/test_costs.py).
    memory   of the compiled update of a micro-batch, or of AT_ONCE tasks that are sampled; attention is `looped`, which
             like flash attention stores no scores, or `plain` for --before
    bytes    read and written by the program of one task as XLA compiles it for a CPU. A GPU fuses more of it.

Hours are a range. Least: the FLOPs at the share of the peak below, as if nothing else took time, or the scores of plain
attention at the share of the memory's; most: all bytes that the program for a CPU moves.
"""

import contextlib
import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh

import attention
import baselines
import counts
import model
import sample
import scales
import tasks
import train
from baselines import fitting
from counts import Shape, Stage
from model import Architecture

# What the vendor says of its 80 GB SXM cards: dense FLOP/s in bfloat16, and in TF32, which a GPU takes for float32
# products if not told otherwise; bytes/s of memory.
GPUS = {"A100": {"bfloat16": 312e12, "float32": 156e12, "memory": 2.0e12},
        "H100": {"bfloat16": 989e12, "float32": 494e12, "memory": 3.35e12}}
PRODUCTS, MEMORY = 0.35, 0.8  # share of these that is reached: assumed
ALONE = 0.5    # of PRODUCTS, if tasks are sampled one by one: assumed
LAUNCH = 5e-6  # seconds from one small kernel to the next: assumed
KERNELS = 3    # for each matrix product of a baseline, itself and what is around it: assumed
CORES = 16     # of the machine with the GPU
AIMS = {"all": 48, "train: GRNs": 12, "train: GRNs, unpaired": 12}  # hours of one GPU


@dataclass(frozen=True)
class Settings:
    """Tell what the paper scale costs."""
    scale: str = "dry"  # of the run that memory and seconds are taken from
    before: bool = False  # with float32 products, plain attention, tasks one by one, and more of them
    out: Path = Path("out")  # everything is below out/<scale>


# ------------------------------------------------------------------------------------------- what it costs once, by XLA


@contextlib.contextmanager
def written_out():
    """Every jax.lax.scan becomes a row of copies of its body."""
    scan = jax.lax.scan
    jax.lax.scan = functools.partial(scan, unroll=True)
    try:
        yield
    finally:
        jax.lax.scan = scan


def array(*shape: int) -> jax.ShapeDtypeStruct:
    """Shape of an array of float32."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


KEY = jax.eval_shape(lambda: jax.random.key(0))


def outline(a: Architecture, genes: int) -> tuple:
    """Shapes of the parameters of a network, and the rest of it."""
    return eqx.partition(model.outline(a, genes), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))


def task(shape: Shape, *batch: int) -> tasks.Task:
    """Shapes of tasks."""
    d, n, m, k = shape
    given = tasks.Given(array(*batch, m, d), array(*batch, k, m, d), array(*batch, k, d), array(*batch, d))
    return tasks.Task(given, array(*batch, n, d))


def lowered(a: Architecture, shape: Shape, training: bool):
    """The program of one task: its loss and gradient, or its loss."""
    parameters, static = outline(a, shape.genes)

    def loss(parameters, one, key):
        return train.task_loss(eqx.combine(parameters, static), one, 0.2, key=key)

    run = jax.value_and_grad(loss) if training else loss
    with written_out():
        return jax.jit(run).lower(parameters, task(shape), KEY)


def of_all_blocks(a: Architecture, cost) -> float:
    """What a network costs, from those with one and with two of its blocks."""
    one, two = (cost(dataclasses.replace(a, depth=depth)) for depth in (1, 2))
    return one + (two - one) * (a.depth - 1)


@functools.cache
def flops(a: Architecture, shape: Shape, training: bool) -> float:
    """Of one task, once."""
    a = dataclasses.replace(a, attention="plain", precision="float32")
    return of_all_blocks(a, lambda a: lowered(a, shape, training).cost_analysis()["flops"])


@functools.cache
def moved(a: Architecture, shape: Shape, training: bool, scores: bool) -> float:
    """Bytes that one task reads and writes, once; `scores`: with those of plain attention."""
    # Flash attention reads queries, keys and values once, and writes as much as one of them: as this sum does.
    attention.ATTENTION["sum"] = lambda q, k, v, precision: q + k + v
    a = dataclasses.replace(a, attention="plain" if scores else "sum", precision="float32")
    found = of_all_blocks(a, lambda a: lowered(a, shape, training).compile().cost_analysis()["bytes accessed"])
    del attention.ATTENTION["sum"]
    return found


def device_bytes(compiled) -> float:
    """Arguments, results and all in between; a result that takes the place of an argument counts once."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes


def training_memory(s: train.Settings, shape: Shape, kind: str) -> float:
    """Bytes of a device during an update, with attention of this kind."""
    s = dataclasses.replace(s, attention=kind, precision="float32")
    parameters, static = outline(s, shape.genes)
    optimiser = jax.eval_shape(train.make_optimiser(s).init, parameters)
    state = train.State(parameters, optimiser, parameters, jax.ShapeDtypeStruct((), int))
    update = train.make_update(s, static, Mesh(np.array(jax.devices()[:1]), ("data",)))
    return device_bytes(update.lower(state, task(shape, s.accumulate, s.micro_batch), KEY).compile())


def sampling_memory(a: Architecture, shape: Shape, kind: str, at_once: int) -> float:
    """Bytes of a device while so many tasks are evaluated, each with and without condition."""
    parameters, static = outline(dataclasses.replace(a, attention=kind, precision="float32", remat=False), shape.genes)

    def velocity(parameters, batch, keys):
        network = eqx.combine(parameters, static)

        def one(task, key):
            condition = model.prepare(network, task.given, key=key)
            return network(task.target, jnp.ones(()), condition, jnp.array(False))

        return jax.vmap(one)(batch, keys)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2 * at_once))
    return device_bytes(jax.jit(velocity).lower(parameters, task(shape, 2 * at_once), keys).compile())


# ----------------------------------------------------------------------------------- baselines, whose kernels are small


def products(jaxpr, times: int = 1) -> tuple[int, int]:
    """Number of matrix products of a program, and their FLOPs. A scan counts as often as it is long; a while loop,
    whose length nobody knows, once."""
    number = work = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            number += times
            work += times * 2 * inner * math.prod(equation.outvars[0].aval.shape)
        length = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inside in jaxprs_in_params(equation.params):
            more = products(inside, times * length)
            number, work = number + more[0], work + more[1]
    return number, work


def baseline_update(row: str, screen: tasks.Screen) -> tuple[int, int, int]:
    """Updates of a baseline at paper scale, and the matrix products of each, with their FLOPs."""
    kind, options = baselines.trained_class(row), baselines.options_of(row, "paper", screen.made["section"])
    data, key = fitting.training_cells(screen, kind.controls_too), jax.random.key(0)
    level = jnp.nanmean(data.cells, axis=0)
    networks = kind.build(options, level, len(screen.systems), screen.log_expression, key=key)
    optimisers, step = kind.make_step(options)
    states = []
    for optimiser, network in zip(optimisers, networks):
        states.append(optimiser.init(eqx.filter(network, eqx.is_inexact_array)))
    arrays, static = eqx.partition((networks, tuple(states)), eqx.is_array)

    def run(arrays, data, key):
        return eqx.filter(step(eqx.combine(arrays, static), data, jnp.zeros((), int), key), eqx.is_array)

    return options.updates, *products(jax.make_jaxpr(run)(arrays, data, key).jaxpr)


def baseline_lines(s: Settings) -> list[dict]:
    """Fits of every trained baseline to the screens of the dry run, which have the paper's shapes."""
    lines = []
    for name, title, splits, seeds in (("linear", "linear SCMs", 1, counts.seeds("linear")),
                                       ("toy", "screens", counts.splits(), counts.seeds("grn"))):
        folder = s.out / s.scale / "screens" / name / "split-0"
        if not folder.is_dir():
            print(f"{folder} is not there, so no baselines: bash run_all.sh paper --dry makes it")
            continue
        screen = tasks.load_screen(folder)
        for row in baselines.default_rows(screen):
            if row in baselines.TRAINED:
                updates, number, work = baseline_update(row, screen)
                fits = splits * seeds
                line = {"stage": f"baselines: {title}", "flops": work * updates * fits}
                for gpu, peak in GPUS.items():
                    seconds = max(work / (peak["float32"] * PRODUCTS), number * KERNELS * LAUNCH)
                    line[gpu] = [seconds * updates * fits / 3600] * 2
                lines.append(line)
    return lines


# ----------------------------------------------------------------------------------------------------------- the table


def cost(stage: Stage, a: Architecture, usual: Shape, before: bool) -> dict:
    """FLOPs and hours of a stage. Bytes are those of the `usual` shape for each of its tokens, and, of scores, for each
    pair of them: compiling takes long."""
    work = scores = other = 0.0
    tokens = stage.shape.tokens(a.registers) / usual.tokens(a.registers)
    for times, training in ((stage.trained, True), (stage.evaluations, False)):
        if times:
            work += times * flops(a, stage.shape, training)
            least = moved(a, usual, training, False)
            other += times * tokens * least
            if before:
                scores += times * tokens**2 * (moved(a, usual, training, True) - least)
    share = PRODUCTS * (ALONE if before and not stage.trained else 1)
    line = {"stage": stage.title, "flops": work}
    for gpu, peak in GPUS.items():
        products = work / (peak["float32" if before else "bfloat16"] * share)
        memory = peak["memory"] * MEMORY
        line[gpu] = [max(products, scores / memory) / 3600, max(products, (scores + other) / memory) / 3600]
    return line


def merged(lines: list[dict]) -> list[dict]:
    """One line for each title, in order."""
    found = {}
    for line in lines:
        into = found.setdefault(line["stage"], {"stage": line["stage"], "flops": 0.0, "A100": [0, 0], "H100": [0, 0]})
        into["flops"] += line["flops"]
        for gpu in GPUS:
            into[gpu] = [x + y for x, y in zip(into[gpu], line[gpu])]
    return list(found.values())


def memories(a: Architecture, before: bool) -> dict[str, float]:
    """Title of a stage -> peak bytes of the device: of the trainings, and of the largest tasks that are sampled."""
    (kind, at_once), found = ("plain", 1) if before else ("looped", sample.AT_ONCE), {}
    for title, section in (("train: linear SCMs", "linear"), ("train: GRNs", "grn")):
        s = counts.paper(train.Settings, "train", section)
        shape = counts.shape_of(s, counts.priors()[section].genes, s.cells)
        found[title] = training_memory(s, shape, kind)
    evaluated = [stage for stage in counts.gpu_stages(before) if not stage.trained]
    largest = max(evaluated, key=lambda stage: stage.shape.tokens(a.registers))
    found[largest.title] = sampling_memory(a, largest.shape, kind, at_once)
    return found


def range_of(hours: list[float]) -> str:
    """5.0-9.0, or one number if they are much the same."""
    least, most = (f"{value:.1f}" for value in hours)
    return least if least == most else f"{least}-{most}"


def total(lines: list[dict], gpu: str) -> list[float]:
    """Least and most hours of all."""
    return [sum(line[gpu][i] for line in lines) for i in (0, 1)]


def against_aims(lines: list[dict]) -> list[str]:
    """A sentence for each aim and GPU."""
    sentences = []
    for title, aim in AIMS.items():
        for gpu in GPUS:
            found = [line for line in lines if title in ("all", line["stage"])]
            least, most = total(found, gpu)
            verdict = "kept if kernels are fused well" if least <= aim else "missed"
            if most <= aim:
                verdict = "kept"
            counted = range_of([least, most])
            sentences.append(f"{title}: at most {aim} h wanted on an {gpu}, {counted} h counted: {verdict}.")
    return sentences


def three_trainings(lines: list[dict]) -> str:
    """What comes to it if every row has the three trainings that claims on real cells are decided with."""
    more, words = 3 / counts.seeds("grn") - 1, []
    repeated = [line for line in lines if any(word in line["stage"] for word in ("GRNs", "screens", "figure 2"))]
    for gpu in GPUS:
        hours = [whole + more * part for whole, part in zip(total(lines, gpu), total(repeated, gpu))]
        words.append(f"{range_of(hours)} h on an {gpu}")
    return f"with --seeds 3, without which claims 3 to 8 stay undecided: {', '.join(words)}."


NOTE = f"""Hours: least, FLOPs at {PRODUCTS:.0%} of the vendor's peak (sampling one task at a time: {ALONE:.0%} of
that), or the scores of plain attention at {MEMORY:.0%} of the memory's; most, all bytes that the program moves as XLA
compiles it for a CPU. Baselines: {KERNELS} kernels of {LAUNCH * 1e6:.0f} us for each matrix product, or the FLOPs;
without the time to predict, and without a search of Table 7. Metrics inside figures are not counted. CPU stages:
seconds of the dry run, start-up and all, times what there is more of.

Host memory is of two systems and of the toy: no bound for 1,000 graphs or for melanoma's 218,000 cells.

Weakest: the two shares and the bytes were not measured on a GPU, which fuses otherwise; most hours hang on them.
The recommended row is not counted: its matrices of genes are small beside attention over 1,800 cells.
Drawing 256 tasks on the host is not counted, nor is reading them from disk.
"""


def page(d: dict) -> str:
    """The table as Markdown."""
    how = ("before: float32 products (TF32), plain attention, sampling one task at a time" if d["before"] else
           f"products in bfloat16, flash attention, sampling {sample.AT_ONCE} tasks at a time")
    text = [f"# What the paper scale costs ({how})\n", f"Revision {d['revision']}. Nothing here was timed on a GPU.\n",
            "| Stage on the GPU | PFLOP | device memory [GB] | A100 [h] | H100 [h] |", "|---|---:|---:|---:|---:|"]
    whole = {"stage": "**all**", "flops": sum(line["flops"] for line in d["gpu"])}
    for line in d["gpu"] + [whole | {gpu: total(d["gpu"], gpu) for gpu in GPUS}]:
        memory = f"{d['memory'][line['stage']] / 1e9:.1f}" if line["stage"] in d["memory"] else ""
        text.append(f"| {line['stage']} | {line['flops'] / 1e15:,.0f} | {memory} | {range_of(line['A100'])} | "
                    f"{range_of(line['H100'])} |")
    text += ["", *(f"- {sentence}" for sentence in (*d["aims"], three_trainings(d["gpu"]))), "",
             f"| Stage of the dry run | its host memory [GB] | on {CORES} cores at paper scale [h] |",
             "|---|---:|---:|"]
    for line in d["cpu"]:
        hours = "" if line["hours"] is None else f"{line['hours']:.2f}"
        text.append(f"| {line['stage']} | {line['host'] / 1e9:.1f} | {hours} |")
    text += ["", "| On disk | GB |", "|---|---:|"]
    text += [f"| {name} | {value / 1e9:.1f} |" for name, value in d["disk"].items()]
    return "\n".join(text) + "\n\n" + NOTE


def main() -> None:
    """Print and write the table."""
    jax.config.update("jax_platforms", "cpu")  # a GPU's compiler would give other programs
    s = scales.parse(Settings, lambda _: ())
    a, grn = counts.paper(Architecture, "train"), counts.paper(train.Settings, "train", "grn")
    usual = counts.shape_of(grn, counts.priors()["grn"].genes, grn.cells)
    lines = merged([cost(stage, a, usual, s.before) for stage in counts.gpu_stages(s.before)] + baseline_lines(s))
    document = {"before": s.before, "revision": scales.revision(), "gpu": lines, "memory": memories(a, s.before),
                "aims": against_aims(lines), "cpu": counts.cpu_lines(s.out / s.scale, CORES), "disk": counts.disk()}
    name = "costs-before" if s.before else "costs"
    for suffix, text in ((".json", json.dumps(document, indent=1)), (".md", page(document))):
        with scales.atomic(s.out / s.scale / f"{name}{suffix}") as temporary:
            temporary.write_text(text)
    print(page(document))


if __name__ == "__main__":
    scales.run(main)
