"""STATE's state-transition model (Adduri et al., 2025): a transformer over a set of control cells.

Paper: 5.2, C.1; conditions on the treatment and on the control population, which it sees through attention between its
cells (Table 1); the context is nothing else. Reads and writes nothing. A set of random control cells of one context
goes in, each with the treatment's embedding added; as many cells come out, and the loss is the energy distance between
them and random treated cells of that context. No cell has a partner and none knows its position. As in the paper, on
expression values (C.1), without the embedding model for whole transcriptomes. Departures, marked where they happen:
D46, D47, D48, D35.

    symbol     name here      shape     meaning
    x          controls       S D       set of control cells
    t          treatment      D         one-hot times the do-value; zeros for control
    h          tokens         S E       basal(x) + perturbation(t), then what the transformer makes of them
    y-hat      cells          S D       project(h + basal(x)): the set under the treatment

    B sets of an update   S cells of a set   D genes   E width   H heads
"""

import functools
from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from baselines import fitting
from data import Screen


@dataclass(frozen=True)
class Options:
    """Hyperparameters of STATE.

    [D46] paper: "published reference configurations", not stated; here: sizes close to MapPFN's own (A.1).
    """
    width: int = 256                        # E of every layer [D46]
    depth: int = 4                          # blocks [D46]
    heads: int = 4                          # H [D46]
    sets: int = 16                          # B of an update (reference configuration)
    updates: int = 40_000                   # [D46]
    batch: int = 200                        # cells S of a set: as many as are compared (B.3)
    learning_rate: float = 1e-4             # Adam (reference configuration)
    clip: float = 10.0                      # largest global gradient norm (reference configuration)
    start_at_mean: bool = True              # of the training cells; False: start near zero [D47]
    unseen: Literal["zero", "random"] = "zero"    # what a treatment never trained on adds, see `State.predict`


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
        norm = functools.partial(eqx.nn.RMSNorm, use_bias=False)
        keys = jr.split(key, 4)
        self.attention_norm, self.network_norm, self.heads = norm(width), norm(width), heads
        self.qkv, self.out = linear(width, 3 * width, key=keys[0]), linear(width, width, key=keys[1])
        self.expand, self.contract = linear(width, 8 * width, key=keys[2]), linear(4 * width, width, key=keys[3])

    def __call__(self, h: Float[Array, "S E"]) -> Float[Array, "S E"]:
        qkv = jax.vmap(self.qkv)(jax.vmap(self.attention_norm)(h))
        q, k, v = (x.reshape(len(h), self.heads, -1) for x in jnp.split(qkv, 3, axis=-1))  # each S H E/H
        attended = jax.nn.dot_product_attention(q, k, v)  # no mask: every cell sees every other, in both directions
        h = h + jax.vmap(self.out)(attended.reshape(h.shape))
        gate, value = jnp.split(jax.vmap(self.expand)(jax.vmap(self.network_norm)(h)), 2, axis=-1)  # each S 4E
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
        self.basal, self.perturbation = mlp(genes, width, key=keys[0]), mlp(genes, width, key=keys[1])
        self.blocks = tuple(Block(width, options.heads, key=k) for k in keys[3:])
        self.norm, self.project = eqx.nn.RMSNorm(width, use_bias=False), mlp(width, genes, key=keys[2])
        self.log_expression = log_expression

    def __call__(self, controls: Float[Array, "S D"], treatment: Float[Array, "D"]) -> Float[Array, "S D"]:
        basal = jax.vmap(self.basal)(controls)
        h = basal + self.perturbation(treatment)
        for block in self.blocks:
            h = block(h)
        # The residual spares the transformer from carrying each cell's own state: it says what changes.
        cells = jax.vmap(self.project)(jax.vmap(self.norm)(h) + basal)
        return jax.nn.relu(cells) if self.log_expression else cells  # SCM values may be negative


# ------------------------------------------------------------------------------------------------------------- the loss


def mean_distance(x: Float[Array, "n D"], y: Float[Array, "m D"]) -> Float[Array, ""]:
    """Mean Euclidean distance over all pairs, a cell with itself included."""
    squared = ((x[:, None] - y[None]) ** 2).sum(-1)
    # The root's gradient at 0 is infinite, and times 0 it is NaN: zeros must not reach the root, not even in a branch
    # of `where` that is then discarded.
    apart = squared > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0).mean()


