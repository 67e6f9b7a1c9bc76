"""A trained baseline: CondOT, one optimal-transport map for all treatments (Bunne, Krause & Cuturi, NeurIPS 2022).

Paper: 5.2, C.1, table 7. It conditions on the treatment only (Table 1); all that it knows of a system is the control
cell that it moves. Reads and writes nothing; `fitting.py` has the loop. Departures, marked where they happen: D35, D36.

Among all maps from one population to another, the one that moves cells least is the gradient of a convex function
(Brenier). Two networks f(x, t) and g(x, t), convex in the cell x and not in the treatment t (PICNN: Amos et al., 2017),
play a game (Makkuva et al., 2020) that ends when T = grad_x g carries control onto treated cells, and grad_x f back.

    paper     name here        shape       meaning
    x, y      x, y             n D         control cells, treated cells of the same system
    t         treatment        D           one-hot times the do-value
    f, g      f, g             -> ()       potentials, class Potential
    T         transport        n D -> n D  the map, grad_x g
    u         u                L or H      label path: any function of t
    z         z                L or H      convex path: convex in x, since Wz >= 0
    A_l, m_l  roots, centres   L D D, L D  the quadratics |A_l (x - m_l)|^2 / 2 that the convex path starts from

    n cells of a batch   D genes   L quadratics, as many as genes   H hidden width
"""

import functools
import math
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
    """Hyperparameters of CondOT."""
    updates: int = 100_000         # steps of f, at most (released code; 50,000 on linear SCMs)
    batch: int = 200               # cells n of a batch (released code; 500 on linear SCMs)
    learning_rate: float = 1e-4    # of both Adams (the method's default)
    inner: int = 10                # steps of g for each step of f (the method's default)
    hidden: int = 128              # width H of both paths (released code), of {64, 128, 256} (Table 7)
    layers: int = 4                # hidden layers (released code), of {2, 3, 4} (Table 7)
    penalty: float = 1.0           # weight of the norm of the negative part of g's Wz (the method's default)
    identity_init: bool = True     # the map starts as T(x) = x (C.1); False: an ordinary random initialisation [D36]
    unseen: str = "zero"           # one-hot of what was never trained on: "zero", or "random" as initialised [D35]


# --------------------------------------------------------------------- a function that is convex in the cell (PICNN)

# [D36] paper: "identity initialization"; released code: kernels and biases with which T(x) is 4x at the start (in the
# original code, far more); here: T(x) = x within 1e-3. Three things make it so: the L quadratics are |x|^2 / 2 each
# and their weights sum to one; each convex layer takes the mean of its inputs (the first, the sum), with gates of 1;
# and whatever else is added is next to nothing.
UNIT_GATE = math.log(math.e - 1)  # softplus of this is 1
SMALL = 1e-3                      # what the other kernels are multiplied by


def linear(inputs: int, outputs: int, identity: bool, bias: float, *, key: PRNGKeyArray) -> eqx.nn.Linear:
    """An ordinary layer or, where T(x) = x asks for it, one that returns `bias` whatever it gets, but for a little."""
    layer = eqx.nn.Linear(inputs, outputs, key=key)
    if not identity:
        return layer
    almost_constant = (layer.weight * SMALL, jnp.full(outputs, bias))
    return eqx.tree_at(lambda l: (l.weight, l.bias), layer, almost_constant)


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
        if identity:
            self.convex = jnp.full((outputs, inputs), total / inputs)
        else:
            self.convex = jr.uniform(k_convex, (outputs, inputs)) / math.sqrt(inputs)
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
        quadratics, identity = genes, options.identity_init
        self.gate = eqx.nn.Linear(genes, quadratics, use_bias=False, key=k_gate).weight
        if identity:
            self.roots = jnp.tile(jnp.eye(genes), (quadratics, 1, 1))
            self.centres = jnp.zeros((quadratics, genes))
        else:
            self.roots = jr.normal(k_roots, (quadratics, genes, genes)) / math.sqrt(genes)
            self.centres = jr.normal(k_centres, (quadratics, genes))
        labels, layers = [], []
        inputs, total = quadratics, quadratics  # the quadratics' weights sum to one, so they are summed; then means
        for i in range(options.layers):
            key_label, key_layer = jr.fold_in(k_labels, i), jr.fold_in(k_layers, i)
            labels.append(eqx.nn.Linear(inputs, options.hidden, key=key_label))
            layers.append(Layer(genes, inputs, options.hidden, total, identity, key=key_layer))
            inputs, total = options.hidden, 1
        layers.append(Layer(genes, inputs, 1, total, identity, key=jr.fold_in(k_layers, options.layers)))
        self.labels, self.layers = tuple(labels), tuple(layers)

    def __call__(self, x: Float[Array, "D"], treatment: Float[Array, "D"]) -> Float[Array, ""]:
        """The potential. Under a vmap over cells only, what depends on the treatment alone is computed once."""
        u = jax.nn.softmax(10 * self.gate @ treatment)  # L
        # A_l (x - m_l) of all l in one product of matrices
        constant = jnp.einsum("lij,lj->li", self.roots, self.centres).ravel()
        moved = self.roots.reshape(-1, len(x)) @ x - constant  # L*D
        squared = (moved**2).reshape(len(u), -1).sum(axis=-1)
        z = jax.nn.leaky_relu(u * squared / 2)  # L
        for label, layer in zip(self.labels, self.layers):
            z = jax.nn.leaky_relu(layer(x, u, z))  # H, from the u before
            u = jax.nn.leaky_relu(label(u))
        return self.layers[-1](x, u, z)[0]


