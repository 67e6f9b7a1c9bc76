"""Stage 3 of 8, the network: a multimodal diffusion transformer (MMDiT) that maps one task to a velocity.

Paper: section 4.1, appendix A.1, equation 3 (the loss itself is in `train.py`). Reads and writes model files;
`train.py` and `sample.py` import it. `python model.py` prints the number of parameters at each scale, in seconds.
Departures from the paper, marked where they happen: D2, D4, D11, D12, D34.

How matrices are multiplied, and which kind of attention a machine is given, is in `attention.py`.

The network sees *one* task and `jax.vmap` adds the batch. Cells are tokens, genes are the features of a token, and no
token knows its position: whatever the network has to know about a token is added to it as a learnt embedding. What does
not depend on the noise or the time, the condition, is computed once for each task.

    paper        name here            shape     meaning
    Y_tau        y_tau                N D       noise on its way to the predicted cells
    tau          tau                            flow time, 0 noise, 1 data
    Y^obs        given.controls       M D       control cells
    Y_k^int      given.context        K M D     cells of the K context experiments
    t_k          given.context_treatments  K D  their treatments, one-hot times the do-value (B.1)
    t_q          given.query          D         the treatment whose cells are wanted
    v            velocity             N D       d Y_tau / d tau, what the network returns

    K context experiments   M cells of a population, N generated   D genes   E embedding (width)   H heads   F = E / H
    R registers   T all tokens

Another network is a class in a file of its own, named `--network file.Class`, with the same two methods as `MapPFN`.
"""

import dataclasses
import functools
import importlib
import io
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

import scales
from attention import ATTENTION, PRECISIONS, chosen, product
from scales import BadInput
from tasks import Given

SLOTS = 10  # context slots: any K up to this many works at test time, whatever K was trained on (released code)
ROLES = ("observational", "interventional", "treatment")
SPEED = {"attention", "precision", "remat"}  # settings that change no number but by rounding


@dataclass(frozen=True)
class Architecture:
    """What a network is made of."""
    network: str = "model.MapPFN"  # file and class
    width: int = 256  # embedding size E (A.1)
    depth: int = 8  # blocks (A.1)
    heads: int = 4  # attention heads H (A.1)
    registers: int = 8  # register tokens R of the noise stream (A.1)
    film_query: bool = False  # the query modulates every token, as the time does [D34]
    treatment_gain: float = 1.0  # of the initial weights of the treatment stream [D11]
    skip: bool = False  # predict what is to be added to the velocity of N(0, I) [D12]
    attention: str = "auto"  # plain, looped (CPU), cudnn (GPU), or auto: changes no number but by rounding
    precision: str = "auto"  # of matrix products: float32, bfloat16, or auto: bfloat16 on a GPU [D56]
    remat: bool = True  # recompute activations in the backward pass: less memory, changes no number (released code)


# ----------------------------------------------------------------------------------------------- the network (4.1, A.1)


