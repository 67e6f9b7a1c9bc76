"""A simulator of gene regulatory networks of our own, beside sergio-rs: all knock-outs and cells of a network at once.

Paper: B.2 and Table 6 say what is simulated; the model is SERGIO's (Dibaeinia and Sinha, 2020). `prior.py causal` calls
it. Reads and writes nothing. Departure: D57.

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
                dose        D       share of a gene's production that is left, per condition: 0 is a whole knock-out
                activity    D       share of a gene's effect on its targets that is left

    T conditions   N cells   D genes   E edges
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

TIME, STEPS = 4.0, 40  # from the steady state on: several times 1 / lambda, and steps short beside it


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
    """What a condition does to each gene, in each cell: *N is 1 if cells do not differ."""
    dose: Float[Array, "*N D"]
    activity: Float[Array, "*N D"]


def production(k: Kinetics, x: Float[Array, "*N D"], change: Change) -> Float[Array, "*N D"]:
    """P(x) of each gene."""
    regulator = (x * change.activity)[..., k.source]  # N E
    # (x / h)^n by logarithms; a regulator that is absent has no effect, or represses nothing
    ratio = jnp.exp(k.hill * jnp.log(jnp.maximum(regulator, 1e-9) / k.half))
    share = ratio / (1 + ratio)
    effect = jnp.where(k.strength > 0, k.strength * share, -k.strength * (1 - share))
    total = jnp.zeros_like(x).at[..., k.target].add(effect)
    return change.dose * (k.basal + total)


def steady_state(k: Kinetics, change: Change) -> Float[Array, "*N D"]:
    """Where production and decay are equal without noise. Each round carries it one edge further down a graph without
    cycles, and there are at most as many as genes."""
    def once(_, x):
        return production(k, x, change) / k.decay

    return jax.lax.fori_loop(0, len(k.decay), once, jnp.broadcast_to(k.basal / k.decay, change.dose.shape))


def half_responses(k: Kinetics) -> Float[Array, "E"]:
    """h of each edge: what the regulator has at the steady state if all regulators are at half of their effect."""
    halves = jnp.zeros_like(k.decay).at[k.target].add(jnp.abs(k.strength) / 2)
    return jnp.maximum((k.basal + halves) / k.decay, 1e-6)[k.source]


@functools.partial(jax.jit, static_argnames=("cells", "steps"))
def langevin(k: Kinetics, change: Change, cells: int, steps: int = STEPS, *,
             key: PRNGKeyArray) -> Float[Array, "N D"]:
    """Cells of one condition, each a trajectory of its own, by Euler and Maruyama from the steady state on. The same
    key gives the same noise, whatever is done to the network."""
    dt = TIME / steps
    start = jnp.broadcast_to(steady_state(k, change), (cells, len(k.decay)))

    def step(x, key):
        made, lost = production(k, x, change), k.decay * x
        kick = jr.normal(key, (2, *x.shape)) * jnp.sqrt(jnp.stack([made, lost]) * dt)
        return jnp.maximum(x + (made - lost) * dt + k.noise * kick.sum(axis=0), 0), None

    return jax.lax.scan(step, start, jr.split(key, steps))[0]


def pack(strength: Float[np.ndarray, "D D"], hill: Float[np.ndarray, "D D"], basal: Float[np.ndarray, "D"],
         decay: Float[np.ndarray, "D"], noise: float) -> Kinetics:
    """A network whose matrices have a row for each target. The number of edges is filled up to a multiple of D, so that
    most networks of as many genes compile once; half-responses are those of the network as it is."""
    target, source = np.nonzero(strength)
    fill = -len(target) % len(decay)
    empty = np.zeros(fill, int)
    values = [np.concatenate([strength[target, source], empty]), np.ones(len(target) + fill),
              np.concatenate([hill[target, source], empty + 1]), basal, decay, noise]
    places = [np.concatenate([edges, empty]) for edges in (source, target)]
    k = Kinetics(*map(jnp.asarray, places), *(jnp.asarray(value, jnp.float32) for value in values))
    return k._replace(half=half_responses(k))


@functools.partial(jax.jit, static_argnames=("cells", "steps"))
def knock_outs(k: Kinetics, cells: int, steps: int = STEPS, *, key: PRNGKeyArray) -> Float[Array, "T N D"]:
    """Cells of control and of the whole knock-out of each gene, T = D + 1. Cell n has the same noise in all
    conditions."""
    genes = len(k.decay)
    dose = jnp.concatenate([jnp.ones((1, genes)), 1 - jnp.eye(genes)])[:, None]  # T 1 D

    def one(dose):
        return langevin(k, Change(dose, jnp.ones_like(dose)), cells, steps, key=key)

    return jax.vmap(one)(dose)


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
