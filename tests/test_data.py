"""Claims about data.py: nothing leaks across the split, equation 5 holds, and bad files are refused."""

import importlib.util
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
from tasks import ABSENT, CONTROL, KNOWN_ONLY, TEST, TRAIN, VALIDATION, load_screen

TARGETS, GENES, CELLS = 6, 14, 30
NAMES = ["t0", "t1", "t2", "t3", "t4", "t5", "m0", "m1", "m2", "m3", "m4", "m5", "m6", "m7"]


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
    if sparse:
        counts = scipy.sparse.csr_matrix(counts)
    obs = pd.DataFrame(obs, np.arange(len(obs)).astype(str), ["context", "perturbation"]).iloc[order]
    return anndata.AnnData(counts, obs, pd.DataFrame(index=NAMES))


def of(cells, system, treatment):
    """Whether each cell is of this condition."""
    return ((cells.obs["context"] == system) & (cells.obs["perturbation"] == treatment)).to_numpy()


def settings(folder, **changed) -> data.Settings:
    """Settings for the file that `save` writes."""
    common = dict(scale="smoke", h5ad=folder / "screen.h5ad", genes=10, min_cells=20, out=folder / "out")
    return data.Settings(**(common | changed))


def save(folder, cells) -> Path:
    """Write it where `settings` looks for it."""
    cells.write_h5ad(folder / "screen.h5ad")
    return folder / "screen.h5ad"


@pytest.fixture
def prepare(tmp_path):
    """Write the splits of the file that `save` wrote."""
    def call(**changed):
        return data.prepare(settings(tmp_path, **changed))

    return call


def refuses(named):
    """A BadInput that names it."""
    return pytest.raises(BadInput, match=named)


def processed(cells, seed=0, **changed):
    """One split, without files."""
    chosen = settings(Path("nowhere"), **changed)
    cells, control = data.label_cells(cells, chosen)
    return data.process(data.usable_cells(cells, control, chosen), control, "A", chosen, seed)


@pytest.fixture(scope="module")
def usual():
    """The split of seed 0 with 10 of the 14 genes, not to be changed."""
    return processed(make_cells())


# -------------------------------------------------------------------------------------------------- columns and labels


@pytest.mark.parametrize("column, control, label", [
    ("perturbation", "control", "STAT1"), ("gene_target", "NT", "STAT1"), ("target_gene", "Non-Targeting", "STAT1"),
    ("condition", "ctrl", "STAT1+ctrl"), ("condition", "ctrl", "ctrl+STAT1"), ("gene", "CONTROL", "STAT1")])
def test_usual_names_are_found(column, control, label):
    """The column and control label of usual data sets need no option; GEARS' 'GENE+ctrl' is GENE, two genes
    are none."""
    obs = pd.DataFrame({"batch": "1", column: pd.Categorical([label, control, "STAT1+JAK2", None])}, list("abcd"))
    cells = anndata.AnnData(np.ones((4, 2), np.float32), obs, pd.DataFrame(index=["STAT1", "JAK2"]))
    cells, found = data.label_cells(cells, data.Settings())
    assert found == control
    assert list(cells.obs["treatment"]) == ["STAT1", control, "", ""]


@pytest.mark.parametrize("obs, asked, named", [
    ({"perturbation": ["control", "NT"]}, {}, "control, 'perturbation': NT.*--control"),
    ({"perturbation": ["NT", "a"], "gene_target": ["NT", "b"]}, {}, "gene_target.*--treatment-col"),
    ({"perturbation": ["a", "b"]}, {}, "a, b.*--control"),
    ({"perturbation": ["control", "b"]}, {"control": "ctrl"}, "b, control.*--control"),
    ({"oligo": ["control", "b"]}, {}, "--treatment-col.*oligo"),
    ({"oligo": ["control", "b"]}, {"treatment_col": "oligos"}, "--treatment-col.*oligos.*oligo")])
