"""Stage 1 of 8, the priors: draw random causal systems, knock out each of their nodes in turn, and keep the cells.

Paper: 4 "Structural Causal Models", "Synthetic Biological Prior"; 5.1; B.1 (linear SCMs); B.2, Tables 5, 6 (GRNs); B.4.
Reads nothing. Writes a screen (tasks.py), `screens/<linear, grn, causal, ...>/split-0/` below out/<scale>, of
training systems, then systems held out for validation, then systems held out for the tables.

    python prior.py linear --scale smoke|laptop|paper    linear SCMs: 1 s, 2 s, 10 s (0.9 GB)
    python prior.py grn --scale smoke|laptop             gene regulatory networks: 2 s, 2 minutes on 2 cores
    python prior.py grn --scale laptop --unpaired        the ablation of Table 4 and Figure 2
    python prior.py causal --scale laptop                GRNs whose knock-outs reach what is downstream (simulator.py)
    python prior.py panel --scale laptop                 the same, made as screens are made (panel.py): 3 minutes
    python prior.py sergio --scale laptop                sergio-rs's own equations in our simulator, to compare
    python prior.py grn --scale paper --workers 64       6,000 GRNs of 50 genes: about 4 core-hours, 13 GB
    python prior.py grn --scale paper --num-shards 100 --shard $SLURM_ARRAY_TASK_ID    a share of them in each job of
                                                         a cluster array; the line above then finishes the screen

A system depends on the seed and its own number only. Two screens of one prior and seed therefore share systems: what
was trained on one is not to be tested on the other. Until the screen is written every GRN has a file in
`screens/.<name>-shards/`, from which a run that was killed goes on. Departures: D10, D19, D51, D57.

    paper       name here        shape   meaning
    W           w                D D     w[k, j]: linear effect of parent j on child k, 0 without an edge
    T           transfer         D D     (I - W)^-1, total effect of j's noise on k, direct and through others
    epsilon     noise            N D     standard normal noise
    c           values           S D     values[s, t]: what do(t) sets node t of system s to
                parents          D D     parents[k, j]: gene j regulates gene k (row: target, as in W)

    S systems (one graph each)   T = D + 1 treatments, control first   N cells   D nodes or genes
"""

import dataclasses
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import sergio_rs
from jaxtyping import Bool, Float, Int, Integer, Num, Shaped
from tqdm import tqdm
from tyro.conf import Positional

import scales
import tasks
from scales import BadInput
from tasks import ABSENT, KNOWN_ONLY, CONTROL, TEST, TRAIN, VALIDATION, Evaluation, Screen


@dataclass(frozen=True)
class Settings:
    """Simulate a prior. Defaults are the paper's for GRNs; `python scales.py` lists what linear and --scale change."""
    what: Positional[Literal["linear", "grn", "sergio", "causal", "panel"]]  # which prior
    scale: str = "laptop"  # column of the table in scales.py
    genes: int = 50  # genes, or variables, D (B.2)
    systems: int = 6000  # random GRNs, or DAGs, to train on (B.2)
    validation: int = 60  # more of them, held out for choices (ours: the paper does not say)
    test: int = 60  # more of them, held out for tables and figures (ours) [D10]
    population: int = 200  # cells of a condition (B.2)
    test_population: int = 200  # cells of a condition of a held-out system
    dropout: tuple[float, float] = (45.0, 82.0)  # GRNs, but panel: range of the dropout percentile (B.2, Table 6) [D51]
    unpaired: bool = False  # GRNs: new noise for each condition, not the "counterfactual paired" prior (6)
    redraw_amplitude: bool = False  # with unpaired: another amplitude of it for each condition, as released [D19]
    seed: int = 0  # of everything; the same seed gives the same files
    # nothing below changes what is drawn
    name: str = ""  # of the screen; default: that of the prior
    out: Path = Path("out")  # everything is below out/<scale>
    workers: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # for GRNs
    num_shards: int = 16  # shares of the GRNs, for cluster arrays
    shard: int = -1  # make this share only, and no screen; -1: all, and the screen


