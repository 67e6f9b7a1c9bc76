"""Claims about data.py: nothing leaks across the split, equation 5 holds, and bad files are refused."""

import csv
import sys
import types
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import scipy.stats

import data
import scales
import tasks
from scales import BadInput
from tasks import ABSENT, CONTROL, TEST, TRAIN, VALIDATION

TARGETS, GENES, CELLS = 6, 14, 30


def make_cells(systems=("A", "B"), sparse=True):
    """Poisson counts in which each target is knocked out; the knock-out of t0 also moves the markers m3 and m5."""
    rng, counts, obs = np.random.default_rng(0), [], []
    for system in systems:
        base = rng.uniform(2, 8, GENES)
        for t in range(-1, TARGETS):
            mean = base.copy()
            if t >= 0:
                mean[t] *= 0.1
            if t == 0:
                mean[[TARGETS + 3, TARGETS + 5]] *= 4
            counts.append(rng.poisson(mean, (CELLS, GENES)))
            obs += [(system, f"t{t}" if t >= 0 else "control")] * CELLS
    order = rng.permutation(len(obs))  # files are not sorted by condition
    counts = np.concatenate(counts).astype(np.float32)[order]
    obs = pd.DataFrame(obs, [f"cell{i}" for i in range(len(obs))], ["context", "perturbation"]).iloc[order]
    names = [f"t{g}" for g in range(TARGETS)] + [f"m{g}" for g in range(GENES - TARGETS)]
    return anndata.AnnData(scipy.sparse.csr_matrix(counts) if sparse else counts, obs, pd.DataFrame(index=names))


def settings(folder, **changed) -> data.Settings:
    common = dict(scale="smoke", h5ad=folder / "screen.h5ad", genes=10, min_cells=20, out=folder / "out")
    return data.Settings(**(common | changed))


def save(folder, cells) -> Path:
    cells.write_h5ad(folder / "screen.h5ad")
    return folder / "screen.h5ad"


def processed(cells, seed=0, **changed):
    """One split, without files."""
    chosen = settings(Path("nowhere"), **changed)
    control = data.label_cells(cells, chosen)
    return data.process(data.usable_cells(cells, control, chosen), control, "A", chosen, seed)


@pytest.fixture(scope="module")
def usual():
    """The split of seed 0 with 10 of the 14 genes, not to be changed."""
    return processed(make_cells())


# -------------------------------------------------------------------------------------------------- columns and labels


@pytest.mark.parametrize("column, control, label", [
    ("perturbation", "control", "STAT1"), ("gene_target", "NT", "STAT1"), ("target_gene", "non-targeting", "STAT1"),
    ("condition", "ctrl", "STAT1"), ("condition", "ctrl", "STAT1+ctrl"), ("condition", "ctrl", "ctrl+STAT1"),
    ("gene", "Non-Targeting", "STAT1"), ("perturbation", "CONTROL", "STAT1")])
def test_usual_names_are_found(column, control, label):
    """The column and control label of usual data sets need no option, and GEARS' 'GENE+ctrl' is GENE."""
    obs = pd.DataFrame({"batch": "1", column: pd.Categorical([label, control, "STAT1+JAK2", None])}, list("abcd"))
    cells = anndata.AnnData(np.ones((4, 2), np.float32), obs, pd.DataFrame(index=["STAT1", "JAK2"]))
    assert data.find_treatment(cells.obs, data.Settings()) == (column, control)
    assert data.label_cells(cells, data.Settings()) == control
    assert list(cells.obs["treatment"]) == ["STAT1", control, "STAT1+JAK2", ""]


@pytest.mark.parametrize("obs, asked, expected", [
    ({"perturbation": ["control", "NT"]}, {}, "'NT' in column 'perturbation'.*--control"),
    ({"perturbation": ["NT", "a"], "gene_target": ["NT", "b"]}, {}, "'perturbation', 'NT' in column 'gene_target'"),
    ({"perturbation": ["a", "b"]}, {}, "no control cells.*labels a, b.*--control"),
    ({"perturbation": ["control", "b"]}, {"control": "ctrl"}, "no 'ctrl' in column 'perturbation'"),
    ({"guide": ["control", "b"]}, {}, "--treatment-col: guide"),
    ({"guide": ["control", "b"]}, {"treatment_col": "guides"}, "--treatment-col guides: no such column.*guide")])
