"""Claims about predict.py: what a person with a file gets, and what is refused."""

import dataclasses
import json
import sys

import anndata
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import model
import predict
import sample
import scales
from model import Architecture
from scales import BadInput
from tasks import Given
from tests.test_data import NAMES, make_cells

SMALL = Architecture(network="exchangeable.Exchangeable", width=8, depth=1, heads=1, remat=False)


@pytest.fixture
def checkpoint(tmp_path):
    """An untrained network, that moves cells a little."""
    network = model.build(SMALL, 6, key=jr.key(0))
    head = dataclasses.asdict(SMALL) | {"genes": 6, "context": 2, "no_knock_out": 0.1}
    path = tmp_path / "box.eqx"
    # What starts from zero, and so moves nothing, is filled with numbers.
    parameters, _ = eqx.partition(network, eqx.is_inexact_array)
    parameters = jax.tree.map(lambda x: jnp.where(x == 0, 0.1, x), parameters)
    model.write_leaves(path, head, parameters)
    return path


@pytest.fixture
def run(tmp_path, checkpoint, monkeypatch, capsys):
    """predict.py on the file of `make_cells`; returns what it printed."""
    cells = make_cells(systems=("A",))
    cells.obs["perturbation"] = cells.obs["perturbation"].replace({"t5": "GFP"})
    cells.obs["batch"] = np.arange(cells.n_obs) % 3
    cells.write_h5ad(tmp_path / "screen.h5ad")

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["predict.py", str(tmp_path / "screen.h5ad"), "--checkpoint", str(checkpoint),
                                          "--min-cells", "20", "--cells", "20", "--draws", "2", "--out",
                                          str(tmp_path / "out.h5ad"), *words])
        predict.main()
        return capsys.readouterr().out

    return call


def test_validate_stops(run, tmp_path):
    printed = run("--validate")
    assert "6 knock-outs, 5 of them of the 14 genes" in printed and not (tmp_path / "out.h5ad").exists()


def test_a_prediction(run, tmp_path):
    """Real control cells, predicted ones on the same scale, genes in the order of the file, a ranked table, a picture,
    provenance; the same seed gives the same cells; what is there is not overwritten."""
    run("--query", "M2", "t5")
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert list(found.var_names) == NAMES and (found.X >= 0).all()
    before, after = found[~found.obs["predicted"]], found[found.obs["predicted"]]
    assert after.obs["perturbation"].value_counts().to_dict() == {"m2": 40, "t5": 40}
    assert set(before.obs["perturbation"]) == {"control"} and before.obs_names.is_unique and before.n_obs >= 20
    original = anndata.read_h5ad(tmp_path / "screen.h5ad")
    assert list(found.obs.columns) == [*original.obs.columns, "predicted", "control_cell"]
    assert set(before.obs_names) == set(after.obs["control_cell"])
    here, there = after.obs["batch"], original.obs["batch"][after.obs["control_cell"]]
    np.testing.assert_array_equal(here.to_numpy(), there.to_numpy())
    made = found.uns["prediction"]
    assert made["weights"] == scales.checksum(tmp_path / "box.eqx")
    assert made["file"] == scales.checksum(tmp_path / "screen.h5ad") and made["control"] == "control"
    told = json.loads(made["experiments"])
    assert list(told) == ["m2", "t5"] and [len(names) for names in told["t5"]] == [2, 2]
    assert set(sum(told["t5"], [])) <= {"t0", "t1", "t2", "t3", "t4", "GFP"}
    table = pd.read_csv(tmp_path / "out-genes.csv")
    assert len(table) == 2 * len(NAMES) and table["share_of_draws_called"].between(0, 1).all()
    for _, part in table.groupby("query"):
        order = list(zip(-part["share_of_draws_called"], -part["log2_fold_change"].abs()))
        assert order == sorted(order)
    assert (tmp_path / "out-cells.png").stat().st_size > 1000
    with pytest.raises(BadInput, match="is there already"):
        run("--query", "m2")
    (tmp_path / "out.h5ad").rename(tmp_path / "first.h5ad")
    with pytest.raises(BadInput, match="out-genes.csv: is there already"):
        run("--query", "m2")
    (tmp_path / "out-genes.csv").unlink()
    (tmp_path / "out-cells.png").unlink()
    run("--query", "M2", "t5")
    np.testing.assert_array_equal(anndata.read_h5ad(tmp_path / "out.h5ad").X, found.X)


