"""Stage 7 of 8, the figures: the numbers of each as JSON, and a picture drawn from that JSON alone.

Paper: section 6, Figures 1 to 6; `prediction`, `guidance` (Table 7) and `ode` (A.4) have no figure there. Reads
`screens/`, `train/` and `samples/` below out/<scale>, writes `figures/<name>.json` and `.png`; where an input is
missing, the JSON says why it was `not_run`. Shown are the screens that the models of ROWS have predicted. Departure: D49.

    python figures.py --scale smoke|laptop|paper       all of them: 1 / 6 min / not timed, on two CPU cores
    python figures.py overview split --scale laptop    some of them: seconds
What has the same settings and screens as before is only drawn again; delete its JSON to compute it anew.

    unit     one held-out system in one split and draw of cells
    U units   P tasks   X values of what varies   M metrics   K context experiments   N cells   D genes
"""

import dataclasses
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
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
from tasks import CONTROL, TEST, Evaluation, Given, Screen


@dataclass(frozen=True)
class Settings:
    """Compute the numbers of the figures, and draw them."""
    names: tyro.conf.Positional[tuple[str, ...]] = ()  # figures; none: all of them
    scale: str = "laptop"  # column of the table in scales.py
    seed: int = 0  # of everything random here
    guidance: float | None = None  # weight, where it is not what varies; default: as sample.py chose (Table 7)
    steps: int = 25  # Dopri5 steps, where they are not what varies [D9]
    screens: int = 2  # of each kind, log-expression or not, at most; the paper's come first
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
    ode_steps: tuple[int, ...] = (5, 10, 20, 50)  # Dopri5 steps, compared with
    ode_reference: int = 100  # (released code)
    ode_tasks: int = 4  # of each screen
    grns: int = 200  # Figure 6: systems of the prior, at most
    out: Path = Path("out")  # everything is below out/<scale>


PRETRAINED, FINETUNED = "mappfn-pretrained", "mappfn-finetuned"
ROWS = {"mappfn-seed0": "MapPFN", PRETRAINED: "pre-trained (zero-shot)", FINETUNED: "fine-tuned"}  # label in a figure
IDENTITY = "other control cells"
UNITS = {True: "log expression", False: "sd of a variable"}  # by Screen.log_expression

# ------------------------------------------------------------------------------------------- what there is to be shown


class Shown(NamedTuple):
    """A screen, and the models that have predicted it."""
    name: str
    screen: Screen  # split 0
    runs: dict[str, str]  # row of the tables -> run of train.py


def of_screen(s: Settings, name: str) -> sample.Settings:
    """What the other stages want to know of a screen."""
    return sample.Settings(screen=name, scale=s.scale, seed=s.seed, steps=s.steps, out=s.out)


def load_first(s: Settings, name: str) -> Screen:
    """Split 0 of a screen. Raises BadInput if it is missing."""
    return tasks.load_screen(tasks.splits(of_screen(s, name))[0])


def all_screens(s: Settings) -> list[Shown]:
    """Every screen that there is: the paper's data sets first, then by name."""
    found = []
    for folder in sorted((s.out / s.scale / "screens").glob("*/split-0")):
        name, runs = folder.parent.name, {}
        for file in sorted((s.out / s.scale / "samples" / name).glob("[!.]*-split0-draw0.npz")):
            meta = metrics.load_predictions(file).meta
            if "model" in meta:
                runs[meta["row"]] = meta["model"]
        found.append(Shown(name, tasks.load_screen(folder), runs))
    return sorted(found, key=lambda shown: "paper" not in shown.screen.made)


def chosen(s: Settings, most: int) -> list[Shown]:
    """The screens that models of ROWS have predicted, with these rows: at most so many with log-expression, and as many
    without. Raises BadInput if there is none."""
    kept, count = [], {True: 0, False: 0}
    for shown in all_screens(s):
        runs = {row: shown.runs[row] for row in ROWS if row in shown.runs}
        if runs and count[shown.screen.log_expression] < most:
            count[shown.screen.log_expression] += 1
            kept.append(shown._replace(runs=runs))
    if not kept:
        raise BadInput(f"no predictions of {', '.join(ROWS)} in {s.out / s.scale / 'samples'}; sample.py makes them")
    return kept


