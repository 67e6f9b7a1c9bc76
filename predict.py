"""Predict knock-outs that were not measured, on a screen of your own, with a checkpoint that is trained already.

Beyond the paper (D57). Reads an `.h5ad` of counts, as data.py does, and a checkpoint; writes, all beside `--out`, an
`.h5ad` of real control cells and predicted ones, `-genes.csv` with what changes, and `-cells.png`. Nothing is trained.

    python predict.py screen.h5ad --validate                          what would be read as what, and stop
    python predict.py screen.h5ad --query STAT1 STAT3 --out predicted.h5ad
    python predict.py screen.h5ad --evaluate                          how good it is, on knock-outs that were measured
    python predict.py toy --evaluate --genes 20 --query gene03        an example without a file: simulated, not cells
or, in a notebook, on log-expression: `predict(control, experiments, query)`. The example takes a minute on two CPU
cores. 50,000 cells x 20,000 genes, an eighth of the values above zero, want 2.4 GB. scanpy, pertpy and
cell-eval (0.8.2) have read what is written.

Every predicted cell is a control cell of the file, as it would be under the knock-out (sample.py, "counterfactual"). Of
a checkpoint that was trained without --no-knock-out, such as one of the paper's form, it is a new cell. In each draw
other control cells are taken, and K other experiments of the same biological context; an experiment on a gene that is
not measured is of use too. In the table, p compares cells that a model has made with those that it has made them of:
the smaller the more cells, and no evidence. Nor is the share of draws, a spread, a probability.

    control    N D      control cells, natural log1p of normalised counts (equation 5)
    query      D        one-hot of the gene that is asked for
    K experiments   N cells of each in a draw   D genes in one pass: trained treatments, the query, and some of the G
"""

import dataclasses
import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm
from tyro.conf import Positional

import data
import judge
import labels
import metrics
import model
import sample
import scales
import tasks
from scales import BadInput
from tasks import CONTROL, KNOWN_ONLY, TRAIN, VALIDATION, Given, Screen

BOX = Path(__file__).parent / "checkpoints" / "screens.eqx"
SIMPLE = ("identity", "target-only", "system-mean", "target-gene")  # what --evaluate compares with
STEPS = 10  # Dopri5 steps, there and back
GUIDANCE = 2.0  # of new cells, where the checkpoint has none (A.4)
TO_EVALUATE = "a knock-out of a measured gene, and another one"
SHOWN = 4  # queries in the figure
MEANING = {"wasserstein": "distance of predicted cells from true ones", "mmd": "another such distance",
           "rmse": "error of a gene's mean", "pds": "is it this knock-out, or might it be another? 0.5: pure chance",
           "auprc": "which genes answer", "variance_rmse": "error of a gene's variance"}
ARROWS = {"lower": "↓", "higher": "↑", "one": "→ 1"}
ADDED = ("predicted", "control_cell")  # columns of the output's obs


@dataclass(frozen=True)
class Settings:
    """Predict knock-outs of a screen."""
    file: Positional[Path]  # .h5ad with raw counts, of controls and of knock-outs; or "toy"
    query: tuple[str, ...] = ()  # genes whose knock-out is wanted
    out: Path = Path("predicted.h5ad")  # other files have its name with another end
    checkpoint: Path = BOX  # of train.py
    validate: bool = False  # say what would be read as what, and stop
    evaluate: bool = False  # leave out each measured knock-out in turn, and compare with simple rules
    system: str | None = None  # biological context; by default the one with most knock-outs
    treatment_col: str | None = None  # column of obs that names the knocked-out gene; found by its usual names
    control: str | None = None  # its label for unperturbed cells, with or without a number; found by its usual names
    system_col: str | None = None  # column of obs with the biological context, or 'none'; found by its usual names
    layer: str | None = None  # of raw counts; by default X, a layer with a usual name, or .raw
    log_transformed: bool = False  # X is normalised and natural log1p already: skip both
    min_cells: int = 30  # fewest cells of a knock-out that is used
    genes: int | Literal["all"] = 100  # that are predicted: queries, knocked-out genes and those that answer most
    experiments: int | None = None  # K, of a draw, if there are as many; by default the most in training
    cells: int = 200  # control cells of a draw, each of which gives a predicted one
    draws: int = 5  # with other control cells and other experiments
    seed: int = 0


