"""STATE's state-transition model (Adduri et al., 2025): a transformer over a set of control cells.

Paper: 5.2, C.1; conditions on the treatment and on the control population, which it sees through attention between its
cells (Table 1). A set of random control cells of one system goes in, each with the treatment's embedding added; as many
cells come out, and the loss is the energy distance between them and random treated cells of that system. No cell has a
partner and none knows its position. As in the paper, on expression values (C.1), without the embedding model for whole
transcriptomes. Reads and writes nothing; `fitting.py` has the loop. Departures, marked where they happen: D35, D46,
D47, D48.

    paper      name here      shape     meaning
    x          controls       n D       set of control cells
    t          treatment      D         one-hot times the do-value; zeros for control
    h          h              n E       basal(x) + perturbation(t), then what the transformer makes of them
    y-hat      cells          n D       project(h + basal(x)): the set under the treatment

    B sets of an update   n cells of a set   N cells of a prediction   D genes   E width   H heads
"""

import functools
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from baselines import fitting


@dataclass(frozen=True)
class Options(fitting.Length):
    """Hyperparameters of STATE.

    [D46] paper: "published reference configurations", not stated; here: sizes close to MapPFN's own (A.1).
    """
    width: int = 256                        # E of every layer [D46]
    depth: int = 4                          # blocks [D46]
    heads: int = 4                          # H [D46]
    sets: int = 16                          # B of an update (reference configuration)
    updates: int = 40_000                   # at most [D46]
    batch: int = 200                        # cells n of a set: as many as are compared (B.3)
    learning_rate: float = 1e-4             # Adam (reference configuration)
    clip: float = 10.0                      # largest global gradient norm (reference configuration)
    start_at_mean: bool = True              # of the training cells; False: start near zero [D47]
    unseen: str = "zero"                    # one-hot of what was never trained on: "zero", or "random" [D35]


# ---------------------------------------------------------------------------------------------------------- the network


class Block(eqx.Module):
    """Self-attention between the cells of a set, then a gated network for each; RMS norm before both, no biases."""

    attention_norm: eqx.nn.RMSNorm
    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    network_norm: eqx.nn.RMSNorm
    expand: eqx.nn.Linear     # to twice 4 E: the gates and what they let through (SwiGLU; Shazeer, 2020)
    contract: eqx.nn.Linear
    heads: int = eqx.field(static=True)

    def __init__(self, width: int, heads: int, *, key: PRNGKeyArray):
        linear = functools.partial(eqx.nn.Linear, use_bias=False)
        keys = jr.split(key, 4)
        self.heads = heads
        self.attention_norm = eqx.nn.RMSNorm(width, use_bias=False)
        self.qkv = linear(width, 3 * width, key=keys[0])
        self.out = linear(width, width, key=keys[1])
        self.network_norm = eqx.nn.RMSNorm(width, use_bias=False)
        self.expand = linear(width, 8 * width, key=keys[2])
        self.contract = linear(4 * width, width, key=keys[3])

    def __call__(self, h: Float[Array, "n E"]) -> Float[Array, "n E"]:
        qkv = jax.vmap(self.qkv)(jax.vmap(self.attention_norm)(h))
        q, k, v = jnp.moveaxis(qkv.reshape(len(h), 3, self.heads, -1), 1, 0)  # each n H E/H
        attended = jax.nn.dot_product_attention(q, k, v)  # no mask: every cell sees every other, in both directions
        h = h + jax.vmap(self.out)(attended.reshape(h.shape))
        expanded = jax.vmap(self.expand)(jax.vmap(self.network_norm)(h))
        gate, value = jnp.split(expanded, 2, axis=-1)  # each n 4E
        return h + jax.vmap(self.contract)(jax.nn.silu(gate) * value)


