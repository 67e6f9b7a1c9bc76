"""Stage 2 of 8: turn a single-cell perturbation screen into conditions to train on and conditions to predict.

Paper: sections 5.1, B.3 (equation 5), B.4 (Figure 4), and Algorithm 1 for how a task is drawn. Reads an `.h5ad` of
raw counts, or downloads one of the paper's two data sets; writes `out/<scale>/data/<name>/split-<s>.h5ad` for each
split s, and beside it `split-<s>.csv`, its conditions for the human eye. The later stages use `load_screen`; the
simulated screens of `prior.py` are a `Screen` too, and every task that a model sees comes from `sample_tasks`.

    python data.py --scale smoke --dataset toy        # a small simulated screen, no file needed
    python data.py --scale laptop --h5ad FILE         # your own screen: 10 splits of 14,000 x 300 counts in 20 s
    python data.py --scale paper --dataset melanoma   # Frangieh et al. 2021, downloaded
    python data.py --scale paper --dataset leukemia   # Papalexi et al. 2021, downloaded, or read with --h5ad FILE

Departures from the paper, marked where they happen: D21 to D26.

    paper          name here             meaning
    psi            context               biological context: a cell line or culture condition; in `prior.py` one SCM
    C              context experiments   K pairs (treatment, cells) of the same biological context, given to the model
    t              treatment             knock-out of one measured gene, a one-hot over the genes
    (psi_i, t_j)   condition             all cells of one context under one treatment: the unit that is split
    m              median                median total count of a cell (equation 5)

    C contexts   T treatments, control first   D genes   B tasks   K context experiments   N cells of a population
"""

import csv
import dataclasses
import io
import json
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

import scales
from scales import BadInput

# anndata, scanpy and pertpy take 2, 5 and 20 seconds to import, so each is imported by the functions that need it.

CONTROL = 0                                    # index of the control condition on the treatment axis
ABSENT, TRAIN, VALIDATION, TEST = -1, 0, 1, 2  # what a condition is used for


@dataclass(frozen=True)
class Settings:
    """Split a perturbation screen into training, validation and test conditions."""
    scale: str = "laptop"  # column of the table in scales.py: smoke, laptop or paper
    dataset: Literal["toy", "melanoma", "leukemia"] | None = None  # simulated, or one of the paper's (B.3)
    h5ad: Path | None = None  # your own screen, .h5ad (or .h5mu with an 'rna' part); with --dataset: its file
    name: str | None = None  # folder below out/<scale>/data; that of the data set, or of the file
    treatment_col: str | None = None  # column of obs that names the knocked-out gene; found by its usual names
    control: str | None = None  # its label for unperturbed cells; found by its usual names
    context_col: str | None = None  # column of obs with the biological context, or 'none'; found by its usual names
    holdout_context: str | None = None  # context with the test treatments; the one with the most treatments
    log_transformed: bool = False  # the values are normalised and natural log1p already: skip both
    genes: int = 50  # genes D that are kept (B.3)
    min_cells: int = 200  # fewest cells of a usable condition (released code)
    context: int = 8  # context experiments K that training will ask for; only checked here (B.2)
    splits: int = 1  # number of random splits (B.4)
    seed: int = 0  # seed of the first split; the next ones count up
    data_dir: Path = Path("out/downloads")  # where downloads are kept
    out: Path = Path("out")  # everything is written below out/<scale>


# ------------------------------------------------------------------------------- screens and tasks (4, Algorithm 1)


@dataclass(frozen=True)
class Screen:
    """All populations of a perturbation screen, real or simulated: `cells[start : start + count]` is one condition."""
    cells: Float[np.ndarray, "rows D"]       # float32, model scale (log-expression, or values of an SCM)
    start: Int[np.ndarray, "C T"]            # first row of the condition
    count: Int[np.ndarray, "C T"]            # number of its cells; 0: not measured, or dropped
    treatments: Float[np.ndarray, "C T D"]   # one-hot times the do-value (1 for a knock-out); zeros for control
    split: Int[np.ndarray, "C T"]            # ABSENT, TRAIN, VALIDATION or TEST; control is TRAIN
    genes: tuple[str, ...]
    context_names: tuple[str, ...]
    treatment_names: tuple[str, ...]         # [CONTROL] is the control label
    log_expression: bool                     # log1p data: negative values are impossible


