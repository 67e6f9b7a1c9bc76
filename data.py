"""Stage 2 of 8: turn a single-cell perturbation screen into conditions to train on and conditions to predict.

Paper: sections 5.1, B.3 (equation 5) and B.4 (Figure 4). Reads an `.h5ad` of raw counts, or downloads one of the
paper's two data sets; writes a screen (tasks.py) `out/<scale>/screens/<name>/split-<s>` for each split s, and beside it
`conditions-<s>.csv`, its conditions for the human eye.

    python data.py --scale smoke --dataset toy        # a small simulated screen, no file needed: 2 s
    python data.py --scale laptop --h5ad FILE         # your own screen: 10 splits of 14,000 x 300 counts in 5 s
    python data.py --scale paper --dataset melanoma   # Frangieh et al. 2021, downloaded
    python data.py --scale paper --dataset leukemia   # Papalexi et al. 2021, downloaded, or read with --h5ad FILE

Departures from the paper, marked where they happen: D22, D23, D25, D26.

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
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool

import scales
import tasks
from scales import BadInput
from tasks import ABSENT, TEST, TRAIN, VALIDATION

# anndata, scanpy and pertpy take 2, 5 and 20 seconds to import, so each is imported by the functions that need it.

PAPER = {"melanoma": "Melanoma (Frangieh et al., 2021)", "leukemia": "Leukemia (Papalexi et al., 2021)"}
TITLES = PAPER | {"toy": "Toy screen: simulated GRNs, not cells"}


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
    log_transformed: bool = False  # the values are normalised and natural log1p already: skip both
    genes: int = 50  # genes D that are kept (B.3)
    min_cells: int = 200  # fewest cells of a usable condition (released code)
    splits: int = 1  # number of random splits (B.4)
    seed: int = 0  # seed of the first split; the next ones count up
    data_dir: Path = Path("out/downloads")  # where downloads are kept
    out: Path = Path("out")  # everything is written below out/<scale>


# ----------------------------------------------------------------------------------------------- reading a screen (B.3)

ADDRESS = "https://scverse-exampledata.s3.eu-west-1.amazonaws.com/pertpy/"  # where pertpy downloads from
DOWNLOADS = {  # file, and --treatment-col, --control and --system-col for it
    "melanoma": ("frangieh_2021.h5ad", "perturbation", "control", "perturbation_2"),
    "leukemia": ("papalexi_2021.h5mu", "gene_target", "NT", "none"),
}
TREATMENT_COLUMNS = ("perturbation", "gene_target", "target_gene", "condition", "gene")
CONTROL_LABELS = ("control", "ctrl", "nt", "ntc", "non-targeting", "non_targeting", "nontargeting")  # in any case
SYSTEM_COLUMNS = ("context", "cell_line", "cell_type", "perturbation_2")
SYMBOL_COLUMNS = ("gene_symbol", "gene_symbols", "gene_name", "gene_names", "feature_name")  # of var


def listed(names, most: int = 12) -> str:
    """'a, b, c', or 'a, b, c and 245 more'."""
    names = list(map(str, names))
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


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
        raise BadInput(f"pertpy could not download the {name} data ({type(error).__name__}: {str(error)[:100]}); "
                       f"fetch {ADDRESS}{path.name} by hand and save it as {path}, or name a copy of it with "
                       "--h5ad") from None
    return path


def by_rows(values):
    """A matrix in float32, CSR if it is sparse."""
    import scipy.sparse
    sparse = scipy.sparse.issparse(values)
    return scipy.sparse.csr_matrix(values, dtype=np.float32) if sparse else np.asarray(values, np.float32)


def read(path: Path):
    """The AnnData in a file. Raises BadInput if the file is missing or cannot be read."""
    import anndata
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        if path.suffix == ".h5mu":
            import mudata
            whole = mudata.read_h5mu(path)
            cells = whole.mod["rna"].copy()
            cells.obs = cells.obs.join(whole.obs.drop(columns=cells.obs.columns, errors="ignore"))
        else:
            cells = anndata.read_h5ad(path)
        cells.X = by_rows(cells.X)
    except Exception as error:  # h5py and anndata fail on damaged files with every kind of exception
        raise BadInput(f"{path}: not a complete .h5ad file ({type(error).__name__}: {str(error)[:200]}); if it was "
                       "downloaded, fetch it again") from None
    return cells


def simulate_toy(settings: Settings):
    """Two gene regulatory networks of `prior.py` as two systems, to try the code on: simulated, not cells.

    There are a few genes more than are kept, and a few treatments fewer, so that markers have to be chosen.
    """
    import anndata
    import pandas as pd
    from prior import simulate_grn
    genes, population = settings.genes + settings.genes // 4, max(100, 2 * settings.min_cells)
    print(f"simulating {2 * (1 + genes)} conditions of {population} cells: simulated, not cells", flush=True)
    names = ["control", *(f"gene{g:02}" for g in range(genes))]
    counts, obs = [], []
    for index, system in enumerate(("network A", "network B")):
        _, simulated = simulate_grn(0, genes, population, False, index)  # one toy for all seeds
        for t in range(1 + settings.genes * 7 // 8):
            if simulated[t] is not None:  # refused by the simulator
                counts.append(simulated[t])
                obs += [(system, names[t])] * population
    obs = pd.DataFrame(obs, map(str, range(len(obs))), ["cell_line", "perturbation"])
    return anndata.AnnData(by_rows(np.concatenate(counts)), obs, pd.DataFrame(index=names[1:]))


def find_treatment(obs, settings: Settings) -> tuple[str, str]:
    """Column of obs with the knocked-out genes, and its control label. Raises BadInput unless just one pair will do."""
    column, control = settings.treatment_col, settings.control
    if column is not None and column not in obs:
        raise BadInput(f"--treatment-col {column}: no such column in obs; it has {listed(obs.columns)}")
    columns = [c for c in TREATMENT_COLUMNS if c in obs] if column is None else [column]
    if not columns:
        raise BadInput(f"no column of obs has a usual name for the knocked-out gene ({', '.join(TREATMENT_COLUMNS)}); "
                       f"choose one with --treatment-col: {listed(obs.columns)}")
    found, searched = [], []
    for c in columns:
        labels = sorted(set(obs[c].dropna().astype(str)))
        searched.append(f"column '{c}' (labels {listed(labels)})")
        for label in labels:
            if label == control or control is None and label.lower() in CONTROL_LABELS:
                found.append((c, label))
    if not found:
        wanted = f"none of {', '.join(CONTROL_LABELS)}"
        if control is not None:
            wanted = f"no '{control}'"
        raise BadInput(f"no control cells: there is {wanted} in {', nor in '.join(searched)}; "
                       "name the control label with --control")
    if len(found) > 1:
        places = [f"'{label}' in column '{c}'" for c, label in found]
        raise BadInput(f"not clear which cells are controls: {', '.join(places)}; "
                       "choose with --treatment-col and --control")
    return found[0]


def find_system(obs, settings: Settings) -> str | None:
    """Column of obs with the systems; None: there is one system. Raises BadInput if several could be meant."""
    column = settings.system_col
    if column == "none":
        return None
    if column is not None and column not in obs:
        raise BadInput(f"--system-col {column}: no such column in obs; it has {listed(obs.columns)}; or say none")
    found = [c for c in SYSTEM_COLUMNS if c in obs and obs[c].nunique() > 1] if column is None else [column]
    if len(found) > 1:
        raise BadInput(f"not clear which column is the biological context: {', '.join(found)}; choose with "
                       "--system-col (none for a single one)")
    return found[0] if found else None


def single_target(label: str, control: str) -> str:
    """'STAT1' for 'STAT1', and for 'STAT1+ctrl' and 'ctrl+STAT1' as GEARS has it; a double knock-out stays as it is."""
    genes = [gene for gene in label.split("+") if gene != control]
    return genes[0] if len(genes) == 1 else label


def label_cells(cells, settings: Settings) -> str:
    """Replace obs by 'system' and 'treatment' ('' where unknown), and name genes by symbol; returns the control label.

    Raises BadInput for columns, labels, gene names and values that cannot be used.
    """
    import pandas as pd
    column, control = find_treatment(cells.obs, settings)
    system = find_system(cells.obs, settings)
    labels = cells.obs.astype(object).where(cells.obs.notna(), "").astype(str)
    targets = {label: single_target(label, control) for label in labels[column].unique()}
    cells.obs = pd.DataFrame({"system": labels[system] if system else "all",
                              "treatment": labels[column].map(targets)})

    known = set(targets.values())
    if known.isdisjoint(cells.var_names):  # Ensembl identifiers, perhaps
        for c in SYMBOL_COLUMNS:
            if c in cells.var and not known.isdisjoint(cells.var[c].astype(str)):
                cells.var_names = cells.var[c].astype(str).to_numpy()
                break
    twice = sorted(set(cells.var_names[cells.var_names.duplicated()]))
    if twice:
        raise BadInput(f"{len(twice)} gene names occur more than once ({listed(twice)}), but a treatment has to mean "
                       "one gene: sum or rename them first")
    kind = check_values(cells, settings.log_transformed)
    where = f"system column '{system}'" if system else "one system"
    print(f"{cells.n_obs:,} cells x {cells.n_vars:,} genes, {kind}; treatment column '{column}', control '{control}', "
          + where)
    return control


def check_values(cells, log_transformed: bool) -> str:
    """What kind of values X holds, in words. Moves layer 'counts' to X if only that one holds counts.

    Raises BadInput for values that are negative or not finite, and for counts or logarithms where the other is wanted.
    """
    integers = True
    for first in range(0, cells.n_obs, 1024):  # some rows at a time: large screens do not fit into memory several times
        block = cells.X[first : first + 1024]
        values = block if isinstance(block, np.ndarray) else block.data
        if not np.all((values >= 0) & (values < np.inf)):  # NaN fails both
            block = cells[first : first + 1024].to_df()
            row, gene = np.argwhere(~((block >= 0) & (block < np.inf)).to_numpy())[0]
            raise BadInput(f"the expression of gene {block.columns[gene]} in cell {block.index[row]} is "
                           f"{block.iat[row, gene]}: counts are finite and not negative; give raw, unscaled counts")
        integers = integers and not np.any(values % 1)
    if log_transformed and integers:
        raise BadInput("--log-transformed, but all values are integers, like raw counts: leave the option out")
    if log_transformed or integers:
        return "raw counts" if integers else "log-transformed already"
    if "counts" in cells.layers:
        cells.X = by_rows(cells.layers.pop("counts"))
        return check_values(cells, log_transformed) + " (from layer 'counts')"
    raise BadInput("the values are not integers, so they look normalised or log-transformed already: give raw counts "
                   "(in X or layer 'counts'), or say --log-transformed if they are natural log1p of normalised counts")


def usable_cells(cells, control: str, settings: Settings):
    """The cells of conditions that can be used. Prints what is dropped, and what is left.

    Raises BadInput if a whole condition has no counts, or if no treatment is left, saying why.
    """
    import pandas as pd
    obs = cells.obs
    condition = pd.MultiIndex.from_frame(obs)
    controls = (obs["treatment"] == control).to_numpy()
    empty = np.asarray(cells.X.sum(axis=1)).ravel() == 0
    keep = np.ones(len(obs), bool)
    reasons = []

    def drop(bad, why: str) -> None:
        gone = keep & np.asarray(bad)
        keep[gone] = False
        if gone.any():
            reasons.append(f"{gone.sum():,} cells {why}")
            print(f"  dropped {reasons[-1]}")

    drop((obs == "").any(axis=1), "without a treatment or system label")
    unmeasured = sorted(set(obs["treatment"][keep & ~controls]) - set(cells.var_names))
    drop(obs["treatment"].isin(unmeasured),
         f"of {len(unmeasured)} treatments that are no measured gene: {listed(unmeasured)}")
    hollow = sorted(set(condition[keep]) - set(condition[keep & ~empty]))
    if hollow:
        names = listed("/".join(pair) for pair in hollow)
        raise BadInput(f"no cell of {len(hollow)} of the {len(set(condition[keep]))} conditions has any counts "
                       f"({names}): equation 5 would divide by zero; remove these cells")
    drop(empty, "without any counts")
    # [D23] paper: draws 200 cells of each condition, says nothing of smaller ones; released code:
    # drops treatments with fewer than 200 cells; here: drops conditions, because they are what is drawn from.
    size = obs[keep].value_counts().sort_index()
    small = size[size < settings.min_cells]
    names = listed(f"{system}/{treatment} {n}" for (system, treatment), n in small.items())
    drop(condition.isin(small.index),
         f"of {len(small)} conditions with fewer than {settings.min_cells} cells (--min-cells): {names}")
    uncontrolled = sorted(set(obs["system"][keep]) - set(obs["system"][keep & controls]))
    drop(obs["system"].isin(uncontrolled), f"of systems without enough control cells: {listed(uncontrolled)}")
    if not np.any(keep & ~controls):
        why = "; ".join(reasons) or "all cells are controls"
        raise BadInput(f"no usable treatment is left: {why}; the genes are called {listed(cells.var_names, 3)}")

    for system, here in obs[keep].groupby("system"):
        size = here["treatment"].value_counts().sort_index()
        treated = size.drop(control)
        names = listed((f"{treatment} {n}" for treatment, n in treated.items()), 30)
        print(f"  system '{system}': {size[control]:,} control cells, {len(treated)} treatments: {names}")
    return cells[keep].copy()


# ---------------------------------------------------------------------------------------------------- data split (B.4)


def conditions_of(cells, control: str) -> list[tuple[str, str]]:
    """All (system, treatment) in order, without the controls."""
    pairs = set(zip(cells.obs["system"], cells.obs["treatment"]))
    return sorted(pair for pair in pairs if pair[1] != control)


def choose_holdout(conditions: list[tuple[str, str]], asked: str | None) -> str:
    """The system whose treatments are held out: the one that was asked for, or the one with the most treatments.

    Paper: melanoma's IFN-gamma condition; released code: the system with the most treatments, which is that one;
    here likewise (of equals the first in the alphabet).
    """
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

    Half of the held-out system's treatments (rounded down) are for testing, a tenth of all others for validation.
    """
    held_out = [pair for pair in conditions if pair[0] == holdout]
    if len(held_out) < 2:
        raise BadInput(f"system '{holdout}' has {len(held_out)} usable treatment, so it cannot have one for training "
                       "and one for testing; choose another --holdout-system or lower --min-cells")
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
    for system in sorted({system for system, _ in uses}):
        known = [t for (where, t), use in uses.items() if where == system and use == TRAIN]
        if len(known) < 2:
            raise BadInput(f"system '{system}' has {len(known)} training conditions, and needs 2 to predict one from "
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
    """Strength of each gene's differential expression: its largest absolute t-test score (scanpy's default) over all
    training perturbations, each against the controls of its system. A pandas Series, strongest first.

    Scores of knock-outs on the knocked-out gene itself are left out, see D26.
    """
    import pandas as pd
    import scanpy
    assert set(training.obs["use"]) == {TRAIN}, "only training conditions may choose the genes"
    best = pd.Series(0.0, training.var_names)
    for system in sorted(set(training.obs["system"])):
        here = training[(training.obs["system"] == system).to_numpy()].copy()
        treatments = sorted(set(here.obs["treatment"]) - {control})
        if not treatments:
            continue
        here.obs["treatment"] = here.obs["treatment"].astype("category")
        with warnings.catch_warnings(action="ignore"):  # of slow tables, and of an unused log of 0
            scanpy.tl.rank_genes_groups(here, "treatment", groups=treatments, reference=control)
        ranked = here.uns["rank_genes_groups"]
        for t in treatments:
            scores = pd.Series(ranked["scores"][t], ranked["names"][t]).abs()
            scores = scores.drop(t).reindex(best.index)
            best = np.maximum(best, scores.fillna(0.0))
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

    Raises BadInput if a condition has no other one left to be predicted from.
    """
    conditions = conditions_of(cells, control)
    uses = split_conditions(scales.generator("split", seed), conditions, holdout)
    result = cells.copy()
    pairs = zip(cells.obs["system"], cells.obs["treatment"])
    result.obs["use"] = [uses.get(pair, TRAIN) for pair in pairs]  # control is known
    note = "normalised as given"
    if not settings.log_transformed:
        median = normalise(result, (result.obs["use"] != TEST).to_numpy())
        note = f"median count {median:g}"
    strength = rank_genes(result[(result.obs["use"] == TRAIN).to_numpy()], control)
    perturbed = {treatment for _, treatment in conditions}
    targets, markers = choose_genes(strength, perturbed, settings.genes)
    kept = result.obs["treatment"].isin([control, *targets]).to_numpy()
    result = result[kept, targets + markers].copy()
    result.uns = {"normalisation": note}

    left = {pair: use for pair, use in uses.items() if pair[1] in targets}
    tested = [treatment for (_, treatment), use in left.items() if use == TEST]
    number = np.bincount(list(left.values()), minlength=3)
    few = ""
    if not number[VALIDATION]:
        few = " (a tenth of so few rounds to none)"
    print(f"split {seed}: {number[TRAIN]} train, {number[VALIDATION]} validation{few}, {number[TEST]} test conditions, "
          f"{note}\n  test in system '{holdout}': {listed(tested)}")
    print(f"  {len(targets)} targets and {len(markers)} markers: {listed(targets + markers, 20)}")
    cut = sorted(perturbed.difference(targets))
    if cut:
        print(f"  treatments left out because of --genes {settings.genes}: {listed(cut)}")
    check_split(left)
    return result


# ----------------------------------------------------------------------------------------------------------- the files


def write(cells, path: Path, made: dict) -> None:
    """A processed split as a screen, after a table with one line for each condition. Systems and treatments are in
    alphabetical order, control first."""
    obs, control = cells.obs, made["control"]
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

    words = obs["use"].map({TRAIN: "train", VALIDATION: "validation", TEST: "test"})
    table = obs.assign(use=words).groupby(["system", "treatment", "use"]).size()
    with scales.atomic(path.with_name(f"conditions-{tasks.split_number(path)}.csv")) as temporary:
        table.rename("cells").to_csv(temporary)
    values = cells.X[np.lexsort((t, s))]
    if not isinstance(values, np.ndarray):
        values = values.toarray()
    tasks.write_screen(path, [values], count, one_hot, split, cells.var_names, systems, treatments, True, made)


def load(settings: Settings):
    """Usable cells, control label and held-out system of the screen that the settings name."""
    file = settings.h5ad
    if settings.dataset in DOWNLOADS:
        _, column, control, system = DOWNLOADS[settings.dataset]
        file = file or download(settings.dataset, settings.data_dir)
        settings = dataclasses.replace(settings, treatment_col=settings.treatment_col or column,
                                       control=settings.control or control, system_col=settings.system_col or system)
    cells = simulate_toy(settings) if settings.dataset == "toy" else read(file)
    if cells.n_vars < settings.genes:
        raise BadInput(f"--genes {settings.genes}: the file has only {cells.n_vars} genes; lower --genes")
    control = label_cells(cells, settings)
    cells = usable_cells(cells, control, settings)
    return cells, control, choose_holdout(conditions_of(cells, control), settings.holdout_system)


def check(settings: Settings) -> None:
    """Raise BadInput for settings that cannot be meant."""
    for name, least in {"genes": 2, "min_cells": 2, "splits": 1, "seed": 0}.items():
        value = getattr(settings, name)
        if value < least:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if settings.dataset is None and settings.h5ad is None or settings.dataset == "toy" and settings.h5ad is not None:
        raise BadInput("say which data: either --dataset toy, melanoma or leukemia, or --h5ad FILE")
    if settings.h5ad is not None and not settings.h5ad.is_file():
        raise BadInput(f"--h5ad {settings.h5ad}: no such file")
    if settings.name is not None and (settings.name in ("", "..") or settings.name != Path(settings.name).name):
        raise BadInput(f"--name {settings.name}: must be the name of a folder, not a path")


def describe(settings: Settings, name: str) -> dict:
    """What every split of the screen says of how it was made, except what is different for each."""
    source = settings.dataset
    if settings.h5ad is not None:
        source = f"{settings.h5ad.name}, {settings.h5ad.stat().st_size} bytes"
    given = {"source": source}
    for field in ("treatment_col", "control", "system_col", "holdout_system", "log_transformed", "genes", "min_cells"):
        given[field] = getattr(settings, field)
    made = {"title": name, "section": "real", "settings": given}
    if settings.dataset == name:
        made["title"] = TITLES[name]
    elif settings.dataset is not None:
        made["title"] = f"{name}: {TITLES[settings.dataset]}"
    if settings.dataset == name and name in PAPER:  # the paper's numbers may stand beside it
        made["paper"] = name
    return made


def prepare(settings: Settings) -> list[Path]:
    """Write the splits that are not there yet; returns the folders of all. Raises BadInput, as early as it can."""
    check(settings)
    name = settings.name or settings.dataset or settings.h5ad.stem
    folder = settings.out / settings.scale / "screens" / name
    made = describe(settings, name)
    for path in sorted(folder.glob("split-*")):  # whether asked for or not: a screen is made one way
        then = tasks.load_screen(path).made["settings"]
        scales.check_made(path, then, made["settings"] | {"seed": tasks.split_number(path)})
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # if nothing can be written here, fail before the work and not after it

    cells = None
    paths = []
    for seed in range(settings.seed, settings.seed + settings.splits):
        path = folder / f"split-{seed}"
        paths.append(path)
        if path.exists():
            print(f"{path}: finished, skipped", flush=True)
            continue
        if cells is None:
            cells, control, holdout = load(settings)
        result = process(cells, control, holdout, settings, seed)
        about = {"control": control, "holdout": holdout, "normalisation": result.uns["normalisation"]}
        write(result, path, made | about | {"settings": made["settings"] | {"seed": seed}})
        print(f"{path}: written", flush=True)
    return paths


def main() -> None:
    """Prepare whatever the command line names."""
    settings = scales.parse(Settings, lambda _: ("real",))
    print(f"{settings}\nrevision {scales.revision()}", flush=True)
    began = time.perf_counter()
    prepare(settings)
    print(f"{time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    scales.run(main)
