"""Meta flow matching, MFM (Atanackovic et al., 2025): a flow that carries control cells to treated cells, told by an
embedding of the whole control population which population it is.

Paper: 5.2, C.1, C.3; conditions on the treatment and on the control population (Table 1), not on the context's number,
so that a context never trained on is like any other. A graph network embeds the control cells; a second network gives
the velocity of a cell, from the cell, the time, the treatment and the embedding. To predict, embed the control cells
once, then solve the ODE from each of them. Reads and writes nothing. Departures, marked where they happen: D35, D37.

    symbol       name here       shape     meaning
    x0, x1       controls,       n D       source cells, cells of one condition, paired at random (no optimal transport)
                 treated
    x_t          x               D         (1 - t) x0 + t x1, a cell on its way
    t            time                      flow time, 0 control, 1 treated
    phi          embedding       E         of a population of control cells, of length 1
    v            velocity        D         dx / dt, learnt from x1 - x0

    n cells of a batch   N cells of a prediction   D genes   E embedding   K neighbours   F random frequencies   W width
"""

import functools
import math
from dataclasses import dataclass

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from baselines import fitting
from data import Screen
from model import time_features


@dataclass(frozen=True)
class Options:
    """Hyperparameters; the defaults are the method's own, or chosen here where no source states one."""
    neighbours: int = 10         # K of the graph, of {0, 10, 50, 100}; 0: a cell sees itself only (Table 7)
    embedding: int = 64          # E, of {64, 128, 256} (Table 7)
    width: int = 512             # of the velocity network (MFM)
    layers: int = 7              # of the velocity network, without the last linear one (MFM)
    features: int = 128          # of time, and frequencies F of x (MFM)
    updates: int = 50_000        # of each network (chosen here: as many as MapPFN's micro-batches, A.2)
    batch: int = 200             # cells n per condition: a population of the evaluation (B.3)
    conditions: int = 1          # conditions whose gradients are averaged (chosen here)
    learning_rate: float = 1e-4  # of both Adams (MFM)
    tolerance: float = 1e-4      # relative and absolute, of the ODE solver (MFM)
    unseen: str = "zero"         # one-hot of a treatment never trained on: "zero", or "random" as initialised


# ------------------------------------------------------------------------------------------- the population's embedding


def nearest(x: Float[Array, "n D"], neighbours: int) -> Int[Array, "n K"]:
    """Indices of the K nearest other cells of each cell; K = n - 1 if there are no more."""
    norm = (x**2).sum(-1)
    distance = norm[:, None] + norm - 2 * x @ x.T                                  # n n, squared
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

    def __call__(self, x: Float[Array, "n D"]) -> Float[Array, " E"]:
        """phi: two graph convolutions, each the mean over a cell and its neighbours, then linear and ReLU."""
        index = nearest(x, self.neighbours)                                        # n K, the same graph for both
        for layer in self.layers:
            x = (x + x[index].sum(1)) / (1 + index.shape[1])                       # with K = 0 a DeepSet
            x = jax.nn.relu(jax.vmap(layer)(x))                                    # n E
        phi = x.mean(0)
        # The small number keeps the gradient finite if every ReLU is off; then phi is zero.
        return phi / jnp.sqrt((phi**2).sum() + 1e-12)


# ------------------------------------------------------------------------------------------------------------- the flow


class Flow(eqx.Module):
    """The velocity of one cell: a residual SELU network."""

    frequencies: Float[Array, "F D"]  # B, drawn once, never trained
    first: eqx.nn.Linear
    hidden: eqx.nn.Linear  # all in one, each parameter with a leading layer axis
    last: eqx.nn.Linear

    def __init__(self, genes: int, options: Options, *, key: PRNGKeyArray):
        key_frequencies, key_first, key_hidden, key_last = jr.split(key, 4)
        self.frequencies = 0.01 * jr.normal(key_frequencies, (options.features, genes))
        inputs = options.embedding + 3 * options.features + 2 * genes
        self.first = eqx.nn.Linear(inputs, options.width, key=key_first)
        layer = lambda k: eqx.nn.Linear(options.width, options.width, key=k)
        self.hidden = eqx.filter_vmap(layer)(jr.split(key_hidden, options.layers - 1))
        self.last = eqx.nn.Linear(options.width, genes, key=key_last)

    def __call__(self, x: Float[Array, " D"], time: Float[Array, ""], embedding: Float[Array, " E"],
                 treatment: Float[Array, " D"]) -> Float[Array, " D"]:
        angle = 2 * math.pi * jax.lax.stop_gradient(self.frequencies) @ x          # F: small angles, so smooth in x
        # Time with angles up to 10 t: with more, the velocity is so rough in time that the solver needs many steps.
        h = jnp.concatenate([embedding, time_features(time / 10, len(angle)), jnp.cos(angle), jnp.sin(angle),
                             x, treatment])
        h = jax.nn.selu(self.first(h))                                             # W
        h, _ = jax.lax.scan(lambda h, layer: (h + jax.nn.selu(layer(h)), None), h, self.hidden)
        return self.last(h)