# ----------------------------------------------------------------------------------------------------- one prediction


def passes(genes: int, always: Int[np.ndarray, "a"], room: int) -> Iterator[Int[np.ndarray, "D"]]:
    """Which genes are given to the network together: those of `always`, and as many others as there is room for, until
    each has had its turn. All passes but the first repeat some genes, so that each has the same number."""
    others = np.setdiff1d(np.arange(genes), always)
    room = max(1, room - len(always))
    for first in range(0, max(1, len(others)), room):
        last = min(first + room, len(others))
        yield np.concatenate([always, others[max(0, last - room) : last]])


class Checkpoint(NamedTuple):
    """A trained network, and the header of its file."""
    head: dict
    network: eqx.Module

    @property
    def counterfactual(self) -> bool:
        """Was it told what no knock-out is?"""
        return self.head.get("no_knock_out", 0) > 0


def load_checkpoint(path: Path) -> Checkpoint:
    """Raises BadInput if there is none, or it is damaged."""
    if not path.is_file():
        raise BadInput(f"--checkpoint {path}: no such file; train.py writes model.eqx")
    return Checkpoint(*model.load_model(path))


def cells_of(checkpoint: Checkpoint, given: Given, *, key) -> Float[np.ndarray, "N G"]:
    """What becomes of each control cell of one task [no batch axis], of any number of genes; or, of a network that was
    not told what no knock-out is, new cells. Raises BadInput if its weights belong to more genes than there are."""
    head, network = checkpoint
    treated = np.flatnonzero(np.vstack([given.query[None], given.context_treatments]).any(axis=0))
    if not model.takes_any_genes(network) and not len(treated) <= head["genes"] <= len(given.query):
        raise BadInput(f"a network of {head['genes']} genes, neither more nor fewer: there are {len(given.query)}, "
                       f"{len(treated)} of them treated; --genes, or --experiments, or another --checkpoint")
    guidance = 1.0 if checkpoint.counterfactual else head.get("guidance") or GUIDANCE
    found = np.empty_like(given.controls)
    for genes in passes(len(given.query), treated, head["genes"]):
        task = Given(*(field[None][..., genes] for field in given))
        source = task.controls if checkpoint.counterfactual else None
        cells = sample.generate(network, task, guidance, STEPS, source=source, key=key)
        found[:, genes] = sample.clip_expression(cells, True)[0][0]
    return found


def draw_task(rng: np.random.Generator, control: Float[np.ndarray, "n G"],
              experiments: Mapping[str, Float[np.ndarray, "_ G"]], query: str, genes: list[str], context: int,
              cells: int) -> tuple[Given, Int[np.ndarray, "N"], list[str]]:
    """A draw: N = `cells` control cells, and K = `context` experiments besides that of the query, or all if there are
    fewer; and which control cells and experiments they are. Raises BadInput without experiments."""
    names = [name for name in experiments if name != query]
    if not names:
        raise BadInput(f"no knock-out besides {query}: there is no context to learn from")
    chosen = [names[i] for i in rng.permutation(len(names))[:context].tolist()]
    rows = tasks.draw(rng, len(control), cells)
    drawn = [experiments[name][tasks.draw(rng, len(experiments[name]), cells)] for name in chosen]
    treatments = np.array([[gene == name for gene in genes] for name in (query, *chosen)])
    given = Given(*map(np.float32, (control[rows], np.stack(drawn), treatments[1:], treatments[0])))
    return given, rows, chosen


