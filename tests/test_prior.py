"""Claims about the two priors: graphs, interventions, simulation, and the screens that they are written as."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import networkx
import numpy as np
import pytest
import scipy.stats

import prior
import tasks
from scales import BadInput
from tasks import ABSENT, KNOWN_ONLY, CONTROL, TEST, TRAIN, VALIDATION


def rng(seed=0):
    """A generator."""
    return np.random.default_rng(seed)


# ------------------------------------------------------------------------------------ linear structural causal models


def test_dags_are_acyclic_half_full_and_hide_their_order():
    """No path of D edges exists, half of the pairs are joined, and every node is as likely to have no parents."""
    generator = rng()
    edges = np.array([prior.sample_dag(generator, 6) != 0 for _ in range(3000)])
    assert not np.linalg.matrix_power(edges.astype(int), 6).any()
    assert edges.mean() * 36 / 15 == pytest.approx(0.5, abs=0.02)
    roots = (~edges).all(axis=2).mean(axis=0)
    assert np.ptp(roots) < 0.06  # about 4 standard errors of a difference


def test_normalisation_of_weights():
    """With one edge of weight w, W becomes w / sqrt(1 + w^2): the child's variance is 1 + w^2 / (1 + w^2), not 1."""
    generator = rng()
    w = np.array([prior.sample_dag(generator, 2, edge_probability=1.0).sum() for _ in range(2000)])
    assert 0.5 / np.sqrt(1.25) <= abs(w).min() < 0.46 and 0.89 < abs(w).max() <= 2 / np.sqrt(5)
    assert abs((w > 0).mean() - 0.5) < 0.05
    dags = np.array([prior.sample_dag(generator, 20) for _ in range(500)])
    variance = (np.linalg.inv(np.eye(20) - dags) ** 2).sum(axis=-1)
    assert variance.min() > 1 - 1e-9 and 1.0 < np.median(variance) < 1.1 and np.quantile(variance, 0.99) < 2.3


@pytest.mark.exercise1
def test_intervention_replaces_one_equation():
    """do(t) sets z_t = c; the other nodes keep their equations, with standard normal noise that is new for each t."""
    w = prior.sample_dag(rng(), 6)
    values = rng(1).uniform(0.5, 1.5, 6)
    cells = prior.simulate_linear(rng(2), w, values, 2000)
    noise = cells - cells @ w.T  # what each equation leaves over
    for t in range(6):
        np.testing.assert_allclose(cells[1 + t, :, t], values[t], rtol=1e-12)
        others = np.delete(noise[1 + t], t, axis=1)
        np.testing.assert_allclose(np.cov(others.T), np.eye(5), atol=0.15)
    for a, b in ((0, 1), (1, 2)):
        assert abs(np.corrcoef(noise[a, :, 3], noise[b, :, 3])[0, 1]) < 0.1


@pytest.mark.exercise1
def test_means_move_by_the_total_effect():
    """Under do(t = c) the mean of a descendant k is c T[k, t]; all others keep the distribution they had without it."""
    w = prior.sample_dag(rng(1), 6)
    effect = np.linalg.inv(np.eye(6) - w)
    values = rng(2).uniform(0.5, 1.5, 6)
    cells = prior.simulate_linear(rng(3), w, values, 20_000)
    expected = values[:, None] * effect.T  # t k
    np.testing.assert_allclose(cells[1:].mean(axis=1), expected, atol=0.05)
    assert (abs(expected) > 0.3).sum() > 6  # there is something to see
    unmoved = np.argwhere(abs(effect.T) < 1e-9)
    assert len(unmoved) > 6
    for t, k in unmoved:
        assert scipy.stats.ks_2samp(cells[1 + t, :, k], cells[CONTROL, :, k]).pvalue > 1e-4


def run(monkeypatch, folder, *words):
    """Call prior.main as a command at smoke scale."""
    monkeypatch.setattr(sys, "argv", ["prior.py", *words, "--scale", "smoke", "--out", str(folder)])
    prior.main()