class Task(NamedTuple):
    """A batch of B tasks: given the first four fields, predict the fifth. All float32."""
    observed: Float[np.ndarray, "B N D"]             # Y^obs, control cells
    context: Float[np.ndarray, "B K N D"]            # Y_k^int, cells of the context experiments
    context_treatments: Float[np.ndarray, "B K D"]   # t_k
    query: Float[np.ndarray, "B D"]                  # t_q
    target: Float[np.ndarray, "B N D"]               # Y_q^int


class EvaluationTask(NamedTuple):
    """The fields of Task, and what a prediction is compared with."""
    observed: Float[np.ndarray, "B N D"]
    context: Float[np.ndarray, "B K N D"]
    context_treatments: Float[np.ndarray, "B K D"]
    query: Float[np.ndarray, "B D"]
    target: Float[np.ndarray, "B N D"]
    fresh: Float[np.ndarray, "B N D"]      # true cells, none of them in `target`; NaN if there are no others
    again: Float[np.ndarray, "B N D"]      # second draw from the same pool as `target`: the paper's "observed" row
    identity: Float[np.ndarray, "B N D"]   # second draw of control cells: the paper's "identity" row
    context_index: Int[np.ndarray, "B"]
    treatment_index: Int[np.ndarray, "B"]


def draw(rng: np.random.Generator, count: int, cells: int) -> Int[np.ndarray, "N"]:
    """Indices of `cells` out of `count` cells: without replacement, or with it if there are too few (released code)."""
    return rng.integers(count, size=cells) if count < cells else rng.permutation(count)[:cells]


def draw_two(rng: np.random.Generator, count: int,
             cells: int) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"] | None]:
    """Two draws without a common cell, each without replacement if there are 2N cells.

    If there are fewer, the first draw comes first: it has N different cells, or all of them and repeats. The second
    draws from the rest with replacement; it is None if there is no rest.
    """
    order = rng.permutation(count)
    first, rest = order[:cells], order[cells:]
    first = np.concatenate([first, rng.integers(count, size=cells - len(first))])
    return first, rest[draw(rng, len(rest), cells)] if len(rest) else None


def queries(screen: Screen, context: int, split: int) -> Int[np.ndarray, "Q 2"]:
    """(context, treatment) of every condition of `split`, in order.

    Raises BadInput if there is none, or if one has fewer than K = `context` *other* training experiments in its own
    biological context to be predicted from.
    """
    found = np.argwhere(screen.split[:, 1:] == split) + [0, 1]
    if not len(found):
        raise BadInput(f"this data set has no {('training', 'validation', 'test')[split]} condition")
    available = (screen.split[:, 1:] == TRAIN).sum(axis=1)[found[:, 0]] - (split == TRAIN)
    if available.min() < context:
        where = screen.context_names[found[available.argmin(), 0]]
        raise BadInput(f"--context {context}: context '{where}' has only {available.min()} training experiments to "
                       f"predict another one from; lower --context to at most {available.min()}")
    return found


def experiments(rng: np.random.Generator, screen: Screen, c: int, query: int, context: int) -> Int[np.ndarray, "K"]:
    """K different training treatments of biological context c, never the query."""
    train = 1 + np.flatnonzero(screen.split[c, 1:] == TRAIN)
    return rng.permutation(train[train != query])[:context]


def sample_tasks(rng: np.random.Generator, screen: Screen, batch: int, cells: int, context: int,
                 split: int = TRAIN) -> Task:
    """B tasks of N = `cells` and K = `context` (Algorithm 1; B.4). The query is drawn uniformly from the conditions of
    `split`, the context experiments from the *training* conditions of its biological context, and all cells afresh.

    Raises BadInput as `queries` does.
    """
    found = queries(screen, context, split)
    rows, treatments = [], []
    for c, query in found[rng.integers(len(found), size=batch)].tolist():
        chosen = np.concatenate([[CONTROL, query], experiments(rng, screen, c, query, context)])
        rows.append([screen.start[c, t] + draw(rng, int(screen.count[c, t]), cells) for t in chosen])
        treatments.append(screen.treatments[c, chosen])
    drawn, treatments = screen.cells[np.array(rows)], np.array(treatments)  # B K+2 N D and B K+2 D
    return Task(observed=drawn[:, 0], context=drawn[:, 2:], context_treatments=treatments[:, 2:],
                query=treatments[:, 1], target=drawn[:, 1])


