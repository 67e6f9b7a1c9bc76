"""Claims about figures.py: comparisons are paired, numbers are right by hand, and what is missing says so."""

import dataclasses
import json
from types import SimpleNamespace

import equinox as eqx
import numpy as np
import pytest

import figures
import metrics
import model
import sample
import scales
import tasks
import train
from figures import FIGURES, FINETUNED, PRETRAINED, Settings
from metrics import Predictions, save_predictions
from scales import BadInput
from tasks import CONTEXT, TEST, TRAIN, VALIDATION

MADE = {"context": 2, "cells": 4, "micro_batch": 8, "accumulate": 2, "genes": 6}  # in the header of every model
GENES = 6


@pytest.fixture
def s(tmp_path) -> Settings:
    """Sizes at which nothing takes long."""
    return Settings(scale="smoke", out=tmp_path, steps=2, screens=1, draws=1, systems=2, tasks=2, cells=8,
                    most_cells=16, snapshot_tasks=3, tta_draws=2, ode_tasks=2, ode_reference=40, grns=2, subsets=6)


def add_screen(s, name, genes=GENES, systems=3, log_expression=True, split=0, **made):
    """Knocking out gene t silences it and raises the next; the last system has TEST, the one before VALIDATION."""
    rng = np.random.default_rng(len(name))
    values = rng.gamma(4, 0.5, size=(systems, genes + 1, 40, genes)).astype(np.float32)
    uses = np.full((systems, genes + 1), TRAIN)
    uses[-2:, 1:] = CONTEXT
    uses[-2, 2::2], uses[-1, 1::2] = VALIDATION, TEST
    for t in range(genes):
        values[:, t + 1, :, t] = 0
        values[:, t + 1, :, (t + 1) % genes] += 2
    treatments = np.tile(np.vstack([np.zeros(genes), np.eye(genes)]), (systems, 1, 1))
    names = [f"g{i}" for i in range(genes)]
    folder = s.out / "smoke" / "screens" / name / f"split-{split}"
    tasks.write_screen(folder, values.reshape(systems, -1, genes), np.full(uses.shape, 40), treatments, uses, names,
                       [f"c{i}" for i in range(systems)], ["NT", *names], log_expression, {"title": name} | made)
    return tasks.load_screen(folder)


def add_row(s, name, row, run, shift=0.0):
    """Predictions of a run, which are true but for `shift`."""
    screen = tasks.load_screen(s.out / "smoke" / "screens" / name / "split-0")
    found = tasks.evaluation_tasks(screen, 8, 2, 0)
    meta = {"row": row, "model": run, "settings": {"eval_cells": 8, "seed": 0}, "training": {"context": 2}}
    controls, systems = found.given.controls, np.array(screen.systems)[found.system]
    path = tasks.samples_file(figures.of_screen(s, name), row, 0, 0)
    save_predictions(path, Predictions(controls, controls, found.target + shift, found.target + shift,
                                       found.given.query, systems, screen.log_expression, meta))


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
    for row, run in ((PRETRAINED, "prior"), (FINETUNED, "real-finetuned"), ("mappfn-random", "real-scratch")):
        add_row(s, "real", row, run)
    return s


@pytest.fixture
def truthful(full, monkeypatch) -> list[SimpleNamespace]:
    """Every model exists and predicts the true cells, as many as are asked for; W2 is cheap. Returns what was asked."""
    calls = []
    origin = {}  # value of a control cell -> where it is from: no two are equal
    for folder in (full.out / "smoke" / "screens").glob("*/split-0"):
        screen = tasks.load_screen(folder)
        for system in range(len(screen.systems)):
            for (_, gene), value in np.ndenumerate(screen.pool(system, 0)):
                origin[value] = screen, system, gene

    def generate(network, given, guidance=2.0, steps=20, cells=None, *, key):
        calls.append(SimpleNamespace(given=given, guidance=guidance, steps=steps, key=key))
        found = []
        for query, controls in zip(given.query, given.controls):
            genes = [origin[value][2] for value in controls[0]]
            screen, system, treated = origin[controls[0][query > 0][0]]
            pool = screen.pool(system, treated + 1)[:, genes]
            found.append(pool[: cells or len(controls)])
        return np.array(found)

    def load_model(path):
        run = path.relative_to(full.out / "smoke" / "train").parts[0]
        init, screen = "", run.removesuffix("-unpaired")
        if "-" in screen:
            init, screen = "prior", screen.split("-")[0]
        return MADE | {"screen": screen, "init": init}, eqx.nn.Identity()

    def wasserstein(x, y):
        return float(np.abs(x.mean(0) - y.mean(0)).max())

    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.setattr(sample, "guidance_of", lambda s, file: 1.5)
    monkeypatch.setattr(train, "model_file", lambda s, run, *where: s.out / "smoke" / "train" / run / "model.eqx")
    monkeypatch.setattr(model, "load_model", load_model)
    monkeypatch.setattr(metrics, "wasserstein", wasserstein)
    return calls


