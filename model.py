"""Stage 3 of 8, the network: a multimodal diffusion transformer (MMDiT) that maps one task to a velocity.

Paper: section 4.1, appendix A.1, equation 3 (the loss itself is in `train.py`). Reads and writes nothing; `train.py`
and `sample.py` import it. `python model.py` prints the number of parameters at each scale, in seconds on anything.
Departures from the paper, marked where they happen: D2, D3, D4, D11, D12, D34.

The network sees *one* task and `jax.vmap` adds the batch. Cells are tokens, genes are the features of a token, and no
token knows its position: whatever the network has to know about a token is added to it as a learnt embedding.

    paper        name here            shape     meaning
    Y_tau        y_tau                N D       noise on its way to the predicted cells
    tau          tau                            flow time, 0 noise, 1 data
    Y^obs        observed             N D       control cells
    Y_k^int      context              K N D     cells of the K context experiments
    t_k          context_treatments   K D       their treatments, one-hot times the do-value (B.1)
    t_q          query                D         the treatment whose cells are wanted
    v            velocity             N D       d Y_tau / d tau, what the network returns

    K context experiments   N cells of a population   D genes   E embedding (width)   H heads   F = E / H   T all tokens
"""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

import scales

SLOTS = 10  # context slots: any K up to this many works at test time, whatever K was trained on (released code)
ROLES = ("observational", "interventional", "treatment")


# ------------------------------------------------------------------------------------------------ joint attention (A.1)


def plain_attention(q: Float[Array, "T H F"], k: Float[Array, "T H F"],
                    v: Float[Array, "T H F"]) -> Float[Array, "T H F"]:
    """Every token attends to every token of all three streams; no mask, since there is never any padding."""
    scores = jnp.einsum("thf,shf->hts", q, k) / math.sqrt(q.shape[-1])
    return jnp.einsum("hts,shf->thf", jax.nn.softmax(scores), v)


# The same, one head of one task at a time. XLA's batched product of many small matrices is slow on a CPU, and the
# H x T x T scores of a whole batch leave the cache; those of one head do not. `sequential_vmap` turns every vmap around
# these two functions (over heads here, over tasks in train.py) into a loop. The backward pass is written out (as in
# FlashAttention) because a loop of this kind has no transpose rule, and it recomputes scores rather than store them.


@jax.custom_batching.sequential_vmap
def _head_forward(q, k, v):
    scores = q @ k.T  # T T, q is already scaled
    top = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    return (weights @ v) / total, top + jnp.log(total)


@jax.custom_batching.sequential_vmap
def _head_backward(q, k, v, out, log_total, d_out):
    weights = jnp.exp(q @ k.T - log_total)  # the softmax again
    d_scores = weights * (d_out @ v.T - (d_out * out).sum(axis=-1, keepdims=True))
    return d_scores @ k, d_scores.T @ q, weights.T @ d_out


@jax.custom_vjp
def _heads(q, k, v):
    return jax.vmap(_head_forward)(q, k, v)[0]


def _heads_forward(q, k, v):
    out, log_total = jax.vmap(_head_forward)(q, k, v)
    return out, (q, k, v, out, log_total)


_heads.defvjp(_heads_forward, lambda saved, d_out: jax.vmap(_head_backward)(*saved, d_out))


def looped_attention(q: Float[Array, "T H F"], k: Float[Array, "T H F"],
                     v: Float[Array, "T H F"]) -> Float[Array, "T H F"]:
    """`plain_attention` as a loop over heads and tasks: faster on a CPU, slower on a GPU."""
    q, k, v = (x.swapaxes(0, 1) for x in (q / math.sqrt(q.shape[-1]), k, v))  # H T F
    return _heads(q, k, v).swapaxes(0, 1)