def energy_distance(x: Float[Array, "n D"], y: Float[Array, "m D"]) -> Float[Array, ""]:
    """E|x - y| - E|x - x'| / 2 - E|y - y'| / 2 (Szekely & Rizzo): 0 if x and y are the same cells, else positive.

    Pairs of a cell with itself count (as in MMD, metrics.py). In small sets this favours predictions that are a little
    too narrow: with S cells as if their own spread counted 1 - 1/S of what it should.
    """
    return mean_distance(x, y) - mean_distance(x, x) / 2 - mean_distance(y, y) / 2


def optimiser(options: Options) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(options.clip), optax.adam(options.learning_rate))


@eqx.filter_jit  # many small random draws, compiled at once
def initial_state(level: Float[Array, "D"], log_expression: bool, options: Options, key: PRNGKeyArray):
    """Network and optimiser before the first update; `level` is the mean of the training cells.

    [D47] STATE: outputs start around zero, so that about every second gene is cut off by the ReLU for all
    cells, and without a gradient may stay so; here: they start around the mean of the training cells.
    """
    network = SetTransformer(len(level), log_expression, options, key=key)
    if options.start_at_mean:
        network = eqx.tree_at(lambda n: n.project.layers[-1].bias, network, level)
    return network, optimiser(options).init(eqx.filter(network, eqx.is_array))


@functools.cache
def make_step(options: Options) -> fitting.Step:
    """One update on B sets, each of one condition; control cells are the source, and in their turn a target."""
    def loss(network: SetTransformer, sets: fitting.Batch) -> Float[Array, ""]:
        return jax.vmap(energy_distance)(jax.vmap(network)(sets.controls, sets.treatment), sets.treated).mean()

    def step(state, data: fitting.Cells, i: Int[Array, ""], key: PRNGKeyArray):
        network, adam = state
        sets = jax.vmap(lambda key: fitting.draw(data, options.batch, key=key))(jr.split(key, options.sets))
        value, gradient = eqx.filter_value_and_grad(loss)(network, sets)
        updates, adam = optimiser(options).update(gradient, adam)
        return (eqx.apply_updates(network, updates), adam), value

    return step


# ----------------------------------------------------------------------------------------------------------- the method


@eqx.filter_jit
def transition(network: SetTransformer, controls: Float[Array, "B S D"], treatment: Float[Array, "D"],
               ) -> Float[Array, "B S D"]:
    """Several sets under the same treatment."""
    return jax.vmap(network, (0, None))(controls, treatment)


class State:
    """Fitted to the training conditions and to the control cells of all contexts."""

    conditions_on = ("treatment", "controls")  # Table 1

    def __init__(self, screen: Screen, rng: np.random.Generator, options: Options = Options()):
        """Raises BadInput if there is no training condition, or the loss does not stay finite."""
        self.options, self.log_expression, self.seen = options, screen.log_expression, fitting.seen_genes(screen)
        data = fitting.training_cells(screen, controls_too=True)
        key_network, key_fit = jr.split(jr.key(int(rng.integers(2**31))))
        state = initial_state(jnp.nanmean(data.cells, axis=0), screen.log_expression, options, key_network)
        self.parameters = fitting.count_parameters(state[0])
        self.network, _ = fitting.fit("STATE", make_step(options), state, data, options.updates, key=key_fit)

    def predict(self, controls: Float[np.ndarray, "N D"], context: int, treatment: Float[np.ndarray, "D"],
                rng: np.random.Generator) -> Float[np.ndarray, "N D"]:
        """One cell for each control cell. The context is in the cells: its index is not used, so it may be new.

        [D48] paper: silent; here: N cells are shared out to sets of the size that was trained on, the last one
        filled up with some of the N again (so one cell alone is a set of copies of it), because the network's answer
        depends on how many cells it sees. A gene never treated in training predicts control cells, unless unseen =
        "random".
        """
        if self.options.unseen == "zero":  # [D35] released code: its column is as initialised, which is noise
            treatment = treatment * self.seen
        n, size = len(controls), self.options.batch
        rows = np.concatenate([np.arange(n), rng.integers(n, size=-n % size)])
        sets = jnp.asarray(controls[rows].reshape(-1, size, controls.shape[1]), jnp.float32)
        cells = np.array(transition(self.network, sets, jnp.asarray(treatment, jnp.float32)))
        return cells.reshape(-1, controls.shape[1])[:n]