def test_a_prediction_is_no_measurement(run, tmp_path):
    """A file that has the columns that predict.py adds, such as one that it made, is refused before the work."""
    cells = anndata.read_h5ad(tmp_path / "screen.h5ad")
    cells.obs["control_cell"] = ""
    cells.write_h5ad(tmp_path / "screen.h5ad")
    with pytest.raises(BadInput, match="screen.h5ad: its obs has a column 'control_cell'.*Rename it"):
        run("--validate")


def test_more_than_memory_allows(run, monkeypatch):
    """How much memory it takes is said before the work, and refused if there is not as much."""
    assert "about 1.0 GB of memory" in run("--validate")
    monkeypatch.setattr(predict.os, "sysconf", lambda name: 2**10)
    with pytest.raises(BadInput, match="14 genes of [0-9]+ cells.* want 1 GB.*ask for fewer"):
        run("--validate", "--genes", "100")


@pytest.mark.filterwarnings("ignore")
def test_scanpy_and_pertpy_take_it_unchanged(run, tmp_path):
    """What people do next: principal components, genes that differ, distances between knock-outs."""
    import scanpy

    run("--query", "m2")
    pertpy = pytest.importorskip("pertpy")  # it turns on numbers of 64 bits for the whole process

    jax.config.update("jax_enable_x64", False)
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    scanpy.pp.pca(found, n_comps=3)
    scanpy.tl.rank_genes_groups(found, "perturbation", reference="control", method="wilcoxon")
    assert set(scanpy.get.rank_genes_groups_df(found, "m2")["names"]) == set(NAMES)
    distances = pertpy.tl.Distance("edistance", obsm_key="X_pca").pairwise(found, groupby="perturbation")
    assert np.isfinite(distances.to_numpy()).all() and distances.loc["m2", "control"] > 0


def test_what_is_not_measured_cannot_be_asked_for(run):
    with pytest.raises(BadInput, match="GFP: not among the 14 measured genes.*cannot be asked for"):
        run("--query", "GFP")


def test_evaluation_compares_with_simple_rules(run):
    """An untrained network is told off in words."""
    printed = run("--evaluate")
    assert "5 knock-outs, each predicted from the others" in printed
    assert all(row in printed for row in ("prediction", *predict.SIMPLE)) and "do not believe" in printed
    assert "the rule 'target-only' is better on your data" in printed and "cannot be told apart from" in printed


def test_no_cell_is_taken_for_two(run, tmp_path):
    """Where knock-outs do nothing, small populations have no differentially expressed genes: no cell is drawn twice
    into a test, however many are asked for."""
    cells = anndata.read_h5ad(tmp_path / "screen.h5ad")
    cells.X = np.random.default_rng(0).negative_binomial(3, 0.3, cells.shape).astype(np.float32)
    cells.write_h5ad(tmp_path / "screen.h5ad")
    printed = run("--evaluate", "--cells", "200")
    assert "30 cells, as many as the smallest has (--min-cells 20)" in printed and "AUPRC" not in printed
    printed = run("--query", "t1", "T1", "--cells", "200", "--draws", "1")
    assert "1 knock-outs x 1 draws of 30 cells" in printed  # asked for twice, and once is enough


