"""Claims about the two priors: graphs, interventions, simulation, and the shards they are kept in."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import networkx
import numpy as np
import pytest
from jaxtyping import install_import_hook
from tqdm import tqdm

with install_import_hook("prior", "beartype.beartype"):
    import prior
from data import ABSENT, CONTROL, TEST, TRAIN
from scales import BadInput

# ---------------------------------------------------------------------------------------------------------------------
# Linear structural causal models
# ---------------------------------------------------------------------------------------------------------------------


def test_dags_are_acyclic_and_half_full():
    """No path of D edges exists, and half of the node pairs are joined by an edge."""
    edges = prior.sample_dags(np.random.default_rng(0), 300, 8) != 0
    assert not np.linalg.matrix_power(edges.astype(int), 8).any()
    assert edges.sum() / (300 * 8 * 7 / 2) == pytest.approx(0.5, abs=0.02)


def test_causal_order_is_hidden():
    """Every node is as likely as any other to have no parents, so an index says nothing about the causal order."""
    roots = (prior.sample_dags(np.random.default_rng(0), 3000, 5) == 0).all(2).mean(0)
    assert np.ptp(roots) < 0.06                          # about 4 standard errors of a difference


def test_normalisation_of_two_nodes():
    """With one edge of weight w, W becomes w / sqrt(1 + w^2): the child's variance is 1 + w^2 / (1 + w^2), not 1."""
    w = prior.sample_dags(np.random.default_rng(0), 2000, 2, edge_probability=1.0).sum((1, 2))
    assert 0.5 / np.sqrt(1.25) <= abs(w).min() < 0.46 and 0.89 < abs(w).max() <= 2 / np.sqrt(5)
    assert abs((w > 0).mean() - 0.5) < 0.05
    variance = (np.linalg.inv(np.eye(20) - prior.sample_dags(np.random.default_rng(1), 500, 20)) ** 2).sum(-1)
    assert variance.min() > 1 - 1e-9 and 1.0 < np.median(variance) < 1.1 and np.quantile(variance, 0.99) < 2.3


@pytest.mark.parametrize("shared", [True, False])
def test_intervention_replaces_one_equation(shared):
    """do(t) sets z_t = c; the other nodes keep their equations, whose noise is the same for all t only if shared."""
    rng = np.random.default_rng(0)
    w = prior.sample_dags(rng, 3, 6)
    cells, values = prior.simulate_linear(rng, w, 400, shared)
    noise = cells - np.einsum("ckj,ctnj->ctnk", w, cells)            # what each equation leaves over
    for t in range(6):
        assert (cells[:, 1 + t, :, t] == values[:, t, None]).all()
        others = np.delete(np.arange(6), t)
        if shared:
            reference = noise[:, 1 + (np.arange(6) + 1) % 6, :, np.arange(6)][others]    # of an intervention elsewhere
            np.testing.assert_allclose(noise[:, 1 + t][..., others], np.moveaxis(reference, 0, -1), atol=1e-5)
        assert noise[:, 1 + t][..., others].std() == pytest.approx(1, abs=0.05)
    correlation = np.corrcoef(noise[:, 1, :, 3].ravel(), noise[:, 2, :, 3].ravel())[0, 1]
    assert correlation == pytest.approx(1 if shared else 0, abs=0.1)
    assert abs(np.corrcoef(noise[:, 0, :, 3].ravel(), noise[:, 2, :, 3].ravel())[0, 1]) < 0.1    # control: never shared


def test_means_move_by_the_total_effect():
    """Under do(t = c), node k's mean is c T[k, t] if it is a descendant of t; other nodes stay as they were."""
    rng = np.random.default_rng(1)
    w = prior.sample_dags(rng, 2, 6)
    effect = np.linalg.inv(np.eye(6) - w)
    cells, values = prior.simulate_linear(rng, w, 20_000, shared_noise=True)
    expected = values[:, :, None] * effect.swapaxes(1, 2)                               # C t k
    np.testing.assert_allclose(cells[:, 1:].mean(2), expected, atol=0.05)
    assert (abs(expected) > 0.3).sum() > 12                                             # there is something to see
    for c in range(2):
        for k in range(6):
            unmoved = [t for t in range(6) if abs(effect[c, k, t]) < 1e-9]
            assert all(np.allclose(cells[c, 1 + t, :, k], cells[c, 1 + unmoved[0], :, k], atol=1e-5) for t in unmoved)