def evaluation_tasks(rng: np.random.Generator, screen: Screen, cells: int, context: int,
                     split: int = TEST) -> EvaluationTask:
    """One task for each condition of `split`, in order, with the draws that the reference rows of the tables need.

    Raises BadInput as `queries` does.
    """
    tasks = []
    for c, query in queries(screen, context, split).tolist():
        pool = lambda t: screen.cells[screen.start[c, t] : screen.start[c, t] + screen.count[c, t]]
        control, treated, chosen = pool(CONTROL), pool(query), experiments(rng, screen, c, query, context)
        first, other = draw_two(rng, len(control), cells)
        seen, unseen = draw_two(rng, len(treated), cells)
        tasks.append(EvaluationTask(
            observed=control[first],
            context=np.array([pool(t)[draw(rng, len(pool(t)), cells)] for t in chosen],
                             np.float32).reshape(context, cells, len(screen.genes)),  # reshape: K may be 0
            context_treatments=screen.treatments[c, chosen],
            query=screen.treatments[c, query],
            target=treated[seen],
            fresh=np.full_like(treated[seen], np.nan) if unseen is None else treated[unseen],
            again=treated[draw(rng, len(treated), cells)],
            identity=control[draw(rng, len(control), cells) if other is None else other],
            context_index=c, treatment_index=query))
    return EvaluationTask(*map(np.array, zip(*tasks)))


def join_screens(first: Screen, second: Screen) -> Screen:
    """Both screens' contexts, those of `first` in front; they must have the same genes and treatments."""
    both = {name: np.concatenate([getattr(first, name), getattr(second, name)])
            for name in ("cells", "count", "treatments", "split")}
    start = np.concatenate([first.start, second.start + len(first.cells)])
    return dataclasses.replace(first, **both, start=start, context_names=first.context_names + second.context_names)


# ----------------------------------------------------------------------------------------------- reading a screen (B.3)

ADDRESS = "https://scverse-exampledata.s3.eu-west-1.amazonaws.com/pertpy/"  # where pertpy downloads from
DOWNLOADS = {  # file, and --treatment-col, --control and --context-col for it
    "melanoma": ("frangieh_2021.h5ad", ("perturbation", "control", "perturbation_2")),
    "leukemia": ("papalexi_2021.h5mu", ("gene_target", "NT", "none")),
}
TREATMENT_COLUMNS = ("perturbation", "gene_target", "target_gene", "condition", "gene")
CONTROL_LABELS = ("control", "ctrl", "nt", "ntc", "non-targeting", "non_targeting", "nontargeting")  # in any case
CONTEXT_COLUMNS = ("context", "cell_line", "cell_type", "perturbation_2")
SYMBOL_COLUMNS = ("gene_symbol", "gene_symbols", "gene_name", "gene_names", "feature_name")  # of var


def listed(names, most: int = 12) -> str:
    """'a, b, c', or 'a, b, c and 245 more'."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def download(name: str, folder: Path) -> Path:
    """File of one of the paper's data sets, fetched through pertpy unless it is in `folder` already."""
    path = folder / DOWNLOADS[name][0]
    if not path.exists():
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
            cells.obs = cells.obs.join(whole.obs[[c for c in whole.obs if c not in cells.obs]])
        else:
            cells = anndata.read_h5ad(path)
        cells.X = by_rows(cells.X)
    except Exception as error:  # h5py and anndata fail on damaged files with every kind of exception
        raise BadInput(f"{path}: not a complete .h5ad file ({type(error).__name__}: {str(error)[:200]}); if it was "
                       "downloaded, fetch it again") from None
    return cells


def simulate_toy(settings: Settings):
    """Two gene regulatory networks of `prior.py` as two contexts, to try the code on: simulated, not cells.

    There are a few genes more than are kept, and a few treatments fewer, so that markers have to be chosen.
    """
    import anndata
    import pandas as pd
    from prior import simulate_grn
    genes, population = settings.genes + settings.genes // 4, max(100, 2 * settings.min_cells)
    print(f"simulating {2 * (1 + genes)} conditions of {population} cells: simulated, not cells", flush=True)
    names = ["control", *(f"gene{g:02}" for g in range(genes))]
    counts, obs = [], []
    for index, context in enumerate(("network A", "network B")):
        for t, simulated in enumerate(simulate_grn(0, genes, population, False, index)[1]):  # one toy for all seeds
            if simulated is not None and t <= settings.genes * 7 // 8:
                counts.append(simulated)
                obs += [(context, names[t])] * population
    obs = pd.DataFrame(obs, [f"cell{i}" for i in range(len(obs))], ["context", "perturbation"])
    return anndata.AnnData(by_rows(np.concatenate(counts)), obs, pd.DataFrame(index=names[1:]))


