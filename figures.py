"""Stage 7 of 8, the figures: the numbers of each as JSON, and a picture drawn from that JSON alone.

Paper: Figures 1 to 6, appendices A.4 and D (`prediction`, `guidance` and `ode` have no figure there). Reads `screens/`,
`train/` and `samples/` below out/<scale>, writes `figures/<name>.json` and `.png`; a missing input is `not_run` in the
JSON, with the reason. What is shown is what there is: the screens that sample.py predicted, by the models of ROWS.

    python figures.py --scale smoke|laptop|paper       all of them: 1 / 6 min / not timed, on two CPU cores
    python figures.py overview split --scale laptop    some of them: seconds
A figure whose JSON has the same settings and screens is only drawn again; delete the JSON to compute it anew. `caption`
says what is shown and over what the spread is, `evidence` holds the differences that a claim of the paper rests on.
Departure: D49.

    unit     one held-out system in one split and draw of cells
    U units   P tasks   X values of what varies   M snapshots   K context experiments   N cells   D genes
"""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import matplotlib.figure
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import tyro
from jaxtyping import Float, PRNGKeyArray
from tqdm import tqdm

import metrics
import model
import sample
import scales
import tasks
import train
from scales import BadInput
from tasks import CONTROL, TEST, TRAIN, VALIDATION, Evaluation, Given, Screen


@dataclass(frozen=True)
class Settings:
    """Compute the numbers of the figures, and draw them."""
    names: tyro.conf.Positional[tuple[str, ...]] = ()  # figures; none: all of them
    scale: str = "laptop"  # column of the table in scales.py
    seed: int = 0  # of everything random here
    guidance: float | None = None  # weight, where it is not what varies; default: as sample.py chose (Table 7)
    steps: int = 25  # Dopri5 steps, where they are not what varies [D9]
    screens: int = 2  # screens of each kind, log-expression or not, at most; the paper's come first
    splits: int = 1  # of each of them, at most (B.4)
    draws: int = 10  # of cells, for each split (Figure 5b)
    systems: int = 10  # held-out systems of each draw, at most [D10]
    tasks: int = 100  # test conditions of each system, at most
    cells: int = 200  # per population, given and generated, where they are not what varies (B.3)
    contexts: tuple[int, ...] = (0, 1, 2, 4, 8, 10)  # Figure 5a: K, as far as there are experiments and slots
    multiples: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 6.0)  # Figure 5b: cells given / cells trained with
    most_cells: int = 400  # Figure 5b: and at most this many
    weights: tuple[float, ...] = sample.GUIDANCE  # of guidance (Table 7)
    subsets: int = 10  # Figure 3: of the genes (6)
    tta_draws: int = 10  # Figure 3: of cells, of split 0
    snapshot_tasks: int = 64  # Figure 2: for each point
    smoothing: float = 0.95  # Figure 2: alpha of the moving average
    window: int = 5  # Figure 2: snapshots in the rolling standard deviation
    ode_steps: tuple[int, ...] = (5, 10, 20, 50)  # Dopri5 steps, compared with
    ode_reference: int = 100  # (released code)
    ode_tasks: int = 4  # of each model
    grns: int = 200  # Figure 6: systems of the prior, at most
    out: Path = Path("out")  # everything is below out/<scale>


PRETRAINED, FINETUNED = "mappfn-pretrained", "mappfn-finetuned"
STYLES = {  # row of the tables -> of its curve: label, colour, marker, line
    "mappfn-seed0": ("MapPFN", "C0", "o", "-"),
    PRETRAINED: ("pre-trained (zero-shot)", "C1", "^", "--"),
    FINETUNED: ("fine-tuned", "C3", "s", "-"),
    "identity": ("other control cells", "0.5", "", "-."),
}
ROWS = ("mappfn-seed0", PRETRAINED, FINETUNED)  # those whose models are shown
UNITS = {True: "log expression", False: "sd of a variable"}  # by Screen.log_expression

# ------------------------------------------------------------------------------------- what there is, and its limits


class Shown(NamedTuple):
    """A screen, and which models have predicted it."""
    name: str
    screen: Screen  # split 0
    runs: dict[str, str]  # row of the tables -> run of train.py


def of_screen(s: Settings, name: str) -> sample.Settings:
    """What the other stages want to know of a screen."""
    return sample.Settings(screen=name, scale=s.scale, seed=s.seed, steps=s.steps, out=s.out)


def load_first(s: Settings, name: str) -> Screen:
    """Split 0 of a screen. Raises BadInput if it is missing."""
    return tasks.load_screen(s.out / s.scale / "screens" / name / "split-0")


def all_screens(s: Settings) -> list[Shown]:
    """Every screen that there is: the paper's data sets first, then by name."""
    papers, others = [], []
    for folder in sorted((s.out / s.scale / "screens").glob("*/split-0")):
        shown = Shown(folder.parent.name, tasks.load_screen(folder), {})
        for file in sorted((s.out / s.scale / "samples" / shown.name).glob("[!.]*-split0-draw0.npz")):
            meta = metrics.load_predictions(file).meta
            if "model" in meta:
                shown.runs[meta["row"]] = meta["model"]
        if shown.screen.made.get("paper"):
            papers.append(shown)
        else:
            others.append(shown)
    return papers + others


def chosen(s: Settings, most: int) -> list[Shown]:
    """The screens that models of ROWS have predicted, with these rows only: at most so many with log-expression, and as
    many without. Raises BadInput if there is none."""
    kept = []
    for shown in all_screens(s):
        runs = {row: shown.runs[row] for row in ROWS if row in shown.runs}
        alike = [x for x in kept if x.screen.log_expression == shown.screen.log_expression]
        if runs and len(alike) < most:
            kept.append(shown._replace(runs=runs))
    if not kept:
        raise BadInput(f"no predictions of {', '.join(ROWS)} in {s.out / s.scale / 'samples'}; sample.py makes them")
    return kept


