"""What the five trained baselines share: where their cells come from, the loop that trains them, unseen treatments.

Paper: 5.2, appendix C.1. Reads and writes nothing. A method is one file beside this one; each defines

    Options        its hyperparameters; the defaults are the method's own, the table in scales.py makes them smaller
    loss...        the objective of one batch, as the method's paper has it
    <Method>       `Method(screen, rng, options)` fits, `.predict(controls, context, treatment, rng)` makes cells (D35)

    cells        x     n D     cells of a batch, all of one condition: n is always the same, so nothing recompiles
    treatment    t     D       one-hot times the do-value
    C contexts   D genes   R training conditions (a context and a treatment with cells, the control not among them)
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from tqdm import tqdm

from data import CONTROL, TRAIN, Screen
from scales import BadInput


class Cells(NamedTuple):
    """The training conditions of a screen, on the device. Cells of other conditions are NaN."""
    cells: Float[Array, "rows D"]
    start: Int[Array, "R"]            # first row of the treated cells
    count: Int[Array, "R"]            # number of them
    control_start: Int[Array, "R"]    # the same for the control cells of the same biological context
    control_count: Int[Array, "R"]
    treatment: Float[Array, "R D"]
    context: Int[Array, "R"]


class Batch(NamedTuple):
    """Cells of one training condition, and control cells of the same biological context."""
    controls: Float[Array, "n D"]
    treated: Float[Array, "n D"]
    treatment: Float[Array, "D"]
    context: Int[Array, ""]


def training_cells(screen: Screen, controls_too: bool = False) -> Cells:
    """All TRAIN conditions, of contexts that have control cells; with the controls' own (treatment zero) if asked.

    Raises BadInput if there is none.
    """
    usable = (screen.split == TRAIN) & (screen.count > 0) & (screen.count[:, :1] > 0)
    usable[:, CONTROL] &= controls_too
    contexts, treatments = np.nonzero(usable)
    if not treatments.any():
        raise BadInput("no training condition, of a context that has control cells: nothing to fit a baseline to; "
                       "lower --min-cells, or use another split")
    of = lambda table, t: jnp.asarray(table[contexts, t])
    rows = np.zeros(len(screen.cells), bool)
    for c, t in {*zip(contexts, treatments), *((c, CONTROL) for c in contexts)}:
        rows[screen.start[c, t] :][: screen.count[c, t]] = True
    # NaN, so that a look at another condition would show; not left out, so all splits have one shape and compile once.
    cells = jnp.asarray(np.where(rows[:, None], screen.cells, np.nan))
    return Cells(cells, of(screen.start, treatments), of(screen.count, treatments), of(screen.start, CONTROL),
                 of(screen.count, CONTROL), of(screen.treatments, treatments), jnp.asarray(contexts))


def draw(data: Cells, n: int, *, key: PRNGKeyArray) -> Batch:
    """n control and n treated cells, with replacement, of a condition drawn at random. Runs inside jit."""
    key_condition, key_controls, key_treated = jr.split(key, 3)
    r = jr.randint(key_condition, (), 0, len(data.start))
    rows = lambda key, start, count: data.cells[start + jr.randint(key, (n,), 0, count)]
    return Batch(rows(key_controls, data.control_start[r], data.control_count[r]),
                 rows(key_treated, data.start[r], data.count[r]), data.treatment[r], data.context[r])


def seen_genes(screen: Screen) -> Bool[np.ndarray, "D"]:
    """Genes that were treated in some training condition.

    [D35] paper: silent; released code: the one-hot of another gene meets weights as initialised, which is noise;
    here: each method multiplies the treatment by this unless its option `unseen` is "random".
    """
    return screen.treatments[(screen.split == TRAIN) & (screen.count > 0)].any(0)


# A step: (state, data, update number, key) -> (state, loss). Jitted once per function and shapes, in chunks of updates,
# so that a small step is not slowed by its own launch. Methods `functools.cache` the function that makes their step.
Step = Callable[[PyTree, Cells, Int[Array, ""], PRNGKeyArray], tuple[PyTree, Float[Array, ""]]]
CHUNK = 50  # updates per launch


@functools.cache
def _chunk(step: Step):
    @eqx.filter_jit
    def run(state, data, key, first):
        arrays, static = eqx.partition(state, eqx.is_array)

        def body(arrays, i):
            state, loss = step(eqx.combine(arrays, static), data, i, jr.fold_in(key, i))
            return eqx.filter(state, eqx.is_array), loss

        arrays, losses = jax.lax.scan(body, arrays, first + jnp.arange(CHUNK))
        return eqx.combine(arrays, static), losses

    return run


def fit(name: str, step: Step, state: PyTree, data: Cells, updates: int, *, key: PRNGKeyArray) -> PyTree:
    """`updates` steps, rounded up to chunks; returns the last state: models, optimiser states, whatever `step` takes.

    Prints updates, loss and seconds. Raises BadInput if the loss is no longer finite.
    """
    began, losses = time.perf_counter(), np.full(1, np.nan)
    for first in tqdm(range(0, updates, CHUNK), desc=f"  {name}", unit=f"x{CHUNK} updates", leave=False, mininterval=2):
        state, losses = _chunk(step)(state, data, key, jnp.asarray(first))
        if not np.isfinite(losses := np.asarray(losses)).all():
            raise BadInput(f"{name}: the loss is no longer finite after {first + CHUNK} updates; "
                           "lower its learning rate")
    print(f"  {name}: {updates} updates, last losses {losses.mean():.4g}, {time.perf_counter() - began:.1f} s",
          flush=True)
    return state


def count_parameters(model: PyTree) -> int:
    """Number of trainable scalars."""
    return sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