# ------------------------------------------------------------------------------------------------------- by hand


def test_variance_correlation_by_hand():
    """(0, 1, 4) and (0, 4, 16) correlate fully, (0, 1, 4) and (4, 1, 0) negatively; for (1, 1, 1) it is undefined."""
    def cells(*sd):
        return np.array([sd, np.negative(sd)], float)

    assert figures.variance_correlation(cells(0, 1, 2), cells(0, 2, 4) + 7) == pytest.approx(1)
    assert figures.variance_correlation(cells(0, 1, 2), cells(2, 1, 0)) == pytest.approx(-11 / 13)
    assert np.isnan(figures.variance_correlation(cells(0, 1, 2), cells(1, 1, 1)))


def test_smoothing_by_hand():
    """With alpha 3/4 the average moves a quarter of the way; the band is over three neighbours, two at the ends."""
    average, sd = figures.smooth(np.array([0.0, 4.0, 3.0]), 0.75, 3)
    np.testing.assert_allclose(average, [0, 1, 1.5])
    np.testing.assert_allclose(sd, [8**0.5, np.std([0, 4, 3], ddof=1), 0.5**0.5])


def test_unpredicted_conditions_are_rivals(truthful):
    """One of three conditions is predicted, at the place of another: PDS is 1/2, because the third is farther away."""
    true = np.array([[[0.0]], [[1.0]], [[5.0]]])
    found = figures.scores(true, np.array([[[1.2]]]), true, False)
    assert found["pds"] == 0.5 and found["rmse"] == pytest.approx(1.2) and np.isnan(found["auprc"])


def test_densities_by_hand(s):
    """A third of the values is zero; a doubling is a change of 1; densities integrate to the share that is in range."""
    cells = np.repeat(np.log1p([10, 20, 0]), 4)[:, None]
    folder = s.out / "screen"
    tasks.write_screen(folder, [cells], np.array([[4, 4, 4]]), np.zeros((1, 3, 1)), np.full((1, 3), TRAIN), "g", "c",
                       "nab", True, {"title": "x"})
    found = figures.densities(tasks.load_screen(folder))
    assert found["zeros"] == pytest.approx(1 / 3) and found["beyond"] == 0.5 and found["small"] == 0
    bins, density = np.array(found["change"]["bins"]), np.array(found["change"]["density"])
    assert bins[density.argmax()] <= 1 <= bins[density.argmax() + 1] + 1e-9
    assert (density * np.diff(bins)).sum() == pytest.approx(0.5)  # the other change is beyond
    assert np.dot(found["expression"]["density"], np.diff(found["expression"]["bins"])) == pytest.approx(1)


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
    found = figures.compute_split(full)["screens"]
    assert list(found) == ["real", "scms", "another", "prior"]
    assert found["real"]["conditions"][0][:2] == [("control", 40), ("train", 40)]
    assert [use for use, _ in found["real"]["conditions"][2][1:4]] == ["test", "context", "test"]


