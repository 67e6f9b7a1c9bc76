"""Claims about labels.py: labels as people have them are read as they are meant, and no others."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import labels
from scales import BadInput

GENES = {"STAT1", "STAT2", "NKX2-1", "WT1", "TP53", "HLA-A", "Jak2", "NT5E", "IL6"}


@pytest.mark.parametrize("label", [
    "control", "CTRL", "NT", "nt", "NTC", "non-targeting", "Non_Targeting", "nontargeting", "safe-targeting", "NT1",
    "NT-2", "NTg1", "NT_sg3", "negCtrl", "neg_ctrl_4", "negative control", "WT", "wild type", "unperturbed", "scramble",
    "AAVS1", "non-targeting control", "control_12", "sgNT-1", "sgNTC_2", "Non-Targeting_Human_0001",
    "no-target", "NonTarget_1", "scr", "siCtrl", "lacZ", "Rosa26", "parental"])
def test_controls(label):
    assert labels.is_control(label)


@pytest.mark.parametrize("label", ["STAT1", "NT5E", "CTRL1A", "WTAP", "NTRK1", "CONTROLLER", "", "1", "safe house 3b"])
def test_no_controls(label):
    assert not labels.is_control(label)


@pytest.mark.parametrize("label, gene", [
    ("STAT1", "STAT1"), ("stat1", "STAT1"), (" STAT1 ", "STAT1"), ("STAT1g2", "STAT1"), ("STAT1_1", "STAT1"),
    ("STAT1-sg3", "STAT1"), ("STAT1.2", "STAT1"), ("STAT1_guide_2", "STAT1"), ("sgSTAT1", "STAT1"),
    ("sgSTAT1-3", "STAT1"), ("STAT1+ctrl", "STAT1"), ("ctrl+STAT1", "STAT1"), ("STAT1_ctrl", "STAT1"),
    ("NKX2-1", "NKX2-1"), ("NKX2-1_2", "NKX2-1"), ("WT1", "WT1"), ("JAK2", "Jak2"), ("HLA-A", "HLA-A"),
    ("STAT1-KO", "STAT1"), ("STAT1 KO", "STAT1"), ("STAT1_ACGTACGTAC", "STAT1"), ("STAT1_P1P2_ENSG001", "STAT1"),
    ("STAT1_+_5021_ACGTACGT", "STAT1"), ("sgRNA_STAT1_2", "STAT1"), ("WT1_1", "WT1"), ("TP53g1", "TP53"),
    ("STAT1_1|STAT1_2", "STAT1"), ("STAT1;STAT1", "STAT1"), ("STAT1|NT", "STAT1"), ("STAT1_NT", "STAT1"),
    ("STAT1_non-targeting", "STAT1"), ("shSTAT1", "STAT1"), ("STAT1gRNA1", "STAT1"), ("STAT1_WT", None),
    ("STAT1--STAT2", None), ("IL6G1", None), ("Il6-OE", None),
    ("STAT12", None), ("STAT1_STAT2", None), ("STAT1+STAT2", None), ("STAT3", None), ("TP", None), ("IL-6", None),
    ("STAT1_1_STAT2_1", None)])
def test_genes(label, gene):
    """A guide's number is dropped only behind a separator or a g, so STAT12 is no STAT1; a pair of genes is no gene."""
    assert labels.gene_of(label, GENES, labels.by_upper_case(GENES)) == gene


@pytest.mark.parametrize("label, nothing", [
    ("unassigned", True), ("Multiplet", True), ("doublets", True), ("unknown", True), ("nan", True),
    ("STAT1+STAT2", True), ("STAT1--STAT2", True), ("STAT1_WT", True), ("STAT1_1_STAT2_1", True), ("STAT1_GFP", True), ("GFP", False), ("STAT3", False),
    ("NONO", False)])
def test_labels_that_say_nothing(label, nothing):
    """Nobody knows what was done to these cells; or it was a measured gene and something besides. Another gene, or a
    marker, is an experiment."""
    assert labels.says_nothing(label, labels.by_upper_case(GENES)) == nothing
    assert (labels.read_labels([label], GENES, "NT", [])[label] == "") == nothing


def test_genes_that_differ_in_case_only_are_told_apart():
    genes = {"Abc", "ABC"}
    upper = labels.by_upper_case(genes)
    assert labels.gene_of("Abc", genes, upper) == "Abc" and labels.gene_of("abc", genes, upper) is None


