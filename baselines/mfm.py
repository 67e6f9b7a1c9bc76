"""Meta flow matching, MFM (Atanackovic et al., 2025): a flow that carries control cells to treated cells, told by an
embedding of the whole control population which population it is.

Paper: 5.2, C.1, C.3; conditions on the treatment and on the control population (Table 1), not on the system's number,
so that a system never trained on is like any other. A graph network embeds the control cells; a second network gives
the velocity of a cell, from the cell, the time, the treatment and the embedding. To predict, embed the control cells
once, then solve the ODE from each of them. Reads and writes nothing; `fitting.py` has the loop. Departures, marked
where they happen: D35, D37.

    paper        name here       shape     meaning
    x0, x1       controls,       n D       source cells, cells of one condition, paired at random (no optimal transport)
                 treated
    x_t          x               D         (1 - t) x0 + t x1, a cell on its way
    t            time                      flow time, 0 control, 1 treated
    phi          embedding       E         of a population of control cells, of length 1
    v            velocity        D         dx / dt, learnt from x1 - x0

    B conditions of an update   n cells of a batch   N cells of a prediction   D genes   E embedding   K neighbours
    F random frequencies   W width
"""

import functools
import math
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from baselines import fitting
from model import time_features


@dataclass(frozen=True)
class Options(fitting.Length):
    """Hyperparameters; the defaults are the method's own, or chosen here where no source states one."""
    neighbours: int = 50         # K of the graph (released code), of {0, 10, 50, 100} (Table 7); 0: none
    embedding: int = 64          # E, of {64, 128, 256} (Table 7)
    width: int = 512             # of the velocity network (MFM)
    layers: int = 7              # of the velocity network, without the last linear one (MFM)
    features: int = 128          # of time, and frequencies F of x (MFM)
    updates: int = 50_000        # of each network, at most (released code; 25,000 on linear SCMs) [D37]
    batch: int = 200             # cells n per condition (released code; 500 on linear SCMs)
    conditions: int = 10         # conditions whose gradients are averaged (released code)
    learning_rate: float = 1e-4  # of both Adams (MFM)
    tolerance: float = 1e-4      # relative and absolute, of the ODE solver (MFM)
    unseen: str = "zero"         # one-hot of what was never trained on: "zero", or "random" as initialised [D35]


# ------------------------------------------------------------------------------------------- the population's embedding


def nearest(x: Float[Array, "n D"], neighbours: int) -> Int[Array, "n K"]:
    """Indices of the K nearest other cells of each cell; K = n - 1 if there are no more."""
    norm = (x**2).sum(axis=-1)
    distance = norm[:, None] + norm - 2 * x @ x.T  # n n, squared
    distance = jnp.where(jnp.eye(len(x), dtype=bool), jnp.inf, distance)
    return jax.lax.top_k(-distance, min(neighbours, len(x) - 1))[1]


class Encoder(eqx.Module):
    """Control cells to the embedding of their population, in any number and any order."""

    layers: tuple[eqx.nn.Linear, eqx.nn.Linear]
    neighbours: int = eqx.field(static=True)

    def __init__(self, genes: int, embedding: int, neighbours: int, *, key: PRNGKeyArray):
        key_first, key_second = jr.split(key)
        self.layers = (eqx.nn.Linear(genes, embedding, key=key_first),
                       eqx.nn.Linear(embedding, embedding, key=key_second))
        self.neighbours = neighbours

    def __call__(self, x: Float[Array, "n D"]) -> Float[Array, "E"]:
        """phi: two graph convolutions, each the mean over a cell and its neighbours, then linear and ReLU."""
        index = nearest(x, self.neighbours)  # n K, the same graph for both
        for layer in self.layers:
            x = (x + x[index].sum(axis=1)) / (1 + index.shape[1])  # with K = 0 a DeepSet
            x = jax.nn.relu(jax.vmap(layer)(x))  # n E
        phi = x.mean(axis=0)
        # The small number keeps the gradient finite if every ReLU is off; then phi is zero.
        return phi / jnp.sqrt((phi**2).sum() + 1e-12)


# ------------------------------------------------------------------------------------------------------------- the flow