def test_unclear_treatments(obs, asked, expected):
    """Missing or ambiguous columns and control labels are refused with the candidates."""
    with pytest.raises(BadInput, match=expected):
        data.find_treatment(pd.DataFrame(obs), data.Settings(**asked))


@pytest.mark.parametrize("obs, column, expected", [
    ({"x": ["1", "2"]}, None, None), ({"cell_line": ["1", "1"]}, None, None),
    ({"cell_line": ["1", "2"]}, None, "cell_line"), ({"x": ["1", "2"]}, "x", "x"),
    ({"context": ["1", "2"]}, "none", None), ({"cell_line": ["1", "2"], "cell_type": ["1", "1"]}, None, "cell_line"),
    ({"cell_line": ["1", "2"], "cell_type": ["1", "2"]}, None, BadInput("cell_line, cell_type.*--system-col")),
    ({"x": ["1", "2"]}, "y", BadInput("--system-col y: no such column.*x"))])
def test_system_column(obs, column, expected):
    """A usual name with more than one value says the system, unless told otherwise; without one there is one system.
    Missing or ambiguous columns are refused with the candidates."""
    asked = data.Settings(system_col=column)
    if isinstance(expected, BadInput):
        with pytest.raises(BadInput, match=str(expected)):
            data.find_system(pd.DataFrame(obs), asked)
    else:
        assert data.find_system(pd.DataFrame(obs), asked) == expected


def test_gene_symbols_are_found_beside_identifiers():
    """If the genes are called by identifiers, a usual column of symbols is used."""
    cells = make_cells()
    cells.var["gene_name"] = cells.var_names.to_numpy()
    cells.var_names = [f"ENSG{i}" for i in range(GENES)]
    assert set(processed(cells).var_names) <= set(make_cells().var_names)


# ----------------------------------------------------------------------------------------------------------- the split


@pytest.mark.parametrize("treatments, test", [(6, 3), (7, 3), (2, 1)])
def test_half_of_the_held_out_system_is_for_testing(treatments, test):
    """Half of the held-out system's treatments, rounded down, are for testing, no other system has any, a tenth of the
    others is for validation, and seeds do differ."""
    conditions = [(s, f"t{t}") for s in "AB" for t in range(treatments)]
    found = set()
    for seed in (*range(10), 0):
        split = data.split_conditions(np.random.default_rng(seed), conditions, "B")
        assert list(split) == conditions
        assert [s for (s, _), use in split.items() if use == TEST] == ["B"] * test
        assert list(split.values()).count(VALIDATION) == round((2 * treatments - test) / 10)
        found.add(tuple(split.values()))
    assert 1 < len(found) <= 10


def test_held_out_system_has_the_most_treatments():
    """By default the system with the most treatments is held out; another can be chosen, if it exists."""
    conditions = [("A", "t0"), ("B", "t0"), ("B", "t1"), ("C", "t1")]
    assert data.choose_holdout(conditions, None) == "B"
    assert data.choose_holdout(conditions, "C") == "C"
    with pytest.raises(BadInput, match="--holdout-system D.*A, B, C"):
        data.choose_holdout(conditions, "D")


def test_too_few_treatments_to_split():
    """A system needs a treatment for training and one for testing, two training conditions, and a split a test one."""
    with pytest.raises(BadInput, match="'A' has 1 usable treatment"):
        data.split_conditions(np.random.default_rng(0), [("A", "t0"), ("B", "t0")], "A")
    good = {("A", "t0"): TRAIN, ("A", "t1"): TRAIN, ("A", "t2"): TEST}
    data.check_split(good)
    for more, expected in (({("B", "t0"): TRAIN}, "'B' has 1 training"), ({("B", "t0"): VALIDATION}, "'B' has 0"),
                           ({("A", "t2"): TRAIN}, "no test condition")):
        with pytest.raises(BadInput, match=expected):
            data.check_split(good | more)


# ---------------------------------------------------------------------------------------------------- genes and values