@pytest.mark.parametrize("what", figures.SWEEPS)
def test_only_one_thing_varies(truthful, full, what):
    """All points of a unit have one key and query; smaller contexts and populations start the larger ones."""
    data = figures.compute_sweep(dataclasses.replace(full, guidance=3.0), what)  # of the command line
    assert list(data["screens"]) == ["real", "scms"]
    x = data["screens"]["real"]["x"]
    assert x == {"context": [0, 1, 2], "cells": [2, 4, 8, 16], "guidance": [1, 1.5, 2, 2.5, 3]}[what]
    runs = [truthful[i : i + len(x)] for i in range(0, 2 * len(x), len(x))]  # of each model
    for calls in runs:
        largest = calls[-1].given
        for call in calls:
            assert (call.key == runs[0][0].key).all()
            np.testing.assert_array_equal(call.given.query, largest.query)
            _, k, n, _ = call.given.context.shape
            np.testing.assert_array_equal(call.given.context, largest.context[:, :k, :n])
            np.testing.assert_array_equal(call.given.controls, largest.controls[:, :n])
    for call, value in zip(runs[0], x):
        _, k, n, _ = call.given.context.shape
        assert {"context": k, "cells": n, "guidance": call.guidance} == {
            "context": 2, "cells": full.cells, "guidance": 3.0} | {what: value}


def test_a_good_prediction_is_better_than_other_control_cells(truthful, full):
    """A model that knows the truth has a lower W2 at each point of each unit, and finds each treatment."""
    block = figures.compute_sweep(full, "context")["screens"]["real"]
    truth, other = (np.array(block["values"][row]["wasserstein"]) for row in (FINETUNED, "identity"))
    assert truth.shape == (block["units"], len(block["x"])) and np.all(truth < other)
    assert not np.any(block["values"][FINETUNED]["pds"])


def test_evidence_of_a_sweep():
    """W2 at K = 1 minus at the largest K, unit by unit, for models only; the first where 1 is not there."""
    block = {"title": "t", "x": [0, 1, 4], "trained": 4, "values": {
        row: {"wasserstein": [[9.0, 5.0, 3.0], [9.0, 6.0, 2.0]]} for row in (PRETRAINED, "identity")}}
    one, = figures.improvements("context", block)
    assert (one["difference"], one["error"], one["n"]) == (3, 1, 2) and "t, pre-trained" in one["what"]
    assert figures.improvements("context", block | {"x": [0, 2, 4]})[0]["difference"] == 6.5
    assert figures.improvements("cells", block) == figures.improvements("guidance", block) == []
    assert figures.difference("x", np.array([4.0]))["error"] is None


def test_augmentation_is_paired(truthful, full):
    """The single passes are the first of the augmented ones, with the same noise; the rule finds all genes."""
    data = figures.compute_tta(dataclasses.replace(full, cells=20))
    (title, values), = data["screens"].items()
    assert title == "real-wide: 12 genes, model of 6" and len(values) == full.tta_draws
    for few, many in zip(truthful[::2], truthful[1::2]):
        assert (few.key == many.key).all() and len(few.given.query) == 3 and len(many.given.query) == full.subsets
        np.testing.assert_array_equal(few.given.controls, many.given.controls[:3])
    assert all(unit["single"] > 0.9 > 0.5 > unit["random"] for unit in values)
    assert data["evidence"][0]["difference"] == pytest.approx(np.mean([u["augmented"] - u["single"] for u in values]))


def test_all_snapshots_see_the_same_tasks(truthful, full):
    """One curve for each run and place, its points on the same tasks, without guidance, in the order of training."""
    for run in ("prior", "prior-unpaired"):
        folder = full.out / "smoke" / "train" / run / "split-0" / "snapshots"
        folder.mkdir(parents=True)
        for update in (5, 10, 20):
            (folder / f"update-{update}.eqx").touch()
    data = figures.compute_variance(full)
    assert [(c["run"], c["place"]) for c in data["curves"]] == [
        ("prior", "prior"), ("prior", "real"), ("prior-unpaired", "prior"), ("prior-unpaired", "real")]
    assert data["curves"][0]["tasks"] == [80, 160, 320]  # updates times 8 times 2
    for i in range(0, 12, 3):
        for call in truthful[i : i + 3]:
            np.testing.assert_array_equal(call.given.controls, truthful[i].given.controls)
            assert call.guidance == 1 and (call.key == truthful[0].key).all()
    assert len(data["evidence"]) == 2 and {e["difference"] for e in data["evidence"]} == {0}  # the same model