def find_treatment(obs, settings: Settings) -> tuple[str, str]:
    """Column of obs with the knocked-out genes, and its control label. Raises BadInput unless just one pair will do."""
    column, control = settings.treatment_col, settings.control
    if column is not None and column not in obs:
        raise BadInput(f"--treatment-col {column}: no such column in obs; it has {listed(obs.columns)}")
    columns = [column] if column is not None else [c for c in TREATMENT_COLUMNS if c in obs]
    if not columns:
        raise BadInput(f"no column of obs has a usual name for the knocked-out gene ({', '.join(TREATMENT_COLUMNS)}); "
                       f"choose one with --treatment-col: {listed(obs.columns)}")
    labels = {c: sorted(set(obs[c].dropna().astype(str))) for c in columns}
    found = [(c, x) for c in columns for x in labels[c]
             if (x == control if control is not None else x.lower() in CONTROL_LABELS)]
    if len(found) > 1:
        raise BadInput(f"not clear which cells are controls: {', '.join(f'{x!r} in column {c!r}' for c, x in found)}; "
                       "choose with --treatment-col and --control")
    if not found:
        wanted = f"no {control!r}" if control is not None else f"none of {', '.join(CONTROL_LABELS)}"
        raise BadInput(f"no control cells: there is {wanted} in "
                       + ", nor in ".join(f"column {c!r} (labels {listed(labels[c])})" for c in columns)
                       + "; name the control label with --control")
    return found[0]


def find_context(obs, settings: Settings) -> str | None:
    """Column of obs with the biological context; None: one context. Raises BadInput if several could be meant."""
    column = settings.context_col
    if column == "none":
        return None
    if column is not None and column not in obs:
        raise BadInput(f"--context-col {column}: no such column in obs; it has {listed(obs.columns)}; or say none")
    found = [column] if column is not None else [c for c in CONTEXT_COLUMNS if c in obs and obs[c].nunique() > 1]
    if len(found) > 1:
        raise BadInput(f"not clear which column is the biological context: {', '.join(found)}; choose with "
                       "--context-col (none for a single context)")
    return found[0] if found else None


def single_target(label: str, control: str) -> str:
    """'STAT1' for 'STAT1', and for 'STAT1+ctrl' and 'ctrl+STAT1' as GEARS has it; a double knock-out stays as it is."""
    genes = [gene for gene in label.split("+") if gene != control]
    return genes[0] if len(genes) == 1 else label


def check_values(cells, log_transformed: bool) -> str:
    """What kind of values X holds, in words. Moves layer 'counts' to X if only that one holds counts.

    Raises BadInput for values that are negative or not finite, and for counts or logarithms where the other is wanted.
    """
    integers = True
    for first in range(0, cells.n_obs, 1024):  # some rows at a time: large screens do not fit into memory several times
        block = cells.X[first : first + 1024]
        values = block if isinstance(block, np.ndarray) else block.data
        if not np.all((values >= 0) & (values < np.inf)):  # NaN fails both
            block = block if isinstance(block, np.ndarray) else block.toarray()
            row, gene = np.argwhere(~((block >= 0) & (block < np.inf)))[0]
            raise BadInput(f"the expression of gene {cells.var_names[gene]} in cell {cells.obs_names[first + row]} is "
                           f"{block[row, gene]}: counts are finite and not negative; give raw, unscaled counts")
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


