"""Claims about figures.py: comparisons are paired, numbers are right by hand, and what is missing says so."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

import figures
import metrics
import sample
import scales
import train
from data import TEST, TRAIN, Screen
from figures import FIGURES, Settings
from metrics import Predictions, save_predictions
from model import MapPFN
from scales import BadInput

HEAD = {"what": "linear", "genes": 6, "context": 2, "cells": 4, "contexts": 4, "unpaired": False, "micro_batch": 8,
        "accumulate": 2}
MODEL = object.__new__(MapPFN)  # never called: `truthful` takes its place


@pytest.fixture
def s(tmp_path) -> Settings:
    """Sizes at which nothing takes long."""
    return Settings(scale="smoke", out=tmp_path, steps=2, screens=1, splits=1, resamplings=1, graphs=2, tasks=2,
                    cells=8, most_cells=16, snapshot_tasks=3, draws=2, ode_tasks=2, ode_reference=40, grns=2, subsets=6)


@pytest.fixture
def truthful(monkeypatch) -> list[SimpleNamespace]:
    """Every model exists and predicts the true cells, as many as are asked for; W2 is cheap. Returns what was asked."""
    calls = []

    def generate(model, tasks, guidance=2.0, steps=20, cells=None, at_once=None, *, key):
        calls.append(SimpleNamespace(tasks=tasks, guidance=guidance, steps=steps, cells=cells, at_once=at_once,
                                     key=key))
        return tasks.target[:, :cells]

    def wasserstein(x, y):
        return float(np.abs(x.mean(0) - y.mean(0)).max())

    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.setattr(train, "load_model", lambda path: (HEAD, MODEL))
    monkeypatch.setattr(metrics, "wasserstein", wasserstein)
    return calls


def made_screen(genes=6, contexts=2, cells=40, seed=0) -> Screen:
    """Log-expression: knocking out gene t silences it and raises the next one; the last context has TEST treatments."""
    rng = np.random.default_rng(seed)
    values = rng.gamma(4, 0.5, size=(contexts, genes + 1, cells, genes)).astype(np.float32)
    for t in range(genes):
        values[:, t + 1, :, t] = 0
        values[:, t + 1, :, (t + 1) % genes] += 2
    count = np.full((contexts, genes + 1), cells)
    split = np.full_like(count, TRAIN)
    split[-1, 1::2] = TEST
    treatments = np.tile(np.vstack([np.zeros(genes), np.eye(genes)]).astype(np.float32), (contexts, 1, 1))
    names = tuple(f"g{i}" for i in range(genes))
    return Screen(values.reshape(-1, genes), (np.cumsum(count) - count.ravel()).reshape(count.shape), count, treatments,
                  split, names, tuple(f"c{i}" for i in range(contexts)), ("control", *names), True)


@pytest.fixture
def leukemia(s, monkeypatch) -> Screen:
    """A screen that is called leukemia, and one of twice the genes; the files are only looked for."""
    narrow, wide = made_screen(), made_screen(genes=12, seed=1)
    for name in ("leukemia", "leukemia-wide"):
        path = figures.split_file(s, name)
        path.parent.mkdir(parents=True)
        path.touch()
    for module in (sample, figures):
        monkeypatch.setattr(module, "load_screen", lambda path: wide if "wide" in str(path) else narrow)
    return narrow


# ------------------------------------------------------------------------------------------------------- by hand


def test_variance_correlation_by_hand():
    """(0, 1, 4) and (0, 4, 16) correlate fully, (0, 1, 4) and (4, 1, 0) negatively; for (1, 1, 1) it is undefined."""
    cells = lambda *sd: np.array([sd, [-x for x in sd]], float)
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


def test_densities_by_hand():
    """A third of the values is zero; a doubling is a change of 1; densities integrate to the share that is in range."""
    level = lambda x: np.full((4, 1), np.log1p(x), np.float32)
    screen = Screen(np.concatenate([level(10), level(20), level(0)]), np.array([[0, 4, 8]]), np.array([[4, 4, 4]]),
                    np.zeros((1, 3, 1), np.float32), np.full((1, 3), TRAIN), ("g",), ("c",), ("n", "a", "b"), True)
    found = figures.densities(screen, None)
    assert found["zeros"] == pytest.approx(1 / 3) and found["beyond"] == 0.5 and found["small"] == 0
    bins, density = np.array(found["change"]["bins"]), np.array(found["change"]["density"])
    assert bins[density.argmax()] <= 1 <= bins[density.argmax() + 1] + 1e-9
    assert (density * np.diff(bins)).sum() == pytest.approx(0.5)  # the other change is beyond
    assert np.dot(found["expression"]["density"], np.diff(found["expression"]["bins"])) == pytest.approx(1)


def test_split_is_what_was_written(s, leukemia):
    """The control comes first; each condition has its use and cells, and what was not measured is empty."""
    figures.split_file(s, "leukemia", ending="csv").write_text(
        "context,treatment,split,cells\na,STAT1,test,30\na,JAK2,train,20\na,NT,control,90\n"
        "b,NT,control,80\nb,JAK2,validation,25\n")
    found = figures.compute_split(s)["screens"]["leukemia"]
    assert found["treatments"] == ["NT", "JAK2", "STAT1"] and found["contexts"] == ["a", "b"]
    assert found["conditions"][0] == [("control", 90), ("train", 20), ("test", 30)]
    assert found["conditions"][1] == [("control", 80), ("validation", 25), ("", 0)]


# --------------------------------------------------------------------------------------------------- what is compared


def test_screens_in_order(s):
    """Leukemia comes first and the toy last; the wide screens, and folders without a split, are not among them."""
    for name in ("toy", "melanoma", "leukemia", "leukemia-wide"):
        path = figures.split_file(s, name)
        path.parent.mkdir(parents=True)
        path.touch()
    figures.split_file(s, "empty").parent.mkdir()
    assert figures.screen_names(s) == ["leukemia", "melanoma", "toy"]


def test_limits_are_those_of_the_held_out_context(s, leukemia):
    """Three of its six treatments are for training, of 40 cells each; and half of the variables of a linear SCM."""
    assert figures.limits(s, "leukemia", 6) == (3, 40)
    assert figures.limits(s, "linear", 6)[0] == 3


@pytest.mark.parametrize("what", figures.SWEEPS)
def test_only_one_thing_varies(s, truthful, leukemia, what):
    """All points of a unit have one key, query and truth; smaller contexts and populations start the larger ones."""
    data = figures.sweep(s, what)
    assert list(data["experiments"]) == ["linear", "leukemia"]
    x = data["experiments"]["leukemia"]["x"]
    runs = [truthful[i: i + len(x)] for i in range(len(truthful) - 2 * len(x), len(truthful), len(x))]  # of each model
    for run in runs:
        largest = run[-1].tasks
        for call in run:
            assert (call.key == runs[0][0].key).all() and call.cells == s.cells
            assert call.at_once == (None if what == "cells" else HEAD["cells"])  # [D50]
            np.testing.assert_array_equal(call.tasks.query, largest.query)
            np.testing.assert_array_equal(call.tasks.target, largest.target)
            _, k, n, _ = call.tasks.context.shape
            np.testing.assert_array_equal(call.tasks.context, largest.context[:, :k, :n])
            np.testing.assert_array_equal(call.tasks.observed, largest.observed[:, :n])
    varied = {"context": [call.tasks.context.shape[1] for call in runs[0]],
              "guidance": [call.guidance for call in runs[0]],
              "cells": [call.tasks.context.shape[2] for call in runs[0]]}
    assert varied[what] == x and all(len(set(values)) == 1 for key, values in varied.items() if key != what)


def test_true_cells_have_no_error(s, truthful, leukemia):
    """A model that returns the truth has W2 and PDS 0 at each point of each unit; other control cells do not."""
    data = figures.sweep(s, "context")["experiments"]
    assert np.shape(data["linear"]["values"]["linear"]["pds"]) == (2, 3)  # graphs; K = 0, 1, 2, there being three
    for row in ("mappfn-pretrained", "mappfn-finetuned"):
        assert not np.any([data["leukemia"]["values"][row][m] for m in ("wasserstein", "pds")])
    assert np.all(np.array(data["leukemia"]["values"]["identity"]["wasserstein"]) > 0.1)


def test_chosen_guidance_is_used(s, truthful, leukemia):
    """A model's own weight is that of the file beside it, unless the command line gives one; without a file it is 2."""
    file = figures.model_file(s, "leukemia", "mappfn-pretrained", 0)
    assert figures.guidance_of(s, file) == 2
    file.parent.mkdir(parents=True)
    file.with_name("guidance.json").write_text('{"guidance": 1.5}')
    assert figures.guidance_of(s, file) == 1.5
    figures.sweep(s, "context")
    assert {call.guidance for call in truthful} == {1.5, 2.0}
    assert figures.guidance_of(Settings(guidance=3.0), file) == 3