def test_a_solver_that_ignores_the_steps_has_no_error(truthful, full):
    """The differences are between numbers of steps, from the same noise; fine-tuned models are left out."""
    data = figures.compute_ode(full)
    assert list(data["curves"]) == ["prior", "scms"] and data["steps"] == [5, 10, 20]  # 50 is finer than 40
    assert not np.any([curve["errors"]["largest"] for curve in data["curves"].values()])
    assert [call.steps for call in truthful] == [40, 5, 10, 20] * 2 and len({str(call.key) for call in truthful}) == 1


def test_coverage_of_the_prior(truthful, full):
    """The evidence is the share of a real screen's values in bins that the prior reaches; SCMs are left out."""
    data = figures.compute_coverage(full)
    assert data["prior"]["title"] == "prior" and list(data["screens"]) == ["real", "another"]
    mass = np.array(data["screens"]["real"]["expression"]["density"])
    inside = mass[np.array(data["prior"]["expression"]["density"]) > 0].sum() / mass.sum()
    assert data["evidence"][0]["difference"] == pytest.approx(inside) and data["evidence"][0]["error"] is None


def test_overview_is_of_the_present_screen(full):
    """The task that was predicted is shown, with its context experiments; predictions of other cells are refused."""
    data = figures.compute_overview(full)
    assert "real, first test condition" in data["caption"] and FINETUNED in data["caption"]
    assert data["query"] == "do(g0)" and {"control", "truth", "prediction"} < data["cells"].keys()
    assert {name[:3] for name in data["cells"].keys() - {"control", "truth", "prediction"}} == {"do("}
    assert data["cells"]["truth"] == data["cells"]["prediction"]  # which they are here
    whole = np.concatenate([x for name, x in data["cells"].items() if name != "prediction"])
    assert np.allclose(whole.mean(axis=0), 0, atol=1e-3) and abs(np.corrcoef(whole.T)[0, 1]) < 1e-3
    add_row(full, "real", FINETUNED, "real-finetuned", shift=1.0)
    with pytest.raises(BadInput, match="not made from the present screen"):
        figures.compute_overview(full)


def test_prediction_gene_by_gene(full):
    """do(g0) silences g0 and raises g1, which is the most changed other gene; histograms hold every cell."""
    data = figures.compute_prediction(full)
    assert data["treated"] == 0 and data["change"] == data["predicted"]
    genes = {title: histogram["gene"] for title, histogram in data["histograms"].items()}
    assert genes == {"treated gene": "g0", "most changed other gene": "g1"}
    for histogram in data["histograms"].values():
        assert {name: sum(counts) for name, counts in histogram["counts"].items()} == {
            "control": 8, "truth": 8, "MapPFN": 8}


# ------------------------------------------------------------------------------------------------------------ the stage


@pytest.fixture
def main(s, monkeypatch):
    """Run main() for some figures; returns the content of the JSON of the last."""
    def run(*names, **changed):
        asked = dataclasses.replace(s, names=names, **changed)
        monkeypatch.setattr(scales, "parse", lambda *a: asked)
        monkeypatch.setattr(train, "use_all_cores", lambda share: None)
        figures.main()
        return json.loads((s.out / "smoke" / "figures" / f"{names[-1]}.json").read_text())
    return run


def sweep_data(what, **values):
    """With a single unit and an undefined metric."""
    values = {"wasserstein": [[2.0, 1.0]], "pds": [[None, None]]} | values
    return {"what": what, "screens": {"real": {"title": "real", "x": [1, 2], "trained": 1, "weights": {FINETUNED: 2},
                                               "values": {FINETUNED: values, "identity": values}}}}


def density_data(title):
    """Two bins of everything."""
    bins = {"bins": [0, 1, 2], "density": [0.5, 0.5]}
    return {"title": title, "zeros": 0.5, "small": 0.1, "beyond": 0.2, "expression": bins, "change": bins}


