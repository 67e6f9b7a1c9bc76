"""What all stages share: a screen, which is the one kind of file between them, and the tasks that are drawn from it.

Paper: section 2, Algorithm 1 (drawing a task), B.4 and Figure 4 (what is held out). `prior.py` and `data.py` write
screens, every later stage reads them and nothing else: random causal models, the toy and your own cells are the same
thing from here on. A screen is a folder:

    out/<scale>/screens/<name>/split-<s>/cells.npy         all cells, one array, mapped into memory and not read
    out/<scale>/screens/<name>/split-<s>/conditions.npz    where each condition begins, its size, treatment and use
    out/<scale>/screens/<name>/split-<s>/screen.json       names, and how it was made

    paper          name here       shape     meaning
    psi            system                    one causal system: a random SCM or GRN, or a cell line in a culture
                                             condition (the paper's "biological context")
    (psi_i, t_j)   condition                 all cells of one system under one treatment: the unit that is split
    Y^obs          controls        N D       control cells
    C              context         K N D     cells of K experiments in the same system; "context" means nothing else
    t_k            context_treatments  K D   their treatments, one-hot times the do-value (B.1; 1 for a knock-out)
    t_q            query           D         the treatment whose cells are wanted, likewise
    Y_q^int        target          N D       its cells: never part of what a model is given

    S systems   T treatments, control first   D genes   B tasks   K context experiments   N cells of a population
"""

import dataclasses
import functools
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

import scales
from scales import BadInput

CONTROL = 0  # index of the control condition on the treatment axis
# What a condition is used for. KNOWN_ONLY: of a system that a prior holds out, known there, so that it can be a context
# experiment, but nothing is pre-trained on it; baselines, which cannot be told of a system in any other way, are fitted
# to it (B.4). Context experiments are drawn from TRAIN and KNOWN_ONLY conditions.
USES = ABSENT, TRAIN, VALIDATION, TEST, KNOWN_ONLY = -1, 0, 1, 2, 3
KNOWN = (TRAIN, KNOWN_ONLY)
FOLDS = 3  # training conditions that are left out, one after the other, where choices need it


@dataclass(frozen=True)
class Screen:
    """All populations of a perturbation screen: `cells[start : start + count]` are the cells of one condition."""
    cells: Float[np.ndarray, "rows D"]       # float32, model scale (log-expression, or values of an SCM)
    start: Int[np.ndarray, "S T"]            # first row of the condition
    count: Int[np.ndarray, "S T"]            # number of its cells; 0: not measured, or dropped
    treatments: Float[np.ndarray, "S T D"]   # one-hot times the do-value; zeros for control
    split: Int[np.ndarray, "S T"]            # one of USES
    genes: tuple[str, ...]
    systems: tuple[str, ...]
    treatment_names: tuple[str, ...]         # [CONTROL] is the control label
    log_expression: bool                     # log1p data: negative values are impossible, AUPRC is defined
    made: dict                               # how: title, section of the table of scales, settings, fingerprint
    # What is known of linear SCMs, for metrics and reference rows; no model is given it.
    means: Float[np.ndarray, "S T D"] | None = None    # true mean of each condition
    weights: Float[np.ndarray, "S D D"] | None = None  # [s, k, j]: effect of j on k in system s
    scale: Float[np.ndarray, "S D"] | None = None      # by which control cells were divided

    def pool(self, system: int, treatment: int) -> Float[np.ndarray, "n D"]:
        """All cells of one condition."""
        start = self.start[system, treatment]
        return self.cells[start : start + self.count[system, treatment]]


class Given(NamedTuple):
    """What a model is told of a task; inside a network, without the batch axis B. All float32."""
    controls: Float[np.ndarray, "*B N D"]
    context: Float[np.ndarray, "*B K N D"]
    context_treatments: Float[np.ndarray, "*B K D"]
    query: Float[np.ndarray, "*B D"]


class Task(NamedTuple):
    """What a model is told, and what it is to learn from that."""
    given: Given
    target: Float[np.ndarray, "*B N D"]


class Evaluation(NamedTuple):
    """Tasks whose truth is known, with the draws that the reference rows of the tables need."""
    given: Given
    target: Float[np.ndarray, "B N D"]
    fresh: Float[np.ndarray, "B N D"]      # true cells, none of them in `target`; NaN if there are no others
    again: Float[np.ndarray, "B N D"]      # second draw from the same pool as `target`: the paper's "observed" row
    identity: Float[np.ndarray, "B N D"]   # second draw of control cells: the paper's "identity" row
    system: Int[np.ndarray, "B"]           # index of the system, and of the treatment, in the screen
    treatment: Int[np.ndarray, "B"]

    def true_means(self, screen: Screen) -> Float[np.ndarray, "B D"]:
        """Of each task's query, where the screen knows them; else NaN."""
        if screen.means is None:
            return np.full(self.given.query.shape, np.nan, np.float32)
        return screen.means[self.system, self.treatment]