def test_augmentation_is_paired(s, truthful, leukemia):
    """The single passes are the first of the augmented ones, with the same noise; the truth finds all genes."""
    data = figures.compute_tta(dataclasses.replace(s, cells=20))["screens"]["leukemia"]
    assert data["genes"] == [6, 12] and len(data["values"]) == s.draws
    for few, many in zip(truthful[::2], truthful[1::2]):
        assert (few.key == many.key).all() and len(few.tasks.query) == 3 and len(many.tasks.query) == s.subsets
        np.testing.assert_array_equal(few.tasks.target, many.tasks.target[:3])
    assert all(unit["single"] > 0.9 > 0.5 > unit["random"] for unit in data["values"])


def test_all_snapshots_see_the_same_tasks(s, truthful, leukemia, monkeypatch):
    """One curve for each prior and place, all points of it on the same held-out tasks, in the order of training."""
    for tail in ("", "-unpaired"):
        folder = s.out / "smoke" / "train" / f"grn{tail}-seed0" / "snapshots"
        folder.mkdir(parents=True)
        for update in (5, 10, 20):
            (folder / f"update-{update}.eqx").touch()
    monkeypatch.setattr(figures, "load_grn_screen", lambda folder, held_out: made_screen(contexts=3, seed=2))
    data = figures.compute_variance(s)
    assert [(c["run"], c["place"]) for c in data["curves"]] == [
        ("paired", "prior"), ("paired", "leukemia"), ("unpaired", "prior"), ("unpaired", "leukemia")]
    assert data["curves"][0]["tasks"] == [80, 160, 320]  # updates times 8 times 2
    for i in range(0, 12, 3):
        for call in truthful[i: i + 3]:
            np.testing.assert_array_equal(call.tasks.target, truthful[i].tasks.target)
            assert call.guidance == 1
    assert np.allclose([c["mean"] for c in data["curves"]], 1)  # truth


