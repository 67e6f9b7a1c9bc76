"""A second network, beside the paper's: the same map, equivariant to permutations of genes.

The paper's network has weights for every gene index, and has to learn each gene anew. This one has none: what it learns
of one pair of genes holds for all, and it takes any number of genes, experiments and cells. It is used as MapPFN is:
`train.py --network exchangeable.Exchangeable`, with its own section in the table of scales.

    encoder    once a task: what the cells of all experiments say of each pair of genes (i, j), "what does i do to j?",
               refined by products of such matrices. The query is not needed here: it chooses the row of one gene.
    velocity   for each cell and time: tokens are genes, mixed by matrices that the encoder has written, and added to
               the velocity towards a Gaussian whose mean and spread are the encoder's too. Without training this is
               the Gaussian of the control cells.

    name       shape   meaning (what it is given: model.py)
    pairs      D D C   what is known of gene i and gene j
    genes      2 D E   what is known of each gene, with the query [0] and without [1]

    K experiments   M cells, N generated   D genes   E = C embedding (width)   L blocks (depth)   H matrices (heads)

[D57] What it is worth: beyond.sh. A treatment of zeros is an experiment on an unmeasured gene, a query of zeros is no
knock-out. The null condition drops the query only: guidance exaggerates a knock-out, not how bright a screen is.
"""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from model import Architecture, time_features
from scales import BadInput
from tasks import Given

LEAST, MOST, RIDGE = 0.05, 5.0, 0.1  # standard deviation, of a constant gene; shift in units of it; of correlations


# ----------------------------------------------------------------------------------------- what the cells say (encoder)


def moments(cells: Float[Array, "*K M D"]) -> Float[Array, "3 *K D"]:
    """Mean, standard deviation (at least LEAST) and share of zeros of each gene over cells."""
    return jnp.stack([cells.mean(axis=-2), jnp.maximum(cells.std(axis=-2), LEAST), (cells == 0).mean(axis=-2)])


def correlations(cells: Float[Array, "*K M D"]) -> Float[Array, "*K D D"]:
    """Of genes over cells; 0 where a gene is constant."""
    centred = cells - cells.mean(axis=-2, keepdims=True)
    scaled = centred / jnp.maximum(cells.std(axis=-2, keepdims=True), LEAST)
    return jnp.einsum("...mi,...mj->...ij", scaled, scaled) / cells.shape[-2]


def partial_correlations(correlation: Float[Array, "D D"]) -> Float[Array, "D D"]:
    """Of two genes, given all others; with a ridge, since there may be fewer cells than genes."""
    matrix = correlation + RIDGE * jnp.eye(len(correlation))
    # Newton's iteration for the inverse (Schulz, 1933): LAPACK's, in batches, can hang two devices of a CPU for good.
    precision = jnp.eye(len(matrix)) / jnp.trace(matrix)
    for _ in range(10 + int(math.log2(len(matrix)))):  # each squares the error; RIDGE is the least eigenvalue
        precision = 2 * precision - jnp.einsum("ij,jk,kl->il", precision, matrix, precision, precision="highest")
    scale = jnp.sqrt(jnp.diag(precision))
    return -precision / scale[:, None] / scale


def of_genes(given: Given) -> Float[Array, "D f"]:
    """What the control cells say of each gene."""
    mean, sd, zeros = moments(given.controls)
    return jnp.stack([mean, sd, zeros, jnp.log(sd)], axis=-1)


def of_pairs(given: Given) -> Float[Array, "D D f"]:
    """What all cells say of gene i and gene j. Only here are experiments looked at, as sums over them: K can be 0."""
    (mean, sd, zeros), (means, sds, shares) = moments(given.controls), moments(given.context)
    alone = correlations(given.controls)
    # Each experiment is a sample of its own of how untouched genes go together. A treated gene may be constant in it.
    untouched = 1.0 - (given.context_treatments != 0)  # K D
    total = alone + jnp.einsum("ki,kj,kij->ij", untouched, untouched, correlations(given.context))
    count = jnp.sqrt(1 + untouched.sum(axis=0))
    together = total / count[:, None] / count  # not over the pairs' own count: this has an inverse, whatever K

    standard = jnp.clip((means - mean) / sd, -MOST, MOST)  # K D
    answers = jnp.stack([means - mean, standard, jnp.log(sds / sd), shares - zeros], axis=-1)  # K D 4
    # What do(i) did to j, for a dose of one, where gene i was treated: the least-squares fit to its experiments.
    dose = given.context_treatments
    power = (dose**2).sum(axis=0)  # D
    seen = jnp.einsum("ki,kjf->ijf", dose, answers) / jnp.where(power > 0, power, 1)[:, None, None]
    # How strong are knock-outs in this screen? The share that they took of the expression of their genes, all together.
    lost = jnp.sum((1 - untouched) * (means - mean)) / jnp.maximum(jnp.sum((1 - untouched) * mean), LEAST)
    lost = jnp.clip(lost, -1, 1)
    # Do i and j answer alike? Also to a treatment of an unmeasured gene.
    alike = jnp.einsum("ki,kj->ij", standard, standard) / max(len(standard), 1)

    known = jnp.broadcast_to((power > 0)[:, None], alone.shape)
    about = of_genes(given)
    both = jnp.broadcast_arrays(about[:, None], about[None])
    features = [alone, together, together**2, partial_correlations(alone), partial_correlations(together), alike,
                known, jnp.eye(len(power)), jnp.full_like(alone, lost), jnp.diag(lost * mean)]
    return jnp.concatenate([jnp.stack(features, axis=-1), seen, *both], axis=-1)