# ---------------------------------------------------------------------------------------- drawing a task (Algorithm 1)


def draw(rng: np.random.Generator, count: int, cells: int) -> Int[np.ndarray, "N"]:
    """Indices of `cells` out of `count` cells: without replacement, or with it if there are too few (released code)."""
    if count < cells:
        return rng.integers(count, size=cells)
    return rng.permutation(count)[:cells]


def queries(screen: Screen, context: int, split: int, enough: bool = False) -> Int[np.ndarray, "Q 2"]:
    """(system, treatment) of every condition of `split`, in order; with `enough`, of those systems only that have
    enough experiments.

    Raises BadInput if there is none, or if one has fewer than K = `context` *other* known experiments in its own
    system to be predicted from.
    """
    found = np.argwhere(screen.split[:, 1:] == split) + [0, 1]
    if not len(found):
        raise BadInput(f"{screen.made.get('title', 'this screen')} has no {('training', 'validation', 'test')[split]} "
                       "condition")
    known = np.isin(screen.split[:, 1:], KNOWN).sum(axis=1)[found[:, 0]]
    others = known - (split == TRAIN)
    if enough and others.max() >= context:
        return found[others >= context]
    if others.min() < context:
        where = screen.systems[found[others.argmin(), 0]]
        raise BadInput(f"--context {context}: '{where}' has only {others.min()} training experiments to predict "
                       f"another one from; lower --context to at most {others.min()}")
    return found


def most_context(screen: Screen, some: bool = False) -> int:
    """Largest K that every training and validation condition can have: the other known experiments of the system with
    the fewest. Or, if `some`, the largest that some training condition can have."""
    known = np.isin(screen.split[:, 1:], KNOWN).sum(axis=1)
    trained, validated = ((screen.split[:, 1:] == use).any(axis=1) for use in (TRAIN, VALIDATION))
    if some:
        return int(max(known[trained] - 1))
    return int(min([*known[trained] - 1, *known[validated]]))


def experiments(rng: np.random.Generator, screen: Screen, s: int, t: int, context: int) -> Int[np.ndarray, "K"]:
    """K different known treatments of system s, never t, which is asked for."""
    known = 1 + np.flatnonzero(np.isin(screen.split[s, 1:], KNOWN))
    return rng.permutation(known[known != t])[:context]


def sample_tasks(rng: np.random.Generator | list[np.random.Generator], screen: Screen, batch: int, cells: int,
                 context: int, split: int = TRAIN, permute: bool = False, no_knock_out: float = 0.0,
                 genes: int = 0) -> Task:
    """B tasks of N = `cells` and K = `context` (Algorithm 1; B.4). The query is drawn uniformly from the conditions of
    `split`, the context experiments from the known conditions of its system, and all cells afresh.

    `rng` is one generator, or one for each task, whose tasks then do not depend on how many are drawn together.
    `permute`: each task has its genes in an order of its own, in all that it holds. [D52] paper, released code: no;
    here: a setting of train.py, because in a prior an index means nothing.
    `no_knock_out`: share of tasks whose query is none, all zeros, and whose target is control cells.
    `genes`: if not 0, each task has only so many, drawn at random, the query's among them. An experiment whose gene is
    left out has a treatment of zeros. Systems with fewer than K experiments are then passed over.
    Raises BadInput as `queries` does.
    """
    found = queries(screen, context, split, enough=genes > 0)
    rows, treatments, orders = [], [], []
    for task_rng in rng if isinstance(rng, list) else [rng] * batch:
        s, t = found[task_rng.integers(len(found))].tolist()
        if no_knock_out and task_rng.random() < no_knock_out:
            t = CONTROL
        chosen = np.concatenate([[CONTROL, t], experiments(task_rng, screen, s, t, context)])
        picked = [draw(task_rng, int(screen.count[s, i]), cells) for i in chosen]
        if t == CONTROL:  # not the cells that are given, if there are 2N: those have the given means, others have not
            picked[:2] = draw(task_rng, int(screen.count[s, CONTROL]), 2 * cells).reshape(2, cells)
        rows.append(screen.start[s, chosen][:, None] + picked)
        treatments.append(screen.treatments[s, chosen])
        if permute or genes:  # after everything else, so that the draws are the same without it
            order = task_rng.permutation(len(screen.genes))
            if genes:
                untreated = screen.treatments[s, t, order] == 0
                order = order[np.argsort(untreated, kind="stable")][:genes]
            orders.append(order)
    drawn = screen.cells[np.array(rows)]  # B 2+K N D
    treatments = np.array(treatments)  # B 2+K D
    if orders:
        orders = np.array(orders)[:, None]  # B 1 D
        drawn = np.take_along_axis(drawn, orders[:, None], axis=-1)
        treatments = np.take_along_axis(treatments, orders, axis=-1)
    given = Given(controls=drawn[:, 0], context=drawn[:, 2:], context_treatments=treatments[:, 2:],
                  query=treatments[:, 1])
    return Task(given, target=drawn[:, 1])