class MapPFN(eqx.Module):
    """v_theta(Y_tau | t_q, Y^obs, C) of equation 3, for one task."""

    noise_in: eqx.nn.Linear  # D -> E
    cells_in: eqx.nn.Linear  # D -> E, then the embeddings are added, then
    cells_mix: eqx.nn.Linear  # E -> E
    treatments_in: eqx.nn.Linear
    treatments_mix: eqx.nn.Linear
    time: eqx.nn.MLP
    registers: Float[Array, "R D"]
    modality: Float[Array, "3 E"]
    role: Float[Array, "3 E"]
    slot: Float[Array, "slots E"]
    is_query: Float[Array, " E"]
    null: Float[Array, " E"]
    blocks: "Block"  # all blocks in one, each parameter with a leading depth axis
    velocity_out: eqx.nn.Linear
    a: Architecture = eqx.field(static=True)

    def __init__(self, a: Architecture, genes: int, *, key: PRNGKeyArray):
        """Raises BadInput if the sizes do not fit together."""
        if a.heads < 1 or a.depth < 1 or a.registers < 0 or a.width < 1 or a.width % (2 * a.heads):
            raise BadInput(f"width {a.width} must be a multiple of twice the number of heads ({a.heads}), "
                           f"depth ({a.depth}) at least 1, registers ({a.registers}) at least 0")
        keys = jr.split(key, 14)
        self.noise_in = eqx.nn.Linear(genes, a.width, key=keys[0])
        self.cells_in = eqx.nn.Linear(genes, a.width, key=keys[1])
        self.cells_mix = eqx.nn.Linear(a.width, a.width, key=keys[2])
        self.treatments_in = eqx.nn.Linear(genes, a.width, key=keys[3])
        if a.treatment_gain != 1:  # a one-hot has one input switched on, not `genes` of them (part of D11)
            self.treatments_in = scaled(self.treatments_in, math.sqrt(genes))
        self.treatments_mix = eqx.nn.Linear(a.width, a.width, key=keys[4])
        self.time = eqx.nn.MLP(a.width, a.width, 4 * a.width, 1, activation=jax.nn.silu, key=keys[5])
        self.registers = embedding(keys[6], a.registers, genes)  # learnt in gene space (released code)
        self.modality = embedding(keys[7], 3, a.width)
        self.role = embedding(keys[8], len(ROLES), a.width)
        self.slot = embedding(keys[9], SLOTS, a.width)
        self.is_query = embedding(keys[10], a.width)
        self.null = embedding(keys[11], a.width)
        one_block = functools.partial(make_block, a)
        self.blocks = eqx.filter_vmap(one_block)(jr.split(keys[12], a.depth))
        self.velocity_out = eqx.nn.Linear(a.width, genes, key=keys[13])
        self.a = a

    def condition(self, given: Given, slots: Int[Array, " K"]) -> tuple[Float[Array, "n E"], Float[Array, "m E"]]:
        """Tokens of the cell stream, n = (1 + K) M of them, and of the treatment stream, m = 1 + K.

        Embeddings tell apart (a) the experiments, (b) observational from interventional data and (c) the query (A.1).
        A context experiment's cells and its treatment carry the same slot embedding: that is how one finds the other.
        `slots` are K different numbers below SLOTS.
        """
        observational, interventional, treatment = self.role
        slot = self.slot[slots]  # K E

        controls = jax.vmap(self.cells_in)(given.controls)  # M E
        controls = controls + observational + self.is_query
        context = jax.vmap(jax.vmap(self.cells_in))(given.context)  # K M E
        context = context + interventional + slot[:, None]
        cells = jnp.concatenate([controls, context.reshape(-1, controls.shape[-1])])  # (1+K)M E
        cells = jax.vmap(self.cells_mix)(cells + self.modality[1])

        query = self.treatments_in(given.query) + self.is_query  # E
        others = jax.vmap(self.treatments_in)(given.context_treatments) + slot  # K E
        treatments = jnp.concatenate([query[None], others])  # 1+K E
        treatments = jax.vmap(self.treatments_mix)(treatments + treatment + self.modality[2])
        return cells, treatments

    def __call__(self, y_tau: Float[Array, "N D"], tau: Float[Array, ""],
                 condition: tuple[Float[Array, "n E"], Float[Array, "m E"]],
                 drop: Bool[Array, ""]) -> Float[Array, "N D"]:
        """Velocity of each cell (equation 3).

        `drop` True is the null condition of classifier-free guidance: one learnt vector instead of each token of both
        streams (A.2). Any number of cells can be generated.
        """
        noise = jnp.concatenate([self.registers, y_tau])  # R+N D
        noise = jax.vmap(self.noise_in)(noise) + self.modality[0]  # R+N E
        cells = jnp.where(drop, self.null, condition[0])
        treatments = jnp.where(drop, self.null, condition[1])

        modulation = self.time(time_features(tau, self.a.width))  # E
        if self.a.film_query:
            # [D34] paper, released code: FiLM by the time alone; here, at smoke and laptop scale: by the time plus the
            # query's token, as Esser et al. (2024) add the pooled text to the time. A knock-out silences one gene
            # whatever other cells say: a product of query and cell, which attention takes many more updates to learn.
            modulation = modulation + treatments[0]

        # All blocks are one scan over their stacked parameters: compiled once, whatever the depth.
        parameters, static = eqx.partition(self.blocks, eqx.is_array)

        def apply(streams, parameters):
            block = eqx.combine(parameters, static)
            return block(streams, modulation), None

        if self.a.remat:
            apply = jax.checkpoint(apply)
        (noise, _, _), _ = jax.lax.scan(apply, (noise, cells, treatments), parameters)
        velocity = jax.vmap(self.velocity_out)(noise[len(self.registers):])  # N D, without the registers
        if self.a.skip:
            velocity = velocity + gaussian_velocity(y_tau, tau)
        return velocity


