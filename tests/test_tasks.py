"""Claims about tasks.py: tasks are as said, nothing leaks across the split, and a screen is whole or an error."""

import dataclasses
import json
import os

import numpy as np
import pytest
import scipy.stats

import tasks
from scales import BadInput
from tasks import ABSENT, CONTEXT, CONTROL, TEST, TRAIN, VALIDATION, Screen

MIXED = [
    [TRAIN, TRAIN, TRAIN, TRAIN, TEST, VALIDATION, TEST],
    [TRAIN, TRAIN, ABSENT, TRAIN, TRAIN, TRAIN, VALIDATION],
    [TRAIN, CONTEXT, CONTEXT, CONTEXT, TEST, VALIDATION, ABSENT],
]


def make_screen(split=MIXED, count=40, genes=None) -> Screen:
    """A screen in which every gene of a cell holds the number of its row. `split` and `count`: S T."""
    split = np.array(split)
    count = np.where(split == ABSENT, 0, count)
    systems, treatments = split.shape
    genes = genes or treatments - 1
    rows = np.repeat(np.arange(count.sum(), dtype=np.float32)[:, None], genes, axis=1)
    one_hot = np.eye(treatments, genes, -1, dtype=np.float32)
    return Screen(
        cells=rows, start=np.cumsum(count).reshape(count.shape) - count, count=count,
        treatments=np.repeat(one_hot[None], systems, axis=0), split=split,
        genes=tuple(f"g{i}" for i in range(genes)), systems=tuple(f"s{i}" for i in range(systems)),
        treatment_names=tuple(f"t{i}" for i in range(treatments)), log_expression=False, made={"title": "Rows"})


def save(folder, screen: Screen, made=None) -> None:
    """Write it, a condition at a time."""
    blocks = [screen.pool(s, t) for s, t in np.ndindex(screen.count.shape)]
    tasks.write_screen(folder, blocks, screen.count, screen.treatments, screen.split, screen.genes, screen.systems,
                       screen.treatment_names, screen.log_expression, made or screen.made)


def conditions_of(screen: Screen, cells) -> np.ndarray:
    """Number s * T + t of the condition of each cell of `make_screen`."""
    starts = np.where(screen.count > 0, screen.start, np.inf).ravel()  # absent ones begin where the next one does
    order = np.argsort(starts, kind="stable")
    return order[np.searchsorted(starts[order], cells[..., 0], side="right") - 1]


def rng(seed=0):
    return np.random.default_rng(seed)


# ------------------------------------------------------------------------------------------------------ drawing tasks


