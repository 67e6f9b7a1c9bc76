"""How often everything runs at paper scale, as the settings of all scripts say; `costs.py` says what one time costs.

Paper: A.2, A.3, B.1 to B.4. Reads what the dry run has noted, `memory.csv` and `times.csv`, and writes nothing. Where
the number of conditions depends on data that are not here, the most that there can be are counted: half of D treatments
are predicted in a held-out system (B.4).

    R registers   N cells generated   M cells of a given population   K context experiments   D genes   T tokens
"""

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import figures
import model
import prior
import sample
import scales
import tasks
import train

SCREENS = ("leukemia", "melanoma")
ROWS = 5              # of MapPFN for a screen: random, pre-trained, fine-tuned, unpaired, without context (run_all.sh)
VALIDATION_TASKS = 64  # train.validation_tasks
# What was otherwise at revision eae3e95, besides float32, plain attention, and tasks solved one by one.
BEFORE = {"figures": {"snapshot_tasks": 64, "most_cells": 400}}


class Shape(NamedTuple):
    """Sizes of a task."""
    genes: int      # D
    generated: int  # N
    given: int      # M
    context: int    # K

    def tokens(self, registers: int) -> int:
        """T, of all three streams."""
        return registers + self.generated + (1 + self.context) * (self.given + 1)


class Stage(NamedTuple):
    """Work of a GPU, of one shape; stages with the same title are one line of the table."""
    title: str
    shape: Shape
    trained: int = 0      # tasks that are trained on
    evaluations: int = 0  # of the network on one task, without gradient


def paper(settings_class, *sections: str, before: bool = False, **given):
    """Settings of a script at paper scale."""
    changed = scales.at("paper", *sections) | given
    if before:
        for section in sections:
            changed |= BEFORE.get(section, {})
    fields = {field.name for field in dataclasses.fields(settings_class)}
    return settings_class(**{name: value for name, value in changed.items() if name in fields})


def priors() -> dict[str, prior.Settings]:
    """Settings of each."""
    return {"linear": paper(prior.Settings, "linear", what="linear"), "grn": paper(prior.Settings, "grn", what="grn"),
            "grn-unpaired": paper(prior.Settings, "grn", what="grn", unpaired=True)}


def seeds(section: str) -> int:
    """Trainings of each row."""
    return scales.at("paper", section).get("seeds", 1)


def splits() -> int:
    """Of all real screens."""
    return scales.at("paper", "real").get("splits", 1) * len(SCREENS)


def weights(grid: tuple[float, ...]) -> int:
    """Evaluations for each one of a solver, if every weight of guidance is tried: weight 1 needs no null condition."""
    return sum(1 if weight == 1 else 2 for weight in grid)


def shape_of(s: train.Settings, genes: int, cells: int) -> Shape:
    """Of the tasks of a model."""
    return Shape(genes, cells, cells, s.context)


# ------------------------------------------------------------------------------------------------------------- stages


def training(title: str, s: train.Settings, genes: int, runs: int) -> Stage:
    """`runs` trainings, each with the tasks that validate it. One that chooses its rate [D55] is counted as if it were
    trained to the full length for each rate and each condition that is left out."""
    trained = s.updates * s.accumulate * s.micro_batch
    validated = s.updates // s.validate_every * VALIDATION_TASKS
    fits = 1 + tasks.FOLDS * len(s.rates)  # with those that choose
    return Stage(title, shape_of(s, genes, s.cells), runs * trained * fits, runs * validated)


def trainings() -> list[Stage]:
    """Everything that train.py does."""
    linear, grn = paper(train.Settings, "train", "linear"), paper(train.Settings, "train", "grn")
    scratch = paper(train.Settings, "train", "real")
    tuned = paper(train.Settings, "train", "real", "finetune")
    genes = priors()["grn"].genes
    return [training("train: linear SCMs", linear, priors()["linear"].genes, seeds("linear")),
            training("train: GRNs", grn, genes, seeds("grn")),
            training("train: GRNs, unpaired", grn, genes, seeds("grn")),
            training("train: GRNs, without context", dataclasses.replace(grn, context=0), genes, seeds("grn")),
            training("train: screens, random initialisation", scratch, genes, splits() * seeds("grn")),
            training("train: screens, fine-tuning", tuned, genes, splits() * seeds("grn"))]