def test_linear_screen(tmp_path, monkeypatch):
    """The command writes training, validation and test graphs in order, the last two held out wholly; then skips."""
    run(monkeypatch, tmp_path, "linear", "--genes", "7", "--systems", "5")
    screen = tasks.load_screen(tmp_path / "smoke/screens/linear/split-0")
    assert screen.made["section"] == screen.made["paper"] == "linear" and not screen.log_expression
    assert (screen.count[:5] == 64).all() and (screen.count[5:] == 500).all()
    for systems, use, asked in ((slice(0, 5), TRAIN, 8), (slice(5, 9), VALIDATION, 3), (slice(9, 11), TEST, 3)):
        wanted = screen.split[systems] == use
        assert (wanted.sum(axis=1) == asked).all() and (screen.split[systems][~wanted] == KNOWN_ONLY).all()
    assert (screen.split[5:, CONTROL] == KNOWN_ONLY).all()
    for s, t in np.ndindex(11, 8):
        pool, unit, treatment = screen.pool(s, t), np.ones(7), np.zeros(7)
        if t != CONTROL:  # every variable has unit variance, but the one that was set, which keeps its value
            unit[t - 1], treatment[t - 1] = 0, pool[0, t - 1]
            assert np.ptp(pool[:, t - 1]) == 0 and 0.5 <= pool[0, t - 1] <= 1.5
        np.testing.assert_array_equal(screen.treatments[s, t], treatment)
        np.testing.assert_allclose(pool.std(axis=0), unit, atol=1e-2)  # some are clipped
        assert abs(pool).max() <= 10
    assert len(np.unique(screen.treatments)) == 1 + 77
    monkeypatch.setattr(prior, "make_linear", None)
    run(monkeypatch, tmp_path, "linear", "--genes", "7", "--systems", "5")
    with pytest.raises(BadInput, match="genes 7, now 8"):
        run(monkeypatch, tmp_path, "linear", "--systems", "5")


# ------------------------------------------------------------------------------- graphs of gene regulatory networks


@pytest.mark.exercise2
def test_weakest_edge_of_every_cycle_is_cut():
    """The shortcut through reachability removes what listing all cycles, and the weakest edge of each, removes."""
    cut = 0
    for seed in range(40):
        parents = prior.grow_graph(rng(seed), 12)
        order = [tuple(edge) for edge in rng(seed).permutation(np.argwhere(parents))]
        expected = parents.copy()
        for cycle in networkx.simple_cycles(networkx.DiGraph([(j, k) for k, j in order])):
            weakest = max(zip(cycle[1:] + cycle[:1], cycle), key=order.index)
            expected[weakest] = False
        np.testing.assert_array_equal(prior.cut_cycles(rng(seed), parents), expected)
        cut += (parents & ~expected).sum()
    assert cut > 40


@pytest.mark.exercise2
def test_gene_number_does_not_tell_the_hubs():
    """Genes that joined early regulate more targets; after shuffling, a gene's number and its targets are unrelated."""
    def correlation(sample):
        targets = np.array([sample(rng(seed), 20).sum(axis=0) for seed in range(200)])
        return np.corrcoef(np.tile(np.arange(20), 200), targets.ravel())[0, 1]

    assert correlation(prior.grow_graph) < -0.3
    assert abs(correlation(prior.sample_grn_graph)) < 0.05  # 3 standard errors


# Mean and standard error over 30 GRNs of the released generator, of 50 genes, 4 conditions of 200 cells: measured here,
# not published. Edges, regulators of a gene, largest in- and out-degree, master regulators; zeros (%), counts a cell.
RELEASED_GRAPHS = np.array([69, 1.38, 4.0, 7.0, 4.1]), np.array([10, 0.20, 0.9, 2.1, 2.0]) / np.sqrt(30)
RELEASED_COUNTS = np.array([64, 159]), np.array([11, 86]) / np.sqrt(30)