@pytest.mark.parametrize("sparse", [True, False])
def test_equation_5(sparse):
    """log(1 + m x / |x|_1), with the median m over the seen cells only, worked by hand."""
    cells = anndata.AnnData(np.array([[1, 3], [4, 4], [90, 10]], np.float32))
    cells.X = scipy.sparse.csr_matrix(cells.X) if sparse else cells.X
    assert data.normalise(cells, np.array([True, True, False])) == 6.0  # of 4 and 8, without the 100
    values = cells.X.toarray() if sparse else cells.X
    assert values == pytest.approx(np.log1p([[1.5, 4.5], [3, 3], [5.4, 0.6]]), rel=1e-6)


def test_layers_and_formats_agree(usual):
    """The same counts give the same split, stored dense, sparse, or in layer 'counts' beside a normalised X."""
    layered = make_cells()
    layered.layers["counts"] = layered.X.copy()
    layered.X = layered.X * 0.3
    assert np.array_equal(processed(layered).X.toarray(), usual.X.toarray())
    dense = processed(make_cells(sparse=False))
    assert list(usual.var_names) == list(dense.var_names)
    assert usual.X.toarray() == pytest.approx(dense.X, rel=1e-5)


def test_log_transformed_values_are_left_alone():
    """With --log-transformed the values are used as they are."""
    cells = make_cells(sparse=False)
    cells.X = np.log1p(cells.X * 0.7)
    result = processed(cells.copy(), log_transformed=True)
    assert np.array_equal(result.X, cells[result.obs_names, result.var_names].X)


def test_ranking_is_the_best_t_test_of_training_perturbations(usual):
    """The strength of a gene equals the largest absolute Welch t statistic, computed here with scipy, leaving out the
    knock-out of the gene itself. Held-out cells are refused."""
    training = usual[(usual.obs["use"] == TRAIN).to_numpy()].copy()
    strength = data.rank_genes(training, "control")
    best = dict.fromkeys(training.var_names, 0.0)
    groups = training.obs.groupby(["system", "treatment"]).groups
    for (system, treatment), rows in groups.items():
        if treatment == "control":
            continue
        treated, controls = training[rows].X.toarray(), training[groups[system, "control"]].X.toarray()
        scores = scipy.stats.ttest_ind(treated, controls, equal_var=False).statistic
        for gene, score in zip(training.var_names, scores):
            if gene != treatment:
                best[gene] = max(best[gene], abs(score))
    assert dict(strength) == pytest.approx(best, rel=1e-4)
    assert list(strength) == sorted(strength, reverse=True)
    with pytest.raises(AssertionError):
        data.rank_genes(usual[(usual.obs["use"] != TEST).to_numpy()].copy(), "control")


def test_targets_come_first_then_the_strongest_markers():
    """All measured targets are kept, then the genes that a training knock-out moves; if there are too many targets, the
    strongest are, and only their treatments."""
    strength = pd.Series([5.0, 4.0, 3.0, 2.0], ["b", "m", "c", "a"])
    assert data.choose_genes(strength, {"a", "b", "c"}, 2) == (["b", "c"], [])
    assert data.choose_genes(strength, {"a", "b", "c"}, 4) == (["a", "b", "c"], ["m"])
    result = processed(make_cells(), genes=8)
    assert (result.obs["use"][result.obs["treatment"] == "t0"] == TRAIN).any()  # else nothing moves the markers
    assert list(result.var_names[:6]) == [f"t{g}" for g in range(6)]
    assert set(result.var_names[6:]) == {"m3", "m5"}
    few = processed(make_cells(), genes=5)
    assert few.n_vars == 5 and set(few.obs["treatment"]) == {"control", *few.var_names}


def test_test_cells_choose_nothing():
    """Whatever the test cells hold, the genes and every value of the other cells stay the same."""
    first = processed(make_cells(), genes=8)
    cells, rng = make_cells(sparse=False), np.random.default_rng(9)
    where = cells.obs_names.isin(first.obs_names[first.obs["use"] == TEST])
    cells.X[where] = rng.poisson(rng.uniform(1, 500, GENES), (where.sum(), GENES))
    second = processed(cells, genes=8)
    assert list(first.var_names) == list(second.var_names)
    assert np.array_equal(first.obs_names, second.obs_names)
    seen = (first.obs["use"] != TEST).to_numpy()
    assert first.X[seen].toarray() == pytest.approx(second.X[seen], rel=1e-5)
    assert abs(first.X[~seen].toarray() - second.X[~seen]).max() > 1  # the change did arrive


