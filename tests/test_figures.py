"""Claims about figures.py: comparisons are paired, numbers are right by hand, and what is missing says so."""

import dataclasses
import json
from types import SimpleNamespace

import equinox as eqx
import numpy as np
import pytest

import drawing
import figures
import judge
import metrics
import model
import sample
import scales
import tasks
import train
from figures import FIGURES, FINETUNED, IDENTITY, PRETRAINED, ROWS, Panel, Settings
from metrics import Predictions, save_predictions
from scales import BadInput
from tasks import KNOWN_ONLY, TEST, TRAIN, VALIDATION

MADE = {"context": 2, "cells": 4, "micro_batch": 8, "accumulate": 2, "genes": 6}  # in the header of every model


@pytest.fixture
def s(tmp_path) -> Settings:
    """Sizes at which nothing takes long."""
    return Settings(scale="smoke", out=tmp_path, steps=2, screens=1, draws=1, systems=2, tasks=2, cells=8,
                    most_cells=16, snapshot_tasks=3, tta_draws=2, ode_tasks=2, ode_reference=40, grns=2, subsets=6)


def add_screen(s, name, genes=6, systems=3, log_expression=True, **made):
    """Knocking out a gene silences it; the last system has test conditions, the one before validation conditions."""
    rng = np.random.default_rng(len(name))
    cells = rng.gamma(400, 0.005, size=(systems, genes + 1, 40, genes)).astype(np.float32)
    uses = np.full((systems, genes + 1), TRAIN)
    uses[-2:, 1:] = KNOWN_ONLY
    uses[-2, 2::2], uses[-1, 1::2] = VALIDATION, TEST
    for t in range(genes):
        cells[:, t + 1, :, t] = 0
    treatments = np.tile(np.vstack([np.zeros(genes), np.eye(genes)]), (systems, 1, 1))
    names = [f"g{i}" for i in range(genes)]
    tasks.write_screen(s.out / "smoke" / "screens" / name / "split-0", cells.reshape(systems, -1, genes),
                       np.full(uses.shape, 40), treatments, uses, names, [f"c{i}" for i in range(systems)],
                       ["NT", *names], log_expression, {"title": name} | made)


def add_row(s, name, row, run, shift=0.0):
    """Predictions of a run, which are true but for `shift`."""
    screen = figures.load_first(s, name)
    found = tasks.evaluation_tasks(screen, 8, 2, 0)
    meta = {"row": row, "model": run, "settings": {"eval_cells": 8, "seed": 0}, "training": {"context": 2}}
    controls, systems = found.given.controls, np.array(screen.systems)[found.system]
    path = tasks.samples_file(figures.of_screen(s, name), row, 0, 0)
    save_predictions(path, Predictions(controls, controls, found.target + shift, found.target + shift,
                                       found.given.query, found.true_means(screen), systems, screen.log_expression,
                                       meta))


@pytest.fixture
def full(s) -> Settings:
    """A prior, SCMs, a screen of the paper and one that is not, all predicted."""
    add_screen(s, "prior")
    add_screen(s, "scms", log_expression=False, paper="scms")
    add_screen(s, "real", paper="real")
    add_screen(s, "another")
    add_screen(s, "real-wide", genes=12)
    add_row(s, "scms", "mappfn-seed0", "scms")
    add_row(s, "another", PRETRAINED, "prior")
    for row, run in ((PRETRAINED, "prior"), (FINETUNED, "real-finetuned"), ("mappfn-random-seed0", "real-scratch")):
        add_row(s, "real", row, run)
    for run in ("prior-seed0", "prior-seed1", "prior-unpaired-seed0"):
        folder = s.out / "smoke" / "train" / run / "split-0" / "snapshots"
        folder.mkdir(parents=True)
        for update in (5, 10, 20):
            (folder / f"update-{update}.eqx").touch()
    return s