def model_of(s: Settings, name: str, run: str, split: int = 0) -> tuple[dict, eqx.Module, float]:
    """Header, network and guidance weight of a run's model for a split of a screen."""
    asked, guidance = of_screen(s, name), s.guidance
    file = train.model_file(asked, run, name, split)
    if guidance is None:
        guidance = sample.guidance_of(asked, file)
    return *model.load_model(file), guidance


def units(s: Settings, name: str, cells: int, context: int) -> list[tuple[tuple[int, int, int], Evaluation]]:
    """(split, draw, system) and tasks of every unit of a screen, as far as the settings allow."""
    found = []
    for split, folder in enumerate(tasks.splits(of_screen(s, name))[: s.splits]):
        for draw in range(s.draws):
            evaluation = tasks.evaluation_tasks(tasks.load_screen(folder), cells, context, s.seed, draw)
            for system in np.unique(evaluation.system)[: s.systems].tolist():
                of_it = evaluation.system == system
                found.append(((split, draw, system), jax.tree.map(lambda x: x[of_it], evaluation)))
    return found


def difference(what: str, values: Float[np.ndarray, "n"]) -> dict:
    """An entry of `evidence`: mean, standard error (None for one) and number of the defined paired differences."""
    values, error = values[np.isfinite(values)], None
    if len(values) > 1:
        error = float(np.std(values, ddof=1) / len(values) ** 0.5)
    return {"what": what, "difference": float(np.mean(values)), "error": error, "n": len(values)}


# ----------------------------------------------------------------------------------------------- panels, and their look

STYLES = {  # label: colour, marker, line; other labels take turns
    "MapPFN": ("C0", "o", "-"), ROWS[PRETRAINED]: ("C1", "^", "--"), ROWS[FINETUNED]: ("C3", "s", "-"),
    IDENTITY: ("0.5", "", "-."), "treated gene only": ("k", "", "--"), "random": ("k", "", ":"),
    "equal": ("0.7", "", "-"), "genes": ("0.2", "o", ""),
    "control": ("0.7", "o", "-"), "truth": ("C0", "s", "-"), "prediction": ("C3", "X", "--"),
}
USES = {  # of a condition, by tasks.USES; "C": control
    tasks.TRAIN: "Tr", tasks.VALIDATION: "V", TEST: "Te", tasks.CONTEXT: "Co", tasks.ABSENT: "",
}
COLOURS = {"C": "0.88", "Tr": "#9ecae1", "V": "#fdd870", "Te": "#e58a80", "Co": "#c7e9c0"}


class Panel(NamedTuple):
    """All that is seen in one panel, and the content of every JSON: there, undefined numbers are None."""
    title: str
    xlabel: str
    ylabel: str
    log: str = ""         # axes that are logarithmic
    x: list = []          # X
    ticks: list = []      # labels of x, if not its numbers
    curves: dict = {}     # label -> [U, X]: the mean over U is drawn, with the standard deviation over U
    paired: bool = False  # ... once each unit's own level, its mean over X, is taken out
    lines: dict = {}      # label -> where a vertical line is
    bins: list = []       # edges
    bars: dict = {}       # label -> heights; the first is a grey area
    points: dict = {}     # label -> [N, 2]; large symbols are means
    boxes: dict = {}      # label of a row -> for each of the ticks, one of COLOURS and a number


def style(label: str, i: int) -> tuple[str, str, str]:
    """Colour, marker and line of the i-th thing in a panel."""
    return STYLES.get(label, (f"C{i}", "o^sDv<>ph*d8"[i % 12], "-"))


def draw_curve(axis, p: Panel, label: str, values: Float[np.ndarray, "U X"], look: tuple[str, str, str]) -> None:
    """Units with an undefined value are left out."""
    colour, marker, line = look
    values = values[np.isfinite(values).all(axis=1)]
    if not len(values):
        return
    mean, sd, count = values.mean(axis=0), None, values.shape[1]
    if len(values) > 1 and marker:
        if p.paired:
            # Taking the level out makes a standard deviation too small by sqrt((X - 1) / X) (Morey, 2008).
            values = (values - values.mean(axis=1, keepdims=True)) * np.sqrt(count / max(1, count - 1))
        sd = values.std(axis=0, ddof=1)
    axis.errorbar(p.x, mean, sd, color=colour, marker=marker, ls=line, lw=1.3, ms=5, capsize=3, label=label)