@pytest.mark.parametrize("split", [TRAIN, VALIDATION, TEST])
def test_populations_of_a_task_come_from_where_they_should(split):
    """Controls and context cells are of the query's own system, context experiments are different known conditions
    (never the query, validation or test), and treatments are those of the cells."""
    screen = make_screen()
    given, target = tasks.sample_tasks(rng(), screen, 400, 5, 2, split)
    controls, context = conditions_of(screen, given.controls), conditions_of(screen, given.context)
    target = conditions_of(screen, target)
    assert (context == context[..., :1]).all() and (target == target[:, :1]).all()  # one condition each
    s, query = np.divmod(target[:, 0], 7)
    used = context[..., 0]
    assert (controls == s[:, None] * 7 + CONTROL).all()
    assert (used // 7 == s[:, None]).all()
    assert np.isin(screen.split.ravel()[used], [TRAIN, CONTEXT]).all() and (used % 7 != CONTROL).all()
    assert (used % 7 != query[:, None]).all() and (used[:, 0] != used[:, 1]).all()
    assert (screen.split[s, query] == split).all()
    assert (given.query == screen.treatments[s, query]).all()
    assert (given.context_treatments == screen.treatments.reshape(21, 6)[used]).all()
    assert {array.dtype for array in given} == {np.dtype(np.float32)}


def test_training_tasks_hold_no_held_out_cell():
    """No cell of a test or validation condition, nor of a system without training conditions (CONTEXT), gets into
    training tasks, in any role."""
    screen = make_screen()
    given, target = tasks.sample_tasks(rng(1), screen, 500, 20, 2)
    for cells in (given.controls, given.context, target):
        where = conditions_of(screen, cells)
        assert (screen.split.ravel()[where] == TRAIN).all() and where.max() < 14


def test_context_conditions_are_what_held_out_systems_are_predicted_from():
    """A test query of a held-out system is given its CONTEXT experiments, and these are no training queries."""
    screen = make_screen()
    assert tasks.queries(screen, 3, TEST).tolist() == [[0, 4], [0, 6], [2, 4]]
    assert 2 not in tasks.queries(screen, 0, TRAIN)[:, 0]
    task = tasks.evaluation_tasks(screen, 5, 3)
    assert sorted(conditions_of(screen, task.given.context)[2, :, 0] % 7) == [1, 2, 3]


def test_queries_are_uniform_over_conditions():
    """Each training condition is the query equally often, whatever the number of its cells."""
    counts = [[40, 5, 500, 40, 40, 40, 40], [40] * 7, [40] * 7]
    screen = make_screen(count=counts)
    task = tasks.sample_tasks(rng(2), screen, 3500, 2, 0)
    times = np.bincount(conditions_of(screen, task.target)[:, 0], minlength=21)
    assert (times > 0).sum() == 7
    assert scipy.stats.chisquare(times[times > 0]).pvalue > 1e-3


def test_cells_are_drawn_without_replacement_and_afresh():
    """A population has no cell twice, every cell is drawn equally often, and two tasks do not share their draw. Where
    there are fewer than N, there are N nevertheless, all of them its own."""
    screen = make_screen(np.full((1, 4), TRAIN), count=12)
    given, target = tasks.sample_tasks(rng(3), screen, 1500, 5, 2)
    drawn = np.concatenate([given.controls[:, None], given.context, target[:, None]], axis=1)
    assert all(len(set(population)) == 5 for population in drawn[..., 0].reshape(-1, 5))
    controls = given.controls[..., 0]
    assert scipy.stats.chisquare(np.bincount(controls.astype(int).ravel())).pvalue > 1e-3
    assert len(set(map(tuple, controls))) > 1200
    task = tasks.sample_tasks(rng(4), screen, 10, 20, 1)
    assert task.target.shape == (10, 20, 3)
    assert (conditions_of(screen, task.given.controls) == CONTROL).all()


def test_no_context_is_legal():
    """K = 0 gives a context axis of length 0, also in evaluation tasks."""
    screen = make_screen()
    for task in (tasks.sample_tasks(rng(), screen, 3, 5, 0), tasks.evaluation_tasks(screen, 5, 0)):
        assert task.given.context.shape[1:] == (0, 5, 6) and task.given.context_treatments.shape[1:] == (0, 6)
        assert task.given.context.dtype == np.float32


@pytest.mark.parametrize("split, most", [(TRAIN, 2), (TEST, 3), (VALIDATION, 3)])
def test_too_many_context_experiments(split, most):
    """A K that some query cannot have is refused, naming system and number; the largest possible K is not."""
    screen = make_screen()
    tasks.sample_tasks(rng(), screen, 4, 5, most, split)
    with pytest.raises(BadInput, match=f"--context {most + 1}.*'s0' has only {most} .*at most {most}"):
        tasks.sample_tasks(rng(), screen, 4, 5, most + 1, split)
    with pytest.raises(BadInput, match="--context 9"):
        tasks.evaluation_tasks(screen, 5, 9, split=split)
    with pytest.raises(BadInput, match="no validation condition"):  # refused, not looped over
        tasks.sample_tasks(rng(), make_screen(np.full((1, 4), TRAIN)), 4, 5, 1, VALIDATION)


# --------------------------------------------------------------------------------------------------- evaluation tasks


def test_evaluation_tasks_cover_the_split_in_order():
    """There is one task per test condition, in order, and every population is of its own condition."""
    screen = make_screen()
    task = tasks.evaluation_tasks(screen, 10, 3)
    assert list(zip(task.system, task.treatment)) == [(0, 4), (0, 6), (2, 4)]
    own = (task.system * 7 + task.treatment)[:, None]
    for cells in (task.target, task.fresh, task.again):
        assert (conditions_of(screen, cells) == own).all()
    for cells in (task.given.controls, task.identity):
        assert (conditions_of(screen, cells) == task.system[:, None] * 7).all()
    assert (task.given.query == screen.treatments[task.system, task.treatment]).all()


def test_fresh_cells_are_not_in_the_target():
    """With 2N cells, target and fresh, and controls and identity, are disjoint, without repeats; `again` overlaps."""
    task = tasks.evaluation_tasks(make_screen(), 20, 1)
    for i in range(3):
        target, fresh, again = set(task.target[i, :, 0]), set(task.fresh[i, :, 0]), set(task.again[i, :, 0])
        controls, identity = set(task.given.controls[i, :, 0]), set(task.identity[i, :, 0])
        assert {len(cells) for cells in (target, fresh, again, controls, identity)} == {20}
        assert not target & fresh and not controls & identity
        assert target & again


@pytest.mark.parametrize("count, target, fresh", [(25, 20, 5), (20, 20, 0), (8, 8, 0)])
def test_evaluation_with_few_cells(count, target, fresh):
    """With fewer than 2N cells the target is served first, fresh comes from the rest, and is NaN if there is none."""
    screen = make_screen([[TRAIN, TRAIN, TEST]], count=count)
    task = tasks.evaluation_tasks(screen, 20, 1)
    assert task.target.shape == task.fresh.shape == (1, 20, 2)
    assert len(set(task.target[0, :, 0])) == target
    if fresh:
        assert set(task.fresh[0, :, 0]) <= set(screen.pool(0, 2)[:, 0]) - set(task.target[0, :, 0])
    else:
        assert np.isnan(task.fresh).all()
    assert (conditions_of(screen, task.identity) == CONTROL).all()


def test_tasks_reproduce_and_all_contexts_meet_the_same_cells():
    """The same seed and number give the same tasks, others give others; K changes nothing but the context."""
    screen = make_screen()
    first, again = tasks.sample_tasks(rng(), screen, 4, 5, 2), tasks.sample_tasks(rng(), screen, 4, 5, 2)
    assert np.array_equal(first.target, again.target) and np.array_equal(first.given.context, again.given.context)
    assert not np.array_equal(first.target, tasks.sample_tasks(rng(1), screen, 4, 5, 2).target)
    one, same = tasks.evaluation_tasks(screen, 5, 2), tasks.evaluation_tasks(screen, 5, 2)
    assert np.array_equal(one.given.context, same.given.context)
    for seed, number in ((1, 0), (0, 1)):
        other = tasks.evaluation_tasks(screen, 5, 2, seed, number)
        assert not np.array_equal(one.target, other.target)
        assert not np.array_equal(one.given.context, other.given.context)
    none = tasks.evaluation_tasks(screen, 5, 0)
    for name in ("target", "fresh", "again", "identity"):
        assert np.array_equal(getattr(one, name), getattr(none, name))
    assert np.array_equal(one.given.controls, none.given.controls)


# ---------------------------------------------------------------------------------------------------------- the files


def test_a_screen_comes_back_as_it_was_written(tmp_path):
    """All arrays and names come back; the cells are mapped into memory, not read; fingerprints tell cells apart."""
    screen = make_screen()
    save(tmp_path / "split-0", screen)
    loaded = tasks.load_screen(tmp_path / "split-0")
    assert isinstance(loaded.cells, np.memmap)
    for field in dataclasses.fields(Screen):
        if field.name != "made":
            assert np.array_equal(getattr(loaded, field.name), getattr(screen, field.name)), field.name
    assert loaded.made["title"] == "Rows"
    save(tmp_path / "split-1", dataclasses.replace(screen, cells=screen.cells + 1))
    assert tasks.load_screen(tmp_path / "split-1").made["fingerprint"] != loaded.made["fingerprint"]


def spoil_shape(folder):
    np.save(folder / "cells.npy", np.zeros((3, 6), np.float32))


def cut(name, size):
    def change(folder):
        os.truncate(folder / name, size)
    return change


def forget_gene(folder):
    about = json.loads((folder / "screen.json").read_text())
    about["genes"].pop()
    (folder / "screen.json").write_text(json.dumps(about))


@pytest.mark.parametrize("change", [
    spoil_shape, forget_gene, cut("cells.npy", 1000), cut("cells.npy", 0), cut("conditions.npz", 300),
    cut("conditions.npz", 0), cut("screen.json", 30), lambda folder: (folder / "screen.json").unlink(),
    lambda folder: (folder / "cells.npy").unlink()])
def test_damaged_screens(tmp_path, change):
    """Whatever file of a screen is missing, cut short or of another screen, the folder is named in one BadInput."""
    save(tmp_path / "split-0", make_screen())
    change(tmp_path / "split-0")
    with pytest.raises(BadInput, match="split-0: not a complete screen"):
        tasks.load_screen(tmp_path / "split-0")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    """On a full disk, or when interrupted, no file stays behind, and no screen that looks finished."""
    screen = make_screen()

    def blocks():
        yield screen.cells[:100]
        raise error

    with pytest.raises(type(error)):
        tasks.write_screen(tmp_path / "split-0", blocks(), screen.count, screen.treatments, screen.split, screen.genes,
                           screen.systems, screen.treatment_names, False, {})
    assert not list(tmp_path.iterdir())


def test_splits_are_found_in_order_and_by_name(tmp_path):
    """The splits of a screen come in the order of their numbers; an unknown name is refused with those that exist."""
    for s in (10, 0, 2):
        save(tmp_path / f"smoke/screens/rows/split-{s}", make_screen(), {"title": "Rows", "section": "grn"})
    (tmp_path / "smoke/screens/rows/conditions-0.csv").touch()
    settings = tasks.EvaluationSettings("rows", "smoke", eval_cells=5, draws=2, out=tmp_path)
    assert [tasks.split_number(folder) for folder in tasks.splits(settings)] == [0, 2, 10]
    assert tasks.section_of(settings) == "grn"
    found = [(split, number) for split, number, _, _ in tasks.evaluations(settings, 1)]
    assert found == [(0, 0), (0, 1), (2, 0), (2, 1), (10, 0), (10, 1)]
    for name in ("row", ""):
        with pytest.raises(BadInput, match="no such screen.*there are: rows"):
            tasks.splits(dataclasses.replace(settings, screen=name))
    with pytest.raises(BadInput, match="no such screen"):
        tasks.load_screen(tmp_path / "nothing")
