"""Claims about costs.py and counts.py: XLA's numbers are what they are taken for; counts follow from the settings."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import costs
import counts
import figures
import scales
import train
from counts import Shape, Stage
from model import Architecture

SMALL = Architecture(width=16, depth=3, heads=2, registers=2)
SHAPE = Shape(5, 12, 10, 2)


def test_xla_counts_the_body_of_a_loop_once_and_written_out_all():
    """Five products of 8 x 8 matrices in a scan are 5 x 2 x 8^3 FLOPs; XLA says so only if the scan is written out."""
    def run(x, matrices):
        return jax.lax.scan(lambda x, m: (x @ m, None), x, matrices)[0]

    shapes = costs.array(8, 8), costs.array(5, 8, 8)
    with costs.written_out():
        whole = jax.jit(lambda *args: run(*args)).lower(*shapes).compile().cost_analysis()["flops"]
    once = jax.jit(lambda *args: run(*args)).lower(*shapes).compile().cost_analysis()["flops"]
    assert whole == pytest.approx(5 * 2 * 8**3, rel=0.05) and once == pytest.approx(2 * 8**3, rel=0.1)
    assert costs.products(jax.make_jaxpr(run)(*(jnp.ones(s.shape) for s in shapes)).jaxpr) == (5, 5 * 2 * 8**3)


@pytest.mark.parametrize("training", [True, False])
def test_two_depths_tell_all(training):
    """FLOPs told from one and two blocks are those of the program of three, and the compiled one has about as many."""
    a = dataclasses.replace(SMALL, attention="plain", precision="float32")
    program = costs.lowered(a, SHAPE, training)
    told = costs.flops(SMALL, SHAPE, training)
    assert told == pytest.approx(program.cost_analysis()["flops"], rel=1e-3)
    assert told == pytest.approx(program.compile().cost_analysis()["flops"], rel=0.2)  # what nobody reads is left out


def test_flops_are_those_of_the_products():
    """Two routes: XLA, and two FLOPs for each pair of factors of the network's products, worked out by hand. What is
    no product is less than a tenth at the paper's width."""
    a, shape = Architecture(depth=1), Shape(50, 200, 200, 8)
    tokens = shape.tokens(a.registers)
    assert tokens == 8 + 200 + 9 * 200 + 9
    block = tokens * 24 * a.width**2 + 4 * tokens**2 * a.width
    found = costs.flops(dataclasses.replace(a, depth=2), shape, False) - costs.flops(a, shape, False)
    assert block < found < 1.1 * block


def test_memory_grows_with_what_is_stored():
    """Plain attention stores T x T scores of every task; the looped does not; more tasks at once take more."""
    s = train.Settings(**vars(SMALL) | {"micro_batch": 2, "accumulate": 1})
    shape = Shape(5, 200, 200, 2)
    scores = 2 * 2 * shape.tokens(2) ** 2 * 4  # tasks, heads, bytes
    assert costs.training_memory(s, shape, "plain") - costs.training_memory(s, shape, "looped") > scores / 2
    sizes = [costs.sampling_memory(SMALL, shape, "looped", n) for n in (1, 4)]
    assert sizes[1] - sizes[0] > 6 * shape.tokens(2) * SMALL.width * 4  # tokens of six more


def test_counts_follow_from_the_settings(monkeypatch):
    """Worked by hand at the paper's numbers; a changed number of the table changes the count."""
    stages = {stage.title: stage for stage in counts.gpu_stages()}
    assert stages["train: GRNs"].trained == 50_000 * 8 * 32
    assert stages["train: linear SCMs"].trained == 3 * 6250 * 8 * 32
    assert stages["train: GRNs"].shape == (50, 200, 200, 8) and stages["train: linear SCMs"].shape == (20, 500, 500, 4)
    assert stages["train: GRNs, without context"].shape.context == 0
    f = figures.Settings()
    assert stages["figure 2: snapshots"].evaluations == 25 * f.snapshot_tasks * 3 * 2 * 151
    before = {stage.title: stage for stage in counts.gpu_stages(before=True)}
    assert before["figure 2: snapshots"].evaluations == 25 * 64 * 3 * 2 * 151
    assert counts.screen_bytes(counts.priors()["grn"]) == 6120 * 51 * 200 * 50 * 4
    monkeypatch.setitem(scales.TABLE["grn"], "snapshots", (4, 10, 5))
    fewer = {stage.title: stage for stage in counts.gpu_stages()}
    assert 5 * fewer["figure 2: snapshots"].evaluations == stages["figure 2: snapshots"].evaluations
    for section, values in counts.BEFORE.items():
        assert set(values) <= {field.name for field in dataclasses.fields(figures.Settings)}, section


def test_hours_bind_where_they_should(monkeypatch):
    """FLOPs alone are the least; scores of plain attention count in both ends, other bytes in the upper one only."""
    monkeypatch.setattr(costs, "flops", lambda a, shape, training: 312e12 * costs.PRODUCTS * 3600)
    hour = 2e12 * costs.MEMORY * 3600
    monkeypatch.setattr(costs, "moved", lambda a, shape, training, scores: hour * (3 + 7 * scores))
    stage = Stage("train", SHAPE, 1)
    assert costs.cost(stage, SMALL, SHAPE, False)["A100"] == pytest.approx([1, 3])
    assert costs.cost(stage, SMALL, SHAPE, True)["A100"] == pytest.approx([7, 10])
    both = costs.merged([costs.cost(stage, SMALL, SHAPE, False)] * 2)
    assert len(both) == 1 and both[0]["A100"] == pytest.approx([2, 6])


def test_the_page_adds_up_and_compares_with_the_aims(tmp_path):
    """The last row is the sum; each aim has a sentence for each GPU; what the dry run noted is there, scaled."""
    (tmp_path / "memory.csv").write_text("prior: GRNs,1000000\na, b,2000000\n")
    (tmp_path / "times.csv").write_text("prior: GRNs,9\nprior: GRNs,6\n")
    lines = [{"stage": "train: GRNs", "flops": 2e18, "A100": [10, 30], "H100": [2, 4]},
             {"stage": "figure 3", "flops": 1e18, "A100": [10, 30], "H100": [2, 4]}]
    cpu = counts.cpu_lines(tmp_path, 4)
    page = costs.page({"before": False, "revision": "x", "gpu": lines, "memory": {"figure 3": 2e9},
                       "aims": costs.against_aims(lines[:1] * 2), "cpu": cpu, "disk": {"train": 3e9}})
    assert "| **all** | 3,000 |  | 20.0-60.0 | 4.0-8.0 |" in page and "| figure 3 | 1,000 | 2.0 |" in page
    assert page.count(" h wanted on an ") == 6 and "20.0-60.0 h counted: kept if kernels are fused well" in page
    assert page.strip().endswith("reading them from disk.")
    assert cpu[1] == {"stage": "a, b", "host": 2048e6, "hours": None} and "| a, b | 2.0 |  |" in page
    systems = scales.at("dry", "grn")
    assert cpu[0]["hours"] * 3600 * 4 / counts.os.cpu_count() == pytest.approx(
        9 * 6120 / sum(systems[name] for name in ("systems", "validation", "test")))