@pytest.mark.exercise2
@pytest.mark.parametrize("genes", [3, 8, 50])
def test_grn_graphs_suit_the_simulator_and_agree_with_the_released_generator(genes):
    """No cycle, a master regulator, and no gene without an edge, at every size; at 50 genes, the released degrees."""
    rows = []
    for seed in range(200):
        parents = prior.sample_grn_graph(rng(seed), genes)
        assert not np.linalg.matrix_power(parents.astype(float), genes).any()
        regulators, targets = parents.sum(axis=1), parents.sum(axis=0)
        assert (regulators + targets > 0).all() and (regulators == 0).any()
        masters = (regulators == 0).sum()
        rows.append([parents.sum(), regulators.mean(), regulators.max(), targets.max(), masters])
    if genes == 50:
        mean, error = RELEASED_GRAPHS
        assert (abs(np.mean(rows, axis=0) - mean) < 2 * error * np.sqrt(1 + 30 / 200)).all()


def test_counts_agree_with_the_released_generator():
    """Zeros and counts per cell at the paper's size, and genes without a count, of which the knocked-out one is 2%."""
    rows, silent = [], []
    for seed in range(12):
        network = prior.sample_network(rng(seed), 50)
        for t in range(1, 5):
            counts = prior.simulate_condition(network, t, 200, seed, t, 9 + t)
            if len(counts):
                rows.append([100 * (counts == 0).mean(), counts.sum(axis=1).mean()])
                silent.append(100 * (counts.max(axis=0) == 0).mean())
    mean, error = RELEASED_COUNTS
    assert (abs(np.mean(rows, axis=0) - mean) < 2 * error * np.sqrt(1 + 30 / 12)).all()
    assert 2 <= np.mean(silent) < 5  # released: 2.9


# ----------------------------------------------------------------------------------------------------- simulation


CHAIN = {(0, 1): 3.0, (4, 1): 1.0, (1, 2): 2.0, (2, 3): 2.0}  # genes 0 and 4 regulate 1, which regulates 2, ...
WEAK = {(0, 1): 0.1, (2, 3): 2.0}


def network_of(edges, genes, noise=0.01):
    """A Network with the given {(regulator, target): strength}, else nearly without any noise."""
    strength = np.zeros((genes, genes))
    for (j, k), value in edges.items():
        strength[k, j] = value
    return prior.Network(strength, np.full((genes, genes), 2), np.full(genes, 0.8), process_noise=noise, outlier=0.8,
                         library=(12.0, 0.01), dropout=1e-6)


def change_of_means(network, yardstick):
    """Each gene's mean without gene 0, over its mean in control cells; the yardstick is out of reach: its is 1."""
    control = prior.simulate_condition(network, CONTROL, 400, 1, 2, 3).mean(axis=0)
    treated = prior.simulate_condition(network, 1, 400, 1, 2, 3).mean(axis=0)
    assert treated[0] == 0
    return treated / treated[yardstick] * control[yardstick] / control


def test_knock_out_moves_direct_targets_only():
    """A target loses its share of the drive; the targets' targets stay; a sole target may even *rise* (sergio-rs)."""
    ratio = change_of_means(network_of(CHAIN, 5), yardstick=4)
    np.testing.assert_allclose(ratio[1:4], [1 / (3 + 1), 1, 1], rtol=0.05)
    ratio = change_of_means(network_of(WEAK, 4), yardstick=2)
    assert ratio[1] > 2 and ratio[3] == pytest.approx(1, rel=0.05)


def test_each_condition_has_a_network_of_its_own():
    """Control and a knock-out come out the same whichever other knock-outs were simulated before them."""
    noisy = network_of(CHAIN, 5, noise=1.0)
    before = [prior.simulate_condition(noisy, t, 50, 1, 2, 3) for t in range(6)]
    for t in (2, CONTROL):
        np.testing.assert_array_equal(prior.simulate_condition(noisy, t, 50, 1, 2, 3), before[t])


