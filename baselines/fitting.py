"""What the five trained baselines share: where their cells come from, the loop that trains them, unseen treatments.

Paper: 5.2, appendix C.1. Reads and writes nothing. A method is one file beside this one: its `Options`, whose defaults
are the method's own (the table in scales.py makes them smaller), its networks and losses, and a subclass of `Trained`.
Departure: D35. What DEPARTURES.md says of each method is marked in its file.

    paper        name here   shape     meaning
    x0, x1       controls,   n D       cells of a batch, all of one condition: n is always the same, so that nothing
                 treated               recompiles
    t            treatment   D         one-hot times the do-value
    psi          system      ()        number of the causal system; S of them as a one-hot

    S systems   D genes   B conditions of an update   R known conditions (a system and a treatment with cells)
    N cells of a prediction
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from tqdm import tqdm

from baselines.simple import known_conditions, lowest_value
from scales import BadInput
from tasks import CONTROL, Screen

# -------------------------------------------------------------------------------------------- where cells come from


class Cells(NamedTuple):
    """The known conditions of a screen, on the device. Cells of other conditions are NaN."""
    cells: Float[Array, "rows D"]
    start: Int[Array, "R"]            # first row of the treated cells
    count: Int[Array, "R"]            # number of them
    control_start: Int[Array, "R"]    # the same for the control cells of the same system
    control_count: Int[Array, "R"]
    treatment: Float[Array, "R D"]
    system: Int[Array, "R"]


class Batch(NamedTuple):
    """Cells of one known condition, and control cells of the same system; `draw_many` adds an axis B."""
    controls: Float[Array, "*B n D"]
    treated: Float[Array, "*B n D"]
    treatment: Float[Array, "*B D"]
    system: Int[Array, "*B"]


def training_cells(screen: Screen, controls_too: bool = False) -> Cells:
    """All known conditions; with the controls as conditions of their own (treatment zero) if asked.

    Raises BadInput if there is none.
    """
    known = known_conditions(screen)
    known[:, CONTROL] &= controls_too
    systems, treatments = np.nonzero(known)
    visible = np.zeros(len(screen.cells), bool)
    for s, t in zip(systems, treatments):
        for condition in (CONTROL, t):
            start = screen.start[s, condition]
            visible[start : start + screen.count[s, condition]] = True
    # NaN, so that a look at another condition would show; not left out, so that all splits compile once.
    cells = jnp.asarray(np.where(visible[:, None], screen.cells, np.float32(np.nan)))
    return Cells(cells, jnp.asarray(screen.start[systems, treatments]), jnp.asarray(screen.count[systems, treatments]),
                 jnp.asarray(screen.start[systems, CONTROL]), jnp.asarray(screen.count[systems, CONTROL]),
                 jnp.asarray(screen.treatments[systems, treatments]), jnp.asarray(systems))


def draw(data: Cells, n: int, *, key: PRNGKeyArray) -> Batch:
    """n control and n treated cells, with replacement, of a condition drawn at random. Runs inside jit."""
    key_condition, key_controls, key_treated = jr.split(key, 3)
    r = jr.randint(key_condition, (), 0, len(data.start))
    controls = data.control_start[r] + jr.randint(key_controls, (n,), 0, data.control_count[r])
    treated = data.start[r] + jr.randint(key_treated, (n,), 0, data.count[r])
    return Batch(data.cells[controls], data.cells[treated], data.treatment[r], data.system[r])


def draw_many(data: Cells, n: int, conditions: int, *, key: PRNGKeyArray) -> Batch:
    """As `draw`, of B = `conditions` conditions."""
    return jax.vmap(lambda key: draw(data, n, key=key))(jr.split(key, conditions))


def seen_genes(screen: Screen) -> Bool[np.ndarray, "D"]:
    """Genes that were treated in some known condition.

    [D35] paper: silent; released code: the one-hot of another gene meets weights as initialised, which is noise;
    here: each method multiplies the treatment by this unless its option `unseen` is "random".
    """
    return screen.treatments[known_conditions(screen)].any(axis=0)


# ------------------------------------------------------------------------------------------------------------ the loop

# A step: (state, data, update number, key) -> (state, loss); the state is a tuple of networks and one of the states of
# their optimisers. Jitted once per function and shapes, in chunks, so that the launch of a small step costs little.
Step = Callable[[PyTree, Cells, Int[Array, ""], PRNGKeyArray], tuple[PyTree, Float[Array, ""]]]
CHUNK = 50  # updates per launch


def update(optimiser: optax.GradientTransformation, gradient: PyTree, model: PyTree,
           state: PyTree) -> tuple[PyTree, PyTree]:
    """The model and the optimiser's state after one update."""
    change, state = optimiser.update(gradient, state)
    return eqx.apply_updates(model, change), state