def model_of(s: Settings, name: str, run: str, split: int = 0) -> tuple[dict, eqx.Module, float]:
    """Header, network and guidance weight of the model of a run for one split of a screen."""
    asked = of_screen(s, name)
    file = train.model_file(asked, run, name, split)
    head, network = model.load_model(file)
    if s.guidance is not None:
        return head, network, s.guidance
    return head, network, sample.guidance_of(asked, file)


def units(s: Settings, name: str, cells: int, context: int) -> list[tuple[tuple[int, int, int], Evaluation]]:
    """(split, draw, system) and tasks of every unit of a screen, as far as the settings allow."""
    found = []
    for folder in tasks.splits(of_screen(s, name))[: s.splits]:
        split, screen = tasks.split_number(folder), tasks.load_screen(folder)
        for draw in range(s.draws):
            evaluation = tasks.evaluation_tasks(screen, cells, context, s.seed, draw)
            for system in np.unique(evaluation.system)[: s.systems].tolist():
                of_it = evaluation.system == system
                found.append(((split, draw, system), jax.tree.map(lambda x: x[of_it], evaluation)))
    return found


# ------------------------------------------------------------------------------------------ predicting and comparing


def fewer(given: Given, count: int, context: int, cells: int) -> Given:
    """The first tasks, the first context experiments of each, and the first cells of each population."""
    return Given(given.controls[:count, :cells], given.context[:count, :context, :cells],
                 given.context_treatments[:count, :context], given.query[:count])


def predict(s: Settings, network: eqx.Module, given: Given, log_expression: bool, guidance: float,
            key: PRNGKeyArray) -> Float[np.ndarray, "P N D"]:
    """Cells of each task as sample.py makes them, clipped; the same noise for the same key."""
    cells = sample.generate(network, given, guidance, s.steps, s.cells, key=key)
    return sample.clip_expression(cells, log_expression)[0]


def scores(true: Float[np.ndarray, "all N D"], predicted: Float[np.ndarray, "P M D"],
           controls: Float[np.ndarray, "all L D"], log_expression: bool) -> dict[str, float]:
    """Metrics of the P conditions that are predicted, the first of `true`; the others are rivals for PDS."""
    count = len(predicted)
    ranks = metrics.pds_ranks(true, np.concatenate([predicted, true[count:]]))
    found = {"wasserstein": [], "rmse": [], "pds": ranks[:count], "auprc": np.nan}
    for y, y_hat in zip(true, predicted):
        found["wasserstein"].append(metrics.wasserstein(y, y_hat))
        found["rmse"].append(metrics.rmse(y, y_hat))
    if log_expression:
        found["auprc"] = metrics.deg_auprc(controls[:count], true[:count], predicted)["auprc"]
    return {name: float(np.mean(values)) for name, values in found.items()}


def difference(what: str, values: Float[np.ndarray, "n"]) -> dict:
    """An entry of `evidence`: mean, standard error (None for one) and number of paired differences."""
    n, error = len(values), None
    if n > 1:
        error = float(np.std(values, ddof=1) / n**0.5)
    return {"what": what, "difference": float(np.mean(values)), "error": error, "n": n}


def panels(rows: int, columns: int, inches: tuple = (3.9, 3.3)):
    """An empty picture and its axes [rows, columns], each of so many inches."""
    plt.switch_backend("Agg")  # no window
    size = (inches[0] * columns, inches[1] * rows + 0.4)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


# ------------------------------------------------------------------------ one task and its prediction (Figure 1)


def first_prediction(s: Settings) -> tuple[Shown, Path, metrics.Predictions]:
    """Split 0, first draw, of the first screen with a fine-tuned model, else with any: not chosen for its looks."""
    found = [shown for shown in all_screens(s) if shown.runs]
    if not found:
        raise BadInput(f"no predictions of a model in {s.out / s.scale / 'samples'}; sample.py makes them")
    shown, row = found[0], next(iter(found[0].runs))
    for other in reversed(found):
        if FINETUNED in other.runs:
            shown, row = other, FINETUNED
    file = tasks.samples_file(of_screen(s, shown.name), row, 0, 0)
    return shown, file, metrics.load_predictions(file)


def do(screen: Screen, one_hot: Float[np.ndarray, "D"]) -> str:
    """How a treatment is called in a picture."""
    return f"do({screen.genes[int(np.flatnonzero(one_hot)[0])]})"


def compute_overview(s: Settings) -> dict:
    """All that the model is given of its first test condition, and its answer, on two principal components."""
    shown, file, p = first_prediction(s)
    screen, made = shown.screen, p.meta["settings"]
    # The file lacks the context experiments: the tasks are made again.
    context = min(p.meta["training"]["context"], sample.most_experiments(screen))
    again = tasks.evaluation_tasks(screen, made["eval_cells"], context, made["seed"])
    if not np.array_equal(again.target, p.target):
        raise BadInput(f"{file}: not made from the present screen; delete it and run sample.py again")
    cells = {"control": p.controls[0], "truth": p.target[0]}
    for treatment, population in zip(again.given.context_treatments[0], again.given.context[0]):
        cells[do(screen, treatment)] = population
    fitted = np.concatenate(list(cells.values()))
    centre = fitted.mean(axis=0)
    _, spread, plane = np.linalg.svd(fitted - centre, full_matrices=False)
    cells["prediction"] = p.prediction[0]
    points = {name: ((x - centre) @ plane[:2].T).round(3).tolist() for name, x in cells.items()}
    caption = (f"What {p.meta['row']} is given in one task ({screen.made['title']}, first test condition of split 0), "
               f"and its prediction: principal components of control, context and true cells, {len(centre)} genes, "
               f"{len(p.target[0])} cells a population; large symbols: means.")
    return {"query": do(screen, p.treatments[0]), "unit": UNITS[screen.log_expression], "cells": points,
            "explained": (spread**2 / (spread**2).sum())[:2].tolist(), "caption": caption}


