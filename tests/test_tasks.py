"""Claims about tasks.py: tasks are as said, nothing leaks across the split, and a screen is whole or an error."""

import dataclasses
import os

import numpy as np
import pytest
from numpy.random import default_rng as rng
from scipy.stats import chisquare

import tasks
from scales import BadInput
from tasks import ABSENT, KNOWN_ONLY, CONTROL, TEST, TRAIN, VALIDATION, Screen, evaluation_tasks, sample_tasks

MIXED = [
    [TRAIN, TRAIN, TRAIN, TRAIN, TEST, VALIDATION, TEST],
    [TRAIN, TRAIN, ABSENT, TRAIN, TRAIN, TRAIN, VALIDATION],
    [TRAIN, KNOWN_ONLY, KNOWN_ONLY, KNOWN_ONLY, TEST, VALIDATION, ABSENT],
]


def make_screen(split=MIXED, count=40) -> Screen:
    """A screen in which every gene of a cell holds the number of its row. `split` and `count`: S T."""
    count = np.where(np.array(split) == ABSENT, 0, count)
    (systems, treatments), genes, names = count.shape, count.shape[1] - 1, tuple("abcdefg")
    rows = np.repeat(np.arange(count.sum(), dtype=np.float32)[:, None], genes, axis=1)
    start = np.cumsum(count).reshape(count.shape) - count
    one_hot = np.repeat(np.eye(treatments, genes, -1, dtype=np.float32)[None], systems, axis=0)
    return Screen(rows, start, count, one_hot, np.array(split), names[:genes], names[:systems], names[:treatments],
                  log_expression=False, made={"title": "Rows", "section": "grn"})


def save(folder, screen: Screen, blocks=None) -> None:
    """Write it."""
    fields = [getattr(screen, field.name) for field in dataclasses.fields(Screen)]
    tasks.write_screen(folder, blocks or [screen.cells], *fields[2:10])


def conditions_of(screen: Screen, cells) -> np.ndarray:
    """Number s * T + t of the condition of each cell of `make_screen`."""
    owner = np.repeat(np.arange(screen.count.size), screen.count.ravel())
    return owner[cells[..., 0].astype(int)]


# ------------------------------------------------------------------------------------------------------ drawing tasks


