"""Stage 1 of 8: draw random causal systems, knock out each of their nodes in turn, and keep the cells.

Paper: 4 "Structural Causal Models", "Synthetic Biological Prior"; 5.1; B.1 (linear SCMs); B.2, Tables 5, 6 (GRNs); B.4.
Reads nothing. Writes `out/<scale>/prior/grn-<i>-of-<n>.npz`, raw counts of the GRN prior, one shard of the GRNs each.
Linear SCMs are so cheap that nothing is written: the training and table scripts call `linear_screen`.

    python prior.py --scale smoke                         # 16 GRNs of 8 genes: seconds
    python prior.py --scale laptop --workers 2            # 800 GRNs of 20 genes: 3 minutes on 2 cores
    python prior.py --scale paper --workers 64            # 6000 GRNs of 50 genes: about 4 core-hours, 2 GB on disk
    python prior.py --scale paper --num-shards 100 --shard $SLURM_ARRAY_TASK_ID    # the same, as a cluster array
    python prior.py --scale laptop --unpaired             # the ablation of Table 4 and Figure 2
    python prior.py --scale paper --statistics            # 30 GRNs beside the released generator's, 10 seconds

A GRN depends on the seed and its own number only, not on the shards, so a run that was killed can simply be repeated.
Departures, marked where they happen: D13 to D21.

Symbols     name            shape     meaning
W           w               C D D     w[c, k, j]: linear effect of parent j on child k, 0 without an edge
T           transfer        C D D     (I - W)^-1, total effect of j's noise on k, direct and through others
epsilon, N  noise           ... N D   standard normal noise
c           values          C D       what do(t) sets node t to
            parents         D D       parents[k, j]: gene j regulates gene k (row: target, as in W)
k, n, lambda, zeta           see `Network`
Axes: C contexts (one graph each), T = D + 1 treatments with control first, N cells, D genes.
"""

import functools
import json
import multiprocessing
import os
import threading
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import sergio_rs
from jaxtyping import Bool, Float, Int, Integer
from tqdm import tqdm

import scales
from data import ABSENT, CONTROL, TEST, TRAIN, Screen
from scales import BadInput


@dataclass(frozen=True)
class Settings:
    """Simulate the synthetic biological prior (GRNs) into `out`."""
    scale: str = "paper"      # smoke, laptop or paper: the column of scales.TABLE that fills what is not given
    genes: int = 50           # genes D (B.2)
    contexts: int = 6000      # random GRNs C (B.2)
    population: int = 200     # cells simulated per condition (B.2)
    seed: int = 0             # of everything; the same seed gives the same files
    unpaired: bool = False    # new noise for each condition instead of the "counterfactual paired" prior (6)
    out: str = ""             # folder to write to; default: out/<scale>/prior, or out/<scale>/prior-unpaired
    workers: int = 2          # processes that simulate
    num_shards: int = 16      # files that the GRNs are spread over
    shard: int = -1           # make this shard only (for cluster arrays); -1: all
    statistics: bool = False  # print the statistics of 30 GRNs and write nothing

# ---------------------------------------------------------------------------------------------------------------------
# What both priors share: conditions, their treatments and their split (B.4)
# ---------------------------------------------------------------------------------------------------------------------