class Block(eqx.Module):
    """Three streams that keep separate weights and meet in one joint attention (A.1)."""

    noise: "Stream"
    cells: "Stream"
    treatments: "Stream"
    attention: str = eqx.field(static=True)
    precision: str = eqx.field(static=True)

    def __call__(self, streams: tuple, modulation: Float[Array, " E"]) -> tuple:
        """The tokens of the noise, cell and treatment streams, each [n, E] -> the same shapes."""
        weights = (self.noise, self.cells, self.treatments)
        films, queries, keys, values = [], [], [], []
        for stream, x in zip(weights, streams):
            film = stream.modulation(modulation)  # the same for all tokens of a stream: computed once
            q, k, v = stream.before(x, film, self.precision)
            films.append(film)
            queries.append(q)
            keys.append(k)
            values.append(v)
        attended = joint_attention(jnp.concatenate(queries), jnp.concatenate(keys), jnp.concatenate(values),
                                   self.attention, self.precision)  # T H F
        after, first = [], 0
        for stream, x, film in zip(weights, streams, films):
            after.append(stream.after(x, attended[first : first + len(x)], film, self.precision))
            first += len(x)
        return tuple(after)


class Stream(eqx.Module):
    """One stream's own weights in one block: FiLM by time, queries, keys and values, and the feed-forward network."""

    film: eqx.nn.Linear
    qkv: eqx.nn.Linear
    q_norm: eqx.nn.RMSNorm
    k_norm: eqx.nn.RMSNorm
    out: eqx.nn.Linear
    expand: eqx.nn.Linear
    contract: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    heads: int = eqx.field(static=True)

    def __init__(self, width: int, heads: int, value_gain: float = 1.0, *, key: PRNGKeyArray):
        """`value_gain` multiplies the initial weights of the attention values."""
        k_film, k_qkv, k_out, k_expand, k_contract = jr.split(key, 5)
        film = eqx.nn.Linear(width, 4 * width, key=k_film)
        self.film = jax.tree.map(jnp.zeros_like, film)  # at initialisation the time changes nothing
        gain = jnp.repeat(jnp.array([1, 1, value_gain]), width)[:, None]  # of queries, keys, values
        self.qkv = scaled(eqx.nn.Linear(width, 3 * width, use_bias=False, key=k_qkv), gain)
        self.q_norm = eqx.nn.RMSNorm(width // heads, use_bias=False)
        self.k_norm = eqx.nn.RMSNorm(width // heads, use_bias=False)
        self.out = eqx.nn.Linear(width, width, key=k_out)
        # [D2] paper: expansion to 512 (2x); released code: 1024 (4x); here: 4x, the only one that gives the paper's
        # "about 25M parameters" (25.9M against 19.6M).
        self.expand = eqx.nn.Linear(width, 4 * width, key=k_expand)
        self.contract = eqx.nn.Linear(4 * width, width, key=k_contract)
        self.norm = eqx.nn.LayerNorm(width, use_weight=False, use_bias=False)  # FiLM is the scale and shift of the norm
        self.heads = heads

    # Exercise 4
    def modulation(self, time: Float[Array, " E"]) -> Float[Array, "4 E"]:
        """FiLM (Perez et al., 2018): scale and shift before attention, and again before the feed-forward network."""
        return self.film(time).reshape(4, -1)

    def before(self, x: Float[Array, "n E"], film: Float[Array, "4 E"], precision: str) -> tuple:
        """Queries, keys and values [n, H, F]; queries and keys are RMS-normalised, as in Esser et al. (2024)."""
        x = jax.vmap(self.norm)(x) * (1 + film[0]) + film[1]
        qkv = product(self.qkv, x, precision).reshape(len(x), 3, self.heads, -1)  # n 3 H F
        q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        q = jax.vmap(jax.vmap(self.q_norm))(q)
        k = jax.vmap(jax.vmap(self.k_norm))(k)
        return q, k, v

    def after(self, x: Float[Array, "n E"], attended: Float[Array, "n H F"],
              film: Float[Array, "4 E"], precision: str) -> Float[Array, "n E"]:
        """Add what attention brought, then the feed-forward network; residual branches are not gated."""
        x = x + product(self.out, attended.reshape(len(x), -1), precision)
        y = jax.vmap(self.norm)(x) * (1 + film[2]) + film[3]
        hidden = jax.nn.gelu(product(self.expand, y, precision))  # n 4E
        return x + product(self.contract, hidden, precision)


def joint_attention(q: Float[Array, "T H F"], k: Float[Array, "T H F"], v: Float[Array, "T H F"],
                    kind: str = "auto", precision: str = "auto") -> Float[Array, "T H F"]:
    """Every token attends to every token of all three streams (A.1); in which way changes no number but by rounding."""
    kind = chosen(kind, precision, q.shape[-1])
    return ATTENTION[kind](q, k, v, precision)


def make_block(a: Architecture, key: PRNGKeyArray) -> Block:
    """A block with random weights."""
    k_noise, k_cells, k_treatments = jr.split(key, 3)
    # [D11] paper: silent; released code: no gain; here, at smoke and laptop scale: the values of the treatment stream
    # start 10 times larger. Its 1 + K tokens stand beside (1 + K) M cells, so attention that has learnt nothing yet
    # drowns them, and a short training spends most of its updates on finding out that there is a query.
    treatments = Stream(a.width, a.heads, a.treatment_gain, key=k_treatments)
    return Block(Stream(a.width, a.heads, key=k_noise), Stream(a.width, a.heads, key=k_cells), treatments,
                 a.attention, a.precision)


def scaled(linear: eqx.nn.Linear, gain: float | Float[Array, "out 1"]) -> eqx.nn.Linear:
    """The same layer with its weights, or each of its outputs' weights, multiplied."""
    return eqx.tree_at(lambda l: l.weight, linear, linear.weight * gain)


def embedding(key: PRNGKeyArray, *shape: int) -> Float[Array, "..."]:
    """A learnt embedding, N(0, 1/dim) at the start (released code)."""
    return jr.normal(key, shape) / math.sqrt(shape[-1])


def time_features(tau: Float[Array, ""], width: int) -> Float[Array, " E"]:
    """Sinusoidal features of the flow time, with angles up to 100 tau."""
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(width // 2) / (width // 2))
    angles = 100 * tau * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])


def gaussian_velocity(y_tau: Float[Array, "N D"], tau: Float[Array, ""]) -> Float[Array, "N D"]:
    """E[Y - Y_0 | Y_tau] if Y is N(0, I): the part of the answer that needs no data.

    [D12] paper, released code: the network is the velocity; here, at smoke and laptop scale: it is what must be added
    to this, because learning it takes a short training most of its updates (tokens are normalised, so size is lost).
    """
    return y_tau * (2 * tau - 1) / (tau**2 + (1 - tau) ** 2)


# ------------------------------------------------------------------------------------ how the rest of the code uses it


def prepare(network: eqx.Module, given: Given, *, key: PRNGKeyArray) -> PyTree:
    """The condition of one task, for any number of noises and times.

    [D4] paper: an embedding "for each treatment in the context"; released code: slots 0..K-1 in order, the query in
    slot K; here: slots drawn at random, the query in none, so any K up to SLOTS works and order says nothing.
    """
    slots = jr.permutation(key, SLOTS)[: len(given.context)]
    return network.condition(given, slots)


def build(a: Architecture, genes: int, *, key: PRNGKeyArray) -> eqx.Module:
    """A randomly initialised network. Raises BadInput if there is no such network, or its sizes do not fit."""
    file, _, name = a.network.rpartition(".")
    try:
        kind = getattr(importlib.import_module(file), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"--network {a.network}: expected file.Class, such as model.MapPFN ({error})") from None
    for name, known in (("attention", (*ATTENTION, "auto")), ("precision", PRECISIONS)):
        if getattr(a, name) not in known:
            raise BadInput(f"--{name} {getattr(a, name)}: expected one of {', '.join(known)}")
    return kind(architecture(a), genes, key=key)


def architecture(s: Architecture) -> Architecture:
    """That part of a script's settings."""
    return Architecture(**{field.name: getattr(s, field.name) for field in dataclasses.fields(Architecture)})


def slots_of(network: eqx.Module) -> int:
    """Largest K that a network can be given: its context slots, or as many as there are."""
    return 10**6 if takes_any_genes(network) else SLOTS


def takes_any_genes(network: eqx.Module) -> bool:
    """Does it have no weights that belong to a gene?"""
    return getattr(network, "ANY_GENES", False)


def count_parameters(network: PyTree) -> int:
    """Number of trainable scalars; 25.9M at the paper's settings and 50 genes. Shapes alone will do."""
    total = 0
    for leaf in jax.tree.leaves(network):
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact):
            total += math.prod(leaf.shape)
    return total


