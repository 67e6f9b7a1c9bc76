"""A simulator of gene regulatory networks of our own, beside sergio-rs: all knock-outs and cells of a network at once.

Paper: B.2 and Table 6 say what is simulated; the model is SERGIO's (Dibaeinia and Sinha, 2020). `prior.py sergio`,
`causal` and `panel` call it. Reads and writes nothing. Departure: D57.

A gene is produced at a rate P that its regulators set, and decays at a rate lambda. Both are noisy, as counts of
molecules are, which in the limit of many molecules is the chemical Langevin equation

    dx = (P(x) - lambda x) dt + zeta (sqrt(P(x)) dW_1 + sqrt(lambda x) dW_2),     P(x) = b + sum over regulators,

where a regulator of strength k, at half-response h, with Hill coefficient n, adds k x^n / (h^n + x^n) if it activates
(k > 0), and |k| h^n / (h^n + x^n) if it represses (k < 0).

[D57] After a knock-out sergio-rs sets half-responses anew, at the steady state of what remains: every regulator is at
half of its effect again, and only direct targets move. Here everything else stays as it was, half-responses too, so
what falls lets its own targets fall, and effects go on down the graph. Noise is the same in all conditions, cell by
cell: a cell has a true twin in each.

    paper       name here   shape   meaning
                source, target   E  an edge: this gene regulates that one
    k           strength    E       maximal contribution to the production of the target; negative: represses
    h           half        E       expression of the regulator at which it has half of its effect
    gamma       hill        E       Hill coefficient
    b           basal       D       production of genes without regulators
    lambda      decay       D       decay rate
    zeta        noise               amplitude of the noise
                dose        D T N   share of a gene's production that is left: 0 is a whole knock-out
                activity    D T N   share of a gene's effect on its targets that is left

    T conditions   N cells   D genes   E edges
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

REPRESSES = 0.3      # share of edges; in sergio-rs as released all activate
# From the steady state on: 2 to 4 times 1 / lambda, and steps short beside it. Noise moves means away from that state,
# and has then done nearly all of it: at 16 they are lower by some hundredths. How long a step is matters where noise is
# high and expression is often cut at 0: at the prior's most, 1.5, means downstream are 3% higher in steps of half the
# length, and up to 9% in steps of a tenth; at 0.5 no more than Monte-Carlo error (tests/test_simulator.py).
TIME, STEPS = 4.0, 40


class Kinetics(NamedTuple):
    """What a network does; `Change` says what is done to it. Edges of strength 0 fill up to a common number."""
    source: Int[Array, "E"]
    target: Int[Array, "E"]
    strength: Float[Array, "E"]
    half: Float[Array, "E"]
    hill: Float[Array, "E"]
    basal: Float[Array, "D"]
    decay: Float[Array, "D"]
    noise: Float[Array, ""]


class Change(NamedTuple):
    """What is done to each gene: in each condition and each cell, or the same in all, if an axis has length 1."""
    dose: Float[Array, "D *TN"]
    activity: Float[Array, "D *TN"]


def production(k: Kinetics, x: Float[Array, "D *TN"], change: Change) -> Float[Array, "D *TN"]:
    """P(x) of each gene. Genes come first, here and below, because to take and to add rows is fast everywhere."""
    def each(values):  # one for each edge, or gene
        return values.reshape(-1, *[1] * (x.ndim - 1))

    level = jnp.log(jnp.maximum(x * change.activity, 1e-9))  # an absent gene has no effect
    level = level[k.source] - each(jnp.log(k.half))
    # (x / h)^n / (1 + (x / h)^n), or one minus that, is a sigmoid of n log(x / h)
    share = 1 / (1 + jnp.exp(-each(jnp.sign(k.strength) * k.hill) * level))
    total = jnp.zeros_like(x).at[k.target].add(each(jnp.abs(k.strength)) * share)
    return change.dose * (each(k.basal) + total)


def steady_state(k: Kinetics, change: Change) -> Float[Array, "D *TN"]:
    """Where production and decay are equal without noise. Each round carries it one edge further down a graph without
    cycles, and there are at most as many as genes; most graphs need few."""
    decay, basal = (values.reshape(-1, *[1] * (change.dose.ndim - 1)) for values in (k.decay, k.basal))

    def more(state):
        rounds, before, x = state
        return (rounds < len(decay)) & (jnp.abs(x - before) > 1e-5).any()

    def once(state):
        rounds, _, x = state
        return rounds + 1, x, production(k, x, change) / decay

    start = jnp.broadcast_to(basal / decay, change.dose.shape)
    return jax.lax.while_loop(more, once, (0, start - 1, start))[2]


def half_responses(k: Kinetics) -> Float[Array, "E"]:
    """h of each edge: what the regulator has at the steady state if all regulators are at half of their effect."""
    halves = jnp.zeros_like(k.decay).at[k.target].add(jnp.abs(k.strength) / 2)
    return jnp.maximum((k.basal + halves) / k.decay, 1e-6)[k.source]


def langevin(k: Kinetics, change: Change, noise: Float[Array, "steps D 1 N"], dt: float) -> tuple[
        Float[Array, "D T N"], Float[Array, "steps D T N"]]:
    """Where each cell is in the end, and on the way, by Euler and Maruyama from the steady state on. The same noise in
    all conditions."""
    conditions = max(change.dose.shape[1], change.activity.shape[1])
    start = jnp.broadcast_to(steady_state(k, change), (len(k.decay), conditions, noise.shape[-1]))
    decay = k.decay[:, None, None]

    def step(x, noise):
        made, lost = production(k, x, change), decay * x
        kick = k.noise * jnp.sqrt((made + lost) * dt) * noise  # two independent ones are one, with both variances
        x = jnp.maximum(x + (made - lost) * dt + kick, 0)
        return x, x

    return jax.lax.scan(step, start, noise)


def pack(strength: Float[np.ndarray, "D D"], hill: Float[np.ndarray, "D D"], basal: Float[np.ndarray, "D"],
         decay: Float[np.ndarray, "D"], noise: float, fill: int = 1) -> Kinetics:
    """A network whose matrices have a row for each target. The number of edges is filled up to a multiple of `fill` D,
    so that most networks of as many genes compile once; half-responses are those of the network as it is."""
    target, source = np.nonzero(strength)
    missing = -len(target) % (fill * len(decay))
    empty = np.zeros(missing, int)
    values = [np.concatenate([strength[target, source], empty]), np.ones(len(target) + missing),
              np.concatenate([hill[target, source], empty + 1]), basal, decay, noise]
    places = [np.concatenate([edges, empty]) for edges in (source, target)]
    k = Kinetics(*map(jnp.asarray, places), *(jnp.asarray(value, jnp.float32) for value in values))
    return k._replace(half=half_responses(k))


@functools.partial(jax.jit, static_argnames=("cells", "steps"))
def conditions(k: Kinetics, change: Change, cells: int, steps: int = STEPS, *,
               key: PRNGKeyArray) -> Float[Array, "T N D"]:
    """Cells of T conditions, each a trajectory of its own. Cell n has the same noise in all of them."""
    noise = jr.normal(key, (steps, len(k.decay), 1, cells))
    return jnp.moveaxis(langevin(k, change, noise, TIME / steps)[0], 0, -1)


def knock_outs(k: Kinetics, cells: int, steps: int = STEPS, *, key: PRNGKeyArray) -> Float[Array, "T N D"]:
    """Cells of control and of the whole knock-out of each gene, T = D + 1."""
    genes = len(k.decay)
    dose = jnp.concatenate([jnp.ones((genes, 1)), 1 - jnp.eye(genes)], axis=1)[..., None]  # D T 1
    return conditions(k, Change(dose, jnp.ones_like(dose)), cells, steps, key=key)


# ------------------------------------------------------------------------- the same as sergio-rs does it, to compare


def as_sergio(k: Kinetics, gene: Int[Array, ""], rates: Float[Array, "D"]) -> Kinetics:
    """The network after sergio-rs's knock-out of a gene, or, if that is -1, before it: the gene is gone, who lost all
    regulators is produced at a rate of its own (`rates`), and half-responses are those of what is left."""
    gone = jnp.arange(len(k.decay)) == gene
    strength = jnp.where(gone[k.source] | gone[k.target], 0, k.strength)
    regulated = jnp.zeros_like(k.decay).at[k.target].add(jnp.abs(strength)) > 0
    left = k._replace(strength=strength, basal=jnp.where(regulated | gone, 0, rates))
    return left._replace(half=half_responses(left))


@functools.partial(jax.jit, static_argnames="cells")
def sergio_knock_outs(k: Kinetics, rates: Float[Array, "D"], cells: int, *, key: PRNGKeyArray) -> Float[Array, "T N D"]:
    """Cells of control and of each knock-out as sergio-rs 0.2.3 has them: random moments of *one* trajectory of 150 +
    10 N steps of 0.01, so that 200 cells are worth about 8. Knock-outs share their noise, whose rows move up by one
    after the gene that is gone; control has noise of its own. `rates`: of production, for genes without regulators."""
    steps, genes = 150 + 10 * cells, jnp.arange(len(k.decay))
    key_control, key_others, key_moments = jr.split(key, 3)
    of_control, of_others = (jr.normal(key, (steps, len(genes), 1, 1)) for key in (key_control, key_others))
    moments = 150 + jr.permutation(key_moments, 10 * cells)[:cells]
    whole = Change(jnp.ones((len(genes), 1, 1)), jnp.ones((len(genes), 1, 1)))

    def one(gene):
        noise = jnp.where(gene < 0, of_control, of_others[:, genes - (genes > gene)])
        return langevin(as_sergio(k, gene, rates), whole, noise, 0.01)[1][moments, :, 0, 0]

    return jax.vmap(one)(jnp.arange(-1, len(genes)))


# ---------------------------------------------------------------------------------------------------- what is measured


def technical_noise(rng: np.random.Generator, expression: Float[np.ndarray, "T N D"], outlier: float,
                    library: tuple[float, float], dropout: float) -> Int[np.ndarray, "T N D"]:
    """Counts of molecules that are seen, as SERGIO makes them: one gene in a hundred is magnified, a cell's counts add
    up to a log-normal size of library, low expression is lost, and what remains is Poisson. Until there, cell n has
    the same noise in all conditions. A cell that expresses nothing has no counts."""
    _, cells, genes = expression.shape
    magnified = np.where(rng.random(genes) < 0.01, rng.lognormal(outlier, 1.0, genes), 1.0)
    size, lost = rng.lognormal(*library, cells), rng.random((cells, genes))
    x = expression * magnified
    total = x.sum(axis=-1, keepdims=True)
    x = x / np.where(total > 0, total, 1) * size[:, None]
    level = np.log1p(x)
    half = np.percentile(level, dropout, axis=(1, 2), keepdims=True)  # of each condition: there half of the counts go
    kept = lost < 1 / (1 + np.exp(-8.0 * (level - half)))
    return rng.poisson(x * kept)