@pytest.fixture
def asked(full, monkeypatch) -> list[SimpleNamespace]:
    """Every model exists and does what a knock-out does; W2 is cheap. Returns what was asked of the models."""
    calls = []

    def generate(network, given, guidance=2.0, steps=20, cells=None, *, key):
        calls.append(SimpleNamespace(given=given, guidance=guidance, steps=steps, key=key))
        n = given.controls.shape[1]
        chosen = np.arange(cells or n) % n
        return given.controls[:, chosen] * (given.query == 0)[:, None]

    def load_model(path):
        run = path.relative_to(full.out / "smoke" / "train").parts[0]
        return MADE | {"screen": run.split("-")[0]}, eqx.nn.Identity()

    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.setattr(sample, "guidance_of", lambda s, file: 1.5)
    monkeypatch.setattr(model, "model_file", lambda s, run, *where: s.out / "smoke" / "train" / run / "model.eqx")
    monkeypatch.setattr(model, "load_model", load_model)
    monkeypatch.setattr(metrics, "wasserstein", metrics.rmse)
    return calls


# ------------------------------------------------------------------------------------------------------------- by hand


def test_variance_correlation_by_hand():
    """(0, 1, 4) and (0, 4, 16) correlate fully, (0, 1, 4) and (4, 1, 0) negatively; for (1, 1, 1) it is undefined."""
    def cells(*sd):
        return np.array([sd, np.negative(sd)], float)

    assert figures.variance_correlation(cells(0, 1, 2), cells(0, 2, 4) + 7) == pytest.approx(1)
    assert figures.variance_correlation(cells(0, 1, 2), cells(2, 1, 0)) == pytest.approx(-11 / 13)
    assert np.isnan(figures.variance_correlation(cells(0, 1, 2), cells(1, 1, 1)))


def test_unpredicted_conditions_are_rivals(asked):
    """One of three conditions is predicted, at the place of another: PDS is 1/2, because the third is farther away."""
    true = np.array([[[0.0]], [[1.0]], [[5.0]]])
    np.testing.assert_allclose(figures.scores(true, np.array([[[1.2]]]), true, False), [[1.2, 0.5, 1.2, np.nan]])


def unit(draw, *treatments) -> figures.Unit:
    return figures.Unit((0, draw, 0), None, [(0, 0, t) for t in treatments])


def test_evidence_by_hand():
    """W2 at K = 1 minus at the largest K, condition by condition, mean over draws, for models only; the first value
    where 1 is not there; nothing where the largest is as in training."""
    w2 = [np.array([[9.0, 9.0], [5.0, 6.0], [3.0, 2.0]])[..., None], np.array([[9.0], [5.0], [3.0]])[..., None]]
    found, values = [unit(0, 1, 2), unit(1, 1)], {ROWS[FINETUNED]: w2, IDENTITY: w2}
    one, = figures.improvements("context", "t", [0, 1, 4], 4, found, values)
    assert (one["difference"], one["error"], one["n"], one["units"]) == (3, 1, 2, "conditions")
    assert one["what"] == "fine-tuned: W2 with 4 against 1" and one["screen"] == "t"
    assert figures.improvements("context", "t", [0, 2, 4], 4, found, values)[0]["difference"] == 6.5
    assert figures.improvements("cells", "t", [0, 1, 4], 4, found, values) == []


def test_augmentation_raises_and_steadies():
    """AUPRC over conditions, a mean of draws; its spread over draws, whatever the conditions. Both can be significant,
    and both the other way round."""
    rng = np.random.default_rng(0)
    steady, loose = 0.7 + rng.normal(0, 0.01, (10, 6)), 0.3 + rng.normal(0, 0.1, (10, 1)) + np.zeros((10, 6))
    found = [unit(draw, *range(6)) for draw in range(10)]
    for single, augmented, outcome in ((loose, steady, "better"), (steady, loose, "worse")):
        points = [np.array([a, a, b])[..., None] for a, b in zip(single, augmented)]
        items = figures.improvements("tta", "t", [0, 1, 2], 4, found, {ROWS[PRETRAINED]: points})
        assert [item["outcome"] for item in items] == [outcome] * 2
        assert items[0]["n"] == 6 and abs(items[0]["difference"]) == pytest.approx(abs(steady.mean() - loose.mean()))


def test_paired_prior_needs_trainings():
    """Early and late snapshots are compared between trainings: three of each decide, one of each leaves it open."""
    paired = [np.full((4, 6), level) for level in (0.80, 0.82, 0.81)]
    unpaired = [np.linspace(level, 0.81, 6) * np.ones((4, 1)) for level in (0.20, 0.22, 0.21)]
    first, last = figures.learnt("s", paired, unpaired)
    assert first["outcome"] == "better" and first["n"] == 3 and last["outcome"] != "undecided"
    assert first["difference"] == pytest.approx(0.81 - np.mean(np.array(unpaired)[:, 0, :2]))
    assert [item["outcome"] for item in figures.learnt("s", paired[:1], unpaired[:1])] == ["undecided"] * 2