def test_unclear_treatments(obs, asked, named):
    """Missing or ambiguous columns and control labels are refused with the candidates."""
    with refuses(named):
        data.find_treatment(anndata.AnnData(np.ones((2, 1)), pd.DataFrame(obs, ["x", "y"])), data.Settings(**asked))


@pytest.mark.parametrize("obs, column, expected", [
    ({"x": ["1", "2"]}, None, "none"), ({"cell_line": ["1", "1"]}, None, "none"),
    ({"cell_line": ["1", "2"], "cell_type": ["1", "1"]}, None, "cell_line"),
    ({"x": ["1", "2"]}, "x", "x"), ({"context": ["1", "2"]}, "none", "none")])
def test_system_column(obs, column, expected):
    """A usual name with more than one value says the system, unless told otherwise; without one there is one system.
    Missing or ambiguous columns are refused with the candidates."""
    assert data.find_system(pd.DataFrame(obs), data.Settings(system_col=column)) == expected
    with refuses("--system-col y"):
        data.find_system(pd.DataFrame(obs), data.Settings(system_col="y"))
    with refuses("--system-col.*cell_line, cell_type"):
        both = pd.DataFrame({"cell_line": ["1", "2"], "cell_type": ["1", "2"]})
        data.find_system(both, data.Settings())


def test_files_as_people_have_them(capsys):
    """Guides, numbered controls, another case, symbols in any column, counts in .raw under a scaled X, a second column
    with control cells of another kind: read as if they were written as usual, and it is said how."""
    usual = processed(make_cells(sparse=False), genes=10)
    cells = make_cells(sparse=False)
    numbers = np.arange(cells.n_obs) % 2 + 1
    cells.obs["gene"] = [f"NT{n}" if label == "control" else f"{label.upper()}g{n}"
                         for label, n in zip(cells.obs.pop("perturbation"), numbers)]
    cells.obs["condition"] = np.where(numbers == 1, "ctrl", "stimulated")
    cells.var["Symbol"] = NAMES
    cells.var_names = [f"ENSG{i}" for i in range(GENES)]
    cells.raw = cells.copy()
    cells.X = cells.X - cells.X.mean(axis=0)
    found = processed(cells)
    assert list(found.var_names) == list(usual.var_names)
    np.testing.assert_allclose(found.X, usual.X)
    assert (found.obs["treatment"].replace("NT1", "control").to_numpy() == usual.obs["treatment"].to_numpy()).all()
    printed = capsys.readouterr().out
    assert "counts (in .raw)" in printed and "T0g1 = t0" in printed and "NT2 = NT1" in printed
    assert "genes by var['Symbol']" in printed


def test_columns_that_say_the_same(capsys):
    """A column of guides beside one of genes, whatever the case of their names, is no second reading: the first is
    taken. One that says something else of some cell is."""
    usual = processed(make_cells(), genes=10)
    cells = make_cells()
    cells.obs["Guide"] = [f"{label}_1" for label in cells.obs["perturbation"]]
    found = processed(cells)
    assert (found.obs["treatment"].to_numpy() == usual.obs["treatment"].to_numpy()).all()
    assert "treatment column 'perturbation'" in capsys.readouterr().out
    cells = make_cells()
    cells.obs["Guide"] = [f"{label}_1".replace("t1", "t2") for label in cells.obs["perturbation"]]
    with refuses("2 kinds of control labels .'perturbation': control, 'Guide': control_1."):
        processed(cells)
    with refuses("none of the labels of perturbation is a control that is known"):
        cells = make_cells()
        cells.obs["perturbation"] = cells.obs["perturbation"].replace("control", "plain")
        processed(cells)


