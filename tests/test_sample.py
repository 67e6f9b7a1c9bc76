"""Claims about sample.py: the flow is solved, guidance is linear, tasks do not mix, and what is held out stays so."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import sample
import scales
import train
from data import TEST, Task
from metrics import load_predictions
from model import MapPFN
from scales import BadInput

GENES, CELLS, CONTEXT = 5, 6, 2  # of the model that the fixture `trained` trains


class Velocity(MapPFN):
    """A network whose velocity is a function of (y_tau, tau, observed, query, drop)."""

    say: object = eqx.field(static=True)

    def __init__(self, say):
        for field in dataclasses.fields(MapPFN):
            setattr(self, field.name, None)
        self.say = say

    def __call__(self, y_tau, tau, observed, context, context_treatments, query, slots, drop):
        return self.say(y_tau, tau, observed, query, drop)


@pytest.fixture(scope="module")
def model(trained) -> MapPFN:
    return train.load_model(trained.folder / "model.eqx")[1]


@pytest.fixture(scope="module")
def settings(trained):
    """Of the evaluation: two unseen graphs of five genes, so four tasks."""
    return sample.Settings("linear", scale="smoke", guidance=2.0, genes=GENES, context=CONTEXT, eval_cells=CELLS,
                           held_out=2, seeds=1, steps=10, out=trained.settings.out)


@pytest.fixture(scope="module")
def evaluation(settings):
    """Screen and tasks of the evaluation."""
    (_, _, screen, tasks), = sample.evaluation_sets("linear", settings)
    return screen, tasks


@pytest.fixture(scope="module")
def tasks(evaluation) -> Task:
    return Task(*evaluation[1][:5])


def one_task(tasks: Task, index=0) -> Task:
    return Task(*(jnp.asarray(x[index]) for x in tasks))


# ------------------------------------------------------------------------------------------------------- the flow (A.4)


@pytest.mark.parametrize("mean, sd", [(2.0, 0.3), (-1.0, 3.0)])
def test_gaussian_flow_in_closed_form(tasks, mean, sd):
    """From N(0, 1) to N(mu, s^2) the velocity is known, and so is its solution: noise y ends at mu + s y."""
    def velocity(y, tau, observed, query, drop):
        variance = (1 - tau) ** 2 + (tau * sd) ** 2
        return mean + (tau * sd**2 - (1 - tau)) / variance * (y - tau * mean)

    end = jax.jit(lambda key: sample.flow(Velocity(velocity), one_task(tasks), 1.0, 20, 7, key=key))(jr.key(3))
    noise = jr.normal(jr.split(jr.key(3))[0], (7, GENES))
    np.testing.assert_allclose(end, mean + sd * noise, atol=2e-4)


def test_flow_ends_at_one_whatever_the_steps(tasks):
    """dY = 3 tau^2 dtau ends at Y_0 + 1 exactly, also where 1/steps is inexact: no step is lost or added."""
    velocity = Velocity(lambda y, tau, observed, query, drop: jnp.full_like(y, 3 * tau**2))
    noise = jr.normal(jr.split(jr.key(3))[0], (2, GENES))
    for steps in (3, 300):
        end = jax.jit(lambda key: sample.flow(velocity, one_task(tasks), 1.0, steps, 2, key=key))(jr.key(3))
        np.testing.assert_allclose(end, noise + 1, atol=1e-4)


def test_guidance_is_linear(model, tasks):
    """omega = 0 is the unconditional velocity, 1 the conditional one, and others lie on the line through them."""
    task, slots, y = one_task(tasks), jnp.array([4, 1]), jr.normal(jr.key(0), (CELLS, GENES))
    at = jax.jit(lambda omega: sample.guided_velocity(model, task, slots, omega, y, jnp.array(0.4)), static_argnums=0)
    alone = jax.jit(lambda drop: model(y, jnp.array(0.4), *task[:4], slots, drop))
    unconditional, conditional = alone(jnp.array(True)), alone(jnp.array(False))
    assert np.abs(conditional - unconditional).max() > 1e-3
    for omega in (0.0, 1.0, 3.5):
        np.testing.assert_allclose(at(omega), unconditional + omega * (conditional - unconditional), atol=1e-5)


def test_twenty_five_steps_are_enough(model, tasks):
    """[D9] On a trained model 25 Dopri5 steps and the released code's 100 differ by less than 1e-3 in every number."""
    few, many = (sample.generate(model, tasks, 2.0, steps, key=jr.key(0)) for steps in (25, 100))
    assert np.abs(few - many).max() < 1e-3


# ----------------------------------------------------------------------------------------------------------- many tasks