def transport(g: Potential, cells: Float[Array, "n D"], treatment: Float[Array, "D"]) -> Float[Array, "n D"]:
    """T(x) = grad_x g(x, t) of each cell."""
    return jax.vmap(jax.grad(g), (0, None))(cells, treatment)


# --------------------------------------------------------------------------------- the game of f and g (Makkuva et al.)


def mean_potential(f: Potential, cells: Float[Array, "n D"], treatment: Float[Array, "D"]) -> Float[Array, ""]:
    """E[f(x, t)]."""
    return jax.vmap(f, (0, None))(cells, treatment).mean()


def convex_weights(f) -> list:
    """Wz of each layer."""
    return [layer.convex for layer in f.layers]


def negative_norm(g: Potential) -> Float[Array, ""]:
    """Frobenius norm of the negative part of each Wz, summed over layers."""
    total = jnp.zeros(())
    for weights in convex_weights(g):
        squared = (jnp.minimum(weights, 0) ** 2).sum()
        # The root has no derivative at zero, where all is well: without this, every gradient is NaN from the start.
        total += jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)
    return total


def loss_g(g: Potential, f: Potential, x: Float[Array, "n D"], treatment: Float[Array, "D"],
           penalty: float) -> Float[Array, ""]:
    """E[f(T(x)) - <x, T(x)>]: for a fixed f, the T that minimises it is the inverse of grad f."""
    moved = transport(g, x, treatment)
    product = (x * moved).sum(axis=-1).mean()
    return mean_potential(f, moved, treatment) - product + penalty * negative_norm(g)


def loss_f(f: Potential, moved: Float[Array, "n D"], y: Float[Array, "n D"],
           treatment: Float[Array, "D"]) -> Float[Array, ""]:
    """E[f(y) - f(T(x))]: f tells treated cells from moved ones, and ends at zero when it no longer can.

    So this is no measure of progress: it is near zero at the start too, before f has learnt anything.
    """
    return mean_potential(f, y, treatment) - mean_potential(f, moved, treatment)


def clamp(f: Potential) -> Potential:
    """f with its Wz >= 0, which makes it convex. g is only asked to be, by the penalty in its loss."""
    return eqx.tree_at(convex_weights, f, [jnp.maximum(weights, 0) for weights in convex_weights(f)])


class CondOT(fitting.Trained):
    """Cells of any system moved by one map per treatment, each cell alone.

    A treatment never trained on is, for `unseen="zero"`, a treatment of zeros: all quadratics weigh the same. No known
    condition is like that, so nothing says where cells go.
    """

    Options = Options
    conditions_on = ("treatment",)  # Table 1
    grid = {"hidden": (64, 128, 256), "layers": (2, 3, 4)}  # Table 7

    @staticmethod
    @eqx.filter_jit
    def build(options, level, systems, log_expression, *, key):
        """f and g."""
        key_f, key_g = jr.split(key)
        return Potential(len(level), options, key=key_f), Potential(len(level), options, key=key_g)

    @staticmethod
    @functools.cache
    def make_step(options):
        """One update: `inner` steps of g and one of f, each on a known condition of its own (released code)."""
        # Adam with a short memory (the method's default); on one long vector, which compiles faster.
        adam = optax.flatten(optax.adam(options.learning_rate, b1=0.5, b2=0.9))

        def step(state, data, i, key):
            (f, g), (adam_f, adam_g) = state
            drawn = fitting.draw_many(data, options.batch, options.inner + 1, key=key)
            last = jax.tree.map(lambda array: array[-1], drawn)

            def step_g(carry, batch):
                g, adam_g = carry
                gradient = jax.grad(loss_g)(g, f, batch.controls, batch.treatment, options.penalty)
                return fitting.update(adam, gradient, g, adam_g), None

            (g, adam_g), _ = jax.lax.scan(step_g, (g, adam_g), jax.tree.map(lambda array: array[:-1], drawn))
            moved = transport(g, last.controls, last.treatment)  # constants to f: T does not learn from f's loss
            loss, gradient = jax.value_and_grad(loss_f)(f, moved, last.treated, last.treatment)
            f, adam_f = fitting.update(adam, gradient, f, adam_f)
            return ((clamp(f), g), (adam_f, adam_g)), loss

        return (adam, adam), step

    @staticmethod
    @eqx.filter_jit
    def carry(networks, options, controls, treatment, system, *, key):
        """T(x) of each control cell."""
        _, g = networks
        return transport(g, controls, treatment)