def samplings() -> list[Stage]:
    """Everything that sample.py does: guidance on validation tasks, and the test conditions."""
    linear, grn = paper(train.Settings, "train", "linear"), paper(train.Settings, "train", "grn")
    s, p = paper(sample.Settings, "evaluate"), priors()
    once = 6 * s.steps + 1
    choosing = 0 if s.guidance else VALIDATION_TASKS * weights(sample.GUIDANCE) * once
    per_system = (s.draws + len(sample.UNINFORMED)) * 2 * once  # of one draw the context gain is asked too
    asked = p["linear"].test * (p["linear"].genes // 2)
    of_linear = seeds("linear") * (asked * per_system + choosing)
    of_screens = splits() * seeds("grn") * ROWS * (p["grn"].genes // 2 * per_system + choosing)
    return [Stage("sample: linear SCMs", shape_of(linear, p["linear"].genes, s.eval_cells), 0, of_linear),
            Stage("sample: screens", shape_of(grn, p["grn"].genes, s.eval_cells), 0, of_screens)]


def figure_stages(before: bool) -> list[Stage]:
    """Everything that figures.py samples."""
    f, p = paper(figures.Settings, "evaluate", "figures", before=before), priors()
    linear, grn = paper(train.Settings, "train", "linear"), paper(train.Settings, "train", "grn")
    once, shown = 6 * f.steps + 1, min(f.screens, len(SCREENS))
    shape = shape_of(grn, p["grn"].genes, f.cells)
    places, runs = 1 + shown, 2 * seeds("grn")  # its own prior and the screens; paired and unpaired
    snapshots = grn.snapshots * f.snapshot_tasks * places * runs * once  # weight 1 [D49]
    stages = [Stage("figure 2: snapshots", shape, 0, snapshots)]
    stages += sweeps(f, linear, shape_of(linear, p["linear"].genes, f.cells), min(f.systems, p["linear"].test))
    stages += sweeps(f, grn, shape, shown * 2)  # held-out systems, one a screen, by pre-trained and fine-tuned
    wide, treated = 2 * shape.genes, shape.context + 1
    subsets = -(-(wide - treated) // (shape.genes - treated)) + f.subsets
    tta = shown * f.tta_draws * min(f.tasks, wide // 2) * subsets * 2 * once
    return stages + [Stage("figure 3: augmentation", shape, 0, tta)]


def sweeps(f: figures.Settings, s: train.Settings, shape: Shape, units: int) -> list[Stage]:
    """Figures in which one thing varies; `units`: held-out systems in each split and draw, times models."""
    once, stages = 6 * f.steps + 1, []
    tasks = f.splits * f.draws * units * min(f.tasks, shape.genes // 2)
    for k in f.contexts:
        stages.append(Stage("figure 5a: context", shape._replace(context=k), 0, tasks * 2 * once))
    for cells in sorted({min(f.most_cells, round(multiple * s.cells)) for multiple in f.multiples}):
        stages.append(Stage("figure 5b: cells", shape._replace(given=cells), 0, tasks * 2 * once))
    stages.append(Stage("figures: guidance", shape, 0, tasks * weights(f.weights) * once))
    steps = sum(6 * n + 1 for n in (*f.ode_steps, f.ode_reference))
    stages.append(Stage("figures: ODE", shape, 0, f.ode_tasks * 2 * 2 * steps))  # at most two models
    return stages


def gpu_stages(before: bool = False) -> list[Stage]:
    """Everything that a GPU does, but for the baselines."""
    return trainings() + samplings() + figure_stages(before)


# -------------------------------------------------------------------------------------------------- disk and CPU stages


def screen_bytes(p: prior.Settings) -> int:
    """Cells of a prior, in float32."""
    conditions = 1 + p.genes
    cells = p.systems * p.population + (p.validation + p.test) * p.test_population
    return cells * conditions * p.genes * 4


def prediction_bytes() -> int:
    """Predictions of MapPFN: controls twice, truth and prediction of every condition."""
    s, p = paper(sample.Settings, "evaluate"), priors()
    linear = seeds("linear") * p["linear"].test * (p["linear"].genes // 2) * p["linear"].genes
    real = splits() * ROWS * seeds("grn") * (p["grn"].genes // 2) * p["grn"].genes
    return 4 * 4 * s.eval_cells * s.draws * (linear + real)


def disk() -> dict[str, int]:
    """Bytes that stay on disk."""
    found = {f"screens/{name}": screen_bytes(p) for name, p in priors().items()}
    one = 4 * model.count_parameters(model.outline(paper(model.Architecture, "train"), priors()["grn"].genes))
    snapshots = 2 * seeds("grn") * paper(train.Settings, "train", "grn").snapshots
    models = seeds("linear") + 3 * seeds("grn") + 2 * splits() * seeds("grn")
    return found | {"train": one * (snapshots + models), "samples, of MapPFN": prediction_bytes()}


def more_than_dry() -> dict[str, float]:
    """Titles of stages of the dry run -> how much more of it there is at paper scale; only of those that have to be
    foretold, and grow with the number of something."""
    ratios = {}
    for title, what in (("prior: linear SCMs", "linear"), ("prior: GRNs", "grn"), ("prior: unpaired GRNs", "grn")):
        dry, full = scales.at("dry", what), vars(priors()[what])
        names = ("systems", "validation", "test")
        ratios[title] = sum(full[name] for name in names) / sum(dry[name] for name in names)
    draws = paper(sample.Settings, "evaluate").draws / scales.at("dry", "evaluate")["draws"]
    held_out = priors()["linear"].test / scales.at("dry", "linear")["test"]
    return ratios | {"metrics": draws * max(held_out, len(SCREENS))}


def measured(path: Path) -> dict[str, float]:
    """Title of a stage -> its largest number, since a later call may have found it finished; empty without the file."""
    found = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            title, _, value = line.rpartition(",")
            found[title] = max(float(value), found.get(title, 0.0))
    return found


def cpu_lines(folder: Path, cores: int) -> list[dict]:
    """Stages of a dry run: bytes of host memory, and, where it can be told, hours on so many cores."""
    seconds, ratios, lines = measured(folder / "times.csv"), more_than_dry(), []
    for title, kilobytes in measured(folder / "memory.csv").items():
        hours = None
        if title in ratios and title in seconds:
            hours = seconds[title] * ratios[title] / 3600
            if "GRNs" in title:  # the only ones that use all cores
                hours *= os.cpu_count() / cores
        lines.append({"stage": title, "host": kilobytes * 1024, "hours": hours})
    return lines