def test_each_task_is_on_its_own(model, tasks):
    """A task's cells do not depend on the other tasks, nor on how many there are to share the devices."""
    four = sample.generate(model, tasks, 2.0, 10, key=jr.key(0))
    three = sample.generate(model, Task(*(x[:3] for x in tasks)), 2.0, 10, key=jr.key(0))
    others = Task(*(np.concatenate([x[:1], 2 * x[:0:-1]]) for x in tasks))
    assert four.shape == (4, CELLS, GENES) and three.shape == (3, CELLS, GENES)
    assert np.array_equal(four[:3], three)
    assert np.array_equal(four[0], sample.generate(model, others, 2.0, 10, key=jr.key(0))[0])


def test_one_key_one_prediction(model, tasks):
    """The same key gives the same cells; another key, or another place in the list, gives others."""
    first, again, other = (sample.generate(model, tasks, 2.0, 10, key=jr.key(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    twice = sample.generate(model, Task(*(x[[0, 0, 0, 0]] for x in tasks)), 2.0, 10, key=jr.key(0))
    assert len({cells.tobytes() for cells in twice}) == 4


@pytest.mark.parametrize("experiments", [2, 0])
def test_cells_in_pieces(model, tasks, monkeypatch, experiments):
    """[D50] Five cells, at most two at a time: 0 1, 2 3 and 4 0, of which the last is not wanted; each piece has the same
    cells of control and context experiments, and its task's treatments."""
    five = Task(tasks.observed[:, :5], tasks.context[:, :experiments, :5], tasks.context_treatments[:, :experiments],
                tasks.query, tasks.target[:, :5])
    asked = []

    def flows(model, given, keys, guidance, steps, cells):
        asked.extend(zip(*given))
        return given.observed

    monkeypatch.setattr(sample, "_flows", flows)
    assert np.array_equal(sample.generate(model, five, at_once=2, cells=3, key=jr.key(0)), five.observed[:, :3])
    asked.clear()
    assert np.array_equal(sample.generate(model, five, at_once=2, key=jr.key(0)), five.observed)
    assert len(asked) == 3 * len(tasks.query)
    for i, piece in enumerate(asked):
        task, some = one_task(five, i // 3), np.array([[0, 1], [2, 3], [4, 0]])[i % 3]
        wanted = task._replace(observed=task.observed[some], context=task.context[:, some], target=task.target[some])
        assert all(np.array_equal(a, b) for a, b in zip(piece, wanted))


def test_as_many_cells_as_asked_for(tasks):
    """`cells` asks for more than the populations have; a velocity of zero leaves the noise, which is N(0, I)."""
    still = Velocity(lambda y, tau, observed, query, drop: 0 * y)
    noise = sample.generate(still, tasks, 1.0, 1, 500, key=jr.key(0))
    assert noise.shape == (4, 500, GENES)
    assert abs(noise.mean()) < 0.05 and noise.std() == pytest.approx(1, abs=0.05)


def test_expression_is_clipped_and_counted():
    """Negative log-expression becomes zero and its share is told; values of an SCM stay as they are."""
    cells = np.array([[[-1.0, 2.0], [0.0, -3.0]]], np.float32)
    clipped, share = sample.clip_expression(cells, True)
    assert clipped.tolist() == [[[0, 2], [0, 0]]] and share == 0.5
    kept, share = sample.clip_expression(cells, False)
    assert np.array_equal(kept, cells) and share == 0


# --------------------------------------------------------------------------------- test-time augmentation (6, Figure 3)


@pytest.mark.parametrize("genes, size, subsets, treated", [
    (100, 50, 8, 9), (100, 50, 3, 1), (7, 5, 6, 2), (12, 4, 11, 3), (9, 9, 2, 4), (6, 4, 5, 0), (10, 9, 7, 1),
])
def test_gene_subsets_are_fair(genes, size, subsets, treated):
    """Treated genes are in every subset, the others in equally many give or take one; no gene twice, none left out."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        always = np.sort(rng.permutation(genes)[:treated])
        chosen = sample.gene_subsets(rng, genes, size, subsets, always)
        assert chosen.shape == (subsets, size)
        assert all(len(set(subset)) == size for subset in chosen.tolist())
        count = np.bincount(chosen.ravel(), minlength=genes)
        assert (count[always] == subsets).all()
        others = np.delete(count, always)
        assert len(count) == genes and (not len(others) or (others.min() >= 1 and np.ptp(others) <= 1))


def test_gene_subsets_are_random_but_seeded():
    """The same generator gives the same subsets, another one others."""
    draw = lambda seed: sample.gene_subsets(np.random.default_rng(seed), 30, 10, 6, np.array([3]))
    assert np.array_equal(draw(0), draw(0)) and not np.array_equal(draw(0), draw(1))


class Counted:
    """A random generator that gives up after 1000 draws, so that an endless loop ends."""

    def __init__(self):
        self.draws, self.rng = 0, np.random.default_rng(0)

    def permutation(self, x):
        self.draws += 1
        assert self.draws < 1000, "endless loop"
        return self.rng.permutation(x)


@pytest.mark.parametrize("genes, size, subsets, treated", [(100, 50, 1, 0), (20, 5, 3, 6), (20, 5, 9, 5), (4, 6, 3, 1)])
def test_impossible_subsets_are_refused(monkeypatch, genes, size, subsets, treated):
    """Too few subsets, too many treated genes, or fewer genes than the model has, end in a message, not in a loop."""
    import jaxtyping
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # for the sake of Counted
    with pytest.raises(BadInput, match=f"{genes} genes"):
        sample.gene_subsets(Counted(), genes, size, subsets, np.arange(treated))


def test_augmented_pools_each_gene_from_its_own_subsets():
    """On 11 genes with a model of 5: each value in a gene's column was predicted for that gene; none is twice."""
    genes, size, subsets, n = 11, 5, 7, 4
    mark = Velocity(lambda y, tau, observed, query, drop: 1000 * observed.mean(0) + 0 * y)  # ends at 1000 gene + noise
    population = np.tile(np.arange(genes, dtype=np.float32), (n, 1))
    one_hot = np.eye(genes, dtype=np.float32)
    task = Task(population, population[None], one_hot[[2]], one_hot[7], population)
    pooled = sample.augmented(mark, task, size, subsets, np.random.default_rng(0), 2.0, 2, key=jr.key(0))
    rarest = subsets * (size - 2) // (genes - 2)  # subsets that hold the least frequent gene
    assert pooled.shape == (n * rarest, genes)
    assert (np.round(pooled / 1000) == np.arange(genes)).all()
    assert all(len(set(column)) == len(column) for column in pooled.T.tolist())


# ---------------------------------------------------------------------------------------- the guidance weight (Table 7)


def test_guidance_is_chosen_on_validation_tasks(trained, settings, monkeypatch, tmp_path):
    """Of predictions that are wrong by |weight - 1.5|, 1.5 is chosen, on tasks from graphs that are not the
    evaluation's; the choice is written down and not made twice."""
    head, model = train.load_model(trained.folder / "model.eqx")
    asked = []

    def generate(model, tasks, guidance, steps, *, key):
        asked.append(tasks.query)
        return tasks.target + np.float32(guidance - 1.5)

    monkeypatch.setattr(sample, "generate", generate)
    choose = lambda: sample.chosen_guidance(settings, tmp_path / "model.eqx", head, model, None)
    assert choose() == 1.5 and len(asked) == len(sample.GUIDANCE)
    record = json.loads((tmp_path / "guidance.json").read_text())
    assert record["guidance"] == 1.5 and record["validation_rmse"]["2.5"] == pytest.approx(1, abs=1e-5)
    (_, _, _, evaluation), = sample.evaluation_sets("linear", settings)
    assert not set(asked[0].max(-1).tolist()) & set(evaluation.query.max(-1).tolist())
    assert choose() == 1.5 and len(asked) == len(sample.GUIDANCE)


def test_without_validation_conditions_guidance_is_inherited(trained, settings, monkeypatch, tmp_path):
    """A fine-tuned model takes the weight of the pre-trained one, a model trained from scratch takes 2."""
    head, model = train.load_model(trained.folder / "model.eqx")
    monkeypatch.setattr(train, "validation_tasks", lambda *a: None)
    for run, record in (("grn-seed0", {"guidance": 3.0}), ("finetune-x", None), ("scratch-x", None)):
        (tmp_path / run).mkdir()
        if record:
            (tmp_path / run / "guidance.json").write_text(json.dumps(record))
    for what, expected in (("finetune", 3.0), ("scratch", 2.0)):
        file = tmp_path / f"{what}-x" / "model.eqx"
        assert sample.chosen_guidance(settings, file, head | {"what": what}, model, None) == expected


# ----------------------------------------------------------------------------------------------- what is held out (B.4)


def test_evaluation_repeats_itself(settings, evaluation):
    """The same seed gives the same screen and tasks, for all methods; another seed gives others."""
    (_, _, again, tasks), = sample.evaluation_sets("linear", settings)
    assert np.array_equal(again.cells, evaluation[0].cells)
    assert all(np.array_equal(a, b) for a, b in zip(tasks, evaluation[1]))
    (_, _, other, _), = sample.evaluation_sets("linear", dataclasses.replace(settings, seed=1))
    assert not np.array_equal(other.cells, evaluation[0].cells)


def test_evaluation_graphs_are_unseen(trained, evaluation):
    """No do-value of the evaluation, drawn anew for each graph, occurs in training or validation, whatever the seed."""
    values = lambda treatments: set(np.asarray(treatments)[..., 1:, :].max(-1).ravel().tolist()) - {0.0}
    held_out, seen = values(evaluation[0].treatments), set()
    for seed in range(3):
        s = dataclasses.replace(trained.settings, seed=seed)
        source = train.Source(s, None)
        for update in range(0, s.updates, s.refresh):
            source(update)
            seen |= values(source.screen.treatments)
        seen |= set(train.validation_tasks(s, None).query.max(-1).tolist())
    assert len(held_out) == 2 * GENES and len(seen) > 500 and not held_out & seen


def test_evaluation_predicts_test_conditions_from_training_ones(evaluation):
    """Half of each graph's treatments are queries, and no context experiment is one of them."""
    screen, tasks = evaluation
    assert len(tasks.query) == 2 * (GENES // 2)
    for c, t, context in zip(tasks.context_index, tasks.treatment_index, tasks.context_treatments):
        assert screen.split[c, t] == TEST
        test = screen.treatments[c][screen.split[c] == TEST]
        assert not (context[:, None] == test[None]).all(-1).any()


def test_missing_data_are_refused(settings, tmp_path):
    """The message names the file and the command that makes it."""
    s = dataclasses.replace(settings, experiment="leukemia", out=tmp_path)
    with pytest.raises(BadInput, match="split-0.h5ad: no such file; prepare it with python data.py --dataset leukemia"):
        list(sample.evaluation_sets("leukemia", s))


def test_rows_of_table_3_have_their_models(settings):
    """One pre-trained model for all splits; a fine-tuned and a random one for each."""
    s = dataclasses.replace(settings, experiment="melanoma")
    names = {row: path.parent.name for row, path in sample.model_files(s, 3).items()}
    assert names == {"mappfn-random": "scratch-melanoma-split3", "mappfn-pretrained": "grn-seed0",
                     "mappfn-finetuned": "finetune-melanoma-split3"}


# ------------------------------------------------------------------------------------------------------------ the stage


@pytest.fixture
def command(monkeypatch):
    """main() with given settings; the devices are chosen already."""
    def run(s):
        monkeypatch.setattr(train, "use_all_cores", lambda n: None)
        monkeypatch.setattr(scales, "parse", lambda *a: s)
        sample.main()
    return run


def test_stage_writes_what_it_says_and_is_skipped_next_time(command, settings, evaluation, monkeypatch):
    """One file for each model, with the tasks that were evaluated and all that tells where it comes from."""
    command(settings)
    file = settings.out / "smoke" / "samples" / "linear" / "mappfn-seed0-split0-draw0.npz"
    predictions, (_, tasks) = load_predictions(file), evaluation
    assert [f.name for f in file.parent.iterdir()] == [file.name]
    assert np.array_equal(predictions.target, tasks.target) and np.array_equal(predictions.treatments, tasks.query)
    assert predictions.prediction.shape == tasks.target.shape and not predictions.log_expression
    meta = predictions.meta
    assert (meta["experiment"], meta["method"], meta["split"], meta["resampling"]) == ("linear", "mappfn-seed0", 0, 0)
    assert meta["training"]["width"] == 16 and meta["guidance"] == 2.0 and len(meta["genes"]) == GENES
    assert {"scale", "seed", "revision", "seconds", "clipped_fraction"} <= meta.keys()
    monkeypatch.setattr(sample, "generate", lambda *a, **k: pytest.fail("predicted again"))
    command(settings)
    with pytest.raises(BadInput, match="guidance: 2.0, now 1.5"):
        command(dataclasses.replace(settings, guidance=1.5))


def test_model_of_another_size_is_refused(command, settings, tmp_path, trained):
    """The message says both numbers of genes; a missing model names its file."""
    folder = tmp_path / "smoke" / "train" / "linear-seed0"
    s = dataclasses.replace(settings, genes=7, out=tmp_path)
    with pytest.raises(BadInput, match="linear-seed0/model.eqx: no such checkpoint"):
        command(s)
    folder.mkdir(parents=True)
    (folder / "model.eqx").write_bytes((trained.folder / "model.eqx").read_bytes())
    with pytest.raises(BadInput, match="a model of 5 genes, but the data have 7"):
        command(s)
