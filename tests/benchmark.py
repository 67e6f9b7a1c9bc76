"""How fast things are on this machine, each as a ratio within one run: printed, never asserted.

    python tests/benchmark.py            eight minutes on two quiet CPU cores
    python tests/benchmark.py training   one part: training, sampling, simulators, growth
    python tests/benchmark.py paper      only by name, as paper-sampling: the shapes of the paper's scale, for a GPU

What is compared with what is said in each line. Training is at 20 genes, 100 cells, K = 4, batches of 8, but for
`paper`.
"""

import dataclasses
import functools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import costs
import model
import predict
import prior
import sample
import scales
import simulator
import tasks
import train

PAPERS = {"width": 128, "depth": 4, "heads": 4, "remat": False}
OURS = {"network": "exchangeable.Exchangeable", "target_cells": 16, "mean_loss": 3.0}


def seconds(call: Callable, least: float = 3.0) -> float:
    """Of one call, compiled and run before: the median of as many as `least` seconds have room for, at least three."""
    jax.block_until_ready(call())
    found: list[float] = []
    while len(found) < 3 or sum(found) < least:
        start = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - start)
    return float(np.median(found))


def peak(size: int = 2048, kind: str = "float32") -> float:
    """Operations a second of a product of matrices."""
    x = jr.normal(jr.key(0), (size, size), kind)
    product = jax.jit(lambda x: x @ x)
    return 2 * size**3 / seconds(lambda: product(x))


def random_task(genes: int, cells: int, experiments: int, batch: int) -> tasks.Task:
    """Tasks of log-counts that have nothing to do with each other."""
    rng = np.random.default_rng(0)

    def counts(*shape):
        return np.log1p(rng.poisson(2.0, shape)).astype(np.float32)

    treatments = np.eye(genes, dtype=np.float32)[: experiments + 1]
    treatments = np.broadcast_to(treatments, (batch, *treatments.shape))
    given = tasks.Given(counts(batch, cells, genes), counts(batch, experiments, cells, genes), treatments[:, 1:],
                        treatments[:, 0])
    return tasks.Task(given, counts(batch, cells, genes))


def update(genes: int = 20, cells: int = 100, experiments: int = 4, **settings) -> tuple[float, float]:
    """Tasks a second of an update of 8 tasks, and operations in products of matrices a second."""
    return update_of(train.Settings(cells=cells, context=experiments, micro_batch=8, accumulate=1, **settings), genes)


def begun(s: train.Settings, genes: int) -> tuple[Callable, train.State]:
    """The update, and the state that it starts from."""
    network = model.build(s, genes, key=jr.key(0))
    parameters, static = eqx.partition(network, eqx.is_inexact_array)
    state = train.State(parameters, train.make_optimiser(s).init(parameters),
                        jax.tree.map(jnp.zeros_like, parameters), jnp.zeros((), int))
    return train.make_update(s, static, train.shardings()[0]), state


def update_of(s: train.Settings, genes: int) -> tuple[float, float]:
    """The same of an update with these settings."""
    _, everywhere, shared = train.shardings()
    batch = random_task(genes, s.cells, s.context, s.micro_batch)
    batch = jax.tree.map(lambda x: np.broadcast_to(x, (s.accumulate, *x.shape)), batch)
    batch = train.placed(batch, shared)
    # Counted with plain attention: what multiplies inside cuDNN's kernel nobody sees.
    plain, state = begun(dataclasses.replace(s, attention="plain"), genes)
    program = jax.make_jaxpr(plain)(state, batch, jr.key(0))
    operations = costs.products(program.jaxpr)[1] * jax.device_count()
    step, state = begun(s, genes)
    holder = [train.placed(state, everywhere)]

    def call():
        holder[0], loss, _ = step(holder[0], batch, jr.key(0))
        return loss

    spent = seconds(call)
    return s.micro_batch * s.accumulate / spent, operations / spent


def training() -> None:
    """Both networks: tasks a second, and share of the peak."""
    best = peak()
    print(f"product of matrices: {best / 1e9:.0f} GFLOP/s")
    rows = {"the paper's network": update(**PAPERS), "exchangeable, as wide, all cells": update(**PAPERS | OURS | {
        "target_cells": 0}), "exchangeable, as wide, 16 cells to learn from": update(**PAPERS | OURS),
        "exchangeable, width 48, 3 blocks, 16 cells": update(**OURS, width=48, depth=3, heads=4)}
    first = rows["the paper's network"][0]
    for name, (speed, operations) in rows.items():
        print(f"training, {name}: {speed:.1f} tasks/s, {operations / best:.0%} of that, {speed / first:.1f} times")


def accurate(network: eqx.Module, given: tasks.Given, guidance: float) -> int:
    """Fewest of some numbers of steps from which no value is further than 1e-3 from 100 steps."""
    exact = sample.generate(network, given, guidance, 100, key=jr.key(1))
    for steps in (2, 3, 4, 5, 7, 10, 15, 25, 50):
        if np.abs(sample.generate(network, given, guidance, steps, key=jr.key(1)) - exact).max() < 1e-3:
            return steps
    return 100