def test_coverage_can_fail():
    """The same distribution is covered; one that is shifted, or never zero, is not, in the items that ask for that."""
    rng, bins = np.random.default_rng(0), figures.BINS["log expression"]
    prior = np.maximum(0, rng.normal(1, 1, 9000))
    for shift, outcomes in ((0.0, ["holds", "holds", "holds"]), (5.0, ["fails", "fails", "fails"])):
        real = np.maximum(0, rng.normal(1 + shift, 1, 9000))
        items = figures.covers("log expression", "s", prior, real, bins)
        assert [item["outcome"] for item in items] == outcomes
    assert len(figures.covers("log2 fold change", "s", prior, prior, bins)) == 2
    assert items[0]["difference"] == pytest.approx(np.mean(real > np.percentile(prior, 99.5)))


def test_large_populations_have_no_repeats_before_all_are_given(full):
    """Given populations of 60 of 40 cells: the first 40 are all of them, the rest are some of them again; each is of
    the experiment that it says."""
    screen = figures.load_first(full, "real")
    e = tasks.evaluation_tasks(screen, 8, 2)
    given = figures.longer(np.random.default_rng(0), screen, e, 60)
    assert given.controls.shape[1] == given.context.shape[2] == 60
    for i, system in enumerate(e.system.tolist()):
        for k, treatment in enumerate(given.context_treatments[i]):
            cells, t = given.context[i, k], 1 + int(treatment.argmax())
            assert len(np.unique(cells[:40], axis=0)) == len(np.unique(cells, axis=0)) == 40
            assert (np.sort(cells[:40], axis=0) == np.sort(screen.pool(system, t), axis=0)).all()
    assert figures.cells_given(dataclasses.replace(full, most_cells=800), [screen], 20) == [5, 10, 20, 40]


def test_densities_by_hand(s):
    """All cells count; a treatment that doubles a gene is a change of 1, one that silences it is far out."""
    cells = np.repeat(np.log1p([10, 20, 0]), 4)[:, None]
    tasks.write_screen(s.out / "screen", [cells], np.array([[4, 4, 4]]), np.zeros((1, 3, 1)), np.full((1, 3), TRAIN),
                       "g", "c", "nab", True, {"title": "x"})
    expression, changes = figures.values_of_screen(tasks.load_screen(s.out / "screen"))
    np.testing.assert_allclose(np.sort(expression), np.sort(cells.ravel()), rtol=1e-6)
    assert changes[0] == pytest.approx(1) and changes[1] < -5


def test_bars_are_paired():
    """Each unit's own level is taken out: units that differ by a constant have no spread, and unpaired ones have."""
    drawn = []
    axis = SimpleNamespace(errorbar=lambda x, mean, sd, **look: drawn.append((mean, sd)))
    values = np.array([[1.0, 2.0], [3.0, 4.0], [np.nan, 0]])
    for paired in (True, False):
        drawing.draw_curve(axis, Panel("", "", "", [0, 1], paired=paired), "a", values, ("k", "o", "-"))
    (mean, none), (_, sd) = drawn
    assert mean.tolist() == [2, 3] and not none.any() and sd.tolist() == [2**0.5] * 2


# --------------------------------------------------------------------------------------------------- what is compared


def test_what_is_there_is_shown(full):
    """Screens that a model has predicted, the paper's first, so many of each kind; unknown rows are not among them."""
    assert [shown.name for shown in figures.all_screens(full)] == ["real", "scms", "another", "prior", "real-wide"]
    assert [shown.name for shown in figures.chosen(full, 1)] == ["real", "scms"]
    assert [shown.name for shown in figures.chosen(full, 2)] == ["real", "scms", "another"]
    assert figures.chosen(full, 1)[0].runs == {PRETRAINED: "prior", FINETUNED: "real-finetuned"}


def test_split_is_what_was_written(full):
    """Each condition of a screen of few systems has its use and cells, the control its own; no wide screens."""
    add_screen(full, "large", systems=11)
    panels, _, _ = figures.compute_split(full)
    assert [p.title for p in panels] == ["real", "scms", "another", "prior"]
    assert panels[0].boxes["c2"][:4] == [("C", 40), ("Te", 40), ("Co", 40), ("Te", 40)]