def test_knock_outs_share_noise_only_if_paired(monkeypatch):
    """Two paired knock-outs agree cell by cell on genes neither of them reaches; unpaired ones, and control, do not."""
    noisy = network_of({(0, 1): 2.0, (2, 3): 2.0, (4, 5): 2.0}, 6, noise=1.0)
    monkeypatch.setattr(prior, "sample_network", lambda rng, genes, dropout: noisy)

    def correlation(unpaired, a, b):
        counts = prior.simulate_grn(prior.Settings("grn", genes=6, unpaired=unpaired), 0, 300)[1]
        return np.mean([np.corrcoef(counts[a][:, g], counts[b][:, g])[0, 1] for g in (2, 3, 4, 5)])

    assert correlation(False, 1, 2) > 0.95
    for unpaired, a, b in ((False, 0, 1), (True, 1, 2), (True, 0, 1)):
        assert correlation(unpaired, a, b) < 0.6  # not 0: few of the 300 moments are independent


def test_only_the_noise_differs_in_the_ablation(monkeypatch):
    """Noise amplitude and network are one per GRN in both priors; seeds are one (paired) or one per condition."""
    strengths = []
    for unpaired in (False, True):
        called = []
        monkeypatch.setattr(prior, "simulate_condition", lambda *words: called.append(words) or np.zeros((9, 6), int))
        network, _ = prior.simulate_grn(prior.Settings("grn", genes=6, unpaired=unpaired, seed=3), 5, 9)
        networks, treatments, _, rates, noise, technical = zip(*called)
        assert treatments == tuple(range(7)) and len(set(rates)) == 1
        assert len(set(noise)) == len(set(technical)) == 1 + 6 * unpaired and not set(noise) & set(technical)
        assert all(used is network for used in networks)
        strengths.append(network.strength)
    np.testing.assert_array_equal(*strengths)


def test_parameters_stay_in_the_ranges_of_table_6():
    """Strengths, Hill coefficients, decays and noise of 100 networks fill the paper's ranges and do not leave them.
    With fewer genes than the paper's 50 a cell has fewer counts, as many for each gene."""
    networks = [prior.sample_network(rng(seed), 50) for seed in range(100)]
    drawn = {(1, 5): [], (0.5, 1): [], (45, 82): [], (0.5, 1.5): [], (0.8, 5): [], (4.5, 6): [], (0.3, 0.7): []}
    for n in networks:
        values = (n.strength[n.strength != 0], n.decay, n.dropout, n.process_noise, n.outlier, *n.library)
        for known, value in zip(drawn.values(), values):
            known.extend(np.ravel(value))
    for (low, high), values in drawn.items():
        margin = (high - low) / 10
        assert low <= min(values) < low + margin and high - margin < max(values) <= high
    assert np.mean([n.hill for n in networks]) == pytest.approx(1.5, abs=0.03)
    assert set(networks[0].hill.ravel()) == {1, 2}
    small = [prior.sample_network(rng(seed), 20).library[0] for seed in range(100)]
    assert 4.5 <= min(small) - np.log(20 / 50) < 4.6 and 5.9 < max(small) - np.log(20 / 50) <= 6


def test_zeros_reach_those_of_real_screens():
    """With the range of the smaller scales, networks have from less than 20% zeros, fewer than real screens, to over
    65%; with the paper's none has less than 40%."""
    shares = {}
    for low in (0.0, 45.0):
        shares[low] = []
        for seed in range(40):
            network = prior.sample_network(rng(seed), 20, (low, 82.0))
            shares[low].append((prior.simulate_condition(network, CONTROL, 50, seed, 1, 2) == 0).mean())
    assert min(shares[0.0]) < 0.2 and max(shares[0.0]) > 0.65 and min(shares[45.0]) > 0.4


def test_refusal_of_the_simulator_is_caught_and_interrupts_are_not(monkeypatch):
    """A network without master regulator makes the simulator panic: no cells. Ctrl-C is not taken for a panic."""
    assert prior.simulate_condition(network_of({(0, 1): 1.0, (1, 0): 1.0}, 2), CONTROL, 5, 1, 2, 3).shape == (0, 2)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prior.sergio_rs, "Sim", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prior.simulate_condition(network_of(CHAIN, 5), CONTROL, 5, 1, 2, 3)