def draw_panel(axis, p: Panel) -> None:
    """Whatever is in it."""
    axis.set_title(p.title, fontsize=9)
    axis.set(xlabel=p.xlabel, ylabel=p.ylabel)
    for i, (label, values) in enumerate(p.curves.items()):
        draw_curve(axis, p, label, np.array(values, float), style(label, i))
    for label, x in p.lines.items():
        axis.axvline(x, color=style(label, 7)[0], ls=":", lw=1, label=label)
    for i, (label, heights) in enumerate(p.bars.items()):
        colour, _, line = style(label, i)
        axis.stairs(heights, p.bins, label=label, color=colour if i else "0.8", ls=line, lw=1.8, fill=i == 0)
    for i, (label, points) in enumerate(p.points.items()):
        points, (colour, marker, _) = np.array(points), style(label, i)
        axis.scatter(*points.T, s=10, color=colour, marker=marker, alpha=0.4, lw=0)
        axis.scatter(*points.mean(axis=0), s=90, color=colour, marker=marker, ec="k", label=label, zorder=3)
    for i, row in enumerate(p.boxes.values()):
        for j, (use, cells) in enumerate(row):
            if use and cells:
                axis.fill_between([j - 0.48, j + 0.48], i - 0.46, i + 0.46, color=COLOURS[use], lw=0)
                axis.text(j, i, f"{use}\n{cells}", ha="center", va="center", fontsize=6)
    axis.set_xscale("log" if "x" in p.log else "linear")
    axis.set_yscale("log" if "y" in p.log else "linear")
    if p.ticks:
        axis.set_xticks(p.x, p.ticks, fontsize=7)
        axis.minorticks_off()
    if p.boxes:
        axis.tick_params(axis="x", rotation=90)
        axis.set_yticks(range(len(p.boxes)), p.boxes, fontsize=7)
        axis.invert_yaxis()
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=7)


def draw(document: dict, scale: str, path: Path) -> None:
    """Draw a figure from the content of its JSON: at most four panels side by side, boxes below one another."""
    plt.switch_backend("Agg")  # no window
    panels = [Panel(**panel) for panel in document["data"]["panels"]]
    columns, width, height = min(4, len(panels)), 3.6, 3.2
    if panels[0].boxes:
        columns, width, height = 1, 9, 2.2
    rows = -(-len(panels) // columns)
    share = bool(panels[0].points)  # the same plane
    canvas, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows + 0.4), layout="constrained",
                                squeeze=False, sharex=share, sharey=share)
    small = f" ({scale} scale, not the paper's)" * (scale != "paper")
    canvas.suptitle(document["title"] + small, fontsize=10)
    for axis, p in zip(axes.flat, panels):
        draw_panel(axis, p)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    with scales.atomic(path) as temporary:
        canvas.savefig(temporary, dpi=100, format="png")
        with PIL.Image.open(temporary) as picture:  # 128 colours are enough, and a third of the size
            picture.convert("RGB").quantize(128).save(temporary, format="png", optimize=True)
    plt.close(canvas)


# ------------------------------------------------------- one task (Figure 1), its prediction, and the split (Figure 4)


def first_prediction(s: Settings) -> tuple[Screen, Path, metrics.Predictions]:
    """Split 0, first draw, of the first screen with a fine-tuned model, else with any: not chosen for its looks."""
    name, screen, runs = max(chosen(s, s.screens), key=lambda shown: FINETUNED in shown.runs)
    file = tasks.samples_file(of_screen(s, name), list(runs)[-1], 0, 0)
    return screen, file, metrics.load_predictions(file)