def test_values_that_cannot_be():
    """No cell has 1e30 molecules, and no logarithm is 1,000; those of a named layer are read where they are."""
    cells = make_cells(sparse=False)
    cells.layers["log"] = np.log1p(cells.X)
    found = processed(cells.copy(), log_transformed=True, layer="log", genes=10)
    assert found.X.max() < 20
    with refuses("--layer logs: there is none"):
        processed(cells.copy(), log_transformed=True, layer="logs")
    cells.layers["log"][3, 2] = 1000
    with refuses("is 1000.0, but --log-transformed says .* are finite, not negative, and at most 20"):
        processed(cells.copy(), log_transformed=True, layer="log")
    cells.X[3, 2] = 1e30
    with refuses("but raw counts are finite, not negative, and at most 1e.07"):
        processed(cells.copy())


def test_unmeasured_knock_outs_are_context(tmp_path):
    """Without the option they are dropped. With it, knock-outs of no measured gene and of genes that are not among the
    D are known experiments without a treatment, never asked for; the split and the genes are the same."""
    cells = make_cells()
    cells.obs["perturbation"] = cells.obs["perturbation"].replace({"t5": "GFP"})
    save(tmp_path, cells)
    screens = [load_screen(data.prepare(settings(tmp_path, name=name, genes=4, unmeasured=unmeasured))[0])
               for name, unmeasured in (("without", False), ("with", True))]
    before, after = screens
    assert before.genes == after.genes and "GFP" not in before.treatment_names
    for t, name in enumerate(after.treatment_names[1:], 1):
        named = name in after.genes
        assert (after.treatments[:, t].any(axis=1) == named).all()
        if named:
            u = before.treatment_names.index(name)
            np.testing.assert_array_equal(after.split[:, t], before.split[:, u])
        else:
            assert (after.split[:, t] == KNOWN_ONLY).all() and (after.count[:, t] > 0).all()
    assert {"GFP"} | (set(NAMES[:5]) - set(after.genes)) <= set(after.treatment_names)


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
    with refuses("--holdout-system D.*A, B, C"):
        data.choose_holdout(conditions, "D")


def test_too_few_treatments_to_split():
    """A system needs a treatment for training and one for testing, two training conditions, and a split a test one."""
    with refuses("--holdout-system A"):
        data.split_conditions(np.random.default_rng(0), [("A", "t0"), ("B", "t0")], "A")
    good = {("A", "t0"): TRAIN, ("A", "t1"): TRAIN, ("A", "t2"): TEST}
    data.check_split(good)
    for condition, use, named in ((("B", "t0"), TRAIN, "'B'"), (("B", "t0"), VALIDATION, "'B'"),
                                  (("A", "t2"), TRAIN, "test")):
        with refuses(named):
            data.check_split(good | {condition: use})


# ---------------------------------------------------------------------------------------------------- genes and values


def test_equation_5():
    """log(1 + m x / |x|_1), with the median m over the seen cells only, worked by hand."""
    counts = np.array([[1, 3], [4, 4], [90, 10]], np.float32)
    for stored in (counts, scipy.sparse.csr_matrix(counts)):
        cells = anndata.AnnData(stored.copy())
        assert data.normalise(cells, np.array([True, True, False])) == 6.0  # of 4 and 8, without the 100
        values = cells.to_df().to_numpy()
        assert values == pytest.approx(np.log1p([[1.5, 4.5], [3, 3], [5.4, 0.6]]), rel=1e-6)


def test_layers_and_formats_agree(usual):
    """The same counts give the same split, stored dense, sparse, or in layer 'counts' beside a normalised X. With
    --log-transformed the values are used as they are."""
    layered = make_cells()
    layered.layers["counts"] = layered.X.copy()
    layered.X = layered.X * 0.3
    for same in (layered, make_cells(sparse=False)):
        pd.testing.assert_frame_equal(processed(same).to_df(), usual.to_df(), rtol=1e-5)
    cells = make_cells(sparse=False)
    cells.X = np.log1p(cells.X * 0.7)
    result = processed(cells.copy(), log_transformed=True)
    assert np.array_equal(result.X, cells[result.obs_names, result.var_names].X)


