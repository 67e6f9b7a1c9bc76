"""CellFlow (Klein et al., 2025): a flow from control cells to the treated cells that optimal transport pairs them with.

Paper: 5.2, C.1, C.3; conditions on the treatment and on the system as a covariate (Table 1): it knows which system it
is by name only, and never sees its population. Control and treated cells of one condition are paired in each batch by
entropic optimal transport; a network gives the velocity of a cell from encodings of the cell, the time and the
condition. To predict, solve the ODE from each control cell. Reads and writes nothing; `fitting.py` has the loop.
Departures, marked where they happen: D35, D38, D39, D40, D41.

    paper        name here       shape     meaning
    x0, x1       controls,       n D       source cells and cells of one condition, of the same system
                 treated
    P            plan            n n       the coupling of x0 and x1: rows and columns sum to 1/n
    x_t          x               D         (1 - t) x0 + t x1, a cell on its way
    t            time                      flow time, 0 control, 1 treated
    c            condition       E         encoding of the treatment and of the system
    v            velocity        D         dx / dt, learnt from x1 - x0

    B conditions of an update   n cells of a batch   N cells of a prediction   D genes   S systems   E embedding
    W width
"""

import functools
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ott.solvers.utils import match_linear

from baselines import fitting
from model import time_features


@dataclass(frozen=True)
class Options(fitting.Length):
    """Hyperparameters; the defaults are the method's own, or chosen here where no source states one."""
    epsilon: float = 0.1            # of the coupling, in units of the mean squared distance [D38]
    condition_dropout: float = 0.0  # of the condition's encoding [D39]
    noise: float = 0.0              # sigma added to x_t; the notebooks' values are for principal components
    embedding: int = 256            # E, width of the condition's encoding (CellFlow)
    width: int = 1024               # W, of every network [D40]
    layers: int = 3                 # of every network [D40]
    updates: int = 10_000           # at most (chosen here: 200,000 batches of one condition)
    batch: int = 200                # cells n per condition: a population of the evaluation (B.3)
    conditions: int = 20            # conditions whose gradients are averaged (CellFlow)
    learning_rate: float = 5e-5     # of Adam (CellFlow)
    tolerance: float = 1e-5         # relative and absolute, of the ODE solver (chosen here: cells are right to 1e-3)
    unseen: str = "zero"            # one-hot of what was never trained on: "zero", or "random" as initialised [D35]


# --------------------------------------------------------------------------------------------------------- the coupling


def coupling(controls: Float[Array, "n D"], treated: Float[Array, "n D"], epsilon: float) -> Float[Array, "n n"]:
    """The plan P of entropic optimal transport between two sets of cells, with squared Euclidean cost.

    [D38] paper: the reference notebook; released code: epsilon 0.5 to 1, which in 20 to 50 genes
    pairs cells almost at random; here: 0.1. In units of the mean cost all three.
    """
    return match_linear(controls, treated, epsilon=epsilon, scale_cost="mean")


def partners(plan: Float[Array, "n n"], *, key: PRNGKeyArray) -> Int[Array, "n"]:
    """For each control cell one treated cell, drawn from its row of the plan."""
    return jr.categorical(key, jnp.log(plan))


# ---------------------------------------------------------------------------------------------------------- the network


