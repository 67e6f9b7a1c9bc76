"""Knock-out screens as laboratories make them, out of simulated networks: the prior "panel" (prior.py).

Reads and writes nothing. Departure: D57, as the simulator that it is built on (simulator.py).

A screen of real cells differs from "all knock-outs of a random network" in four respects, each of which is drawn here:

    pathways    a few transcription factors with many targets, and signalling genes whose loss silences the *activity*
                of such a factor and leaves its mRNA as it was, as IFNGR2, JAK2 and STAT1 do in leukemia cells. So
                knock-outs of one pathway look alike, although no mRNA tells that they belong together.
    partial     a knock-out leaves some of the mRNA. Cas9 destroys the protein all the same, CRISPRi leaves as much of
                it as of the mRNA; some cells escape. How much is a property of the screen and of the gene.
    chosen      biologists perturb what they expect to matter: members of pathways, mostly, and other regulators.
    selected    of many genes those are kept that answer: by data.py's own normalisation and ranking, on 70% of the
                conditions; in a laboratory the others were yet to be measured. Which are asked for later is another
                draw (prior.uses): of these, too, 70% had a say in which genes are there.

    D genes that are kept   G = LARGER D genes of the network   T conditions, control first   P perturbed genes
    N cells of a condition
"""

import warnings

import anndata
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

import data
import simulator
from tasks import TRAIN

LARGER = 6           # genes of the network, for each that is kept
PATHWAYS = 2, 4      # transcription factors with many targets: fewest and most
TARGETS = 0.05, 0.25  # share of all genes that such a factor regulates
SIGNALS = 1, 4       # signalling genes of a factor
STRONGER = 1.0, 3.0  # of its effects, beside those of other regulators
PERTURBED = 8, 24    # genes: fewest, of which half can be held out and four are left as context, and most
IN_PATHWAY = 0.75    # share of the perturbed genes
ESCAPE = 0.4         # largest share of cells that a knock-out of a gene misses
LIBRARY = 4.5, 6.5   # mean of the log library size, for 50 genes: from dim screens to bright ones
DROPOUT = 0.0, 80.0  # percentile of the dropout curve: with the library, a tenth to three quarters of zeros


def reaches(parents: Bool[np.ndarray, "G G"]) -> Bool[np.ndarray, "G G"]:
    """[k, j]: j reaches k along edges, or is k."""
    found = parents | np.eye(len(parents), dtype=bool)
    while True:
        further = (found.astype(np.float32) @ found.astype(np.float32)) > 0
        if (further == found).all():
            return found
        found = further


def add_pathways(rng: np.random.Generator, strength: Float[np.ndarray, "G G"]) -> tuple[
        Float[np.ndarray, "G G"], Int[np.ndarray, "F"], Int[np.ndarray, "G"]]:
    """The network with many more targets for some factors, still without cycles; these factors; and for each gene the
    factor that it signals to, -1 if it does not. Row: target, column: regulator."""
    genes, strength = len(strength), strength.copy()
    order = rng.permutation(genes)
    factors = order[: rng.integers(PATHWAYS[0], PATHWAYS[1] + 1)]
    signals_to, used = np.full(genes, -1), len(factors)
    for factor in factors.tolist():
        free = np.flatnonzero(~reaches(strength != 0)[factor])  # what does not regulate the factor, near or far
        wanted = round(genes * rng.uniform(*TARGETS))
        targets = rng.permutation(free)[:wanted]
        signs = np.where(rng.random(len(targets)) < 0.2, -1.0, 1.0)
        strength[targets, factor] = signs * rng.uniform(1.0, 5.0, len(targets)) * rng.uniform(*STRONGER)
        number = rng.integers(SIGNALS[0], SIGNALS[1] + 1)
        signals_to[order[used : used + number]] = factor
        used += number
    return strength, factors, signals_to


def choose_perturbed(rng: np.random.Generator, strength: Float[np.ndarray, "G G"], members: Int[np.ndarray, "m"],
                     genes: int) -> Int[np.ndarray, "P"]:
    """What the laboratory perturbs: members of pathways, as far as they go, and other genes that regulate any."""
    fewest, most = np.minimum(PERTURBED, genes)
    wanted = int(rng.integers(fewest, most + 1))
    regulators = np.flatnonzero((strength != 0).any(axis=0))
    others = rng.permutation(np.setdiff1d(regulators, members))
    rest = rng.permutation(np.setdiff1d(np.arange(len(strength)), np.concatenate([others, members])))
    inside = rng.permutation(members)[: rng.binomial(wanted, IN_PATHWAY)]
    return np.concatenate([inside, others, rest])[:wanted]