def test_dropped_cells_are_told(capsys):
    """Unmeasured targets, double knock-outs, cells without label or counts, and small conditions go, all counted."""
    cells = make_cells(sparse=False)
    obs = cells.obs["perturbation"].to_numpy().astype(object)

    def of(system, treatment):
        return np.flatnonzero((cells.obs["context"] == system) & (obs == treatment))

    unknown, double, unlabelled = np.split(of("A", "t1")[:9], [4, 7])
    small, hollow = of("B", "t2")[:15], of("B", "t3")[:5]
    obs[unknown], obs[double], obs[unlabelled] = "TP53", "t1+t2", None
    cells.X[hollow] = 0
    cells.obs["perturbation"] = obs
    result = processed(cells[np.setdiff1d(np.arange(cells.n_obs), small)].copy())
    out = capsys.readouterr().out
    assert "2 cells without a treatment or system label" in out
    assert "7 cells of 2 treatments that are no measured gene: TP53, t1+t2" in out
    assert "5 cells without any counts" in out
    assert "15 cells of 1 conditions with fewer than 20 cells (--min-cells): B/t2 15" in out
    assert result.n_obs == 2 * 7 * CELLS - 2 - 7 - 5 - 30


# ----------------------------------------------------------------------------------------------------------- the files


def test_the_screen_holds_what_was_processed(tmp_path, usual):
    """Screen and table say the same as the file: each condition's own cells, in one use; what was not measured is
    ABSENT, control is TRAIN, and names are in order."""
    cells = make_cells()
    cells = cells[~((cells.obs["context"] == "B") & (cells.obs["perturbation"] == "t2")).to_numpy()].copy()
    save(tmp_path, cells)
    (path,) = data.prepare(settings(tmp_path))
    assert path == tmp_path / "out/smoke/screens/screen/split-0"
    screen, result = tasks.load_screen(path), processed(cells)
    assert screen.genes == tuple(result.var_names) and len(screen.genes) == 10
    assert screen.treatment_names == ("control", *(f"t{t}" for t in range(6))) and screen.systems == ("A", "B")
    assert screen.split[1, 3] == ABSENT and screen.count[1, 3] == 0 and (screen.split[:, CONTROL] == TRAIN).all()
    assert screen.count.sum() == len(screen.cells) and screen.log_expression
    assert (screen.count[screen.split != ABSENT] == CELLS).all()
    rows = list(csv.DictReader(open(path.parent / "conditions-0.csv")))
    assert len(rows) == 13
    groups = result.obs.groupby(["system", "treatment"]).groups
    for row in rows:
        s, t = screen.systems.index(row["system"]), screen.treatment_names.index(row["treatment"])
        here = result[groups[row["system"], row["treatment"]]]
        assert set(here.obs["use"]) == {screen.split[s, t]}
        assert screen.split[s, t] == ("train", "validation", "test").index(row["use"])
        assert screen.count[s, t] == int(row["cells"]) == here.n_obs
        assert np.array_equal(screen.pool(s, t), here.X.toarray())
        assert screen.treatments[s, t].sum() == (t > 0)
        assert t == 0 or screen.genes[screen.treatments[s, t].argmax()] == row["treatment"]


def test_how_a_screen_is_described(tmp_path):
    """Headings, the key of the paper's numbers (only for its own data under its own name), control and held-out system
    go with the screen."""
    save(tmp_path, make_cells())
    (path,) = data.prepare(settings(tmp_path, name="mine"))
    made = tasks.load_screen(path).made
    assert (made["title"], made["section"], made["control"], made["holdout"]) == ("mine", "real", "control", "A")
    assert made["settings"]["genes"] == 10 and made["settings"]["source"].startswith("screen.h5ad, ")
    assert "paper" not in made
    own = settings(tmp_path, dataset="leukemia")
    assert data.describe(own, "leukemia")["paper"] == "leukemia"
    assert "Papalexi" in data.describe(own, "leukemia")["title"]
    assert "paper" not in data.describe(own, "leukemia-wide")
    assert data.describe(own, "leukemia-wide")["title"] != data.describe(own, "leukemia")["title"]
    assert "paper" not in data.describe(settings(tmp_path, dataset="toy", h5ad=None), "toy")