class Velocity(eqx.Module):
    """The velocity of one cell: encoders of cell, time and condition, and a decoder of the three."""

    treatment: eqx.nn.MLP
    system: eqx.nn.MLP
    merge: eqx.nn.MLP
    dropout: eqx.nn.Dropout
    cell: eqx.nn.MLP
    time: eqx.nn.MLP
    decoder: eqx.nn.MLP

    def __init__(self, genes: int, systems: int, options: Options, *, key: PRNGKeyArray):
        keys = jr.split(key, 6)
        width, embedding = options.width, options.embedding

        # [D40] paper: the reference notebook, which it does not name; here: one width and number of layers.
        linear = functools.partial(eqx.nn.MLP, width_size=width, depth=options.layers - 1, activation=jax.nn.silu)
        mlp = functools.partial(linear, final_activation=jax.nn.silu)

        # [D41] paper: "set aggregation with multihead attention"; here: none, because each condition has one
        # treatment, and attention within a set of one is a linear layer.
        self.treatment = mlp(genes, width, key=keys[0])
        self.system = mlp(systems, width, key=keys[1])
        self.merge = linear(2 * width, embedding, key=keys[2])
        self.dropout = eqx.nn.Dropout(options.condition_dropout)
        self.cell = mlp(genes, width, key=keys[3])
        self.time = mlp(width, width, key=keys[4])
        self.decoder = linear(2 * width + embedding, genes, key=keys[5])

    def condition(self, treatment: Float[Array, "D"], system: Float[Array, "S"], *,
                  key: PRNGKeyArray | None = None) -> Float[Array, "E"]:
        """Encoding of the two one-hots, with dropout if there is a key (training).

        [D39] paper: the reference notebook; released default: 0.9, with which a short training moves
        cells half as far as it should, and PDS is 0.2 where it is 0 without; here: 0.
        """
        parts = jnp.concatenate([self.treatment(treatment), self.system(system)])
        return self.dropout(self.merge(parts), key=key, inference=key is None)

    def __call__(self, x: Float[Array, "D"], time: Float[Array, ""], condition: Float[Array, "E"],
                 ) -> Float[Array, "D"]:
        # Angles up to 10 t: with more, the velocity is so rough in time that the solver needs many steps.
        time = self.time(time_features(time / 10, self.time.in_size))
        return self.decoder(jnp.concatenate([self.cell(x), time, condition]))


def condition_loss(model: Velocity, batch: fitting.Batch, options: Options, key: PRNGKeyArray) -> Float[Array, ""]:
    """Flow matching on n coupled pairs of one condition: mean over cells and genes of (v - (x1 - x0))^2."""
    key_pairs, key_time, key_noise, key_dropout = jr.split(key, 4)
    x0, n = batch.controls, len(batch.controls)
    plan = coupling(x0, batch.treated, options.epsilon)
    x1 = batch.treated[partners(plan, key=key_pairs)]
    time = jr.uniform(key_time, (n, 1))
    x = (1 - time) * x0 + time * x1
    if options.noise:
        x = x + options.noise * jr.normal(key_noise, x.shape)
    system = jax.nn.one_hot(batch.system, model.system.in_size)
    condition = model.condition(batch.treatment, system, key=key_dropout)
    velocity = jax.vmap(model, (0, 0, None))(x, time[:, 0], condition)
    return jnp.mean((velocity - (x1 - x0)) ** 2)


class CellFlow(fitting.Trained):
    """CellFlow, which knows a system by its number only."""

    Options = Options
    conditions_on = ("treatment", "system")  # Table 1

    @staticmethod
    @eqx.filter_jit
    def build(options, level, systems, log_expression, *, key):
        """The velocity."""
        return (Velocity(len(level), systems, options, key=key),)

    @staticmethod
    @functools.cache
    def make_step(options):
        """One update on the mean gradient of `conditions` conditions, each coupled on its own: never across systems."""
        adam = optax.adam(options.learning_rate)

        def loss(model, batches, keys):
            return jax.vmap(condition_loss, (None, 0, None, 0))(model, batches, options, keys).mean()

        def step(state, data, i, key):
            (model,), (adam_state,) = state
            key_draw, key_loss = jr.split(key)
            batches = fitting.draw_many(data, options.batch, options.conditions, key=key_draw)
            keys = jr.split(key_loss, options.conditions)
            value, gradient = eqx.filter_value_and_grad(loss)(model, batches, keys)
            model, adam_state = fitting.update(adam, gradient, model, adam_state)
            return ((model,), (adam_state,)), value

        return (adam,), step

    @staticmethod
    @eqx.filter_jit
    def carry(networks, options, controls, treatment, system, *, key):
        """The ODE dx/dt = v from each control cell at t = 0 to t = 1, with steps of each cell's own."""
        model, = networks
        condition = model.condition(treatment, system)

        def velocity(x, time):
            return model(x, time, condition)

        return jax.vmap(lambda cell: fitting.integrate(velocity, cell, options.tolerance))(controls)