# -------------------------------------------------------------------------------------------------------------- layers


def zero(linear: eqx.nn.Linear) -> eqx.nn.Linear:
    """The same layer, which starts by returning nothing."""
    return jax.tree.map(jnp.zeros_like, linear)


def everywhere(layer, x: Float[Array, "*n a"]) -> Float[Array, "*n b"]:
    """A layer, on the last axis."""
    return jax.vmap(layer)(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class PairBlock(eqx.Module):
    """Pairs learn from pairs that share a gene, and then each by itself.

    Three products of matrices, one for each third of the channels: i to k to j, what goes through others; k to i and to
    j, common causes; i and j to k, common effects (as triangle updates for protein structure: Jumper et al., 2021).
    """
    norms: tuple[eqx.nn.LayerNorm, ...]
    factors: eqx.nn.Linear      # C -> both factors, F each, and as many gates
    out: eqx.nn.Linear
    each: eqx.nn.MLP

    def __init__(self, width: int, *, key: PRNGKeyArray):
        k_factors, k_out, k_each = jr.split(key, 3)
        channels = 3 * (width // 3)
        self.norms = eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(channels), eqx.nn.LayerNorm(width)
        self.factors = eqx.nn.Linear(width, 4 * channels, key=k_factors)
        self.out = zero(eqx.nn.Linear(channels, width, key=k_out))
        self.each = eqx.nn.MLP(width, width, 2 * width, 1, activation=jax.nn.gelu, key=k_each)

    def __call__(self, pairs: Float[Array, "D D C"]) -> Float[Array, "D D C"]:
        """The pairs after this block."""
        gates, values = jnp.split(everywhere(self.factors, everywhere(self.norms[0], pairs)), 2, axis=-1)
        left, right = jnp.split(jax.nn.sigmoid(gates) * values, 2, axis=-1)  # D D F each
        (a1, a2, a3), (b1, b2, b3) = jnp.split(left, 3, axis=-1), jnp.split(right, 3, axis=-1)
        through = jnp.einsum("ikf,kjf->ijf", a1, b1)
        causes = jnp.einsum("kif,kjf->ijf", a2, b2)
        effects = jnp.einsum("ikf,jkf->ijf", a3, b3)
        products = jnp.concatenate([through, causes, effects], axis=-1) / math.sqrt(len(pairs))
        pairs = pairs + everywhere(self.out, everywhere(self.norms[1], products))
        return pairs + everywhere(self.each, everywhere(self.norms[2], pairs))


class CellBlock(eqx.Module):
    """Genes of a cell learn from each other, by matrices that the encoder wrote, and then each by itself; before both,
    FiLM by the time and by what is known of the gene."""
    film: eqx.nn.Linear
    values: eqx.nn.Linear
    out: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    each: eqx.nn.MLP

    def __init__(self, width: int, *, key: PRNGKeyArray):
        k_film, k_values, k_out, k_each = jr.split(key, 4)
        self.film = zero(eqx.nn.Linear(width, 4 * width, key=k_film))
        self.values = eqx.nn.Linear(width, width, key=k_values)
        self.out = eqx.nn.Linear(width, width, key=k_out)
        self.norm = eqx.nn.LayerNorm(width, use_weight=False, use_bias=False)
        self.each = eqx.nn.MLP(width, width, 2 * width, 1, activation=jax.nn.gelu, key=k_each)

    def __call__(self, x: Float[Array, "N D E"], about: Float[Array, "D E"],
                 mixing: Float[Array, "H D D"]) -> Float[Array, "N D E"]:
        """The tokens after this block; `about`: time and gene."""
        film = everywhere(self.film, about).reshape(len(about), 4, -1)  # the same for all cells
        y = everywhere(self.norm, x) * (1 + film[:, 0]) + film[:, 1]
        values = everywhere(self.values, y).reshape(*y.shape[:2], len(mixing), -1)  # N D H E/H
        mixed = jnp.einsum("hij,njhe->nihe", mixing, values).reshape(x.shape)
        x = x + everywhere(self.out, mixed)
        y = everywhere(self.norm, x) * (1 + film[:, 2]) + film[:, 3]
        return x + everywhere(self.each, y)


class Condition(NamedTuple):
    """All that does not depend on noise and time; where there are two, with the query and without."""
    genes: Float[Array, "2 D E"]
    mean: Float[Array, "2 D"]        # of the Gaussian that the velocity starts from
    sd: Float[Array, "2 D"]
    mixing: Float[Array, "L H D D"]


class Exchangeable(eqx.Module):
    """v_theta(Y_tau | t_q, Y^obs, C) of equation 3, for one task, without a weight that belongs to a gene."""
    pairs_in: eqx.nn.Linear
    pair_blocks: tuple[PairBlock, ...]
    pair_norm: eqx.nn.LayerNorm
    genes_in: eqx.nn.MLP
    gaussian: eqx.nn.Linear
    mixing: eqx.nn.Linear
    cells_in: eqx.nn.Linear
    time: eqx.nn.MLP
    cell_blocks: tuple[CellBlock, ...]
    velocity_out: eqx.nn.Linear
    a: Architecture = eqx.field(static=True)
    ANY_GENES = True  # model.takes_any_genes

    def __init__(self, a: Architecture, genes: int, *, key: PRNGKeyArray):
        """`genes` changes nothing. Raises BadInput if the sizes do not fit together."""
        if a.heads < 1 or a.depth < 1 or a.width < 4 or a.width % (2 * a.heads):
            raise BadInput(f"width {a.width} must be at least 4, and a multiple of twice the number of heads "
                           f"({a.heads}); depth ({a.depth}) at least 1")
        keys, width = jr.split(key, 7), a.width
        self.pairs_in = eqx.nn.Linear(22, width, key=keys[0])  # features of `of_pairs`
        self.pair_blocks = tuple(PairBlock(width, key=key) for key in jr.split(keys[1], a.depth))
        self.pair_norm = eqx.nn.LayerNorm(width)
        # a gene: itself, what the query does to it, what it does to the query; dose, is it the query, is there one
        self.genes_in = eqx.nn.MLP(4 + 2 * width + 4, width, 2 * width, 1, activation=jax.nn.gelu, key=keys[2])
        self.gaussian = zero(eqx.nn.Linear(width, 2, key=keys[3]))
        self.mixing = eqx.nn.Linear(width, a.depth * a.heads, key=keys[4])
        self.cells_in = eqx.nn.Linear(2, width, key=keys[5])
        k_time, k_blocks, k_out = jr.split(keys[6], 3)
        self.time = eqx.nn.MLP(width, width, 2 * width, 1, activation=jax.nn.silu, key=k_time)
        self.cell_blocks = tuple(CellBlock(width, key=key) for key in jr.split(k_blocks, a.depth))
        self.velocity_out = zero(eqx.nn.Linear(width, 1, key=k_out))
        self.a = a

    def condition(self, given: Given, slots: Int[Array, " K"]) -> Condition:
        """What is known of genes and pairs of genes. `slots`, the order of experiments, says nothing here."""
        about, pairs = of_genes(given), everywhere(self.pairs_in, of_pairs(given))
        for block in self.pair_blocks:
            pairs = block(pairs)
        pairs = everywhere(self.pair_norm, pairs)  # D D C

        def known(query, asked):
            does, undergoes = jnp.einsum("i,ijc->jc", query, pairs), jnp.einsum("i,jic->jc", query, pairs)
            flags = jnp.stack([query, query != 0, jnp.full_like(query, query.sum()), jnp.full_like(query, asked)], -1)
            genes = everywhere(self.genes_in, jnp.concatenate([about, does, undergoes, flags], axis=-1))
            shift, stretch = everywhere(self.gaussian, genes).T
            mean, sd, _ = moments(given.controls)
            return genes, mean + shift, jnp.maximum(sd * jnp.exp(jnp.clip(stretch, -3, 3)), LEAST)

        with_query, without = known(given.query, 1.0), known(jnp.zeros_like(given.query), 0.0)
        both = [jnp.stack(fields) for fields in zip(with_query, without)]
        mixing = everywhere(self.mixing, pairs) / math.sqrt(len(about))  # D D L*H
        mixing = jnp.moveaxis(mixing, -1, 0).reshape(self.a.depth, self.a.heads, *pairs.shape[:2])
        return Condition(*both, mixing)

    def __call__(self, y_tau: Float[Array, "N D"], tau: Float[Array, ""], condition: Condition,
                 drop: Bool[Array, ""]) -> Float[Array, "N D"]:
        """Velocity of each cell (equation 3). `drop` True: as if nobody had said what is asked for."""
        genes, mean, sd = (both[drop.astype(int)] for both in condition[:3])
        variance = tau**2 * sd**2 + (1 - tau) ** 2  # of Y_tau, if Y is the Gaussian
        residual = y_tau - tau * mean
        gaussian = mean + (tau * sd**2 - (1 - tau)) / variance * residual  # E[Y - Y_0 | Y_tau]
        x = everywhere(self.cells_in, jnp.stack([residual / jnp.sqrt(variance), y_tau], axis=-1)) + genes
        about = genes + self.time(time_features(tau, self.a.width))
        for block, mixing in zip(self.cell_blocks, condition.mixing):
            x = block(x, about, mixing)
        return gaussian + everywhere(self.velocity_out, x)[..., 0]
