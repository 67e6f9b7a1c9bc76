"""Stage 7 of 8, the figures: the numbers of each as JSON, and a picture drawn from that JSON alone.

Paper: section 6, Figures 1 to 6; `prediction`, `guidance` (Table 7) and `ode` (A.4) have no figure there. Reads
`screens/`, `train/` and `samples/` below out/<scale>, writes `figures/<name>.json` and, by drawing.py, `.png`; where an
input is missing, the JSON says why it was `not_run`. Shown are the screens that models of ROWS have predicted, with the
first training of each (Figure 2: with all). The evidence for a claim is judged by judge.py. Departure: D49.

    python figures.py --scale smoke|laptop|paper       all of them: 1 / 6 min / not timed, on two CPU cores
    python figures.py overview split --scale laptop    some of them: seconds
What has the same settings and screens as before is only drawn again; delete its JSON to compute it anew.

    unit     one held-out system in one split and draw of cells
    U units   P tasks   X values of what varies   M metrics   K context experiments   N cells   D genes
"""

import dataclasses
import json
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
import tyro
from jaxtyping import Float, PRNGKeyArray
from tqdm import tqdm

import judge
import metrics
import model
import sample
import scales
import tasks
import train
from drawing import Panel, draw
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
    most_cells: int = 800  # Figure 5b: and at most this many
    weights: tuple[float, ...] = sample.GUIDANCE  # of guidance (Table 7)
    subsets: int = 10  # Figure 3: of the genes (6)
    tta_draws: int = 10  # Figure 3: of cells, of split 0
    snapshot_tasks: int = 16  # Figure 2: for each point
    ode_steps: tuple[int, ...] = (5, 10, 20, 50)  # Dopri5 steps, compared with
    ode_reference: int = 100  # (released code)
    ode_tasks: int = 4  # of each screen
    grns: int = 200  # Figure 6: systems of the prior, at most
    out: Path = Path("out")  # everything is below out/<scale>


PRETRAINED, FINETUNED = "mappfn-pretrained-seed0", "mappfn-finetuned-seed0"
ROWS = {"mappfn-seed0": "MapPFN", PRETRAINED: "pre-trained (zero-shot)", FINETUNED: "fine-tuned"}  # label in a figure
IDENTITY = "other control cells"
USES = {tasks.TRAIN: "Tr", tasks.VALIDATION: "V", TEST: "Te", tasks.KNOWN_ONLY: "Co", tasks.ABSENT: ""}  # Figure 4
UNITS = {True: "log expression", False: "sd of a variable"}  # by Screen.log_expression

# ------------------------------------------------------------------------------------------- what there is to be shown


class Shown(NamedTuple):
    """A screen, and the models that have predicted it."""
    name: str
    screen: Screen  # split 0
    runs: dict[str, str]  # row of the tables -> run of train.py
    weights: dict[str, int]  # likewise, checksum of the model


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
        name, runs, weights = folder.parent.name, {}, {}
        for file in sorted((s.out / s.scale / "samples" / name).glob("[!.]*-split0-draw0.npz")):
            meta = metrics.load_predictions(file).meta
            if "model" in meta and "~" not in meta["row"]:
                runs[meta["row"]], weights[meta["row"]] = meta["model"], meta["settings"].get("weights")
        found.append(Shown(name, tasks.load_screen(folder), runs, weights))
    return sorted(found, key=lambda shown: not shown.screen.made.get("paper"))


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
    """Header, network and guidance weight of a run's model for one split of a screen."""
    asked, guidance = of_screen(s, name), s.guidance
    file = model.model_file(asked, run, name, split)
    if guidance is None:
        guidance = sample.guidance_of(asked, file)
    return *model.load_model(file), guidance


# ------------------------------------------------------- one task (Figure 1), its prediction, and the split (Figure 4)
# Each function returns panels, a caption (what is shown, over what the spread is), and evidence for the paper's claims.


def first_prediction(s: Settings) -> tuple[Screen, Path, metrics.Predictions]:
    """Split 0, first draw, of the first screen with a fine-tuned model, else with any: not chosen for its looks."""
    shown = max(chosen(s, s.screens), key=lambda shown: FINETUNED in shown.runs)
    file = tasks.samples_file(of_screen(s, shown.name), list(shown.runs)[-1], 0, 0)
    return shown.screen, file, metrics.load_predictions(file)