def as_cells(name: str, values, genes: list[str]) -> Float[np.ndarray, "n G"]:
    """Cells as an array; of a table or AnnData, the columns of these genes. Raises BadInput for other genes, no cells,
    and what is no log-expression."""
    if hasattr(values, "to_df"):
        values = values.to_df()
    if hasattr(values, "columns"):
        columns = list(map(str, values.columns))
        missing = set(genes) - set(columns)
        if missing:
            raise BadInput(f"{name}: has no column {data.listed(sorted(missing))}")
        values = values.iloc[:, [columns.index(gene) for gene in genes]]
    try:
        values = values.toarray() if hasattr(values, "toarray") else np.asarray(values, float)
    except (TypeError, ValueError):
        raise BadInput(f"{name}: {type(values).__name__}, expected numbers, cells x genes") from None
    if values.ndim != 2 or values.shape[1] != len(genes) or not len(values):
        raise BadInput(f"{name}: shape {values.shape}, expected cells x {len(genes)} genes")
    if not ((values >= 0) & (values <= data.MOST_LOG)).all() or not (values % 1).any():
        raise BadInput(f"{name}: expected natural log1p of normalised counts: finite, not negative, at most "
                       f"{data.MOST_LOG:g}, not all whole")
    return values


def predict(control, experiments, query, genes=None, checkpoint=BOX, cells=200,
            seed=0) -> tuple[Float[np.ndarray, "N G"], Float[np.ndarray, "N G"]]:
    """N = `cells` control cells, or all, and what each would be if gene `query` were knocked out. `control`: n cells x
    G genes; `experiments`: cells of known knock-outs, by gene; what is no gene is an experiment all the same. All
    are natural log1p of normalised counts, as arrays, sparse matrices, tables or AnnData. Without `genes`, these have
    the names of the table's columns, or the numbers of the array's. `checkpoint`: a path, or a Checkpoint. Raises
    BadInput for a query that is no measured gene, for what cannot be meant, or without experiments."""
    for name, number in (("cells", cells), ("seed", seed)):
        if not isinstance(number, (int, np.integer)):
            raise BadInput(f"{name} {number}: expected a whole number")
        scales.check_number(name, int(number))
    if not isinstance(experiments, Mapping):
        raise BadInput(f"experiments: {type(experiments).__name__}, expected a dictionary of gene -> cells")
    if genes is None:
        width = (np.shape(control) or (0,))[-1]
        genes = getattr(control, "var_names", getattr(control, "columns", range(width)))
    genes = [str(gene) for gene in genes]
    if len(set(genes)) < len(genes):
        raise BadInput("genes: some names are there twice")
    upper = labels.by_upper_case(genes)
    asked = labels.gene_of(str(query), set(genes), upper)
    if asked is None:
        raise BadInput(f"{query}: not among the measured genes, and what is not measured cannot be asked for; it can "
                       "be an experiment of the context")
    control = as_cells("control", control, genes)
    known = {}
    for name, each in experiments.items():
        gene = labels.gene_of(str(name), set(genes), upper) or str(name)
        if gene in known:
            raise BadInput(f"experiments: several are knock-outs of {gene}; give their cells together")
        known[gene] = as_cells(str(name), each, genes)
    rng = scales.generator("sampling", seed)
    with jax.enable_x64(False):  # in a notebook it may be on: importing pertpy is enough
        loaded = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(Path(checkpoint))
        given, *_ = draw_task(rng, control, known, asked, genes, loaded.head["context"], min(cells, len(control)))
        return given.controls, cells_of(loaded, given, key=scales.key("sampling", seed))


# ------------------------------------------------------------------------------------------------- a screen in a file