def test_every_condition_has_unit_variance():
    """Each variable of each condition has standard deviation 1, but the one that was set, which keeps its value."""
    screen = prior.linear_screen(np.random.default_rng(0), 4, 20, 500)
    cells = screen.cells.reshape(4, 21, 500, 20)
    sd = cells.std(2)
    for t in range(20):
        np.testing.assert_array_equal(cells[:, 1 + t, :, t], np.repeat(screen.treatments[:, 1 + t, t, None], 500, 1))
        sd[:, 1 + t, t] = 1
    np.testing.assert_allclose(sd, 1, atol=1e-4)
    assert abs(screen.cells).max() <= 10


def test_linear_screen_layout():
    """Conditions follow each other by context, then treatment; only the last contexts have TEST treatments, half."""
    screen = prior.linear_screen(np.random.default_rng(0), 5, 6, 32, held_out=2)
    np.testing.assert_array_equal(screen.start.ravel(), 32 * np.arange(5 * 7))
    assert screen.cells.dtype == np.float32 and len(screen.cells) == screen.count.sum() and not screen.log_expression
    assert (screen.split[:3] == TRAIN).all() and (screen.split[:, CONTROL] == TRAIN).all()
    assert ((screen.split[3:] == TEST).sum(1) == 3).all()
    value = screen.treatments[:, 1:][:, np.arange(6), np.arange(6)]
    assert value.min() >= 0.5 and value.max() <= 1.5 and len(np.unique(value)) == 30
    assert not screen.treatments[:, CONTROL].any() and (screen.treatments != 0).sum() == 30
    with pytest.raises(BadInput, match="hold out"):
        prior.linear_screen(np.random.default_rng(0), 2, 6, 32, held_out=3)

# ---------------------------------------------------------------------------------------------------------------------
# Graphs of gene regulatory networks
# ---------------------------------------------------------------------------------------------------------------------


def test_grn_graphs_suit_the_simulator():
    """No cycle, at least one master regulator, and no gene without an edge, whatever the seed."""
    for seed in range(150):
        genes = (3, 8, 20)[seed % 3]
        parents = prior.sample_grn_graph(np.random.default_rng(seed), genes)
        assert not np.linalg.matrix_power(parents.astype(int), genes).any()
        assert prior.graph_statistics(parents)[-1] >= 1 and (parents.any(0) | parents.any(1)).all()


def test_weakest_edge_of_every_cycle_is_cut():
    """The shortcut through reachability removes what listing all cycles, and the weakest edge of each, removes."""
    cut = 0
    for seed in range(40):
        parents = prior.grow_graph(np.random.default_rng(seed), 12)
        order = [tuple(edge) for edge in np.random.default_rng(seed).permutation(np.argwhere(parents))]
        expected = parents.copy()
        for cycle in networkx.simple_cycles(networkx.DiGraph([(j, k) for k, j in order])):
            weakest = max(zip(cycle[1:] + cycle[:1], cycle), key=order.index)
            expected[weakest] = False
        np.testing.assert_array_equal(prior.cut_cycles(np.random.default_rng(seed), parents), expected)
        cut += (parents & ~expected).sum()
    assert cut > 40


def test_gene_number_does_not_tell_the_hubs():
    """Genes that joined early regulate more targets; after shuffling, a gene's number and its targets are unrelated."""
    def correlation(sample):
        targets = np.array([sample(np.random.default_rng(seed)).sum(0) for seed in range(200)])
        return np.corrcoef(np.tile(np.arange(20), 200), targets.ravel())[0, 1]
    assert correlation(lambda rng: prior.grow_graph(rng, 20)) < -0.3
    assert abs(correlation(lambda rng: prior.sample_grn_graph(rng, 20))) < 0.05           # 3 standard errors


def test_degrees_agree_with_the_released_generator():
    """Edges, degrees and master regulators of 200 graphs are within two standard errors of the released 30."""
    rows = np.array([prior.graph_statistics(prior.sample_grn_graph(np.random.default_rng(s), 50)) for s in range(200)])
    for (name, (mean, sd)), ours in zip(prior.RELEASED.items(), rows.mean(0)):
        assert abs(ours - mean) < 2 * sd * np.sqrt(1 / 30 + 1 / 200), (name, ours)


def test_counts_agree_with_the_released_generator():
    """Zeros and counts per cell at the paper's size are within two standard errors of the released generator's."""
    rows = prior.statistics(seed=1, genes=50, population=200, grns=12)
    for (name, (mean, sd)), ours in list(zip(prior.RELEASED.items(), rows.mean(0)))[5:7]:
        assert abs(ours - mean) < 2 * sd * np.sqrt(1 / 30 + 1 / 12), (name, ours)
    assert 2 <= rows[:, 7].mean() < 5                    # per cent of genes without a count; the knocked-out one is 2