class SetTransformer(eqx.Module):
    """One set of control cells, all under the same treatment -> a set of treated cells."""

    basal: eqx.nn.MLP
    perturbation: eqx.nn.MLP
    blocks: tuple[Block, ...]
    norm: eqx.nn.RMSNorm
    project: eqx.nn.MLP
    log_expression: bool = eqx.field(static=True)

    def __init__(self, genes: int, log_expression: bool, options: Options, *, key: PRNGKeyArray):
        """Raises ValueError if the width is no multiple of the number of heads."""
        if options.width % options.heads:
            raise ValueError(f"width {options.width} must be a multiple of the number of heads ({options.heads})")
        keys, width = jr.split(key, 3 + options.depth), options.width
        mlp = functools.partial(eqx.nn.MLP, width_size=width, depth=1, activation=jax.nn.gelu)
        self.basal = mlp(genes, width, key=keys[0])
        self.perturbation = mlp(genes, width, key=keys[1])
        self.blocks = tuple(Block(width, options.heads, key=k) for k in keys[3:])
        self.norm = eqx.nn.RMSNorm(width, use_bias=False)
        self.project = mlp(width, genes, key=keys[2])
        self.log_expression = log_expression

    def __call__(self, controls: Float[Array, "n D"], treatment: Float[Array, "D"]) -> Float[Array, "n D"]:
        basal = jax.vmap(self.basal)(controls)
        h = basal + self.perturbation(treatment)
        for block in self.blocks:
            h = block(h)
        # The residual spares the transformer from carrying each cell's own state: it says what changes.
        cells = jax.vmap(self.project)(jax.vmap(self.norm)(h) + basal)
        if self.log_expression:
            cells = jax.nn.relu(cells)  # SCM values may be negative
        return cells


# ------------------------------------------------------------------------------------------------------------- the loss


def mean_distance(x: Float[Array, "n D"], y: Float[Array, "m D"]) -> Float[Array, ""]:
    """Mean Euclidean distance over all pairs, a cell with itself included."""
    squared = ((x[:, None] - y[None]) ** 2).sum(axis=-1)
    # The root's gradient at 0 is infinite, and times 0 it is NaN: zeros must not reach the root, not even in a branch
    # of `where` that is then discarded.
    apart = squared > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0).mean()


def energy_distance(x: Float[Array, "n D"], y: Float[Array, "m D"]) -> Float[Array, ""]:
    """E|x - y| - E|x - x'| / 2 - E|y - y'| / 2 (Szekely & Rizzo): 0 if x and y are the same cells, else positive.

    Pairs of a cell with itself count (as in MMD, metrics.py). In small sets this favours predictions that are a little
    too narrow: with n cells as if their own spread counted 1 - 1/n of what it should.
    """
    return mean_distance(x, y) - mean_distance(x, x) / 2 - mean_distance(y, y) / 2


def loss(network: SetTransformer, sets: fitting.Batch) -> Float[Array, ""]:
    """Mean energy distance between predicted and true sets."""
    predicted = jax.vmap(network)(sets.controls, sets.treatment)
    return jax.vmap(energy_distance)(predicted, sets.treated).mean()


# ----------------------------------------------------------------------------------------------------------- the method


class State(fitting.Trained):
    """STATE. The system is in the cells: its number is not used, so it may be new."""

    Options = Options
    conditions_on = ("treatment", "controls")  # Table 1
    controls_too = True

    @staticmethod
    @eqx.filter_jit
    def build(options, level, systems, log_expression, *, key):
        """The transformer.

        [D47] STATE: outputs start around zero, so that about every second gene is cut off by the ReLU for all
        cells, and without a gradient may stay so; here: they start around the mean of the training cells.
        """
        network = SetTransformer(len(level), log_expression, options, key=key)
        if options.start_at_mean:
            network = eqx.tree_at(lambda n: n.project.layers[-1].bias, network, level)
        return (network,)

    @staticmethod
    @functools.cache
    def make_step(options):
        """One update on B sets, each of one condition; controls are the source, and in their turn a target."""
        adam = optax.chain(optax.clip_by_global_norm(options.clip), optax.adam(options.learning_rate))

        def step(state, data, i, key):
            (network,), (adam_state,) = state
            sets = fitting.draw_many(data, options.batch, options.sets, key=key)
            value, gradient = eqx.filter_value_and_grad(loss)(network, sets)
            network, adam_state = fitting.update(adam, gradient, network, adam_state)
            return ((network,), (adam_state,)), value

        return (adam,), step

    @staticmethod
    @eqx.filter_jit
    def carry(networks, options, controls, treatment, system, *, key):
        """[D48] paper: silent; here: N cells are shared out to sets of the size that was trained on, the last one
        filled up with some of the N again (so one cell alone is a set of copies of it), because the network's answer
        depends on how many cells it sees."""
        network, = networks
        count, size = len(controls), options.batch
        filling = jr.randint(key, (-count % size,), 0, count)
        sets = jnp.concatenate([controls, controls[filling]]).reshape(-1, size, controls.shape[1])
        cells = jax.vmap(network, (0, None))(sets, treatment)  # sets n D
        return cells.reshape(-1, controls.shape[1])[:count]