def condition_loss(encoder: Encoder, flow: Flow, batch: fitting.Batch, *, key: PRNGKeyArray) -> Float[Array, ""]:
    """Flow matching on n pairs of one condition: mean over cells and genes of (v - (x1 - x0))^2."""
    time = jr.uniform(key, (len(batch.controls), 1))                               # n 1
    x = (1 - time) * batch.controls + time * batch.treated
    velocity = jax.vmap(flow, (0, 0, None, None))(x, time[:, 0], encoder(batch.controls), batch.treatment)
    return jnp.mean((velocity - (batch.treated - batch.controls)) ** 2)


def loss(encoder: Encoder, flow: Flow, batches: fitting.Batch, keys: Key[Array, " conditions"]) -> Float[Array, ""]:
    """Mean of `condition_loss` over a batch of conditions."""
    return jax.vmap(lambda batch, key: condition_loss(encoder, flow, batch, key=key))(batches, keys).mean()


@functools.cache
def make_step(options: Options) -> fitting.Step:
    """Alternate: one update of the flow with the encoder held, then one of the encoder with the flow held."""
    optimiser = optax.adam(options.learning_rate)
    # The gradient is that of the first argument only: to each network the other is a constant.
    flow_gradient = eqx.filter_value_and_grad(lambda flow, encoder, *batch: loss(encoder, flow, *batch))
    encoder_gradient = eqx.filter_grad(loss)

    def step(state, data, i, key):
        # [D37] paper: silent; MFM: two optimisers in turn; here: in turn on every batch, because how often to
        # change over is not stated.
        encoder, flow, encoder_state, flow_state = state
        key_draw, key_time = jr.split(key)
        batches = jax.vmap(lambda k: fitting.draw(data, options.batch, key=k))(jr.split(key_draw, options.conditions))
        keys = jr.split(key_time, options.conditions)
        value, gradient = flow_gradient(flow, encoder, batches, keys)
        change, flow_state = optimiser.update(gradient, flow_state)
        flow = eqx.apply_updates(flow, change)
        change, encoder_state = optimiser.update(encoder_gradient(encoder, flow, batches, keys), encoder_state)
        return (eqx.apply_updates(encoder, change), flow, encoder_state, flow_state), value

    return step


# ----------------------------------------------------------------------------------------------------------- prediction


@eqx.filter_jit
def transport(encoder: Encoder, flow: Flow, controls: Float[Array, "N D"], treatment: Float[Array, " D"],
              tolerance: Float[Array, ""]) -> Float[Array, "N D"]:
    """The ODE dx/dt = v from every control cell at t = 0 to t = 1, Dopri5; the step size fits all cells at once."""
    embedding = encoder(controls)
    velocity = lambda t, x, _: jax.vmap(flow, (0, None, None, None))(x, t, embedding, treatment)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(velocity), diffrax.Dopri5(), t0=0.0, t1=1.0, dt0=None, y0=controls,
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance), throw=False)  # infinite if it fails
    return solution.ys[-1]


class MFM:
    """Meta flow matching, fitted to the training conditions of a screen.

    The one-hot of a treatment that was never trained on counts as zero (`unseen`). A population of fewer than K + 1
    cells is a complete graph. The number of the biological context is not used.
    """

    conditions_on = ("treatment", "controls")  # Table 1

    def __init__(self, screen: Screen, rng: np.random.Generator, options: Options = Options()):
        """Raises BadInput if there is nothing to fit to, or the loss is no longer finite."""
        self.options = options
        self.known = fitting.seen_genes(screen) | (options.unseen == "random")
        self.lowest = 0 if screen.log_expression else -np.inf                      # expression is never negative
        data = fitting.training_cells(screen)
        key_encoder, key_flow, key_fit = jr.split(jr.key(int(rng.integers(2**31))), 3)
        genes = screen.cells.shape[1]
        encoder = Encoder(genes, options.embedding, options.neighbours, key=key_encoder)
        models = encoder, Flow(genes, options, key=key_flow)
        states = (optax.adam(options.learning_rate).init(eqx.filter(m, eqx.is_inexact_array)) for m in models)
        self.parameters = fitting.count_parameters(models) - models[1].frequencies.size
        state = fitting.fit("mfm", make_step(options), (*models, *states), data, options.updates, key=key_fit)
        self.encoder, self.flow, *_ = state

    def predict(self, controls: Float[np.ndarray, "N D"], context: int, treatment: Float[np.ndarray, "D"],
                rng: np.random.Generator) -> Float[np.ndarray, "N D"]:
        """Each control cell, carried along the flow; not random, so `rng` is not used."""
        treatment = jnp.asarray(treatment * self.known, jnp.float32)
        controls, tolerance = jnp.asarray(controls, jnp.float32), jnp.asarray(self.options.tolerance)
        cells = transport(self.encoder, self.flow, controls, treatment, tolerance)
        return np.maximum(np.asarray(cells), self.lowest).astype(np.float32)
