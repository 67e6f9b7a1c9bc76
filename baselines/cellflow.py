"""CellFlow (Klein et al., 2025): a flow from control cells to the treated cells that optimal transport pairs them with.

Paper: 5.2, C.1, C.3; conditions on the treatment and on the biological context as a covariate (Table 1): it knows which
context it is by name only, and never sees its population. Control and treated cells of one condition are paired in each
batch by entropic optimal transport; a network gives the velocity of a cell from encodings of the cell, the time and the
condition. To predict, solve the ODE from each control cell. Reads and writes nothing. Departures, marked where they
happen: D35, D39, D38, D41, D40.

    symbol       name here       shape     meaning
    x0, x1       controls,       n D       source cells and cells of one condition, of the same biological context
                 treated
    P            plan            n n       the coupling of x0 and x1: rows and columns sum to 1/n
    x_t          x               D         (1 - t) x0 + t x1, a cell on its way
    t            time                      flow time, 0 control, 1 treated
    c            condition       E         encoding of the treatment and of the biological context
    v            velocity        D         dx / dt, learnt from x1 - x0

    n cells of a batch   N cells of a prediction   D genes   C biological contexts   E embedding   W width
"""

import functools
from dataclasses import dataclass

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ott.solvers.utils import match_linear

from baselines import fitting
from data import Screen
from model import time_features


@dataclass(frozen=True)
class Options:
    """Hyperparameters; the defaults are the method's own, or chosen here where no source states one."""
    epsilon: float = 0.1            # of the coupling, in units of the mean squared distance [D38]
    condition_dropout: float = 0.0  # of the condition's encoding [D39]
    noise: float = 0.0              # sigma added to x_t; the notebooks' values are for principal components
    embedding: int = 256            # E, width of the condition's encoding (CellFlow)
    width: int = 1024               # W, of every network [D40]
    layers: int = 3                 # of every network [D40]
    updates: int = 10_000           # (chosen here: 200,000 batches of one condition)
    batch: int = 200                # cells n per condition: a population of the evaluation (B.3)
    conditions: int = 20            # conditions whose gradients are averaged (CellFlow)
    learning_rate: float = 5e-5     # of Adam (CellFlow)
    tolerance: float = 1e-5         # relative and absolute, of the ODE solver (chosen here: cells are right to 1e-3)
    unseen: str = "zero"            # one-hot of what was never trained on: "zero", or "random" as initialised


# --------------------------------------------------------------------------------------------------------- the coupling


def coupling(controls: Float[Array, "n D"], treated: Float[Array, "n D"], epsilon: float) -> Float[Array, "n n"]:
    """The plan P of entropic optimal transport between two sets of cells, with squared Euclidean cost.

    [D38] paper: the reference notebook; released code: epsilon 0.5 to 1, which in 20 to 50 genes
    pairs cells almost at random; here: 0.1. In units of the mean cost all three.
    """
    return match_linear(controls, treated, epsilon=epsilon, scale_cost="mean")


def partners(plan: Float[Array, "n n"], *, key: PRNGKeyArray) -> Int[Array, " n"]:
    """For each control cell one treated cell, drawn from its row of the plan."""
    return jr.categorical(key, jnp.log(plan))


# ---------------------------------------------------------------------------------------------------------- the network


class Velocity(eqx.Module):
    """The velocity of one cell: encoders of cell, time and condition, and a decoder of the three."""

    treatment: eqx.nn.MLP
    context: eqx.nn.MLP
    merge: eqx.nn.MLP
    dropout: eqx.nn.Dropout
    cell: eqx.nn.MLP
    time: eqx.nn.MLP
    decoder: eqx.nn.MLP

    def __init__(self, genes: int, contexts: int, options: Options, *, key: PRNGKeyArray):
        keys = jr.split(key, 6)
        width, embedding = options.width, options.embedding

        # [D40] paper: the reference notebook, which it does not name; here: one width and number of layers.
        linear = functools.partial(eqx.nn.MLP, width_size=width, depth=options.layers - 1, activation=jax.nn.silu)
        mlp = functools.partial(linear, final_activation=jax.nn.silu)

        # [D41] paper: "set aggregation with multihead attention"; here: none, because each condition has one
        # treatment, and attention within a set of one is a linear layer.
        self.treatment = mlp(genes, width, key=keys[0])
        self.context = mlp(contexts, width, key=keys[1])
        self.merge = linear(2 * width, embedding, key=keys[2])
        self.dropout = eqx.nn.Dropout(options.condition_dropout)
        self.cell = mlp(genes, width, key=keys[3])
        self.time = mlp(width, width, key=keys[4])
        self.decoder = linear(2 * width + embedding, genes, key=keys[5])

    def condition(self, treatment: Float[Array, " D"], context: Float[Array, " C"], *,
                  key: PRNGKeyArray | None = None) -> Float[Array, " E"]:
        """Encoding of the two one-hots, with dropout if there is a key (training).

        [D39] paper: the reference notebook; released default: 0.9, with which a short training moves
        cells half as far as it should, and PDS is 0.2 where it is 0 without; here: 0.
        """
        parts = jnp.concatenate([self.treatment(treatment), self.context(context)])
        return self.dropout(self.merge(parts), key=key, inference=key is None)

    def __call__(self, x: Float[Array, " D"], time: Float[Array, ""],
                 condition: Float[Array, " E"]) -> Float[Array, " D"]:
        # Angles up to 10 t: with more, the velocity is so rough in time that the solver needs many steps.
        time = self.time(time_features(time / 10, self.time.in_size))
        return self.decoder(jnp.concatenate([self.cell(x), time, condition]))


