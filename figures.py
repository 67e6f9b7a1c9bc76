"""Stage 7 of 8, the figures: the numbers of each as JSON, and a picture drawn from that JSON alone.

Paper: Figures 1 to 6, appendices A.4 and D (`guidance` and `ode` have no figure there). Reads `prior/`, `data/`,
`train/` and `samples/` below out/<scale>, writes `figures/<name>.json` and `.png`; a missing input is `not_run` in the
JSON, with the reason. Departure: D49.

    python figures.py --scale smoke|laptop|paper       all of them: 1 / 6 min / not timed, on two CPU cores
    python figures.py overview split --scale laptop    some of them: seconds
A figure whose JSON has the same settings is only drawn again; delete the JSON to compute it anew. Its caption says what
is shown, and over what the spread is.

    unit     one held-out graph (linear SCMs), or one split and draw of cells (real cells)
    U units   P tasks   X values of what varies   S snapshots   K context experiments   N cells   D genes
"""

import csv
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.random as jr
import numpy as np
import tyro
from jaxtyping import Float
from tqdm import tqdm

import metrics
import sample
import scales
import train
from data import CONTROL, TEST, TRAIN, EvaluationTask, Screen, Task, load_screen, sample_tasks
from model import SLOTS, MapPFN
from prior import linear_screen, load_grn_screen
from scales import BadInput


@dataclass(frozen=True)
class Settings:
    """Compute the numbers of the figures, and draw them."""
    names: tyro.conf.Positional[tuple[str, ...]] = ()  # figures; none: all of them
    scale: str = "laptop"  # column of the table in scales.py
    seed: int = 0  # of everything random here
    guidance: float | None = None  # weight, where it is not what varies; default: as sample.py chose (Table 7)
    steps: int = 25  # Dopri5 steps, where they are not what varies [D9]
    screens: int = 2  # real screens that are sampled from, at most; leukemia comes first
    splits: int = 1  # of each of them (B.4)
    resamplings: int = 10  # draws of cells of each split (Figure 5b)
    graphs: int = 10  # held-out linear SCMs [D10]
    tasks: int = 100  # test conditions of each unit, at most
    cells: int = 200  # per population, given and generated, where they are not what varies (B.3)
    contexts: tuple[int, ...] = (0, 1, 2, 4, 8)  # Figure 5a: K, as far as there are experiments and slots
    multiples: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 6.0)  # Figure 5b: cells given / cells trained with
    most_cells: int = 400  # Figure 5b: and at most this many
    weights: tuple[float, ...] = sample.GUIDANCE  # of guidance (Table 7)
    subsets: int = 10  # Figure 3: of the genes (6)
    draws: int = 10  # Figure 3: of cells, of split 0
    snapshot_tasks: int = 64  # Figure 2: for each point
    smoothing: float = 0.95  # Figure 2: alpha of the moving average
    window: int = 5  # Figure 2: snapshots in the rolling standard deviation
    ode_steps: tuple[int, ...] = (5, 10, 20, 50)  # Dopri5 steps, compared with
    ode_reference: int = 100  # (released code)
    ode_tasks: int = 4  # of each model
    grns: int = 200  # Figure 6: of the prior
    out: Path = Path("out")  # everything is below out/<scale>


SECTIONS = ("evaluate", "figures")  # of the table of scales
METRICS = {"wasserstein": "W2 ↓ [squared units]", "rmse": "RMSE ↓", "pds": "PDS ↓", "auprc": "AUPRC ↑"}
STYLES = {  # of a curve: label, colour, marker, line
    "linear": ("MapPFN", "C0", "o", "-"), "mappfn-pretrained": ("pre-trained (zero-shot)", "C1", "^", "--"),
    "mappfn-finetuned": ("fine-tuned", "C3", "s", "-"), "identity": ("other control cells", "0.5", "", "-."),
}

# ----------------------------------------------------------------------------- what there is to predict, and with what


def screen_names(s: Settings) -> list[str]:
    """Screens that data.py has split, leukemia first, the toy last; the wide ones of Figure 3 are not among them."""
    names = {file.parent.name for file in (s.out / s.scale / "data").glob("*/split-0.h5ad")}
    return sorted((n for n in names if not n.endswith("-wide")), key=lambda n: (n != "leukemia", n == "toy", n))


def needed_screens(s: Settings) -> list[str]:
    """The same; raises BadInput if there is none."""
    if not (names := screen_names(s)):
        raise BadInput(f"no split of a screen in {s.out / s.scale / 'data'}; data.py makes them")
    return names


def split_file(s: Settings, name: str, split: int = 0, ending: str = "h5ad") -> Path:
    """What data.py wrote of a split."""
    return s.out / s.scale / "data" / name / f"split-{split}.{ending}"


def called(name: str) -> str:
    """An experiment's name in a picture."""
    return {"linear": "linear SCMs", "toy": "toy screen (simulated)"}.get(name, name)