def test_a_solver_that_ignores_the_steps_has_no_error(s, truthful, monkeypatch):
    """The differences are between the numbers of steps, from the same noise, and of nothing else."""
    monkeypatch.setattr(figures, "load_grn_screen", lambda folder, held_out: made_screen())
    data = figures.compute_ode(s)
    assert not np.any([errors["largest"] for errors in data["curves"].values()])
    assert [call.steps for call in truthful[:4]] == [40, 5, 10, 20] and data["steps"] == [5, 10, 20]  # 50 is finer
    assert len({str(call.key) for call in truthful}) == 1


def test_overview_is_of_the_present_data(s, leukemia, monkeypatch):
    """The task that was predicted is shown, with its context experiments; predictions of other data are refused."""
    rng = np.random.default_rng(3)
    tasks = next(figures.units(s, "leukemia", 6, 8, 2))[3]
    kept = {"experiment": "leukemia", "scale": "smoke", "seed": 0, "steps": 2, "genes": 20, "context": 2,
            "eval_cells": 8, "held_out": 2, "seeds": 1, "splits": 1, "resamplings": 1, "guidance": None}
    meta = {"settings": kept, "experiment": "leukemia", "genes": leukemia.genes}
    path = s.out / "smoke" / "samples" / "leukemia" / "mappfn-finetuned-split0-draw0.npz"
    p = Predictions(tasks.observed, tasks.observed, tasks.target, tasks.target, tasks.query, np.array(["c1"] * 3), True,
                    meta)
    save_predictions(path, p)
    data = figures.compute_overview(s)
    assert data["query"] == "do(g0)" and {"control", "truth", "prediction"} < data["cells"].keys()
    assert {k[:3] for k in data["cells"].keys() - {"control", "truth", "prediction"}} == {"do("}
    assert data["cells"]["truth"] == data["cells"]["prediction"]  # which they are here
    whole = np.concatenate([data["cells"][k] for k in data["cells"] if k != "prediction"])
    assert np.allclose(whole.mean(axis=0), 0, atol=1e-3) and abs(np.corrcoef(whole.T)[0, 1]) < 1e-3
    save_predictions(path, p._replace(target=rng.normal(size=p.target.shape)))
    with pytest.raises(BadInput, match="not made from the present data"):
        figures.compute_overview(s)


# ------------------------------------------------------------------------------------------------------------ the stage