# ------------------------------------------------------------ what priors share: treatments, and who is held out (B.4)


def parts(s: Settings) -> Int[np.ndarray, "S"]:
    """For each system TRAIN, VALIDATION or TEST: what it is drawn for."""
    return np.repeat([TRAIN, VALIDATION, TEST], [s.systems, s.validation, s.test])


def uses(rng: np.random.Generator, count: Int[np.ndarray, "S T"], part: Int[np.ndarray, "S"]) -> Int[np.ndarray, "S T"]:
    """What each condition is used for (tasks.USES), in systems that are drawn for `part`. In a held-out system half of
    the measured treatments are to be predicted; control and the others are known (B.4)."""
    # [D10] paper: one held-out context; released code: one graph, half of whose treatments are trained on; here:
    # several systems, none of whose conditions are, which is a harder question with a less noisy answer.
    split = np.full(count.shape, TRAIN)
    for system in np.flatnonzero(part != TRAIN):
        treatments = 1 + np.flatnonzero(count[system, 1:])
        asked = rng.permutation(treatments)[: len(treatments) // 2]
        split[system] = KNOWN_ONLY
        split[system, asked] = part[system]
    split[count == 0] = ABSENT
    return split


def write(s: Settings, folder: Path, blocks: Iterable[Float[np.ndarray, "n D"]], count: Int[np.ndarray, "S T"],
          values: Float[np.ndarray, "S D"], part: Int[np.ndarray, "S"], log_expression: bool, made: dict,
          **known: Shaped[np.ndarray, "S ..."]) -> None:
    """Write a screen in which treatment 1 + t acts on node t: all that a new prior has to call. `values`: do-values,
    or 1 for a knock-out (B.1); `part`: see `parts`; `made`: title, and section of scales.TABLE; the rest: tasks.py."""
    systems, genes = values.shape
    treatments = np.zeros((systems, 1 + genes, genes), np.float32)
    for t in range(genes):
        treatments[:, 1 + t, t] = values[:, t]  # one-hot times do-value
    split = uses(scales.generator("split", s.seed), count, part)
    names = [f"gene{k}" for k in range(genes)]
    tasks.write_screen(folder, blocks, count, treatments, split, names, [f"system{i}" for i in range(systems)],
                       ["control", *names], log_expression, made | {"settings": content(s)}, **known)
    print(f"{folder}: finished")


# --------------------------------------------------------------------------- linear structural causal models (B.1)


def sample_dag(rng: np.random.Generator, genes: int, edge_probability: float = 0.5) -> Float[np.ndarray, "D D"]:
    """Weights W of an Erdos-Renyi DAG, w[k, j] != 0 only if j is a parent of k (B.1).

    The paper's "random node permutation" is drawn as each node's place in the causal order. W <- D^(-1/2) W scales a
    node's incoming weights but not its noise: values no longer grow along the order, but variances are 1 or above
    (median 1.06, 99% below 2.04), so that the data still need `standardise`."""
    shape = genes, genes
    place = rng.permutation(genes)
    earlier = place[None, :] < place[:, None]  # [k, j]: j comes before k
    edges = earlier & (rng.random(shape) < edge_probability)
    signs = rng.choice([-1.0, 1.0], shape)
    w = edges * signs * rng.uniform(0.5, 2.0, shape)
    transfer = np.linalg.inv(np.eye(genes) - w)
    variance = (transfer**2).sum(axis=1, keepdims=True)  # D = diag(T T^t): of each node, before the scaling
    return w / np.sqrt(variance)


# Exercise 1
def simulate_linear(rng: np.random.Generator, w: Float[np.ndarray, "D D"], values: Float[np.ndarray, "D"],
                    cells: int) -> Float[np.ndarray, "T N D"]:
    """Cells of z = W z + epsilon, first as it is, then under do(z_t = values[t]) for each node t, unscaled (B.1)."""
    genes = len(w)
    conditions = []
    for treatment in range(1 + genes):
        # New noise for each intervention. Paper: the same (N_k in 4 and Algorithm 1); released code: one draw for
        # all interventions of a graph, another for its control. The reference rows of Table 2 come out the same, and
        # context experiments that share the noise of the target's cells would give those cells away.
        noise = rng.standard_normal((cells, genes))
        w_do = w.copy()
        if treatment != CONTROL:
            node = treatment - 1
            w_do[node] = 0  # do(t) removes the edges into the node
            noise[:, node] = values[node]  # and leaves z_t = c of its equation; nothing else changes
        z = np.linalg.solve(np.eye(genes) - w_do, noise.T)
        conditions.append(z.T)
    return np.stack(conditions)


def standardise(cells: Float[np.ndarray, "... N D"]) -> Float[np.ndarray, "... N D"]:
    """Each population's variables at unit variance, within [-10, 10] (B.1; Reisach et al., 2021, on varsortability).
    The mean is kept (it carries the effect); so is the intervened variable, which has no variance."""
    # Paper: "we scale all variables of the generated data to unit variance"; released code: each condition by
    # itself; here: as released, since it gives the reference rows of Table 2. It erases the change of variance that
    # an intervention causes: only means and correlations are left to predict.
    sd = cells.std(axis=-2, keepdims=True)
    sd[sd < 1e-3] = 1  # not `== 0`: rounding may give a constant a tiny one
    return np.clip(cells / sd, -10, 10)


def do(w: Float[np.ndarray, "D D"], node: int) -> tuple[Float[np.ndarray, "D D"], Float[np.ndarray, "D"]]:
    """Transfer T of z = T noise once `node` is set, whose value takes the place of its noise; and what each variable of
    infinitely many such cells is divided by when they are standardised."""
    w_do, noise = w.copy(), np.ones(len(w))
    w_do[node], noise[node] = 0, 0
    transfer = np.linalg.inv(np.eye(len(w)) - w_do)
    spread = np.sqrt(transfer**2 @ noise)
    return transfer, np.where(spread > 0, spread, 1)


def true_means(w: Float[np.ndarray, "D D"], values: Float[np.ndarray, "D"]) -> Float[np.ndarray, "T D"]:
    """Mean of each variable, control first, then under each do(z_t = values[t]), of infinitely many cells that are
    standardised: what the off-target R2 is against (metrics.py)."""
    means = [np.zeros(len(w))]
    for node, value in enumerate(values.tolist()):
        transfer, spread = do(w, node)
        means.append(transfer[:, node] * value / spread)
    return np.array(means, np.float32)


# Exercise 8
def twins(screen: Screen, evaluation: Evaluation,
          cells: Float[np.ndarray, "P N D"]) -> Float[np.ndarray, "P N D"] | None:
    """What each of these control cells would have been under the query of its task: its noise is found (abduction), the
    variable is set (action), and the equations are solved again (prediction). None for a screen without weights."""
    if screen.weights is None:
        return None
    found = []
    for i, (s, t) in enumerate(zip(evaluation.system.tolist(), evaluation.treatment.tolist())):
        w, node = screen.weights[s].astype(float), t - 1
        noise = cells[i] * screen.scale[s] @ (np.eye(len(w)) - w).T
        noise[:, node] = evaluation.given.query[i, node]
        transfer, spread = do(w, node)
        found.append(noise @ transfer.T / spread)
    return np.array(found, np.float32)


def make_linear(s: Settings, folder: Path) -> None:
    """Write the screen of linear SCMs, one graph at a time."""
    part = parts(s)
    cells = np.where(part == TRAIN, s.population, s.test_population)
    rng = scales.generator("prior", s.seed)
    values = rng.uniform(0.5, 1.5, (len(part), s.genes)).astype(np.float32)
    means = np.zeros((len(part), 1 + s.genes, s.genes), np.float32)
    weights = np.zeros((len(part), s.genes, s.genes), np.float32)
    scale = np.zeros((len(part), s.genes), np.float32)

    def blocks() -> Iterator[np.ndarray]:
        for number in tqdm(range(len(part)), unit=" graphs"):
            rng = scales.generator("prior", s.seed, number)
            w = sample_dag(rng, s.genes)
            simulated = simulate_linear(rng, w, values[number], int(cells[number]))
            means[number], weights[number] = true_means(w, values[number]), w
            scale[number] = simulated[CONTROL].std(axis=0)
            yield standardise(simulated).reshape(-1, s.genes)

    count = np.repeat(cells[:, None], 1 + s.genes, axis=1)
    made = {"title": "Linear SCMs", "section": s.what, "paper": "linear"}
    write(s, folder, blocks(), count, values, part, False, made, means=means, weights=weights, scale=scale)


# -------------------------------------------------------------------- graphs of gene regulatory networks (B.2, Table 5)


def pick(rng: np.random.Generator, weights: Float[np.ndarray, "n"]) -> int:
    """An index, with probability proportional to its weight."""
    return int(rng.choice(len(weights), p=weights / weights.sum()))


# Exercise 2
def grow_graph(rng: np.random.Generator, genes: int) -> Bool[np.ndarray, "D D"]:
    """Directed scale-free graph in groups, by preferential attachment; cycles allowed (Aguirre et al., 2025; Table 5).
    Genes that regulate many others get more targets; that in-degrees stay even is the work of a large delta_in."""
    group = rng.integers(rng.integers(1, 4), size=genes)  # k in {1, 2, 3} groups
    sparsity = rng.uniform(1.5, 3.0)  # p: edges that are tried per gene
    delta_in, delta_out = rng.uniform(10, 300), rng.uniform(1, 30)  # the larger, the more even the degrees
    modularity = rng.uniform(1, 900)  # w: preference for one's own group
    parents = np.zeros((genes, genes), bool)
    parents[[1, 2, 0], [0, 1, 2]] = True  # start from the cycle 0 -> 1 -> 2 -> 0
    size = 3
    while size < genes:
        grown = parents[:size, :size]
        as_source = grown.sum(axis=0) + delta_out
        as_target = grown.sum(axis=1) + delta_in
        if rng.random() < 1 / sparsity:  # a gene joins, regulated by one that is there
            target = size
            alike = group[:size] == group[target]
            source = pick(rng, as_source * np.where(alike, modularity, 1))
            size += 1
        else:  # an edge joins; it may exist already
            source = pick(rng, as_source)
            alike = group[:size] == group[source]
            target = pick(rng, as_target * np.where(alike, modularity, 1))
        parents[target, source] = target != source
    return parents


# Exercise 2
def cut_cycles(rng: np.random.Generator, parents: Bool[np.ndarray, "D D"]) -> Bool[np.ndarray, "D D"]:
    """Remove the weakest edge of *every* cycle of `parents`, without listing the cycles: there may be millions.

    An edge j -> k is the weakest of some cycle exactly if stronger edges lead from k back to j. (Removing edges only
    until no cycle is left keeps 79 instead of 71 of 50 genes, and misses the released generator's statistics.)"""
    # Paper: "the edge with the smallest absolute weight"; released code: weights N(0, 1) that serve for nothing
    # else (the strengths are drawn anew); here: no weights but a random order, which is all that matters.
    kept = parents.copy()
    reaches = np.eye(len(parents), dtype=bool)  # [k, j]: j reaches k along the edges seen so far
    for k, j in rng.permutation(np.argwhere(parents)):
        kept[k, j] = not reaches[j, k]
        reaches |= np.outer(reaches[:, k], reaches[j])  # cut edges count too: their cycles were cycles
    return kept


def sample_grn_graph(rng: np.random.Generator, genes: int) -> Bool[np.ndarray, "D D"]:
    """parents[k, j]: gene j regulates gene k. Acyclic, every gene has an edge, at least one is a master regulator."""
    # Paper, released code: if no master regulator is left, 5% of the genes are made into some; here: not written,
    # because it cannot happen in a graph without cycles.
    parents = cut_cycles(rng, grow_graph(rng, genes))
    shuffled = rng.permutation(genes)  # early genes become hubs: a gene's number must not tell its age
    return parents[np.ix_(shuffled, shuffled)]


# ----------------------------------------------------------------------------- simulation with SERGIO (B.2, Table 6)


@dataclass(frozen=True)
class Network:
    """A GRN with all of its parameters, drawn once and the same in all of its conditions (Table 6)."""
    strength: Float[np.ndarray, "D D"]  # k of target, regulator; 0: no edge. Positive: every regulator activates
    hill: Num[np.ndarray, "D D"]  # Hill coefficient (gamma in Table 6); sergio-rs takes whole ones only
    decay: Float[np.ndarray, "D"]  # lambda, decay rate of a gene
    process_noise: float  # zeta, amplitude of the noise of the stochastic differential equation
    outlier: float  # mu_outlier: a few genes are magnified log-normally
    library: tuple[float, float]  # mu_lib, sigma_lib: total counts of a cell are log-normal
    dropout: float  # percentile of expression below which counts are lost


def sample_network(rng: np.random.Generator, genes: int,
                   dropout: tuple[float, float] = Settings.dropout) -> Network:
    """A random graph with kinetic and technical parameters from the ranges of Table 6; `dropout`: its percentiles."""
    parents = sample_grn_graph(rng, genes)
    return Network(
        strength=parents * rng.uniform(1.0, 5.0, parents.shape),
        # Paper: U[1.5, 2.5]; released code: truncated, since sergio-rs takes only integers; here: as released, so
        # that half of the interactions have 1 and half 2.
        hill=rng.uniform(1.5, 2.5, parents.shape).astype(int),
        decay=rng.uniform(0.5, 1.0, genes),
        # [D19] paper: one amplitude per simulation; released code: the unpaired prior draws another for each
        # condition; here: one per GRN in both, so that the ablation changes the noise and nothing else.
        process_noise=rng.uniform(0.5, 1.5),
        outlier=rng.uniform(0.8, 5.0),
        # [D51] paper: mu_lib is of a cell of 50 genes; here: as many counts a gene whatever their number, since 20 that
        # share the counts of 50 are 2.5 times too bright. Nothing changes at the paper's 50.
        library=(rng.uniform(4.5, 6.0) + np.log(genes / 50), rng.uniform(0.3, 0.7)),
        # Paper: "dropout percentile" 8 and "temperature" 45-82; released code, here: the other way round, which is
        # what SERGIO means by them: steepness 8, percentile 45-82.
        # [D51] at smoke and laptop scale 0-82: from 45 up no GRN has as few zeros as the leukemia screen.
        dropout=rng.uniform(*dropout))


def simulate_condition(network: Network, treatment: int, cells: int, rate_seed: int, simulation_seed: int,
                       technical_seed: int) -> Integer[np.ndarray, "n D"]:
    """Counts of control, or of the knock-out of gene `treatment` - 1: N = `cells`, or none if the simulator refuses.

    Cells are random moments of *one* trajectory of 150 + 10 N Euler steps of dt = 0.01: 200 of them are worth about 8
    independent ones. What a knock-out does in sergio-rs 0.2.3, found by running it:
    - Half-responses are set at the steady state of the network at hand, where every Hill term is then 1/2. So the mean
      of a gene is the sum of its strengths over 2 lambda, and a knock-out moves its direct targets only.
    - A target that loses its only regulator becomes a master regulator, with a random production rate.
    - `ko_perturbation` also edits the network that it is called on. Hence a new network for every condition."""
    refused = np.zeros((0, len(network.decay)), np.uint32)
    names = [f"{k:04}" for k in range(len(network.decay))]  # sergio-rs sorts genes by name
    genes = [sergio_rs.Gene(name, decay) for name, decay in zip(names, network.decay)]
    grn = sergio_rs.GRN()
    for k, j in np.argwhere(network.strength):
        grn.add_interaction(genes[j], genes[k], network.strength[k, j], None, network.hill[k, j])
    grn.set_mrs()
    try:
        rates = sergio_rs.MrProfile.from_random(grn, 1, (0.5, 2.0), (3.0, 5.0), rate_seed)  # b of Table 6
        if treatment != CONTROL:
            grn, rates = grn.ko_perturbation(names[treatment - 1], rates)
        simulation = sergio_rs.Sim(grn, cells, 150, 10, 0.01, network.process_noise, simulation_seed)
        frame = simulation.simulate(rates)
    except BaseException as panic:  # a Rust panic is no Exception; let an interrupt, and all else, through
        if type(panic).__name__ != "PanicException":
            raise
        return refused
    present = [int(name) for name in frame.drop_in_place("Genes")]  # all but the knocked-out one
    expression = np.zeros((len(genes), cells))
    expression[present] = frame.to_numpy()
    # Released code: drops a condition when any gene is never expressed; the paper does not say; here: the same
    # before technical noise, and the knocked-out gene is excused. After it, one in six would go.
    if not (expression[present].max(axis=1) > 0).all():  # not above zero: zero, or not a number
        return refused
    counts = sergio_rs.add_technical_noise_custom(  # zeros stay in place to keep the random streams aligned
        expression, network.outlier, *network.library, 8.0, network.dropout, technical_seed)
    return counts.T.astype(np.uint32)


def simulate_grn(s: Settings, index: int, population: int) -> tuple[Network, list[Integer[np.ndarray, "_ D"]]]:
    """GRN number `index` and the counts of its control and of the knock-out of each gene, without cells if refused.

    Paired: "keeping the random seed of SERGIO constant across treatments" (6). In sergio-rs the knock-outs of a GRN
    then share their noise, but not with control: the noise of all genes is one matrix, which lacks a row after a
    knock-out. Genes numbered between the two that are knocked out trade rows as well."""
    rng = scales.generator("prior", s.seed, index)
    network = sample_network(rng, s.genes, s.dropout)
    rate_seed = int(rng.integers(2**63))
    noise_seeds = rng.integers(2**63, size=(1 + s.genes, 2))  # of the simulation and of the technical noise
    if not s.unpaired:
        noise_seeds[:] = noise_seeds[CONTROL]
    counts = []
    for treatment, seeds in enumerate(noise_seeds.tolist()):
        changed = network
        if s.redraw_amplitude:
            changed = dataclasses.replace(network, process_noise=rng.uniform(0.5, 1.5))
        counts.append(simulate_condition(changed, treatment, population, rate_seed, *seeds))
    if not len(counts[CONTROL]):  # no task can be made of a GRN without control cells: all of it is refused
        counts = [counts[CONTROL]] * len(counts)
    return network, counts


# --------------------------------------------------------- the same by our own simulator (simulator.py), and screens


def simulate_own(s: Settings, index: int, population: int) -> list[Num[np.ndarray, "_ D"]]:
    """GRN number `index` of a prior of ours: its control and each knock-out. Graphs and ranges are the paper's (Tables
    5 and 6).

    sergio: counts, as sergio-rs simulates them.
    causal: counts; some edges repress, Hill coefficients are not truncated, and knock-outs reach what is downstream.
        Cell n of a condition is the twin of cell n of every other.
    panel: log-expression of a screen that was made of a larger such network (panel.py).
    """
    import panel  # here, so that the workers of the other prior need no JAX
    import simulator

    rng, key = scales.generator("prior", s.seed, index), scales.key("prior", s.seed, index)
    genes = s.genes * (panel.LARGER if s.what == "panel" else 1)
    network = sample_network(rng, genes, s.dropout)
    low, high = rng.uniform(0.5, 2.0, genes), rng.uniform(3.0, 5.0, genes)  # b of Table 6: one or the other
    rates = np.where(rng.random(genes) < 0.5, low, high)
    basal = np.where(network.strength.any(axis=1), 0.0, rates)
    if s.what == "sergio":
        hill = network.hill.astype(float)
        kinetics = simulator.pack(network.strength, hill, basal, network.decay, network.process_noise)
        expression = simulator.sergio_knock_outs(kinetics, rates.astype(np.float32), population, key=key)
    else:
        signs = np.where(rng.random((genes, genes)) < simulator.REPRESSES, -1.0, 1.0)
        network = dataclasses.replace(network, strength=network.strength * signs,
                                      hill=rng.uniform(1.5, 2.5, (genes, genes)))
        if s.what == "panel":
            return panel.simulate(rng, key, network, rates, s.genes, population)
        kinetics = simulator.pack(network.strength, network.hill, basal, network.decay, network.process_noise)
        expression = simulator.knock_outs(kinetics, population, key=key)
    return list(simulator.technical_noise(rng, np.asarray(expression, np.float64), network.outlier, network.library,
                                          network.dropout))


# -------------------------------------------------------------------------------- many GRNs, resumed after a kill


def grn_path(s: Settings, number: int) -> Path:
    """Where the raw counts of a GRN are kept until the screen is written."""
    name = screen_folder(s).parent
    return name.with_name(f".{name.name}-shards") / f"grn-{number}.npz"


def write_grn(s: Settings, number: int) -> None:
    """Simulate one GRN and keep its raw counts."""
    population = s.population if number < s.systems else s.test_population
    if s.what == "grn":
        _, conditions = simulate_grn(s, number, population)
    else:
        conditions = simulate_own(s, number, population)
    count = list(map(len, conditions))
    cells = np.concatenate(conditions)
    if cells.dtype != np.float32:
        cells = cells.astype(np.min_scalar_type(cells.max(initial=0)))  # most counts fit in one or two bytes
    with scales.atomic(grn_path(s, number)) as temporary:
        np.savez_compressed(temporary, settings=json.dumps(content(s)), count=count, cells=cells)


def read_grn(s: Settings, number: int) -> tuple[Int[np.ndarray, "T"], Num[np.ndarray, "rows D"]]:
    """Numbers of cells, and the cells, of a GRN. Raises BadInput if the file is damaged or of other settings."""
    path = grn_path(s, number)
    try:
        with np.load(path) as file:
            settings, count, cells = json.loads(str(file["settings"])), file["count"], file["cells"]
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"{path}: not a readable GRN ({error}); delete it and start again") from None
    scales.check_made(path, settings, content(s))
    return count, cells