def compute_overview(s: Settings) -> Found:
    """All that the model is given of its first test condition, and its answer, on two principal components."""
    screen, file, p = first_prediction(s)
    made = p.meta["settings"]
    # The file lacks the context experiments: the tasks are made again.
    context = min(p.meta["training"]["context"], sample.most_experiments(screen))
    again = tasks.evaluation_tasks(screen, made["eval_cells"], context, made["seed"])
    if not np.array_equal(again.target, p.target):
        raise BadInput(f"{file}: not made from the present screen; delete it and run sample.py again")
    cells = {"control": p.controls[0], "truth": p.target[0], "prediction": p.prediction[0]}
    given = {"control": p.controls[0]}
    for one_hot, population in zip(again.given.context_treatments[0], again.given.context[0]):
        given[f"do({screen.genes[one_hot.argmax()]})"] = population
    fitted = np.concatenate([p.target[0], *given.values()])
    centre = fitted.mean(axis=0)
    plane = np.linalg.svd(fitted - centre, full_matrices=False)[2][:2].T
    panels = []
    for title, populations in {f"given: control cells and {context} context experiments": given,
                               f"asked: do({screen.genes[p.treatments[0].argmax()]})": cells}.items():
        points = {label: ((x - centre) @ plane).round(3) for label, x in populations.items()}
        panels.append(Panel(title, f"PC 1 [{UNITS[screen.log_expression]}]", "PC 2", points=points))
    return Found(panels, f"What {p.meta['row']} is given in one task ({screen.made['title']}, first test condition of "
                 f"split 0), and its prediction, on the principal components of the true cells; n = {len(p.target[0])} "
                 "cells a population.")


def compute_prediction(s: Settings) -> Found:
    """The same answer gene by gene: means of all genes, cells of the treated and of the most changed other gene."""
    screen, _, p = first_prediction(s)
    cells = {"control": p.controls[0], "truth": p.target[0], "prediction": p.prediction[0]}
    level, unit, treated = p.controls[0].mean(axis=0), UNITS[screen.log_expression], int(p.treatments[0].argmax())
    true, predicted = p.target[0].mean(axis=0) - level, p.prediction[0].mean(axis=0) - level
    panels = [Panel(f"do({screen.genes[treated]})", f"true change of the mean [{unit}]", "predicted change", x=true,
                    curves={"equal": [true], "genes": [predicted]}, lines={"treated gene": true[treated]})]
    others = np.abs(true)
    others[treated] = -1
    for title, gene in {"treated gene": treated, "most changed other gene": int(others.argmax())}.items():
        bins = np.histogram_bin_edges(np.concatenate(list(cells.values()))[:, gene], 20)
        bars = {label: np.histogram(x[:, gene], bins)[0] for label, x in cells.items()}
        panels.append(Panel(title, f"{screen.genes[gene]} [{unit}]", "cells", bins=bins, bars=bars))
    return Found(panels, f"One prediction against the truth ({screen.made['title']}, {p.meta['row']}, first test "
                 f"condition of split 0, n = {len(p.target[0])} cells): change of each gene's mean, and two genes.")


def compute_split(s: Settings) -> tuple[list, str, list]:
    """Use and number of cells of each condition in split 0, of every screen with few enough systems to show."""
    panels = []
    for name, screen, _ in all_screens(s):
        if len(screen.systems) > 10 or name.endswith("-wide"):
            continue
        boxes = {}
        for system, split, count in zip(screen.systems, screen.split.tolist(), screen.count.tolist()):
            uses = [USES[use] for use in split]
            uses[CONTROL] = "C"
            boxes[system] = list(zip(uses, count))
        treatments = screen.treatment_names
        panels.append(Panel(screen.made["title"], "treatment", "system", x=list(range(len(treatments))),
                            ticks=treatments, boxes=boxes))
    if not panels:
        raise BadInput(f"no screen of at most 10 systems in {s.out / s.scale / 'screens'}; data.py makes them")
    caption = ("Use of each condition in split 0, and its number of cells: control, train, validation, test, context "
               "(known, in a held-out system). Empty: no data.")
    return panels, caption, []


# ---------------------------------------------------------------------------- variances during pre-training (Figure 2)


