"""What the five trained baselines share: where their cells come from, the loop that trains them and tells when to stop,
unseen treatments.

Paper: 5.2, appendix C.1. Reads and writes nothing. A method is one file beside this one: its `Options`, whose defaults
are the method's own (the table in scales.py makes them smaller), its networks and losses, and a subclass of `Trained`.
Departures: D35, D54. What DEPARTURES.md says of each method is marked in its file.

How long a fit lasts is told by conditions that it does not see (`tasks.folds`). Where a screen has no VALIDATION
condition, training conditions are left out in turn: a copy of the networks is trained without one, beside the networks
that see all known conditions. These are kept as they were when the copies' mean error was least.

    paper        name here   shape     meaning
    x0, x1       controls,   n D       cells of a batch, all of one condition: n is always the same, so that nothing
                 treated               recompiles
    t            treatment   D         one-hot times the do-value
    psi          system      ()        number of the causal system; S of them as a one-hot

    S systems   D genes   B conditions of an update   R known conditions (a system and a treatment with cells)
    N cells of a prediction   C copies of the networks, trained side by side; the last sees all known conditions
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
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

import metrics
import scales
import tasks
from baselines.simple import known_conditions, lowest_value
from scales import BadInput
from tasks import CONTROL, VALIDATION, Screen

# -------------------------------------------------------------------------------------------- where cells come from


class Cells(NamedTuple):
    """The known conditions of a screen, on the device; `side_by_side` adds an axis C. Cells of others are NaN."""
    cells: Float[Array, "*C rows D"]
    start: Int[Array, "*C R"]            # first row of the treated cells
    count: Int[Array, "*C R"]            # number of them
    control_start: Int[Array, "*C R"]    # the same for the control cells of the same system
    control_count: Int[Array, "*C R"]
    treatment: Float[Array, "*C R D"]
    system: Int[Array, "*C R"]
    known: Int[Array, "*C"]              # number of conditions: R, unless the last are there to fill up


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
                 jnp.asarray(screen.treatments[systems, treatments]), jnp.asarray(systems),
                 jnp.asarray(len(systems)))


def side_by_side(each: list[Cells]) -> Cells:
    """One for every copy of the networks, of as many conditions as the largest has: the last is repeated to fill up."""
    most = max(len(data.start) for data in each)
    filled = []
    for data in each:
        rows = jnp.minimum(jnp.arange(most), len(data.start) - 1)
        filled.append(Cells(data.cells, *(table[rows] for table in data[1:-1]), data.known))
    return jax.tree.map(lambda *tables: jnp.stack(tables), *filled)


def draw(data: Cells, n: int, *, key: PRNGKeyArray) -> Batch:
    """n control and n treated cells, with replacement, of a condition drawn at random. Runs inside jit."""
    key_condition, key_controls, key_treated = jr.split(key, 3)
    r = jr.randint(key_condition, (), 0, data.known)
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
    def run(state, data, key, first):
        def one(state, i):
            return step(state, data, i, jr.fold_in(key, i))

        return scan(one, state, first + jnp.arange(CHUNK))

    return eqx.filter_jit(eqx.filter_vmap(run, in_axes=(eqx.if_array(0), 0, None, None)))


@dataclass(frozen=True)
class Length:
    """How long a method is trained: part of the options of each."""
    updates: int = 100_000      # at most
    validate_every: int = 1000  # updates between two validations
    patience: int = 0           # validations without a new best after which it ends; 0: all updates are made [D54]


class Fit(NamedTuple):
    """Networks, and how they came about."""
    networks: PyTree               # C copies
    updates: int                   # made
    stopped: bool | None           # had the validation error stopped improving? None: nobody looked
    validation: dict[int, float]   # updates -> error; empty without validation


def fit(name: str, step: Step, state: PyTree, data: Cells, length: Length,
        validate: Callable[[PyTree], float] | None = None, *, key: PRNGKeyArray) -> Fit:
    """Train C copies side by side until `validate` finds no improvement, and keep what it found best.

    Updates are rounded up to chunks. Prints updates, loss and seconds. Raises BadInput if a loss is no longer finite.

    [D54] paper: silent; released code: a fixed number of updates, which is what patience 0 does; here, at smoke and
    laptop scale: until the error on validation conditions has stopped improving, because numbers of updates that suit
    the paper's sizes say nothing about smaller ones.
    """
    began, best, errors, stopped = time.perf_counter(), state[0], {}, False
    every = -(-length.validate_every // CHUNK) * CHUNK
    bar = tqdm(range(0, length.updates, CHUNK), desc=f"  {name}", unit=f"x{CHUNK} updates", leave=False, mininterval=2)
    done, losses = 0, np.full(1, np.nan)
    for first in bar:
        state, losses = _chunk(step)(state, data, key, jnp.asarray(first))
        done, losses = first + CHUNK, np.asarray(losses)
        if not np.isfinite(losses).all():
            raise BadInput(f"{name}: the loss is no longer finite after {done} updates; lower its learning rate")
        if validate is None:
            best = state[0]
        elif done % every == 0 or done >= length.updates:
            errors[done] = validate(state[0])
            least = min(errors, key=errors.get)
            if least == done:
                best = state[0]
            stopped = done - least >= length.patience * every
            if stopped:
                break
    bar.close()
    ending = " until it stopped" if stopped else ""
    found = f", least validation RMSE {min(errors.values()):.4g}" if errors else ""
    print(f"  {name}: {done} updates{ending}, last losses {losses[-1].mean():.4g}{found}, "
          f"{time.perf_counter() - began:.1f} s", flush=True)
    return Fit(best, done, stopped if validate else None, errors)


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


# ---------------------------------------------------------------------------------------------------------- validation

MOST_CONDITIONS, CELLS = 32, 100  # what validation may cost: conditions, cells of each


class LeftOut(NamedTuple):
    """A condition that one copy of the networks is not trained on."""
    copy: int
    system: int
    treatment: Float[np.ndarray, "D"]
    controls: Float[np.ndarray, "N D"]
    treated: Float[np.ndarray, "n D"]


def copies(screen: Screen) -> list[Screen]:
    """What each copy of the networks is trained on; the last is the screen itself."""
    folds = tasks.folds(screen)
    if folds and folds[0] is screen:
        return [screen]  # it has VALIDATION conditions of its own
    return folds + [screen]


def validation_conditions(screens: list[Screen]) -> list[LeftOut]:
    """The VALIDATION conditions of every copy, or some of them; always the same cells."""
    rng, found = scales.generator("validation", 0), []
    for number, screen in enumerate(screens):
        for s, t in np.argwhere((screen.split == VALIDATION) & (screen.count > 0)).tolist():
            found.append((number, s, t))
    conditions = []
    for number, s, t in tasks.evenly(found, MOST_CONDITIONS):
        screen = screens[number]
        controls = screen.pool(s, CONTROL)
        controls = controls[tasks.draw(rng, len(controls), CELLS)]
        conditions.append(LeftOut(number, s, screen.treatments[s, t], controls, screen.pool(s, t)))
    return conditions


class Told(NamedTuple):
    """What one copy of the networks has met in training."""
    genes: Bool[np.ndarray, "D"]
    systems: Bool[np.ndarray, "S"]


def told_of(screen: Screen, data: Cells, everything: bool) -> Told:
    """What the known conditions hold, or simply everything [D35]."""
    systems = np.isin(np.arange(len(screen.systems)), np.asarray(data.system))
    return Told(seen_genes(screen) | everything, systems | everything)


def stack(networks: list[tuple]) -> tuple:
    """C tuples of networks -> one, whose arrays have an axis C."""
    static = eqx.partition(networks[0], eqx.is_array)[1]
    arrays = [eqx.filter(each, eqx.is_array) for each in networks]
    return eqx.combine(jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays), static)


def copy_of(networks: tuple, number: int) -> tuple:
    """One copy of the networks."""
    arrays, static = eqx.partition(networks, eqx.is_array)
    return eqx.combine(jax.tree.map(lambda leaf: leaf[number], arrays), static)


# --------------------------------------------------------------------------------------------------- a trained baseline


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
        """Fit to the known conditions, for as long as validation conditions ask for (`fit`).

        Raises BadInput if there is nothing to fit to, or if the loss is no longer finite.
        """
        self.options, self.lowest = options, lowest_value(screen)
        key_build, key_fit = jr.split(jr.key(int(rng.integers(2**31))))
        screens = copies(screen) if options.patience else [screen]
        data, networks, self.told = [], [], []
        for one in screens:
            cells = training_cells(one, self.controls_too)
            level = jnp.nanmean(cells.cells, axis=0)
            data.append(cells)
            networks.append(self.build(options, level, len(one.systems), one.log_expression, key=key_build))
            self.told.append(told_of(one, cells, options.unseen == "random"))
        self.parameters = count_parameters(networks[-1])
        networks = stack(networks)
        optimisers, step = self.make_step(options)
        states = []
        for optimiser, network in zip(optimisers, networks):
            states.append(eqx.filter_vmap(optimiser.init)(eqx.filter(network, eqx.is_inexact_array)))
        left_out = validation_conditions(screens) if options.patience else []

        def validate(networks: PyTree) -> float:
            """Mean RMSE of means (eq. 11) of the conditions that were left out, each by a copy that never saw it."""
            errors = []
            for v in left_out:
                own = copy_of(networks, v.copy)
                cells = self.move(own, self.told[v.copy], v.controls, v.system, v.treatment, key_fit)
                errors.append(metrics.rmse(v.treated, cells))
            return float(np.nan_to_num(np.mean(errors), nan=np.inf))

        found = fit(type(self).__name__, step, (networks, tuple(states)), side_by_side(data), options,
                    validate if left_out else None, key=key_fit)
        self.networks = copy_of(found.networks, -1)
        self.updates, self.stopped, self.validation = found.updates, found.stopped, found.validation

    def move(self, networks: tuple, told: Told, controls: Float[np.ndarray, "N D"], system: int,
             treatment: Float[np.ndarray, "D"], key: PRNGKeyArray) -> Float[np.ndarray, "N D"]:
        """One cell for each control cell, by one copy of the networks; on log-expression data no lower than 0."""
        one_hot = (np.arange(len(told.systems)) == system) & told.systems
        arrays = [jnp.asarray(x, jnp.float32) for x in (controls, treatment * told.genes, one_hot)]
        cells = self.carry(networks, self.options, *arrays, key=key)
        return np.maximum(np.asarray(cells), self.lowest).astype(np.float32)

    def predict(self, controls: Float[np.ndarray, "N D"], system: int, treatment: Float[np.ndarray, "D"],
                rng: np.random.Generator) -> Float[np.ndarray, "N D"]:
        """One cell for each control cell, on log-expression data no lower than 0."""
        return self.move(self.networks, self.told[-1], controls, system, treatment, jr.key(int(rng.integers(2**31))))