def test_statistics_command(capsys, monkeypatch, tmp_path):
    """--statistics prints a row for each statistic, ours and the released generator's, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", "prior.py --scale smoke --genes 6 --population 5 --statistics".split())
    prior.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(prior.RELEASED) and all(line.count("+-") == 2 for line in lines[2:])
    assert not list(tmp_path.iterdir())

# ---------------------------------------------------------------------------------------------------------------------
# Simulation
# ---------------------------------------------------------------------------------------------------------------------


def network_of(edges, genes, **changes):
    """A Network with the given {(regulator, target): strength}, nearly without any noise."""
    strength = np.zeros((genes, genes))
    for (j, k), value in edges.items():
        strength[k, j] = value
    quiet = prior.Network(strength, np.full((genes, genes), 2), np.full(genes, 0.8), process_noise=0.01, outlier=0.8,
                          library=(12.0, 0.01), dropout=1e-6)
    return dataclasses.replace(quiet, **changes)


CHAIN = {(0, 1): 3.0, (4, 1): 1.0, (1, 2): 2.0, (2, 3): 2.0}      # genes 0 and 4 regulate 1, which regulates 2, ...


def test_knock_out_moves_direct_targets_only():
    """The gene is not counted; its target loses its share of the drive; the targets' targets stay (sergio-rs)."""
    control, treated = (prior.simulate_condition(network_of(CHAIN, 5), t, 400, 1, 2, 3).mean(0) for t in (CONTROL, 1))
    assert treated[0] == 0 and control[0] > 1000
    ratio = treated / treated[4] * control[4] / control              # gene 4 is out of reach: it is the yardstick
    assert ratio[1] == pytest.approx(1 / (3 + 1), rel=0.05)
    np.testing.assert_allclose(ratio[2:4], 1, rtol=0.05)


def test_the_target_of_a_lost_sole_regulator_can_rise():
    """A weak regulator is knocked out; its only target becomes a master regulator: its mean goes *up* (sergio-rs)."""
    weak = network_of({(0, 1): 0.1, (2, 3): 2.0}, 4)
    control, treated = (prior.simulate_condition(weak, t, 400, 1, 2, 3).mean(0) for t in (CONTROL, 1))
    ratio = treated / treated[2] * control[2] / control
    assert ratio[1] > 2 and ratio[3] == pytest.approx(1, rel=0.05)


def test_each_condition_has_a_network_of_its_own():
    """Control and a knock-out come out the same whichever other knock-outs were simulated before them."""
    run = lambda t: prior.simulate_condition(network_of(CHAIN, 5, process_noise=1.0), t, 50, 1, 2, 3)
    alone = run(CONTROL), run(2)
    for t in range(1, 6):
        run(t)
    np.testing.assert_array_equal(run(CONTROL), alone[0])
    np.testing.assert_array_equal(run(2), alone[1])


def test_knock_outs_share_noise_only_if_paired(monkeypatch):
    """Two paired knock-outs agree cell by cell on genes neither of them reaches; unpaired ones, and control, do not."""
    noisy = network_of({(0, 1): 2.0, (2, 3): 2.0, (4, 5): 2.0}, 6, process_noise=1.0)
    monkeypatch.setattr(prior, "sample_network", lambda rng, genes: noisy)
    correlations = {}
    for unpaired in (False, True):
        _, counts = prior.simulate_grn(0, 6, 300, unpaired, 0)
        correlations[unpaired] = [np.mean([np.corrcoef(counts[a][:, g], counts[b][:, g])[0, 1] for g in (2, 3, 4, 5)])
                                  for a, b in ((1, 2), (0, 1))]
    assert correlations[False][0] > 0.95
    assert max(correlations[False][1], *correlations[True]) < 0.6    # not 0: few of the 300 moments are independent


@pytest.mark.parametrize("unpaired", [False, True])
def test_only_the_noise_differs_in_the_ablation(monkeypatch, unpaired):
    """Noise amplitude and network are one per GRN in both priors; seeds are one (paired) or one per condition."""
    simulated, technical = [], []
    sergio, simulate, add_noise = prior.sergio_rs, prior.sergio_rs.Sim, prior.sergio_rs.add_technical_noise_custom
    monkeypatch.setattr(sergio, "Sim", lambda *a: simulated.append(a[-2:]) or simulate(*a))
    monkeypatch.setattr(sergio, "add_technical_noise_custom", lambda *a: technical.append(a[-1]) or add_noise(*a))
    network, _ = prior.simulate_grn(3, 6, 10, unpaired, 5)
    amplitudes, seeds = (set(column) for column in zip(*simulated))
    assert amplitudes == {network.process_noise} and len(simulated) == 7
    assert len(seeds) == len(set(technical)) == (7 if unpaired else 1) and not seeds & set(technical)
    np.testing.assert_array_equal(network.strength, prior.draw_grn(3, 6, 5)[0].strength)