# ------------------------------------------------------------------------------------------ the screen of many GRNs


def small(folder, **changes):
    """Settings of 6 GRNs of 5 genes."""
    settings = prior.Settings("grn", scale="smoke", genes=5, systems=4, validation=1, test=1, population=20,
                              test_population=30, num_shards=2, out=folder)
    return dataclasses.replace(settings, **changes)


def screen_of(s):
    """The screen, simulated in this process."""
    for number in range(6):
        if not prior.grn_path(s, number).exists():
            prior.write_grn(s, number)
    prior.make_grn(s, prior.screen_folder(s))
    assert not prior.grn_path(s, 0).parent.exists()
    return tasks.load_screen(prior.screen_folder(s))


def test_grn_screen_is_normalised_log_expression(tmp_path):
    """Undoing log1p, every cell that has counts sums to the median total; knocked-out genes are zero in their rows."""
    s = small(tmp_path)
    screen = screen_of(s)
    totals = []
    for number in range(6):
        _, conditions = prior.simulate_grn(s, number, 20 if number < 4 else 30)
        totals.extend(np.concatenate(conditions).sum(axis=1))
    restored = np.expm1(screen.cells).sum(axis=1)
    np.testing.assert_allclose(restored, np.where(np.array(totals) > 0, np.median(totals), 0), rtol=1e-4)
    assert screen.log_expression and screen.made["section"] == "grn" and "paper" not in screen.made
    for system, t in np.ndindex(6, 5):
        assert not screen.pool(system, t + 1)[:, t].any()
        np.testing.assert_array_equal(screen.treatments[system, t + 1], np.eye(5)[t])
    assert np.isin(screen.split[:4], (TRAIN, ABSENT)).all() and not (screen.split[4:] == TRAIN).any()
    assert (screen.split[4] == VALIDATION).sum() == (screen.split[5] == TEST).sum() == 2


def test_causal_screen(tmp_path):
    """The prior "causal" is laid out as GRNs are. A knocked-out gene is zero, and a GRN depends on its number only."""
    s = small(tmp_path, what="causal")
    screen = screen_of(s)
    assert screen.made["section"] == "grn" and "causal" in screen.made["title"] and (screen.count > 0).all()
    for system, t in np.ndindex(5, 5):
        assert not screen.pool(system, t + 1)[:, t].any()
    again, other = (prior.simulate_own(s, number, 20) for number in (1, 2))
    np.testing.assert_array_equal(np.concatenate(again) > 0, np.concatenate([screen.pool(1, t) for t in range(6)]) > 0)
    assert not np.array_equal(again[0], other[0])


def test_refused_conditions_are_left_out(tmp_path, monkeypatch):
    """A refused knock-out has count 0 and is ABSENT; a refused control takes its whole GRN with it, and no other."""
    class PanicException(BaseException):
        pass

    calls, simulate = [], prior.sergio_rs.Sim

    def refusing(*arguments):
        calls.append(arguments)
        if len(calls) in (4, 7):  # knock-out 3 of GRN 0; control of GRN 1
            raise PanicException("told to")
        return simulate(*arguments)

    monkeypatch.setattr(prior.sergio_rs, "Sim", refusing)
    screen = screen_of(small(tmp_path))
    assert screen.count.shape == (5, 6) and screen.split[0, 3] == ABSENT and (screen.split == ABSENT).sum() == 1
    assert len(screen.cells) == 20 * (3 * 6 - 1) + 30 * 2 * 6
    assert (screen.split[3] == VALIDATION).sum() == (screen.split[4] == TEST).sum() == 2
    assert not screen.pool(0, 4)[:, 3].any()  # the rows after the gap are those of knock-out 4


