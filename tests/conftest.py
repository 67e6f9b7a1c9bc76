"""What all tests share: the import path, checked types and shapes, two CPU devices, and one briefly trained model."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jaxtyping
import matplotlib
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
matplotlib.use("Agg")
# Tests compile much and compute little: let XLA hurry, which makes it five times as fast.
jax.config.update("jax_disable_most_optimizations", True)
if jax.__version_info__[:2] == (0, 10):  # a version that does not know the flag would abort
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
# Before anything computes. Two devices on any machine, so that the data-parallel code is what is tested.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
# Every annotated type and shape of these modules is checked when a function is called, or traced.
MODULES = ["scales", "data", "prior", "model", "train", "sample", "baselines", "metrics", "figures"]
jaxtyping.install_import_hook(MODULES, "beartype.beartype")


@pytest.fixture(autouse=True)
def unchecked_command_line(monkeypatch):
    """Except for the settings while the command line is read: tyro marks a missing word by an object that is no str."""
    import scales

    parse = scales.parse

    def unchecked(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
            return parse(*arguments)

    monkeypatch.setattr(scales, "parse", unchecked)


class Trained(NamedTuple):
    settings: object      # train.Settings
    folder: Path          # model.eqx, log.csv
    update: object        # the compiled update, for runs of the same shape


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    """A tiny linear-SCM run by train.train, undisturbed: 120 updates, in the place where sample.py looks for it."""
    import train

    settings = train.Settings(
        "linear", scale="smoke", genes=5, width=16, depth=2, heads=2, registers=2, remat=False, skip=True,
        film_query=True, treatment_gain=10.0, contexts=16, refresh=50, population=32, cells=6, context=2, updates=120,
        micro_batch=8, accumulate=1, learning_rate=3e-3, warmup=0.1, weight_decay=1e-2, ema=0.98, log_every=1,
        validate_every=1000, out=tmp_path_factory.mktemp("out"))
    (_, folder, _), = train.runs(settings)
    return Trained(settings, folder, train.train(settings, folder))


@pytest.fixture
def like(trained):
    """Settings of `trained`, changed as asked."""
    return lambda **changed: dataclasses.replace(trained.settings, **changed)