def units(s: Settings, experiment: str, genes: int, cells: int,
          context: int) -> Iterator[tuple[int, int, Screen, EvaluationTask]]:
    """(split, seed for sampling, screen, tasks) of each unit; the tables' own tasks, where all sizes are theirs."""
    asked = sample.Settings(experiment, s.scale, s.seed, genes=genes, context=context, eval_cells=cells,
                            held_out=s.graphs, splits=s.splits, resamplings=s.resamplings, out=s.out)
    for split, draw, screen, tasks in sample.evaluation_sets(experiment, asked):
        for c in np.unique(tasks.context_index):
            seed = int(train.seeded(s.seed, split, draw, int(c)).integers(2**31))
            yield split, seed, screen, EvaluationTask(*(x[tasks.context_index == c] for x in tasks))


def limits(s: Settings, experiment: str, genes: int) -> tuple[int, int]:
    """Most context experiments that every test task can have, and cells of the smallest population it is made of."""
    if experiment == "linear":
        return min(SLOTS, genes - genes // 2), 500  # half of the treatments are test (B.4)
    contexts, cells = [SLOTS], []
    for screen in (load_screen(split_file(s, experiment, split)) for split in range(s.splits)):
        for c in np.flatnonzero((screen.split == TEST).any(axis=1)):
            contexts.append(int((screen.split[c, CONTROL + 1:] == TRAIN).sum()))
            cells.append(int(screen.count[c][screen.count[c] > 0].min()))
    return min(contexts), min(cells)


def model_file(s: Settings, experiment: str, row: str, split: int) -> Path:
    """Where the model of a row of the tables is."""
    files = sample.model_files(sample.Settings(experiment, s.scale, seeds=1, out=s.out), split)
    return files["mappfn-seed0" if row == "linear" else row]


def guidance_of(s: Settings, file: Path) -> float:
    """The weight that sample.py has chosen for this model; 2 (A.4) for one that it has not met."""
    record = file.with_name("guidance.json")
    chosen = json.loads(record.read_text())["guidance"] if record.is_file() else 2.0
    return chosen if s.guidance is None else s.guidance


def predict(s: Settings, model: MapPFN, tasks: Task, log_expression: bool, guidance: float, seed: int,
            at_once: int | None = None) -> Float[np.ndarray, "P N D"]:
    """Cells of each task as sample.py makes them, clipped; the same noise for the same seed."""
    cells = sample.generate(model, tasks, guidance, s.steps, s.cells, at_once, key=jr.key(seed))
    return sample.clip_expression(cells, log_expression)[0]


def scores(true: np.ndarray, predicted: np.ndarray, observed: np.ndarray, log_expression: bool) -> dict[str, float]:
    """METRICS of the P conditions that are predicted, the first of `true`; the others are rivals for PDS."""
    count, pairs = len(predicted), list(zip(true, predicted))
    ranks = metrics.pds_ranks(true, np.concatenate([predicted, true[count:]]))[:count]
    found = metrics.deg_auprc(observed[:count], true[:count], predicted) if log_expression else {"auprc": np.nan}
    return {"wasserstein": np.mean([metrics.wasserstein(*pair) for pair in pairs]), "pds": ranks.mean(),
            "rmse": np.mean([metrics.rmse(*pair) for pair in pairs]), "auprc": found["auprc"]}


def own_rng(s: Settings, number: int) -> np.random.Generator:
    """A generator that no other stage uses."""
    return train.seeded(s.seed, number, train.HELD_OUT + 10)


def prior_screen(s: Settings, head: dict) -> Screen:
    """The GRNs of the run with this header, with the same ones held out."""
    folder = s.out / s.scale / ("prior" + "-unpaired" * head["unpaired"])
    return load_grn_screen(folder, held_out=max(1, head["contexts"] // 50))


# ------------------------------------------------------------------------------------ overview, a real task (Figure 1)


def compute_overview(s: Settings) -> dict:
    """First test condition of split 0, as sample.py predicted it: nothing is chosen for its looks."""
    name = needed_screens(s)[0]
    file = s.out / s.scale / "samples" / name / "mappfn-finetuned-split0-draw0.npz"
    p = metrics.load_predictions(file)
    fields = {field.name for field in dataclasses.fields(sample.Settings)} - {"out"}
    asked = sample.Settings(**{k: v for k, v in p.meta["settings"].items() if k in fields}, out=s.out)
    _, _, screen, tasks = next(iter(sample.evaluation_sets(name, asked)))  # the file lacks the context experiments
    if not np.array_equal(tasks.target[0], p.target[0]):
        raise BadInput(f"{file}: not made from the present data; delete it and run sample.py again")
    do = lambda one_hot: f"do({screen.genes[int(np.flatnonzero(one_hot)[0])]})"
    cells = {"control": p.observed[0], "truth": p.target[0]}
    cells |= dict(zip(map(do, tasks.context_treatments[0]), tasks.context[0]))
    fitted = np.concatenate(list(cells.values()))
    _, spread, plane = np.linalg.svd(fitted - fitted.mean(axis=0), full_matrices=False)
    cells |= {"prediction": p.prediction[0]}
    return {"query": do(p.treatments[0]), "explained": (spread**2 / (spread**2).sum())[:2].tolist(),
            "cells": {k: ((x - fitted.mean(axis=0)) @ plane[:2].T).round(3).tolist() for k, x in cells.items()},
            "caption": f"One task ({called(name)}, first test condition of split 0): what the fine-tuned model is "
            f"given, and its prediction for another knock-out. {fitted.shape[1]} genes, {len(p.target[0])} cells a "
            "population, on the principal components of control, context and true cells; large symbols: means."}


def draw_overview(data: dict, axes: np.ndarray) -> None:
    """Controls, context experiments and query on the same plane."""
    cells = {k: np.array(v) for k, v in data["cells"].items()}
    context = [k for k in cells if k.startswith("do(")]
    looks = {"control": ("0.6", "o"), "truth": ("C0", "s"), "prediction": ("C3", "X")}
    looks |= {k: (f"C{i + 1}", "^vD<>ph*d8"[i % 10]) for i, k in enumerate(context)}
    everything = np.quantile(np.concatenate(list(cells.values())), [0, 1], axis=0)  # smallest and largest
    titles = "given: control cells", f"given: {len(context)} context experiments", f"asked: {data['query']}"
    for axis, title, shown in zip(axes.flat, titles, (["control"], context, ["truth", "prediction"])):
        for k in shown:
            axis.scatter(*cells[k].T, s=10, color=looks[k][0], marker=looks[k][1], alpha=0.4, lw=0)
        for k in dict.fromkeys(["control", *shown]):
            colour, marker = looks[k]
            axis.scatter(*cells[k].mean(axis=0), s=110, color=colour, marker=marker, label=k, ec="k", zorder=3)
        axis.set(title=title, xlabel=f"PC 1 [log expression], {data['explained'][0]:.0%} of variance",
                 ylabel=f"PC 2, {data['explained'][1]:.0%}",
                 xlim=everything[:, 0] + [-0.2, 0.2], ylim=everything[:, 1] + [-0.2, 0.2])
        axis.legend(fontsize=7, title="means", title_fontsize=7)


# --------------------------------------------------------------------------------------- the split as built (Figure 4)

USES = {"control": ("C", "0.88"), "train": ("Tr", "#9ecae1"), "validation": ("V", "#fdd870"), "test": ("Te", "#b2182b")}


def compute_split(s: Settings) -> dict:
    """Use and number of cells of each (context, treatment) of split 0, as data.py wrote them down."""
    matrices = {}
    for name in needed_screens(s):
        with open(split_file(s, name, ending="csv"), newline="") as file:
            rows = {(r["context"], r["treatment"]): (r["split"], int(r["cells"])) for r in csv.DictReader(file)}
        controls = {t for (_, t), (use, _) in rows.items() if use == "control"}
        treatments = sorted({t for _, t in rows}, key=lambda t: (t not in controls, t))
        contexts = sorted({c for c, _ in rows})
        matrices[name] = {"contexts": contexts, "treatments": treatments,
                          "conditions": [[rows.get((c, t), ("", 0)) for t in treatments] for c in contexts]}
    return {"screens": matrices, "caption": "What each condition, a context (row) under a treatment (column), is used "
            "for in split 0, and its number of cells. Half of one context's treatments are held out. Empty: no data."}


def draw_split(data: dict, axes: np.ndarray) -> None:
    """A matrix for each screen."""
    for axis, (name, m) in zip(axes.flat, data["screens"].items()):
        for i, j in np.ndindex(len(m["contexts"]), len(m["treatments"])):
            use, cells = m["conditions"][i][j]
            if use:
                axis.fill_between([j - 0.48, j + 0.48], i - 0.46, i + 0.46, color=USES[use][1], lw=0)
                axis.text(j, i, USES[use][0] + (f"\n{cells}" if len(m["treatments"]) < 25 else ""), ha="center",
                          va="center", fontsize=7, color="w" if use == "test" else "k")
        axis.set_xticks(range(len(m["treatments"])), m["treatments"], rotation=40, ha="right", fontsize=7)
        axis.set_yticks(range(len(m["contexts"])), m["contexts"], fontsize=7)
        axis.set(title=called(name), xlabel="treatment", ylabel="context",
                 xlim=(-0.5, len(m["treatments"]) - 0.5), ylim=(len(m["contexts"]) - 0.5, -0.5))
    handles = [axes.flat[0].fill_between([], [], color=colour, label=f"{letter}: {use}")
               for use, (letter, colour) in USES.items()]
    axes.flat[0].figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)


# ---------------------------------------------------------------------------- variances during pre-training (Figure 2)


def variance_correlation(true: Float[np.ndarray, "N D"], predicted: Float[np.ndarray, "M D"]) -> float:
    """Pearson correlation over genes of the variances over cells; NaN where all genes of one side vary equally."""
    a, b = true.var(axis=0, dtype=float), predicted.var(axis=0, dtype=float)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else float("nan")


def compute_variance(s: Settings) -> dict:
    """Every snapshot of both runs, on held-out GRNs of its own prior and on real test conditions, zero-shot."""
    curves, names = [], screen_names(s)[: s.screens]
    for run in ("paired", "unpaired"):
        folder = s.out / s.scale / "train" / f"grn{'-unpaired' * (run == 'unpaired')}-seed0" / "snapshots"
        files = sorted(folder.glob("update-*.eqx"), key=lambda file: int(file.stem.split("-")[1]))
        if not files:
            raise BadInput(f"{folder}: no snapshots; train.py grn --snapshots 12 makes them (the unpaired: --unpaired)")
        head, _ = train.load_model(files[0])
        seen = [int(file.stem.split("-")[1]) * head["micro_batch"] * head["accumulate"] for file in files]
        for i, place in enumerate(["prior", *names]):
            screen = load_screen(split_file(s, place)) if i else prior_screen(s, head)
            most = limits(dataclasses.replace(s, splits=1), place, 0)[0] if i else SLOTS
            tasks = sample_tasks(own_rng(s, i), screen, s.snapshot_tasks, s.cells, min(head["context"], most), TEST)
            values = []
            for file in tqdm(files, unit="snapshot", desc=f"variance: {run}, {place}"):
                # [D49] paper: silent; here: weight 1, since guidance changes the variances.
                cells = predict(s, train.load_model(file)[1], tasks, True, 1.0, s.seed, head["cells"])
                values.append([variance_correlation(*pair) for pair in zip(tasks.target, cells)])  # S P
            curves.append({"run": run, "place": place, "tasks": seen, "values": values,
                           "mean": np.nanmean(values, axis=1).tolist()})
    return {"curves": curves, "smoothing": s.smoothing, "window": s.window, "caption":
            "Correlation over genes of the variances of predicted and true cells during pre-training; dashed: held-out "
            f"GRNs of the run's own prior, solid: real cells, zero-shot. Points: mean of {s.snapshot_tasks} tasks of "
            f"{s.cells} cells, the same for all points; curves: moving average (alpha {s.smoothing}); band: standard "
            f"deviation of {s.window} neighbouring points, which says nothing about other runs."}


def smooth(values: Float[np.ndarray, "S"], weight: float,
           window: int) -> tuple[Float[np.ndarray, "S"], Float[np.ndarray, "S"]]:
    """Exponential moving average that starts from the first value, and standard deviation in a centred window."""
    average = [values[0]]
    for value in values[1:]:
        average.append(weight * average[-1] + (1 - weight) * value)
    around = [values[max(0, i - window // 2): i + window // 2 + 1] for i in range(len(values))]
    return np.array(average), np.array([x.std(ddof=1) if len(x) > 1 else 0.0 for x in around])


def draw_variance(data: dict, axes: np.ndarray) -> None:
    """A panel for each place."""
    for c in data["curves"]:
        axis = axes.flat[list(dict.fromkeys(c["place"] for c in data["curves"])).index(c["place"])]
        colour, marker = {"paired": ("C0", "o"), "unpaired": ("C1", "^")}[c["run"]]
        x, y = np.array(c["tasks"]), np.array(c["mean"], float)
        average, sd = smooth(y, data["smoothing"], data["window"])
        axis.fill_between(x, average - sd, average + sd, color=colour, alpha=0.2, lw=0)
        axis.plot(x, y, marker, color=colour, ms=4, mfc="none", alpha=0.7)
        within = c["place"] == "prior"
        axis.plot(x, average, color=colour, marker=marker, ms=4, markevery=[-1], ls="--" if within else "-",
                  label=f"{c['run']} prior")
        axis.set(title="held-out GRNs of its own prior" if within else f"{called(c['place'])}, zero-shot",
                 xlabel="training tasks seen", ylabel="correlation of variances ↑")
        axis.legend(frameon=False, fontsize=8)


# ----------------------------------------------------------------------------------- test-time augmentation (Figure 3)

WAYS = {"single": "single passes", "thinned": "augmented,\nas many cells", "augmented": "augmented,\nall cells"}


def tta_unit(s: Settings, file: Path, seed: int, tasks: EvaluationTask) -> dict[str, float]:
    """AUPRC of each way to predict one unit, and of the rules without a model."""
    head, model = train.load_model(file)
    context, genes = tasks.context.shape[1], tasks.query.shape[1]
    fewest = -(-(genes - context - 1) // (head["genes"] - context - 1))  # subsets that reach all genes
    predicted: dict[str, list] = {way: [] for way in WAYS}
    for i in range(len(tasks.query)):
        task = Task(*(x[i] for x in tasks[: len(Task._fields)]))
        # With equal seeds the few subsets are the first of the many, with the same noise: a paired comparison.
        single, pooled = (sample.augmented(model, task, head["genes"], n, np.random.default_rng([seed, i]),
                                           guidance_of(s, file), s.steps, head["cells"],
                                           key=jr.fold_in(jr.key(seed), i))
                          for n in (fewest, s.subsets))
        for way, cells in zip(WAYS, (single[: s.cells], pooled[: s.cells], pooled)):
            predicted[way].append(sample.clip_expression(cells[None], True)[0][0])
    result = {}
    for way, cells in predicted.items():
        cells = np.stack([c[: min(map(len, cells))] for c in cells])  # the rarest gene's cells may differ between tasks
        found = metrics.deg_auprc(tasks.observed, tasks.target, cells, tasks.query)
        result |= {way: found["auprc"], "treated gene only": found["target_only"], "random": found["base_rate"]}
    return result


def compute_tta(s: Settings) -> dict:
    """AUPRC on more genes than the pre-trained model has (6)."""
    results, s = {}, dataclasses.replace(s, splits=1, resamplings=s.draws)
    for name in needed_screens(s)[: s.screens]:
        wide = f"{name}-wide"
        if not split_file(s, wide).is_file():
            raise BadInput(f"{split_file(s, wide)}: missing; data.py --name {wide} with twice the --genes makes it")
        file = model_file(s, name, "mappfn-pretrained", 0)
        head, _ = train.load_model(file)
        context = min(head["context"], limits(s, wide, 0)[0])
        values = [tta_unit(s, file, seed, EvaluationTask(*(x[: s.tasks] for x in tasks))) for _, seed, _, tasks
                  in tqdm(list(units(s, wide, 0, s.cells, context)), unit="unit", desc=f"tta: {name}")]
        genes = len(load_screen(split_file(s, wide)).genes)
        results[name] = {"values": values, "genes": [head["genes"], genes]}
    sizes = "; ".join(f"{called(n)}: {r['genes'][1]} genes, model of {r['genes'][0]}, n = {len(r['values'])} draws "
                      "of cells" for n, r in results.items())
    return {"screens": results, "caption":
            f"Recovery of differentially expressed genes, zero-shot, on more genes than the model has ({sizes}; up to "
            f"{s.tasks} test conditions each, {s.cells} true cells). Single passes: the fewest random subsets of genes "
            f"that reach all; augmented: {s.subsets} subsets, overlapping, pooled gene by gene. More cells alone make "
            "the test for expression more sensitive, hence also with as many as in one pass. Thin lines: n; bars: sd."}


def draw_tta(data: dict, axes: np.ndarray) -> None:
    """The ways side by side, units as lines, and two rules that need no model."""
    for axis, (name, result) in zip(axes.flat, data["screens"].items()):
        found = {k: np.array([unit[k] for unit in result["values"]], float) for k in result["values"][0]}
        ways = np.array([found[way] for way in WAYS])  # 3 U
        ways = ways[:, np.isfinite(ways).all(axis=0)]  # undefined where no gene changes in truth
        axis.plot(range(3), ways, "-", color="0.65", lw=0.8, marker=".", ms=4)
        if ways.size:
            sd = ways.std(axis=1, ddof=1) if ways.shape[1] > 1 else None
            axis.errorbar(range(3), ways.mean(axis=1), sd, fmt="D", color="C0", capsize=4, ms=7, label="mean ± sd")
            for rule, line in (("treated gene only", "--"), ("random", ":")):
                axis.axhline(np.nanmean(found[rule]), color="k", ls=line, lw=1, label=rule)
        axis.set_xticks(range(3), WAYS.values())
        axis.set(title=f"{called(name)}: {result['genes'][1]} genes, model of {result['genes'][0]}", ylabel="AUPRC ↑",
                 xlim=(-0.4, 2.4), ylim=(0, None))
        axis.legend(frameon=False, fontsize=8)


# -------------------------------- one thing varies, all else stays: context, cells (Figure 5), guidance (A.4, Table 7)

SWEEPS = {  # label of the axis, metrics
    "context": ("context experiments K given", ("wasserstein", "pds")),
    "cells": ("cells given per population", ("wasserstein", "pds")), "guidance": ("guidance weight", tuple(METRICS)),
}


def sweep(s: Settings, what: str) -> dict:
    """Scores of every model for each value of what varies; `values` are [U, X] for each row and metric."""
    experiments, heads = {}, {}
    for experiment in ["linear", *screen_names(s)[: s.screens]]:
        rows = ("linear",) if experiment == "linear" else ("mappfn-pretrained", "mappfn-finetuned")
        for row in rows:  # a missing model shows before the long work
            heads[experiment] = rows, train.load_model(model_file(s, experiment, row, 0))[0]
    for experiment, (rows, head) in heads.items():
        most_context, population = limits(s, experiment, head["genes"])
        most, context = min(s.most_cells, population), min(head["context"], most_context)
        x = {"context": [k for k in s.contexts if k <= most_context], "guidance": list(s.weights),
             "cells": sorted({min(most, max(2, round(m * head["cells"]))) for m in s.multiples})}[what]
        # The tasks have enough for the largest value; smaller ones get their first experiments and cells.
        cells, most_context = max(s.cells, *x) if what == "cells" else s.cells, max(x) if what == "context" else context
        found = list(units(s, experiment, head["genes"], cells, most_context))
        results = [sweep_unit(s, experiment, rows, what, x, context, unit)
                   for unit in tqdm(found, unit="unit", desc=f"{what}: {experiment}")]
        values = {row: {m: [[point[m] for point in result[row]] for result in results] for m in SWEEPS[what][1]}
                  for row in (*rows, "identity")}
        experiments[experiment] = {"x": x, "trained": {"context": head["context"], "cells": head["cells"]}.get(what),
                                   "chosen": {row: guidance_of(s, model_file(s, experiment, row, 0)) for row in rows},
                                   "tasks": min(s.tasks, len(found[0][3].query)), "values": values}
    sizes = "; ".join(f"{called(e)}: n = {len(block['values']['identity']['pds'])} "
                      f"{'graphs' if e == 'linear' else 'splits and draws'}, {block['tasks']} test conditions each"
                      for e, block in experiments.items())
    return {"what": what, "experiments": experiments, "caption":
            f"Performance against {SWEEPS[what][0]} ({sizes}). All points have the same tasks, noise and true cells "
            f"({s.cells} a condition). Bars: standard deviation over n after each one's mean level was taken out, "
            "which all points share. " + ("1 is no guidance; ring: chosen on validation tasks." if what == "guidance"
                                          else "Vertical line: as in training.")}


def sweep_unit(s: Settings, experiment: str, rows: tuple[str, ...], what: str, x: list, context: int,
               unit: tuple[int, int, Screen, EvaluationTask]) -> dict[str, list[dict]]:
    """Row -> scores at each of `x`, for one unit."""
    split, seed, screen, tasks = unit
    true, observed, log = tasks.target[:, : s.cells], tasks.observed[:, : s.cells], screen.log_expression
    result = {"identity": [scores(true, tasks.identity[: s.tasks, : s.cells], observed, log)] * len(x)}
    given = Task(*(field[: s.tasks] for field in tasks[: len(Task._fields)]))
    for row in rows:
        file, result[row] = model_file(s, experiment, row, split), []
        (head, model), guidance = train.load_model(file), guidance_of(s, file)
        at_once = None if what == "cells" else head["cells"]  # the figure that asks what more do [D50]
        for value in x:
            k, n = value if what == "context" else context, value if what == "cells" else s.cells
            some = given._replace(observed=given.observed[:, :n], context=given.context[:, :k, :n],
                                  context_treatments=given.context_treatments[:, :k])
            cells = predict(s, model, some, log, float(value) if what == "guidance" else guidance, seed, at_once)
            result[row].append(scores(true, cells, observed, log))
    return result


def draw_sweep(data: dict, axes: np.ndarray) -> None:
    """A row of panels for each experiment, a column for each metric, a curve for each model."""
    label, shown = SWEEPS[data["what"]]
    for row, (experiment, block) in zip(axes, data["experiments"].items()):
        for axis, metric in zip(row, shown):
            for line, values in block["values"].items():
                name, colour, marker, style = STYLES[line]
                found = np.array(values[metric], float)  # U X
                found = found[np.isfinite(found).all(axis=1)]
                if not len(found):
                    continue
                # Taking the level out makes a standard deviation too small by sqrt((X - 1) / X) (Morey, 2008).
                free, points = found - found.mean(axis=1, keepdims=True), found.shape[1]
                sd = free.std(axis=0, ddof=1) * np.sqrt(points / max(1, points - 1)) if len(found) > 1 else None
                axis.errorbar(block["x"], found.mean(axis=0), None if line == "identity" else sd, color=colour,
                              marker=marker, ls=style, capsize=3, ms=5, label=name)
                if data["what"] == "guidance" and block["chosen"].get(line) in block["x"]:
                    chosen = block["x"].index(block["chosen"][line])
                    axis.plot(block["x"][chosen], found.mean(axis=0)[chosen], "o", ms=12, mec="k", mfc="none")
            if not axis.has_data():  # AUPRC of SCM values, or where no gene changes
                axis.set_axis_off()
                axis.text(0.5, 0.5, f"{METRICS[metric][:-2]} is not defined for\n{called(experiment)}", ha="center")
                continue
            if block["trained"] is not None:
                axis.axvline(block["trained"], color="k", ls=(0, (1, 2)), lw=1, label="as in training")
            if data["what"] == "cells":
                axis.set_xscale("log")
            axis.set_xticks(block["x"], [f"{x:g}" for x in block["x"]])
            axis.minorticks_off()
            axis.set(title=called(experiment), xlabel=label, ylabel=METRICS[metric])
        row[0].legend(fontsize=7)


# --------------------------------------------------------------------------------------------- error of the ODE solver


def compute_ode(s: Settings) -> dict:
    """Largest and root-mean-square difference of all values from a finer solution, for the same noise, unclipped."""
    curves, steps = {}, [n for n in s.ode_steps if n < s.ode_reference]
    for run, title in (("linear-seed0", "linear SCMs"), ("grn-seed0", "GRNs")):
        head, model = train.load_model(s.out / s.scale / "train" / run / "model.eqx")
        linear = lambda: linear_screen(own_rng(s, 100), 2, head["genes"], s.cells, held_out=2)
        screen = linear() if title == "linear SCMs" else prior_screen(s, head)
        tasks = sample_tasks(own_rng(s, 101), screen, s.ode_tasks, s.cells, head["context"], TEST)
        cells = {n: sample.generate(model, tasks, s.guidance or 2.0, n, key=jr.key(s.seed)).astype(float)
                 for n in tqdm([s.ode_reference, *steps], unit="setting", desc=f"ode: {title}")}
        error = [np.abs(cells[n] - cells[s.ode_reference]) for n in steps]
        curves[title] = {"largest": [e.max(axis=(1, 2)).tolist() for e in error],  # X P
                         "root mean square": [np.sqrt((e**2).mean(axis=(1, 2))).tolist() for e in error]}
    return {"curves": curves, "steps": steps, "caption":
            f"Difference from the cells that {s.ode_reference} Dopri5 steps make of the same noise, by evaluations "
            f"of the network (six a step, and one); {s.ode_tasks} tasks, {s.cells} cells, guidance "
            f"{s.guidance or 2:g}. Largest of a task's values and root mean square of them: mean, smallest and largest over tasks."}


def draw_ode(data: dict, axes: np.ndarray) -> None:
    """Both errors of each model on logarithmic axes."""
    evaluations = [6 * n + 1 for n in data["steps"]]
    for axis, (title, errors) in zip(axes.flat, data["curves"].items()):
        for (name, values), colour, style in zip(errors.items(), ("C3", "C0"), ("s-", "o--")):
            y = np.maximum(np.array(values), 1e-9)  # X P
            spread = [y.mean(axis=1) - y.min(axis=1), y.max(axis=1) - y.mean(axis=1)]
            axis.errorbar(evaluations, y.mean(axis=1), spread, fmt=style, color=colour, capsize=3, label=name)
        axis.set(xscale="log", yscale="log", title=title, xlabel="evaluations of the network (steps)",
                 ylabel=f"difference [{'log expression' if title == 'GRNs' else 'sd of a variable'}]")
        axis.set_xticks(evaluations, [f"{e}\n({n})" for e, n in zip(evaluations, data["steps"])])
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=8)


# ------------------------------------------------------------------------------------ coverage of the prior (Figure 6)


def densities(screen: Screen, contexts: int | None) -> dict:
    """Histograms of non-zero expression and of each treatment's fold change of each gene, in the first contexts."""
    cells, changes = [], []
    for c, t in np.argwhere(screen.count[:contexts] > 0):
        first, last = screen.start[c], screen.start[c] + screen.count[c]
        control, treated = (screen.cells[first[i]: last[i]] for i in (CONTROL, t))
        cells.append(treated.ravel())
        if t != CONTROL:
            changes.append(metrics.differential_expression(control[None], treated[None])[1][0])
    cells, changes = np.concatenate(cells), np.concatenate(changes)
    result = {"zeros": np.mean(cells == 0), "small": np.mean(np.abs(changes) <= metrics.FOLD_CHANGE),
              "beyond": np.mean(np.abs(changes) > 5)}
    for name, values, bins in (("expression", cells[cells > 0], np.linspace(0, 7, 36)),
                               ("change", changes, np.linspace(-5, 5, 51))):
        counts, _ = np.histogram(values, bins)
        density = counts / max(1, len(values)) / np.diff(bins)
        result[name] = {"bins": bins.round(6).tolist(), "density": density.tolist()}
    return result


def compute_coverage(s: Settings) -> dict:
    """The GRN prior and every screen."""
    found = {"GRN prior": densities(load_grn_screen(s.out / s.scale / "prior"), s.grns)}
    for name in screen_names(s):
        found[called(name)] = densities(load_screen(split_file(s, name)), contexts=None)
    return {"distributions": found, "caption": f"The prior (at most {s.grns} GRNs) and the screens: log expression of "
            "genes in single cells where it is not zero (legend: share of zeros), and log2 fold change of each gene "
            f"by each knock-out (legend: share up to {metrics.FOLD_CHANGE}; beyond 5 a gene falls silent, or awakes)."}


def draw_coverage(data: dict, axes: np.ndarray) -> None:
    """The prior as a grey area, screens as lines."""
    labels = "log expression, zeros left out", "log2 fold change against control"
    for axis, name, quantity in zip(axes.flat, ("expression", "change"), labels):
        for i, (title, d) in enumerate(data["distributions"].items()):
            shares = f"{d['zeros']:.0%} zeros", f"{d['small']:.0%} up to ±0.2, {d['beyond']:.0%} beyond ±5"
            look = {"color": f"C{i - 1}", "lw": 1.8, "ls": ("-", "--", ":")[(i - 1) % 3]} if i else {"color": "0.8"}
            label = f"{title}: {shares[name == 'change']}"
            axis.stairs(d[name]["density"], d[name]["bins"], label=label, fill=i == 0, **look)
        axis.set(xlabel=quantity, ylabel="density", yscale="linear" if name == "expression" else "log")
        axis.set_ylim(top=axis.get_ylim()[1] * (1.25 if name == "expression" else 6))  # room for the legend
        axis.legend(frameon=False, fontsize=8, loc="upper right" if name == "expression" else "upper center")


# ----------------------------------------------------------------------------------------------------------- the stage


class Figure(NamedTuple):
    """How a figure is made: `shape` has the rows and columns of its panels, `size` the inches of one."""
    title: str
    compute: Callable[[Settings], dict]
    draw: Callable[[dict, np.ndarray], None]
    shape: Callable[[dict], tuple[int, int]]
    size: tuple[float, float] = (3.9, 3.3)


def sweep_shape(data: dict) -> tuple[int, int]:
    """Experiments, metrics."""
    return len(data["experiments"]), len(SWEEPS[data["what"]][1])


FIGURES = {
    "overview": Figure("Figure 1. A task on real cells", compute_overview, draw_overview, lambda d: (1, 3)),
    "split": Figure("Figure 4. Split as built", compute_split, draw_split, lambda d: (len(d["screens"]), 1), (9, 2)),
    "variance": Figure("Figure 2. Paired and unpaired prior", compute_variance, draw_variance,
                       lambda d: (1, len({c["place"] for c in d["curves"]}))),
    "tta": Figure("Figure 3. Test-time augmentation", compute_tta, draw_tta, lambda d: (1, len(d["screens"])), (5, 4)),
    "context": Figure("Figure 5a. More context experiments", lambda s: sweep(s, "context"), draw_sweep, sweep_shape),
    "cells": Figure("Figure 5b. More cells", lambda s: sweep(s, "cells"), draw_sweep, sweep_shape),
    "guidance": Figure("Guidance", lambda s: sweep(s, "guidance"), draw_sweep, sweep_shape, (3, 2.7)),
    "ode": Figure("Error of the ODE solver", compute_ode, draw_ode, lambda d: (1, len(d["curves"]))),
    "coverage": Figure("Figure 6. Coverage of the prior", compute_coverage, draw_coverage, lambda d: (1, 2), (5, 3.4)),
}


def finished(path: Path, settings: dict, screens: list[str]) -> bool:
    """Whether the numbers are there, of all these screens. Raises BadInput if they were made with other settings."""
    document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"not_run": "yet"}
    if "not_run" in document or document["screens"] != screens:
        return False
    then, now = document["settings"], json.loads(json.dumps(settings))
    if changed := [f"{k}: {then.get(k)}, now {now.get(k)}" for k in sorted(then | now) if then.get(k) != now.get(k)]:
        raise BadInput(f"{path} has other settings ({'; '.join(changed)}): move it away or give another --out")
    return True


def write(name: str, s: Settings, settings: dict, path: Path) -> None:
    """Compute a figure and write its JSON; a missing input is written down as the reason why it was not run."""
    start, document = time.perf_counter(), {"title": FIGURES[name].title}
    try:
        data = FIGURES[name].compute(s)
        document |= {"caption": data.pop("caption"), "settings": settings, "screens": screen_names(s), "revision":
                     scales.revision(), "seconds": round(time.perf_counter() - start, 1), "data": data}
    except BadInput as error:
        document |= {"not_run": str(error)}
    text = json.dumps(document, default=float)  # NumPy's scalars
    with scales.atomic(path) as temporary:  # JSON has no NaN
        temporary.write_text(json.dumps(json.loads(text, parse_constant=lambda _: None)) + "\n", encoding="utf-8")


def draw(name: str, document: dict, scale: str, path: Path) -> None:
    """Draw a figure from the content of its JSON."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import PIL.Image

    figure, data = FIGURES[name], document["data"]
    (rows, columns), (width, height) = figure.shape(data), figure.size
    canvas, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows + 0.4), layout="constrained",
                                squeeze=False)
    figure.draw(data, axes)
    canvas.suptitle(figure.title + ("" if scale == "paper" else f" ({scale} scale, not the paper's)"), fontsize=10)
    with scales.atomic(path) as temporary:
        canvas.savefig(temporary, dpi=100, format="png")
        with PIL.Image.open(temporary) as picture:  # 128 colours are enough, and a third of the size
            picture.convert("RGB").quantize(128).save(temporary, format="png", optimize=True)
    plt.close(canvas)


def main() -> None:
    """Compute what is not there yet, and draw all that was asked for."""
    s = scales.parse(Settings, [name for name in SECTIONS if name in scales.TABLE])
    if unknown := sorted(set(s.names) - FIGURES.keys()):
        raise BadInput(f"{', '.join(unknown)}: no such figure; there are {', '.join(FIGURES)}")
    train.use_all_cores(2)
    settings = {k: v for k, v in dataclasses.asdict(s).items() if k not in ("names", "out")}
    print(f"figures.py {json.dumps(settings)}, revision {scales.revision()}, {jax.device_count()} x "
          f"{jax.devices()[0].device_kind}; all take 1 minute at smoke, 6 at laptop scale on two cores", flush=True)
    for name in s.names or FIGURES:
        path = s.out / s.scale / "figures" / f"{name}.json"
        if not finished(path, settings, screen_names(s)):
            write(name, s, settings, path)
        document = json.loads(path.read_text(encoding="utf-8"))
        if "not_run" in document:
            path.with_suffix(".png").unlink(missing_ok=True)  # of numbers that are gone
            print(f"{path}: not run: {document['not_run']}", flush=True)
            continue
        draw(name, document, s.scale, path.with_suffix(".png"))
        print(f"{path.with_suffix('.png')}: its numbers took {document['seconds']} s", flush=True)


if __name__ == "__main__":
    scales.run(main)