def test_ranking_is_the_best_t_test_of_training_perturbations(usual):
    """The strength of a gene equals the largest absolute Welch t statistic, computed here with scipy, leaving out the
    knock-out of the gene itself. Held-out cells are refused."""
    training = usual[(usual.obs["use"] == TRAIN).to_numpy()].copy()
    strength = data.rank_genes(training, "control")
    best = pd.Series(0.0, training.var_names)
    values = training.to_df()
    groups = training.obs.groupby(["system", "treatment"]).groups
    for (system, treatment), rows in groups.items():
        controls = values.loc[groups[system, "control"]]
        if treatment != "control":
            scores = abs(scipy.stats.ttest_ind(values.loc[rows], controls, equal_var=False).statistic)
            scores[best.index == treatment] = 0
            best = np.maximum(best, scores)
    assert dict(strength) == pytest.approx(dict(best), rel=1e-4)
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
    assert list(result.var_names[:6]) == NAMES[:6] and set(result.var_names[6:]) == {"m3", "m5"}
    few = processed(make_cells(), genes=5)
    assert few.n_vars == 5 and set(few.obs["treatment"]) == {"control", *few.var_names}


def test_test_cells_choose_nothing():
    """Whatever the test cells hold, the genes and every value of the other cells stay the same."""
    first = processed(make_cells(), genes=8)
    cells, rng = make_cells(sparse=False), np.random.default_rng(9)
    tested = first.obs["use"] == TEST
    where = cells.obs_names.isin(first.obs_names[tested])
    cells.X[where] = rng.poisson(rng.uniform(1, 500, GENES), (where.sum(), GENES))
    before, after = first.to_df(), processed(cells, genes=8).to_df()
    pd.testing.assert_frame_equal(before[~tested], after[~tested], rtol=1e-5)
    assert abs(before - after)[tested].to_numpy().max() > 1  # the change did arrive


def test_a_column_that_names_more_genes_is_not_passed_over():
    """A stimulation with a control is not taken for the screen whose control label is unknown: both are shown."""
    obs = pd.DataFrame({"gene_target": ["STAT1", "JAK2", "mystery", "mystery"],
                        "condition": ["IFNG", "IFNG", "untreated", "untreated"]}, list("abcd"))
    cells = anndata.AnnData(np.ones((4, 3), np.float32), obs, pd.DataFrame(index=["STAT1", "JAK2", "IFNG"]))
    with pytest.raises(BadInput, match="'gene_target' names 2 measured genes.*mystery.*'condition' names 1.*--control"):
        data.label_cells(cells.copy(), data.Settings())
    asked = data.Settings(treatment_col="gene_target", control="mystery")
    assert list(data.label_cells(cells, asked)[0].obs["treatment"]) == ["STAT1", "JAK2", "mystery", "mystery"]


def test_features_that_are_no_genes_are_dropped(capsys):
    """Cell Ranger writes guides and proteins beside the genes; their counts are no expression."""
    var = pd.DataFrame({"feature_types": ["Gene Expression"] * 2 + ["CRISPR Guide Capture"]}, ["STAT1", "JAK2", "NT-1"])
    obs = pd.DataFrame({"gene": ["STAT1", "NT-1"]}, ["a", "b"])
    cells, control = data.label_cells(anndata.AnnData(np.ones((2, 3), np.float32), obs, var), data.Settings())
    assert list(cells.var_names) == ["STAT1", "JAK2"] and control == "NT-1"
    assert "dropped 1 features" in capsys.readouterr().out