class Flow(eqx.Module):
    """The velocity of one cell: a residual SELU network."""

    frequencies: Float[Array, "F D"]  # drawn once, never trained
    first: eqx.nn.Linear
    hidden: eqx.nn.Linear             # all in one, each parameter with a leading layer axis
    last: eqx.nn.Linear

    def __init__(self, genes: int, options: Options, *, key: PRNGKeyArray):
        key_frequencies, key_first, key_hidden, key_last = jr.split(key, 4)
        self.frequencies = 0.01 * jr.normal(key_frequencies, (options.features, genes))
        inputs = options.embedding + 3 * options.features + 2 * genes
        self.first = eqx.nn.Linear(inputs, options.width, key=key_first)

        def layer(key):
            return eqx.nn.Linear(options.width, options.width, key=key)

        self.hidden = eqx.filter_vmap(layer)(jr.split(key_hidden, options.layers - 1))
        self.last = eqx.nn.Linear(options.width, genes, key=key_last)

    def __call__(self, x: Float[Array, "D"], time: Float[Array, ""], embedding: Float[Array, "E"],
                 treatment: Float[Array, "D"]) -> Float[Array, "D"]:
        angle = 2 * math.pi * jax.lax.stop_gradient(self.frequencies) @ x  # F: small angles, so smooth in x
        # Time with angles up to 10 t: with more, the velocity is so rough in time that the solver needs many steps.
        features = time_features(time / 10, len(angle))
        h = jnp.concatenate([embedding, features, jnp.cos(angle), jnp.sin(angle), x, treatment])
        h = jax.nn.selu(self.first(h))  # W

        def residual(h, layer):
            return h + jax.nn.selu(layer(h)), None

        h, _ = jax.lax.scan(residual, h, self.hidden)
        return self.last(h)


def condition_loss(encoder: Encoder, flow: Flow, batch: fitting.Batch, key: PRNGKeyArray) -> Float[Array, ""]:
    """Flow matching on n pairs of one condition: mean over cells and genes of (v - (x1 - x0))^2."""
    time = jr.uniform(key, (len(batch.controls), 1))  # n 1
    x = (1 - time) * batch.controls + time * batch.treated
    velocity = jax.vmap(flow, (0, 0, None, None))(x, time[:, 0], encoder(batch.controls), batch.treatment)
    return jnp.mean((velocity - (batch.treated - batch.controls)) ** 2)


def encoder_loss(encoder: Encoder, flow: Flow, batches: fitting.Batch, keys: Key[Array, "B"]) -> Float[Array, ""]:
    """Mean of `condition_loss` over B conditions. The gradient is the encoder's: the flow is a constant to it."""
    return jax.vmap(condition_loss, (None, None, 0, 0))(encoder, flow, batches, keys).mean()


def flow_loss(flow: Flow, encoder: Encoder, batches: fitting.Batch, keys: Key[Array, "B"]) -> Float[Array, ""]:
    """The same, but the gradient is the flow's."""
    return encoder_loss(encoder, flow, batches, keys)


def draw(data: fitting.Cells, options: Options, *,
         key: PRNGKeyArray) -> tuple[fitting.Batch, Key[Array, "B"]]:
    """B conditions, and a key for each of them."""
    key_draw, key_time = jr.split(key)
    batches = fitting.draw_many(data, options.batch, options.conditions, key=key_draw)
    return batches, jr.split(key_time, options.conditions)


class MFM(fitting.Trained):
    """Meta flow matching. A population of fewer than K + 1 cells is a complete graph."""

    Options = Options
    conditions_on = ("treatment", "controls")  # Table 1
    grid = {"neighbours": (0, 10, 50, 100), "embedding": (64, 128, 256)}  # Table 7

    def __init__(self, screen, rng, options):
        super().__init__(screen, rng, options)
        self.parameters -= self.networks[1].frequencies.size  # which are not trained

    @staticmethod
    @eqx.filter_jit
    def build(options, level, systems, log_expression, *, key):
        """Encoder and flow."""
        key_encoder, key_flow = jr.split(key)
        encoder = Encoder(len(level), options.embedding, options.neighbours, key=key_encoder)
        return encoder, Flow(len(level), options, key=key_flow)

    @staticmethod
    @functools.cache
    def make_step(options):
        """Alternate: one update of the flow with the encoder held, then one of the encoder with the flow held.

        [D37] paper: silent; released code: likewise, and its 50,000 (linear SCMs) or 100,000 steps count both; here:
        `updates` counts pairs of them, so that there are half as many.
        """
        adam = optax.adam(options.learning_rate)

        def step(state, data, i, key):
            (encoder, flow), (encoder_adam, flow_adam) = state
            key_flow, key_encoder = jr.split(key)
            batches, keys = draw(data, options, key=key_flow)
            value, gradient = eqx.filter_value_and_grad(flow_loss)(flow, encoder, batches, keys)
            flow, flow_adam = fitting.update(adam, gradient, flow, flow_adam)
            batches, keys = draw(data, options, key=key_encoder)
            gradient = eqx.filter_grad(encoder_loss)(encoder, flow, batches, keys)
            encoder, encoder_adam = fitting.update(adam, gradient, encoder, encoder_adam)
            return ((encoder, flow), (encoder_adam, flow_adam)), value

        return (adam, adam), step

    @staticmethod
    @eqx.filter_jit
    def carry(networks, options, controls, treatment, system, *, key):
        """The ODE dx/dt = v from every control cell at t = 0 to t = 1; the step size fits all cells at once."""
        encoder, flow = networks
        embedding = encoder(controls)

        def velocity(x, time):
            return jax.vmap(flow, (0, None, None, None))(x, time, embedding, treatment)

        return fitting.integrate(velocity, controls, options.tolerance)