def read(s: Settings):
    """Normalised cells of the genes that are predicted, of one biological context, with 'treatment' and the columns of
    the file in obs; the control label; and the genes that are asked for. Raises BadInput if something cannot be read,
    or is asked for in vain."""
    source = {"dataset": "toy"} if s.file == Path("toy") else {"h5ad": s.file}
    wanted = data.Settings(**source, treatment_col=s.treatment_col, control=s.control, system_col=s.system_col,
                           holdout_system=s.system, layer=s.layer, log_transformed=s.log_transformed,
                           min_cells=s.min_cells, unmeasured=True, genes=20 if "dataset" in source else 3)
    try:
        data.check(wanted)
        cells, control, system = data.load(wanted)
    except BadInput as error:  # of data.py, which has other names for two options
        raise BadInput(str(error).replace("--holdout-system", "--system").replace("--h5ad ", "")) from None
    for column in ADDED:
        if column in cells.obsm["file"]:
            raise BadInput(f"{s.file}: its obs has a column '{column}', which predict.py writes. Rename it; or, if "
                           "this is a prediction, give the file that it was made from: predicted cells show nothing")
    cells = data.part(cells, (cells.obs["system"] == system).to_numpy())
    upper, in_file = labels.by_upper_case(cells.var_names), dict(zip(cells.var["name_in_file"], cells.var_names))
    queries = []
    for word in s.query:
        gene = labels.gene_of(word, set(cells.var_names), upper) or in_file.get(word)
        if gene is None:
            raise BadInput(f"--query {word}: not among the {cells.n_vars} measured genes, and what is not measured "
                           f"cannot be asked for; the genes are called {data.listed(cells.var_names, 3)}")
        queries += [gene] if gene not in queries else []
    note = "normalised as given"
    if not s.log_transformed:
        note = f"median count {data.normalise(cells, np.ones(cells.n_obs, bool)):g}"
    cells.obs["use"] = TRAIN
    strength = data.rank_genes(cells, control)
    perturbed = set(cells.obs["treatment"]) - {control}
    first = [*queries, *(gene for gene in strength.index if gene in perturbed and gene not in queries)]
    order = [*first, *(gene for gene in strength.index if gene not in first)]
    kept = set(order if s.genes == "all" else order[: s.genes]) | set(queries)
    cells = cells[:, [gene for gene in cells.var_names if gene in kept]].copy()  # in the order of the file
    shown = cells.obs["treatment"].isin([control, *cells.var_names])
    cells.obs.loc[~shown, "use"] = KNOWN_ONLY  # experiments, which cannot be asked for
    # Peak memory: all cells are dense, and those that are drawn or predicted are there several times.
    gigabytes = 1 + 4e-9 * cells.n_vars * (cells.n_obs + 6 * len(queries) * s.draws * s.cells)
    if gigabytes > 1e-9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise BadInput(f"--genes {s.genes}, --draws {s.draws}, --cells {s.cells}: {cells.n_vars} genes of {cells.n_obs}"
                       f" cells, and what is drawn of them, want {gigabytes:.0f} GB of memory, which this machine has "
                       "not; ask for fewer")
    cells.uns |= {"normalisation": note, "system": system, "control": control}
    predicted = sorted(perturbed & set(cells.var_names))
    others = sorted(perturbed - set(strength.index))
    print(f"system '{system}': {(cells.obs['treatment'] == control).sum():,} control cells, {len(perturbed)} "
          f"knock-outs, {len(predicted)} of them of the {cells.n_vars} genes that are predicted: "
          f"{data.listed(predicted, 20)}; {note}; about {gigabytes:.1f} GB of memory")
    if others:
        print(f"  read as knock-outs of genes that are not measured: {data.listed(others, 100)}")
    for query in queries:
        if perturbed <= {query}:
            raise BadInput(f"no knock-out besides {query}: there is no context to learn from")
    return cells, control, queries


def announced(todo: list, unit: str) -> Iterator:
    """Each of `todo` in turn, with a bar; after the first, which also compiles, how long all take at most."""
    started = time.perf_counter()
    for number, each in enumerate(tqdm(todo, unit=f" {unit}")):
        yield each
        if number == 0:
            minutes = len(todo) * (time.perf_counter() - started) / 60
            tqdm.write(f"{len(todo)} {unit}: at most {minutes:.1f} minutes")


def pools(screen: Screen) -> dict[str, Float[np.ndarray, "_ G"]]:
    """Cells of each knock-out that is known in the one system of a screen."""
    known = np.flatnonzero(np.isin(screen.split[0], tasks.KNOWN))
    return {screen.treatment_names[t]: screen.pool(0, t) for t in known.tolist() if t != CONTROL}