def folds(screen: Screen, most: int = FOLDS) -> list[Screen]:
    """What settings are chosen on: the screen itself if it has VALIDATION conditions; if not, a screen for each of the
    training conditions, or for `most` of them, evenly spread: its one VALIDATION condition, and no longer known.
    Test conditions are as they were.

    [D55] paper: a tenth of the training conditions, which is none of five; released code: the same; here: then one
    after the other is left out, three to save time. A system that would have no known condition left keeps its own.
    """
    if (screen.split[:, 1:] == VALIDATION).any():
        return [screen]
    found = []
    for s, t in np.argwhere(screen.split[:, 1:] == TRAIN).tolist():
        if np.isin(screen.split[s, 1:], KNOWN).sum() > 1:
            split = screen.split.copy()
            split[s, 1 + t] = VALIDATION
            found.append(dataclasses.replace(screen, split=split))
    return evenly(found, most)


def evenly(items: list, most: int) -> list:
    """At most so many of the items, evenly spread."""
    spread = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[i] for i in spread.tolist()]


# ------------------------------------------------------------------------------------------- what is evaluated (B.4)


def draw_two(rng: np.random.Generator, pool: Float[np.ndarray, "n D"],
             cells: int) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "N D"] | None]:
    """Two draws of cells without a common one, each without replacement if there are 2N.

    If there are fewer, the first draw comes first: it has N different cells, or all of them and repeats. The second
    draws from the rest with replacement; it is None if there is no rest.
    """
    order = rng.permutation(len(pool))
    first, rest = order[:cells], order[cells:]
    first = np.concatenate([first, rng.integers(len(pool), size=cells - len(first))])
    if not len(rest):
        return pool[first], None
    return pool[first], pool[rest[draw(rng, len(rest), cells)]]


def evaluation_tasks(screen: Screen, cells: int, context: int, seed: int = 0, number: int = 0,
                     split: int = TEST) -> Evaluation:
    """One task for each condition of `split`, in order; `number` tells repeated draws of cells apart.

    What does not concern the context experiments is the same for every K, so all methods meet the same cells.
    Raises BadInput as `queries` does.
    """
    rng = scales.generator("evaluation", seed, number)
    rng_context = scales.generator("experiments", seed, number)
    tasks = []
    for s, t in queries(screen, context, split).tolist():
        controls, identity = draw_two(rng, screen.pool(s, CONTROL), cells)
        if identity is None:
            identity = controls
        treated = screen.pool(s, t)
        target, fresh = draw_two(rng, treated, cells)
        if fresh is None:
            fresh = np.full_like(target, np.nan)
        again = treated[draw(rng, len(treated), cells)]
        chosen = experiments(rng_context, screen, s, t, context)
        given_cells = np.zeros((context, cells, len(screen.genes)), np.float32)
        for k, i in enumerate(chosen.tolist()):
            pool = screen.pool(s, i)
            given_cells[k] = pool[draw(rng_context, len(pool), cells)]
        given = Given(controls, given_cells, screen.treatments[s, chosen], screen.treatments[s, t])
        tasks.append((*given, target, fresh, again, identity, s, t))
    columns = [np.array(column) for column in zip(*tasks)]
    return Evaluation(Given(*columns[:4]), *columns[4:])


@dataclass(frozen=True)
class EvaluationSettings:
    """Which test conditions are predicted, and how many cells of each: the same for MapPFN and for the baselines."""
    screen: str = ""  # what is predicted: a folder below out/<scale>/screens
    scale: str = "laptop"  # column of the table in scales.py
    seed: int = 0  # of the draws of cells, and of the method
    eval_cells: int = 200  # cells N per population, given and generated (B.3)
    draws: int = 10  # draws of cells per split ("ten resampling seeds", Table 3)
    out: Path = Path("out")  # everything is below out/<scale>


def samples_file(s, row: str, split: int, number: int) -> Path:
    """Where the predictions of one row for one split and draw of cells are kept."""
    return s.out / s.scale / "samples" / s.screen / f"{row}-split{split}-draw{number}.npz"


# ------------------------------------------------------------------------------------------------------- the files