def test_splits_are_kept_reproducible_and_different(tmp_path, capsys):
    """A finished split is not touched again, more can be added, which differ, and the same seed gives the same; other
    settings are refused, not overwritten, and so is a file that is no screen."""
    save(tmp_path, make_cells())
    (path,) = data.prepare(settings(tmp_path))
    before = (path / "cells.npy").stat().st_mtime_ns
    paths = data.prepare(settings(tmp_path, splits=2))
    assert (path / "cells.npy").stat().st_mtime_ns == before and "finished, skipped" in capsys.readouterr().out
    (again,) = data.prepare(settings(tmp_path, seed=1, out=tmp_path / "again"))
    first, second, repeated = map(tasks.load_screen, (*paths, again))
    assert np.array_equal(second.cells, repeated.cells) and np.array_equal(second.split, repeated.split)
    assert not np.array_equal(first.split, second.split)
    for seed in (0, 5):  # also for a split that is not there yet: a screen is made one way
        with pytest.raises(BadInput, match="made with other settings .genes 10, now 8"):
            data.prepare(settings(tmp_path, genes=8, seed=seed))
    save(tmp_path, make_cells(systems=("A", "B", "C")))
    with pytest.raises(BadInput, match="source"):
        data.prepare(settings(tmp_path))
    (path / "screen.json").write_text("{}")
    with pytest.raises(BadInput, match="split-0: not a complete screen"):
        data.prepare(settings(tmp_path))


def test_toy_needs_no_file(tmp_path):
    """The simulated screen goes through all the same steps and says that it is simulated."""
    (path,) = data.prepare(settings(tmp_path, h5ad=None, dataset="toy", genes=8))
    screen = tasks.load_screen(path)
    assert "not cells" in screen.made["title"]
    assert len(screen.genes) == 8 and len(screen.systems) == 2
    assert tasks.evaluation_tasks(screen, 32, 2).fresh.shape[1:] == (32, 8)


