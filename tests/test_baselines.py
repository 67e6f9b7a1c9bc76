"""Claims about baselines/simple.py and the stage: known effects are recovered, test cells are never looked at, files
are written once."""

import dataclasses
import importlib
import json
import sys
import types

import numpy as np
import pytest
from jaxtyping import install_import_hook

with install_import_hook("baselines", "beartype.beartype"):
    import baselines
import metrics
import scales
from data import ABSENT, TEST, TRAIN, VALIDATION, EvaluationTask, Screen, evaluation_tasks, join_screens
from scales import BadInput

GENES, POOL, CELLS = 6, 120, 40


def make_screen(shifts, *, log_expression=False, seed=0, contexts=3) -> Screen:
    """A screen in which treatment t is of gene t-1 and the cells of (c, t) are N(5 + c, 1/4) + shifts[c, t]: positive,
    unless a shift is large. In the last context the even treatments are TEST and treatment 1 is VALIDATION."""
    rng, treatments = np.random.default_rng(seed), np.shape(shifts)[1]
    cells = rng.normal(0, 0.5, (contexts, treatments, POOL, GENES)) + np.asarray(shifts)[:, :, None]
    cells += 5 + np.arange(contexts)[:, None, None, None]
    split = np.full((contexts, treatments), TRAIN)
    split[-1, 2::2], split[-1, 1] = TEST, VALIDATION
    order = np.arange(contexts * treatments).reshape(contexts, treatments)
    hot = np.eye(treatments, GENES + 1)[:, 1:] * (1 if log_expression else 0.8)
    names = lambda letter, n: tuple(f"{letter}{i}" for i in range(n))
    return Screen(cells=cells.reshape(-1, GENES).astype(np.float32), start=order * POOL,
                  count=np.full((contexts, treatments), POOL),
                  treatments=np.broadcast_to(hot, (contexts, treatments, GENES)).astype(np.float32), split=split,
                  genes=names("g", GENES), context_names=names("c", contexts),
                  treatment_names=names("t", treatments), log_expression=log_expression)


def shifts_by_treatment(seed=0, contexts=3) -> np.ndarray:
    """C T D: every treatment has its own large effect, the same in each context; control has none."""
    effect = np.random.default_rng(seed).normal(0, 2, (GENES + 1, GENES))
    effect[0] = 0
    return np.broadcast_to(effect, (contexts, GENES + 1, GENES))


def tasks_of(screen, seed=1) -> EvaluationTask:
    return evaluation_tasks(np.random.default_rng(seed), screen, CELLS, 2)


def predict(method, screen, tasks) -> np.ndarray:
    return baselines.predict_all(method, screen, tasks, np.random.default_rng(2)).prediction


# --------------------------------------------------------------------------------------------------- what rows predict


def test_additive_recovers_additive_effects():
    """If a treatment does the same in every context, additive is right (PDS 0, MR 1) and identity is not."""
    screen = make_screen(shifts_by_treatment())
    tasks = tasks_of(screen)
    assert len(tasks.target) == 3
    found = {}
    for method in ("additive", "identity"):
        p = baselines.predict_all(method, screen, tasks, np.random.default_rng(0))
        found[method] = metrics.evaluate(p.observed, p.target, p.prediction, p.treatments, False, p.contexts)
    assert found["additive"]["pds"] == 0 and found["additive"]["magnitude_ratio"] == pytest.approx(1, abs=0.1)
    assert found["additive"]["rmse"] < 0.2 < 1 < found["identity"]["rmse"]
    assert found["identity"]["pds"] == pytest.approx(0.5) and found["identity"]["magnitude_ratio"] < 0.3


def test_additive_falls_back_on_the_context():
    """For a treatment that is trained on nowhere, additive predicts the context mean effect."""
    screen = make_screen(shifts_by_treatment())
    split = screen.split.copy()
    split[:, 2::2] = np.where(split[:, 2::2] == TEST, TEST, ABSENT)
    screen = dataclasses.replace(screen, split=split)
    tasks = tasks_of(screen)
    assert np.array_equal(predict("additive", screen, tasks), predict("context-mean", screen, tasks))


def test_context_mean_recovers_a_constant_shift():
    """If all treatments of a context do the same, the context mean effect is right, and keeps to its context."""
    shifts = np.zeros((3, GENES + 1, GENES))
    shifts[:, 1:] = np.array([-3.0, 4.0, 2.0])[:, None, None] * np.linspace(-1, 1, GENES)
    screen = make_screen(shifts)
    tasks = tasks_of(screen)
    moved = predict("context-mean", screen, tasks) - tasks.identity
    np.testing.assert_allclose(moved, np.broadcast_to(shifts[2, 1], moved.shape), atol=0.2)
    np.testing.assert_allclose(np.ptp(moved, axis=1), 0, atol=1e-5)  # every cell by the same: the spread is kept