def make_screen(rng: np.random.Generator, cells: Float[np.ndarray, "rows D"], count: Int[np.ndarray, "C T"],
                values: Float[np.ndarray, "C D"], held_out: int, prefix: str, log_expression: bool) -> Screen:
    """Wrap `cells`, ordered by context and then by treatment, as a Screen in which treatment 1 + t acts on node t.

    All conditions are TRAIN, but half of the treatments of each of the last `held_out` contexts are TEST: a new
    context is met with some of its experiments known (B.4).
    """
    contexts, genes = values.shape
    if held_out > contexts:
        raise BadInput(f"{held_out} contexts to hold out, but there are only {contexts}; hold out fewer or make more")
    split = np.where(count > 0, TRAIN, ABSENT)
    for c in range(contexts - held_out, contexts):
        measured = 1 + np.flatnonzero(count[c, 1:])
        split[c, rng.permutation(measured)[: len(measured) // 2]] = TEST
    treatments = np.zeros((contexts, genes + 1, genes), np.float32)
    treatments[:, 1:] = values[:, :, None] * np.eye(genes)           # one-hot times do-value
    names = tuple(f"gene{k}" for k in range(genes))
    return Screen(cells, start=np.cumsum(count).reshape(count.shape) - count, count=count, treatments=treatments,
                  split=split, genes=names, context_names=tuple(f"{prefix}{c}" for c in range(contexts)),
                  treatment_names=("control", *names), log_expression=log_expression)

# ---------------------------------------------------------------------------------------------------------------------
# Linear structural causal models (B.1)
# ---------------------------------------------------------------------------------------------------------------------


def sample_dags(rng: np.random.Generator, graphs: int, genes: int,
                edge_probability: float = 0.5) -> Float[np.ndarray, "C D D"]:
    """Weights W of Erdos-Renyi DAGs, w[c, k, j] != 0 only if j is a parent of k (B.1).

    The paper's "random node permutation" of a triangular matrix is drawn here as each node's place in the causal
    order. W <- D^(-1/2) W divides a node's incoming weights by the standard deviation it had, but not its noise, so
    that values no longer grow along the order. Variances end up at 1 or above (median 1.06, 99% below 2.04): the data
    still have to be divided by their standard deviation, in `standardise`.
    """
    shape = graphs, genes, genes
    place = rng.permuted(np.tile(np.arange(genes), (graphs, 1)), axis=1)
    edges = (place[:, None, :] < place[:, :, None]) & (rng.random(shape) < edge_probability)
    w = edges * rng.uniform(0.5, 2.0, shape) * rng.choice([-1.0, 1.0], shape)
    transfer = np.linalg.inv(np.eye(genes) - w)
    return w / np.sqrt((transfer**2).sum(-1, keepdims=True))         # D = diag(T T^t): variances before scaling


def simulate_linear(rng: np.random.Generator, w: Float[np.ndarray, "C D D"], population: int,
                    shared_noise: bool = False) -> tuple[Float[np.ndarray, "C T N D"], Float[np.ndarray, "C D"]]:
    """Cells of every graph without and with an intervention on each node, unscaled; and the values c of do(t) (B.1).

    z = (I - W)^-1 epsilon = T epsilon. do(t) replaces the equation of node t by z_t = c. Because nothing else changes,
    this equals adding c - z_t to the node's own noise, cell by cell, and letting the shock run through the same T:
    z' = z + T[:, t] (c - z_t). So neither a second matrix nor a second solve is needed; a test compares the two.
    """
    contexts, genes, _ = w.shape
    node = np.arange(genes)
    transfer = np.linalg.inv(np.eye(genes) - w).astype(np.float32)
    values = rng.uniform(0.5, 1.5, (contexts, genes)).astype(np.float32)
    # [D13] paper: new noise N_k for each intervention (4, Algorithm 1); released code: one draw for all
    # interventions of a graph, another for its control; here: the paper's, because the reference rows of Table 2 come
    # out the same, and because context experiments with the noise of the target's cells would give those cells away.
    draws = 2 if shared_noise else 1 + genes
    noise = rng.standard_normal((contexts, draws, population, genes), np.float32)
    z = noise @ transfer[:, None].swapaxes(-1, -2)                   # C draws N D
    undisturbed = np.broadcast_to(z[:, 1:], (contexts, genes, population, genes))        # C t N D
    shock = values[:, :, None] - np.einsum("ctnt->ctn", undisturbed)
    treated = undisturbed + shock[..., None] * transfer.swapaxes(1, 2)[:, :, None, :]    # T[:, t] is row t here
    treated[:, node, :, node] = values.T[:, :, None]                 # c itself, without its rounding error
    return np.concatenate([z[:, :1], treated], axis=1), values


def standardise(cells: Float[np.ndarray, "... N D"]) -> Float[np.ndarray, "... N D"]:
    """Each population's variables at unit variance, within [-10, 10] (B.1; Reisach et al., 2021, on varsortability).

    The mean is kept (it carries the effect); so is a variable without variance, which is the intervened one.
    """
    # [D14] paper: "we scale all variables of the generated data to unit variance"; released code: each
    # condition by itself; here: as released, since it gives the reference rows of Table 2. It erases the change of
    # variance that an intervention causes: only means and correlations are left to predict.
    sd = cells.std(-2, keepdims=True)
    return np.clip(cells / np.where(sd < 1e-3, 1, sd), -10, 10)      # not 0: rounding gives a constant an sd of 1e-6


def linear_screen(rng: np.random.Generator, contexts: int, genes: int, population: int, held_out: int = 0,
                  edge_probability: float = 0.5, shared_noise: bool = False) -> Screen:
    """A new draw of the linear SCM prior: every node of every graph intervened on, `population` cells each (B.1).

    Takes 0.2 s at laptop scale, and about 5 GB of memory at the paper's, of which 0.8 GB stay.
    Raises BadInput if `held_out`, the number of contexts with TEST treatments, exceeds `contexts`.
    """
    w = sample_dags(rng, contexts, genes, edge_probability)
    cells, values = simulate_linear(rng, w, population, shared_noise)
    count = np.full((contexts, genes + 1), population)
    return make_screen(rng, standardise(cells).reshape(-1, genes), count, values, held_out, "dag", log_expression=False)

# ---------------------------------------------------------------------------------------------------------------------
# Gene regulatory networks (B.2, Table 5)
# ---------------------------------------------------------------------------------------------------------------------


def pick(rng: np.random.Generator, weights: Float[np.ndarray, "n"]) -> int:
    """An index, with probability proportional to its weight."""
    return int(np.searchsorted(np.cumsum(weights), rng.random() * weights.sum(), side="right"))


def grow_graph(rng: np.random.Generator, genes: int) -> Bool[np.ndarray, "D D"]:
    """Directed scale-free graph in groups, by preferential attachment; cycles allowed (Aguirre et al., 2025; Table 5).

    Genes that regulate many others get more targets; that in-degrees stay even is the work of a large delta_in.
    """
    group = rng.integers(rng.integers(1, 4), size=genes)             # k in {1, 2, 3} groups
    sparsity = rng.uniform(1.5, 3.0)                                 # p: edges that are tried per gene
    delta_in, delta_out = rng.uniform(10, 300), rng.uniform(1, 30)   # the larger, the more even the degrees
    modularity = rng.uniform(1, 900)                                 # w: preference for one's own group
    parents = np.zeros((genes, genes), bool)
    parents[[1, 2, 0], [0, 1, 2]] = True                             # start from the cycle 0 -> 1 -> 2 -> 0
    size = 3
    while size < genes:
        grown = parents[:size, :size]
        as_source, as_target = grown.sum(0) + delta_out, grown.sum(1) + delta_in
        if rng.random() < 1 / sparsity:                              # a gene joins, regulated by one that is there
            target = size
            source = pick(rng, as_source * np.where(group[:size] == group[target], modularity, 1))
            size += 1
        else:                                                        # an edge joins; it may exist already
            source = pick(rng, as_source)
            target = pick(rng, as_target * np.where(group[:size] == group[source], modularity, 1))
        parents[target, source] = target != source
    return parents


def cut_cycles(rng: np.random.Generator, parents: Bool[np.ndarray, "D D"]) -> Bool[np.ndarray, "D D"]:
    """Remove the weakest edge of *every* cycle of `parents`, without listing the cycles: there may be millions.

    An edge j -> k is the weakest of some cycle exactly if stronger edges lead from k back to j. So take the edges from
    the strongest to the weakest and keep track of who reaches whom. (Removing one edge at a time until no cycle is
    left keeps more edges, 79 instead of 71 of 50 genes, and does not give the released generator's statistics.)
    """
    # [D16] paper: "the edge with the smallest absolute weight"; released code: weights N(0, 1) that serve
    # for nothing else (the strengths are drawn anew); here: no weights but a random order, which is all that matters.
    kept = parents.copy()
    reaches = np.eye(len(parents), dtype=bool)                       # [k, j]: j reaches k along the edges seen so far
    for k, j in rng.permutation(np.argwhere(parents)):
        kept[k, j] = not reaches[j, k]
        reaches |= np.outer(reaches[:, k], reaches[j])               # cut edges count too: their cycles were cycles
    return kept


def sample_grn_graph(rng: np.random.Generator, genes: int) -> Bool[np.ndarray, "D D"]:
    """parents[k, j]: gene j regulates gene k. Acyclic, every gene has an edge, at least one is a master regulator."""
    # [D15] paper, released code: if no master regulator is left, 5% of the genes are made into some; here: not
    # written, because it cannot happen: walking up from any edge of a graph without cycles ends at one.
    parents = cut_cycles(rng, grow_graph(rng, genes))
    shuffled = rng.permutation(genes)                # early genes become hubs: a gene's number must not tell its age
    return parents[np.ix_(shuffled, shuffled)]

# ---------------------------------------------------------------------------------------------------------------------
# Simulation with SERGIO (B.2, Table 6)
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A GRN with all of its parameters, drawn once and the same in all of its conditions (Table 6)."""
    strength: Float[np.ndarray, "D D"]   # k of target, regulator; 0: no edge. Positive: every regulator activates
    hill: Int[np.ndarray, "D D"]         # Hill coefficient (gamma in Table 6)
    decay: Float[np.ndarray, "D"]        # lambda, decay rate of a gene
    process_noise: float                 # zeta, amplitude of the noise of the stochastic differential equation
    outlier: float                       # mu_outlier: a few genes are magnified log-normally
    library: tuple[float, float]         # mu_lib, sigma_lib: total counts of a cell are log-normal
    dropout: float                       # percentile of expression below which counts are lost


def sample_network(rng: np.random.Generator, genes: int) -> Network:
    """A random graph with kinetic and technical parameters from the ranges of Table 6."""
    parents = sample_grn_graph(rng, genes)
    return Network(
        strength=parents * rng.uniform(1.0, 5.0, parents.shape),
        # [D17] paper: U[1.5, 2.5]; released code: truncated, since sergio-rs takes only integers; here:
        # as released, so that half of the interactions have 1 and half 2.
        hill=rng.uniform(1.5, 2.5, parents.shape).astype(int),
        decay=rng.uniform(0.5, 1.0, genes),
        # [D19] paper: one amplitude per simulation; released code: the unpaired prior draws another for
        # each condition; here: one per GRN in both, so that the ablation changes the noise and nothing else.
        process_noise=rng.uniform(0.5, 1.5),
        outlier=rng.uniform(0.8, 5.0),
        library=(rng.uniform(4.5, 6.0), rng.uniform(0.3, 0.7)),
        # [D18] paper: "dropout percentile" 8 and "temperature" 45-82; released code, here: the other way
        # round, which is what SERGIO means by them: steepness 8, percentile 45-82.
        dropout=rng.uniform(45.0, 82.0))


def simulate_condition(network: Network, treatment: int, cells: int, rate_seed: int, simulation_seed: int,
                       technical_seed: int) -> Integer[np.ndarray, "N D"] | None:
    """Counts of one condition, control or the knock-out of gene `treatment` - 1; None if the simulator refuses it.

    Cells are `cells` random moments of *one* trajectory of 150 + 10 * `cells` Euler steps of dt = 0.01: far from
    independent, 200 of them are worth about 8. What a knock-out does in sergio-rs 0.2.3, found by running it:
    - Half-responses are set at the steady state of the network at hand, where every Hill term is then 1/2. So the mean
      of a gene is the sum of its strengths over 2 lambda, and a knock-out moves its direct targets only.
    - A target that loses its only regulator becomes a master regulator, with a random production rate.
    - `ko_perturbation` also edits the network that it is called on. Hence a new network for every condition.
    """
    names = [f"{k:04}" for k in range(len(network.decay))]           # sergio-rs sorts genes by name
    grn, genes = sergio_rs.GRN(), [sergio_rs.Gene(*gene) for gene in zip(names, network.decay)]
    for k, j in np.argwhere(network.strength):
        grn.add_interaction(genes[j], genes[k], network.strength[k, j], None, network.hill[k, j])
    grn.set_mrs()
    try:
        rates = sergio_rs.MrProfile.from_random(grn, 1, (0.5, 2.0), (3.0, 5.0), rate_seed)           # b of Table 6
        if treatment != CONTROL:
            grn, rates = grn.ko_perturbation(names[treatment - 1], rates)
        frame = sergio_rs.Sim(grn, cells, 150, 10, 0.01, network.process_noise, simulation_seed).simulate(rates)
    except BaseException as panic:        # a Rust panic is no Exception; let an interrupt, and all else, through
        if type(panic).__name__ != "PanicException":
            raise
        return None
    present = [int(name) for name in frame.drop_in_place("Genes")]   # all but the knocked-out one
    expression = np.zeros((len(genes), cells))
    expression[present] = frame.to_numpy()
    # [D20] paper: nothing; released code: drops a condition when any gene is never expressed; here: the
    # same before technical noise, and the knocked-out gene is excused. After it, one in six would go.
    if not (expression[present].max(1) > 0).all():                   # not above zero: zero, or not a number
        return None
    counts = sergio_rs.add_technical_noise_custom(                   # zeros stay in place to keep the streams aligned
        expression, network.outlier, *network.library, 8.0, network.dropout, technical_seed)
    return counts.T.astype(np.uint32)


def draw_grn(seed: int, genes: int, index: int) -> tuple[Network, int, Integer[np.ndarray, "T 2"]]:
    """GRN number `index`; the seed of its production rates; seeds of simulation and technical noise per condition."""
    structure, rates, simulation, technical = np.random.SeedSequence(seed, spawn_key=(index,)).spawn(4)
    noise = np.stack([s.generate_state(1 + genes, np.uint64) for s in (simulation, technical)], axis=1)
    return sample_network(np.random.default_rng(structure), genes), int(rates.generate_state(1, np.uint64)[0]), noise


def simulate_grn(seed: int, genes: int, population: int, unpaired: bool,
                 index: int) -> tuple[Network, list[Integer[np.ndarray, "N D"] | None]]:
    """GRN number `index` and the counts of its control and of the knock-out of each gene; None: refused.

    Paired: "keeping the random seed of SERGIO constant across treatments" (6). In sergio-rs the knock-outs of a GRN
    then share their noise with each other, though not with control: the noise of all genes is drawn as one matrix,
    which lacks a row after a knock-out. Genes numbered between the two that are knocked out trade rows as well.
    """
    network, rate_seed, noise = draw_grn(seed, genes, index)
    counts = [simulate_condition(network, t, population, rate_seed, *map(int, noise[t if unpaired else CONTROL]))
              for t in range(1 + genes)]
    # Without control cells no task can be made of a GRN, so that all of it counts as refused.
    return network, counts if counts[CONTROL] is not None else [None] * len(counts)

# ---------------------------------------------------------------------------------------------------------------------
# Shards: making, resuming and loading them
# ---------------------------------------------------------------------------------------------------------------------


def shard_path(folder: str | Path, shard: int, num_shards: int) -> Path:
    """The file of one shard."""
    return Path(folder) / f"grn-{shard}-of-{num_shards}.npz"


def shard_settings(path: Path) -> dict:
    """The settings that a shard was made with. Raises BadInput if it is no shard."""
    try:
        with np.load(path) as shard:
            return json.loads(str(shard["settings"]))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path}: not a readable shard of the GRN prior ({error}); delete it and run prior.py again")


def content(settings: Settings) -> dict:
    """The settings on which the contents of the shards depend."""
    return {k: getattr(settings, k) for k in ("seed", "genes", "contexts", "population", "unpaired", "num_shards")}


def unfinished(settings: Settings, folder: Path) -> list[int]:
    """The shards that are still to be made. Raises BadInput if `folder` has shards of other settings."""
    for path in sorted(folder.glob("grn-*-of-*.npz")):
        found, wanted = shard_settings(path), content(settings)
        if found != wanted:
            differ = ", ".join(f"{k} {found.get(k)} (now {wanted[k]})" for k in wanted if found.get(k) != wanted[k])
            raise BadInput(f"{path} was made with {differ}; choose another --out, or delete the old shards")
    wanted = range(settings.num_shards) if settings.shard < 0 else [settings.shard]
    return [s for s in wanted if not shard_path(folder, s, settings.num_shards).exists()]


def shard_grns(settings: Settings, shard: int) -> range:
    """Which GRNs a shard holds."""
    return range(*(settings.contexts * s // settings.num_shards for s in (shard, shard + 1)))


def write_shard(settings: Settings, folder: Path, shard: int, simulate_all, bar: tqdm) -> None:
    """Simulate the GRNs of one shard, with `simulate_all(function, indices)`, and write them."""
    job = functools.partial(simulate_grn, settings.seed, settings.genes, settings.population, settings.unpaired)
    strength, count, counts = [], [], []
    for network, conditions in simulate_all(job, shard_grns(settings, shard)):
        strength.append(network.strength.astype(np.float32))
        count.append([0 if cells is None else len(cells) for cells in conditions])
        counts += [cells for cells in conditions if cells is not None]
        bar.update(len(conditions))
    count = np.array(count)                                                                # C T
    counts = np.concatenate([np.zeros((0, settings.genes), np.uint32), *counts])           # rows D
    counts, refused = counts.astype(np.min_scalar_type(counts.max(initial=0))), int((count == 0).sum())
    path = shard_path(folder, shard, settings.num_shards)
    with scales.atomic(path) as temporary:
        np.savez_compressed(temporary, settings=json.dumps(content(settings)), counts=counts, count=count,
                            refused=refused, strength=np.array(strength))
    bar.write(f"{path}: {count.size - refused} conditions, {refused} refused by the simulator")


def load_grn_screen(folder: str | Path, held_out: int = 0, seed: int = 0) -> Screen:
    """All shards in `folder` as one Screen of log-expression (eq. 5); the last `held_out` GRNs have TEST treatments.

    Totals per cell are brought to the median over the whole prior. Needs 4 bytes per count: 12 GB at the paper's size.
    Raises BadInput if there are no shards, if some are missing, or if they were made with different settings.
    """
    found = {path: shard_settings(path) for path in sorted(Path(folder).glob("grn-*-of-*.npz"))}
    if not found:
        raise BadInput(f"{folder}: no shard of the GRN prior (grn-*-of-*.npz); run python prior.py --out {folder}")
    first, settings = next(iter(found.items()))
    for path in found:
        if found[path] != settings:
            raise BadInput(f"{path} and {first} were made with different settings; keep one kind only")
    paths = [shard_path(folder, s, settings["num_shards"]) for s in range(settings["num_shards"])]
    missing = [path.name for path in paths if path not in found]
    if missing:
        raise BadInput(f"{folder}: {len(missing)} of {len(paths)} shards are missing, the first is {missing[0]}; "
                       "run prior.py again to make them")
    count = np.concatenate([np.load(path)["count"] for path in paths])                     # C T
    cells, row = np.empty((count.sum(), settings["genes"]), np.float32), 0
    for path in paths:
        counts = np.load(path)["counts"]
        cells[row : row + len(counts)] = counts
        row += len(counts)
    total = np.maximum(cells.sum(1, keepdims=True), 1)               # an empty cell stays empty
    cells *= np.median(total) / total
    # [D21] paper: log2 (eq. 5); released code, here: the natural logarithm that scanpy's log1p takes.
    np.log1p(cells, out=cells)
    count = count[count[:, CONTROL] > 0]                             # a GRN without control has no rows
    values = np.ones((len(count), settings["genes"]), np.float32)    # a knock-out is do(1) in the one-hot
    return make_screen(np.random.default_rng(seed), cells, count, values, held_out, "grn", log_expression=True)

# ---------------------------------------------------------------------------------------------------------------------
# Statistics of the prior, beside the released generator's
# ---------------------------------------------------------------------------------------------------------------------

RELEASED = {            # mean and sd over 30 GRNs of 50 genes, 4 conditions of 200 cells each; measured, not published
    "edges": (69, 10), "regulators a gene": (1.38, 0.20), "largest in-degree": (4.0, 0.9),
    "largest out-degree": (7.0, 2.1), "master regulators": (4.1, 2.0), "zero counts, %": (64, 11),
    "counts a cell": (159, 86), "genes without a count, %": (2.9, np.nan),
}


def graph_statistics(parents: Bool[np.ndarray, "D D"]) -> Float[np.ndarray, "5"]:
    """The first five rows of RELEASED for one graph."""
    regulators, targets = parents.sum(1), parents.sum(0)
    masters = (regulators == 0) & (targets > 0)
    return np.array([parents.sum(), regulators.mean(), regulators.max(), targets.max(), masters.sum()])


def statistics(seed: int, genes: int, population: int, grns: int = 30) -> Float[np.ndarray, "grns 8"]:
    """All rows of RELEASED for the first GRNs of the prior; counts are those of four knock-outs of each."""
    rows = []
    for index in range(grns):
        network, rate_seed, noise = draw_grn(seed, genes, index)
        counts = [simulate_condition(network, t, population, rate_seed, *map(int, noise[t]))
                  for t in range(1, 1 + min(4, genes))]
        counts = np.array([cells for cells in counts if cells is not None])                # conditions N D
        rows.append([*graph_statistics(network.strength > 0),
                     100 * (counts == 0).mean(), counts.sum(2).mean(), 100 * (counts.max(1) == 0).mean()])
    return np.array(rows)


def print_statistics(settings: Settings) -> None:
    """Print the mean and sd over 30 GRNs of each statistic, beside the released generator's."""
    rows = statistics(settings.seed, settings.genes, settings.population)
    print(f"{len(rows)} GRNs of {settings.genes} genes, {settings.population} cells a condition, seed {settings.seed}")
    print(f"{'':26}{'ours':>17}{'released (50 genes)':>24}")
    for (name, (mean, sd)), column in zip(RELEASED.items(), rows.T):
        print(f"{name:26}{column.mean():8.2f} +- {column.std(ddof=1):5.2f}{mean:15.2f} +- {sd:5.2f}")

# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


def die_with_parent() -> None:
    """Run in each worker: end it when the main process is gone, even if that was killed without a chance to say so."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def check(settings: Settings) -> None:
    """Raise BadInput for a value that cannot be used."""
    for name, least in {"genes": 3, "contexts": 1, "population": 1, "workers": 1, "num_shards": 1, "seed": 0}.items():
        if getattr(settings, name) < least:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected at least {least}")
    if settings.num_shards > settings.contexts:
        raise BadInput(f"--num-shards {settings.num_shards}: expected at most one per GRN, of {settings.contexts} GRNs")
    if not -1 <= settings.shard < settings.num_shards:
        raise BadInput(f"--shard {settings.shard}: expected 0 to {settings.num_shards - 1}, or -1 for all")


def main() -> None:
    """Simulate the shards that are not there yet, or print the prior's statistics."""
    settings = scales.parse(Settings, ("grn",))
    check(settings)
    if settings.statistics:
        return print_statistics(settings)
    folder = Path(settings.out or f"out/{settings.scale}/prior" + "-unpaired" * settings.unpaired)
    todo = unfinished(settings, folder)
    print(f"{settings}\nsergio-rs {version('sergio_rs')}, numpy {np.__version__}, revision {scales.revision()}")
    if not todo:
        return print(f"{folder}: every shard is there already, nothing to do")
    conditions = sum(len(shard_grns(settings, s)) for s in todo) * (1 + settings.genes)
    network = sample_network(np.random.default_rng(settings.seed), settings.genes)
    for _ in range(2):                               # two of them, to know how long all take: the first loads libraries
        start = time.perf_counter()
        simulate_condition(network, CONTROL, settings.population, 0, 1, 2)
    minutes = (time.perf_counter() - start) * conditions / settings.workers / 60
    print(f"{conditions} conditions (1 control + {settings.genes} knock-outs a GRN) x {settings.population} cells -> "
          f"{len(todo)} shards in {folder}, about {minutes:.1f} minutes on {settings.workers} processes", flush=True)
    spawn = multiprocessing.get_context("spawn")
    with (ProcessPoolExecutor(settings.workers, spawn, initializer=die_with_parent) as pool,
          tqdm(total=conditions, unit=" conditions", smoothing=0) as bar):
        for shard in todo:
            write_shard(settings, folder, shard, pool.map, bar)


if __name__ == "__main__":
    scales.run(main)
