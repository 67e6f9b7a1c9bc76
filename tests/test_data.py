"""Claims about data.py: nothing leaks across the split, equation 5 holds, tasks are as said, bad files are refused."""

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
from jaxtyping import install_import_hook

with install_import_hook("data", "beartype.beartype"):
    import data
import scales
from data import ABSENT, CONTROL, TEST, TRAIN, VALIDATION, Screen
from scales import BadInput

TARGETS, GENES, CELLS = 6, 14, 30


# ------------------------------------------------------------------------------------------------ synthetic screens


def make_cells(contexts=("A", "B"), sparse=True, seed=0):
    """Poisson counts in which each target is knocked out; the knock-out of t0 also moves the markers m3 and m5."""
    rng, counts, obs = np.random.default_rng(seed), [], []
    for context in contexts:
        base = rng.uniform(2, 8, GENES)
        for t in range(-1, TARGETS):
            mean = base.copy()
            if t >= 0:
                mean[t] *= 0.1
            if t == 0:
                mean[[TARGETS + 3, TARGETS + 5]] *= 4
            counts.append(rng.poisson(mean, (CELLS, GENES)))
            obs += [(context, f"t{t}" if t >= 0 else "control")] * CELLS
    order = rng.permutation(len(obs))  # files are not sorted by condition
    counts = np.concatenate(counts).astype(np.float32)[order]
    obs = pd.DataFrame(obs, [f"cell{i}" for i in range(len(obs))], ["context", "perturbation"]).iloc[order]
    names = [f"t{g}" for g in range(TARGETS)] + [f"m{g}" for g in range(GENES - TARGETS)]
    return anndata.AnnData(scipy.sparse.csr_matrix(counts) if sparse else counts, obs, pd.DataFrame(index=names))


def settings(tmp_path, **changed) -> data.Settings:
    common = dict(scale="smoke", h5ad=tmp_path / "screen.h5ad", genes=10, min_cells=20, context=1, out=tmp_path / "out")
    return data.Settings(**(common | changed))


def save(tmp_path, cells) -> Path:
    cells.write_h5ad(tmp_path / "screen.h5ad")
    return tmp_path / "screen.h5ad"


def processed(cells, seed=0, **changed):
    """One split, without files."""
    chosen = settings(Path("nowhere"), **changed)
    control = data.label_cells(cells, chosen)
    return data.process(data.usable_cells(cells, control, chosen), control, "A", chosen, seed)


@pytest.fixture(scope="module")
def usual():
    """The split of seed 0 with 10 of the 14 genes, not to be changed."""
    return processed(make_cells())


def make_screen(split, count=40, genes=None) -> Screen:
    """A Screen in which every gene of a cell holds the number of its row. `split` and `count`: C T."""
    split = np.asarray(split)
    count = np.broadcast_to(count, split.shape).copy()
    genes = genes or split.shape[1] - 1
    rows = np.repeat(np.arange(count.sum(), dtype=np.float32)[:, None], genes, axis=1)
    names = lambda letter, n: tuple(f"{letter}{i}" for i in range(n))
    one_hot = np.stack([np.eye(split.shape[1], genes, -1, dtype=np.float32)] * len(split))
    return Screen(rows, (count.cumsum() - count.ravel()).reshape(count.shape), count, one_hot, split, names("g", genes),
                  names("c", len(split)), names("t", split.shape[1]), False)


def conditions_of(screen: Screen, cells) -> np.ndarray:
    """Number c * T + t of the condition of each cell of `make_screen`."""
    return np.searchsorted(screen.start.ravel(), cells[..., 0], side="right") - 1


MIXED = [[TRAIN, TRAIN, TRAIN, TRAIN, TEST, VALIDATION, TEST], [TRAIN, TRAIN, ABSENT, TRAIN, TRAIN, TRAIN, VALIDATION]]


# ------------------------------------------------------------------------------------------------------ drawing tasks