def test_constant_mean_is_the_mean_of_the_context_mean():
    """Constant mean has no spread, and the mean of the context mean effect, up to the draw of control cells."""
    screen = make_screen(shifts_by_treatment())
    tasks = tasks_of(screen)
    constant, spread = predict("constant-mean", screen, tasks), predict("context-mean", screen, tasks)
    assert np.ptp(constant, axis=1).max() == 0
    np.testing.assert_allclose(constant.mean(1), spread.mean(1), atol=0.3)


@pytest.mark.parametrize("log_expression, value", [(False, 0.8), (True, 0)])
def test_target_only_sets_one_gene(log_expression, value):
    """Target only sets exactly the treated gene: to the do-value, or to zero if it was knocked out."""
    screen = make_screen(shifts_by_treatment(), log_expression=log_expression)
    tasks = tasks_of(screen)
    controls = tasks.identity.copy()
    cells = predict("target-only", screen, tasks)
    treated = tasks.query[:, None] != 0
    assert (cells[np.broadcast_to(treated, cells.shape)] == np.float32(value)).all()
    assert np.array_equal(np.where(treated, 0, cells), np.where(treated, 0, controls))
    assert np.array_equal(tasks.identity, controls)  # the next row gets them unchanged
    assert np.array_equal(tasks.query.argmax(1), [1, 3, 5])  # and the right one: treatment t is of gene t-1


def test_unmeasured_target():
    """A treatment of a gene that is not among the D genes leaves target only at identity, additive at context mean."""
    screen = make_screen(shifts_by_treatment())
    screen = dataclasses.replace(screen, treatments=np.zeros_like(screen.treatments))
    tasks = tasks_of(screen)
    assert np.array_equal(predict("target-only", screen, tasks), tasks.identity)
    for row in ("additive", "target-gene", "bilinear-ridge"):
        assert np.array_equal(predict(row, screen, tasks), predict("context-mean", screen, tasks))


def test_target_gene_scales_what_training_knock_outs_left():
    """If knock-outs leave a fifth of their gene, the row leaves a fifth of a new one; others get the mean effect."""
    shifts = np.zeros((3, GENES + 1, GENES))
    for c in range(3):
        shifts[c, 1:] = 0.5 - np.eye(GENES) * (0.5 + 0.8 * (5 + c))
    screen = make_screen(shifts, log_expression=True)
    tasks = tasks_of(screen)
    cells, mean_effect = predict("target-gene", screen, tasks), predict("context-mean", screen, tasks)
    treated = np.broadcast_to(tasks.query[:, None] != 0, cells.shape)
    np.testing.assert_allclose(cells[treated], 0.2 * tasks.identity[treated], rtol=0.1)
    assert np.array_equal(cells[~treated], mean_effect[~treated])


def test_bilinear_ridge_finds_effects_that_follow_co_expression():
    """Where an effect is linear in the treated gene's co-expression, the row is closer than the context mean;
    where effects are noise, the penalty chosen without test conditions makes it nearly that row."""
    rng, genes, pool = np.random.default_rng(0), 24, 200
    angles = rng.uniform(0, 2 * np.pi, genes)
    loadings = np.stack([np.cos(angles), np.sin(angles)], axis=1)  # all genes vary equally
    controls = rng.normal(size=(pool, 2)) @ loadings.T + rng.normal(0, 0.3, (pool, genes))
    effects = {True: loadings @ rng.normal(size=(2, genes)), False: rng.normal(size=(genes, genes))}
    closer = {}
    for bilinear, effect in effects.items():
        shifts = np.concatenate([np.zeros((1, genes)), effect])
        cells = controls[None] + shifts[:, None]
        split = np.array([[TRAIN] * (genes - 3) + [TEST] * 4])
        screen = Screen(cells.reshape(-1, genes).astype(np.float32), np.arange(genes + 1)[None] * pool,
                        np.full((1, genes + 1), pool), np.eye(genes + 1)[None, :, 1:].astype(np.float32), split,
                        tuple(map(str, range(genes))), ("c",), tuple(map(str, range(genes + 1))), False)
        tasks = tasks_of(screen)
        moved = lambda row: (predict(row, screen, tasks) - tasks.identity).mean(1)
        error = lambda row: np.sqrt(np.mean((moved(row) - effect[tasks.treatment_index - 1]) ** 2))
        closer[bilinear] = error("bilinear-ridge") / error("context-mean")
    assert closer[True] < 0.5 and 0.8 < closer[False] < 1.25