def sampling() -> None:
    """The checkpoint in the box, against the paper's network, guided, in 100 steps, which are 601 evaluations of twice
    as many cells, and take as long whether it is trained or not."""
    given = random_task(20, 100, 4, 1).given
    papers = model.build(train.Settings(**PAPERS), 20, key=jr.key(0))
    released = seconds(lambda: sample.generate(papers, given, 2.0, 100, key=jr.key(1)))
    print(f"sampling, 100 cells of 20 genes, the paper's network, 100 steps: {released:.2f} s a task")
    network = predict.load_checkpoint(predict.BOX).network
    for guidance in (2.0, 1.0):
        steps = accurate(network, given, guidance)
        spent = seconds(lambda: sample.generate(network, given, guidance, steps, key=jr.key(1)))
        print(f"sampling, checkpoint, guidance {guidance:g}, {steps} steps, to 1e-3: {spent:.3f} s, "
              f"{released / spent:.0f} times")


def simulators() -> None:
    """Conditions a second, from the graph to the counts: sergio-rs in one process, which takes one core, and ours in
    one, which takes what JAX takes."""
    for genes, cells in ((20, 100), (50, 200)):
        s, number = prior.Settings("grn", genes=genes), iter(range(10**6))
        theirs = (1 + genes) / seconds(lambda: prior.simulate_grn(s, next(number), cells))
        print(f"sergio-rs, {genes} genes x {cells} cells (8 of 200 independent): {theirs:.0f} conditions/s")
        for what in ("causal", "sergio"):
            own, number = prior.Settings(what, genes=genes), iter(range(10**6))
            spent = seconds(lambda: prior.simulate_own(own, next(number), cells))
            speed = (1 + genes) / spent
            print(f"{what}, likewise{', all independent' if what == 'causal' else ''}: {speed:.0f} conditions/s, "
                  f"{speed / theirs:.1f} times")
        own, number = prior.Settings("panel", genes=genes), iter(range(10**6))
        spent = seconds(lambda: prior.simulate_own(own, next(number), cells), 10)
        print(f"panel of {genes} genes, prepared and ranked: {1 / spent:.1f} screens/s")


def growth() -> None:
    """Seconds of an update of the exchangeable network, of a task sampled with it, and of a GRN, as sizes grow."""
    network = predict.load_checkpoint(predict.BOX).network

    def an_update(**sizes):
        return 8 / update(**OURS, width=48, depth=3, heads=4, **sizes)[0]

    def a_sample(**sizes):
        given = random_task(**sizes, batch=1).given
        return seconds(lambda: sample.generate(network, given, 1.0, 10, key=jr.key(1)))

    def a_network(genes, cells, experiments):
        own, number = prior.Settings("causal", genes=genes), iter(range(10**6))
        return seconds(lambda: prior.simulate_own(own, next(number), cells))

    least = {"genes": 20, "cells": 100, "experiments": 4}
    for what in (an_update, a_sample, a_network):
        base = what(**least)
        for name, sizes in {"genes": (50, 100), "cells": (200, 400), "experiments": (1, 16)}.items():
            for size in sizes:
                if what != a_network or name != "experiments":
                    print(f"{what.__name__}, {size} {name} instead of {least[name]}: "
                          f"{what(**least | {name: size}) / base:.2f} times as long")


def paper() -> None:
    """Whole trainings at paper scale, from some updates."""
    best = peak(8192, "bfloat16")
    print(f"product of matrices in bfloat16: {best / 1e12:.0f} TFLOP/s")
    for title, section, genes, network in (
            ("GRNs", "grn", 50, "model.MapPFN"), ("linear SCMs", "linear", 20, "model.MapPFN"),
            ("GRNs, exchangeable", "exchangeable", 50, "exchangeable.Exchangeable")):
        s = scales.parse(train.Settings, lambda _: ("train", section), ["--scale", "paper", "--network", network])
        speed, operations = update_of(s, genes)
        hours = s.updates * s.micro_batch * s.accumulate / speed / 3600
        memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9
        print(f"training, {title}: {speed:.0f} tasks/s, {operations / best:.0%} of that, {hours:.1f} h for "
              f"{s.updates} updates, at most {memory:.1f} GB so far")


def paper_sampling() -> None:
    """The paper's network at its size, untrained: seconds of a task, and how far the device's precision is off."""
    given = random_task(50, 200, 8, sample.AT_ONCE).given
    key, network = jr.key(1), model.build(train.Settings(), 50, key=jr.key(0))
    spent = seconds(lambda: sample.generate(network, given, 2.0, 25, key=key))
    print(f"sampling, 200 cells of 50 genes, K = 8, 25 steps: {spent / sample.AT_ONCE:.2f} s a task, "
          f"{sample.AT_ONCE} at a time", flush=True)
    exact = model.build(train.Settings(precision="float32", attention="plain"), 50, key=jr.key(0))
    with jax.default_matmul_precision("highest"):
        cells = sample.generate(exact, given, 2.0, 25, key=key)
    error = np.sqrt(np.mean((sample.generate(network, given, 2.0, 25, key=key) - cells) ** 2))
    print(f"that is {error:.4f} (root mean square) from float32")


PARTS = {"training": training, "sampling": sampling, "simulators": simulators, "growth": growth}
ALONE = {"paper": paper, "paper-sampling": paper_sampling}

if __name__ == "__main__":
    if len(sys.argv) != 2:  # each by itself, with the cores divided as its stage does
        for part in sys.argv[1:] or PARTS:
            subprocess.run([sys.executable, "-u", __file__, part], check=True)
        sys.exit()
    if sys.argv[1] != "simulators":
        train.use_all_cores(8)
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, revision {scales.revision()}")
    (PARTS | ALONE)[sys.argv[1]]()
