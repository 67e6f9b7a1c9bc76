"""Stage 2 of 8: turn a single-cell perturbation screen into conditions to train on and conditions to predict.

Paper: sections 5.1, B.3 (equation 5) and B.4 (Figure 4). Reads an `.h5ad` of raw counts, or downloads one of the
paper's two data sets; writes a screen (tasks.py) `out/<scale>/screens/<name>/split-<s>` for each split s, and beside it
`conditions-<s>.csv`, its conditions for the human eye.

    python data.py --scale smoke --dataset toy        # a small simulated screen, no file needed: 2 s
    python data.py --scale laptop --h5ad FILE         # your own screen: 10 splits of 14,000 x 300 counts in 5 s
    python data.py --scale paper --dataset melanoma   # Frangieh et al. 2021, downloaded
    python data.py --scale paper --dataset leukemia   # Papalexi et al. 2021, downloaded, or read with --h5ad FILE

Departures from the paper, marked where they happen: D22, D23, D25, D26, D57.

    paper          name here    shape    meaning
    psi            system                a cell line in a culture condition (the paper's "biological context")
    t              treatment             knock-out of one measured gene; its one-hot is over the genes
    (psi_i, t_j)   condition             all cells of one system under one treatment: the unit that is split
    x              cells.X      n G      counts; G: all genes of the file, of which D are kept
    m              median                median total count of a cell (equation 5)

    S systems   T treatments, control first   D genes
"""

import dataclasses
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool

import labels
import scales
import tasks
from scales import BadInput
from tasks import ABSENT, KNOWN, KNOWN_ONLY, TEST, TRAIN, VALIDATION

# anndata, scanpy and pertpy take 2, 5 and 20 seconds to import, so each is imported by the functions that need it.

PAPER = {"melanoma": "Melanoma (Frangieh et al., 2021)", "leukemia": "Leukemia (Papalexi et al., 2021)"}
TITLES = PAPER | {"toy": "Toy screen: simulated GRNs, not cells"}
WORDS = {TRAIN: "train", VALIDATION: "validation", TEST: "test", KNOWN_ONLY: "context only"}


@dataclass(frozen=True)
class Settings:
    """Split a perturbation screen into training, validation and test conditions."""
    scale: str = "laptop"  # column of the table in scales.py: smoke, laptop or paper
    dataset: Literal["toy", "melanoma", "leukemia"] | None = None  # simulated, or one of the paper's (B.3)
    h5ad: Path | None = None  # your own screen, .h5ad (or .h5mu with an 'rna' part); with --dataset: its file
    name: str | None = None  # folder below out/<scale>/screens; that of the data set, or of the file
    treatment_col: str | None = None  # column of obs that names the knocked-out gene; found by its usual names
    control: str | None = None  # its label for unperturbed cells; found by its usual names
    system_col: str | None = None  # column of obs with the biological context, or 'none'; found by its usual names
    holdout_system: str | None = None  # the one with the test treatments; by default that with most treatments
    layer: str | None = None  # of raw counts; by default X, a layer with a usual name, or .raw
    log_transformed: bool = False  # the values are normalised and natural log1p already: skip both
    genes: int = 50  # genes D that are kept (B.3)
    unmeasured: bool = False  # keep knock-outs of other genes too, as experiments of the context [D57]
    min_cells: int = 200  # fewest cells of a usable condition (released code)
    toy_treatments: int = 0  # of each system of the toy; 0: seven for every eight genes
    splits: int = 1  # number of random splits (B.4)
    seed: int = 0  # seed of the first split; the next ones count up
    data_dir: Path | None = None  # where downloads are kept; by default "downloads" below out
    out: Path = Path("out")  # everything is written below out/<scale>


# ----------------------------------------------------------------------------------------------- reading a screen (B.3)