def verdict(name: str, table: dict[str, dict]) -> str:
    """In words: is the prediction better in one metric than the best of the simple rules, on the same knock-outs?"""
    metric = metrics.METRICS[name]
    sign = -1 if metric.better == "higher" else 1
    best = min(SIMPLE, key=lambda row: sign * table[row][name])
    rows = []
    for row in ("prediction", best):
        file = {"meta": {"split": 0}, "metrics": table[row]}
        rows.append(judge.gather([file], name, lambda value: sign * value))
    item = judge.compare(*rows)
    if item["error"] is None:
        words = "one knock-out tells nothing"
    elif item["low"] > 0:
        words = f"better than '{best}'"
    elif item["high"] < 0:
        words = f"the rule '{best}' is better on your data; do not believe the prediction in this respect"
    else:
        words = f"cannot be told apart from '{best}', which is simpler"
    difference, error = item["difference"] * metric.factor, (item["error"] or 0) * metric.factor
    return f"{metric.heading:>14} {difference:+9.3f} ± {error:.3f}  {words} ({MEANING[name]})"


def evaluate(s: Settings, screen: Screen, checkpoint: Checkpoint, context: int) -> None:
    """Each measured knock-out of a predicted gene, held out in turn: metrics beside those of simple rules, and in words
    whether it is better than they are. All of them have had a say in which genes are predicted."""
    import baselines

    folds, found = tasks.folds(screen, 10**6), {}
    if not folds:
        raise BadInput(f"--evaluate: needs {TO_EVALUATE}")
    held_out = [fold.count[fold.split == VALIDATION].min() for fold in folds]
    cells = int(min(s.cells, screen.count[0, CONTROL], *held_out))  # none twice: a test would take it for two
    for number, fold in enumerate(announced(folds, "knock-outs")):
        e = tasks.evaluation_tasks(fold, cells, 0, s.seed, split=VALIDATION)
        e = e._replace(identity=e.given.controls)  # rules are applied to the cells that the network is applied to
        rng = scales.generator("evaluation", s.seed, number)
        name = fold.treatment_names[int(e.treatment[0])]
        given, *_ = draw_task(rng, e.given.controls[0], pools(fold), name, list(fold.genes), context, cells)
        given = given._replace(controls=e.given.controls[0])
        predicted = cells_of(checkpoint, given, key=scales.key("sampling", s.seed, number))
        found.setdefault("prediction", []).append(metrics.Predictions(
            e.given.controls, e.given.controls, e.target, predicted[None], e.given.query, e.true_means(fold),
            np.array(fold.systems)[e.system], True, {}))
        for row in SIMPLE:
            p = baselines.predict(row, baselines.make(row, "laptop", fold, rng), fold, e, rng)
            found.setdefault(row, []).append(p)
    table = {}
    for row, each in found.items():
        fields = {}
        for name in ("controls", "source", "target", "prediction", "treatments", "expected", "systems"):
            fields[name] = np.concatenate([getattr(p, name) for p in each])
        table[row] = metrics.evaluate(metrics.Predictions(**fields, log_expression=True, meta={}))
    shown = [name for name in metrics.METRICS if all(numbers[name] is not None for numbers in table.values())]
    fewest = f", as many as the smallest has (--min-cells {s.min_cells})" if cells == min(held_out) < s.cells else ""
    print(f"{len(folds)} knock-outs, each predicted from the others, {cells} cells{fewest}; all have had a say in "
          "which genes these are:")
    headings = [f"{metrics.METRICS[name].heading} {ARROWS[metrics.METRICS[name].better]}" for name in shown]
    print(f"{'':14}" + "".join(f"{heading:>16}" for heading in headings))
    for row, numbers in table.items():
        print(f"{row:14}" + "".join(f"{numbers[name] * metrics.METRICS[name].factor:16.3f}" for name in shown))
    print("against the best simple rule (positive: the prediction is better; ± standard error over knock-outs):")
    for name in shown:
        if metrics.METRICS[name].better != "one":  # no rule can be better or worse than the others in that alone
            print(verdict(name, table))


# -------------------------------------------------------------------------------------------------------- what is made


class Draw(NamedTuple):
    """Control cells, and what becomes of each."""
    rows: Int[np.ndarray, "N"]  # of all control cells
    before: Float[np.ndarray, "N G"]
    after: Float[np.ndarray, "N G"]
    experiments: list[str]  # of the context