def cudnn_attention(q: Float[Array, "T H F"], k: Float[Array, "T H F"],
                    v: Float[Array, "T H F"]) -> Float[Array, "T H F"]:
    """cuDNN's flash attention in bfloat16, for GPUs. T is rounded up to 64 and the padding keys are masked."""
    tokens, padding = q.shape[0], -q.shape[0] % 64
    q, k, v = (jnp.pad(x, ((0, padding), (0, 0), (0, 0))).astype(jnp.bfloat16)[None] for x in (q, k, v))
    length = jnp.full((1,), tokens, jnp.int32)  # [D3] released code: padding not masked; here it is and changes nothing
    out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=length, implementation="cudnn")
    return out[0, :tokens].astype(jnp.float32)


ATTENTION = {"plain": plain_attention, "looped": looped_attention, "cudnn": cudnn_attention}


def joint_attention(q, k, v, kind: str = "auto"):
    """Attention by name. `auto` takes the loop on a CPU and the plain form elsewhere."""
    if kind == "auto":
        kind = "looped" if jax.default_backend() == "cpu" else "plain"
    return ATTENTION[kind](q, k, v)


# ------------------------------------------------------------------------------------------------ one MMDiT block (A.1)


def scaled(linear: eqx.nn.Linear, gain: float | Float[Array, "out 1"]) -> eqx.nn.Linear:
    """The same layer with its weights, or each of its outputs' weights, multiplied."""
    return eqx.tree_at(lambda l: l.weight, linear, linear.weight * gain)


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

    def modulation(self, time: Float[Array, " E"]) -> Float[Array, "4 E"]:
        """FiLM (Perez et al., 2018): scale and shift before attention, and again before the feed-forward network."""
        return self.film(time).reshape(4, -1)

    def before(self, x: Float[Array, "n E"], film: Float[Array, "4 E"]) -> tuple:
        """Queries, keys and values [n, H, F]; queries and keys are RMS-normalised, as in Esser et al. (2024)."""
        x = jax.vmap(self.norm)(x) * (1 + film[0]) + film[1]
        q, k, v = jnp.split(jax.vmap(self.qkv)(x), 3, axis=-1)  # each n E
        q, k, v = (y.reshape(len(y), self.heads, -1) for y in (q, k, v))  # n H F
        per_head = lambda norm: jax.vmap(jax.vmap(norm))
        return per_head(self.q_norm)(q), per_head(self.k_norm)(k), v

    def after(self, x: Float[Array, "n E"], attended: Float[Array, "n H F"],
              film: Float[Array, "4 E"]) -> Float[Array, "n E"]:
        """Add what attention brought, then the feed-forward network; residual branches are not gated."""
        x = x + jax.vmap(self.out)(attended.reshape(len(x), -1))
        y = jax.vmap(self.norm)(x) * (1 + film[2]) + film[3]
        return x + jax.vmap(self.contract)(jax.nn.gelu(jax.vmap(self.expand)(y)))


class Block(eqx.Module):
    """Three streams that keep separate weights and meet in one joint attention."""

    streams: tuple[Stream, Stream, Stream]

    def __init__(self, width: int, heads: int, treatment_gain: float = 1.0, *, key: PRNGKeyArray):
        # [D11] paper: silent; released code: no gains; here, at smoke and laptop scale: the values of the treatment
        # stream start 10 times larger. Its 1 + K tokens stand beside (1 + K) N cells, so attention that has learnt
        # nothing yet drowns them, and a short training spends most of its updates on finding out that there is a query.
        gains = (1.0, 1.0, treatment_gain)
        self.streams = tuple(Stream(width, heads, g, key=k) for g, k in zip(gains, jr.split(key, 3)))

    def __call__(self, xs: tuple, time: Float[Array, " E"], attention: str) -> tuple:
        """The tokens of the noise, cell and treatment streams, each [n, E] -> the same shapes."""
        # Every token of a task has the same time, so FiLM is computed once per task and stream, not once per token.
        films = [stream.modulation(time) for stream in self.streams]
        qkv = zip(*(s.before(x, f) for s, x, f in zip(self.streams, xs, films)))
        q, k, v = (jnp.concatenate(part) for part in qkv)  # T H F
        ends = [len(xs[0]), len(xs[0]) + len(xs[1])]
        attended = jnp.split(joint_attention(q, k, v, attention), ends)
        return tuple(s.after(x, a, f) for s, x, a, f in zip(self.streams, xs, attended, films))