def scan(step: Callable, state: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
    """jax.lax.scan for a state that holds functions, as networks do, beside arrays."""
    arrays, static = eqx.partition(state, eqx.is_array)

    def body(arrays, x):
        state, output = step(eqx.combine(arrays, static), x)
        return eqx.filter(state, eqx.is_array), output

    arrays, outputs = jax.lax.scan(body, arrays, inputs)
    return eqx.combine(arrays, static), outputs


@functools.cache
def _chunk(step: Step):
    @eqx.filter_jit
    def run(state, data, key, first):
        def one(state, i):
            return step(state, data, i, jr.fold_in(key, i))

        return scan(one, state, first + jnp.arange(CHUNK))

    return run


def fit(name: str, step: Step, state: PyTree, data: Cells, updates: int, *, key: PRNGKeyArray) -> PyTree:
    """The state after `updates` steps, rounded up to chunks.

    Prints updates, loss and seconds. Raises BadInput if the loss is no longer finite.
    """
    began, losses = time.perf_counter(), np.full(1, np.nan)
    rounds = tqdm(range(0, updates, CHUNK), desc=f"  {name}", unit=f"x{CHUNK} updates", leave=False, mininterval=2)
    for first in rounds:
        state, losses = _chunk(step)(state, data, key, jnp.asarray(first))
        losses = np.asarray(losses)
        if not np.isfinite(losses).all():
            raise BadInput(f"{name}: the loss is no longer finite after {first + CHUNK} updates; "
                           "lower its learning rate")
    print(f"  {name}: {updates} updates, last losses {losses.mean():.4g}, {time.perf_counter() - began:.1f} s",
          flush=True)
    return state


def count_parameters(models: PyTree) -> int:
    """Number of trainable scalars."""
    leaves = jax.tree.leaves(eqx.filter(models, eqx.is_inexact_array))
    return sum(leaf.size for leaf in leaves)


# ---------------------------------------------------------------------------------------------------------- prediction


def integrate(velocity: Callable, cells: Float[Array, "*N D"], tolerance: float | Array) -> Float[Array, "*N D"]:
    """The ODE dx/dt = velocity(x, t) from `cells` at t = 0 to t = 1, Dopri5 with adaptive steps.

    Infinite if the solver fails, which whoever writes the cells will see.
    """
    def field(t, x, _):
        return velocity(x, t)

    controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
    solution = diffrax.diffeqsolve(diffrax.ODETerm(field), diffrax.Dopri5(), t0=0.0, t1=1.0, dt0=None, y0=cells,
                                   stepsize_controller=controller, throw=False)
    return solution.ys[-1]


class Trained:
    """A trained baseline. A subclass has its Options, what is listed below, and three static methods, compiled once:

        build(options, level [D], systems, log_expression, key=...) -> networks, a tuple; `level`: mean training cell
        make_step(options) -> an optimiser for each network, and a `Step`
        carry(networks, options, controls [N D], treatment [D], system [S], key=...) -> cells [N D]; two one-hots

    The one-hots of a gene that no known condition treats, and of a system without known condition, count as zero
    [D35]; with the option unseen = "random" they are given as they are.
    """

    conditions_on: tuple[str, ...]  # Table 1: "treatment", "system", "controls"
    controls_too = False  # are controls trained on as a condition of their own?
    grid: dict[str, tuple] = {}  # what --search tries (Table 7)

    def __init__(self, screen: Screen, rng: np.random.Generator, options):
        """Fit to the known conditions. Raises BadInput if there is none, or if the loss is no longer finite."""
        self.options, self.lowest = options, lowest_value(screen)
        data = training_cells(screen, self.controls_too)
        random = options.unseen == "random"
        self.known_genes = seen_genes(screen) | random  # D
        self.known_systems = np.isin(np.arange(len(screen.systems)), np.asarray(data.system)) | random  # S
        key_build, key_fit = jr.split(jr.key(int(rng.integers(2**31))))
        level = jnp.nanmean(data.cells, axis=0)
        networks = self.build(options, level, len(screen.systems), screen.log_expression, key=key_build)
        self.parameters = count_parameters(networks)
        optimisers, step = self.make_step(options)
        states = []
        for optimiser, network in zip(optimisers, networks):
            states.append(optimiser.init(eqx.filter(network, eqx.is_inexact_array)))
        state = networks, tuple(states)
        self.networks, _ = fit(type(self).__name__, step, state, data, options.updates, key=key_fit)

    def predict(self, controls: Float[np.ndarray, "N D"], system: int, treatment: Float[np.ndarray, "D"],
                rng: np.random.Generator) -> Float[np.ndarray, "N D"]:
        """One cell for each control cell, on log-expression data no lower than 0."""
        one_hot = (np.arange(len(self.known_systems)) == system) & self.known_systems
        arrays = [jnp.asarray(x, jnp.float32) for x in (controls, treatment * self.known_genes, one_hot)]
        cells = self.carry(self.networks, self.options, *arrays, key=jr.key(int(rng.integers(2**31))))
        return np.maximum(np.asarray(cells), self.lowest).astype(np.float32)