def test_joined_screens_hold_what_both_held():
    """Every condition of joined screens has the cells, treatment and use it had alone; the first keep their numbers."""
    a, b = make_screen(shifts_by_treatment(), seed=1), make_screen(shifts_by_treatment(contexts=2), seed=2, contexts=2)
    both = join_screens(a, b)
    for screen, offset in ((a, 0), (b, 3)):
        for c, t in np.ndindex(screen.count.shape):
            rows = lambda x, i: x.cells[x.start[i, t] :][: x.count[i, t]]
            assert (np.array_equal(rows(both, c + offset), rows(screen, c))
                    and both.split[c + offset, t] == screen.split[c, t])
    assert both.context_names == a.context_names + b.context_names


def test_expression_is_never_negative():
    """On log-expression data predictions are clipped at zero, on others they are not."""
    for log_expression in (True, False):
        shifts = np.zeros((3, GENES + 1, GENES))
        shifts[:, 1:] = -20
        screen = make_screen(shifts, log_expression=log_expression)
        for method in ("context-mean", "additive", "bilinear-ridge", "constant-mean"):
            smallest = predict(method, screen, tasks_of(screen)).min()
            assert smallest == 0 if log_expression else smallest < 0


def test_references_are_the_task_s_own_cells():
    """Identity, observed and oracle are the draws that the evaluation task holds; the oracle leaves out conditions that
    have no fresh cells."""
    screen = make_screen(shifts_by_treatment())
    tasks = tasks_of(screen)
    for method, field in (("identity", "identity"), ("observed", "again"), ("oracle", "fresh")):
        assert np.array_equal(predict(method, screen, tasks), getattr(tasks, field))
    tasks.fresh[1] = np.nan
    p = baselines.predict_all("oracle", screen, tasks, np.random.default_rng(0))
    assert np.array_equal(p.prediction, tasks.fresh[[0, 2]]) and np.array_equal(p.target, tasks.target[[0, 2]])


# ---------------------------------------------------------------------------------------------------- what they may use


@pytest.mark.parametrize("method", baselines.METHODS)
@pytest.mark.parametrize("split", [TEST, VALIDATION])
def test_only_training_cells_matter(method, split):
    """Replacing the cells of all test or validation conditions changes no prediction."""
    screen = make_screen(shifts_by_treatment())
    tasks, cells = tasks_of(screen), screen.cells.copy()
    for c, t in np.argwhere(screen.split == split):
        cells[screen.start[c, t] :][: screen.count[c, t]] = np.nan
    assert np.isnan(cells).any()
    other = dataclasses.replace(screen, cells=cells)
    assert np.array_equal(predict(method, screen, tasks), predict(method, other, tasks))


@pytest.mark.parametrize("method", ["context-mean", "additive", "constant-mean"])
def test_training_cells_do_matter(method):
    """The same replacement of training cells does change the predictions: the test above can fail."""
    screen = make_screen(shifts_by_treatment())
    other = dataclasses.replace(screen, cells=screen.cells + np.arange(len(screen.cells), dtype=np.float32)[:, None])
    tasks = tasks_of(screen)
    assert not np.allclose(predict(method, screen, tasks), predict(method, other, tasks))


def test_no_training_condition_is_bad_input():
    """A screen with nothing to fit to is refused with a message."""
    screen = make_screen(shifts_by_treatment())
    tasks, split = tasks_of(screen), screen.split.copy()
    split[:, 1:] = TEST
    with pytest.raises(BadInput, match="no training condition"):
        predict("additive", dataclasses.replace(screen, split=split), tasks)


@pytest.mark.parametrize("row", ["cpa", "condot", "mfm", "cellflow", "state"])
def test_trained_rows_take_what_table_1_says(row):
    """Another treatment changes the prediction of a cell; another number of the context, or other cells beside it, do
    exactly if the class says so."""
    screen = make_screen(shifts_by_treatment())
    baseline = baselines.make(row, "smoke", screen, np.random.default_rng(0))
    controls = tasks_of(screen).identity[0][:16]
    hot = lambda gene: np.eye(GENES, dtype=np.float32)[gene] * np.float32(0.8)
    predict = lambda controls, context, gene: baseline.predict(controls, context, hot(gene),
                                                               np.random.default_rng(0))[0]
    same = predict(controls, 0, 1)
    differs = lambda other: not np.allclose(other, same, atol=1e-4)
    others = np.concatenate([controls[:1], controls[1:] * 1.5])
    assert differs(predict(controls, 0, 3))
    assert differs(predict(controls, 1, 1)) == ("context" in baseline.conditions_on)
    assert differs(predict(others, 0, 1)) == ("controls" in baseline.conditions_on)