DATA = {  # of each figure, with None where a number is undefined
    "overview": {"query": "do(a)", "explained": [0.2, 0.1], "unit": "u", "cells": {
        name: [[0, 1], [1, 0.5]] for name in ("control", "truth", "do(b)", "do(c)", "prediction")}},
    "prediction": {"query": "do(a)", "unit": "u", "treated": 0, "change": [1, 2], "predicted": [1, 1], "histograms": {
        "x": {"gene": "a", "bins": [0, 1, 2], "counts": {name: [1, 2] for name in ("control", "truth", "MapPFN")}}}},
    "split": {"screens": {"toy": {"title": "t", "systems": ["x"], "treatments": ["NT", "a"],
                                  "conditions": [[["control", 3], ["", 0]]]}}},
    "variance": {"smoothing": 0.5, "window": 3, "curves": [
        {"run": run, "place": place, "title": place, "tasks": [1, 2, 3], "mean": [0.1, None, 0.3]}
        for run in ("paired", "unpaired") for place in ("prior", "real")]},
    "tta": {"screens": {"real": [{"single": 0.3, "thinned": 0.4, "augmented": x, "treated gene only": 0.2,
                                  "random": 0.1} for x in (0.5, None)]}},
    "context": sweep_data("context"),
    "cells": sweep_data("cells"),
    "guidance": sweep_data("guidance", rmse=[[1, 2]], auprc=[[None, None]]),
    "ode": {"steps": [5, 10], "curves": {"run": {"title": "t", "unit": "u", "errors": {
        "largest": [[1e-2, 2e-2], [0, 0]], "root mean square": [[1e-3] * 2, [0, 0]]}}}},
    "coverage": {"prior": density_data("prior"), "screens": {"real": density_data("real")}},
}


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.filterwarnings("error")
def test_each_is_drawn_from_its_json_alone(main, monkeypatch, s, name):
    """Without data, models or a warning, and also where numbers are undefined; the picture is small enough to keep."""
    made = FIGURES[name]._replace(compute=lambda s: {"caption": "n = 2"} | DATA[name])
    monkeypatch.setitem(FIGURES, name, made)
    document = main(name)
    assert {"title", "caption", "settings", "screens", "seconds", "revision", "evidence", "data"} == document.keys()
    assert document["data"] == json.loads(json.dumps(DATA[name]))
    picture = (s.out / "smoke" / "figures" / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 120_000


def test_computed_once(main, monkeypatch, s):
    """With the same settings it is only drawn again; others are refused; a new screen means computing again."""
    runs = []

    def compute(s):
        runs.append(s)
        return {"caption": "", "evidence": [figures.difference("x", np.ones(1))]} | DATA["ode"]

    monkeypatch.setitem(FIGURES, "ode", FIGURES["ode"]._replace(compute=compute))
    assert main("ode")["evidence"][0]["difference"] == 1
    (s.out / "smoke" / "figures" / "ode.png").unlink()
    main("ode")
    assert len(runs) == 1 and (s.out / "smoke" / "figures" / "ode.png").is_file()
    with pytest.raises(BadInput, match="tasks 2, now 3"):
        main("ode", tasks=3)
    add_screen(s, "new")
    assert list(main("ode")["screens"]) == ["new"] and len(runs) == 2


def test_missing_input_says_so(main, s, capsys):
    """Without data each figure has a JSON with the reason and no picture, not even an old one; nothing is raised."""
    old = s.out / "smoke" / "figures" / "overview.png"
    old.parent.mkdir(parents=True)
    old.touch()
    for name in FIGURES:
        document = main(name)
        assert document["title"] == FIGURES[name].title and document["not_run"]
        assert f"{name}.json: not run: {document['not_run']}" in capsys.readouterr().out
    assert not list(old.parent.glob("*.png"))


def test_unknown_name_is_refused(main):
    """A misspelt figure is named, with those that there are."""
    with pytest.raises(BadInput, match="coverge: no such figure; there are overview, prediction"):
        main("coverge")


def test_all_figures_of_a_whole_run(main, truthful, full):
    """What is computed can be written and drawn, and what claims need is in it."""
    for name in set(FIGURES) - {"variance"}:  # there are no snapshots
        document = main(name)
        assert document["caption"] and (document["evidence"] != []) == (name in ("tta", "context", "cells", "coverage"))