def test_read_labels():
    """Numbered controls are one control; what is no gene stays as it is."""
    given = ["NT1", "NT2", "STAT1g1", "STAT1g2", "GFP ", "WT1"]
    controls = labels.controls_among(given, GENES, None)
    assert controls == ["NT1", "NT2"] and labels.controls_among(given, GENES, "GFP") == ["GFP "]
    assert len({labels.stem(label) for label in controls}) == 1 and labels.stem("WT") != labels.stem("NT-1")
    assert labels.controls_among(["mock1", "mock2", "ctrl", "STAT1", "STAT2"], GENES, "mock2") == ["mock1", "mock2"]
    assert labels.controls_among(given, GENES, "NT") == ["NT1", "NT2"]
    assert labels.controls_among(given, GENES, "nt2") == ["NT2"]
    assert labels.read_labels(["NT1", "safe-targeting"], GENES, "NT1", ["NT1"]) == {"NT1": "NT1", "safe-targeting": ""}
    assert labels.controls_among(["STAT1", "STAT2"], GENES, "STAT1") == ["STAT1"]
    assert not labels.controls_among(["mock1"], GENES, "mock2") and not labels.controls_among(["WT1_1"], GENES, None)
    assert labels.controls_among(["ctrl_1"], GENES | {"CTRL"}, None) == ["ctrl_1"]
    with pytest.raises(BadInput, match="label 'abc ': ABC or Abc"):
        labels.read_labels(["Abc", "abc "], {"Abc", "ABC"}, "NT", [])
    read = labels.read_labels(given, GENES, "NT1", controls)
    assert list(read.values()) == ["NT1", "NT1", "STAT1", "STAT1", "GFP", "WT1"]


def test_symbols_in_any_column():
    cells = anndata.AnnData(np.ones((2, 3), np.float32), var=pd.DataFrame(
        {"n": [1, 2, 3], "Symbol": ["STAT1", "STAT2", "IL6"], "x": ["a", "b", "c"]}, ["ENSG1", "ENSG2", "ENSG3"]))
    assert labels.gene_names(cells, ["stat1", "IL6_2"]) == ("var['Symbol']", ["STAT1", "STAT2", "IL6"])
    assert labels.gene_names(cells, ["ENSG1", "IL7"])[0] == "var_names"
    cells.var["Symbol"] = ["STAT1", "ACTB", "ACTB"]  # 10x has some twice, and lacks others
    assert labels.gene_names(cells, ["STAT1"])[1] == ["STAT1", "ENSG2", "ENSG3"]
    cells.var["Symbol"] = ["STAT1", None, ""]
    assert labels.gene_names(cells, ["STAT1"])[1] == ["STAT1", "ENSG2", "ENSG3"]


COUNTS = np.random.default_rng(0).poisson(2.0, (40, 6)).astype(np.float32)


@pytest.mark.parametrize("sparse", [False, True])
def test_where_counts_are(sparse):
    """X if it holds counts; else a layer, else .raw; corrected counts if there are no others; else an error that says
    what was seen."""
    make = scipy.sparse.csr_matrix if sparse else np.array
    scaled = (COUNTS - COUNTS.mean(0)) / COUNTS.std(0)
    corrected = np.where(COUNTS > 0, COUNTS - 0.03, 0)
    corrected[0, 0] = 39.97

    def found(x, layers=None, raw=None, layer=None):
        cells = anndata.AnnData(None if x is None else make(x), layers={k: make(v) for k, v in (layers or {}).items()},
                                shape=COUNTS.shape if x is None else None)
        if raw is not None:
            cells.raw = anndata.AnnData(make(raw))
        where, counts = labels.find_counts(cells, layer)
        return where, np.asarray(counts.X.todense() if sparse else counts.X)

    for x, layers, raw, where, expected in (
            (COUNTS, {"counts": COUNTS + 1}, None, "counts (in X)", COUNTS),
            (scaled, {"z": np.log1p(COUNTS), "counts": COUNTS}, None, "counts (in layer 'counts')", COUNTS),
            (np.log1p(COUNTS / 3), None, COUNTS, "counts (in .raw)", COUNTS),
            (corrected, None, None, "corrected counts (in X)", corrected),
            (corrected, {"counts": COUNTS}, None, "counts (in layer 'counts')", COUNTS),
            (scaled, {"ambiguous": COUNTS + 1, "matrix": COUNTS}, None, "counts (in layer 'matrix')", COUNTS),
            (scaled, {"mine": COUNTS}, None, "counts (in layer 'mine')", COUNTS),
            (None, {"counts": COUNTS}, None, "counts (in layer 'counts')", COUNTS)):
        place, counts = found(x, layers, raw)
        assert place == where
        np.testing.assert_allclose(counts, expected, rtol=1e-6)
    with pytest.raises(BadInput, match="counts in layer 'one', layer 'two', and no name says which are meant: choose with --layer"):
        found(scaled, {"two": COUNTS, "one": COUNTS})
    place, counts = found(scaled, {"two": COUNTS + 1, "one": COUNTS}, layer="two")
    assert place == "counts (in layer 'two')" and (counts == COUNTS + 1).all()
    with pytest.raises(BadInput, match="--layer three: there is none of that name; layers: two"):
        found(COUNTS, {"two": COUNTS}, layer="three")
    with pytest.raises(BadInput, match="X: fractions"):  # logarithms that happen to be nearly whole are no counts
        found(np.where(COUNTS > 0, 1.01, 0))
    with pytest.raises(BadInput, match="X: fractions.*layer 'z': negative.*--log-transformed"):
        found(np.log1p(COUNTS / 3), {"z": scaled})