# ----------------------------------------------------------------------------------------------- the network (4.1, A.1)


def time_features(tau: Float[Array, ""], width: int) -> Float[Array, " E"]:
    """Sinusoidal features of the flow time, with angles up to 100 tau."""
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(width // 2) / (width // 2))
    return jnp.concatenate([f(100 * tau * frequencies) for f in (jnp.cos, jnp.sin)])


def gaussian_velocity(y_tau: Float[Array, "N D"], tau: Float[Array, ""]) -> Float[Array, "N D"]:
    """E[Y - Y_0 | Y_tau] if Y is N(0, I): the part of the answer that needs no data.

    [D12] paper, released code: the network is the velocity; here, at smoke and laptop scale: it is what must be added
    to this, because learning it takes a short training most of its updates (tokens are normalised, so size is lost).
    """
    return y_tau * (2 * tau - 1) / (tau**2 + (1 - tau) ** 2)


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
    blocks: Block  # all blocks in one, each parameter with a leading depth axis
    velocity_out: eqx.nn.Linear
    attention: str = eqx.field(static=True)
    remat: bool = eqx.field(static=True)
    skip: bool = eqx.field(static=True)
    film_query: bool = eqx.field(static=True)

    def __init__(self, genes: int, width: int, depth: int, heads: int, registers: int, *, attention: str = "auto",
                 remat: bool = False, skip: bool = False, film_query: bool = False, treatment_gain: float = 1.0,
                 key: PRNGKeyArray):
        """`remat` recomputes a block's activations in the backward pass: a quarter slower, memory divided by `depth`.

        `skip` adds to the output the velocity that would be right if all cells were N(0, I), see `gaussian_velocity`;
        `film_query` lets the query modulate all tokens, as the time does [D34]; `treatment_gain` enlarges the initial
        weights of the treatment stream [D11].
        """
        if width % (2 * heads) or depth < 1:
            raise scales.BadInput(f"width {width} must be a multiple of twice the number of heads ({heads}), "
                                  "depth at least 1")
        keys = jr.split(key, 14)
        self.noise_in = eqx.nn.Linear(genes, width, key=keys[0])
        self.cells_in = eqx.nn.Linear(genes, width, key=keys[1])
        self.cells_mix = eqx.nn.Linear(width, width, key=keys[2])
        # A one-hot has one input switched on, not `genes` of them (part of D11).
        fan_in = math.sqrt(genes) if treatment_gain != 1 else 1.0
        self.treatments_in = scaled(eqx.nn.Linear(genes, width, key=keys[3]), fan_in)
        self.treatments_mix = eqx.nn.Linear(width, width, key=keys[4])
        self.time = eqx.nn.MLP(width, width, 4 * width, 1, activation=jax.nn.silu, key=keys[5])
        embedding = lambda k, *shape: jr.normal(k, shape) / math.sqrt(shape[-1])  # N(0, 1/dim) (released code)
        self.registers = embedding(keys[6], registers, genes)  # learnt in gene space (released code)
        self.modality = embedding(keys[7], 3, width)
        self.role = embedding(keys[8], len(ROLES), width)
        self.slot = embedding(keys[9], SLOTS, width)
        self.is_query = embedding(keys[10], width)
        self.null = embedding(keys[11], width)
        self.blocks = eqx.filter_vmap(lambda k: Block(width, heads, treatment_gain, key=k))(jr.split(keys[12], depth))
        self.velocity_out = eqx.nn.Linear(width, genes, key=keys[13])
        self.attention, self.remat, self.skip, self.film_query = attention, remat, skip, film_query

    def condition(self, observed: Float[Array, "N D"], context: Float[Array, "K N D"],
                  context_treatments: Float[Array, "K D"], query: Float[Array, " D"], slots: Int[Array, " K"],
                  drop: Bool[Array, ""]) -> tuple[Float[Array, "cells E"], Float[Array, "treatments E"]]:
        """Tokens of the cell stream ((1 + K) N of them) and of the treatment stream (1 + K).

        Embeddings tell apart (a) the experiments, (b) observational from interventional data and (c) the query (A.1). A
        context experiment's cells and its treatment carry the same slot embedding: that is how one finds the other.
        """
        observational, interventional, treatment = self.role
        slot = self.slot[slots]  # K E
        # [D4] paper: an embedding "for each treatment in the context"; released code: slots 0..K-1 in order, the query
        # in slot K; here: slots drawn at random, the query in none, so any K up to SLOTS works and order says nothing.
        controls = jax.vmap(self.cells_in)(observed) + observational + self.is_query  # N E
        context = jax.vmap(jax.vmap(self.cells_in))(context) + interventional + slot[:, None]  # K N E
        cells = jnp.concatenate([controls, context.reshape(-1, controls.shape[-1])]) + self.modality[1]  # (1+K)N E
        treatments = jnp.concatenate([
            self.treatments_in(query)[None] + self.is_query,
            jax.vmap(self.treatments_in)(context_treatments) + slot,
        ]) + treatment + self.modality[2]  # 1+K E
        cells, treatments = jax.vmap(self.cells_mix)(cells), jax.vmap(self.treatments_mix)(treatments)
        # The null condition of classifier-free guidance: one learnt vector instead of each token of both streams (A.2).
        return jnp.where(drop, self.null, cells), jnp.where(drop, self.null, treatments)

    def __call__(self, y_tau: Float[Array, "N D"], tau: Float[Array, ""], observed: Float[Array, "M D"],
                 context: Float[Array, "K M D"], context_treatments: Float[Array, "K D"], query: Float[Array, " D"],
                 slots: Int[Array, " K"], drop: Bool[Array, ""]) -> Float[Array, "N D"]:
        """Velocity of each cell (equation 3). `drop` True replaces the condition by the null embedding.

        `slots` are K different numbers below SLOTS. N and M, the cells generated and those of a population, may differ.
        """
        noise = jnp.concatenate([self.registers, y_tau])  # R+N D
        noise = jax.vmap(self.noise_in)(noise) + self.modality[0]  # R+N E
        cells, treatments = self.condition(observed, context, context_treatments, query, slots, drop)
        time = self.time(time_features(tau, noise.shape[-1]))  # E
        # [D34] paper, released code: FiLM by the time alone; here, at smoke and laptop scale: by the time plus the
        # query's token, as Esser et al. (2024) add the pooled text to the time. A knock-out silences one gene whatever
        # other cells say: a product of query and cell, which FiLM is, and attention takes many more updates to learn.
        modulation = time + treatments[0] if self.film_query else time  # null embedding if the condition is dropped

        # All blocks are one scan over their stacked parameters: compiled once, whatever the depth.
        parameters, static = eqx.partition(self.blocks, eqx.is_array)

        def apply(xs, block):
            return eqx.combine(block, static)(xs, modulation, self.attention), None

        apply = jax.checkpoint(apply) if self.remat else apply
        (noise, _, _), _ = jax.lax.scan(apply, (noise, cells, treatments), parameters)
        velocity = jax.vmap(self.velocity_out)(noise[len(self.registers):])  # N D, without the registers
        return velocity + gaussian_velocity(y_tau, tau) if self.skip else velocity


def count_parameters(model: MapPFN) -> int:
    """Number of trainable scalars; 25.9M at the paper's settings and 50 genes."""
    return sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))


def main() -> None:
    """Print the number of parameters of each scale's two models."""
    for scale in scales.SCALES:
        for prior in ("linear", "grn"):
            s = scales.at(scale, "model", prior)
            build = functools.partial(MapPFN, s["genes"], s["width"], s["depth"], s["heads"], s["registers"])
            model = eqx.filter_eval_shape(build, key=jr.key(0))
            total = sum(math.prod(x.shape) for x in jax.tree.leaves(model) if hasattr(x, "shape"))
            print(f"{scale:8}{prior:8}{s['genes']:4} genes {total / 1e6:8.2f}M parameters")


if __name__ == "__main__":
    scales.run(main)