def draw_overview(data: dict) -> matplotlib.figure.Figure:
    """Controls, context experiments and query on the same plane."""
    canvas, axes = panels(1, 3)
    cells = {name: np.array(points) for name, points in data["cells"].items()}
    looks = {"control": ("0.6", "o"), "truth": ("C0", "s"), "prediction": ("C3", "X")}
    context = [name for name in cells if name not in looks]
    for i, name in enumerate(context):
        looks[name] = (f"C{i + 1}", "^vD<>ph*d8"[i % 10])
    ends = np.quantile(np.concatenate(list(cells.values())), [0, 1], axis=0)
    parts = {"given: control cells": ["control"], f"given: {len(context)} context experiments": context,
             f"asked: {data['query']}": ["truth", "prediction"]}
    for axis, (title, names) in zip(axes.flat, parts.items()):
        for name in names:
            colour, marker = looks[name]
            axis.scatter(*cells[name].T, s=10, color=colour, marker=marker, alpha=0.4, lw=0)
        for name in dict.fromkeys(["control", *names]):
            colour, marker = looks[name]
            axis.scatter(*cells[name].mean(axis=0), s=110, color=colour, marker=marker, label=name, ec="k", zorder=3)
        axis.set(title=title, xlim=ends[:, 0] + [-0.2, 0.2], ylim=ends[:, 1] + [-0.2, 0.2])
        axis.set_xlabel(f"PC 1 [{data['unit']}], {data['explained'][0]:.0%} of variance")
        axis.set_ylabel(f"PC 2, {data['explained'][1]:.0%}")
    return canvas


def compute_prediction(s: Settings) -> dict:
    """The same answer gene by gene: means of all genes, cells of the treated and of the most changed other gene."""
    shown, _, p = first_prediction(s)
    cells = {"control": p.controls[0], "truth": p.target[0], "MapPFN": p.prediction[0]}
    level = p.controls[0].mean(axis=0)
    change, predicted = p.target[0].mean(axis=0) - level, p.prediction[0].mean(axis=0) - level
    treated = int(np.flatnonzero(p.treatments[0])[0])
    others = np.abs(change)
    others[treated] = -1
    histograms = {}
    for title, gene in {"treated gene": treated, "most changed other gene": int(others.argmax())}.items():
        bins = np.histogram_bin_edges(np.concatenate(list(cells.values()))[:, gene], 20)
        counts = {name: np.histogram(x[:, gene], bins)[0].tolist() for name, x in cells.items()}
        histograms[title] = {"gene": shown.screen.genes[gene], "bins": bins.tolist(), "counts": counts}
    caption = (f"One prediction against the truth ({shown.screen.made['title']}, {p.meta['row']}, first test condition "
               f"of split 0, {len(p.target[0])} cells): change of each gene's mean against control, and two genes.")
    return {"query": do(shown.screen, p.treatments[0]), "unit": UNITS[p.log_expression], "treated": treated,
            "change": change.tolist(), "predicted": predicted.tolist(), "histograms": histograms, "caption": caption}


def draw_prediction(data: dict) -> matplotlib.figure.Figure:
    """Means, then two histograms."""
    canvas, axes = panels(1, 3)
    means, gene = axes[0, 0], data["treated"]
    means.axline((0, 0), slope=1, color="0.7", lw=1, zorder=0)
    means.scatter(data["change"], data["predicted"], s=18, color="0.2")
    means.scatter(data["change"][gene], data["predicted"][gene], s=60, fc="none", ec="C3", label="treated gene")
    means.set(title=f"{data['query']}, all genes", ylabel="predicted change")
    means.set_xlabel(f"true change of the mean [{data['unit']}]")
    looks = {"control": {"color": "0.8", "fill": True}, "truth": {"color": "C0", "lw": 2},
             "MapPFN": {"color": "C3", "lw": 2, "ls": "--"}}
    for axis, (title, histogram) in zip(axes.flat[1:], data["histograms"].items()):
        for name, counts in histogram["counts"].items():
            axis.stairs(counts, histogram["bins"], label=name, **looks[name])
        axis.set(title=title, xlabel=f"{histogram['gene']} [{data['unit']}]", ylabel="cells")
    return canvas


# --------------------------------------------------------------------------------------- the split as built (Figure 4)

USES = {TRAIN: "train", VALIDATION: "validation", TEST: "test", tasks.CONTEXT: "context", tasks.ABSENT: ""}
LOOKS = {  # letter, colour, colour of the letter
    "control": ("C", "0.88", "k"), "train": ("Tr", "#9ecae1", "k"), "context": ("Co", "#c7e9c0", "k"),
    "validation": ("V", "#fdd870", "k"), "test": ("Te", "#b2182b", "w"),
}


def compute_split(s: Settings) -> dict:
    """Use and number of cells of each condition in split 0, of every screen with few enough systems to show."""
    found = {}
    for name, screen, _ in all_screens(s):
        if name.endswith("-wide") or len(screen.systems) > 10:
            continue
        rows = []
        for split, count in zip(screen.split.tolist(), screen.count.tolist()):
            uses = [USES[use] for use in split]
            uses[CONTROL] = "control"
            rows.append(list(zip(uses, count)))
        found[name] = {"title": screen.made["title"], "systems": screen.systems,
                       "treatments": screen.treatment_names, "conditions": rows}
    if not found:
        raise BadInput(f"no screen of at most 10 systems in {s.out / s.scale / 'screens'}; data.py makes them")
    caption = ("What each condition, a system (row) under a treatment (column), is used for in split 0, and its "
               "number of cells. Half of one system's treatments are held out. Empty: no data.")
    return {"screens": found, "caption": caption}