def changes(rng: np.random.Generator, perturbed: Int[np.ndarray, "P"], signals_to: Int[np.ndarray, "G"],
            conditions: int, cells: int) -> simulator.Change:
    """What each of T conditions does to production and to function of each gene, in each cell; there may be more than
    are needed, in which nothing is done."""
    dose, activity = (np.ones((len(signals_to), conditions, cells), np.float32) for _ in range(2))
    remains, cas9 = rng.uniform(0, 1), rng.random() < 0.5  # of the mRNA, in this screen
    for t, gene in enumerate(perturbed.tolist(), start=1):
        mrna = np.clip(remains + 0.15 * rng.standard_normal(), 0, 1)
        function = 0.0 if cas9 else mrna
        hit = rng.random(cells) >= rng.uniform(0, ESCAPE)
        dose[gene, t, hit] = mrna
        if cas9:
            activity[gene, t, hit] = 0.0
        factor = signals_to[gene]
        if factor >= 0:
            activity[factor, t, hit] = 1 - rng.uniform(0.5, 1.0) * (1 - function)
    return simulator.Change(jnp.asarray(dose), jnp.asarray(activity))


def select(rng: np.random.Generator, counts: Int[np.ndarray, "T N G"], perturbed: Int[np.ndarray, "P"],
           genes: int) -> tuple[Float[np.ndarray, "T N D"], Int[np.ndarray, "D"]]:
    """Log-expression of the perturbed genes and the markers, by the functions that prepare real cells; and which genes
    they are. Some conditions have no say."""
    conditions, cells, size = counts.shape
    names = [f"g{i}" for i in range(size)]
    treatments = ["control"] + [names[gene] for gene in perturbed]
    known = np.concatenate([[True], rng.permutation(len(perturbed)) < 0.7 * len(perturbed)])
    obs = pd.DataFrame({"treatment": np.repeat(treatments, cells), "system": "panel", "use": TRAIN},
                       index=[str(i) for i in range(conditions * cells)])
    screen = anndata.AnnData(counts.reshape(-1, size).astype(np.float32), obs, pd.DataFrame(index=names))
    seen = np.repeat(known, cells)
    with warnings.catch_warnings(action="ignore"):  # of cells without counts, which real screens have dropped
        data.normalise(screen, seen)
    strength = data.rank_genes(screen[seen].copy(), "control")
    targets, markers = data.choose_genes(strength, set(treatments[1:]), genes)
    chosen = screen[:, targets + markers].X
    return chosen.reshape(conditions, cells, genes), np.array([int(name[1:]) for name in targets + markers])


def simulate(rng: np.random.Generator, key, network, rates: Float[np.ndarray, "G"], genes: int,
             cells: int) -> list[Float[np.ndarray, "n D"]]:
    """Log-expression of a screen of D = `genes` genes: its control, and for each gene its knock-out, without cells if
    it was not perturbed. `network` (prior.Network) has LARGER times as many; `rates`: production without regulators."""
    strength, factors, signals_to = add_pathways(rng, network.strength)
    basal, size = np.where(strength.any(axis=1), 0.0, rates), len(rates)
    kinetics = simulator.pack(strength, network.hill, basal, network.decay, network.process_noise, fill=4)
    members = np.concatenate([factors, np.flatnonzero(signals_to >= 0)])
    perturbed = choose_perturbed(rng, strength, members, genes)
    change = changes(rng, perturbed, signals_to, 1 + min(PERTURBED[1], genes), cells)  # as many in all: compiled once
    expression = np.asarray(simulator.conditions(kinetics, change, cells, key=key), np.float64)[: 1 + len(perturbed)]
    library = rng.uniform(*LIBRARY) + np.log(size / 50), network.library[1]
    counts = simulator.technical_noise(rng, expression, network.outlier, library, rng.uniform(*DROPOUT))
    log_expression, chosen = select(rng, counts, perturbed, genes)
    found = [log_expression[0]]
    for gene in chosen.tolist():
        t = 1 + np.flatnonzero(perturbed == gene)
        found.append(log_expression[t].reshape(-1, genes))
    return found