def together(draws: list[Draw]) -> tuple[Float[np.ndarray, "n G"], Float[np.ndarray, "n G"]]:
    """Cells of all draws, before and after."""
    return np.concatenate([draw.before for draw in draws]), np.concatenate([draw.after for draw in draws])


def table_of(query: str, genes: list[str], draws: list[Draw]) -> list[dict]:
    """Genes by how strongly they answer, those that are called in most draws first: mean log2 fold change and median
    adjusted p over draws, and the share of draws in which a gene is called."""
    found = [metrics.differential_expression(draw.before[None], draw.after[None]) for draw in draws]
    p, change = np.stack([p[0] for p, _ in found]), np.stack([l[0] for _, l in found])  # draws G
    share = ((p < metrics.P_VALUE) & (np.abs(change) > metrics.FOLD_CHANGE)).mean(axis=0)
    p, change = np.median(p, axis=0), change.mean(axis=0)
    rows = []
    for i in np.lexsort((-np.abs(change), -share)).tolist():
        rows.append({"query": query, "gene": genes[i], "log2_fold_change": float(change[i]), "adjusted_p": float(p[i]),
                     "share_of_draws_called": float(share[i])})
    return rows


def figure(path: Path, found: dict[str, list[Draw]], screen: Screen) -> None:
    """Per query: predicted against control means, and a map of control, measured and predicted cells."""
    import drawing

    panels = []
    for query, draws in list(found.items())[:SHOWN]:
        controls, predicted = together(draws)
        before, after = controls.mean(axis=0).tolist(), predicted.mean(axis=0).tolist()
        panels.append(drawing.Panel(f"do({query}): means", "control", "predicted", before,
                                    {"equal": [before], "genes": [after]}))
        measured = np.concatenate([screen.pool(0, t)[:100] for t in range(1, len(screen.treatment_names))])
        points = {"measured knock-outs": measured, "control": controls, "prediction": predicted}
        points = {label: x[:: 1 + len(x) // 400] for label, x in points.items()}
        centre = controls.mean(axis=0)
        spread = np.concatenate([points["measured knock-outs"], points["control"]]) - centre
        plane = np.linalg.svd(spread, full_matrices=False)[2][:2].T
        points = {label: ((x - centre) @ plane).round(3).tolist() for label, x in points.items()}
        panels.append(drawing.Panel(f"do({query}): cells", "PC 1", "PC 2", points=points))
    content = {"panels": [panel._asdict() for panel in panels]}
    drawing.draw({"title": "Predicted knock-outs", "data": content}, "paper", path)


def annotated(found: dict[str, list[Draw]], controls, counterfactual: bool, made: dict):
    """All as an AnnData: control cells of the file that were drawn, then predicted ones, with the columns that the file
    has for the control cell that they were, but for those that name a knock-out; genes by the file's names and in its
    order. Control labels that differ in numbers only are one. `controls`: AnnData."""
    import anndata
    import pandas as pd

    column, original = controls.uns["treatment_col"], controls.obsm["file"]
    told = [name for name in original if name == column or name.lower() in data.TREATMENT_COLUMNS]
    original = original.astype(dict.fromkeys(told, str))
    drawn = np.unique(np.concatenate([draw.rows for draws in found.values() for draw in draws]))
    blocks, tables = [controls[drawn].to_df().to_numpy()], [original.iloc[drawn].assign(predicted=False)]
    tables[0][column] = controls.uns["control"]
    for query, draws in found.items():
        for number, draw in enumerate(draws):
            table = original.iloc[draw.rows].assign(predicted=True, control_cell=controls.obs_names[draw.rows])
            for name in told:
                table[name] = query
            if not counterfactual:
                table["control_cell"] = ""
            table.index = [f"{query}-{number}-{i}" for i in range(len(table))]  # a control cell can be drawn twice
            blocks.append(draw.after)
            tables.append(table)
    obs = pd.concat(tables)
    obs.index.name = original.index.name
    obs["control_cell"] = obs["control_cell"].fillna("")
    obs[told] = obs[told].astype("category")
    var = controls.var.set_index("name_in_file")
    var.index.name = None
    return anndata.AnnData(np.concatenate(blocks).astype(np.float32), obs, var, uns={"prediction": made})


def write_h5ad(cells, path: Path) -> None:
    """In memory, and then to the disk: where that is full, h5py would not only fail but crash."""
    import anndata
    import h5py

    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        anndata.io.write_elem(file, "/", cells)
    with scales.atomic(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def main() -> None:
    """Inspect, evaluate or predict."""
    s = scales.parse(Settings, lambda s: ())
    if not (s.query or s.validate or s.evaluate):
        raise BadInput("say what is wanted: --query GENE ..., --evaluate, or --validate")
    if s.out.suffix != ".h5ad":
        raise BadInput(f"--out {s.out}: expected a name that ends in .h5ad")
    if s.validate or not s.query:
        work(s)
    else:
        with scales.alone(s.out):  # from the start: of two that write the same, one would have worked in vain
            work(s)


def work(s: Settings) -> None:
    """What main does, once the place of the output is ours."""
    import pandas as pd

    table, picture = s.out.with_name(f"{s.out.stem}-genes.csv"), s.out.with_name(f"{s.out.stem}-cells.png")
    for path in (s.out, table, picture):
        if path.exists() and s.query and not s.validate:
            raise BadInput(f"{path}: is there already; move it away, or give another --out")
    checkpoint = load_checkpoint(s.checkpoint)
    cells, control, queries = read(s)
    screen = data.as_screen(cells, {"control": control, "title": "own screen", "section": "real"})
    if s.validate:
        print("the file can be used")
        if queries:
            print(f"can be asked for: {', '.join(queries)}")
        if not tasks.folds(screen, 10**6):
            print(f"but not --evaluate, which needs {TO_EVALUATE}")
        return
    context = s.experiments or checkpoint.head["context"]
    if s.evaluate:
        evaluate(s, screen, checkpoint, context)
    if not queries:
        return
    controls, found = cells[(cells.obs["treatment"] == control).to_numpy()].copy(), {}
    drawn = min(s.cells, controls.n_obs)  # none twice in a draw
    print(f"{len(queries)} knock-outs x {s.draws} draws of {drawn} cells and {cells.n_vars} genes", flush=True)
    todo = [(number, query, i) for number, query in enumerate(queries) for i in range(s.draws)]
    for number, query, i in announced(todo, "draws"):
        rng, key = (make("sampling", s.seed, number, i) for make in (scales.generator, scales.key))
        given, rows, experiments = draw_task(rng, screen.pool(0, CONTROL), pools(screen), query, list(screen.genes),
                                             context, drawn)
        after = cells_of(checkpoint, given, key=key)
        found.setdefault(query, []).append(Draw(rows, given.controls, after, experiments))
    rows = []
    for query, draws in found.items():
        rows += table_of(query, list(cells.var_names), draws)
    made = {"checkpoint": str(s.checkpoint), "weights": scales.checksum(s.checkpoint), "revision": scales.revision(),
            "normalisation": cells.uns["normalisation"], "system": cells.uns["system"], "control": control,
            "treatment_col": controls.uns["treatment_col"],
            "file": scales.checksum(s.file) if s.file.is_file() else str(s.file),
            "experiments": json.dumps({query: [draw.experiments for draw in found[query]] for query in queries}),
            "settings": json.dumps(dataclasses.asdict(s), default=str)}
    result = annotated(found, controls, checkpoint.counterfactual, made)
    write_h5ad(result, s.out)
    with scales.atomic(table) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)
    figure(picture, found, screen)
    print(f"{table.name}: the share of draws in which a gene is called is a spread, and no probability that it answers")
    if len(found) > SHOWN:
        print(f"{picture.name} shows the first {SHOWN} queries")
    print(f"{s.out}: {result.n_obs} cells x {result.n_vars} genes, and {table.name}, {picture.name}")


if __name__ == "__main__":
    scales.run(main)
