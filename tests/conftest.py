"""What all tests share: the import path, checked types and shapes, two CPU devices, a screen, and a trained model."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jaxtyping
import matplotlib
import numpy as np
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
MODULES = ["scales", "tasks", "labels", "data", "prior", "attention", "devices", "model", "exchangeable",
           "simulator", "panel", "predict", "train", "sample", "choose", "baselines", "metrics", "judge", "drawing",
           "figures", "tables"]
jaxtyping.install_import_hook(MODULES, "beartype.beartype")


def pytest_configure(config):
    """The marks of course.py."""
    for number in range(1, 9):
        config.addinivalue_line("markers", f"exercise{number}: grades exercise {number} of the course")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """When a grader of the course fails, say what it claims: the student reads that before the numbers."""
    report = yield
    exercises = [mark.name for mark in item.iter_markers() if mark.name.startswith("exercise")]
    if report.failed and exercises and item.function.__doc__:
        report.sections.append((f"{exercises[0]}: what has to hold", item.function.__doc__))
    return report


def write_linear(folder: Path, **changes) -> None:
    """A small screen of linear SCMs, as prior.py lays it out."""
    import prior

    sizes = {"systems": 16, "validation": 2, "test": 2, "genes": 5, "population": 32, "test_population": 32} | changes
    prior.make_linear(prior.Settings("linear", scale="smoke", **sizes), folder / "split-0")


class Trained(NamedTuple):
    settings: object      # train.Settings
    folder: Path          # model.eqx, log.csv
    screen: object        # tasks.Screen
    update: object        # the compiled update, for runs of the same shape


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    """A small run on linear SCMs, undisturbed: 120 updates, in the place where sample.py looks for it."""
    import model
    import tasks
    import train

    settings = train.Settings(
        screen="dags", name="dags", scale="smoke", width=16, depth=2, heads=2, registers=2, remat=False,
        skip=True, film_query=True, treatment_gain=10.0, cells=6, context=2, updates=120, micro_batch=8, accumulate=1,
        learning_rate=3e-3, warmup=0.1, weight_decay=1e-2, ema=0.98, log_every=1, validate_every=1000,
        out=tmp_path_factory.mktemp("out"))
    write_linear(settings.out / "smoke" / "screens" / "dags")
    folder, (path,) = model.run_folder(settings, "dags", 0), tasks.splits(settings)
    screen = tasks.load_screen(path)
    return Trained(settings, folder, screen, train.train(settings, folder, screen))


@pytest.fixture
def like(trained):
    """Settings of `trained`, changed as asked."""
    def changed(**changes):
        return dataclasses.replace(trained.settings, **changes)

    return changed


@pytest.fixture
def main(monkeypatch):
    """Run a script's main() on a command line, in this process."""
    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, words)])
        import train

        monkeypatch.setattr(train, "use_all_cores", lambda share: None)  # the devices are chosen already
        script.main()

    return run


@pytest.fixture
def rng():
    return np.random.default_rng(0)
