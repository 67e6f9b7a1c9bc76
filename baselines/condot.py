"""A trained baseline: CondOT, one optimal-transport map for all treatments (Bunne, Krause & Cuturi, NeurIPS 2022).

Paper: 5.2, C.1, table 7. It conditions on the treatment only (Table 1); all that it knows of a biological context is
the control cell that it moves. Reads and writes nothing; `fitting.py` has the loop.

Among all maps from one population to another, the one that moves cells least is the gradient of a convex function
(Brenier). Two networks f(x, t) and g(x, t), convex in the cell x and not in the treatment t (PICNN: Amos et al., 2017),
play a game (Makkuva et al., 2020) that ends when T = grad_x g carries control onto treated cells, and grad_x f back.

    symbol    name here        shape       meaning
    x, y      x, y             n D         control cells, treated cells of the same biological context
    t         treatment        D           one-hot times the do-value
    f, g      f, g             -> ()       potentials, class Potential
    T         transport        n D -> n D  the map, grad_x g
    u         u                L or H      label path: any function of t
    z         z                L or H      convex path: convex in x, since Wz >= 0
    A_l, m_l  roots, centres   L D D, L D  the quadratics |A_l (x - m_l)|^2 / 2 that the convex path starts from

    n cells of a batch   D genes   L quadratics, as many as genes   H hidden width
Departures, marked where they happen: [D36], [D35].
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from baselines import fitting
from data import Screen


@dataclass(frozen=True)
class Options:
    updates: int = 100_000         # steps of f (our guess: the paper is silent)
    batch: int = 256               # cells n of a batch (our guess: the paper is silent)
    learning_rate: float = 1e-4    # of both Adams (the method's default)
    inner: int = 10                # steps of g for each step of f (the method's default)
    hidden: int = 64               # width H of both paths; 64, 128 or 256 (Table 7)
    layers: int = 2                # hidden layers; 2, 3 or 4 (Table 7)
    penalty: float = 1.0           # weight of the norm of the negative part of g's Wz (the method's default)
    identity_init: bool = True     # the map starts as T(x) = x (C.1); False: an ordinary random initialisation
    unseen: str = "zero"           # a treatment that was never trained on is given as zeros; "random": as its one-hot,
    #                                whose weights are as initialised (released code) [D35]


# --------------------------------------------------------------------- a function that is convex in the cell (PICNN)

# [D36] paper: "identity initialization"; released code: kernels and biases with which T(x) is 4x at the
# start (in the original code, far more); here: T(x) = x within 1e-3, as the paper has it. Three things make it so: the
# L quadratics are |x|^2 / 2 each and their weights sum to one; each convex layer takes the mean of its inputs (the
# first, the sum), with gates of 1; and whatever else is added is next to nothing.
UNIT_GATE = math.log(math.e - 1)  # softplus of this is 1
SMALL = 1e-3                      # what the other kernels are multiplied by


def linear(inputs: int, outputs: int, identity: bool, bias: float, *, key: PRNGKeyArray) -> eqx.nn.Linear:
    """An ordinary layer or, where T(x) = x asks for it, one that returns `bias` whatever it gets, but for a little."""
    layer = eqx.nn.Linear(inputs, outputs, key=key)
    almost_constant = (layer.weight * SMALL, jnp.full(outputs, bias))
    return eqx.tree_at(lambda l: (l.weight, l.bias), layer, almost_constant) if identity else layer


class Layer(eqx.Module):
    """z <- Wz (z * softplus(Wzu u)) + Wx (x * (Wxu u)) + Wu u, which is convex in x if z is and Wz >= 0."""

    convex: Float[Array, "out in"]    # Wz
    convex_gate: eqx.nn.Linear        # Wzu
    cell: Float[Array, "out D"]       # Wx
    cell_gate: eqx.nn.Linear          # Wxu
    shift: eqx.nn.Linear              # Wu

    def __init__(self, genes: int, inputs: int, outputs: int, total: int, identity: bool, *, key: PRNGKeyArray):
        """From `inputs` to `outputs` units; identity: each row of Wz sums to `total`."""
        k_convex, k_convex_gate, k_cell, k_cell_gate, k_shift = jr.split(key, 5)
        random = jr.uniform(k_convex, (outputs, inputs)) / math.sqrt(inputs)
        self.convex = jnp.full((outputs, inputs), total / inputs) if identity else random
        self.convex_gate = linear(inputs, inputs, identity, UNIT_GATE, key=k_convex_gate)
        self.cell = linear(genes, outputs, identity, 0.0, key=k_cell).weight
        self.cell_gate = linear(inputs, genes, identity, 1.0, key=k_cell_gate)
        self.shift = linear(inputs, outputs, identity, 0.0, key=k_shift)

    def __call__(self, x: Float[Array, "D"], u: Float[Array, "in"], z: Float[Array, "in"]) -> Float[Array, "out"]:
        """The new z, before its activation."""
        gated = z * jax.nn.softplus(self.convex_gate(u))
        return self.convex @ gated + self.cell @ (x * self.cell_gate(u)) + self.shift(u)


class Potential(eqx.Module):
    """f(x, t) or g(x, t): one cell and one treatment to a number; convex in the cell."""

    gate: Float[Array, "L D"]              # W0
    roots: Float[Array, "L D D"]
    centres: Float[Array, "L D"]
    labels: tuple[eqx.nn.Linear, ...]      # W, one for each hidden layer
    layers: tuple[Layer, ...]              # one more: the last returns a number

    def __init__(self, genes: int, options: Options, *, key: PRNGKeyArray):
        k_gate, k_roots, k_centres, k_labels, k_layers = jr.split(key, 5)
        identity, quadratics = options.identity_init, genes
        self.gate = eqx.nn.Linear(genes, quadratics, use_bias=False, key=k_gate).weight
        if identity:
            self.roots, self.centres = jnp.tile(jnp.eye(genes), (quadratics, 1, 1)), jnp.zeros((quadratics, genes))
        else:
            self.roots = jr.normal(k_roots, (quadratics, genes, genes)) / math.sqrt(genes)
            self.centres = jr.normal(k_centres, (quadratics, genes))
        widths = [quadratics] + [options.hidden] * options.layers + [1]
        totals = [quadratics] + [1] * options.layers  # the quadratics carry weights that sum to one, so they are summed
        self.labels = tuple(eqx.nn.Linear(i, o, key=k)
                            for i, o, k in zip(widths, widths[1:-1], jr.split(k_labels, options.layers)))
        self.layers = tuple(Layer(genes, i, o, total, identity, key=k) for i, o, total, k
                            in zip(widths, widths[1:], totals, jr.split(k_layers, len(totals))))

    def __call__(self, x: Float[Array, "D"], treatment: Float[Array, "D"]) -> Float[Array, ""]:
        """The potential. Under a vmap over cells only, what depends on the treatment alone is computed once."""
        u = jax.nn.softmax(10 * self.gate @ treatment)  # L
        # A_l (x - m_l) of all l in one product of matrices
        moved = self.roots.reshape(-1, len(x)) @ x - jnp.einsum("lij,lj->li", self.roots, self.centres).ravel()
        z = jax.nn.leaky_relu(u * (moved**2).reshape(len(u), -1).sum(-1) / 2)  # L
        for label, layer in zip(self.labels, self.layers):
            u, z = jax.nn.leaky_relu(label(u)), jax.nn.leaky_relu(layer(x, u, z))  # H, from the u and z before
        return self.layers[-1](x, u, z)[0]


def transport(g: Potential, cells: Float[Array, "n D"], treatment: Float[Array, "D"]) -> Float[Array, "n D"]:
    """T(x) = grad_x g(x, t) of each cell."""
    return jax.vmap(jax.grad(g), (0, None))(cells, treatment)


# --------------------------------------------------------------------------------- the game of f and g (Makkuva et al.)


def mean_potential(f: Potential, cells: Float[Array, "n D"], treatment: Float[Array, "D"]) -> Float[Array, ""]:
    return jax.vmap(f, (0, None))(cells, treatment).mean()


def negative_norm(g: Potential) -> Float[Array, ""]:
    """Frobenius norm of the negative part of each Wz, summed over layers."""
    squared = jnp.stack([(jnp.minimum(layer.convex, 0) ** 2).sum() for layer in g.layers])
    # The root has no derivative at zero, where all is well: without this, every gradient is NaN from the first step.
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0).sum()


def loss_g(g: Potential, f: Potential, x: Float[Array, "n D"], treatment: Float[Array, "D"],
           penalty: float) -> Float[Array, ""]:
    """E[f(T(x)) - <x, T(x)>]: for a fixed f, the T that minimises it is the inverse of grad f."""
    moved = transport(g, x, treatment)
    return mean_potential(f, moved, treatment) - (x * moved).sum(-1).mean() + penalty * negative_norm(g)


def loss_f(f: Potential, moved: Float[Array, "n D"], y: Float[Array, "n D"],
           treatment: Float[Array, "D"]) -> Float[Array, ""]:
    """E[f(y) - f(T(x))]: f tells treated cells from moved ones, and ends at zero when it no longer can.

    So this is no measure of progress: it is near zero at the start too, before f has learnt anything.
    """
    return mean_potential(f, y, treatment) - mean_potential(f, moved, treatment)


def clamp(f: Potential) -> Potential:
    """f with its Wz >= 0, which makes it convex. g is only asked to be, by the penalty in its loss."""
    weights = lambda f: [layer.convex for layer in f.layers]
    return eqx.tree_at(weights, f, [jnp.maximum(w, 0) for w in weights(f)])


@functools.cache
def optimiser(options: Options) -> optax.GradientTransformation:
    """Adam with a short memory (the method's default); on one long vector, which compiles faster."""
    return optax.flatten(optax.adam(options.learning_rate, b1=0.5, b2=0.9))


@functools.cache
def make_step(options: Options) -> fitting.Step:
    """One update: `inner` steps of g and one of f, all on one training condition, each of g on new control cells."""
    adam = optimiser(options)

    def step(state, data, i, key):
        f, g, adam_f, adam_g = state
        drawn = fitting.draw(data, options.batch * options.inner, key=key)
        controls = drawn.controls.reshape(options.inner, options.batch, -1)
        y, treatment = drawn.treated[: options.batch], drawn.treatment

        def step_g(carry, x):
            g, adam_g = carry
            updates, adam_g = adam.update(jax.grad(loss_g)(g, f, x, treatment, options.penalty), adam_g)
            return (eqx.apply_updates(g, updates), adam_g), None

        (g, adam_g), _ = jax.lax.scan(step_g, (g, adam_g), controls)
        moved = transport(g, controls[-1], treatment)  # constants to f: T does not learn from f's loss
        loss, gradient = jax.value_and_grad(loss_f)(f, moved, y, treatment)
        updates, adam_f = adam.update(gradient, adam_f)
        return (clamp(eqx.apply_updates(f, updates)), g, adam_f, adam_g), loss

    return step


# ----------------------------------------------------------------------------------------------------------- the method

_transport = eqx.filter_jit(transport)  # compiled once per number of cells


class CondOT:
    """Cells of any context moved by one map per treatment. Neither the context's index nor `rng` is used."""

    conditions_on = ("treatment",)  # Table 1

    def __init__(self, screen: Screen, rng: np.random.Generator, options: Options = Options()):
        """Fit f and g to the training conditions; g is kept. Raises BadInput as `fitting` does."""
        self.options, self.log_expression = options, screen.log_expression
        self.known = fitting.seen_genes(screen) if options.unseen == "zero" else np.ones(len(screen.genes), bool)
        key_f, key_g, key_fit = jr.split(jr.key(int(rng.integers(2**31))), 3)
        f, g = (Potential(len(screen.genes), options, key=key) for key in (key_f, key_g))
        adam = optimiser(options)
        # Neither of these two changes the update: with them left in, it would be compiled anew for each value.
        step = make_step(dataclasses.replace(options, updates=0, unseen=""))
        self.parameters = fitting.count_parameters((f, g))
        self.f, self.g, *_ = fitting.fit("condot", step, (f, g, adam.init(f), adam.init(g)),
                                         fitting.training_cells(screen), options.updates, key=key_fit)

    def predict(self, controls: Float[np.ndarray, "N D"], context: int, treatment: Float[np.ndarray, "D"],
                rng: np.random.Generator) -> Float[np.ndarray, "N D"]:
        """T(x) of each control cell, on log-expression data no lower than 0.

        A treatment never trained on is, for `unseen="zero"`, a treatment of zeros: all quadratics weigh the same. No
        training condition is like that, so nothing says where cells go. One control cell is enough: each moves alone.
        """
        cells = np.asarray(_transport(self.g, jnp.asarray(controls), jnp.asarray(treatment * self.known)))
        return np.maximum(cells, 0 if self.log_expression else -np.inf).astype(np.float32)