ADDRESS = "https://scverse-exampledata.s3.eu-west-1.amazonaws.com/pertpy/"  # where pertpy downloads from
DOWNLOADS = {  # file, and --treatment-col, --control and --system-col for it
    "melanoma": ("frangieh_2021_rna.h5ad", "perturbation", "control", "perturbation_2"),  # scPerturb's (released code)
    "leukemia": ("papalexi_2021.h5mu", "gene_target", "NT", "none"),
}
TREATMENT_COLUMNS = ("perturbation", "gene_target", "target_gene", "condition", "gene", "target", "knockout", "guide",
                     "guide_identity", "sgrna")  # in whatever case
SYSTEM_COLUMNS = ("context", "cell_line", "cell_type", "perturbation_2")


MOST_COUNTS, MOST_LOG = 1e7, 20.0  # of one gene in a cell: no cell has as many molecules


def listed(names, most: int = 12) -> str:
    """'a, b, c', or 'a, b, c and 245 more'."""
    names = list(map(str, names))
    more = f" and {len(names) - most} more" * (len(names) > most)
    return ", ".join(names[:most]) + more


def download(name: str, folder: Path) -> Path:
    """File of one of the paper's data sets, fetched through pertpy unless it is in `folder` already."""
    path = folder / DOWNLOADS[name][0]
    if path.exists():
        return path
    print(f"downloading {ADDRESS}{path.name} to {folder}", flush=True)
    try:
        import pertpy
        import scanpy
        scanpy.settings.datasetdir = folder  # where pertpy keeps its files
        getattr(pertpy.data, path.stem)()
    except (ImportError, OSError) as error:  # the ConnectionError of requests is an OSError
        raise BadInput(f"pertpy could not download the {name} data ({type(error).__name__}: {str(error)[:100]}); fetch "
                       f"{ADDRESS}{path.name} by hand, and save it as {path} or name it with --h5ad") from None
    return path


def by_rows(values):
    """A matrix in float32, CSR if it is sparse."""
    import scipy.sparse
    if scipy.sparse.issparse(values):
        return scipy.sparse.csr_matrix(values, dtype=np.float32)
    return np.asarray(values, np.float32)


def read(path: Path):
    """The AnnData in a file. Raises BadInput if it cannot be read."""
    import anndata
    try:
        if path.suffix == ".h5mu":
            import mudata
            whole = mudata.read_h5mu(path)
            cells = whole.mod["rna"].copy()
            cells.obs = cells.obs.join(whole.obs.drop(columns=cells.obs.columns, errors="ignore"))
        else:
            cells = anndata.read_h5ad(path)
        if cells.X is not None:  # counts may be in a layer, and nowhere else
            cells.X = by_rows(cells.X)
    except Exception as error:  # h5py and anndata fail on damaged files with every kind of exception
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise BadInput(f"{path}: not a complete .h5ad file ({why}); if downloaded, fetch it again") from None
    return cells