def test_dropped_cells_are_told(capsys):
    """Unmeasured targets, double knock-outs, cells without label or counts, and small conditions go, all counted."""
    cells = make_cells(sparse=False)
    unknown, double, unlabelled = np.split(np.flatnonzero(of(cells, "A", "t1"))[:9], [4, 7])
    small, hollow = np.flatnonzero(of(cells, "B", "t2"))[:15], np.flatnonzero(of(cells, "B", "t3"))[:5]
    cells.X[hollow] = 0
    labels = cells.obs["perturbation"].to_numpy().astype(object)
    labels[unknown], labels[double], labels[unlabelled] = "TP53", "t1+t2", None
    cells.obs["perturbation"] = labels
    result = processed(cells[np.setdiff1d(np.arange(cells.n_obs), small)].copy())
    out = capsys.readouterr().out
    for told in ("t1+t2 = nothing", "dropped 5 cells of 2 labels that name no knock-out",
                 "dropped 4 cells of 1 treatments that are no measured gene", ": TP53",
                 "dropped 5 cells of 1 conditions because they have no counts", "dropped 15 cells"):
        assert told in out
    assert result.n_obs == 2 * 7 * CELLS - 2 - 7 - 5 - 30


# ----------------------------------------------------------------------------------------------------------- the files


def test_the_screen_holds_what_was_processed(tmp_path, prepare):
    """Screen and table say the same as the file: each condition's own cells, in one use; what was not measured is
    ABSENT, control is TRAIN, and names are in order."""
    cells = make_cells()
    cells = cells[~of(cells, "B", "t2")].copy()
    save(tmp_path, cells)
    (path,) = prepare()
    assert path == tmp_path / "out/smoke/screens/screen/split-0"
    screen, result = load_screen(path), processed(cells)
    assert screen.genes == tuple(result.var_names) and len(screen.genes) == 10
    assert screen.treatment_names == ("control", *NAMES[:6]) and screen.systems == ("A", "B")
    assert screen.split[1, 3] == ABSENT and screen.count[1, 3] == 0 and (screen.split[:, CONTROL] == TRAIN).all()
    assert screen.count.sum() == len(screen.cells) and screen.log_expression
    table = pd.read_csv(path.parent / "conditions-0.csv")
    assert len(table) == 13
    for row in table.itertuples():
        s, t = screen.systems.index(row.system), screen.treatment_names.index(row.treatment)
        here = result[((result.obs["system"] == row.system) & (result.obs["treatment"] == row.treatment)).to_numpy()]
        use = ("train", "validation", "test").index(row.use)
        assert set(here.obs["use"]) == {screen.split[s, t]} == {use}
        assert screen.count[s, t] == row.cells == here.n_obs == CELLS
        assert np.array_equal(screen.pool(s, t), here.to_df())
        assert np.array_equal(screen.treatments[s, t], np.array(screen.genes) == row.treatment)


def test_how_a_screen_is_described(tmp_path, prepare):
    """Headings, the key of the paper's numbers (only for its own data under its own name), control and held-out system
    go with the screen."""
    save(tmp_path, make_cells())
    (path,) = prepare(name="mine")
    made = load_screen(path).made
    assert (made["title"], made["section"], made["control"], made["holdout"]) == ("mine", "real", "control", "A")
    assert made["settings"]["genes"] == 10 and "screen.h5ad" in made["settings"]["source"] and "paper" not in made
    leukemia = settings(tmp_path, dataset="leukemia")
    own, wide = data.describe(leukemia, "leukemia"), data.describe(leukemia, "leukemia-wide")
    assert own["paper"] == "leukemia" and "paper" not in wide
    assert "Papalexi" in own["title"] and own["title"] != wide["title"]
    assert "paper" not in data.describe(settings(tmp_path, dataset="toy", h5ad=None), "toy")