def condition_loss(model: Velocity, batch: fitting.Batch, options: Options, *, key: PRNGKeyArray) -> Float[Array, ""]:
    """Flow matching on n coupled pairs of one condition: mean over cells and genes of (v - (x1 - x0))^2."""
    key_pairs, key_time, key_noise, key_dropout = jr.split(key, 4)
    x0, n = batch.controls, len(batch.controls)
    x1 = batch.treated[partners(coupling(x0, batch.treated, options.epsilon), key=key_pairs)]
    time = jr.uniform(key_time, (n, 1))
    x = (1 - time) * x0 + time * x1
    if options.noise:
        x = x + options.noise * jr.normal(key_noise, x.shape)
    condition = model.condition(batch.treatment, jax.nn.one_hot(batch.context, model.context.in_size), key=key_dropout)
    velocity = jax.vmap(model, (0, 0, None))(x, time[:, 0], condition)
    return jnp.mean((velocity - (x1 - x0)) ** 2)


@functools.cache
def make_step(options: Options) -> fitting.Step:
    """One update on the mean gradient of `conditions` conditions, each coupled on its own: never across contexts."""
    optimiser = optax.adam(options.learning_rate)

    def loss(model, batches, keys):
        return jax.vmap(lambda batch, key: condition_loss(model, batch, options, key=key))(batches, keys).mean()

    def step(state, data, i, key):
        model, optimiser_state = state
        key_draw, key_loss = jr.split(key)
        batches = jax.vmap(lambda k: fitting.draw(data, options.batch, key=k))(jr.split(key_draw, options.conditions))
        value, gradient = eqx.filter_value_and_grad(loss)(model, batches, jr.split(key_loss, options.conditions))
        change, optimiser_state = optimiser.update(gradient, optimiser_state)
        return (eqx.apply_updates(model, change), optimiser_state), value

    return step


# ----------------------------------------------------------------------------------------------------------- prediction


@eqx.filter_jit
def transport(model: Velocity, controls: Float[Array, "N D"], treatment: Float[Array, " D"],
              context: Float[Array, " C"], tolerance: Float[Array, ""]) -> Float[Array, "N D"]:
    """The ODE dx/dt = v from each control cell at t = 0 to t = 1, Dopri5 with steps of each cell's own."""
    condition = model.condition(treatment, context)
    term = diffrax.ODETerm(lambda t, x, _: model(x, t, condition))
    controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)

    def one(x):
        return diffrax.diffeqsolve(term, diffrax.Dopri5(), t0=0.0, t1=1.0, dt0=None, y0=x,
                                   stepsize_controller=controller,
                                   throw=False).ys[-1]  # infinite if it fails, which whoever writes the cells will see

    return jax.vmap(one)(controls)


class CellFlow:
    """CellFlow, fitted to the training conditions of a screen.

    The one-hots of a treatment and of a biological context that were never trained on count as zero (`unseen`).
    """

    conditions_on = ("treatment", "context")  # Table 1

    def __init__(self, screen: Screen, rng: np.random.Generator, options: Options = Options()):
        """Raises BadInput if there is nothing to fit to, or the loss is no longer finite."""
        self.options = options
        data = fitting.training_cells(screen)
        contexts = len(screen.context_names)
        self.known = fitting.seen_genes(screen) | (options.unseen == "random")                       # D
        self.known_contexts = np.isin(np.arange(contexts), data.context) | (options.unseen == "random")  # C
        self.lowest = 0 if screen.log_expression else -np.inf  # expression is never negative
        key_model, key_fit = jr.split(jr.key(int(rng.integers(2**31))))
        model = Velocity(screen.cells.shape[1], contexts, options, key=key_model)
        self.parameters = fitting.count_parameters(model)
        state = model, optax.adam(options.learning_rate).init(eqx.filter(model, eqx.is_inexact_array))
        self.model, _ = fitting.fit("cellflow", make_step(options), state, data, options.updates, key=key_fit)

    def predict(self, controls: Float[np.ndarray, "N D"], context: int, treatment: Float[np.ndarray, "D"],
                rng: np.random.Generator) -> Float[np.ndarray, "N D"]:
        """Each control cell, carried along the flow; not random, so `rng` is not used."""
        hot = (np.arange(len(self.known_contexts)) == context) * self.known_contexts
        one_hots = (jnp.asarray(v, jnp.float32) for v in (treatment * self.known, hot))
        cells = transport(self.model, jnp.asarray(controls, jnp.float32), *one_hots,
                          jnp.asarray(self.options.tolerance))
        return np.maximum(np.asarray(cells), self.lowest).astype(np.float32)