def variance_correlation(true: Float[np.ndarray, "N D"], predicted: Float[np.ndarray, "L D"]) -> float:
    """Pearson correlation over genes of the variances over cells; NaN where all genes of one side vary equally."""
    a, b = true.var(axis=0, dtype=float), predicted.var(axis=0, dtype=float)
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def compute_variance(s: Settings) -> tuple[list, str, list]:
    """Every snapshot of every run, on held-out systems of its own prior and on real test conditions, zero-shot."""
    panels, evidence = {}, []
    for folder in sorted((s.out / s.scale / "train").glob("*/split-0/snapshots")):
        files = {int(file.stem.removeprefix("update-")): file for file in folder.glob("update-*.eqx")}
        head, _ = model.load_model(files[max(files)])
        places = {"held-out systems of its own prior": load_first(s, head["screen"])}
        for _, screen, _ in chosen(s, s.screens):
            if screen.log_expression:
                places[screen.made["title"]] = screen
        seen = [update * head["micro_batch"] * head["accumulate"] for update in sorted(files)]
        for number, (title, screen) in enumerate(places.items()):
            p = Panel(title, "training tasks seen", "correlation of variances ↑", x=seen, curves={}, paired=True)
            p = panels.setdefault((title, *seen), p)  # runs with other snapshots have panels of their own
            ordered = [files[update] for update in sorted(files)]
            p.curves[folder.parents[1].name] = snapshot_values(s, ordered, screen, head["context"], number)
    if not panels:
        raise BadInput(f"no snapshots in {s.out / s.scale / 'train'}; train.py --snapshots 12 makes them")
    for p in panels.values():
        for run, paired in p.curves.items():
            if f"{run}-unpaired" in p.curves:
                values = np.nanmean(paired - p.curves[f"{run}-unpaired"], axis=0)
                last = max(2, len(values) // 3)
                evidence.append(difference(f"correlation of variances, {p.title}: {run} minus {run}-unpaired, last "
                                           f"{last} snapshots of one run each", values[-last:]))
    caption = (f"Correlation over genes of predicted and true variances; bars: sd over n = {s.snapshot_tasks} tasks of "
               f"{s.cells} cells, the same for all points, each one's mean level taken out.")
    return list(panels.values()), caption, evidence


def snapshot_values(s: Settings, files: list[Path], screen: Screen, context: int,
                    number: int) -> Float[np.ndarray, "P X"]:
    """Variance correlation of every task and snapshot; all snapshots have the same tasks and noise."""
    rng = scales.generator("figure", s.seed, number)
    context = min(context, sample.most_experiments(screen))
    batch = tasks.sample_tasks(rng, screen, s.snapshot_tasks, s.cells, context, TEST)
    values = np.empty((s.snapshot_tasks, len(files)))
    for i, file in enumerate(tqdm(files, unit="snapshot", desc=f"variance: {screen.made['title']}")):
        _, network = model.load_model(file)
        # [D49] paper: silent; here: weight 1, since guidance changes the variances.
        cells = sample.generate(network, batch.given, 1.0, s.steps, key=scales.key("figure", s.seed))
        cells, _ = sample.clip_expression(cells, screen.log_expression)
        values[:, i] = [variance_correlation(*pair) for pair in zip(batch.target, cells)]
    return values


# ---------- one thing varies, all else stays: Figures 3 and 5, guidance (Table 7), steps of the ODE solver (A.4)

METRICS = ("W2 ↓ [squared units]", "PDS ↓", "RMSE ↓", "AUPRC ↑")


class Sweep(NamedTuple):
    """What is varied: label of the axis, what is shown, logarithmic axes, what of the paper's settings it varies."""
    label: str
    metrics: tuple[str, ...]
    log: str = ""


SWEEPS = {
    "context": Sweep("context experiments K given", METRICS[:2]),
    "cells": Sweep("cells given per population", METRICS[:2], "x"),
    "guidance": Sweep("guidance weight", METRICS),
    "steps": Sweep("Dopri5 steps (6 evaluations each)", ("largest difference", "root mean square"), "xy"),
    "tta": Sweep("", ("AUPRC ↑",)),
}
WAYS = ["single passes", "augmented,\nas many cells", "augmented,\nall cells"]


def scores(true: Float[np.ndarray, "all N D"], predicted: Float[np.ndarray, "P L D"],
           controls: Float[np.ndarray, "all O D"], log_expression: bool) -> list[float]:
    """METRICS of the P conditions that are predicted, the first of `true`; the others are rivals for PDS."""
    predicted, _ = sample.clip_expression(predicted, log_expression)
    count, auprc, pairs = len(predicted), np.nan, list(zip(true, predicted))
    ranks = metrics.pds_ranks(true, np.concatenate([predicted, true[count:]]))
    if log_expression:
        auprc = metrics.deg_auprc(controls[:count], true[:count], predicted)["auprc"]
    return [np.mean([metrics.wasserstein(*pair) for pair in pairs]), ranks[:count].mean(),
            np.mean([metrics.rmse(*pair) for pair in pairs]), auprc]


def predict(s: Settings, network: eqx.Module, e: Evaluation, key: PRNGKeyArray, context: int, cells: int,
            guidance: float, steps: int) -> Float[np.ndarray, "P N D"]:
    """The first tasks of a unit, given the first context experiments and the first cells of each population."""
    given = Given(e.given.controls[: s.tasks, :cells], e.given.context[: s.tasks, :context, :cells],
                  e.given.context_treatments[: s.tasks, :context], e.given.query[: s.tasks])
    return sample.generate(network, given, guidance, steps, s.cells, key=key)


def unit_curves(s: Settings, what: str, x: list, shown: Shown, numbers: tuple[int, int, int],
                e: Evaluation) -> dict[str, list]:
    """[X, M] of each model in one unit, and of what needs no model."""
    true, controls, log_expression = e.target[:, : s.cells], e.given.controls[:, : s.cells], shown.screen.log_expression
    curves, key = {}, scales.key("figure", s.seed, *numbers)
    if what in ("context", "cells", "guidance"):
        curves[IDENTITY] = [scores(true, e.identity[: s.tasks, : s.cells], controls, log_expression)] * len(x)
    for row, run in shown.runs.items():
        head, network, guidance = model_of(s, shown.name, run, numbers[0])
        if what == "tta":
            return tta_curves(s, head["genes"], network, guidance, numbers, e)
        usual = {"context": min(head["context"], e.given.context.shape[1]), "cells": s.cells, "guidance": guidance,
                 "steps": s.steps}
        if what == "steps":
            finest = predict(s, network, e, key, **usual | {"steps": s.ode_reference})
        curve = curves.setdefault(ROWS[row], [])
        for value in x:
            cells = predict(s, network, e, key, **usual | {what: value})
            if what == "steps":
                error = np.maximum(np.abs(cells - finest), 1e-9)  # the axis is logarithmic
                curve.append([error.max(), np.sqrt(np.mean(error**2))])
            else:
                curve.append(scores(true, cells, controls, log_expression))
    return curves


def tta_curves(s: Settings, size: int, network: eqx.Module, guidance: float, numbers: tuple[int, ...],
               e: Evaluation) -> dict[str, list]:
    """AUPRC [X, 1] of the three WAYS to predict one unit with a model of `size` genes (6), and of two rules."""
    treated, count = e.given.context.shape[1] + 1, min(s.tasks, len(e.target))
    fewest = -(-(e.given.query.shape[1] - treated) // (size - treated))  # subsets that reach all genes
    predicted = [], [], []  # by way, then by task
    for i in range(count):
        given, pooled = Given(*(field[i] for field in e.given)), []
        for subsets in (fewest, s.subsets):
            # With equal seeds the few subsets are the first of the many, with the same noise: a paired comparison.
            rng, key = scales.generator("figure", s.seed, *numbers, i), scales.key("figure", s.seed, *numbers, i)
            cells = sample.augmented(network, given, size, subsets, rng, guidance, s.steps, key=key)
            pooled.append(np.maximum(cells, 0))
        for way, cells in zip(predicted, (pooled[0][: s.cells], pooled[1][: s.cells], pooled[1])):
            way.append(cells)
    curves = {ROWS[PRETRAINED]: [], "treated gene only": [], "random": []}
    for populations in predicted:
        least = min(len(cells) for cells in populations)  # the rarest gene's cells may differ between tasks
        stacked = np.stack([cells[:least] for cells in populations])
        area = metrics.deg_auprc(e.given.controls[:count], e.target[:count], stacked, e.given.query[:count])
        for curve, name in zip(curves.values(), ("auprc", "target_only", "base_rate")):
            curve.append([area[name]])
    return curves


def wide_screens(s: Settings) -> list[Shown]:
    """NAME-wide, with more genes, of each screen NAME that the pre-trained model has predicted."""
    found = []
    for name, _, runs in chosen(s, s.screens):
        if PRETRAINED in runs and (s.out / s.scale / "screens" / f"{name}-wide").is_dir():
            found.append(Shown(f"{name}-wide", load_first(s, f"{name}-wide"), {PRETRAINED: runs[PRETRAINED]}))
    if not found:
        raise BadInput(f"no screen NAME-wide of a predicted screen NAME in {s.out / s.scale / 'screens'}; "
                       "data.py --name NAME-wide with twice the --genes makes it")
    return found


def values_of(s: Settings, what: str, screen: Screen, trained: int) -> list:
    """The values of what varies, as far as there are experiments and cells."""
    if what == "cells":
        count = screen.count[(screen.split == TEST).any(axis=1)]
        most = min(s.most_cells, int(count[count > 0].min()))
        return sorted({min(most, max(2, round(multiple * trained))) for multiple in s.multiples})
    return {"context": [k for k in s.contexts if k <= sample.most_experiments(screen)], "guidance": list(s.weights),
            "steps": [n for n in s.ode_steps if n < s.ode_reference], "tta": [0, 1, 2]}[what]


def compute_sweep(s: Settings, what: str) -> tuple[list, str, list]:
    """A panel for each screen and metric, a curve for each model."""
    panels, evidence, sizes, sweep = [], [], [], SWEEPS[what]
    if what == "steps":
        s = dataclasses.replace(s, splits=1, draws=s.ode_tasks, systems=1, tasks=1)
    if what == "tta":
        s = dataclasses.replace(s, splits=1, draws=s.tta_draws)
    for shown in wide_screens(s) if what == "tta" else chosen(s, s.screens):
        models = {ROWS[row]: model_of(s, shown.name, run) for row, run in shown.runs.items()}
        head, lines = next(iter(models.values()))[0], {}
        if what == "guidance":
            lines = {f"chosen: {label}": weight for label, (_, _, weight) in models.items()}
        elif what in head:
            lines = {"as in training": head[what]}
        x, most = values_of(s, what, shown.screen, head["cells"]), sample.most_experiments(shown.screen)
        if what != "context":
            most = min(most, head["context"])
        # The tasks have enough for the largest value; smaller ones get their first experiments and cells.
        cells = max(s.cells, *x) if what == "cells" else s.cells
        values = {}
        for numbers, e in tqdm(units(s, shown.name, cells, most), unit="unit", desc=f"{what}: {shown.name}"):
            for label, curve in unit_curves(s, what, x, shown, numbers, e).items():
                values.setdefault(label, []).append(curve)
        values = {label: np.array(curves) for label, curves in values.items()}  # U X M
        title = f"{shown.screen.made['title']}, {len(shown.screen.genes)} genes"
        sizes.append(f"{title} n = {len(curve)}")
        for i, metric in enumerate(sweep.metrics):
            curves = {label: array[..., i] for label, array in values.items()}
            if np.isfinite(list(curves.values())).any():  # AUPRC of SCM values, or where no gene changes, is not
                ticks = WAYS if what == "tta" else [f"{value:g}" for value in x]
                panels.append(Panel(title, sweep.label, metric, sweep.log, x, ticks, curves, bool(lines), lines))
        evidence += improvements(what, title, x, lines, values)
    caption = (f"Tasks, noise and {s.cells} true cells a condition are the same for all points. Bars: sd over held-out "
               f"systems, splits and draws ({', '.join(sizes)})")
    return panels, caption, evidence


# ------------------------------------------------------------------------------------ coverage of the prior (Figure 6)

BINS = {"log expression above 0": np.linspace(0, 7, 36), "log2 fold change against control": np.linspace(-5, 5, 51)}


def values_of_screen(screen: Screen, systems: int | None = None) -> list[Float[np.ndarray, "n"]]:
    """Expression of every gene in every cell, and every gene's fold change by every treatment."""
    cells, changes = [], []
    for s, t in np.argwhere(screen.count[:systems] > 0).tolist():
        cells.append(screen.pool(s, t).ravel())
        if t != CONTROL:
            _, change = metrics.differential_expression(screen.pool(s, CONTROL)[None], screen.pool(s, t)[None])
            changes.append(change[0])
    return [np.concatenate(cells), np.concatenate(changes)]


def compute_coverage(s: Settings) -> tuple[list, str, list]:
    """The prior of the pre-trained model, and every screen of log-expression that was predicted."""
    found = [shown for shown in chosen(s, len(all_screens(s))) if shown.screen.log_expression]
    priors = [model_of(s, name, runs[PRETRAINED])[0]["screen"] for name, _, runs in found if PRETRAINED in runs]
    if not priors:
        raise BadInput(f"no predictions of {PRETRAINED} in {s.out / s.scale / 'samples'}; sample.py makes them")
    values = {"prior": values_of_screen(load_first(s, priors[0]), s.grns)}
    for _, screen, _ in found:
        values[screen.made["title"]] = values_of_screen(screen)
    panels, evidence = [], []
    for i, (what, bins) in enumerate(BINS.items()):
        bars = {}
        for title, both in values.items():
            counts, _ = np.histogram(both[i][both[i] != 0], bins)
            bars[f"{title}: {1 - counts.sum() / len(both[i]):.0%} 0 or outside"] = counts / len(both[i]) / np.diff(bins)
            if title == "prior":
                reached = counts > 0
            else:
                evidence.append({"what": f"{title}, {what}: share in bins that the prior reaches", "error": None,
                                 "difference": counts[reached].sum() / counts.sum(), "n": int(counts.sum())})
        panels.append(Panel("", what, "density", "y" * i, bins=bins, bars=bars))
    caption = (f"The prior (at most {s.grns} systems) and the screens: expression of genes in single cells, and fold "
               "change of each gene's mean by each treatment; the label says which share is 0 or out of range.")
    return panels, caption, evidence


# ----------------------------------------------------------------------------------------------------------- the stage

FIGURES = {
    "overview": ("Figure 1. A task on real cells", compute_overview),
    "prediction": ("A prediction against the truth", compute_prediction),
    "split": ("Figure 4. Split as built", compute_split),
    "variance": ("Figure 2. Paired and unpaired prior", compute_variance),
    "tta": ("Figure 3. Test-time augmentation", compute_tta),
    "context": ("Figure 5a. More context experiments", partial(compute_sweep, what="context")),
    "cells": ("Figure 5b. More cells", partial(compute_sweep, what="cells")),
    "guidance": ("Guidance", partial(compute_sweep, what="guidance")),
    "ode": ("Error of the ODE solver", partial(compute_sweep, what="steps")),
    "coverage": ("Figure 6. Coverage of the prior", compute_coverage),
}


def write(name: str, s: Settings, about: dict, path: Path) -> None:
    """Compute a figure and write its JSON; a missing input is written down as the reason why it was not run."""
    start, (title, compute) = time.perf_counter(), FIGURES[name]
    try:
        panels, caption, evidence = compute(s)
        document = about | {"title": title, "caption": caption, "revision": scales.revision(), "evidence": evidence,
                            "seconds": round(time.perf_counter() - start, 1),
                            "data": {"panels": [p._asdict() for p in panels]}}
    except BadInput as error:
        document = {"title": title, "not_run": str(error)}
    text = json.dumps(document, default=lambda array: array.tolist())
    document = json.loads(text, parse_constant=lambda nan: None)  # JSON has no NaN
    with scales.atomic(path) as temporary:
        temporary.write_text(json.dumps(document) + "\n", encoding="utf-8")


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
    screens = {}  # if one of them or what has predicted it changes, figures are computed again
    for name, screen, runs in all_screens(s):
        screens[name] = {"fingerprint": screen.made["fingerprint"], "runs": runs}
    for name in s.names or FIGURES:
        path = s.out / s.scale / "figures" / f"{name}.json"
        picture = path.with_suffix(".png")
        document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if document.get("screens") == screens:
            scales.check_made(path, document["settings"], settings)
        else:
            write(name, s, {"settings": settings, "screens": screens}, path)
            document = json.loads(path.read_text(encoding="utf-8"))
        if "not_run" in document:
            picture.unlink(missing_ok=True)  # of numbers that are gone
            print(f"{path}: not run: {document['not_run']}", flush=True)
        else:
            draw(document, s.scale, picture)
            print(f"{picture}: its numbers took {document['seconds']} s", flush=True)


if __name__ == "__main__":
    scales.run(main)