def test_names_of_the_file(run, tmp_path):
    """A gene can be asked for by its name in the file too; other columns that name a knock-out name that of predicted
    cells, so that no predicted cell is among the controls."""
    cells = anndata.read_h5ad(tmp_path / "screen.h5ad")
    cells.var["symbol"] = NAMES
    cells.var_names = [f"ENSG{i}" for i in range(cells.n_vars)]
    cells.obs["guide"] = [f"{label}_1" for label in cells.obs["perturbation"]]
    cells.obs.index.name = "barcode"
    cells.write_h5ad(tmp_path / "screen.h5ad")
    run("--query", "ENSG1")
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    predicted = found.obs[found.obs["predicted"]]
    assert set(predicted["perturbation"]) == set(predicted["guide"]) == {NAMES[1]} and found.obs.index.name == "barcode"


@pytest.mark.parametrize("name", [".", "out", "out.csv", "~/out.h5ad"])
def test_places_that_cannot_be_meant(run, name):
    with pytest.raises(BadInput, match="expected a name that ends in .h5ad|write the path in full"):
        run("--query", "t1", "--out", name)


def test_passes_cover_all_genes_in_equal_sizes():
    for genes, always, room in ((14, [3, 5], 6), (7, [0], 20), (6, [1, 2, 3, 4], 4), (3, [0, 1, 2], 5)):
        found = list(predict.passes(genes, np.array(always), room))
        assert set(np.concatenate(found)) == set(range(genes)) and len({len(each) for each in found}) == 1
        assert all(set(always) <= set(each) and len(set(each)) == len(each) for each in found)


def test_on_arrays(checkpoint):
    """The same from a notebook; an experiment on the query itself is not looked at."""
    rng = np.random.default_rng(0)
    control, experiments = rng.random((50, 4)), {"a": rng.random((30, 4)), "unmeasured": rng.random((9, 4))}
    before, after = predict.predict(control, experiments, "b", list("abcd"), checkpoint, cells=15)
    assert before.shape == after.shape == (15, 4) and (after >= 0).all()
    again = predict.predict(control, experiments | {"b": rng.random((9, 4))}, "b", list("abcd"), checkpoint, cells=15)
    np.testing.assert_array_equal(after, again[1])
    with jax.enable_x64(True):
        wide = predict.predict(control, experiments, "b", list("abcd"), checkpoint, cells=15)
    np.testing.assert_array_equal(after, wide[1])
    numbered = predict.predict(control, {0: experiments["a"], "unmeasured": experiments["unmeasured"]}, 1,
                               checkpoint=predict.load_checkpoint(checkpoint), cells=15)
    np.testing.assert_array_equal(after, numbered[1])
    with pytest.raises(BadInput, match="e: not among"):
        predict.predict(control, experiments, "e", list("abcd"), checkpoint)
    with pytest.raises(BadInput, match="no knock-out besides"):
        predict.predict(control, {"b": control}, "b", list("abcd"), checkpoint)
    table = pd.DataFrame(control, columns=list("abcd"))
    again = predict.predict(table, {"a": scipy.sparse.csr_matrix(experiments["a"]), "unmeasured":
                                    experiments["unmeasured"]}, "b", checkpoint=checkpoint, cells=15)
    np.testing.assert_array_equal(after, again[1])
    for bad, why in (({"a": control[:, :3]}, "a: shape .50, 3., expected cells x 4 genes"),
                     ({"a": control[:0]}, "a: shape .0, 4., expected"),
                     ({"a": control - 1}, "a: expected natural log1p"), ({"a": np.round(9 * control)}, "not all whole"),
                     ({"a": 100 * control}, "at most 20"), ({"a": "cells"}, "expected numbers"),
                     ({"a": pd.DataFrame(control, columns=list("abce"))}, "a: has no column d"),
                     ({"a_1": control, "A": control}, "several are knock-outs of a"), ([control], "expected a dictionary"),
                     ({"b_2": control}, "no knock-out besides b")):
        with pytest.raises(BadInput, match=why):
            predict.predict(control, bad, "b", list("abcd"), checkpoint)
    for numbers in ({"cells": 0}, {"cells": 1.5}, {"cells": 10**9}, {"seed": -1}, {"seed": None}):
        with pytest.raises(BadInput, match=f"{[*numbers][0]} .*expected"):
            predict.predict(control, experiments, "b", list("abcd"), checkpoint, **numbers)
    with pytest.raises(BadInput, match="some names are there twice"):
        predict.predict(control, experiments, "b", list("abca"), checkpoint)