def test_splits_are_kept_reproducible_and_different(tmp_path, prepare):
    """A finished split is not touched again, more can be added, which differ, and the same seed gives the same; other
    settings are refused, not overwritten, and so is a file that is no screen."""
    save(tmp_path, make_cells())
    (path,) = prepare()
    before = (path / "cells.npy").stat().st_mtime_ns
    paths = prepare(splits=2)
    assert (path / "cells.npy").stat().st_mtime_ns == before
    (again,) = prepare(seed=1, out=tmp_path / "again")
    first, second, repeated = map(load_screen, (*paths, again))
    assert np.array_equal(second.cells, repeated.cells) and np.array_equal(second.split, repeated.split)
    assert not np.array_equal(first.split, second.split)
    for seed in (0, 5):  # also for a split that is not there yet: a screen is made one way
        with refuses("genes 10, now 8"):
            prepare(genes=8, seed=seed)
    save(tmp_path, make_cells(systems=("A", "B", "C")))
    with refuses("source"):
        prepare()
    (path / "screen.json").write_text("{}")
    with refuses("split-0"):
        prepare()


def test_toy_needs_no_file(tmp_path, prepare):
    """The simulated screen goes through all the same steps and says that it is simulated."""
    (path,) = prepare(h5ad=None, dataset="toy", genes=8)
    screen = load_screen(path)
    assert "not cells" in screen.made["title"] and screen.count.shape[0] == 2
    assert tasks.evaluation_tasks(screen, 32, 2).fresh.shape[1:] == (32, 8)
    (path,) = prepare(h5ad=None, dataset="toy", genes=8, toy_treatments=4, name="short")
    assert load_screen(path).count.shape == (2, 5)


def test_download_without_network(tmp_path, monkeypatch, prepare):
    """Without network the message says which address to fetch by hand, where to put it, and the option --h5ad."""
    def refuse():
        raise ConnectionError("no route")

    fake = types.SimpleNamespace(data=types.SimpleNamespace(frangieh_2021_rna=refuse))
    monkeypatch.setitem(sys.modules, "pertpy", fake)
    with refuses("https://.*frangieh_2021_rna.h5ad.*--h5ad") as error:
        prepare(h5ad=None, dataset="melanoma", data_dir=tmp_path)
    assert str(tmp_path / "frangieh_2021_rna.h5ad") in str(error.value)


def test_pertpy_has_what_is_downloaded():
    """Each file of DOWNLOADS is fetched by a function of pertpy of that name, from the address in the message."""
    found = importlib.util.find_spec("pertpy")
    if found is None:
        pytest.skip("pertpy is not installed")
    source = "".join(file.read_text() for file in Path(found.origin).parent.joinpath("data").glob("*.py"))
    for file, *_ in data.DOWNLOADS.values():
        assert f"def {Path(file).stem}(" in source and f"{data.ADDRESS}{file}" in source