def do(screen: Screen, treatment: Float[np.ndarray, "D"]) -> str:
    """How a treatment is called."""
    return f"do({screen.genes[np.abs(treatment).argmax()]})"


def compute_overview(s: Settings) -> tuple[list, str, list]:
    """All that the model is given of its first test condition, and its answer, on two principal components."""
    screen, file, p = first_prediction(s)
    made = p.meta["settings"]
    # The file lacks the context experiments: the tasks are made again.
    context = min(p.meta["training"]["context"], sample.most_experiments(screen))
    again = tasks.evaluation_tasks(screen, made["eval_cells"], context, made["seed"])
    if not np.array_equal(again.target, p.target):
        raise BadInput(f"{file}: not made from the present screen; delete it and run sample.py again")
    given = {"control": p.controls[0]}
    for treatment, population in zip(again.given.context_treatments[0], again.given.context[0]):
        given[do(screen, treatment)] = population
    asked = {"control": p.controls[0], "truth": p.target[0], "prediction": p.prediction[0]}
    fitted = np.concatenate([p.target[0], *given.values()])
    plane = np.linalg.svd(fitted - fitted.mean(axis=0), full_matrices=False)[2][:2].T
    panels = []
    for title, cells in (("given", given), (f"asked: {do(screen, p.treatments[0])}", asked)):
        points = {label: ((x - fitted.mean(axis=0)) @ plane).round(3) for label, x in cells.items()}
        panels.append(Panel(title, f"PC 1 [{UNITS[screen.log_expression]}]", "PC 2", points=points))
    caption = (f"One task ({screen.made['title']}, first test condition of split 0) and the answer of {p.meta['row']}, "
               f"on principal components of the true cells; n = {len(p.target[0])} cells a population.")
    return panels, caption, []


def compute_prediction(s: Settings) -> tuple[list, str, list]:
    """The same answer gene by gene: means of all genes, cells of the treated and of the most changed other gene."""
    screen, _, p = first_prediction(s)
    cells = {"control": p.controls[0], "truth": p.target[0], "prediction": p.prediction[0]}
    means, unit = {label: x.mean(axis=0) for label, x in cells.items()}, UNITS[screen.log_expression]
    true, predicted = means["truth"] - means["control"], means["prediction"] - means["control"]
    treated = int(np.abs(p.treatments[0]).argmax())
    panels = [Panel(do(screen, p.treatments[0]), f"true change of the mean [{unit}]", "predicted change", true,
                    {"equal": [true], "genes": [predicted]}, lines={"treated gene": true[treated]})]
    others = np.abs(true)
    others[treated] = -1
    for title, gene in (("treated gene", treated), ("most changed other gene", int(others.argmax()))):
        bins = np.histogram_bin_edges([x[:, gene] for x in cells.values()], 20)
        bars = {label: np.histogram(x[:, gene], bins)[0] for label, x in cells.items()}
        panels.append(Panel(title, f"{screen.genes[gene]} [{unit}]", "cells", bins=bins, bars=bars))
    caption = (f"One answer of {p.meta['row']} ({screen.made['title']}, first test condition of split 0, n = "
               f"{len(p.target[0])} cells): change of each gene's mean against control, and cells.")
    return panels, caption, []


def compute_split(s: Settings) -> tuple[list, str, list]:
    """Use and number of cells of each condition in split 0, of every screen with few enough systems to show."""
    panels = []
    for shown in all_screens(s):
        screen = shown.screen
        if len(screen.systems) <= 10 and not shown.name.endswith("-wide"):
            boxes = {}
            for system, split, count in zip(screen.systems, screen.split.tolist(), screen.count.tolist()):
                letters = [USES[use] for use in split]
                letters[CONTROL] = "C"
                boxes[system] = list(zip(letters, count))
            panels.append(Panel(screen.made["title"], "treatment", "system", list(range(len(screen.treatment_names))),
                                ticks=screen.treatment_names, boxes=boxes))
    if not panels:
        raise BadInput(f"no screen of at most 10 systems in {s.out / s.scale / 'screens'}; data.py makes them")
    caption = ("Use of each condition in split 0, and number of its cells: control, train, validation, test, context "
               "(known, in a held-out system). Empty: no data.")
    return panels, caption, []