def test_tables_are_read_by_the_names_of_their_columns(checkpoint):
    """In whatever order these are; guides and another case are the gene; an AnnData will do."""
    rng = np.random.default_rng(0)
    control, knocked_out = (pd.DataFrame(rng.random((30, 4)), columns=list("abcd")) for _ in range(2))
    expected = predict.predict(control, {"a": knocked_out}, "b", checkpoint=str(checkpoint), cells=15)[1]
    turned = {"A_1": knocked_out[list("dcba")]}
    np.testing.assert_array_equal(predict.predict(control, turned, "B", checkpoint=checkpoint, cells=15)[1], expected)
    as_anndata = {"a": anndata.AnnData(knocked_out)}
    found = predict.predict(anndata.AnnData(control), as_anndata, "b", checkpoint=checkpoint, cells=15)[1]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_checkpoint_in_the_box():
    """It is small, of any number of genes, knows what no knock-out is, and lowers the gene that is knocked out where the
    experiments show that knock-outs do so."""
    checkpoint = predict.load_checkpoint(predict.BOX)
    assert predict.BOX.stat().st_size < 6e6 and checkpoint.counterfactual and model.takes_any_genes(checkpoint.network)
    rng, genes = np.random.default_rng(0), list("abcdefgh")
    control = np.log1p(rng.poisson(3.0, (60, 8))).astype(np.float32)
    experiments = {}
    for i, gene in enumerate(genes[:4]):
        experiments[gene] = control * (np.arange(8) != i)
    before, after = predict.predict(control, experiments, "f", genes, cells=40)
    moved = after.mean(axis=0) - before.mean(axis=0)
    assert np.isfinite(after).all() and moved.argmin() == 5 and moved[5] < -0.2


def test_no_knock_out_changes_nothing():
    """A null query returns each cell: to 1e-3 in 25 steps, and to a few hundredths in the ten that predict.py takes."""
    rng, network = np.random.default_rng(0), predict.load_checkpoint(predict.BOX).network
    control = np.log1p(rng.poisson(3.0, (1, 60, 8))).astype(np.float32)
    hit = np.eye(8, dtype=np.float32)[None, :4]
    given = Given(control, control[:, None] * (1 - hit[:, :, None]), hit, np.zeros((1, 8), np.float32))
    for steps, error in ((25, 1e-3), (predict.STEPS, 0.03)):
        back = sample.generate(network, given, 1.0, steps, source=control, key=jr.key(0))
        assert 0 < np.sqrt(np.mean((back - control) ** 2)) < error


def test_a_network_of_the_papers_form(tmp_path, run):
    """It takes as many genes at a time as it has, until all have had their turn, and gives new cells, which were no
    control cell; with fewer genes it cannot be used."""
    head = dataclasses.asdict(Architecture(width=8, depth=1, heads=1, registers=1)) | {"genes": 6, "context": 2}
    network = model.build(Architecture(width=8, depth=1, heads=1, registers=1), 6, key=jr.key(0))
    model.write_leaves(tmp_path / "paper.eqx", head, eqx.filter(network, eqx.is_inexact_array))
    run("--query", "t5", "--checkpoint", str(tmp_path / "paper.eqx"))
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert found.n_vars == 14 and (found.obs["control_cell"] == "").all() and (found.X >= 0).all()
    cells = np.random.default_rng(0).random((20, 4)).astype(np.float32)
    with pytest.raises(BadInput, match="a network of 6 genes, neither more nor fewer: there are 4"):
        predict.predict(cells, {"b": cells, "c": cells}, "a", list("abcd"), tmp_path / "paper.eqx")