def die_with_parent() -> None:
    """Run in each worker: end it when the main process is gone, even if that was killed."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def normalise(counts: Integer[np.ndarray, "n D"], median: float) -> Float[np.ndarray, "n D"]:
    """Counts to log-expression (eq. 5): every cell is brought to the total `median`, but an empty one stays empty."""
    # Paper: log2 (eq. 5); released code, here: the natural logarithm that scanpy's log1p takes.
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    factor = (median / total).astype(np.float32)
    return np.log1p(counts.astype(np.float32) * factor)


def make_grn(s: Settings, folder: Path) -> None:
    """Simulate the GRNs that are not there yet; if all were asked for, write the screen in place of their files."""
    part = parts(s)
    numbers = range(len(part))
    if s.shard >= 0:
        numbers = numbers[s.shard :: s.num_shards]
    todo = []
    for number in numbers:
        if grn_path(s, number).exists():
            read_grn(s, number)  # complains before the long work if the file is of no use
        else:
            todo.append(number)
    if todo:  # the first tells how long all take
        start = time.perf_counter()
        write_grn(s, todo.pop(0))
        minutes = (time.perf_counter() - start) * len(todo) / s.workers / 60
        print(f"{1 + len(todo)} GRNs of {1 + s.genes} conditions: about {minutes:.1f} minutes on {s.workers} processes",
              flush=True)
    if s.what != "grn":  # all cores, or a GPU, are at work on one
        for number in tqdm(todo, unit=" GRNs", smoothing=0):
            write_grn(s, number)
        todo = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(s.workers, spawn, initializer=die_with_parent) as pool:
        done = pool.map(write_grn, [s] * len(todo), todo)
        for _ in tqdm(done, total=len(todo), unit=" GRNs", smoothing=0):
            pass
    if s.shard >= 0:
        return

    count = np.zeros((len(part), 1 + s.genes), int)
    totals = []
    for number in numbers:
        count[number], cells = read_grn(s, number)
        totals.append(cells.sum(axis=1))
    # Over all cells of the prior, as released: what is held out here is simulated too, and D22 is of real cells.
    median = float(np.median(np.maximum(np.concatenate(totals), 1)))
    kept = np.flatnonzero(count[:, CONTROL])  # a GRN without control is left out
    print(f"{(count > 0).sum()} conditions, {(count == 0).sum()} refused by the simulator")

    def blocks() -> Iterator[np.ndarray]:
        for number in tqdm(kept.tolist(), "screen", unit=" GRNs"):
            cells = read_grn(s, number)[1]
            yield cells if s.what == "panel" else normalise(cells, median)

    values = np.ones((len(kept), s.genes), np.float32)  # a knock-out is 1 in the one-hot
    kind = "SERGIO" if s.what == "grn" else s.what
    kind += ", unpaired" * s.unpaired + ", amplitude redrawn" * s.redraw_amplitude
    made = {"title": f"Gene regulatory networks ({kind})", "section": "grn"}
    write(s, folder, blocks(), count[kept], values, part[kept], True, made)
    shutil.rmtree(grn_path(s, 0).parent)


def screen_folder(s: Settings) -> Path:
    """Where the screen is kept."""
    name = s.name or s.what + "-unpaired" * s.unpaired + "-redrawn" * s.redraw_amplitude
    return s.out / s.scale / "screens" / name / "split-0"


def content(s: Settings) -> dict:
    """The settings that the screen depends on."""
    settings = dict(vars(s))
    for name in ("scale", "name", "out", "workers", "num_shards", "shard"):
        del settings[name]
    return settings


def make(s: Settings, folder: Path) -> None:
    """Draw the systems, and write the screen."""
    if s.what == "linear":
        make_linear(s, folder)
    else:
        make_grn(s, folder)


def another(screen: Screen, seed: int, number: int) -> Screen:
    """As many other training systems of the prior that the screen is of: none that is in it, nor in those of another
    number, or of another training's `seed`. Raises BadInput if it is of none of the priors here."""
    settings = screen.made["settings"]
    changed = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    own = 10**9 * (1 + settings["seed"]) + 10**5 * seed + number  # nobody gives such seeds
    changed |= {"validation": 0, "test": 0, "seed": own}
    with tempfile.TemporaryDirectory() as place:  # from where it is mapped into memory
        s = Settings(**changed, out=Path(place))
        make(s, screen_folder(s))
        found = tasks.load_screen(screen_folder(s))
    if found.made["title"] != screen.made["title"]:  # a fork's own, that calls `write` with settings of this file
        raise BadInput(f"--fresh: {screen.made['title']} is of no prior of prior.py; only those can be drawn anew")
    return found