@pytest.mark.parametrize("what, x", {"context": [0, 1, 2], "cells": [2, 4, 8, 16], "steps": [5, 10, 20],
                                     "guidance": [1, 1.5, 2, 2.5, 3]}.items())
def test_only_one_thing_varies(asked, full, what, x):
    """All points of a unit have one key and query; smaller contexts and populations start the larger ones. A model that
    knows the truth is better than other control cells, and one that ignores the steps of the solver has no error."""
    panels, _, _ = figures.compute_sweep(dataclasses.replace(full, guidance=3.0), what)
    assert panels[0].title.startswith("real") and list(panels[0].x) == x
    usual = {"context": 2, "cells": full.cells, "guidance": 3.0, "steps": full.steps}
    count = len(x) + (what == "steps")  # the finest solution comes first
    for run in (asked[:count], asked[count : 2 * count]):  # of each model
        largest = run[-1].given
        for call, value in zip(run[-len(x) :], x):
            assert (call.key == asked[0].key).all()
            np.testing.assert_array_equal(call.given.query, largest.query)
            _, k, n, _ = call.given.context.shape
            np.testing.assert_array_equal(call.given.context, largest.context[:, :k, :n])
            np.testing.assert_array_equal(call.given.controls, largest.controls[:, :n])
            now = {"context": k, "cells": n, "guidance": call.guidance, "steps": call.steps}
            assert now == usual | {what: value}
    truth = panels[0].curves[ROWS[FINETUNED]]
    if what == "steps":
        assert np.all(truth < 1e-8) and asked[0].steps == full.ode_reference
    else:
        assert np.all(truth < panels[0].curves[IDENTITY]) and not panels[1].curves[ROWS[FINETUNED]].any()


def test_augmentation_is_paired(asked, full):
    """The single passes are the first of the augmented ones, with the same noise; the rule finds all genes."""
    panels, _, evidence = figures.compute_sweep(dataclasses.replace(full, cells=20), "tta")
    areas = panels[0].curves[ROWS[PRETRAINED]]
    assert len(panels) == 1 and "12 genes" in panels[0].title and areas.shape == (full.tta_draws, 3)
    for few, many in zip(asked[::2], asked[1::2]):
        assert (few.key == many.key).all() and len(few.given.query) == 3 and len(many.given.query) == full.subsets
        np.testing.assert_array_equal(few.given.controls, many.given.controls[:3])
    assert np.all(areas > 0.9) and np.all(panels[0].curves["random"] < 0.5)
    assert evidence[0]["difference"] == pytest.approx((areas[:, 2] - areas[:, 0]).mean())
    assert evidence[1]["units"] == "draws" and evidence[0]["units"] == "conditions"


def test_all_snapshots_see_the_same_tasks(asked, full):
    """One curve for each run and place, its points on the same tasks, without guidance, in the order of training."""
    panels, _, evidence = figures.compute_variance(full)
    assert [p.title for p in panels] == ["held-out systems of its own prior", "real"]
    for p in panels:
        assert list(p.curves) == ["prior", "prior-unpaired"] and p.x == [80, 160, 320]  # updates times 8 times 2
        assert [len(values) for values in p.curves.values()] == [2 * full.snapshot_tasks, full.snapshot_tasks]
    for i in range(0, 18, 3):
        for call in asked[i : i + 3]:
            np.testing.assert_array_equal(call.given.controls, asked[i].given.controls)
            assert call.guidance == 1 and (call.key == asked[0].key).all()
    assert [e["difference"] for e in evidence] == [0] * 4  # the same model
    assert [e["screen"] for e in evidence] == ["prior", "prior", "real", "real"]


def test_coverage_of_the_prior(asked, full):
    """Every predicted screen of log-expression is held against the prior, by itself; SCMs are left out."""
    panels, _, evidence = figures.compute_coverage(full)
    assert [len(p.bars) for p in panels] == [3, 3] and len(evidence) == 2 * (3 + 2)
    assert {item["screen"] for item in evidence} == {"real", "another"}


def test_a_missing_screen_leaves_out_itself(asked, full):
    """Screens that no model has predicted, of the paper or not, and a screen that could not be made, are in no figure
    and in the way of none: the one that there is is shown."""
    for name in ("melanoma", "replicates"):
        add_screen(full, name, paper=name)
        (full.out / "smoke" / "samples" / name).mkdir()
    (full.out / "smoke" / "screens" / "absent").mkdir()
    s = dataclasses.replace(full, screens=2)
    for what in ("context", "cells", "guidance", "tta"):
        panels, _, _ = figures.compute_sweep(s, what)
        assert panels and all(p.title.startswith(("real", "another", "scms")) for p in panels)