def test_download_without_network(tmp_path, monkeypatch):
    """Without network the message says which address to fetch by hand, where to put it, and the option --h5ad."""
    def refuse():
        raise ConnectionError("no route")
    fake = types.SimpleNamespace(data=types.SimpleNamespace(frangieh_2021=refuse))
    monkeypatch.setitem(sys.modules, "pertpy", fake)
    with pytest.raises(BadInput, match="ConnectionError.*https://.*frangieh_2021.h5ad by hand.*--h5ad") as error:
        data.prepare(settings(tmp_path, h5ad=None, dataset="melanoma", data_dir=tmp_path))
    assert str(tmp_path / "frangieh_2021.h5ad") in str(error.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_downloaded_files_are_read_without_pertpy(tmp_path, monkeypatch):
    """A file that is in --data-dir already is used, and its column names are known (here an .h5mu, as leukemia's)."""
    import mudata
    monkeypatch.setitem(sys.modules, "pertpy", None)  # importing it would fail
    cells = make_cells(systems=("A",))
    labels = cells.obs.pop("perturbation").replace("control", "NT").to_numpy()
    whole = mudata.MuData({"rna": cells})
    whole.obs["gene_target"], whole.obs["perturbation"] = labels, "NT"
    whole.write(tmp_path / "papalexi_2021.h5mu")
    (path,) = data.prepare(settings(tmp_path, h5ad=None, dataset="leukemia", data_dir=tmp_path))
    assert tasks.load_screen(path).treatment_names == ("NT", *(f"t{t}" for t in range(6)))


# ----------------------------------------------------------------------------------------------------------- bad input


def with_value(value):
    def change(cells):
        cells.X[7, 3] = value
    return change


def sparse_nan(cells):
    cells.X[7, 3] = np.nan
    cells.X = scipy.sparse.csr_matrix(cells.X)


def empty_condition(cells):
    cells.X[((cells.obs["context"] == "A") & (cells.obs["perturbation"] == "t1")).to_numpy()] = 0


def rename(cells):
    cells.var_names = ["t0", "t0", *cells.var_names[2:]]


def no_targets(cells):
    cells.var_names = [f"ENSG{i}" for i in range(GENES)]


def logarithm(cells):
    cells.X = np.log1p(cells.X)


def label_all(label):
    def change(cells):
        cells.obs["perturbation"] = label
    return change


def zero(cells):
    cells.X[:] = 0


def nothing(cells):
    pass


@pytest.mark.filterwarnings("ignore:Variable names")
@pytest.mark.parametrize("change, asked, expected", [
    (with_value(np.nan), {}, "gene t3 in cell cell.* is nan"),
    (sparse_nan, {}, "gene t3 in cell cell.* is nan"),
    (with_value(np.inf), {}, "is inf"),
    (with_value(-1), {}, "is -1.0"),
    (logarithm, {}, "not integers.*--log-transformed"),
    (nothing, {"log_transformed": True}, "--log-transformed, but all values are integers"),
    (zero, {}, "no cell of 14 of the 14 conditions has any counts"),
    (empty_condition, {}, "no cell of 1 of the 14 conditions has any counts .A/t1"),
    (rename, {}, "1 gene names occur more than once .t0"),
    (no_targets, {}, "no usable treatment is left: 360 cells of 6 treatments that are no measured gene.*ENSG0"),
    (label_all("control"), {}, "no usable treatment is left: all cells are controls"),
    (label_all("safe"), {}, "no control cells.*safe.*--control"),
    (nothing, {"min_cells": 31}, "no usable treatment is left: 420 cells of 14 conditions with fewer than 31 cells"),
    (nothing, {"genes": 15}, "--genes 15: the file has only 14 genes"),
    (nothing, {"genes": 2}, "training condition|no test condition"),
    (nothing, {"treatment_col": "guide"}, "--treatment-col guide: no such column in obs; it has context, perturbation"),
    (nothing, {"system_col": "line"}, "--system-col line: no such column"),
    (nothing, {"holdout_system": "Z"}, "--holdout-system Z.*A, B"),
    (nothing, {"splits": 0}, "--splits 0: must be at least 1"),
    (nothing, {"name": "../other"}, "--name ../other"),
    (nothing, {"name": ".."}, "--name .."),
    (nothing, {"dataset": "toy"}, "either --dataset .* or --h5ad")])
def test_bad_screens(change, asked, expected, tmp_path):
    """Each unusable file or option is refused with a message that says what and where, and nothing is written."""
    cells = make_cells(sparse=False)
    change(cells)
    save(tmp_path, cells)
    with pytest.raises(BadInput, match=expected):
        data.prepare(settings(tmp_path, **asked))
    assert not list((tmp_path / "out").rglob("*.*"))


@pytest.mark.parametrize("contents", [b"", b"not hdf5 at all", None])
def test_damaged_files(contents, tmp_path):
    """An empty, foreign or truncated file is refused as such."""
    path = save(tmp_path, make_cells())
    path.write_bytes(path.read_bytes()[:4000] if contents is None else contents)
    with pytest.raises(BadInput, match="screen.h5ad: not a complete .h5ad file"):
        data.prepare(settings(tmp_path))


def test_errors_end_in_one_line(tmp_path, monkeypatch):
    """On the command line a missing file and an unwritable folder exit with status 1 and one line, before any work."""
    path = save(tmp_path, make_cells())
    monkeypatch.setattr(data, "read", None)  # not reached
    for arguments, expected in ((["--h5ad", str(tmp_path / "none.h5ad")], "none.h5ad: no such file"),
                                (["--h5ad", str(path), "--out", str(path)], "Not a directory")):
        monkeypatch.setattr(sys, "argv", ["data.py", "--scale", "smoke", *arguments])
        with pytest.raises(SystemExit) as stop:
            scales.run(data.main)
        assert expected in stop.value.code and stop.value.code.startswith("error: ") and "\n" not in stop.value.code