@pytest.fixture
def main(s, monkeypatch):
    """Run main() for some figures; returns the content of the JSON of the last."""
    def run(*names, **changed):
        asked = Settings(**{f: getattr(s, f) for f in s.__dataclass_fields__} | {"names": names} | changed)
        monkeypatch.setattr(scales, "parse", lambda *a: asked)
        monkeypatch.setattr(train, "use_all_cores", lambda micro_batch: None)
        figures.main()
        return json.loads((s.out / "smoke" / "figures" / f"{names[-1]}.json").read_text())
    return run


def curve(*mean):
    return {"wasserstein": [list(mean), [2 * m for m in mean]], "pds": [[None] * len(mean)] * 2}


MADE = {  # data of each figure, with None where a number is undefined
    "overview": {"query": "do(a)", "explained": [0.2, 0.1], "cells": {
        k: [[0, 1], [1, 0.5]] for k in ("control", "truth", "do(b)", "do(c)", "prediction")}},
    "split": {"screens": {"toy": {"contexts": ["x"], "treatments": ["NT", "a"],
                                  "conditions": [[["control", 3], ["", 0]]]}}},
    "variance": {"smoothing": 0.5, "window": 3, "curves": [
        {"run": run, "place": place, "tasks": [1, 2, 3], "mean": [0.1, None, 0.3]}
        for run in ("paired", "unpaired") for place in ("prior", "leukemia")]},
    "tta": {"screens": {"leukemia": {"genes": [6, 12], "values": [
        {"single": 0.3, "thinned": 0.4, "augmented": v, "treated gene only": 0.2, "random": 0.1}
        for v in (0.5, None)]}}},
    "context": {"what": "context", "experiments": {"linear": {
        "x": [0, 1], "trained": 1, "chosen": {}, "values": {"linear": curve(2, 1), "identity": curve(3, 3)}}}},
    "cells": {"what": "cells", "experiments": {"linear": {
        "x": [4, 8], "trained": 4, "chosen": {}, "values": {"linear": curve(2, 1), "identity": curve(3, 3)}}}},
    "guidance": {"what": "guidance", "experiments": {"linear": {
        "x": [1, 2], "trained": None, "chosen": {"linear": 2},
        "values": {"linear": curve(2, 1) | {"rmse": [[1, 2]], "auprc": [[None, None]]}}}}},
    "ode": {"steps": [5, 10], "curves": {
        "GRNs": {"largest": [[1e-2, 2e-2], [0, 0]], "root mean square": [[1e-3] * 2, [0, 0]]}}},
    "coverage": {"distributions": {name: {"zeros": 0.5, "small": 0.1, "beyond": 0.2, **{
        k: {"bins": [0, 1, 2], "density": [0.5, 0.5]} for k in ("expression", "change")}}
        for name in ("GRN prior", "toy")}},
}


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.filterwarnings("error")
def test_each_is_drawn_from_its_json_alone(main, monkeypatch, tmp_path, name):
    """Without data, models or a warning, and also where numbers are undefined; the picture is small enough to keep."""
    compute = lambda s: {"caption": "n = 2"} | MADE[name]
    monkeypatch.setitem(FIGURES, name, FIGURES[name]._replace(compute=compute))
    document = main(name)
    assert {"title", "caption", "settings", "screens", "seconds", "revision", "data"} == document.keys()
    assert document["data"] == json.loads(json.dumps(MADE[name]))
    picture = (tmp_path / "smoke" / "figures" / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 120_000


def test_computed_once(main, monkeypatch, s):
    """With the same settings it is only drawn again; others are refused; a new screen means computing again."""
    runs = []
    compute = lambda s: runs.append(s) or {"caption": ""} | MADE["ode"]
    monkeypatch.setitem(FIGURES, "ode", FIGURES["ode"]._replace(compute=compute))
    main("ode")
    (s.out / "smoke" / "figures" / "ode.png").unlink()
    main("ode")
    assert len(runs) == 1 and (s.out / "smoke" / "figures" / "ode.png").is_file()
    with pytest.raises(BadInput, match="tasks: 2, now 3"):
        main("ode", tasks=3)
    figures.split_file(s, "melanoma").parent.mkdir(parents=True)
    figures.split_file(s, "melanoma").touch()
    main("ode")
    assert len(runs) == 2


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
    with pytest.raises(BadInput, match="coverge: no such figure; there are overview, split"):
        main("coverge")


def test_captions_say_what_the_spread_is(s, truthful, leukemia):
    """Each says over how many of what."""
    assert "n = 2 graphs, 2 test conditions" in figures.sweep(s, "cells")["caption"]
    assert "n = 2 draws of cells" in figures.compute_tta(s)["caption"]