def draw_split(data: dict) -> matplotlib.figure.Figure:
    """A matrix for each screen."""
    canvas, axes = panels(len(data["screens"]), 1, (9, 2))
    for axis, matrix in zip(axes.flat, data["screens"].values()):
        height, width = len(matrix["systems"]), len(matrix["treatments"])
        for i, j in np.ndindex(height, width):
            use, cells = matrix["conditions"][i][j]
            if not use or not cells:
                continue
            text, colour, ink = LOOKS[use]
            if width < 25:
                text += f"\n{cells}"
            axis.fill_between([j - 0.48, j + 0.48], i - 0.46, i + 0.46, color=colour, lw=0)
            axis.text(j, i, text, ha="center", va="center", fontsize=7, color=ink)
        axis.set_xticks(range(width), matrix["treatments"], rotation=40, ha="right", fontsize=7)
        axis.set_yticks(range(height), matrix["systems"], fontsize=7)
        axis.set(title=matrix["title"], xlabel="treatment", ylabel="system")
        axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    handles = [axes[0, 0].fill_between([], [], color=colour) for _, colour, _ in LOOKS.values()]
    labels = [f"{letter}: {use}" for use, (letter, _, _) in LOOKS.items()]
    canvas.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return canvas


# ---------------------------------------------------------------------------- variances during pre-training (Figure 2)


def variance_correlation(true: Float[np.ndarray, "N D"], predicted: Float[np.ndarray, "M D"]) -> float:
    """Pearson correlation over genes of the variances over cells; NaN where all genes of one side vary equally."""
    a, b = true.var(axis=0, dtype=float), predicted.var(axis=0, dtype=float)
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def update_of(file: Path) -> int:
    """12 of update-12.eqx."""
    return int(file.stem.removeprefix("update-"))


def compute_variance(s: Settings) -> dict:
    """Every snapshot of every run, on held-out systems of its own prior and on real test conditions, zero-shot."""
    folders = sorted((s.out / s.scale / "train").glob("*/split-0/snapshots"))
    if not folders:
        raise BadInput(f"no snapshots in {s.out / s.scale / 'train'}; train.py --snapshots 12 makes them")
    real = {shown.name: shown.screen for shown in chosen(s, s.screens) if shown.screen.log_expression}
    curves = []
    for folder in folders:
        files = sorted(folder.glob("update-*.eqx"), key=update_of)
        head, _ = model.load_model(files[0])
        seen = [update_of(file) * head["micro_batch"] * head["accumulate"] for file in files]
        places = {"prior": load_first(s, head["screen"])} | real
        for number, (place, screen) in enumerate(places.items()):
            values = snapshot_values(s, files, screen, min(head["context"], sample.most_experiments(screen)), number)
            curves.append({"run": folder.parents[1].name, "place": place, "title": screen.made["title"], "tasks": seen,
                           "values": values, "mean": np.nanmean(values, axis=1).tolist()})
    caption = ("Correlation over genes of the variances of predicted and true cells during pre-training. Points: mean "
               f"of {s.snapshot_tasks} tasks of {s.cells} cells, the same for all points; curves: moving average "
               f"(alpha {s.smoothing}); band: standard deviation of {s.window} neighbouring points of a single run.")
    return {"curves": curves, "smoothing": s.smoothing, "window": s.window, "caption": caption,
            "evidence": paired_minus_unpaired(curves)}


def snapshot_values(s: Settings, files: list[Path], screen: Screen, context: int, number: int) -> list[list[float]]:
    """Variance correlation of every snapshot and task [M, P]; all snapshots have the same tasks and noise."""
    rng = scales.generator("figure", s.seed, number)
    batch = tasks.sample_tasks(rng, screen, s.snapshot_tasks, s.cells, context, TEST)
    values = []
    for file in tqdm(files, unit="snapshot", desc=f"variance: {screen.made['title']}"):
        _, network = model.load_model(file)
        # [D49] paper: silent; here: weight 1, since guidance changes the variances.
        cells = predict(s, network, batch.given, screen.log_expression, 1.0, scales.key("figure", s.seed))
        values.append([variance_correlation(*pair) for pair in zip(batch.target, cells)])
    return values