def write_screen(folder: Path, blocks: Iterable[Float[np.ndarray, "_ D"]], count: Int[np.ndarray, "S T"],
                 treatments: Float[np.ndarray, "S T D"], split: Int[np.ndarray, "S T"], genes: Iterable[str],
                 systems: Iterable[str], treatment_names: Iterable[str], log_expression: bool, made: dict,
                 **known: Shaped[np.ndarray, "S ..."]) -> None:
    """Write a screen, whole or not at all. `blocks` are the cells, ordered by system and then by treatment, in as
    many pieces as is convenient: only one of them is in memory at a time. `known`: means, weights, scale."""
    names = {"genes": tuple(genes), "systems": tuple(systems), "treatment_names": tuple(treatment_names)}
    found = zlib.crc32(np.ascontiguousarray(split, "<i8"))
    with scales.atomic(folder) as temporary:
        temporary.mkdir()
        with open(temporary / "cells.npy", "wb") as file:  # not a memory map: on a full disk that kills the process
            header = {"descr": "<f4", "fortran_order": False, "shape": (int(count.sum()), treatments.shape[-1])}
            np.lib.format.write_array_header_1_0(file, header)
            for block in blocks:
                block = np.ascontiguousarray(block, "<f4")
                found = zlib.crc32(block, found)
                file.write(block)
        start = np.cumsum(count).reshape(count.shape) - count
        np.savez_compressed(temporary / "conditions.npz", start=start, count=count, split=split,
                            treatments=treatments.astype(np.float32), **known)
        about = names | {"log_expression": log_expression, "made": made | {"fingerprint": found},
                         "conditions": scales.checksum(temporary / "conditions.npz")}
        about = json.dumps(about, default=str)
        (temporary / "screen.json").write_text(f"{about}\n{zlib.crc32(about.encode())}\n")


def fingerprint(path: Path, split: bytes) -> int:
    """Of the cells in a file, and of what they are used for."""
    return fingerprint_then(path, path.stat().st_mtime_ns, split)


@functools.cache
def fingerprint_then(path: Path, changed: int, split: bytes) -> int:
    """The same. A process asks for a screen many times; `changed`, the time of the last change, makes it look anew."""
    found, cells = zlib.crc32(split), np.load(path, mmap_mode="r")
    for first in range(0, len(cells), 2**16):  # not all of a large screen in memory at once
        found = zlib.crc32(np.ascontiguousarray(cells[first : first + 2**16]), found)
    return found


def load_screen(folder: Path) -> Screen:
    """What `write_screen` wrote. Raises BadInput if it is missing, or something else."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such screen; prior.py and data.py write them")
    try:
        cells = np.load(folder / "cells.npy", mmap_mode="r")
        text, checked = (folder / "screen.json").read_text().splitlines()
        if zlib.crc32(text.encode()) != int(checked):
            raise ValueError("screen.json has changed since it was written")
        about = json.loads(text)
        if scales.checksum(folder / "conditions.npz") != about["conditions"]:
            raise ValueError("conditions.npz has changed since it was written")
        names = {name: tuple(about[name]) for name in ("genes", "systems", "treatment_names")}
        with np.load(folder / "conditions.npz") as conditions:
            screen = Screen(cells, **conditions, **names, log_expression=about["log_expression"], made=about["made"])
        if len(cells) != screen.count.sum() or cells.shape[1] != len(screen.genes):
            raise ValueError("its files do not fit together")
        if fingerprint(folder / "cells.npy", screen.split.tobytes()) != screen.made["fingerprint"]:
            raise ValueError("cells.npy or the split has changed since it was written")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"{folder}: not a complete screen ({error}); delete it and make it again") from None
    return screen


def splits(s) -> list[Path]:
    """The folders of all splits of the screen that the settings name. Raises BadInput if there is none."""
    home = s.out / s.scale / "screens"
    found = sorted((home / s.screen).glob("split-*"), key=split_number)
    if not s.screen or not found:
        have = sorted({path.parent.name for path in home.glob("*/split-*")})
        raise BadInput(f"--screen {s.screen}: no such screen in {home}; there are: {', '.join(have) or 'none'}"
                       "; prior.py and data.py make them")
    return found


def split_number(folder: Path) -> int:
    """3 of split-3."""
    return int(folder.name.removeprefix("split-"))


def section_of(s) -> str:
    """The section of the table of scales that belongs to the screen that the settings name."""
    return load_screen(splits(s)[0]).made["section"]


def evaluations(s: EvaluationSettings, context: int) -> Iterator[tuple[int, int, Screen, Evaluation]]:
    """(split, draw of cells, screen, tasks) of all that is to be predicted; all methods are given the same."""
    for folder in splits(s):
        split, screen = split_number(folder), load_screen(folder)
        for number in range(s.draws):
            yield split, number, screen, evaluation_tasks(screen, s.eval_cells, context, s.seed, number)