# ---------------------------------------------------------------------------- variances during pre-training (Figure 2)


def variance_correlation(true: Float[np.ndarray, "N D"], predicted: Float[np.ndarray, "L D"]) -> float:
    """Pearson correlation over genes of the variances over cells; NaN where all genes of one side vary equally."""
    a, b = true.var(axis=0, dtype=float), predicted.var(axis=0, dtype=float)
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


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


def compute_variance(s: Settings) -> tuple[list, str, list]:
    """Every snapshot of every run, on held-out systems of its own prior and on real test conditions, zero-shot. The
    trainings of one prior are one curve."""
    panels, screens = {}, {}
    for folder in sorted((s.out / s.scale / "train").glob("*/split-0/snapshots")):
        files = {int(file.stem.removeprefix("update-")): file for file in folder.glob("update-*.eqx")}
        files = dict(sorted(files.items()))
        head, _ = model.load_model(files[min(files)])
        seen = [update * head["micro_batch"] * head["accumulate"] for update in files]
        places = [("prior", "held-out systems of its own prior", load_first(s, head["screen"]))]
        for shown in chosen(s, s.screens):
            if shown.screen.log_expression:
                places.append((shown.name, shown.screen.made["title"], shown.screen))
        for number, (name, title, screen) in enumerate(places):
            p = Panel(title, "training tasks seen", "correlation of variances ↑", seen, {}, paired=True)
            p = panels.setdefault((name, *seen), p)  # runs with other snapshots have panels of their own
            prior = re.sub(r"-seed\d+$", "", folder.parents[1].name)
            values = snapshot_values(s, list(files.values()), screen, head["context"], number)
            p.curves.setdefault(prior, []).append(values)
    if not panels:
        raise BadInput(f"no snapshots in {s.out / s.scale / 'train'}; train.py --snapshots 12 makes them")
    evidence = []
    for (name, *_), p in panels.items():
        for prior in p.curves:
            if f"{prior}-unpaired" in p.curves:
                evidence += learnt(name, p.curves[prior], p.curves[f"{prior}-unpaired"])
        for prior, runs in p.curves.items():
            p.curves[prior] = np.concatenate(runs)
    caption = (f"Correlation over genes of predicted and true variances. Bars: sd over {s.snapshot_tasks} tasks of "
               f"{s.cells} cells, the same for all snapshots, and over trainings, each one's mean level taken out.")
    return list(panels.values()), caption, evidence