def write_leaves(path: Path, head: dict, tree: PyTree) -> None:
    """One line of JSON, with a checksum of all else, then the arrays (Equinox's format), whole or not at all."""
    arrays = io.BytesIO()
    eqx.tree_serialise_leaves(arrays, tree)
    line = json.dumps(head, default=str)
    checked = zlib.crc32(arrays.getvalue(), zlib.crc32(line.encode()))
    with scales.atomic(path) as temporary, open(temporary, "wb") as file:
        file.write((json.dumps(json.loads(line) | {"checksum": checked}) + "\n").encode())
        file.write(arrays.getvalue())


def read_leaves(path: Path, like) -> tuple[dict, PyTree]:
    """What `write_leaves` wrote; `like` makes a tree of the right shapes from the header.

    Raises BadInput if the file is missing or damaged.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such checkpoint; train.py writes it")
    with open(path, "rb") as file:
        try:
            head = json.loads(file.readline())
            written, arrays = head.pop("checksum"), file.read()
            if zlib.crc32(arrays, zlib.crc32(json.dumps(head).encode())) != written:
                raise ValueError("some of it has changed since it was written")
            return head, eqx.tree_deserialise_leaves(io.BytesIO(arrays), like(head))
        except BadInput:  # raised by `like`, about the settings; it is a ValueError too
            raise
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, EOFError) as error:
            reason = [*str(error).splitlines(), type(error).__name__][0]
            raise BadInput(f"{path}: not a checkpoint of this program, or damaged ({reason}); if "
                           "train.py wrote it, delete it to train anew") from None


def run_folder(s, run: str, split: int) -> Path:
    """Where a run of train.py keeps its model."""
    return s.out / s.scale / "train" / run / f"split-{split}"


def model_file(s, run: str, screen: str, split: int) -> Path:
    """The model of a run to use for one split of a screen: the run's own for that split if it was trained on that
    screen, and its first one otherwise.

    Raises BadInput if there is none. (Models of other splits of a screen must not be used: their training conditions
    may be this split's test conditions.)
    """
    first = run_folder(s, run, 0) / "model.eqx"
    if first.is_file() and load_model(first)[0]["screen"] != screen:
        return first
    own = run_folder(s, run, split) / "model.eqx"
    if not own.is_file():
        raise BadInput(f"{own}: no such model; train.py --screen {screen} --name {run} makes it")
    return own


def load_model(path: Path) -> tuple[dict, eqx.Module]:
    """Header and network of a finished run. Raises BadInput if the file is missing or damaged."""
    return read_leaves(path, outline_of)


def outline_of(head: dict) -> eqx.Module:
    """A network of the header's sizes, shapes only: its numbers would take seconds to make."""
    decisive = {field.name for field in dataclasses.fields(Architecture)} - SPEED
    chosen = {name: head[name] for name in decisive}
    return outline(Architecture(**chosen, remat=False), head["genes"])


@functools.cache
def outline(a: Architecture, genes: int) -> eqx.Module:
    """Shapes of a network with these settings."""
    return eqx.filter_eval_shape(lambda: build(a, genes, key=jr.key(0)))


def main() -> None:
    """Print the number of parameters at each scale."""
    for scale in scales.SCALES:
        fields = {field.name for field in dataclasses.fields(Architecture)}
        changed = {name: value for name, value in scales.at(scale, "train").items() if name in fields}
        for genes in {"smoke": (8,), "laptop": (20,), "paper": (20, 50)}[scale]:
            total = count_parameters(outline(Architecture(**changed), genes))
            print(f"{scale:8}{genes:4} genes {total / 1e6:8.2f}M parameters")


if __name__ == "__main__":
    scales.run(main)