def paired_minus_unpaired(curves: list[dict]) -> list[dict]:
    """Evidence: over the last third of the snapshots of RUN and of RUN-unpaired, at each place."""
    means = {(curve["run"], curve["place"]): np.array(curve["mean"]) for curve in curves}
    evidence = []
    for (run, place), paired in means.items():
        unpaired = means.get((f"{run}-unpaired", place))
        if unpaired is not None:
            tail = max(2, len(paired) // 3)
            values = paired[-tail:] - unpaired[-tail:]
            if np.isfinite(values).all():
                evidence.append(difference(f"correlation of variances, {place}: {run} minus {run}-unpaired, last "
                                           f"{tail} snapshots of one run each", values))
    return evidence


def smooth(values: Float[np.ndarray, "M"], weight: float,
           window: int) -> tuple[Float[np.ndarray, "M"], Float[np.ndarray, "M"]]:
    """Exponential moving average that starts from the first value, and standard deviation in a centred window."""
    average, sd = [values[0]], []
    for value in values[1:]:
        average.append(weight * average[-1] + (1 - weight) * value)
    for i in range(len(values)):
        around = values[max(0, i - window // 2) : i + window // 2 + 1]
        sd.append(np.std(around, ddof=min(1, len(around) - 1)))
    return np.array(average), np.array(sd)


def draw_variance(data: dict) -> matplotlib.figure.Figure:
    """A panel for each place, a curve for each run."""
    places = list(dict.fromkeys(curve["place"] for curve in data["curves"]))
    runs = list(dict.fromkeys(curve["run"] for curve in data["curves"]))
    canvas, axes = panels(1, len(places))
    for curve in data["curves"]:
        axis, i = axes[0, places.index(curve["place"])], runs.index(curve["run"])
        look = {"color": f"C{i}", "marker": "o^sDv"[i % 5], "ms": 4}
        x, y = np.array(curve["tasks"]), np.array(curve["mean"], float)
        average, sd = smooth(y, data["smoothing"], data["window"])
        axis.fill_between(x, average - sd, average + sd, color=f"C{i}", alpha=0.2, lw=0)
        axis.plot(x, y, ls="", mfc="none", alpha=0.7, **look)
        title, line = f"{curve['title']}, zero-shot", "-"
        if curve["place"] == "prior":
            title, line = "held-out systems of its own prior", "--"
        axis.plot(x, average, ls=line, markevery=[-1], label=curve["run"], **look)
        axis.set(title=title, xlabel="training tasks seen", ylabel="correlation of variances ↑")
    return canvas


# ----------------------------------------------------------------------------------- test-time augmentation (Figure 3)

WAYS = {"single": "single passes", "thinned": "augmented,\nas many cells", "augmented": "augmented,\nall cells"}


def tta_unit(s: Settings, network: eqx.Module, size: int, guidance: float, numbers: tuple[int, ...],
             found: Evaluation) -> dict[str, float]:
    """AUPRC of each way to predict one unit with a model of `size` genes, and of the rules without a model."""
    treated = found.given.context.shape[1] + 1
    fewest = -(-(found.given.query.shape[1] - treated) // (size - treated))  # subsets that reach all genes
    predicted = {way: [] for way in WAYS}
    count = min(s.tasks, len(found.target))
    for i in range(count):
        given = Given(*(field[i] for field in found.given))
        cells = {}
        for subsets in (fewest, s.subsets):
            # With equal seeds the few subsets are the first of the many, with the same noise: a paired comparison.
            rng = scales.generator("figure", s.seed, *numbers, i)
            key = scales.key("figure", s.seed, *numbers, i)
            pooled = sample.augmented(network, given, size, subsets, rng, guidance, s.steps, key=key)
            cells[subsets] = sample.clip_expression(pooled[None], True)[0][0]
        predicted["single"].append(cells[fewest][: s.cells])
        predicted["thinned"].append(cells[s.subsets][: s.cells])
        predicted["augmented"].append(cells[s.subsets])
    result = {}
    for way, populations in predicted.items():
        least = min(len(cells) for cells in populations)  # the rarest gene's cells may differ between tasks
        stacked = np.stack([cells[:least] for cells in populations])
        auprc = metrics.deg_auprc(found.given.controls[:count], found.target[:count], stacked,
                                  found.given.query[:count])
        result |= {way: auprc["auprc"], "treated gene only": auprc["target_only"], "random": auprc["base_rate"]}
    return result


def compute_tta(s: Settings) -> dict:
    """AUPRC of the pre-trained model on more genes than it has (6)."""
    results, sizes, differences = {}, [], []
    for name, screen, runs in chosen(s, s.screens):
        wide = f"{name}-wide"
        if PRETRAINED not in runs or not (s.out / s.scale / "screens" / wide).is_dir():
            continue
        screen = load_first(s, wide)
        head, network, guidance = model_of(s, name, runs[PRETRAINED])
        context = min(head["context"], sample.most_experiments(screen))
        found = units(dataclasses.replace(s, splits=1, draws=s.tta_draws), wide, s.cells, context)
        values = []
        for numbers, evaluation in tqdm(found, unit="unit", desc=f"tta: {name}"):
            values.append(tta_unit(s, network, head["genes"], guidance, numbers, evaluation))
        differences += [unit["augmented"] - unit["single"] for unit in values]
        title = f"{screen.made['title']}: {len(screen.genes)} genes, model of {head['genes']}"
        results[title] = values
        sizes.append(f"{title}, n = {len(values)} draws of cells")
    if not results:
        raise BadInput(f"no screen NAME-wide of a predicted screen NAME in {s.out / s.scale / 'screens'}; "
                       "data.py --name NAME-wide with twice the --genes makes it")
    caption = (f"Recovery of differentially expressed genes, zero-shot ({'; '.join(sizes)}; up to {s.tasks} test "
               f"conditions each, {s.cells} true cells). Single passes: the fewest random subsets of genes that reach "
               f"all; augmented: {s.subsets} subsets, pooled gene by gene. More cells alone make the test for "
               "expression more sensitive, hence also with as many as in one pass. Thin lines: n; bars: sd.")
    differences = np.array(differences)
    differences = differences[np.isfinite(differences)]
    evidence = []
    if len(differences):
        evidence = [difference("AUPRC: augmented minus single passes", differences)]
    return {"screens": results, "caption": caption, "evidence": evidence}


def draw_tta(data: dict) -> matplotlib.figure.Figure:
    """The ways side by side, units as lines, and two rules that need no model."""
    canvas, axes = panels(1, len(data["screens"]), (5, 4))
    for axis, (title, values) in zip(axes.flat, data["screens"].items()):
        found = {name: np.array([unit[name] for unit in values], float) for name in values[0]}
        ways = np.array([found[way] for way in WAYS])  # 3 U
        ways = ways[:, np.isfinite(ways).all(axis=0)]  # undefined where no gene changes in truth
        axis.plot(range(3), ways, "-", color="0.65", lw=0.8, marker=".", ms=4)
        if ways.size:
            sd = ways.std(axis=1, ddof=min(1, ways.shape[1] - 1))
            axis.errorbar(range(3), ways.mean(axis=1), sd, fmt="D", color="C0", capsize=4, ms=7, label="mean ± sd")
            axis.axhline(np.nanmean(found["treated gene only"]), color="k", ls="--", lw=1, label="treated gene only")
            axis.axhline(np.nanmean(found["random"]), color="k", ls=":", lw=1, label="random")
        axis.set_xticks(range(3), WAYS.values())
        axis.set(title=title, ylabel="AUPRC ↑", xlim=(-0.4, 2.4), ylim=(0, None))
    return canvas


# -------------------------------- one thing varies, all else stays: context, cells (Figure 5), guidance (A.4, Table 7)

LABELS = {"wasserstein": "W2 ↓ [squared units]", "rmse": "RMSE ↓", "pds": "PDS ↓", "auprc": "AUPRC ↑"}
SWEEPS = {  # label of the axis, metrics
    "context": ("context experiments K given", ("wasserstein", "pds")),
    "cells": ("cells given per population", ("wasserstein", "pds")),
    "guidance": ("guidance weight", tuple(LABELS)),
}


def compute_sweep(s: Settings, what: str) -> dict:
    """Scores of every model for each value of what varies."""
    found = chosen(s, s.screens)
    for name, _, runs in found:  # a missing model shows before the long work
        for run in runs.values():
            model_of(s, name, run)
    blocks = {shown.name: sweep_screen(s, what, shown) for shown in found}
    sizes, evidence = [], []
    for block in blocks.values():
        sizes.append(f"{block['title']}: n = {block['units']}, up to {s.tasks} test conditions each")
        evidence += improvements(what, block)
    caption = (f"Performance against {SWEEPS[what][0]} (n held-out systems, splits and draws; {'; '.join(sizes)}), on "
               f"the same tasks, noise and true cells ({s.cells} a condition). Bars: standard deviation over n after "
               "each one's mean level was taken out.")
    return {"what": what, "screens": blocks, "caption": caption, "evidence": evidence}


def sweep_screen(s: Settings, what: str, shown: Shown) -> dict:
    """Of one screen; `values` are [U, X] for each row and metric."""
    splits = [tasks.load_screen(folder) for folder in tasks.splits(of_screen(s, shown.name))[: s.splits]]
    most = min(sample.most_experiments(screen) for screen in splits)
    weights = {}
    for row, run in shown.runs.items():
        trained, _, weights[row] = model_of(s, shown.name, run)
    cells = s.cells
    if what == "context":
        x = [k for k in s.contexts if k <= most]
    elif what == "cells":
        x = numbers_of_cells(s, trained["cells"], splits)
        cells = max(cells, *x)
    else:
        x = list(s.weights)
    # The tasks have enough for the largest value; smaller ones get their first experiments and cells.
    found = units(s, shown.name, cells, most)
    values = {row: {metric: [] for metric in SWEEPS[what][1]} for row in (*shown.runs, "identity")}
    for numbers, evaluation in tqdm(found, unit="unit", desc=f"{what}: {shown.name}"):
        for row, points in sweep_unit(s, what, x, shown, numbers, evaluation).items():
            for metric, kept in values[row].items():
                kept.append([point[metric] for point in points])
    return {"title": shown.screen.made["title"], "x": x, "trained": trained.get(what), "weights": weights,
            "units": len(found), "values": values}


def numbers_of_cells(s: Settings, trained: int, splits: list[Screen]) -> list[int]:
    """Multiples of the cells in training, up to the limit and to the smallest population that is given."""
    most = s.most_cells
    for screen in splits:
        count = screen.count[(screen.split == TEST).any(axis=1)]
        most = min(most, int(count[count > 0].min()))
    return sorted({min(most, max(2, round(multiple * trained))) for multiple in s.multiples})


def sweep_unit(s: Settings, what: str, x: list, shown: Shown, numbers: tuple[int, int, int],
               found: Evaluation) -> dict[str, list[dict]]:
    """Row -> scores at each of `x`, for one unit."""
    log_expression, most = shown.screen.log_expression, found.given.context.shape[1]
    true, controls = found.target[:, : s.cells], found.given.controls[:, : s.cells]
    same = scores(true, found.identity[: s.tasks, : s.cells], controls, log_expression)
    result = {"identity": [same] * len(x)}
    for row, run in shown.runs.items():
        head, network, guidance = model_of(s, shown.name, run, numbers[0])
        result[row] = []
        for value in x:
            k, n, weight = min(head["context"], most), s.cells, guidance
            if what == "context":
                k = value
            elif what == "cells":
                n = value
            else:
                weight = float(value)
            given = fewer(found.given, s.tasks, k, n)
            cells = predict(s, network, given, log_expression, weight, scales.key("figure", s.seed, *numbers))
            result[row].append(scores(true, cells, controls, log_expression))
    return result


def improvements(what: str, block: dict) -> list[dict]:
    """Evidence: W2 at K = 1, or at the size of training, minus at the largest, paired within units."""
    if what == "guidance":
        return []
    x, start = block["x"], {"context": 1, "cells": block["trained"]}[what]
    first = 0
    if start in x:
        first = x.index(start)
    evidence = []
    for row, values in block["values"].items():
        if row != "identity" and first < len(x) - 1:
            w2 = np.array(values["wasserstein"])  # U X
            evidence.append(difference(f"W2, {block['title']}, {STYLES[row][0]}: with {x[first]} {SWEEPS[what][0]} "
                                       f"minus with {x[-1]}", w2[:, first] - w2[:, -1]))
    return evidence


def draw_sweep(data: dict) -> matplotlib.figure.Figure:
    """A row of panels for each screen, a column for each metric, a curve for each model."""
    label, shown = SWEEPS[data["what"]]
    canvas, axes = panels(len(data["screens"]), len(shown), (3.5, 3))
    for row, block in zip(axes, data["screens"].values()):
        for axis, metric in zip(row, shown):
            for line, values in block["values"].items():
                draw_curve(axis, block["x"], np.array(values[metric], float), line)
            if not axis.has_data():  # AUPRC of SCM values, or where no gene changes
                axis.set_axis_off()
                axis.text(0.5, 0.5, f"{metric} is not defined for\n{block['title']}", ha="center")
                continue
            if block["trained"] is not None:
                axis.axvline(block["trained"], color="k", ls=(0, (1, 2)), lw=1, label="as in training")
            if data["what"] == "guidance":
                for line, weight in block["weights"].items():
                    axis.axvline(weight, color=STYLES[line][1], ls=":", lw=1, label="chosen in validation")
            if data["what"] == "cells":
                axis.set_xscale("log")
            axis.set_xticks(block["x"], [f"{x:g}" for x in block["x"]])
            axis.minorticks_off()
            axis.set(title=block["title"], xlabel=label, ylabel=LABELS[metric])
    return canvas


def draw_curve(axis, x: list, values: Float[np.ndarray, "U X"], row: str) -> None:
    """Mean over units, and their deviation once each one's own level, the mean over all of `x`, is taken out."""
    label, colour, marker, line = STYLES[row]
    values = values[np.isfinite(values).all(axis=1)]
    if not len(values):
        return
    mean, sd = values.mean(axis=0), None
    if len(values) > 1 and row != "identity":
        free = values - values.mean(axis=1, keepdims=True)
        # Taking the level out makes a standard deviation too small by sqrt((X - 1) / X) (Morey, 2008).
        sd = free.std(axis=0, ddof=1) * np.sqrt(len(x) / max(1, len(x) - 1))
    axis.errorbar(x, mean, sd, color=colour, marker=marker, ls=line, capsize=3, ms=5, label=label)


# --------------------------------------------------------------------------------------------- error of the ODE solver


def compute_ode(s: Settings) -> dict:
    """Largest and root-mean-square difference of all values from a finer solution, for the same noise, unclipped."""
    curves, steps = {}, [n for n in s.ode_steps if n < s.ode_reference]
    for name, _, runs in chosen(s, s.screens):
        for run in runs.values():
            head, network, guidance = model_of(s, name, run)
            if head["init"] or run in curves:  # only pre-trained models, each once
                continue
            screen = load_first(s, head["screen"])
            rng, key = scales.generator("figure", s.seed), scales.key("figure", s.seed)
            given = tasks.sample_tasks(rng, screen, s.ode_tasks, s.cells, head["context"], VALIDATION).given
            reference = sample.generate(network, given, guidance, s.ode_reference, key=key).astype(float)
            largest, squares = [], []  # X P
            for n in tqdm(steps, unit="setting", desc=f"ode: {run}"):
                error = sample.generate(network, given, guidance, n, key=key) - reference
                largest.append(np.abs(error).max(axis=(1, 2)).tolist())
                squares.append(np.sqrt((error**2).mean(axis=(1, 2))).tolist())
            curves[run] = {"title": screen.made["title"], "unit": UNITS[screen.log_expression],
                           "errors": {"largest": largest, "root mean square": squares}}
    if not curves:
        raise BadInput("no model that was not fine-tuned has predicted a screen; see sample.py")
    caption = (f"Difference from the cells that {s.ode_reference} Dopri5 steps make of the same noise, by evaluations "
               f"of the network (six a step, and one); {s.ode_tasks} validation tasks, {s.cells} cells. Largest of a "
               "task's values and root mean square of them: mean, smallest and largest over tasks.")
    return {"curves": curves, "steps": steps, "caption": caption}


def draw_ode(data: dict) -> matplotlib.figure.Figure:
    """Both errors of each model on logarithmic axes."""
    canvas, axes = panels(1, len(data["curves"]))
    evaluations = [6 * n + 1 for n in data["steps"]]
    for axis, curve in zip(axes.flat, data["curves"].values()):
        for i, (name, values) in enumerate(curve["errors"].items()):
            y = np.maximum(np.array(values), 1e-9)  # X P
            mean = y.mean(axis=1)
            ends = [mean - y.min(axis=1), y.max(axis=1) - mean]
            axis.errorbar(evaluations, mean, ends, fmt=("s-", "o--")[i], color=("C3", "C0")[i], capsize=3, label=name)
        axis.set(xscale="log", yscale="log", title=curve["title"], ylabel=f"difference [{curve['unit']}]")
        axis.set_xlabel("evaluations of the network (steps)")
        axis.set_xticks(evaluations, [f"{6 * n + 1}\n({n})" for n in data["steps"]])
        axis.minorticks_off()
    return canvas


# ------------------------------------------------------------------------------------ coverage of the prior (Figure 6)


def densities(screen: Screen, systems: int | None = None) -> dict:
    """Histograms of non-zero expression and of each treatment's fold change of each gene, in the first systems."""
    cells, changes = [], []
    for s, t in np.argwhere(screen.count[:systems] > 0).tolist():
        treated = screen.pool(s, t)
        cells.append(treated.ravel())
        if t != CONTROL:
            _, change = metrics.differential_expression(screen.pool(s, CONTROL)[None], treated[None])
            changes.append(change[0])
    cells, changes = np.concatenate(cells), np.concatenate(changes)
    return {"title": screen.made["title"], "zeros": np.mean(cells == 0), "beyond": np.mean(np.abs(changes) > 5),
            "small": np.mean(np.abs(changes) <= metrics.FOLD_CHANGE),
            "expression": histogram(cells[cells > 0], np.linspace(0, 7, 36)),
            "change": histogram(changes, np.linspace(-5, 5, 51))}


def histogram(values: Float[np.ndarray, "n"], bins: Float[np.ndarray, "edges"]) -> dict:
    """Density in each bin; values out of range count for the total."""
    density = np.histogram(values, bins)[0] / max(1, len(values)) / np.diff(bins)
    return {"bins": bins.round(6).tolist(), "density": density.tolist(), "n": len(values)}


def compute_coverage(s: Settings) -> dict:
    """The prior of the pre-trained model, and every screen of log-expression that was predicted."""
    found = [shown for shown in chosen(s, len(all_screens(s))) if shown.screen.log_expression]
    priors = [model_of(s, name, runs[PRETRAINED])[0]["screen"] for name, _, runs in found if PRETRAINED in runs]
    if not priors:
        raise BadInput(f"no predictions of {PRETRAINED} in {s.out / s.scale / 'samples'}; sample.py makes them")
    prior = densities(load_first(s, priors[0]), s.grns)
    screens, evidence = {}, []
    for name, screen, _ in found:
        screens[name] = densities(screen)
        for what in ("expression", "change"):
            mass = np.array(screens[name][what]["density"])
            reached = np.array(prior[what]["density"]) > 0
            evidence.append({"what": f"{screen.made['title']}, {what}: share in bins that the prior reaches",
                             "difference": mass[reached].sum() / mass.sum(), "error": None,
                             "n": screens[name][what]["n"]})
    caption = (f"The prior (at most {s.grns} systems) and the screens: log expression of genes in single cells where "
               "it is not zero (legend: share of zeros), and log2 fold change of each gene by each treatment (legend: "
               f"share up to {metrics.FOLD_CHANGE}; beyond 5 a gene falls silent, or awakes).")
    return {"prior": prior, "screens": screens, "caption": caption, "evidence": evidence}


def draw_coverage(data: dict) -> matplotlib.figure.Figure:
    """The prior as a grey area, screens as lines."""
    canvas, axes = panels(1, 2, (5, 3.4))
    expression, change = axes[0]
    looks = [{"color": "0.8", "fill": True}]
    for i in range(len(data["screens"])):
        looks.append({"color": f"C{i}", "lw": 1.8, "ls": ("-", "--", ":")[i % 3]})
    for look, d in zip(looks, [data["prior"], *data["screens"].values()]):
        title, small, beyond = d["title"], f"{d['small']:.0%} up to ±0.2", f"{d['beyond']:.0%} beyond ±5"
        for axis, values, label in ((expression, d["expression"], f"{title}: {d['zeros']:.0%} zeros"),
                                    (change, d["change"], f"{title}: {small}, {beyond}")):
            axis.stairs(values["density"], values["bins"], label=label, **look)
    expression.set(xlabel="log expression, zeros left out", ylabel="density")
    change.set(xlabel="log2 fold change against control", ylabel="density", yscale="log")
    for axis, room, corner in ((expression, 1.25, "upper right"), (change, 6, "upper center")):
        axis.set_ylim(top=axis.get_ylim()[1] * room)  # for the legend
        axis.legend(frameon=False, fontsize=8, loc=corner)
    return canvas


# ----------------------------------------------------------------------------------------------------------- the stage


class Figure(NamedTuple):
    """How a figure is made."""
    title: str
    compute: Callable[[Settings], dict]
    draw: Callable[[dict], matplotlib.figure.Figure]


FIGURES = {
    "overview": Figure("Figure 1. A task on real cells", compute_overview, draw_overview),
    "prediction": Figure("A prediction against the truth", compute_prediction, draw_prediction),
    "split": Figure("Figure 4. Split as built", compute_split, draw_split),
    "variance": Figure("Figure 2. Paired and unpaired prior", compute_variance, draw_variance),
    "tta": Figure("Figure 3. Test-time augmentation", compute_tta, draw_tta),
    "context": Figure("Figure 5a. More context experiments", partial(compute_sweep, what="context"), draw_sweep),
    "cells": Figure("Figure 5b. More cells", partial(compute_sweep, what="cells"), draw_sweep),
    "guidance": Figure("Guidance", partial(compute_sweep, what="guidance"), draw_sweep),
    "ode": Figure("Error of the ODE solver", compute_ode, draw_ode),
    "coverage": Figure("Figure 6. Coverage of the prior", compute_coverage, draw_coverage),
}


def made_of(s: Settings) -> dict[str, dict]:
    """Fingerprint of each screen, and the runs that have predicted it: if any changes, figures are computed again."""
    return {shown.name: {"fingerprint": shown.screen.made["fingerprint"], "runs": shown.runs}
            for shown in all_screens(s)}


def finished(path: Path, settings: dict, screens: dict) -> bool:
    """Whether the numbers are there, of these screens. Raises BadInput if they were made with other settings."""
    if not path.is_file():
        return False
    document = json.loads(path.read_text(encoding="utf-8"))
    if "not_run" in document or document["screens"] != screens:
        return False
    scales.check_made(path, document["settings"], settings)
    return True


def write(figure: Figure, s: Settings, settings: dict, screens: dict, path: Path) -> None:
    """Compute a figure and write its JSON; a missing input is written down as the reason why it was not run."""
    start, document = time.perf_counter(), {"title": figure.title}
    try:
        data = figure.compute(s)
        document |= {"caption": data.pop("caption"), "settings": settings, "screens": screens,
                     "revision": scales.revision(), "seconds": round(time.perf_counter() - start, 1),
                     "evidence": data.pop("evidence", []), "data": data}
    except BadInput as error:
        document |= {"not_run": str(error)}
    text = json.dumps(document, default=float)  # NumPy's scalars
    document = json.loads(text, parse_constant=lambda nan: None)  # JSON has no NaN
    with scales.atomic(path) as temporary:
        temporary.write_text(json.dumps(document) + "\n", encoding="utf-8")


def draw(figure: Figure, document: dict, scale: str, path: Path) -> None:
    """Draw a figure from the content of its JSON."""
    canvas = figure.draw(document["data"])
    small = f" ({scale} scale, not the paper's)" * (scale != "paper")
    canvas.suptitle(document["title"] + small, fontsize=10)
    for axis in canvas.axes:
        handles, _ = axis.get_legend_handles_labels()
        if handles and axis.get_legend() is None:
            axis.legend(frameon=False, fontsize=7)
    with scales.atomic(path) as temporary:
        canvas.savefig(temporary, dpi=100, format="png")
        with PIL.Image.open(temporary) as picture:  # 128 colours are enough, and a third of the size
            picture.convert("RGB").quantize(128).save(temporary, format="png", optimize=True)
    plt.close(canvas)


def main() -> None:
    """Compute what is not there yet, and draw all that was asked for."""
    s = scales.parse(Settings, lambda s: ("evaluate", "figures"))
    unknown = sorted(set(s.names) - FIGURES.keys())
    if unknown:
        raise BadInput(f"{', '.join(unknown)}: no such figure; there are {', '.join(FIGURES)}")
    train.use_all_cores(2)
    settings = dataclasses.asdict(s)
    del settings["names"], settings["out"]
    print(f"figures.py {json.dumps(settings)}, revision {scales.revision()}, {jax.device_count()} x "
          f"{jax.devices()[0].device_kind}; all take 1 minute at smoke, 6 at laptop scale on two cores", flush=True)
    screens = made_of(s)
    for name in s.names or FIGURES:
        path = s.out / s.scale / "figures" / f"{name}.json"
        picture = path.with_suffix(".png")
        if not finished(path, settings, screens):
            write(FIGURES[name], s, settings, screens, path)
        document = json.loads(path.read_text(encoding="utf-8"))
        if "not_run" in document:
            picture.unlink(missing_ok=True)  # of numbers that are gone
            print(f"{path}: not run: {document['not_run']}", flush=True)
        else:
            draw(FIGURES[name], document, s.scale, picture)
            print(f"{picture}: its numbers took {document['seconds']} s", flush=True)


if __name__ == "__main__":
    scales.run(main)