@pytest.mark.parametrize("row", ["cpa", "condot", "mfm", "cellflow", "state"])
def test_paper_scale_is_the_method_s_own(row):
    """The paper column of the table of scales holds the method's default Options, so no default has two values."""
    options = importlib.import_module(f"baselines.{row}").Options
    assert options(**scales.at("paper", row)) == options()


# ------------------------------------------------------------------------------------------------------------ the stage


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A function that runs `python -m baselines toy` with extra arguments, on two draws of the screen above."""
    screen = make_screen(shifts_by_treatment())
    sets = lambda experiment, settings: ((0, draw, screen, tasks_of(screen, draw)) for draw in range(2))
    monkeypatch.setitem(sys.modules, "sample", types.SimpleNamespace(evaluation_sets=sets))

    def run(*arguments):
        command = ["baselines.py", "toy", "--scale", "smoke", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", command + list(arguments))
        baselines.main()
        return sorted((tmp_path / "smoke" / "samples" / "toy").glob("*.npz"))
    return run


def test_stage_writes_every_row_once(stage, capsys):
    """Each row and draw is one readable file; a second run leaves them alone, one with another seed is refused."""
    files = stage("--methods", "identity")
    assert [f.name for f in files] == ["identity-split0-draw0.npz", "identity-split0-draw1.npz"]
    rows = ("--methods", *baselines.METHODS, *baselines.REFERENCES)
    files = stage(*rows)
    assert len(files) == 2 * len({*baselines.METHODS, *baselines.REFERENCES})
    for file in files:
        p = metrics.load_predictions(file)
        assert f"{p.meta['method']}-split{p.meta['split']}-draw{p.meta['resampling']}" == file.stem
        assert p.prediction.shape == (3, CELLS, GENES) and list(p.contexts) == ["c2"] * 3
        assert p.meta["scale"] == "smoke" and p.meta["experiment"] == "toy"
    stamps = [f.stat().st_mtime_ns for f in files]
    assert [f.stat().st_mtime_ns for f in stage(*rows)] == stamps and "already done" in capsys.readouterr().out
    with pytest.raises(BadInput, match="seed: 0, now 1"):
        stage("--seed", "1")


def test_search_chooses_on_validation_conditions(stage, monkeypatch, tmp_path):
    """Of Table 7's grid the setting with the lowest RMSE on validation conditions is written down; cells of test
    conditions are NaN here, and no prediction file is written."""
    class Shift:
        def __init__(self, screen, options):
            self.off = abs(options["hidden"] - 128) + options["layers"]
            assert not (screen.split == TEST)[:, 0].any() and (screen.split == VALIDATION).any()

        def predict(self, controls, context, treatment, rng):
            return controls + np.float32(self.off)

    monkeypatch.setattr(baselines, "make", lambda row, scale, screen, rng, **options: Shift(screen, options))
    assert stage("--methods", "condot", "--search") == []
    found = json.loads((tmp_path / "smoke" / "search" / "toy-condot.json").read_text())
    assert found["best"]["options"] == {"hidden": 128, "layers": 2} and len(found["all"]) == 9
    with pytest.raises(BadInput, match="Table 7 has a grid for condot and mfm only"):
        stage("--methods", "cpa", "--search")


def test_a_screen_without_validation_conditions_gets_one_of_each_context():
    """One training treatment of each context is held back, no test one, and only if there is no validation yet."""
    screen = make_screen(shifts_by_treatment())
    assert baselines.validation_screen(screen, np.random.default_rng(0)) is screen
    bare = dataclasses.replace(screen, split=np.where(screen.split == VALIDATION, TRAIN, screen.split))
    split = baselines.validation_screen(bare, np.random.default_rng(0)).split
    assert ((split == VALIDATION).sum(1) == 1).all() and np.array_equal(split == TEST, bare.split == TEST)
    assert not (split[:, 0] == VALIDATION).any()


def test_stage_names_unknown_rows(stage):
    """A row that does not exist is named, with those that do."""
    with pytest.raises(BadInput, match="--methods gears: expected some of identity"):
        stage("--methods", "gears")