def label_cells(cells, settings: Settings):
    """Replace obs by 'context' and 'treatment' ('' where unknown), and name genes by symbol; returns the control label.

    Raises BadInput for columns, labels, gene names and values that cannot be used.
    """
    import pandas as pd
    column, control = find_treatment(cells.obs, settings)
    context = find_context(cells.obs, settings)
    label = lambda c: cells.obs[c].astype(object).where(cells.obs[c].notna(), "").astype(str)
    treatment = label(column)
    treatment = treatment.map({x: single_target(x, control) for x in treatment.unique()})
    cells.obs = pd.DataFrame({"context": label(context) if context else "all", "treatment": treatment})
    if not set(treatment) & set(cells.var_names):  # Ensembl identifiers, perhaps
        for c in SYMBOL_COLUMNS:
            if c in cells.var and set(treatment) & set(cells.var[c].astype(str)):
                cells.var_names = cells.var[c].astype(str).to_numpy()
                break
    twice = sorted(set(cells.var_names[cells.var_names.duplicated()]))
    if twice:
        raise BadInput(f"{len(twice)} gene names occur more than once ({listed(twice)}), but a treatment has to mean "
                       "one gene: sum or rename them first")
    kind = check_values(cells, settings.log_transformed)
    print(f"{cells.n_obs:,} cells x {cells.n_vars:,} genes, {kind}; treatment column '{column}', control '{control}', "
          + (f"context column '{context}'" if context else "one context"))
    return control


def usable_cells(cells, control: str, settings: Settings):
    """The cells of conditions that can be used, grouped by condition. Prints what is dropped, and what is left.

    Raises BadInput if a whole condition has no counts, or if no treatment is left, saying why.
    """
    import anndata
    import pandas as pd
    obs, keep, reasons = cells.obs, np.ones(cells.n_obs, bool), []
    is_control = (obs["treatment"] == control).to_numpy()

    def drop(bad, why, names=()):
        gone = keep & np.asarray(bad)
        keep[gone] = False
        if gone.any():
            reasons.append(f"{gone.sum():,} cells {why}" + (f": {listed(names)}" if len(names) else ""))
            print("  dropped " + reasons[-1])

    drop((obs == "").any(axis=1), "without a treatment or context label")
    unmeasured = sorted(set(obs["treatment"][keep & ~is_control]) - set(cells.var_names))
    drop(obs["treatment"].isin(unmeasured), f"of {len(unmeasured)} treatments that are no measured gene", unmeasured)
    empty = np.asarray(cells.X.sum(axis=1)).ravel() == 0
    condition = pd.MultiIndex.from_frame(obs)
    hollow = sorted(set(condition[keep]) - set(condition[keep & ~empty]))
    if hollow:
        raise BadInput(f"no cell of {len(hollow)} of the {len(set(condition[keep]))} conditions has any counts "
                       f"({listed(map('/'.join, hollow))}): equation 5 would divide by zero; remove these cells")
    drop(empty, "without any counts")
    # [D23] paper: draws 200 cells of each condition, says nothing of smaller ones; released code:
    # drops treatments with fewer than 200 cells; here: drops conditions, because they are what is drawn from.
    size = obs[keep].value_counts().sort_index()
    small = size[size < settings.min_cells]
    drop(condition.isin(small.index), f"of {len(small)} conditions with fewer than {settings.min_cells} cells "
         "(--min-cells)", [f"{'/'.join(key)} {n}" for key, n in small.items()])
    uncontrolled = sorted(set(obs["context"][keep]) - set(obs["context"][keep & is_control]))
    drop(obs["context"].isin(uncontrolled), "of contexts without enough control cells", uncontrolled)
    if not np.any(keep & ~is_control):
        raise BadInput(f"no usable treatment is left: {'; '.join(reasons) or 'all cells are controls'}; the genes are "
                       f"called {listed(cells.var_names, 3)}")

    rows = np.flatnonzero(keep)
    rows = rows[np.lexsort((obs["treatment"].to_numpy()[rows], obs["context"].to_numpy()[rows]))]
    for context, here in obs.iloc[rows].groupby("context"):
        size = here["treatment"].value_counts()
        print(f"  context '{context}': {size[control]:,} control cells, {len(size) - 1} treatments: "
              + listed((f"{t} {n}" for t, n in size.drop(control).sort_index().items()), 30))
    return anndata.AnnData(cells.X[rows], obs.iloc[rows], pd.DataFrame(index=cells.var_names))


# ---------------------------------------------------------------------------------------------------- data split (B.4)