def simulate_toy(settings: Settings):
    """Two GRNs of `prior.py` as two systems, with some more genes, and fewer treatments, than are kept."""
    import anndata
    import pandas as pd
    import prior
    genes, population = settings.genes + settings.genes // 4, max(100, 2 * settings.min_cells)
    print(f"simulating {2 * (1 + genes)} conditions of {population} cells: simulated, not cells", flush=True)
    names = ["control", *(f"gene{g:02}" for g in range(genes))]
    networks = prior.Settings("grn", genes=genes)  # one toy for all seeds
    counts, obs = [], []
    for index, system in enumerate(("network A", "network B")):
        _, simulated = prior.simulate_grn(networks, index, population)
        for t in range(1 + (settings.toy_treatments or settings.genes * 7 // 8)):
            counts.append(simulated[t])
            obs += [(system, names[t])] * len(simulated[t])
    obs = pd.DataFrame(obs, map(str, range(len(obs))), ["cell_line", "perturbation"])
    return anndata.AnnData(by_rows(np.concatenate(counts)), obs, pd.DataFrame(index=names[1:]))


def meanings_of(cells, column: str, controls: list[str]) -> list[str]:
    """Of each cell the measured gene that its label in a column means, "control", or "another"."""
    told = cells.obs[column].astype(str)
    words = sorted(set(told))
    genes = labels.gene_names(cells, words)[1]
    meant = labels.read_labels(words, genes, "control", controls)
    known = {word: meaning for word, meaning in meant.items() if word in controls or meaning in genes}
    return told.map(known).fillna("another").tolist()


def find_treatment(cells, settings: Settings) -> tuple[str, list[str]]:
    """Column of obs with the knocked-out genes, and its control labels, which differ in numbers only (NT1, NT2). If
    several columns have some, those with other labels that are genes; of several that say the same of every cell, the
    first. Raises BadInput unless just one reading is left, and no column without control labels names more genes."""
    names, obs = TREATMENT_COLUMNS, cells.obs
    columns = [c for name in names for c in obs if c.lower() == name]
    if settings.treatment_col is not None:
        names = [settings.treatment_col]
        columns = [c for c in names if c in obs]
    if not columns:
        raise BadInput(f"--treatment-col: no column {' or '.join(names)} in obs; it has {listed(obs.columns)}")
    found, seen, most = [], [], (0, "")
    for c in columns:
        words = sorted(set(obs[c].dropna().astype(str)))
        genes = set(labels.gene_names(cells, words)[1])
        upper = labels.by_upper_case(genes)
        controls = labels.controls_among(words, genes, settings.control)
        known = sum(labels.gene_of(word, genes, upper) is not None for word in set(words) - set(controls))
        most = max(most, (known, c))
        seen += words
        for kind in sorted({labels.stem(word) for word in controls}):
            found.append((known, c, [word for word in controls if labels.stem(word) == kind]))
    if any(known for known, _, _ in found):
        found = [reading for reading in found if reading[0]]
    if len(found) > 1 and found[0][0]:
        meanings = [meanings_of(cells, c, controls) for _, c, controls in found]
        if all(meaning == meanings[0] for meaning in meanings):
            found = found[:1]
    if len(found) == 1 and found[0][0] < most[0]:
        words = listed(sorted(set(obs[most[1]].dropna().astype(str))))
        raise BadInput(f"column '{most[1]}' names {most[0]} measured genes, and none of its labels is a control that "
                       f"is known: {words}; column '{found[0][1]}' names {found[0][0]}, and has "
                       f"{' = '.join(found[0][2])}. Choose with --treatment-col and --control")
    if len(found) != 1:
        if not found:
            raise BadInput(f"none of the labels of {' and '.join(columns)} is a control that is known: {listed(seen)}; "
                           "name it with --control, and another column with --treatment-col")
        readings = [f"'{c}': {' = '.join(controls)}" for _, c, controls in found]
        raise BadInput(f"{len(found)} kinds of control labels ({listed(readings)}) among the labels of "
                       f"{' and '.join(columns)}: {listed(seen)}; choose one with --treatment-col and --control")
    return found[0][1:]


def find_system(obs, settings: Settings) -> str:
    """Column of obs with the systems, or 'none' if there is one system. Raises BadInput if several could be meant."""
    if settings.system_col is None:
        found = [c for c in SYSTEM_COLUMNS if c in obs and obs[c].nunique() > 1]
        if len(found) > 1:
            raise BadInput(f"unclear which column is the system, choose with --system-col (or none): {listed(found)}")
        return found[0] if found else "none"
    if settings.system_col not in ("none", *obs):
        raise BadInput(f"--system-col {settings.system_col}: no such column in obs; it has {listed(obs.columns)}")
    return settings.system_col


def label_cells(cells, settings: Settings):
    """The cells with counts in X, 'system' and 'treatment' ('' where unknown) in obs, and genes named by symbol; and
    the control label. What the file has of the cells stays in obsm['file'], its names of the genes in
    var['name_in_file'], and uns says where labels were. Raises BadInput for columns, labels, gene names and values that
    cannot be used."""
    import pandas as pd
    where = "X"
    if settings.log_transformed and settings.layer is not None:
        labels.check_layer(cells, settings.layer)
        cells.X = by_rows(cells.layers[settings.layer])
    if settings.log_transformed and cells.X is None:
        raise BadInput("--log-transformed: the file has no X; name a layer with --layer")
    if not settings.log_transformed:
        where, cells = labels.find_counts(cells, settings.layer)
    kinds = cells.var.get("feature_types")
    if kinds is not None and (kinds == "Gene Expression").any():  # Cell Ranger's files have guides and proteins too
        print(f"  dropped {(kinds != 'Gene Expression').sum()} features that are not 'Gene Expression'")
        cells = cells[:, (kinds == "Gene Expression").to_numpy()].copy()
    column, controls = find_treatment(cells, settings)
    system, control = find_system(cells.obs, settings), controls[0]
    words = cells.obs.astype(object).where(cells.obs.notna(), "").astype(str)
    unique = sorted(set(words[column]))
    place, names = labels.gene_names(cells, unique)  # Ensembl identifiers, perhaps, and symbols elsewhere
    read = labels.read_labels(unique, names, control, controls)
    original = cells.obs
    cells.obs = pd.DataFrame({"system": "all", "treatment": words[column].map(read)})
    if system != "none":
        cells.obs["system"] = words[system]
    cells.obsm, cells.uns = {"file": original}, {"treatment_col": column}
    cells.var["name_in_file"] = cells.var_names.to_numpy(str)
    cells.var_names = names
    twice = sorted(set(cells.var_names[cells.var_names.duplicated()]))
    if twice:
        raise BadInput(f"gene names that occur more than once: {listed(twice)}; sum or rename these genes first")
    kind = check_values(cells, settings.log_transformed)
    if not settings.log_transformed:
        kind = where
    print(f"{cells.n_obs:,} cells x {cells.n_vars:,} genes, {kind}")
    print(f"  treatment column '{column}', control '{control}', system column '{system}', genes by {place}")
    changed = [f"{word} = {meant or 'nothing'}" for word, meant in read.items() if word != meant]
    if changed:
        print(f"  {len(changed)} labels read as others: {listed(changed)}")
    return cells, control


def part(cells, chosen: Bool[np.ndarray, "n"]):
    """Some of the cells, apart from the others; all of them as they are, since large screens fit into memory once."""
    return cells if chosen.all() else cells[chosen].copy()


def check_values(cells, log_transformed: bool) -> str:
    """What kind of values X holds, in words. Raises BadInput for values that are negative, not finite or larger than
    any can be, or counts where logarithms are wanted."""
    integers, most = True, MOST_LOG if log_transformed else MOST_COUNTS
    for first in range(0, cells.n_obs, 1024):  # some rows at a time: large screens do not fit into memory several times
        block = cells.X[first : first + 1024]
        values = block if isinstance(block, np.ndarray) else block.data
        if not np.all((values >= 0) & (values <= most)):  # NaN fails both
            block = cells[first : first + 1024].to_df()
            row, gene = np.argwhere(~((block >= 0) & (block <= most)).to_numpy())[0]
            expected = "raw counts are"
            if log_transformed:
                expected = "--log-transformed says that values are natural log1p of normalised counts, which are"
            raise BadInput(f"gene {block.columns[gene]} in cell {block.index[row]} is {block.iat[row, gene]}, but "
                           f"{expected} finite, not negative, and at most {most:g}")
        integers = integers and not np.any(values % 1)
    if log_transformed and integers:
        raise BadInput("--log-transformed, but all values are integers, like raw counts: leave the option out")
    return "log-transformed already" if log_transformed else "raw counts"


def usable_cells(cells, control: str, settings: Settings):
    """The cells of conditions that can be used. Prints what is dropped, and what is left.
    Raises BadInput if a whole condition has no counts, or if no treatment is left, saying why."""
    obs = cells.obs.reset_index(drop=True)
    obs["condition"] = obs["system"] + "/" + obs["treatment"]
    obs["label"] = cells.obsm["file"][cells.uns["treatment_col"]].astype(str).to_numpy()
    obs["total"] = np.asarray(cells.X.sum(axis=1)).ravel()
    reasons = []

    def drop(bad, which: str, why: str):
        if bad.any():
            names = sorted(set(obs[which][bad]))
            reasons.append(f"{bad.sum():,} cells of {len(names)} {which}s {why}: {listed(names)}")
            print(f"  dropped {reasons[-1]}")
        return obs[~bad]

    obs = drop(obs["system"] == "", "condition", "without a system")
    obs = drop(obs["treatment"] == "", "label", "that name no knock-out, or a gene and something besides")
    if not settings.unmeasured:
        obs = drop(~obs["treatment"].isin([control, *cells.var_names]), "treatment",
                   "that are no measured gene (--unmeasured keeps them as context)")
    largest = obs.groupby("condition")["total"].max()
    hollow = largest.index[largest == 0]
    if len(hollow):
        raise BadInput(f"no cell of {len(hollow)} conditions has any counts, remove them (eq. 5): {listed(hollow)}")
    obs = drop(obs["total"] == 0, "condition", "because they have no counts")
    # [D23] paper: draws 200 cells of each condition, says nothing of smaller ones; released code:
    # drops treatments with fewer than 200 cells; here: drops conditions, because they are what is drawn from.
    size = obs.groupby("condition")["total"].transform("size")
    obs = drop(size < settings.min_cells, "condition", f"with fewer than {settings.min_cells} cells (--min-cells)")
    controlled = set(obs["system"][obs["treatment"] == control])
    obs = drop(~obs["system"].isin(controlled), "system", "without enough control cells")
    if set(obs["treatment"]) <= {control}:
        why = "; ".join(reasons) or "all cells are controls"
        raise BadInput(f"no usable treatment is left: {why}; the genes are called {listed(cells.var_names, 3)}")
    for system, treatments in obs.groupby("system")["treatment"]:
        size = treatments.value_counts().sort_index()
        print(f"  system '{system}': {listed(map('{} {}'.format, size.index, size), 30)}")
    return part(cells, np.isin(np.arange(cells.n_obs), obs.index))


# ---------------------------------------------------------------------------------------------------- data split (B.4)


def conditions_of(cells, control: str) -> list[tuple[str, str]]:
    """All (system, treatment) in order, without the controls."""
    treated = cells.obs[cells.obs["treatment"] != control]
    return sorted(set(zip(treated["system"], treated["treatment"])))


def choose_holdout(conditions: list[tuple[str, str]], asked: str | None) -> str:
    """The system whose treatments are held out: the one that was asked for, or the one with the most treatments."""
    # Paper: melanoma's IFN-gamma condition; released code: the system with the most treatments, which is that one;
    # here likewise (of equals the first in the alphabet).
    systems = [system for system, _ in conditions]
    names = sorted(set(systems))
    if asked is None:
        return max(names, key=systems.count)
    if asked not in names:
        raise BadInput(f"--holdout-system {asked}: not among the systems with usable treatments: {listed(names)}")
    return asked


def split_conditions(rng: np.random.Generator, conditions: list[tuple[str, str]],
                     holdout: str) -> dict[tuple[str, str], int]:
    """TRAIN, VALIDATION or TEST for each (system, treatment); control is no condition here (B.4, Figure 4).
    Half of the held-out system's treatments (rounded down) are for testing, a tenth of all others for validation."""
    held_out = [pair for pair in conditions if pair[0] == holdout]
    if len(held_out) < 2:
        raise BadInput(f"--holdout-system {holdout}: has {len(held_out)} usable treatment, needs 2; lower --min-cells")
    uses = dict.fromkeys(conditions, TRAIN)
    for i in rng.permutation(len(held_out))[: len(held_out) // 2]:
        uses[held_out[i]] = TEST
    rest = [pair for pair in conditions if uses[pair] == TRAIN]
    for i in rng.permutation(len(rest))[: round(len(rest) / 10)]:
        uses[rest[i]] = VALIDATION
    return uses


def check_split(uses: dict[tuple[str, str], int]) -> None:
    """Raise BadInput unless there are test conditions, and each condition has another one to be predicted from."""
    if TEST not in uses.values():
        raise BadInput("no test condition is left; raise --genes, or take another --seed")
    known = [system for (system, _), use in uses.items() if use in KNOWN]
    for system, _ in uses:
        if known.count(system) < 2:
            raise BadInput(f"system '{system}': {known.count(system)} training conditions, needs 2 to predict one from "
                           "another; lower --min-cells, raise --genes, or take another --seed")


# ---------------------------------------------------------------------------- normalisation and genes (B.3, equation 5)


def normalise(cells, seen: Bool[np.ndarray, "n"]) -> float:
    """Equation 5 in place, x <- log(1 + m x / |x|_1), m the median total count |x|_1 of the `seen` cells. Returns m."""
    import scanpy
    # [D22] paper and released code: the median over all cells; here: over all but the test cells, because
    # otherwise they would have a say, if a small one, in every value that is trained on.
    totals = np.asarray(cells.X.sum(axis=1)).ravel()
    median = float(np.median(totals[seen]))
    scanpy.pp.normalize_total(cells, target_sum=median)
    # Paper: equation 5 has log2, the text sc.pp.log1p; released code: sc.pp.log1p, the natural logarithm;
    # here natural, because the paper's numbers were made with it.
    scanpy.pp.log1p(cells)
    return median


def rank_genes(training, control: str):
    """Largest absolute t-test score (scanpy's default) of each gene over all training perturbations, each against the
    controls of its system, but for a gene's own knock-out [D26]. A pandas Series, strongest first."""
    import anndata
    import pandas as pd
    import scanpy
    assert set(training.obs["use"]) == {TRAIN}, "only training conditions may choose the genes"
    best = pd.Series(0.0, training.var_names)
    for system in sorted(set(training.obs["system"])):
        here = part(training, (training.obs["system"] == system).to_numpy())
        treatments = sorted(set(here.obs["treatment"]) - {control})
        if not treatments:
            continue
        here = anndata.AnnData(here.X, here.obs.astype({"treatment": "category"}), here.var)  # of the same values
        with warnings.catch_warnings(action="ignore"):  # of slow tables, and of an unused log of 0
            scanpy.tl.rank_genes_groups(here, "treatment", groups=treatments, reference=control)
        ranked = here.uns["rank_genes_groups"]
        for t in treatments:
            scores = pd.Series(ranked["scores"][t], ranked["names"][t]).abs().drop(t, errors="ignore")
            best = np.maximum(best, scores.reindex(best.index).fillna(0.0))
    return best.sort_values(ascending=False, kind="stable")


def choose_genes(strength, perturbed: set[str], genes: int) -> tuple[list[str], list[str]]:
    """D = `genes` genes (B.3): the perturbed ones, or the strongest D of them, and the strongest others to fill up."""
    # [D25] paper: differential expression "between each perturbation and control", not on which cells or how
    # it is combined; released code: on train and control cells; here: likewise, the best score over perturbations.
    # [D26] paper: keeps "the perturbed genes", though melanoma has over 50; released code: the strongest 50;
    # here: likewise, but a gene's own knock-out does not count: test treatments have none, and would lose their place.
    targets = [gene for gene in strength.index if gene in perturbed][:genes]
    others = [gene for gene in strength.index if gene not in perturbed]
    return sorted(targets), others[: genes - len(targets)]


def process(cells, control: str, holdout: str, settings: Settings, seed: int):
    """One split as an AnnData: X log-expression of D genes, the targets first (networks of the prior have no order);
    obs 'system', 'treatment', 'use'; uns 'normalisation', in words. Treatments whose target was cut are left out.
    Raises BadInput if a condition has no other one left to be predicted from."""
    measured = [pair for pair in conditions_of(cells, control) if pair[1] in cells.var_names]
    uses = split_conditions(scales.generator("split", seed), measured, holdout)
    result = cells.copy()
    pairs = zip(cells.obs["system"], cells.obs["treatment"])
    # Control is known. [D57] What is knocked out but not measured tells of other knock-outs, and cannot be predicted.
    result.obs["use"] = [uses.get(pair, TRAIN if pair[1] == control else KNOWN_ONLY) for pair in pairs]
    note = "normalised as given"
    if not settings.log_transformed:
        median = normalise(result, (result.obs["use"] != TEST).to_numpy())
        note = f"median count {median:g}"
    strength = rank_genes(result[(result.obs["use"] == TRAIN).to_numpy()], control)
    perturbed = {treatment for _, treatment in uses}
    targets, markers = choose_genes(strength, perturbed, settings.genes)
    kept = result.obs["treatment"].isin([control, *targets]).to_numpy()
    if settings.unmeasured:
        result.obs.loc[~kept, "use"] = KNOWN_ONLY
        kept[:] = True
    result = result[kept, targets + markers].copy()
    result.uns = {"normalisation": note}

    left = {pair: use for pair, use in uses.items() if pair[1] in targets}
    if settings.unmeasured:
        left |= {pair: KNOWN_ONLY for pair in conditions_of(result, control) if pair not in left}
    print(f"split {seed}: {note}; held-out system '{holdout}'")
    for use, word in WORDS.items():
        names = ["/".join(pair) for pair in left if left[pair] == use]
        if names or use != KNOWN_ONLY:
            print(f"  {len(names)} {word}: {listed(names)}")
    print(f"  {len(targets)} targets, {len(markers)} markers: {listed(targets + markers, 20)}")
    cut = sorted(perturbed.difference(targets))
    if cut and not settings.unmeasured:
        print(f"  {len(cut)} treatments left out because of --genes: {listed(cut)}")
    check_split(left)
    return result


# ----------------------------------------------------------------------------------------------------------- the files


def arranged(cells, control: str) -> dict:
    """A processed split as the arrays of a screen; names are in alphabetical order."""
    obs = cells.obs
    systems = sorted(set(obs["system"]))
    treatments = [control, *sorted(set(obs["treatment"]) - {control})]
    s = obs["system"].map(systems.index).to_numpy()
    t = obs["treatment"].map(treatments.index).to_numpy()
    split = np.full((len(systems), len(treatments)), ABSENT)
    split[s, t] = obs["use"]
    count = np.zeros_like(split)
    np.add.at(count, (s, t), 1)
    one_hot = np.array(treatments)[:, None] == cells.var_names.to_numpy(str)  # T D
    one_hot = np.repeat(one_hot[None].astype(np.float32), len(systems), axis=0)  # S T D
    values = cells.X[np.lexsort((t, s))]
    if not isinstance(values, np.ndarray):
        values = values.toarray()
    return {"cells": values, "count": count, "treatments": one_hot, "split": split,
            "genes": tuple(cells.var_names), "systems": tuple(systems), "treatment_names": tuple(treatments)}


def as_screen(cells, made: dict) -> tasks.Screen:
    """A screen in memory, as `write` and `tasks.load_screen` would give it."""
    arrays = arranged(cells, made["control"])
    start = np.cumsum(arrays["count"]).reshape(arrays["count"].shape) - arrays["count"]
    return tasks.Screen(**arrays, start=start, log_expression=True, made=made)


def write(cells, path: Path, made: dict) -> None:
    """A processed split as a screen, and a table with a line for each condition."""
    table = cells.obs.assign(use=cells.obs["use"].map(WORDS)).groupby(["system", "treatment", "use"]).size()
    with scales.atomic(path.with_name(f"conditions-{tasks.split_number(path)}.csv")) as temporary:
        table.rename("cells").to_csv(temporary)
    arrays = arranged(cells, made["control"])
    tasks.write_screen(path, [arrays.pop("cells")], log_expression=True, made=made, **arrays)


def load(settings: Settings):
    """Usable cells, control label and held-out system of the screen that the settings name."""
    file = settings.h5ad
    if settings.dataset in DOWNLOADS:
        _, column, control, system = DOWNLOADS[settings.dataset]
        file = file or download(settings.dataset, settings.data_dir or settings.out / "downloads")
        settings = dataclasses.replace(settings, treatment_col=settings.treatment_col or column,
                                       control=settings.control or control, system_col=settings.system_col or system)
    cells = simulate_toy(settings) if settings.dataset == "toy" else read(file)
    if cells.n_vars < 3 or not cells.n_obs:
        raise BadInput(f"{file}: {cells.n_obs} cells and {cells.n_vars} genes, which is no screen")
    if cells.n_vars < settings.genes:
        raise BadInput(f"--genes {settings.genes}: the file has only {cells.n_vars} genes; lower --genes")
    cells, control = label_cells(cells, settings)
    cells.X = by_rows(cells.X)
    cells = usable_cells(cells, control, settings)
    return cells, control, choose_holdout(conditions_of(cells, control), settings.holdout_system)


def check(settings: Settings) -> None:
    """Raise BadInput for settings that cannot be meant."""
    if settings.dataset is None and settings.h5ad is None or settings.dataset == "toy" and settings.h5ad is not None:
        raise BadInput("say which data: either --dataset toy, melanoma or leukemia, or --h5ad FILE")
    if settings.h5ad is not None and not settings.h5ad.is_file():
        raise BadInput(f"--h5ad {settings.h5ad}: no such file, or a folder")


def describe(settings: Settings, name: str) -> dict:
    """What every split of the screen says of how it was made, except what is different for each."""
    source = settings.dataset
    if settings.h5ad is not None:
        source = f"{settings.h5ad.name}, checksum {scales.checksum(settings.h5ad)}"
    given = {"source": source}
    for field in ("treatment_col", "control", "system_col", "holdout_system", "log_transformed", "genes", "min_cells"):
        given[field] = getattr(settings, field)
    if settings.unmeasured:
        given["unmeasured"] = True
    if settings.layer:
        given["layer"] = settings.layer
    if settings.toy_treatments:
        given["toy_treatments"] = settings.toy_treatments
    title = name
    if settings.dataset is not None:
        title = TITLES[settings.dataset] if settings.dataset == name else f"{name}: {TITLES[settings.dataset]}"
    made = {"title": title, "section": "real", "settings": given}
    if settings.dataset == name and name in PAPER:  # the paper's numbers may stand beside it
        made["paper"] = name
    return made


def name_of(settings: Settings) -> str:
    """Folder of the screen."""
    return settings.name or settings.dataset or (settings.h5ad or Path("no file")).stem


def prepare(settings: Settings) -> list[Path]:
    """Write the splits that are not there yet; returns the folders of all. Raises BadInput, as early as it can."""
    check(settings)
    name = name_of(settings)
    folder = settings.out / settings.scale / "screens" / name
    made = describe(settings, name)
    for path in sorted(folder.glob("split-*")):  # whether asked for or not: a screen is made one way
        then = tasks.load_screen(path).made["settings"]
        scales.check_made(path, then, made["settings"] | {"seed": tasks.split_number(path)})
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # if nothing can be written here, fail before the work and not after it

    paths, missing = [], []
    for seed in range(settings.seed, settings.seed + settings.splits):
        paths.append(folder / f"split-{seed}")
        if not paths[-1].exists():
            missing.append(seed)
    if missing:
        cells, control, holdout = load(settings)
    for seed in missing:
        result = process(cells, control, holdout, settings, seed)
        about = {"control": control, "holdout": holdout, "normalisation": result.uns["normalisation"]}
        about["settings"] = made["settings"] | {"seed": seed}
        write(result, folder / f"split-{seed}", made | about)
    print(f"{folder}: {len(paths)} splits finished, {len(paths) - len(missing)} of them skipped")
    return paths


def main() -> None:
    """Prepare whatever the command line names."""
    settings = scales.parse(Settings, lambda _: ("real",))
    print(f"{settings}\nrevision {scales.revision()}", flush=True)
    with scales.alone(settings.out / settings.scale / "screens" / name_of(settings)):
        prepare(settings)


if __name__ == "__main__":
    scales.run(main)