def test_parameters_stay_in_the_ranges_of_table_6():
    """Strengths, Hill coefficients, decays and noise of 100 networks fill the paper's ranges and do not leave them."""
    networks = [prior.sample_network(np.random.default_rng(s), 8) for s in range(100)]
    strength = np.concatenate([n.strength[n.strength != 0] for n in networks])
    ranges = {(1, 5): strength, (0.5, 1): np.concatenate([n.decay for n in networks]),
              (45, 82): [n.dropout for n in networks],
              (0.5, 1.5): [n.process_noise for n in networks], (0.8, 5): [n.outlier for n in networks],
              (4.5, 6): [n.library[0] for n in networks], (0.3, 0.7): [n.library[1] for n in networks]}
    for (low, high), values in ranges.items():
        margin = (high - low) / 10
        assert low <= min(values) < low + margin and high - margin < max(values) <= high
    assert np.mean([n.hill for n in networks]) == pytest.approx(1.5, abs=0.03)
    assert set(networks[0].hill.ravel()) == {1, 2}


def test_refusal_of_the_simulator_is_caught_and_interrupts_are_not(monkeypatch):
    """A network without master regulator makes the simulator panic: None. Ctrl-C is not taken for a panic."""
    assert prior.simulate_condition(network_of({(0, 1): 1.0, (1, 0): 1.0}, 2), CONTROL, 5, 1, 2, 3) is None

    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(prior.sergio_rs, "Sim", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prior.simulate_condition(network_of(CHAIN, 5), CONTROL, 5, 1, 2, 3)

# ---------------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------------

SMALL = prior.Settings(genes=5, contexts=6, population=20, num_shards=3)


def make(settings, folder):
    """Make what is missing in `folder`, in this process; returns the shards that were made."""
    todo = prior.unfinished(settings, folder)
    for shard in todo:
        prior.write_shard(settings, folder, shard, map, tqdm(disable=True))
    return todo


def test_sharding_changes_nothing(tmp_path):
    """One shard, or three made out of order, load to the same cells; and no GRN is made twice."""
    make(dataclasses.replace(SMALL, num_shards=1), tmp_path / "one")
    for shard in (2, 0, 1):
        make(dataclasses.replace(SMALL, shard=shard), tmp_path / "three")
    one, three = prior.load_grn_screen(tmp_path / "one"), prior.load_grn_screen(tmp_path / "three")
    np.testing.assert_array_equal(one.cells, three.cells)
    np.testing.assert_array_equal(one.start, three.start)
    strengths = np.concatenate([np.load(prior.shard_path(tmp_path / "three", s, 3))["strength"] for s in range(3)])
    assert len(np.unique(strengths, axis=0)) == 6


def test_finished_shards_are_kept(tmp_path):
    """A second run makes only what is missing; files that a killed run left half-written count as missing."""
    assert make(SMALL, tmp_path) == [0, 1, 2]
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(tmp_path.iterdir())}
    assert make(SMALL, tmp_path) == []
    lost = prior.shard_path(tmp_path, 1, 3)
    lost.rename(tmp_path / f".123.{lost.name}")
    assert make(SMALL, tmp_path) == [1]
    for path, (_, content) in before.items():
        assert path.read_bytes() == content
    assert all(p.stat().st_mtime_ns == before[p][0] for p in before if p != lost)


def test_unusable_folders_are_refused(tmp_path):
    """Shards of other settings, missing, unreadable or no shards are told apart, before anything is simulated."""
    with pytest.raises(BadInput, match="no shard"):
        prior.load_grn_screen(tmp_path)
    make(SMALL, tmp_path)
    with pytest.raises(BadInput, match=r"seed 0 \(now 1\)"):
        prior.unfinished(dataclasses.replace(SMALL, seed=1), tmp_path)
    shard = prior.shard_path(tmp_path, 1, 3)
    shard.rename(tmp_path / "kept")
    with pytest.raises(BadInput, match="1 of 3 shards are missing, the first is grn-1-of-3.npz"):
        prior.load_grn_screen(tmp_path)
    shard.write_bytes((tmp_path / "kept").read_bytes()[:100])
    with pytest.raises(BadInput, match="not a readable shard"):
        prior.load_grn_screen(tmp_path)
    shard.unlink()
    make(dataclasses.replace(SMALL, num_shards=2), tmp_path / "other")
    (tmp_path / "other" / "grn-0-of-2.npz").rename(tmp_path / "grn-0-of-2.npz")
    with pytest.raises(BadInput, match="different settings"):
        prior.load_grn_screen(tmp_path)