def learnt(screen: str, paired: list[np.ndarray], unpaired: list[np.ndarray]) -> list[dict]:
    """Evidence: faster (higher in the first third of the snapshots) and higher (in the last). Units are trainings."""
    items, third = [], max(1, paired[0].shape[1] // 3)
    for what, part in (("first", slice(third)), ("last", slice(-third, None))):
        row, rival = ([float(np.nanmean(run[:, part])) for run in runs] for runs in (paired, unpaired))
        items.append({"what": f"{what} third", "screen": screen} | judge.two_samples(row, rival))
    return judge.decide(items)


# ----------------- one thing varies, all else stays: Figures 3 and 5, guidance (Table 7), steps of the solver (A.4)

METRICS = ("W2 ↓ [squared units]", "PDS ↓", "RMSE ↓", "AUPRC ↑")
WAYS = ("single passes", "augmented,\nas many cells", "augmented,\nall cells")
SWEEPS = {  # what varies: label, what is shown, logarithmic axes
    "context": ("context experiments K given", METRICS[:2], ""),
    "cells": ("cells given per population", METRICS[:2], "x"),
    "guidance": ("guidance weight", METRICS, ""),
    "steps": ("Dopri5 steps (6 evaluations each)", ("largest difference", "root mean square difference"), "xy"),
    "tta": ("", METRICS[3:], ""),
}


class Unit(NamedTuple):
    """One held-out system in one split and draw of cells."""
    numbers: tuple[int, int, int]  # split, draw, system
    tasks: Evaluation
    keys: list[tuple]              # of its P conditions: what judge.py compares them by


def longer(rng: np.random.Generator, screen: Screen, e: Evaluation, cells: int) -> Given:
    """What is given, with so many cells in each population: different ones, or all that there are and repeats."""
    def population(s: int, t: int) -> np.ndarray:
        pool = screen.pool(s, t)
        again = rng.integers(len(pool), size=max(0, cells - len(pool)))
        return pool[np.concatenate([rng.permutation(len(pool))[:cells], again])]

    controls, context = [], np.empty((*e.given.context.shape[:2], cells, e.given.context.shape[-1]), np.float32)
    for i, s in enumerate(e.system.tolist()):
        controls.append(population(s, CONTROL))
        for k, treatment in enumerate(e.given.context_treatments[i]):
            t = (screen.treatments[s] == treatment).all(axis=-1).argmax()
            context[i, k] = population(s, int(t))
    return e.given._replace(controls=np.array(controls), context=context)


def units(s: Settings, name: str, context: int, given: int = 0) -> list[Unit]:
    """Every unit of a screen, as far as the settings allow; `given` cells in the given populations, if there are more
    of them than of true ones."""
    found = []
    for split, folder in enumerate(tasks.splits(of_screen(s, name))[: s.splits]):
        screen = tasks.load_screen(folder)
        for draw in range(s.draws):
            e = tasks.evaluation_tasks(screen, s.cells, context, s.seed, draw)
            if given > s.cells:
                e = e._replace(given=longer(scales.generator("figure", s.seed, split, draw), screen, e, given))
            for system in np.unique(e.system)[: s.systems].tolist():
                of_it = e.system == system
                keys = [(split, system, treatment) for treatment in e.treatment[of_it].tolist()]
                found.append(Unit((split, draw, system), jax.tree.map(lambda x: x[of_it], e), keys))
    return found


def scores(true: Float[np.ndarray, "all N D"], predicted: Float[np.ndarray, "P L D"],
           controls: Float[np.ndarray, "all O D"], log_expression: bool) -> Float[np.ndarray, "P M"]:
    """METRICS of the P conditions that are predicted, the first of `true`; the others are rivals for PDS."""
    predicted, _ = sample.clip_expression(predicted, log_expression)
    count, auprc, pairs = len(predicted), np.full(len(predicted), np.nan), list(zip(true, predicted))
    ranks = metrics.pds_ranks(true, np.concatenate([predicted, true[count:]]))
    if log_expression:
        area = metrics.deg_auprc(controls[:count], true[:count], predicted)
        auprc = judge.centred(area["conditions"], area["auprc"])
    w2, rmse = [metrics.wasserstein(*pair) for pair in pairs], [metrics.rmse(*pair) for pair in pairs]
    return np.column_stack([w2, ranks[:count], rmse, auprc])


def model_points(s: Settings, what: str, x: list, e: Evaluation, head: dict, network: eqx.Module, guidance: float,
                 log_expression: bool, key: PRNGKeyArray) -> Float[np.ndarray, "X P M"]:
    """METRICS of one model in one unit; smaller values get the first experiments and the first cells."""
    usual = {"context": min(head["context"], e.given.context.shape[1]), "cells": s.cells, "guidance": guidance,
             "steps": s.steps}

    def predict(value):
        now = usual | {what: value}
        k, n = now["context"], now["cells"]
        given = Given(e.given.controls[: s.tasks, :n], e.given.context[: s.tasks, :k, :n],
                      e.given.context_treatments[: s.tasks, :k], e.given.query[: s.tasks])
        return sample.generate(network, given, now["guidance"], now["steps"], s.cells, key=key)

    if what == "steps":
        finest, points = predict(s.ode_reference), []
        for value in x:
            error = np.maximum(np.abs(predict(value) - finest), 1e-9)  # the axis is logarithmic
            points.append(np.stack([error.max(axis=(1, 2)), np.sqrt(np.mean(error**2, axis=(1, 2)))], axis=-1))
        return np.array(points)
    controls = e.given.controls[:, : s.cells]
    return np.array([scores(e.target, predict(value), controls, log_expression) for value in x])


def tta_points(s: Settings, e: Evaluation, size: int, network: eqx.Module, guidance: float,
               numbers: tuple[int, ...]) -> dict[str, Float[np.ndarray, "X P 1"]]:
    """AUPRC of the three WAYS to predict one unit with a model of `size` genes (6), and of two rules."""
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
        curves[ROWS[PRETRAINED]].append(judge.centred(area["conditions"], area["auprc"]))
        curves["treated gene only"].append(np.full(count, area["target_only"]))
        curves["random"].append(np.full(count, area["base_rate"]))
    return {label: np.array(curve)[..., None] for label, curve in curves.items()}


def experiment_sizes(splits: list[Screen]) -> Float[np.ndarray, "n"]:
    """Number of cells of every experiment that can be given in a test task."""
    found = []
    for screen in splits:
        tested = (screen.split == TEST).any(axis=1)
        found.append(screen.count[tested, 1:][np.isin(screen.split[tested, 1:], tasks.KNOWN)])
    return np.concatenate(found).astype(float)


def cells_given(s: Settings, splits: list[Screen], trained: int) -> list[int]:
    """Multiples of the cells in training, up to the limit and to the largest experiment. Those with fewer cells are
    given whole, with repeats: as only then does a screen of rare treatments reach above the trained size."""
    most = min(s.most_cells, int(experiment_sizes(splits).max()))
    return sorted({min(most, max(2, round(multiple * trained))) for multiple in s.multiples})


def wide_screens(s: Settings) -> list[Shown]:
    """NAME-wide, with more genes, of each screen NAME that the pre-trained model has predicted."""
    found = []
    for shown in chosen(s, s.screens):
        wide = f"{shown.name}-wide"
        if PRETRAINED in shown.runs and (s.out / s.scale / "screens" / wide).is_dir():
            runs = {PRETRAINED: shown.runs[PRETRAINED]}
            found.append(shown._replace(name=wide, screen=load_first(s, wide), runs=runs))
    if not found:
        raise BadInput(f"no screen NAME-wide of a predicted screen NAME in {s.out / s.scale / 'screens'}; "
                       "data.py --name NAME-wide with twice the --genes makes it")
    return found


def sweep_screen(s: Settings, what: str, x: list, context: int, shown: Shown) -> tuple[list[Unit], dict[str, list]]:
    """The units, and for each model, and for what needs no model, the values [X, P, M] of every unit."""
    log_expression, values = shown.screen.log_expression, {}
    found = units(s, shown.name, context, max(x) if what == "cells" else 0)
    for unit in tqdm(found, unit="unit", desc=f"{what}: {shown.name}"):
        e, of_unit = unit.tasks, {}
        for row, run in shown.runs.items():
            head, network, guidance = model_of(s, shown.name, run, unit.numbers[0])
            if what == "tta":
                of_unit = tta_points(s, e, head["genes"], network, guidance, unit.numbers)
            else:
                key = scales.key("figure", s.seed, *unit.numbers)
                of_unit[ROWS[row]] = model_points(s, what, x, e, head, network, guidance, log_expression, key)
        if what in ("context", "cells", "guidance"):
            controls = e.given.controls[:, : s.cells]
            other = scores(e.target, e.identity[: s.tasks], controls, log_expression)
            of_unit[IDENTITY] = np.array([other] * len(x))
        for label, points in of_unit.items():
            values.setdefault(label, []).append(points)
    return found, values


def defined_mean(values: Float[np.ndarray, "X P M"]) -> Float[np.ndarray, "X M"]:
    """Mean over the conditions where it is defined; NaN if nowhere."""
    return np.ma.masked_invalid(values).mean(axis=1).filled(np.nan)


def row_at(found: list[Unit], points: list[np.ndarray], i: int, sign: int, fitted_to: int) -> judge.Row:
    """The penalties, `sign` times the first metric, at the i-th value of what varies."""
    pairs = []
    for unit, values in zip(found, points):
        pairs += [pair for pair in zip(unit.keys, sign * values[i, :, 0]) if np.isfinite(pair[1])]
    return judge.Row({0: judge.averages(pairs)}, fitted_to=fitted_to)


def improvements(what: str, name: str, x: list, trained: int, found: list[Unit], values: dict[str, list],
                 fitted: dict[str, int] = {}) -> list[dict]:
    """Evidence: by how much the largest value is better than K = 1, the cells of training, or a single pass. The same
    network is compared with itself, in the same conditions."""
    items, start = [], {"context": 1, "cells": trained, "tta": 0}.get(what)
    first = x.index(start) if start in x else 0
    if start is None or first == len(x) - 1:
        return []
    for label in set(ROWS.values()) & values.keys():
        points, sign = values[label], -1 if what == "tta" else 1
        item = judge.compare(*(row_at(found, points, i, sign, fitted.get(label, 0)) for i in (-1, first)))
        text = "AUPRC, augmented" if what == "tta" else f"{label}: W2 with {x[-1]} against {x[first]}"
        if item:
            items.append({"what": text, "screen": name} | item)
        if what == "tta":
            levels = []  # AUPRC of every draw of cells, with the last and with the first of the WAYS
            for i in (-1, first):
                pairs = [(unit.numbers[1], defined_mean(of_unit)[i, 0]) for unit, of_unit in zip(found, points)]
                levels.append(list(judge.averages(pairs).values()))
            items.append({"what": "less spread over draws, augmented", "screen": name} | judge.less_spread(*levels))
    return judge.decide(sorted(items, key=lambda item: item["what"]))


def compute_sweep(s: Settings, what: str) -> tuple[list, str, list]:
    """A panel for each screen and metric, a curve for each model."""
    panels, evidence, notes, (xlabel, shown_metrics, log) = [], [], "", SWEEPS[what]
    if what == "steps":
        s = dataclasses.replace(s, splits=1, draws=s.ode_tasks, systems=1, tasks=1)
    if what == "tta":
        s = dataclasses.replace(s, splits=1, draws=s.tta_draws)
    for shown in wide_screens(s) if what == "tta" else chosen(s, s.screens):
        title, lines = f"{shown.screen.made['title']}, {len(shown.screen.genes)} genes", {}
        fitted = {}
        for row, run in shown.runs.items():
            head, _, guidance = model_of(s, shown.name, run)
            fitted[ROWS[row]] = sample.fitted_to(of_screen(s, shown.name), head, shown.screen)
            if what == "guidance":
                lines[f"chosen, {ROWS[row]}"] = guidance
            elif what in ("context", "cells"):
                lines["as in training"] = head[what]
        splits = [tasks.load_screen(folder) for folder in tasks.splits(of_screen(s, shown.name))[: s.splits]]
        context = min(sample.most_experiments(screen) for screen in splits)
        x = {"context": [k for k in s.contexts if k <= context], "cells": cells_given(s, splits, head["cells"]),
             "guidance": list(s.weights), "steps": [n for n in s.ode_steps if n < s.ode_reference],
             "tta": [0, 1, 2]}[what]
        ticks = [f"{value:g}" for value in x]
        if what == "tta":
            context, ticks = min(context, head["context"]), WAYS
        if what == "cells":
            different = np.median(np.minimum(experiment_sizes(splits), x[-1]))
            notes += f" {title}: of {x[-1]} cells given, {different:.0f} are different in the median experiment."
        found, values = sweep_screen(s, what, x, context, shown)
        means = {label: np.array([defined_mean(points) for points in of_units]) for label, of_units in values.items()}
        for i, metric in enumerate(shown_metrics):
            curves = {label: array[..., i] for label, array in means.items()}
            if np.isfinite(list(curves.values())).any():  # AUPRC of SCM values, or where no gene changes, is not
                n = len(curves[ROWS[row]])
                panels.append(Panel(f"{title}\n(n = {n})", xlabel, metric, x, curves, bool(lines), ticks, lines, log))
        evidence += improvements(what, shown.name, x, head["cells"], found, values, fitted)
    caption = (f"Tasks, noise and {s.cells} true cells a condition are the same for all points. Bars: sd over n "
               "held-out systems, splits and draws" + ", each one's mean level taken out" * bool(lines) + ".")
    return panels, caption + notes, evidence


# ------------------------------------------------------------------------------------ coverage of the prior (Figure 6)

BINS = {"log expression": np.linspace(0, 7, 36), "log2 fold change against control": np.linspace(-5, 5, 51)}


# What "covers" is to mean: at most twice the 1% of the prior's own values that lie outside its percentiles 0.5 to 99.5,
# zeros as frequent within a tenth, and histograms that share more than half.
OUTSIDE, ZEROS, OVERLAP = 0.02, 0.1, 0.5


def values_of_screen(screen: Screen, systems: int | None = None) -> list[Float[np.ndarray, "n"]]:
    """Expression of every gene in every cell, and every gene's fold change by every treatment, in the first systems."""
    cells, changes = [], []
    for s, t in np.argwhere(screen.count[:systems] > 0).tolist():
        cells.append(screen.pool(s, t).ravel())
        if t != CONTROL:
            _, change = metrics.differential_expression(screen.pool(s, CONTROL)[None], screen.pool(s, t)[None])
            changes.append(change[0])
    return [np.concatenate(cells), np.concatenate(changes)]


def covers(what: str, screen: str, prior: Float[np.ndarray, "m"], real: Float[np.ndarray, "n"],
           bins: Float[np.ndarray, "edges"]) -> list[dict]:
    """Evidence, which can fail: how much lies outside of where the prior's values are, is zero, and overlaps."""
    low, high = np.percentile(prior, [0.5, 99.5])
    outside = float(np.mean((real < low) | (real > high)))
    shares = [np.histogram(x[x != 0], bins)[0] / max(1, np.sum(x != 0)) for x in (prior, real)]
    overlap = float(np.minimum(*shares).sum())
    found = [(f"{what}: share outside the prior's percentiles 0.5 to 99.5", outside, outside <= OUTSIDE),
             (f"{what}: overlap of the histograms without zeros", overlap, overlap > OVERLAP)]
    if what.startswith("log expression"):
        zeros = float(np.mean(real == 0) - np.mean(prior == 0))
        found.append(("share of zeros, minus the prior's", zeros, abs(zeros) <= ZEROS))
    items = []
    for text, value, good in found:
        items.append({"what": text, "screen": screen, "difference": value, "n": len(real), "units": "values",
                      "outcome": "holds" if good else "fails"})
    return items


def compute_coverage(s: Settings) -> tuple[list, str, list]:
    """The prior of the pre-trained model, and every screen of log-expression that was predicted."""
    found = [shown for shown in chosen(s, len(all_screens(s))) if shown.screen.log_expression]
    zero_shot = [shown for shown in found if PRETRAINED in shown.runs]
    if not zero_shot:
        raise BadInput(f"no predictions of {PRETRAINED} in {s.out / s.scale / 'samples'}; sample.py makes them")
    head, _, _ = model_of(s, zero_shot[0].name, zero_shot[0].runs[PRETRAINED])
    values = {"prior": values_of_screen(load_first(s, head["screen"]), s.grns)}
    values |= {shown.screen.made["title"]: values_of_screen(shown.screen) for shown in found}
    panels, evidence = [], []
    for i, (what, bins) in enumerate(BINS.items()):
        bars = {}
        for title, both in values.items():
            counts, _ = np.histogram(both[i][both[i] != 0], bins)
            share = counts / len(both[i])
            bars[f"{title}, {1 - share.sum():.0%} not shown"] = share / np.diff(bins)
        for shown in found:
            evidence += covers(what, shown.name, values["prior"][i], values[shown.screen.made["title"]][i], bins)
        panels.append(Panel("", what, "density", log="y" * i, bins=bins, bars=bars))
    caption = (f"The prior (at most {s.grns} systems) and the screens: expression in single cells, and fold change of "
               "a gene's mean by a treatment. Not shown: values of 0 or out of range.")
    return panels, caption, evidence


# ----------------------------------------------------------------------------------------------------------- the stage

FIGURES = {
    "overview": ("Figure 1. A task on real cells", compute_overview),
    "prediction": ("A prediction against the truth", compute_prediction),
    "split": ("Figure 4. Split as built", compute_split),
    "variance": ("Figure 2. Paired and unpaired prior", compute_variance),
    "tta": ("Figure 3. Test-time augmentation", partial(compute_sweep, what="tta")),
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
    for name, screen, runs, weights in all_screens(s):
        screens[name] = {"fingerprint": screen.made["fingerprint"], "runs": runs, "weights": weights}
    for name in s.names or FIGURES:
        path = s.out / s.scale / "figures" / f"{name}.json"
        document = scales.read_json(path)
        if document.get("screens") == screens:
            scales.check_made(path, document["settings"], settings)
        else:
            with scales.alone(path):
                write(name, s, {"settings": settings, "screens": screens}, path)
            document = scales.read_json(path)
        picture = path.with_suffix(".png")
        if "not_run" in document:
            picture.unlink(missing_ok=True)  # of numbers that are gone
            print(f"{path}: not run: {document['not_run']}", flush=True)
        else:
            draw(document, s.scale, picture)
            print(f"{picture}: its numbers took {document['seconds']} s", flush=True)


if __name__ == "__main__":
    scales.run(main)
