"""Part of stage 3, how the network multiplies matrices: nothing here changes a number but by rounding.

Paper: A.1 (attention over the tokens of all streams); silent about precision. `model.py` imports it.
Departures from the paper, marked where they happen: D3, D56.

    precision   float32     as written
                bfloat16    products over tokens round their factors to bfloat16 and add up in float32
                auto        bfloat16 on a GPU, float32 elsewhere
    attention   plain       all T x T scores at once
                looped      one head of one task at a time, always in float32: for CPUs
                cudnn       flash attention, always in bfloat16: NVIDIA GPUs; scores are never stored
                auto        looped on a CPU, cudnn on a GPU that has it (in bfloat16), plain elsewhere

    n, T tokens   I features in   O features out   H heads   F features of a head
"""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PRECISIONS = ("float32", "bfloat16", "auto")

# --------------------------------------------------------------------------------------------------------- products


def is_rounded(precision: str) -> bool:
    """Whether products take factors in bfloat16."""
    if precision == "auto":
        return jax.default_backend() == "gpu"
    return precision == "bfloat16"


def product(linear: eqx.nn.Linear, x: Float[Array, "n I"], precision: str) -> Float[Array, "n O"]:
    """The linear layer, applied to each token.

    [D56] paper: silent; released code: bfloat16 in attention, float32 elsewhere; here, on a GPU: bfloat16 in all
    products over tokens within the blocks, because they are nearly all of the work, and a GPU's peak rate in bfloat16
    is at least twice that in float32. Parameters, what is passed from block to block, norms, softmax and losses stay in
    float32, and so does everything on a CPU.
    """
    if not is_rounded(precision):
        return jax.vmap(linear)(x)
    out = rounded_einsum("ni,oi->no", x, linear.weight)
    if linear.bias is not None:
        out = out + linear.bias
    return out


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def rounded_einsum(subscripts: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """einsum of two arrays, rounded to bfloat16, with sums in float32."""
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


@rounded_einsum.defjvp
def _rounded_einsum_jvp(subscripts, factors, tangents):
    # Left to itself JAX would multiply a float32 gradient by a bfloat16 factor, that is in float32. The backward pass
    # is the transpose of these lines: its factors are in bfloat16 too, and its results, once they are added up.
    a, b = (x.astype(jnp.bfloat16) for x in factors)
    d_a, d_b = (x.astype(jnp.bfloat16) for x in tangents)
    change = jnp.einsum(subscripts, d_a, b) + jnp.einsum(subscripts, a, d_b)
    return rounded_einsum(subscripts, *factors), change.astype(jnp.float32)


# -------------------------------------------------------------------------------------------------------- attention


def chosen(kind: str, precision: str, features: int) -> str:
    """The name in ATTENTION that `auto` stands for on this machine, for heads of F features."""
    if kind != "auto":
        return kind
    if jax.default_backend() == "cpu":
        return "looped"
    if is_rounded(precision) and has_flash(features):
        return "cudnn"
    return "plain"


def has_flash(features: int) -> bool:
    """Whether cuDNN can: an NVIDIA GPU of at least Ampere's generation, F a multiple of 8 and at most 128."""
    device = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version:
        return False
    return float(device.compute_capability) >= 8 and features % 8 == 0 and features <= 128


# Exercise 4
def plain_attention(q: Float[Array, "T H F"], k: Float[Array, "T H F"], v: Float[Array, "T H F"],
                    precision: str = "float32") -> Float[Array, "T H F"]:
    """softmax(q k^T / sqrt(F)) v; no mask, since there is never any padding."""
    einsum = rounded_einsum if is_rounded(precision) else jnp.einsum
    scores = einsum("thf,shf->hts", q, k) / math.sqrt(q.shape[-1])
    return einsum("hts,shf->thf", jax.nn.softmax(scores), v)


def looped_attention(q: Float[Array, "T H F"], k: Float[Array, "T H F"], v: Float[Array, "T H F"],
                     precision: str = "float32") -> Float[Array, "T H F"]:
    """`plain_attention` as a loop over heads and tasks: faster on a CPU, slower on a GPU.

    XLA's batched product of many small matrices is slow on a CPU, and the H x T x T scores of a whole batch leave the
    cache; those of one head do not. `sequential_vmap` turns every vmap around the two functions below (over heads here,
    over tasks in train.py) into a loop. The backward pass is written out (as in FlashAttention) because a loop of this
    kind has no transpose rule, and it recomputes scores rather than store them.
    """
    q = q / math.sqrt(q.shape[-1])
    out = _heads(q.swapaxes(0, 1), k.swapaxes(0, 1), v.swapaxes(0, 1))  # H T F
    return out.swapaxes(0, 1)


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


def _heads_backward(saved, d_out):
    return jax.vmap(_head_backward)(*saved, d_out)


_heads.defvjp(_heads_forward, _heads_backward)


def flash_attention(q: Float[Array, "T H F"], k: Float[Array, "T H F"], v: Float[Array, "T H F"],
                    precision: str = "bfloat16", implementation: str = "cudnn") -> Float[Array, "T H F"]:
    """`plain_attention` in bfloat16 by cuDNN, which never stores the scores; implementation "xla" runs anywhere.

    T is rounded up to a multiple of 64. [D3] paper: silent; released code: the padding is not masked; here: no token
    attends to it, and what it attends to is cut off.
    """
    tokens, padding = q.shape[0], -q.shape[0] % 64
    padded = []
    for x in (q, k, v):
        x = jnp.pad(x, ((0, padding), (0, 0), (0, 0)))
        padded.append(x.astype(jnp.bfloat16)[None])  # 1 T H F
    # The same number either way: under vmap cuDNN wants one for each task, and a constant would have no axis of tasks.
    either = q[:1, 0, 0] > 0
    queries = jnp.where(either, tokens + padding, tokens + padding).astype(jnp.int32)
    keys = jnp.where(either, tokens, tokens).astype(jnp.int32)
    out = jax.nn.dot_product_attention(*padded, query_seq_lengths=queries, key_value_seq_lengths=keys,
                                       implementation=implementation)
    return out[0, :tokens].astype(jnp.float32)


ATTENTION = {"plain": plain_attention, "looped": looped_attention, "cudnn": flash_attention}