def test_settings_out_of_range_are_refused():
    """Numbers that make no sense end in a message that names the option."""
    for change in ({"genes": 2}, {"shard": 3}, {"num_shards": 7}, {"workers": 0}):
        with pytest.raises(BadInput, match=f"--{next(iter(change)).replace('_', '-')}"):
            prior.check(dataclasses.replace(SMALL, **change))


def test_refused_conditions_are_counted(tmp_path, monkeypatch):
    """A refused knock-out has count 0 and is ABSENT; a refused control takes its whole GRN with it."""
    class PanicException(BaseException):
        pass

    class Refusing:
        calls, simulate = 0, prior.sergio_rs.Sim
        def __new__(cls, *arguments):
            Refusing.calls += 1
            if Refusing.calls in (4, 7):                             # knock-out 3 of GRN 0; control of GRN 1
                raise PanicException("told to")
            return Refusing.simulate(*arguments)
    monkeypatch.setattr(prior.sergio_rs, "Sim", Refusing)
    make(dataclasses.replace(SMALL, num_shards=1), tmp_path)
    with np.load(prior.shard_path(tmp_path, 0, 1)) as shard:
        assert shard["refused"] == 1 + 6 and (shard["count"] == 0).sum() == 7 and not shard["count"][1].any()
        assert len(shard["counts"]) == shard["count"].sum() == 20 * (6 * 6 - 7)
    screen = prior.load_grn_screen(tmp_path)
    assert screen.count.shape == (5, 6) and screen.split[0, 3] == ABSENT and (screen.split == ABSENT).sum() == 1
    np.testing.assert_array_equal(screen.cells[screen.start[0, 4] : screen.start[0, 4] + 20, 3], 0)   # knock-out 4


def test_grn_screen_is_normalised_log_expression(tmp_path):
    """Undoing log1p, every cell that has counts sums to the median total; knocked-out genes are zero in their rows."""
    make(SMALL, tmp_path)
    screen = prior.load_grn_screen(tmp_path, held_out=1)
    totals = np.concatenate([np.load(prior.shard_path(tmp_path, s, 3))["counts"].sum(1) for s in range(3)])
    np.testing.assert_allclose(np.expm1(screen.cells).sum(1)[totals > 0], np.median(totals), rtol=1e-4)
    assert screen.log_expression and screen.cells.dtype == np.float32
    for c, t in np.ndindex(6, 5):
        rows = slice(screen.start[c, t + 1], screen.start[c, t + 1] + screen.count[c, t + 1])
        assert not screen.cells[rows, t].any() and screen.treatments[c, t + 1, t] == 1
    assert (screen.split[:-1] == TRAIN).all() and (screen.split[-1] == TEST).sum() == 2


def test_killed_run_leaves_nothing_behind(tmp_path):
    """SIGKILL of the main process ends its workers; running again gives the files of a run that was not killed."""
    command = [sys.executable, prior.__file__, "--scale", "smoke", "--population", "150", "--num-shards", "8"]
    killed = subprocess.Popen([*command, "--workers", "1", "--out", str(tmp_path / "killed")], start_new_session=True,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("killed/grn-*")) and killed.poll() is None:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    made = len(list(tmp_path.glob("killed/grn-*")))
    assert 1 <= made < 8
    deadline = time.time() + 10
    while True:                                                      # signal 0 to the group: is anyone left?
        try:
            os.killpg(killed.pid, 0)
        except ProcessLookupError:
            break
        assert time.time() < deadline, "workers outlived the main process"
        time.sleep(0.05)
    subprocess.run([*command, "--out", str(tmp_path / "killed")], check=True, capture_output=True)
    settings = prior.Settings(genes=8, contexts=16, population=150, num_shards=8)
    make(dataclasses.replace(settings, shard=0), tmp_path / "whole")
    make(dataclasses.replace(settings, shard=made), tmp_path / "whole")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()
    assert len(list(tmp_path.glob("killed/grn-*"))) == 8