def test_files_of_other_runs_are_told_apart(tmp_path):
    """A finished GRN is kept; one of other settings, or an unreadable one, is refused before anything is simulated."""
    s = small(tmp_path)
    prior.write_grn(s, 1)
    path = prior.grn_path(s, 1)
    whole = path.read_bytes()
    with pytest.raises(BadInput, match="seed 0, now 1"):
        prior.make_grn(dataclasses.replace(s, seed=1), prior.screen_folder(s))
    for broken in (whole[:100], b"", b"no archive"):
        path.write_bytes(broken)
        with pytest.raises(BadInput, match="grn-1.npz"):
            prior.make_grn(s, prior.screen_folder(s))
    path.unlink()
    prior.write_grn(s, 1)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("name, value", [("shard", 2), ("what", "linear")])
def test_settings_that_do_not_fit_are_refused(name, value, tmp_path):
    """A share that there is not ends in a message that names the option; so does an option that linear SCMs lack."""
    named = "unpaired" if name == "what" else f"--{name}".replace("_", "-")
    with pytest.raises(BadInput, match=named):
        prior.check(small(tmp_path, **{"unpaired": True, name: value}))


def test_folder_that_cannot_be_written_is_found_out_first(tmp_path, monkeypatch):
    """Nothing is simulated if the output has no place."""
    (tmp_path / "smoke").write_text("in the way")
    monkeypatch.setattr(prior, "simulate_condition", None)
    with pytest.raises(OSError):
        run(monkeypatch, tmp_path, "grn")


def test_killed_run_leaves_nothing_behind(tmp_path):
    """SIGKILL of the main process ends its workers. The rest made in two shards, the screen is that of a whole run."""
    s = small(tmp_path / "killed", genes=8, systems=16, validation=2, test=2, population=64, test_population=64)
    command = [sys.executable, prior.__file__, "grn", "--scale", "smoke", "--workers", "1", "--out"]
    killed = subprocess.Popen([*command, str(s.out)], start_new_session=True, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    files = prior.grn_path(s, 0).parent
    while len(list(files.glob("grn-*"))) < 2 and killed.poll() is None:
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert 2 <= len(list(files.glob("grn-*"))) < 20
    deadline = time.time() + 10
    while True:  # signal 0 to the group: is anyone left?
        try:
            os.killpg(killed.pid, 0)
        except ProcessLookupError:
            break
        assert time.time() < deadline, "workers outlived the main process"
        time.sleep(0.05)
    for shard in ("1", "0"):
        subprocess.run([*command, str(s.out), "--num-shards", "2", "--shard", shard], check=True, capture_output=True)
        assert not prior.screen_folder(s).exists()
    assert len(list(files.glob("grn-*"))) == 20
    for out in (s.out, tmp_path / "whole"):
        subprocess.run([*command[:-3], "--out", str(out)], check=True, capture_output=True)
    whole = prior.screen_folder(dataclasses.replace(s, out=tmp_path / "whole"))
    for path in whole.iterdir():
        assert path.read_bytes() == (prior.screen_folder(s) / path.name).read_bytes()


@pytest.mark.exercise8
def test_twins_and_true_means(tmp_path):
    """Twins of many control cells are distributed as the cells of the knock-out are; the treated variable is at its
    value; what is not downstream stays, cell by cell; and their mean is the true one."""
    s = prior.Settings("linear", genes=5, systems=0, validation=0, test=2, test_population=20_000, out=tmp_path)
    prior.make_linear(s, prior.screen_folder(s))
    screen = tasks.load_screen(prior.screen_folder(s))
    e = tasks.evaluation_tasks(screen, 9_000, 0)
    found, means = prior.twins(screen, e, e.given.controls), e.true_means(screen)
    for i, (system, t) in enumerate(zip(e.system, e.treatment)):
        np.testing.assert_allclose(found[i].mean(0), means[i], atol=0.06)
        np.testing.assert_allclose(np.cov(found[i].T), np.cov(e.target[i].T), atol=0.08)
        assert np.ptp(found[i][:, t - 1]) < 1e-6 and found[i][0, t - 1] == pytest.approx(e.given.query[i, t - 1])
        w = screen.weights[system]
        reached = np.linalg.inv(np.eye(5) - w)[:, t - 1] != 0
        np.testing.assert_allclose(found[i][:, ~reached], e.given.controls[i][:, ~reached], rtol=0.03, atol=0.03)