@pytest.mark.parametrize("split", [TRAIN, VALIDATION, TEST])
def test_populations_of_a_task_come_from_where_they_should(split):
    """Controls and context cells are of the query's own context, context experiments are different training conditions
    other than the query, and treatments are those of the cells."""
    screen = make_screen(MIXED)
    task = data.sample_tasks(np.random.default_rng(0), screen, 400, 5, 2, split)
    observed, context, target = (conditions_of(screen, getattr(task, f)) for f in ("observed", "context", "target"))
    assert (context == context[..., :1]).all() and (target == target[:, :1]).all()  # one condition each
    c, query = np.divmod(target[:, 0], 7)
    used = context[..., 0]
    assert (observed == c[:, None] * 7 + CONTROL).all()
    assert (used // 7 == c[:, None]).all()
    assert (screen.split.ravel()[used] == TRAIN).all() and (used % 7 != CONTROL).all()
    assert (used % 7 != query[:, None]).all() and (used[:, 0] != used[:, 1]).all()
    assert (screen.split[c, query] == split).all()
    assert (task.query == screen.treatments[c, query]).all()
    assert (task.context_treatments == screen.treatments.reshape(14, 6)[used]).all()
    assert {a.dtype for a in task} == {np.dtype(np.float32)}


def test_training_tasks_hold_no_held_out_cell():
    """Not one cell of a test or validation condition gets into training tasks, in any role."""
    screen = make_screen(MIXED)
    task = data.sample_tasks(np.random.default_rng(1), screen, 500, 20, 2)
    for cells in (task.observed, task.context, task.target):
        assert (screen.split.ravel()[conditions_of(screen, cells)] == TRAIN).all()


def test_queries_are_uniform_over_conditions():
    """Each training condition is the query equally often, whatever the number of its cells."""
    screen = make_screen(MIXED, count=[[40, 5, 500, 40, 40, 40, 40], [40] * 7])
    task = data.sample_tasks(np.random.default_rng(2), screen, 3500, 2, 0)
    times = np.bincount(conditions_of(screen, task.target)[:, 0], minlength=14)
    assert (times > 0).sum() == 7
    assert scipy.stats.chisquare(times[times > 0]).pvalue > 1e-3


def test_cells_are_drawn_without_replacement_and_afresh():
    """A population has no cell twice, every cell is drawn equally often, and two tasks do not share their draw."""
    screen = make_screen(np.full((1, 4), TRAIN), count=12)
    task = data.sample_tasks(np.random.default_rng(3), screen, 1500, 5, 2)
    drawn = np.concatenate([task.observed[:, None], task.context, task.target[:, None]], 1)[..., 0].reshape(-1, 5)
    assert all(len(set(population)) == 5 for population in drawn)
    times = np.bincount(task.observed[..., 0].astype(int).ravel(), minlength=48)[:12]
    assert scipy.stats.chisquare(times).pvalue > 1e-3
    assert len({tuple(population) for population in task.observed[..., 0]}) > 1200


def test_too_few_cells_are_drawn_with_replacement():
    """A population smaller than N still gives N cells, all of them its own."""
    screen = make_screen(np.full((1, 4), TRAIN), count=3)
    task = data.sample_tasks(np.random.default_rng(4), screen, 10, 8, 1)
    assert task.target.shape == (10, 8, 3)
    assert (conditions_of(screen, task.observed) == CONTROL).all()


def test_no_context_is_legal():
    """K = 0 gives a context axis of length 0, also in evaluation tasks."""
    screen = make_screen(MIXED)
    for task in (data.sample_tasks(np.random.default_rng(0), screen, 3, 5, 0),
                 data.evaluation_tasks(np.random.default_rng(0), screen, 5, 0)):
        assert task.context.shape[1:] == (0, 5, 6) and task.context_treatments.shape[1:] == (0, 6)
        assert task.context.dtype == np.float32


def test_tasks_reproduce_from_the_seed():
    """The same generator state gives the same tasks, another one gives others."""
    screen = make_screen(MIXED)
    for sample in (lambda s: data.sample_tasks(np.random.default_rng(s), screen, 4, 5, 2),
                   lambda s: data.evaluation_tasks(np.random.default_rng(s), screen, 5, 2)):
        assert all(np.array_equal(a, b) for a, b in zip(sample(0), sample(0)))
        assert not np.array_equal(sample(0).observed, sample(1).observed)


@pytest.mark.parametrize("split, most, where", [(TRAIN, 2, "c0"), (TEST, 3, "c0"), (VALIDATION, 3, "c0")])
def test_too_many_context_experiments(split, most, where):
    """A K that some query cannot have is refused, naming context, number and flag; the largest possible K is not."""
    screen = make_screen(MIXED)
    data.sample_tasks(np.random.default_rng(0), screen, 4, 5, most, split)
    with pytest.raises(BadInput, match=f"--context {most + 1}.*'{where}' has only {most} .*at most {most}"):
        data.sample_tasks(np.random.default_rng(0), screen, 4, 5, most + 1, split)
    with pytest.raises(BadInput, match="--context 9"):
        data.evaluation_tasks(np.random.default_rng(0), screen, 5, 9, split)


def test_no_condition_of_a_split():
    """Asking for validation tasks where there are none is refused, not looped over."""
    with pytest.raises(BadInput, match="no validation condition"):
        data.sample_tasks(np.random.default_rng(0), make_screen(np.full((1, 4), TRAIN)), 4, 5, 1, VALIDATION)


def test_evaluation_tasks_cover_the_split_in_order():
    """There is one task per test condition, in order, with context experiments from its training conditions."""
    screen = make_screen(MIXED)
    task = data.evaluation_tasks(np.random.default_rng(0), screen, 10, 3)
    assert list(zip(task.context_index, task.treatment_index)) == [(0, 4), (0, 6)]
    for field, condition in (("target", [4, 6]), ("fresh", [4, 6]), ("again", [4, 6]), ("observed", [0, 0]),
                             ("identity", [0, 0])):
        assert (conditions_of(screen, getattr(task, field)) == np.array(condition)[:, None]).all(), field
    assert (np.sort(conditions_of(screen, task.context)[..., 0]) == [1, 2, 3]).all()
    assert (task.query == screen.treatments[0, [4, 6]]).all()


def test_fresh_cells_are_not_in_the_target():
    """With 2N cells, target and fresh, and observed and identity, are disjoint, without repeats; `again` overlaps."""
    task = data.evaluation_tasks(np.random.default_rng(0), make_screen(MIXED), 20, 1)
    sets = {f: [set(cells) for cells in getattr(task, f)[..., 0]] for f in
            ("target", "fresh", "again", "observed", "identity")}
    assert all(len(cells) == 20 for group in sets.values() for cells in group)
    for i in range(2):
        assert not sets["target"][i] & sets["fresh"][i] and not sets["observed"][i] & sets["identity"][i]
        assert sets["target"][i] & sets["again"][i]


@pytest.mark.parametrize("count, target, fresh", [(25, 20, 5), (20, 20, 0), (8, 8, 0)])
def test_evaluation_with_few_cells(count, target, fresh):
    """With fewer than 2N cells the target is served first, fresh comes from the rest, and is NaN if there is none."""
    screen = make_screen([[TRAIN, TRAIN, TEST]], count=count)
    task = data.evaluation_tasks(np.random.default_rng(0), screen, 20, 1)
    assert task.target.shape == task.fresh.shape == (1, 20, 2)
    assert len(set(task.target[0, :, 0])) == target
    if fresh:
        assert set(task.fresh[0, :, 0]) <= set(screen.cells[-count:, 0]) - set(task.target[0, :, 0])
    else:
        assert np.isnan(task.fresh).all()
    assert np.isfinite(task.identity).all() and (conditions_of(screen, task.identity) == CONTROL).all()


# -------------------------------------------------------------------------------------------- columns and labels


@pytest.mark.parametrize("column, control, label", [
    ("perturbation", "control", "STAT1"), ("gene_target", "NT", "STAT1"), ("target_gene", "non-targeting", "STAT1"),
    ("condition", "ctrl", "STAT1"), ("condition", "ctrl", "STAT1+ctrl"), ("condition", "ctrl", "ctrl+STAT1"),
    ("gene", "Non-Targeting", "STAT1"), ("perturbation", "CONTROL", "STAT1")])
def test_usual_names_are_found(column, control, label):
    """The column and control label of usual data sets need no option, and GEARS' 'GENE+ctrl' is GENE."""
    obs = pd.DataFrame({"batch": "1", column: pd.Categorical([label, control, "STAT1+JAK2", None])})
    cells = anndata.AnnData(np.ones((4, 2), np.float32), obs.set_index(pd.Index(list("abcd"))), pd.DataFrame(
        index=["STAT1", "JAK2"]))
    assert data.find_treatment(cells.obs, data.Settings()) == (column, control)
    assert data.label_cells(cells, data.Settings()) == control
    assert list(cells.obs["treatment"]) == ["STAT1", control, "STAT1+JAK2", ""]


@pytest.mark.parametrize("obs, asked, expected", [
    ({"perturbation": ["control", "NT"]}, {}, "'NT' in column 'perturbation'.*--control"),
    ({"perturbation": ["NT", "a"], "gene_target": ["NT", "b"]}, {}, "'perturbation', 'NT' in column 'gene_target'"),
    ({"perturbation": ["a", "b"]}, {}, "no control cells.*labels a, b"),
    ({"perturbation": ["control", "b"]}, {"control": "ctrl"}, "no 'ctrl' in column 'perturbation'"),
    ({"guide": ["control", "b"]}, {}, "--treatment-col: guide"),
    ({"guide": ["control", "b"]}, {"treatment_col": "guides"}, "--treatment-col guides: no such column.*guide")])
def test_unclear_treatments(obs, asked, expected):
    """Missing or ambiguous columns and control labels are refused with the candidates."""
    with pytest.raises(BadInput, match=expected):
        data.find_treatment(pd.DataFrame(obs), data.Settings(**asked))


@pytest.mark.parametrize("obs, asked, expected", [
    ({"x": ["1", "2"]}, {}, None), ({"cell_line": ["1", "1"]}, {}, None), ({"cell_line": ["1", "2"]}, {}, "cell_line"),
    ({"x": ["1", "2"]}, {"context_col": "x"}, "x"), ({"context": ["1", "2"]}, {"context_col": "none"}, None),
    ({"cell_line": ["1", "2"], "cell_type": ["1", "1"]}, {}, "cell_line")])
def test_context_column(obs, asked, expected):
    """A usual name with more than one value is the context, unless told otherwise; without one there is one context."""
    assert data.find_context(pd.DataFrame(obs), data.Settings(**asked)) == expected


@pytest.mark.parametrize("obs, asked, expected", [
    ({"cell_line": ["1", "2"], "cell_type": ["1", "2"]}, {}, "cell_line, cell_type.*--context-col"),
    ({"x": ["1", "2"]}, {"context_col": "y"}, "--context-col y: no such column.*x")])
def test_unclear_context(obs, asked, expected):
    """Missing or ambiguous context columns are refused with the candidates."""
    with pytest.raises(BadInput, match=expected):
        data.find_context(pd.DataFrame(obs), data.Settings(**asked))


def test_gene_symbols_are_found_beside_identifiers():
    """If the genes are called by identifiers, a usual column of symbols is used."""
    cells = make_cells()
    cells.var["gene_name"] = cells.var_names.to_numpy()
    cells.var_names = [f"ENSG{i}" for i in range(GENES)]
    assert set(processed(cells).var_names) <= set(make_cells().var_names)


# ------------------------------------------------------------------------------------------------------- the split


@pytest.mark.parametrize("treatments, test", [(6, 3), (7, 3), (2, 1)])
def test_half_of_the_held_out_context_is_for_testing(treatments, test):
    """Half of the held-out context's treatments, rounded down, are 'test', no other context has any, and a tenth of the
    others is for validation."""
    conditions = [(c, f"t{t}") for c in "AB" for t in range(treatments)]
    split = data.split_conditions(np.random.default_rng(0), conditions, "B")
    assert list(split) == conditions
    assert [c for (c, _), s in split.items() if s == "test"] == ["B"] * test
    assert list(split.values()).count("validation") == round((2 * treatments - test) / 10)


def test_split_depends_on_the_seed_only():
    """The same seed gives the same split, and ten seeds do not all give the same."""
    conditions = [("A", f"t{t}") for t in range(8)]
    splits = [tuple(data.split_conditions(np.random.default_rng(s), conditions, "A").items()) for s in (*range(10), 0)]
    assert splits[0] == splits[-1] and len(set(splits)) > 5


def test_held_out_context_has_the_most_treatments():
    """By default the context with the most treatments is held out; another can be chosen, if it exists."""
    conditions = [("A", "t0"), ("B", "t0"), ("B", "t1"), ("C", "t1")]
    assert data.choose_holdout(conditions, data.Settings()) == "B"
    assert data.choose_holdout(conditions, data.Settings(holdout_context="C")) == "C"
    with pytest.raises(BadInput, match="--holdout-context D.*A, B, C"):
        data.choose_holdout(conditions, data.Settings(holdout_context="D"))


def test_each_condition_is_in_one_split(usual):
    """All cells of a condition carry the same split, and controls carry their own."""
    obs = usual.obs
    assert (obs.groupby(["context", "treatment"])["split"].nunique() == 1).all()
    assert set(obs["split"][obs["treatment"] == "control"]) == {"control"}
    assert set(obs["split"]) == {"control", "train", "validation", "test"}


# -------------------------------------------------------------------------------------------- genes and values


@pytest.mark.parametrize("sparse", [True, False])
def test_equation_5(sparse):
    """log(1 + m x / |x|_1), with the median m over the seen cells only, worked by hand."""
    cells = anndata.AnnData(np.array([[1, 3], [4, 4], [90, 10]], np.float32))
    cells.X = scipy.sparse.csr_matrix(cells.X) if sparse else cells.X
    assert data.normalise(cells, np.array([True, True, False])) == 6.0  # of 4 and 8, without the 100
    values = cells.X.toarray() if sparse else cells.X
    assert values == pytest.approx(np.log1p([[1.5, 4.5], [3, 3], [5.4, 0.6]]), rel=1e-6)


def test_sparse_and_dense_files_agree(usual):
    """The same counts give the same split, stored one way or the other."""
    dense = processed(make_cells(sparse=False))
    assert list(usual.var_names) == list(dense.var_names)
    assert usual.X.toarray() == pytest.approx(dense.X, rel=1e-5)


def test_ranking_is_the_best_t_test_of_training_perturbations(usual):
    """The strength of a gene equals the largest absolute Welch t statistic, computed here with scipy, leaving out the
    knock-out of the gene itself."""
    training = usual[usual.obs["split"].isin(["control", "train"]).to_numpy()].copy()
    strength = data.rank_genes(training, "control")
    best = dict.fromkeys(training.var_names, 0.0)
    for (context, treatment), _ in training.obs[training.obs["split"] == "train"].groupby(["context", "treatment"]):
        pick = lambda t: training[(training.obs["context"] == context) & (training.obs["treatment"] == t)].X
        scores = scipy.stats.ttest_ind(pick(treatment).toarray(), pick("control").toarray(), equal_var=False).statistic
        for gene, score in zip(training.var_names, scores):
            best[gene] = max(best[gene], abs(score)) if gene != treatment else best[gene]
    assert dict(strength) == pytest.approx(best, rel=1e-4)
    assert list(strength) == sorted(strength, reverse=True)


def test_targets_come_first_then_the_strongest_markers():
    """All measured targets are kept, then the genes that a training knock-out moves."""
    result = processed(make_cells(), seed=0, genes=8)
    assert (result.obs["split"][(result.obs["treatment"] == "t0")] == "train").any()  # else nothing moves the markers
    assert list(result.var_names[:6]) == [f"t{g}" for g in range(6)]
    assert set(result.var_names[6:]) == {"m3", "m5"}


def test_more_targets_than_genes():
    """If there are more targets than genes, the strongest are kept, and only their treatments."""
    strength = pd.Series([5.0, 4.0, 3.0, 2.0], ["b", "m", "c", "a"])
    assert data.choose_genes(strength, {"a", "b", "c"}, 2) == (["b", "c"], [])
    assert data.choose_genes(strength, {"a", "b", "c"}, 4) == (["a", "b", "c"], ["m"])
    result = processed(make_cells(), seed=0, genes=4)
    assert set(result.obs["treatment"]) == {"control", *result.var_names}
    assert result.n_vars == 4


def test_test_cells_choose_nothing():
    """Whatever the test cells hold, the genes and every value of the other cells stay the same."""
    first = processed(make_cells(), genes=8)
    cells, rng = make_cells(sparse=False), np.random.default_rng(9)
    names = first.obs_names[first.obs["split"] == "test"]
    where = cells.obs_names.isin(names)
    cells.X[where] = rng.poisson(rng.uniform(1, 500, GENES), (where.sum(), GENES))
    second = processed(cells, genes=8)
    assert list(first.var_names) == list(second.var_names)
    seen = (first.obs["split"] != "test").to_numpy()
    assert np.array_equal(first.obs_names, second.obs_names)
    assert first.X[seen].toarray() == pytest.approx(second.X[seen], rel=1e-5)
    assert abs(first.X[~seen].toarray() - second.X[~seen]).max() > 1  # the change did arrive


def test_held_out_cells_cannot_be_ranked(usual):
    """Ranking on cells of a test or validation condition is refused by the code itself."""
    with pytest.raises(AssertionError):
        data.rank_genes(usual[(usual.obs["split"] != "test").to_numpy()].copy(), "control")


def test_dropped_cells_are_told(capsys):
    """Unmeasured targets, double knock-outs, cells without label or counts, and small conditions go, all counted."""
    cells = make_cells(sparse=False)
    obs = cells.obs["perturbation"].to_numpy().astype(object)
    of = lambda c, t: np.flatnonzero((cells.obs["context"] == c) & (obs == t))
    unknown, double, unlabelled = np.split(of("A", "t1")[:9], [4, 7])
    small, hollow = of("B", "t2")[:15], of("B", "t3")[:5]
    obs[unknown], obs[double], obs[unlabelled] = "TP53", "t1+t2", None
    cells.X[hollow] = 0
    keep = np.setdiff1d(np.arange(cells.n_obs), small)
    cells.obs["perturbation"] = obs
    result = processed(cells[keep].copy())
    out = capsys.readouterr().out
    assert "2 cells without a treatment or context label" in out
    assert "7 cells of 2 treatments that are no measured gene: TP53, t1+t2" in out
    assert "5 cells without any counts" in out
    assert "15 cells of 1 conditions with fewer than 20 cells (--min-cells): B/t2 15" in out
    assert result.n_obs == 2 * 7 * CELLS - 2 - 7 - 5 - 30


def test_log_transformed_values_are_left_alone():
    """With --log-transformed the values are used as they are; there is no counts layer."""
    cells = make_cells(sparse=False)
    cells.X = np.log1p(cells.X * 0.7)
    result = processed(cells.copy(), log_transformed=True)
    assert np.array_equal(result.X, cells[result.obs_names, result.var_names].X)
    assert "counts" not in result.layers


def test_counts_may_be_in_a_layer(usual):
    """If X is normalised but layer 'counts' holds counts, these are used."""
    cells = make_cells()
    cells.layers["counts"] = cells.X.copy()
    cells.X = cells.X * 0.3
    assert np.array_equal(processed(cells).X.toarray(), usual.X.toarray())


def test_held_out_context_without_training_conditions():
    """If validation took the last training condition beside the test ones, the split is refused, naming the context."""
    cells = make_cells()
    few = ["control", "t0", "t1"]
    cells = cells[((cells.obs["context"] == "B") | cells.obs["perturbation"].isin(few)).to_numpy()].copy()
    conditions = [(c, f"t{t}") for c, n in (("A", 2), ("B", 6)) for t in range(n)]
    took = lambda seed: "train" not in [s for (c, _), s in data.split_conditions(
        np.random.default_rng(seed), conditions, "A").items() if c == "A"]
    with pytest.raises(BadInput, match="--context 1: context 'A' has only 0 training experiments"):
        processed(cells, seed=next(filter(took, range(100))))


# ------------------------------------------------------------------------------------------------------- the files


def test_load_screen_gives_back_what_was_written(tmp_path):
    """The Screen, the AnnData and the CSV of a split say the same, cell by cell."""
    save(tmp_path, make_cells())
    (path,) = data.prepare(settings(tmp_path))
    assert path == tmp_path / "out/smoke/data/screen/split-0.h5ad"
    cells, screen = anndata.read_h5ad(path), data.load_screen(path)
    assert screen.genes == tuple(cells.var_names) and len(screen.genes) == 10
    assert screen.treatment_names == ("control", *(f"t{t}" for t in range(6))) and screen.context_names == ("A", "B")
    assert screen.count.sum() == len(screen.cells) == cells.n_obs and screen.log_expression
    names = dict(zip(("train", "validation", "test", "control"), (TRAIN, VALIDATION, TEST, TRAIN)))
    original = make_cells()
    for row in csv.DictReader(open(path.with_suffix(".csv"))):
        c, t = screen.context_names.index(row["context"]), screen.treatment_names.index(row["treatment"])
        here = (cells.obs[["context", "treatment"]] == [row["context"], row["treatment"]]).all(axis=1).to_numpy()
        assert screen.split[c, t] == names[row["split"]] and screen.count[c, t] == int(row["cells"]) == here.sum()
        rows = slice(screen.start[c, t], screen.start[c, t] + screen.count[c, t])
        assert np.array_equal(screen.cells[rows], cells.X[here].toarray())
        assert (cells.obsm["treatment"][here] == screen.treatments[c, t]).all()
        assert screen.treatments[c, t].sum() == (t > 0)
        assert t == 0 or screen.genes[screen.treatments[c, t].argmax()] == row["treatment"]
    assert np.array_equal(cells.layers["counts"].toarray(), original[cells.obs_names, cells.var_names].X.toarray())


def test_absent_conditions():
    """A condition that was not measured in a context is ABSENT there, without cells."""
    cells = make_cells()
    cells = cells[~((cells.obs["context"] == "B") & (cells.obs["perturbation"] == "t2")).to_numpy()].copy()
    screen = data.to_screen(processed(cells))
    assert screen.split[1, 3] == ABSENT and screen.count[1, 3] == 0
    assert (screen.count[screen.split != ABSENT] == CELLS).all()


def test_splits_are_reproducible_and_differ(tmp_path):
    """The same seed gives the same file contents; several splits of one command differ from each other."""
    save(tmp_path, make_cells())
    a, b = data.prepare(settings(tmp_path, splits=2))
    (again,) = data.prepare(settings(tmp_path, seed=1, out=tmp_path / "again"))
    first, second, repeated = map(data.load_screen, (a, b, again))
    assert np.array_equal(second.cells, repeated.cells) and np.array_equal(second.split, repeated.split)
    assert not np.array_equal(first.split, second.split)


def test_finished_splits_are_kept(tmp_path, capsys):
    """A finished split is not touched again, more can be added, and other settings are refused, not overwritten."""
    save(tmp_path, make_cells())
    (path,) = data.prepare(settings(tmp_path))
    before = path.stat().st_mtime_ns
    assert len(data.prepare(settings(tmp_path, splits=2))) == 2
    assert path.stat().st_mtime_ns == before and "finished, skipped" in capsys.readouterr().out
    with pytest.raises(BadInput, match="split-0.h5ad was made with other settings .genes 10, now 8"):
        data.prepare(settings(tmp_path, genes=8))
    save(tmp_path, make_cells(contexts=("A", "B", "C")))
    with pytest.raises(BadInput, match="source"):
        data.prepare(settings(tmp_path))
    path.write_bytes(b"not hdf5")
    with pytest.raises(BadInput, match="no split that data.py wrote"):
        data.prepare(settings(tmp_path))


def test_toy_needs_no_file(tmp_path):
    """The simulated screen goes through all the same steps and says that it is simulated."""
    (path,) = data.prepare(settings(tmp_path, h5ad=None, dataset="toy", genes=8, context=2))
    screen = data.load_screen(path)
    assert anndata.read_h5ad(path).uns["kind"] == "simulated, not cells"
    assert len(screen.genes) == 8 and len(screen.context_names) == 2
    assert data.evaluation_tasks(np.random.default_rng(0), screen, 32, 2).fresh.shape[1:] == (32, 8)


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
    cells = make_cells(contexts=("A",))
    labels = cells.obs.pop("perturbation").replace("control", "NT").to_numpy()
    whole = mudata.MuData({"rna": cells})
    whole.obs["gene_target"], whole.obs["perturbation"] = labels, "NT"
    whole.write(tmp_path / "papalexi_2021.h5mu")
    (path,) = data.prepare(settings(tmp_path, h5ad=None, dataset="leukemia", data_dir=tmp_path))
    assert data.load_screen(path).treatment_names == ("NT", *(f"t{t}" for t in range(6)))


# -------------------------------------------------------------------------------------------------------- bad input


def with_value(value):
    def change(cells):
        cells.X[7, 3] = value
    return change


def empty_condition(cells):
    cells.X[((cells.obs["context"] == "A") & (cells.obs["perturbation"] == "t1")).to_numpy()] = 0


def rename(cells):
    cells.var_names = ["t0", "t0", *cells.var_names[2:]]


def no_targets(cells):
    cells.var_names = [f"ENSG{i}" for i in range(GENES)]


def logarithm(cells):
    cells.X = np.log1p(cells.X)


def only_controls(cells):
    cells.obs["perturbation"] = "control"


def zero(cells):
    cells.X[:] = 0


def nothing(cells):
    pass


def guides(cells):
    cells.obs["perturbation"] = cells.obs["perturbation"].replace("control", "safe")


@pytest.mark.filterwarnings("ignore:Variable names")
@pytest.mark.parametrize("change, asked, expected", [
    (with_value(np.nan), {}, "gene t3 in cell cell.* is nan"),
    (with_value(np.inf), {}, "is inf"),
    (with_value(-1), {}, "is -1.0"),
    (logarithm, {}, "not integers.*--log-transformed"),
    (nothing, {"log_transformed": True}, "--log-transformed, but all values are integers"),
    (zero, {}, "no cell of 14 of the 14 conditions has any counts"),
    (empty_condition, {}, "no cell of 1 of the 14 conditions has any counts .A/t1"),
    (rename, {}, "1 gene names occur more than once .t0"),
    (no_targets, {}, "no usable treatment is left: 360 cells of 6 treatments that are no measured gene.*ENSG0"),
    (only_controls, {}, "no usable treatment is left: all cells are controls"),
    (guides, {}, "no control cells.*safe.*--control"),
    (nothing, {"min_cells": 31}, "no usable treatment is left: 420 cells of 14 conditions with fewer than 31 cells"),
    (nothing, {"genes": 15}, "--genes 15: the file has only 14 genes"),
    (nothing, {"context": 6}, "--context 6: context '.' has only . training experiments"),
    (nothing, {"treatment_col": "guide"}, "--treatment-col guide: no such column in obs; it has context, perturbation"),
    (nothing, {"context_col": "line"}, "--context-col line: no such column"),
    (nothing, {"holdout_context": "Z"}, "--holdout-context Z.*A, B"),
    (nothing, {"splits": 0}, "--splits 0: must be at least 1"),
    (nothing, {"dataset": "toy"}, "either --dataset .* or --h5ad")])
def test_bad_screens(change, asked, expected, tmp_path):
    """Each unusable file or option is refused with a message that says what and where, and nothing is written."""
    cells = make_cells(sparse=False)
    change(cells)
    save(tmp_path, cells)
    with pytest.raises(BadInput, match=expected):
        data.prepare(settings(tmp_path, **asked))
    assert not list((tmp_path / "out").rglob("*.*"))


def test_sparse_values_are_checked_too():
    """A NaN among the stored values of a sparse matrix is found, with its gene and cell."""
    cells = make_cells()
    cells.X[7, 3] = np.nan
    with pytest.raises(BadInput, match=f"gene t3 in cell {cells.obs_names[7]} is nan"):
        processed(cells)


def test_too_few_treatments_to_split():
    """One treatment in the held-out context cannot be both trained on and tested."""
    with pytest.raises(BadInput, match="'A' has 1 usable treatment"):
        data.split_conditions(np.random.default_rng(0), [("A", "t0"), ("B", "t0")], "A")


@pytest.mark.parametrize("contents", [b"", b"not hdf5 at all", None])
def test_damaged_files(contents, tmp_path):
    """An empty, foreign or truncated file is refused as such, by the script and by load_screen."""
    path = save(tmp_path, make_cells())
    path.write_bytes(path.read_bytes()[:4000] if contents is None else contents)
    for use in (lambda: data.prepare(settings(tmp_path)), lambda: data.load_screen(path)):
        with pytest.raises(BadInput, match="screen.h5ad: not a complete .h5ad file"):
            use()


def test_load_screen_wants_a_processed_file(tmp_path):
    """A raw screen, or no file, is refused by load_screen."""
    with pytest.raises(BadInput, match="not a split that data.py wrote"):
        data.load_screen(save(tmp_path, make_cells()))
    with pytest.raises(BadInput, match="nothing.h5ad: no such file"):
        data.load_screen(tmp_path / "nothing.h5ad")


def test_errors_end_in_one_line(tmp_path, monkeypatch):
    """On the command line a missing file and an unwritable folder exit with status 1 and one line, before any work."""
    save(tmp_path, make_cells())
    monkeypatch.setattr(data, "read", None)  # not reached
    for arguments, expected in ((["--h5ad", str(tmp_path / "none.h5ad")], "none.h5ad: no such file"),
                                (["--h5ad", str(tmp_path / "screen.h5ad"), "--out", str(tmp_path / "screen.h5ad")],
                                 "Not a directory")):
        monkeypatch.setattr(sys, "argv", ["data.py", "--scale", "smoke", *arguments])
        with pytest.raises(SystemExit) as stop:
            scales.run(data.main)
        assert expected in stop.value.code and stop.value.code.startswith("error: ") and "\n" not in stop.value.code