def test_one_task_and_its_prediction(full):
    """What was given and predicted is shown: do(g0), and g0 as the treated gene; other cells are refused."""
    (given, task), caption, _ = figures.compute_overview(full)
    assert "real, first test condition" in caption and task.title == "asked: do(g0)"
    assert len(given.points) == 3  # control cells, two experiments
    assert np.array_equal(task.points["truth"], task.points["prediction"])
    means, treated, other = figures.compute_prediction(full)[0]
    assert np.array_equal(means.x, means.curves["genes"][0]) and treated.xlabel[:2] == "g0" != other.xlabel[:2]
    assert [counts.sum() for p in (treated, other) for counts in p.bars.values()] == [8] * 6
    add_row(full, "real", FINETUNED, "real-finetuned", shift=1.0)
    with pytest.raises(BadInput, match="not made from the present screen"):
        figures.compute_overview(full)


# ----------------------------------------------------------------------------------------------------------- the stage


@pytest.fixture
def main(s, monkeypatch):
    """Run main() for some figures; returns the content of the JSON of the last."""
    def run(*names, **changed):
        monkeypatch.setattr(scales, "parse", lambda *a: dataclasses.replace(s, names=names, **changed))
        monkeypatch.setattr(train, "use_all_cores", lambda share: None)
        figures.main()
        return json.loads((s.out / "smoke" / "figures" / f"{names[-1]}.json").read_text())
    return run


@pytest.mark.filterwarnings("error")
def test_drawn_from_the_json_alone(main, monkeypatch, s):
    """Computed once, then only drawn, without a model or a warning, also where numbers are undefined. Other settings
    are refused, and a new screen means computing again."""
    curves = {"a": np.array([[1.0, np.nan], [1, 2], [2, 3]]), "b": np.array([[np.nan] * 2]), IDENTITY: np.ones((1, 2))}
    panels = [Panel("t", "x", "y", [1, 2], curves, True, ["1", "2"], {"here": 1}, "xy")]
    runs = []

    def compute(s):
        runs.append(s)
        return panels, "n = 2", judge.decide([{"what": "x", "screen": "t"} | judge.two_samples([1.0], [0.0])])

    monkeypatch.setitem(FIGURES, "ode", ("title", compute))
    document = main("ode")
    assert document.keys() == {"title", "caption", "settings", "screens", "seconds", "revision", "evidence", "data"}
    assert document["evidence"][0]["difference"] == 1 and document["data"]["panels"][0]["curves"]["a"][0] == [1, None]
    picture = s.out / "smoke" / "figures" / "ode.png"
    picture.unlink()
    main("ode")
    assert len(runs) == 1 and picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BadInput, match="tasks 2, now 3"):
        main("ode", tasks=3)
    add_screen(s, "new")
    assert list(main("ode")["screens"]) == ["new"] and len(runs) == 2


@pytest.mark.filterwarnings("error")
def test_all_figures_of_a_whole_run(main, asked, full):
    """Each is computed and drawn, and the picture is small enough to keep; what a claim needs is in its evidence."""
    for name in FIGURES:
        document = main(name)
        claimed = name in ("variance", "tta", "context", "cells", "coverage")
        assert document["caption"] and (document["evidence"] != []) == claimed
        assert (full.out / "smoke" / "figures" / f"{name}.png").stat().st_size < 120_000


def test_missing_input_says_so(main, s, capsys):
    """Without data each figure has a JSON with the reason and no picture, not even an old one; nothing is raised."""
    old = s.out / "smoke" / "figures" / "overview.png"
    old.parent.mkdir(parents=True)
    old.touch()
    for name in FIGURES:
        document = main(name)
        assert document["title"] == FIGURES[name][0] and document["not_run"]
        assert f"{name}.json: not run: {document['not_run']}" in capsys.readouterr().out
    assert not list(old.parent.glob("*.png"))


def test_unknown_name_is_refused(main):
    """A misspelt figure is named, with those that there are."""
    with pytest.raises(BadInput, match="coverge: no such figure; there are overview, prediction"):
        main("coverge")