def test_melanoma_is_read_as_scperturb_has_it(tmp_path, prepare):
    """Treatments are in `perturbation`, systems in `perturbation_2`, whatever else there is; the system with the most
    treatments, here IFN-gamma as in the paper, is held out."""
    cells = make_cells(systems=("Control", "Co-culture", "IFN\u03b3"))
    kept = (cells.obs["context"] == "IFN\u03b3") | (cells.obs["perturbation"] != "t5")
    cells = cells[kept.to_numpy()].copy()
    cells.obs = cells.obs.rename(columns={"context": "perturbation_2"})
    cells.obs["cell_line"] = ["one", "two"] * (cells.n_obs // 2)
    cells.write_h5ad(tmp_path / data.DOWNLOADS["melanoma"][0])
    (path,) = prepare(h5ad=None, dataset="melanoma", data_dir=tmp_path)
    screen = load_screen(path)
    assert screen.systems == ("Co-culture", "Control", "IFN\u03b3")
    assert screen.treatment_names == ("control", *NAMES[:6])
    assert screen.made["holdout"] == "IFN\u03b3" and (screen.split[2] == TEST).sum() == 3
    assert not (screen.split[:2] == TEST).any() and screen.made["paper"] == "melanoma"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_downloaded_files_are_read_without_pertpy(tmp_path, monkeypatch, prepare):
    """A file that is in --data-dir already is used, and its column names are known (here an .h5mu, as leukemia's)."""
    import mudata
    monkeypatch.setitem(sys.modules, "pertpy", None)  # importing it would fail
    cells = make_cells(systems=("A",))
    labels = cells.obs.pop("perturbation").replace("control", "NT").to_numpy()
    whole = mudata.MuData({"rna": cells})
    whole.obs["gene_target"], whole.obs["perturbation"] = labels, "NT"
    whole.write(tmp_path / "papalexi_2021.h5mu")
    (path,) = prepare(h5ad=None, dataset="leukemia", data_dir=tmp_path)
    assert load_screen(path).treatment_names == ("NT", *NAMES[:6])


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.filterwarnings("ignore:Variable names")
@pytest.mark.parametrize("change, named", [
    ("cells.X[7, 3] = np.nan", "t3.*nan"),
    ("cells.X[7, 3] = np.nan; cells.X = scipy.sparse.csr_matrix(cells.X)", "t3.*nan"),
    ("cells.X[7, 3] = np.inf", "t3.*inf"),
    ("cells.X[7, 3] = -1", "t3.*-1"),
    ("cells.X = np.log1p(cells.X)", "--log-transformed"),
    ("cells.X[:] = 0", "14 conditions"),
    ("cells.X[of(cells, 'A', 't1')] = 0", "A/t1"),
    ("cells.var_names = ['t0', 't0', *NAMES[2:]]", "t0"),
    ("cells.var_names = [f'ENSG{i}' for i in range(GENES)]", "t0, t1.*ENSG0"),
    ("cells.obs['perturbation'] = 'control'", "all cells are controls"),
    ("cells.obs['perturbation'] = 'safe'", "safe.*--control")])
def test_bad_screens(change, named, tmp_path, prepare):
    """Each unusable file is refused with a message that says what and where, and nothing is written."""
    cells = make_cells(sparse=False)
    exec(change, globals() | {"cells": cells})
    save(tmp_path, cells)
    with refuses(named):
        prepare()
    assert not list((tmp_path / "out").rglob("*.*"))


@pytest.mark.parametrize("asked, named", [
    ({"log_transformed": True}, "--log-transformed"), ({"min_cells": 31}, "--min-cells"), ({"genes": 15}, "--genes 15"),
    ({"genes": 2}, "--genes"), ({"treatment_col": "guide"}, "guide.*context, perturbation"),
    ({"system_col": "line"}, "--system-col line"), ({"holdout_system": "Z"}, "--holdout-system Z.*A, B"),
    ({"dataset": "toy"}, "--dataset .* --h5ad")])
def test_bad_options(asked, named, tmp_path, prepare):
    """Each option that does not fit the file, or anything, is named, and nothing is written."""
    save(tmp_path, make_cells())
    with refuses(named):
        prepare(**asked)
    assert not list((tmp_path / "out").rglob("*.*"))


@pytest.mark.parametrize("size", [0, 4000])
def test_damaged_files(size, tmp_path, prepare):
    """An empty, foreign or truncated file is refused as such."""
    path = save(tmp_path, make_cells())
    for contents in (path.read_bytes()[:size], b"not hdf5 at all"):
        path.write_bytes(contents)
        with refuses("screen.h5ad: not a complete"):
            prepare()


def test_errors_end_in_one_line(tmp_path, monkeypatch):
    """On the command line a missing file and an unwritable folder exit with status 1 and one line, before any work."""
    path = save(tmp_path, make_cells())
    monkeypatch.setattr(data, "read", None)  # not reached
    for words, named in ((["--h5ad", str(tmp_path / "none.h5ad")], "none.h5ad"),
                         (["--h5ad", str(path), "--out", str(path)], "screen.h5ad")):
        monkeypatch.setattr(sys, "argv", ["data.py", "--scale", "smoke", *words])
        with pytest.raises(SystemExit, match=f"^error: .*{named}") as stop:
            scales.run(data.main)
        assert "\n" not in stop.value.code
