"""Claims about attention.py: all ways to attend are one function, and bfloat16 rounds factors but not sums."""

import glob
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import attention

PLUGINS = [importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)]
GPU = any(PLUGINS) and bool(glob.glob("/dev/nvidia[0-9]*"))


def value_and_gradients(attend, qkv, weight):
    """The output of attention and the gradient of a random sum of it, of two tasks at a time."""
    def loss(qkv, weight):
        out = jax.vmap(attend)(*qkv)
        return jnp.sum(weight * out), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv, weight)
    return [np.asarray(x) for x in (out, *gradients)]


@pytest.mark.exercise4
@pytest.mark.parametrize("tokens", [1, 66])
def test_looped_attention_is_plain_attention(tokens, rng):
    """One head at a time, with the backward pass written out, gives the same values and gradients; large scores too."""
    *qkv, weight = rng.normal(0, 4, (4, 2, tokens, 2, 4)).astype(np.float32)
    ways = (attention.plain_attention, attention.looped_attention)
    both = [value_and_gradients(attend, qkv, weight) for attend in ways]
    for plain, looped in zip(*both):
        np.testing.assert_allclose(plain, looped, rtol=1e-3, atol=1e-4 * np.abs(plain).max())


def test_padding_without_a_mask_changes_the_result(rng):
    """[D3] 23 zero keys, rounding 41 tokens up to 64, take attention from the 41: outputs shrink by over a tenth."""
    q, k, v = jnp.asarray(rng.normal(size=(3, 41, 2, 8)), jnp.float32)
    padded = [jnp.pad(x, ((0, 23), (0, 0), (0, 0))) for x in (q, k, v)]
    right, wrong = attention.plain_attention(q, k, v), attention.plain_attention(*padded)[:41]
    assert np.linalg.norm(wrong) < 0.9 * np.linalg.norm(right)


def check_flash(implementation: str, tokens: int) -> None:
    """Flash attention's values and gradients are those of plain attention, to the rounding of bfloat16."""
    def flash(q, k, v):
        return attention.flash_attention(q, k, v, implementation=implementation)

    rng = np.random.default_rng(tokens)
    *qkv, weight = rng.normal(0, 1, (4, 2, tokens, 2, 16)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        plain = value_and_gradients(attention.plain_attention, qkv, weight)
    for a, b in zip(plain, value_and_gradients(flash, qkv, weight)):
        assert a.shape == b.shape and np.linalg.norm(a - b) <= 0.01 * np.linalg.norm(a) + 1e-6


@pytest.mark.parametrize("tokens", [1, 41, 64, 130])
def test_flash_attention_is_plain_attention(tokens):
    """Padding, mask, scale, rounding and gradients, on any machine; only cuDNN's own kernel is left out."""
    check_flash("xla", tokens)


@pytest.mark.skipif(not GPU, reason="cuDNN needs an NVIDIA GPU, and JAX's plugin for it")
def test_cudnn_is_plain_attention():
    """The same with cuDNN's kernel, and the whole network with it: in a process of its own, since tests use the CPU."""
    here = Path(__file__).parent
    code = ("import test_attention, test_model\n"
            "for tokens in (1, 41, 64, 130, 2017):\n"
            "    test_attention.check_flash('cudnn', tokens)\n"
            "test_model.check_bfloat16('cudnn')")
    places = [str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"JAX_PLATFORMS": "cuda", "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("precision, rounded", [("float32", False), ("auto", False), ("bfloat16", True)])
def test_products_round_factors_and_not_sums(precision, rounded):
    """[D56] 1 + 1/512 is 1 in bfloat16; the sum of 300 ones and its bias are not rounded to 8 bits. So forwards; the
    gradient is that of the rounded factors. In float32, and by default on a CPU, it is the layer as it is."""
    linear = eqx.nn.Linear(300, 1, key=jr.key(0))
    linear = eqx.tree_at(lambda l: (l.weight, l.bias), linear, (jnp.ones((1, 300)), jnp.full(1, 0.015625)))
    x = jnp.full((2, 300), 1 + 1 / 512)

    def total(weights, x):
        return attention.product(weights, x, precision).sum()

    value, (d_linear, d_x) = jax.value_and_grad(total, argnums=(0, 1))(linear, x)
    exact = 300 if rounded else 300 * (1 + 1 / 512)
    assert float(value) == pytest.approx(2 * (exact + 0.015625), rel=1e-6)
    assert (np.asarray(d_x) == 1).all() and float(d_linear.bias[0]) == 2
    assert float(d_linear.weight[0, 0]) == (2 if rounded else 2 * (1 + 1 / 512))


def test_each_machine_has_its_attention(monkeypatch):
    """`auto` is the loop on a CPU; on a GPU cuDNN's if it can and numbers may be rounded, else the plain one."""
    assert attention.chosen("auto", "bfloat16", 64) == "looped" and attention.chosen("cudnn", "auto", 64) == "cudnn"
    assert not attention.has_flash(64)  # on a CPU

    class Device:
        client = type("Client", (), {"platform_version": "PJRT C API cuda 12090"})
        compute_capability = "8.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device])
    kinds = [attention.chosen("auto", precision, features) for precision, features in
             (("auto", 64), ("float32", 64), ("auto", 12), ("auto", 256))]
    assert kinds == ["cudnn", "plain", "plain", "plain"]
    monkeypatch.setattr(Device, "compute_capability", "7.5")
    assert attention.chosen("auto", "auto", 64) == "plain"