def choose_holdout(conditions: list[tuple[str, str]], settings: Settings) -> str:
    """The context whose treatments are held out."""
    contexts = sorted({context for context, _ in conditions})
    if settings.holdout_context is None:
        # [D24] paper: melanoma's IFN-gamma context; released code: the context with the most treatments;
        # here: the same (of equals the first in the alphabet), or --holdout-context.
        return max(contexts, key=lambda c: sum(context == c for context, _ in conditions))
    if settings.holdout_context not in contexts:
        raise BadInput(f"--holdout-context {settings.holdout_context}: not among the contexts with usable treatments: "
                       f"{listed(contexts)}")
    return settings.holdout_context


def split_conditions(rng: np.random.Generator, conditions: list[tuple[str, str]],
                     holdout: str) -> dict[tuple[str, str], str]:
    """'train', 'validation' or 'test' for each (context, treatment); control is no condition here (B.4, Figure 4).

    Half of the held-out context's treatments (rounded down) are for testing, a tenth of all others for validation.
    """
    held_out = [c for c in conditions if c[0] == holdout]
    if len(held_out) < 2:
        raise BadInput(f"context '{holdout}' has {len(held_out)} usable treatment, so it cannot have one for training "
                       "and one for testing; choose another --holdout-context or lower --min-cells")
    test = {held_out[i] for i in rng.permutation(len(held_out))[: len(held_out) // 2]}
    rest = [c for c in conditions if c not in test]
    validation = {rest[i] for i in rng.permutation(len(rest))[: round(len(rest) / 10)]}
    return {c: "test" if c in test else "validation" if c in validation else "train" for c in conditions}


# ---------------------------------------------------------------------------- normalisation and genes (B.3, equation 5)


def normalise(cells, seen: Bool[np.ndarray, "cells"]) -> float:
    """Equation 5 in place, x <- log(1 + m x / |x|_1), m the median total count |x|_1 of the `seen` cells. Returns m."""
    import scanpy
    # [D22] paper and released code: the median over all cells; here: over all but the test cells, because
    # otherwise they would have a say, if a small one, in every value that is trained on.
    median = float(np.median(np.asarray(cells.X.sum(axis=1)).ravel()[seen]))
    scanpy.pp.normalize_total(cells, target_sum=median)
    # [D21] paper: equation 5 has log2, the text sc.pp.log1p; released code: sc.pp.log1p, the natural
    # logarithm; here: natural, because the paper's numbers were made with it.
    scanpy.pp.log1p(cells)
    return median


def rank_genes(training, control: str):
    """Strength of each gene's differential expression: its largest absolute t-test score (scanpy's default) over all
    training perturbations, each against the controls of its context. A pandas Series, strongest first.

    Scores of knock-outs on the knocked-out gene itself are left out, see D26.
    """
    import pandas as pd
    import scanpy
    assert set(training.obs["split"]) == {"control", "train"}, "only training conditions may choose the genes"
    best = pd.Series(0.0, training.var_names)
    for context in sorted(set(training.obs["context"])):
        here = training[(training.obs["context"] == context).to_numpy()].copy()
        here.obs["treatment"] = here.obs["treatment"].astype("category")
        treatments = [t for t in here.obs["treatment"].cat.categories if t != control]
        if treatments:
            with warnings.catch_warnings(action="ignore"):  # of slow tables, and of an unused log of 0
                scanpy.tl.rank_genes_groups(here, "treatment", groups=treatments, reference=control)
        for t in treatments:
            scores = pd.Series(here.uns["rank_genes_groups"]["scores"][t], here.uns["rank_genes_groups"]["names"][t])
            best = np.maximum(best, scores.drop(t).abs().reindex(best.index).fillna(0.0))
    return best.sort_values(ascending=False, kind="stable")


def choose_genes(strength, perturbed: set[str], genes: int) -> tuple[list[str], list[str]]:
    """D = `genes` genes (B.3): the perturbed ones, or the strongest D of them, and the strongest others to fill up."""
    # [D25] paper: differential expression "between each perturbation and control", not on which cells or how
    # it is combined; released code: on train and control cells; here: likewise, the best score over perturbations.
    # [D26] paper: keeps "the perturbed genes", though melanoma has over 50; released code: the strongest 50;
    # here: likewise, but a gene's own knock-out does not count: test treatments have none, and would lose their place.
    targets = [g for g in strength.index if g in perturbed][:genes]
    markers = [g for g in strength.index if g not in perturbed][: genes - len(targets)]
    return sorted(targets), markers  # targets come first in the file: networks of the prior have no first gene


def process(cells, control: str, holdout: str, settings: Settings, seed: int):
    """One split as an AnnData: X log-expression of D genes; obs 'context', 'treatment', 'split'; obsm 'treatment' (the
    one-hot); layer 'counts'. Rows stay grouped by condition.

    Treatments whose target was cut are left out. Raises BadInput if K is too large for what is left.
    """
    keys = list(map(tuple, cells.obs.to_numpy()))
    conditions = [key for key in dict.fromkeys(keys) if key[1] != control]
    split = split_conditions(np.random.default_rng(seed), conditions, holdout)
    log = cells.copy()
    log.obs["split"] = [split.get(key, "control") for key in keys]
    note = "normalised as given"
    if not settings.log_transformed:
        note = f"median count {normalise(log, (log.obs['split'] != 'test').to_numpy()):g}"
    strength = rank_genes(log[log.obs["split"].isin(["control", "train"]).to_numpy()], control)
    perturbed = {t for _, t in conditions}
    targets, markers = choose_genes(strength, perturbed, settings.genes)

    kept = log.obs["treatment"].isin([control, *targets]).to_numpy()
    result = log[kept, targets + markers].copy()
    if not settings.log_transformed:
        result.layers["counts"] = cells[kept, targets + markers].X.copy()
    one_hot = result.obs["treatment"].to_numpy()[:, None] == result.var_names.to_numpy()
    result.obsm["treatment"] = one_hot.astype(np.float32)
    result.uns = {"control": control, "holdout_context": holdout, "normalisation": note,
                  "kind": "simulated, not cells" if settings.dataset == "toy" else "cells"}

    left = {key: split[key] for key in conditions if key[1] in targets}
    count = {name: list(left.values()).count(name) for name in ("train", "validation", "test")}
    print(f"split {seed}: " + ", ".join(f"{n} {name}" for name, n in count.items()) + " conditions"
          + ("" if count["validation"] else " (a tenth of so few rounds to none)") + f", {note}")
    print(f"  test in context '{holdout}': {listed(t for (_, t), name in left.items() if name == 'test')}")
    print(f"  {len(targets)} targets and {len(markers)} markers: {listed(targets + markers, 20)}")
    if perturbed - set(targets):
        print(f"  treatments left out because of --genes {settings.genes}: {listed(sorted(perturbed - set(targets)))}")
    screen = to_screen(result)
    for needed in sorted({TRAIN, TEST, *screen.split.ravel().tolist()} - {ABSENT}):
        queries(screen, settings.context, needed)
    return result


# ----------------------------------------------------------------------------------------------------------- the files


def write(result, path: Path) -> None:
    """The split as `.h5ad`, after a `.csv` with one line for each condition."""
    sizes = result.obs.groupby(["context", "treatment", "split"], observed=True, sort=False).size()
    with scales.atomic(path.with_suffix(".csv")) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([(*sizes.index.names, "cells"), *((*key, n) for key, n in sizes.items())])
    import h5py
    from anndata.io import write_elem

    result.strings_to_categoricals()
    content = io.BytesIO()  # not straight to the disk: where that is full, HDF5 crashes the interpreter
    with h5py.File(content, "w") as file:
        write_elem(file, "/", result, dataset_kwargs={"compression": "gzip"})
    with scales.atomic(path) as temporary:
        temporary.write_bytes(content.getvalue())


def finished(path: Path, wanted: str) -> bool:
    """Whether `path` was written with the settings `wanted` (JSON). Raises BadInput if it was written with others."""
    if not path.exists():
        return False
    import h5py
    try:
        with h5py.File(path) as file:
            had = json.loads(file["uns/settings"][()])
    except (OSError, KeyError, ValueError) as error:
        raise BadInput(f"{path} exists but is no split that data.py wrote ({error}); move or delete it") from None
    changed = [f"{k} {had.get(k)}, now {v}" for k, v in json.loads(wanted).items() if had.get(k) != v]
    if changed:
        raise BadInput(f"{path} was made with other settings ({'; '.join(changed)}); move or delete it, or set --out")
    return True


def to_screen(cells) -> Screen:
    """The Screen of a processed AnnData: contexts and treatments in alphabetical order, control first."""
    obs, genes = cells.obs.astype(str), cells.var_names.astype(str)
    contexts = sorted(set(obs["context"]))
    treatments = [cells.uns["control"], *sorted(set(obs["treatment"]) - {cells.uns["control"]})]
    shape = len(contexts), len(treatments)
    indices = obs["context"].map(contexts.index), obs["treatment"].map(treatments.index)
    condition = np.ravel_multi_index(indices, shape)
    order = np.argsort(condition, kind="stable")
    count = np.bincount(condition, minlength=shape[0] * shape[1])
    split = np.full(len(count), ABSENT)
    use = {"control": TRAIN, "train": TRAIN, "validation": VALIDATION, "test": TEST}
    split[condition] = obs["split"].map(use)
    values = cells.X[order] if isinstance(cells.X, np.ndarray) else cells.X[order].toarray()
    one_hot = (np.array(treatments)[:, None] == genes.to_numpy()).astype(np.float32)  # T D
    return Screen(values.astype(np.float32), (count.cumsum() - count).reshape(shape), count.reshape(shape),
                  np.stack([one_hot] * len(contexts)), split.reshape(shape),
                  tuple(genes), tuple(contexts), tuple(treatments), log_expression=True)


def load_screen(path: str | Path) -> Screen:
    """The Screen in a file that this script wrote. Raises BadInput if it is missing or another file."""
    cells = read(Path(path))
    if "settings" not in cells.uns:
        raise BadInput(f"{path}: not a split that data.py wrote; make one with `python data.py --h5ad {path}`")
    return to_screen(cells)


def load(settings: Settings):
    """Usable cells, control label and held-out context of the screen that the settings name."""
    file = settings.h5ad
    if settings.dataset in DOWNLOADS:
        file = file or download(settings.dataset, settings.data_dir)
        names = zip(("treatment_col", "control", "context_col"), DOWNLOADS[settings.dataset][1])
        settings = dataclasses.replace(settings, **{k: v for k, v in names if getattr(settings, k) is None})
    cells = simulate_toy(settings) if settings.dataset == "toy" else read(file)
    if cells.n_vars < settings.genes:
        raise BadInput(f"--genes {settings.genes}: the file has only {cells.n_vars} genes; lower --genes")
    control = label_cells(cells, settings)
    cells = usable_cells(cells, control, settings)
    conditions = [key for key in set(map(tuple, cells.obs.to_numpy())) if key[1] != control]
    return cells, control, choose_holdout(conditions, settings)


def prepare(settings: Settings) -> list[Path]:
    """Write the splits that are not there yet; returns the paths of all. Raises BadInput, as early as it can."""
    for name, least in {"genes": 2, "min_cells": 2, "context": 0, "splits": 1, "seed": 0}.items():
        if getattr(settings, name) < least:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be at least {least}")
    if settings.dataset is None and settings.h5ad is None or settings.dataset == "toy" and settings.h5ad:
        raise BadInput("say which data: either --dataset toy, melanoma or leukemia, or --h5ad FILE")
    if settings.h5ad is not None and not settings.h5ad.is_file():
        raise BadInput(f"--h5ad {settings.h5ad}: no such file")
    source = f"{settings.h5ad.name}, {settings.h5ad.stat().st_size} bytes" if settings.h5ad else settings.dataset
    folder = settings.out / settings.scale / "data" / (settings.name or settings.dataset or settings.h5ad.stem)
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # if nothing can be written here, fail before the work and not after it

    asked = ("treatment_col", "control", "context_col", "holdout_context", "log_transformed", "genes", "min_cells")
    wanted = {seed: json.dumps({"source": source, "seed": seed, **{name: getattr(settings, name) for name in asked}})
              for seed in range(settings.seed, settings.seed + settings.splits)}
    paths = {seed: folder / f"split-{seed}.h5ad" for seed in wanted}
    missing = [seed for seed in wanted if not finished(paths[seed], wanted[seed])]
    if missing:
        cells, control, holdout = load(settings)
    for seed, path in paths.items():
        if seed in missing:
            result = process(cells, control, holdout, settings, seed)
            result.uns["settings"] = wanted[seed]
            write(result, path)
        print(f"{path}: {'written' if seed in missing else 'finished, skipped'}", flush=True)
    return list(paths.values())


def main() -> None:
    """Prepare whatever the command line names."""
    settings = scales.parse(Settings, ("real",))
    print(f"{settings}\nrevision {scales.revision()}", flush=True)
    began = time.perf_counter()
    prepare(settings)
    print(f"{time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    scales.run(main)