@pytest.mark.parametrize("split", [TRAIN, VALIDATION, TEST])
def test_populations_of_a_task_come_from_where_they_should(split):
    """Controls and context cells are of the query's own system, context experiments are different known conditions
    (never the query, validation or test; in training none of a held-out system), treatments are those of the cells."""
    screen = make_screen()
    given, target = sample_tasks(rng(0), screen, 400, 20, 2, split)
    controls, context, target = (conditions_of(screen, cells) for cells in (given.controls, given.context, target))
    assert (context == context[..., :1]).all() and (target == target[:, :1]).all()  # one condition each
    (s, query), used = np.divmod(target[:, 0], 7), context[..., 0]
    assert (controls == s[:, None] * 7 + CONTROL).all() and (used // 7 == s[:, None]).all()
    allowed = [TRAIN] if split == TRAIN else [TRAIN, KNOWN_ONLY]  # training tasks never meet a held-out system
    assert np.isin(screen.split.ravel()[used], allowed).all() and (used % 7 != CONTROL).all()
    assert (used % 7 != query[:, None]).all() and (used[:, 0] != used[:, 1]).all()
    assert (screen.split[s, query] == split).all() and (given.query == screen.treatments[s, query]).all()
    assert (given.context_treatments == screen.treatments.reshape(21, 6)[used]).all()
    assert {array.dtype for array in given} == {np.dtype(np.float32)}


def test_draws_are_uniform_without_replacement_and_afresh():
    """Each training condition is the query equally often, whatever the number of its cells. A population has no cell
    twice, every cell is drawn equally often, and two tasks do not share their draw. Where there are fewer than N, there
    are N nevertheless, all of them its own."""
    screen = make_screen(count=[[40, 5, 500, 40, 40, 40, 40], [40] * 7, [40] * 7])
    target = sample_tasks(rng(2), screen, 3500, 2, 0).target
    times = np.unique(conditions_of(screen, target)[:, 0], return_counts=True)[1]
    assert len(times) == 7 and chisquare(times).pvalue > 1e-3
    screen = make_screen([[TRAIN] * 4], count=12)
    given, target = sample_tasks(rng(3), screen, 1500, 5, 2)
    drawn = np.concatenate([given.controls[:, None], given.context, target[:, None]], axis=1)
    assert all(len(set(population)) == 5 for population in drawn[..., 0].reshape(-1, 5))
    controls = given.controls[..., 0].astype(int)
    assert chisquare(np.bincount(controls.ravel())).pvalue > 1e-3 and len(set(map(tuple, controls))) > 1200
    given, target = sample_tasks(rng(4), screen, 10, 20, 1)
    assert target.shape == (10, 20, 3) and (conditions_of(screen, given.controls) == CONTROL).all()


def test_tasks_with_generators_of_their_own():
    """[D52] A task with its own generator is the same in any company. Permuted, it is itself with other columns: in
    cells and treatments the same ones, so that a treatment still points to its gene."""
    screen = make_screen()
    both, last = ([rng(seed) for seed in seeds] for seeds in ((0, 1), (1,)))
    both, last = (sample_tasks(generators, screen, len(generators), 5, 2) for generators in (both, last))
    np.testing.assert_array_equal(both.target[1:], last.target)
    np.testing.assert_array_equal(both.given.context[1:], last.given.context)
    coloured = dataclasses.replace(screen, cells=screen.cells * np.arange(1, 7, dtype=np.float32))
    plain, permuted = (sample_tasks([rng(1)], coloured, 1, 5, 2, permute=on) for on in (False, True))
    order = np.argmax(plain.target[0, 0][:, None] == permuted.target[0, 0], axis=0)
    assert sorted(order) == list(range(6)) != order.tolist()
    for before, after in zip((*plain.given, plain.target), (*permuted.given, permuted.target)):
        np.testing.assert_array_equal(before[..., order], after)


def test_tasks_without_a_knock_out():
    """A share of the tasks asks for nothing: the query is zero, and the target control cells of the same system."""
    screen = make_screen()
    given, target = sample_tasks(rng(0), screen, 2000, 5, 2, no_knock_out=0.25)
    none = ~given.query.any(axis=1)
    assert (conditions_of(screen, target)[none] % 7 == CONTROL).all()
    assert (conditions_of(screen, target)[~none] % 7 != CONTROL).all() and 0.2 < none.mean() < 0.3
    assert (conditions_of(screen, given.context) // 7 == conditions_of(screen, given.controls)[:, None] // 7).all()


def test_tasks_of_fewer_genes():
    """Each is a task of all genes with some left out, at random and never the query; an experiment on a gene that is
    left out has no treatment, and its cells are there all the same."""
    screen = make_screen()
    screen = dataclasses.replace(screen, cells=screen.cells + np.arange(6, dtype=np.float32) / 10)
    whole, fewer = (sample_tasks([rng(i) for i in range(300)], screen, 300, 5, 2, genes=genes) for genes in (0, 3))
    left_out, seen = 0, set()
    for i in range(300):
        kept = np.round((fewer.target[i, 0] - whole.target[i, 0, 0]) * 10).astype(int)
        seen.add(frozenset(kept.tolist()))
        for before, after in zip((*whole.given, whole.target), (*fewer.given, fewer.target)):
            np.testing.assert_array_equal(before[i][..., kept], after[i])
        assert len(set(kept.tolist())) == 3 and fewer.given.query[i].sum() == 1
        left_out += int((fewer.given.context_treatments[i].sum(axis=-1) == 0).sum())
    assert len(seen) == 20 and 0.5 < left_out / 600 < 0.7  # 3 of the 5 genes besides the query are left out


@pytest.mark.parametrize("split, most", [(TRAIN, 2), (TEST, 3), (VALIDATION, 3)])
def test_too_many_context_experiments(split, most):
    """A K that some query cannot have is refused, naming system and number; the largest possible K is not, nor 0."""
    screen = make_screen()
    for draw in (lambda k: sample_tasks(rng(0), screen, 4, 5, k, split),
                 lambda k: evaluation_tasks(screen, 5, k, split=split)):
        for k in (0, most):
            given = draw(k).given
            assert given.context.shape[1:] == (k, 5, 6) and given.context.dtype == np.float32
            assert given.context_treatments.shape[1:] == (k, 6)
        with pytest.raises(BadInput, match=f"--context {most + 1}.*'a'.*{most}"):
            draw(most + 1)
    with pytest.raises(BadInput, match="validation"):  # refused, not looped over
        sample_tasks(rng(0), make_screen([[TRAIN] * 4]), 4, 5, 1, VALIDATION)


def test_systems_with_too_few_experiments_are_passed_over():
    """Where tasks have sizes of their own, one with many experiments is drawn from systems that have as many;
    more than any has is refused."""
    screen = make_screen([[TRAIN] * 3 + [tasks.ABSENT] * 3, [TRAIN] * 6])
    assert (tasks.most_context(screen), tasks.most_context(screen, some=True)) == (1, 4)
    for context, systems in ((1, {0, 1}), (2, {1}), (4, {1})):
        found = sample_tasks(rng(0), screen, 100, 5, context, genes=3)
        assert set(np.unique(conditions_of(screen, found.target) // screen.split.shape[1])) == systems
    with pytest.raises(BadInput, match="--context 5: 'a' has only 1"):
        sample_tasks(rng(0), screen, 4, 5, 5, genes=3)


# --------------------------------------------------------------------------------------------------- evaluation tasks


def test_the_largest_context_suits_training_and_validation():
    """Three training experiments leave two for the third; a validation condition has what is known of its own system."""
    assert tasks.most_context(make_screen([[TRAIN] * 4])) == 2
    assert tasks.most_context(make_screen([[TRAIN] * 4, [TRAIN, VALIDATION, KNOWN_ONLY, TEST]])) == 1


def test_evaluation_tasks_cover_the_split_in_order():
    """There is one task per test condition, in order, and every population is of its own condition. A held-out system
    is given its KNOWN_ONLY experiments, and these are no training queries."""
    screen = make_screen()
    task = evaluation_tasks(screen, 10, 3)
    assert list(zip(task.system, task.treatment)) == [(0, 4), (0, 6), (2, 4)]
    control = task.system[:, None] * 7
    treated = control + task.treatment[:, None]
    for cells, where in ((task.target, treated), (task.fresh, treated), (task.again, treated),
                         (task.given.controls, control), (task.identity, control)):
        assert (conditions_of(screen, cells) == where).all()
    assert (task.given.query == screen.treatments[task.system, task.treatment]).all()
    assert sorted(conditions_of(screen, task.given.context)[2, :, 0] % 7) == [1, 2, 3]
    assert 2 not in tasks.queries(screen, 0, TRAIN)[:, 0]


@pytest.mark.parametrize("count, target, fresh", [(50, 20, 20), (25, 20, 5), (20, 20, 0), (8, 8, 0)])
def test_fresh_cells_are_not_in_the_target(count, target, fresh):
    """With 2N cells, target and fresh, and controls and identity, are disjoint, without repeats; `again` overlaps. With
    fewer, the target is served first, fresh comes from the rest, and is NaN if there is none."""
    screen = make_screen([[TRAIN, TRAIN, TEST]], count=count)
    task = evaluation_tasks(screen, 20, 1)
    drawn = task.target, task.fresh, task.again, task.given.controls, task.identity
    assert {cells.shape for cells in drawn} == {(1, 20, 2)}
    known, others, again, controls, identity = (set(cells[0, :, 0]) for cells in drawn)
    assert len(known) == target and known & again
    if fresh:
        assert 1 < len(others) <= fresh and not known & others and not controls & identity
    else:
        assert np.isnan(task.fresh).all()
    if count == 50:
        assert {len(cells) for cells in (others, again, controls, identity)} == {20}
    assert (conditions_of(screen, task.identity) == CONTROL).all()


def test_tasks_reproduce_and_all_contexts_meet_the_same_cells():
    """The same seed and number give the same tasks, others give others; K changes nothing but the context."""
    screen = make_screen()
    first, again, other = [sample_tasks(rng(seed), screen, 4, 5, 2) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(first.target, again.target)
    np.testing.assert_array_equal(first.given.context, again.given.context)
    assert not np.array_equal(first.target, other.target)
    one, none, same = [evaluation_tasks(screen, 5, context) for context in (2, 0, 2)]
    for task in (none, same):
        for name in ("target", "fresh", "again", "identity"):
            np.testing.assert_array_equal(getattr(one, name), getattr(task, name))
        np.testing.assert_array_equal(one.given.controls, task.given.controls)
    np.testing.assert_array_equal(one.given.context, same.given.context)
    for numbers in ((1, 0), (0, 1)):
        other = evaluation_tasks(screen, 5, 2, *numbers)
        assert not np.array_equal(one.target, other.target)
        assert not np.array_equal(one.given.context, other.given.context)


# ---------------------------------------------------------------------------------------------------------- the files


def test_a_screen_comes_back_as_it_was_written(tmp_path):
    """All arrays and names come back; the cells are mapped into memory, not read; fingerprints tell cells apart."""
    screen = make_screen()
    save(tmp_path / "0", screen)
    save(tmp_path / "1", dataclasses.replace(screen, cells=screen.cells + 1))
    loaded, other = tasks.load_screen(tmp_path / "0"), tasks.load_screen(tmp_path / "1")
    assert isinstance(loaded.cells, np.memmap)
    for name in {field.name for field in dataclasses.fields(Screen)} - {"made"}:
        assert np.array_equal(getattr(loaded, name), getattr(screen, name)), name
    assert loaded.made["title"] == "Rows" and other.made["fingerprint"] != loaded.made["fingerprint"]


@pytest.mark.parametrize("name, size", [
    ("cells.npy", 1000), ("cells.npy", 0), ("conditions.npz", 300), ("conditions.npz", 0), ("screen.json", 30),
    ("cells.npy", None), ("screen.json", None), ("cells.npy", "other"), ("screen.json", "other")])
def test_damaged_screens(tmp_path, name, size):
    """Whatever file of a screen is missing, cut short or of another screen, the folder is named in one BadInput."""
    save(tmp_path / "split-0", make_screen())
    save(tmp_path / "other", make_screen([[TRAIN, TRAIN, TEST]]))
    if size == "other":
        (tmp_path / "other" / name).replace(tmp_path / "split-0" / name)
    elif size is None:
        (tmp_path / "split-0" / name).unlink()
    else:
        os.truncate(tmp_path / "split-0" / name, size)
    with pytest.raises(BadInput, match="split-0: not a complete screen"):
        tasks.load_screen(tmp_path / "split-0")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    """On a full disk, or when interrupted, no file stays behind, and no screen that looks finished."""
    def blocks():
        yield make_screen().cells[:100]
        raise error

    with pytest.raises(type(error)):
        save(tmp_path / "split-0", make_screen(), blocks())
    assert not list(tmp_path.iterdir())


def test_splits_are_found_in_order_and_by_name(tmp_path):
    """The splits of a screen come in the order of their numbers; an unknown name is refused with those that exist."""
    for s in (10, 0, 2):
        save(tmp_path / f"smoke/screens/rows/split-{s}", make_screen())
    (tmp_path / "smoke/screens/rows/conditions-0.csv").touch()
    settings = tasks.EvaluationSettings("rows", "smoke", eval_cells=5, draws=2, out=tmp_path)
    assert [tasks.split_number(folder) for folder in tasks.splits(settings)] == [0, 2, 10]
    assert tasks.section_of(settings) == "grn"
    found = [(split, number) for split, number, _, _ in tasks.evaluations(settings, 1)]
    assert found == [(0, 0), (0, 1), (2, 0), (2, 1), (10, 0), (10, 1)]
    for name in ("row", ""):
        with pytest.raises(BadInput, match="rows"):
            tasks.splits(dataclasses.replace(settings, screen=name))
    with pytest.raises(BadInput, match="no such screen"):
        tasks.load_screen(tmp_path / "nothing")