def check(s: Settings) -> None:
    """Raise BadInput for a value that cannot be used."""
    if not -1 <= s.shard < s.num_shards:
        raise BadInput(f"--shard {s.shard}: expected 0 to {s.num_shards - 1}, or -1 for all")
    if s.what == "linear" and s.shard >= 0:
        raise BadInput("--shard: only for GRNs")
    if s.what != "grn" and s.unpaired:
        raise BadInput("--unpaired: only for the prior grn")
    if s.redraw_amplitude and not s.unpaired:
        raise BadInput("--redraw-amplitude: only with --unpaired")


def main() -> None:
    """Make the screen, unless it is there already."""
    s = scales.parse(Settings, lambda s: ("linear" if s.what == "linear" else "grn",))
    check(s)
    folder = screen_folder(s)
    if folder.exists():
        scales.check_made(folder, tasks.load_screen(folder).made.get("settings", {}), content(s))
        shutil.rmtree(grn_path(s, 0).parent, ignore_errors=True)  # a run may have been killed just before it did so
        print(f"{folder}: finished, skipped")
        return
    share = folder if s.shard < 0 else folder.with_name(f"shard-{s.shard}")
    with scales.alone(share):  # an OSError now, not after the work, if there is no place
        print(f"{s}\nsergio-rs {version('sergio_rs')}, numpy {np.__version__}, revision {scales.revision()}",
              flush=True)
        make(s, folder)


if __name__ == "__main__":
    scales.run(main)
