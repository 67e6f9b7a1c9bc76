"""Claims about sample.py: the flow is solved, guidance is linear, tasks do not mix, and no sampler sees a target."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import write_linear

import metrics
import model
import prior
import sample
import scales
import tasks
import train
from scales import BadInput
from tasks import TEST, Given

GENES, CELLS = 5, 6  # of the model that the fixture `trained` trains


class Velocity(eqx.Module):
    """A network whose velocity is a function of (y_tau, tau, given, drop)."""

    say: object = eqx.field(static=True)

    def condition(self, given, slots):
        return given

    def __call__(self, y_tau, tau, condition, drop):
        return self.say(y_tau, tau, condition, drop)


@pytest.fixture(scope="module")
def network(trained):
    return model.load_model(trained.folder / "model.eqx")[1]


@pytest.fixture(scope="module")
def settings(trained):
    """Of the evaluation: two unseen graphs of five genes, so four tasks."""
    return sample.Settings(screen="dags", model=("mappfn-seed0=dags",), scale="smoke", guidance=2.0, eval_cells=CELLS,
                           draws=1, steps=10, out=trained.settings.out)


@pytest.fixture(scope="module")
def given(trained) -> Given:
    return tasks.evaluation_tasks(trained.screen, CELLS, 2).given


def one(given: Given, index=0) -> Given:
    return Given(*(jnp.asarray(field[index]) for field in given))


def solve(network, given, steps, cells, seed=3):
    """The flow of the first task, and the noise that it starts from."""
    key = jr.key(seed)
    end = jax.jit(lambda key: sample.flow(network, one(given), 1.0, steps, cells, key=key))(key)
    return end, jr.normal(jr.split(key)[0], (cells, GENES))


@pytest.mark.exercise6
def test_flow_in_closed_form(given):
    """From N(0, 1) to N(mu, s^2) the velocity is known, and so is its solution: noise y ends at mu + s y. And
    dY = 3 tau^2 dtau ends at Y_0 + 1 exactly, also where 1/steps is inexact: no step is lost or added."""
    for mean, sd in ((2.0, 0.3), (-1.0, 3.0)):
        def velocity(y, tau, given, drop):
            variance = (1 - tau) ** 2 + (tau * sd) ** 2
            return mean + (tau * sd**2 - (1 - tau)) / variance * (y - tau * mean)

        end, noise = solve(Velocity(velocity), given, 20, 7)
        np.testing.assert_allclose(end, mean + sd * noise, atol=2e-4)
    for steps in (1, 3, 300):
        end, noise = solve(Velocity(lambda y, tau, given, drop: jnp.full_like(y, 3 * tau**2)), given, steps, 2)
        np.testing.assert_allclose(end, noise + 1, atol=1e-4)


@pytest.mark.exercise8
def test_counterfactual_cells(network, given):
    """Without a knock-out a control cell comes back as it was, to 1e-3, whatever the guidance; with one it becomes
    another that still goes with it, as a new cell does not."""
    def generate(query, **how):
        return sample.generate(network, given._replace(query=query), 2.0, key=jr.key(0), **how)

    controls = given.controls[:, ::-1]  # the given ones or others: here in another order
    back, moved = generate(np.zeros_like(given.query), source=controls), generate(given.query, source=controls)
    new = generate(given.query)
    assert np.abs(back - controls).max() > 1e-7 and np.abs(moved - controls).max() > 0.3
    np.testing.assert_allclose(back, controls, atol=1e-3)

    def goes_with(cells):
        centred = [x - x.mean(axis=1, keepdims=True) for x in (cells, controls)]
        return np.corrcoef(centred[0].ravel(), centred[1].ravel())[0, 1]

    assert goes_with(moved) > 0.7 and abs(goes_with(new)) < 0.3


@pytest.mark.exercise6
def test_guidance_is_linear(network, given):
    """omega = 0 is the unconditional velocity, 1 the conditional one, and others lie on the line through them."""
    condition, tau = model.prepare(network, one(given), key=jr.key(1)), jnp.array(0.4)
    y = jr.normal(jr.key(0), (CELLS, GENES))
    at = jax.jit(lambda omega: sample.guided_velocity(network, condition, omega, y, tau), static_argnums=0)
    alone = jax.jit(lambda drop: network(y, tau, condition, drop))
    unconditional, conditional = alone(jnp.array(True)), alone(jnp.array(False))
    assert np.abs(conditional - unconditional).max() > 1e-3
    for omega in (0.0, 1.0, 3.5):
        np.testing.assert_allclose(at(omega), unconditional + omega * (conditional - unconditional), atol=1e-5)


def test_twenty_five_steps_are_enough(network, given):
    """[D9] On a trained model 25 Dopri5 steps and the released code's 100 differ by less than 1e-3 in every number."""
    few, many = (sample.generate(network, given, 2.0, steps, key=jr.key(0)) for steps in (25, 100))
    assert np.abs(few - many).max() < 1e-3


def test_each_task_is_on_its_own(network, given):
    """A task's cells do not depend on the other tasks, nor on how many share the devices. The same key gives
    the same cells; another key, or another place in the list, gives others."""
    def generate(pick, seed=0):
        return sample.generate(network, Given(*map(pick, given)), 2.0, 10, key=jr.key(seed))

    four, again, other_key = (generate(lambda x: x, seed) for seed in (0, 0, 1))
    three, twice = generate(lambda x: x[:3]), generate(lambda x: x[[0, 0, 0, 0]])
    others = generate(lambda x: np.concatenate([x[:1], 2 * x[:0:-1]]))
    assert four.shape == (4, CELLS, GENES) and three.shape == (3, CELLS, GENES)
    assert np.array_equal(four[:3], three) and np.array_equal(four[0], others[0]) and np.array_equal(four, again)
    assert np.abs(four - other_key).max() > 0.1 and len({cells.tobytes() for cells in twice}) == 4


def test_many_tasks_at_a_time(network, given):
    """One task a device or three give the same cells, to rounding, also where they do not come out even; four tasks
    or five compile nothing new."""
    def generate(at_once, tasks):
        some = Given(*(field[np.arange(tasks) % 4] for field in given))
        return sample.generate(network, some, 2.0, 10, at_once=at_once, key=jr.key(0))

    many = generate(3, 4)
    np.testing.assert_allclose(generate(1, 4), many, atol=1e-5)
    compiled = sample.flows._cached._cache_size()
    assert np.array_equal(generate(3, 5)[:4], many) and sample.flows._cached._cache_size() == compiled


@pytest.mark.parametrize("count, turns", [(1, [2]), (4, [4]), (9, [16]), (40, [32, 32])])
def test_no_more_at_a_time_than_there_are(network, given, monkeypatch, count, turns):
    """Of 16 tasks on each of two devices less than half are repeats of the last one, but for the last turn of many."""
    asked = []

    def flows(network, given, guidance, steps, cells, keys, source):
        asked.append(len(keys))
        return np.zeros((len(keys), cells, GENES), np.float32)

    monkeypatch.setattr(sample, "flows", flows)
    some = Given(*(field[np.arange(count) % 4] for field in given))
    assert sample.generate(network, some, at_once=16, key=jr.key(0)).shape == (count, CELLS, GENES) and asked == turns


def test_as_many_cells_as_asked_for(given):
    """`cells` asks for more than the populations have; a velocity of zero leaves the noise, which is N(0, I)."""
    still = Velocity(lambda y, tau, given, drop: 0 * y)
    noise = sample.generate(still, given, 1.0, 1, 500, key=jr.key(0))
    assert noise.shape == (4, 500, GENES)
    assert abs(noise.mean()) < 0.05 and noise.std() == pytest.approx(1, abs=0.05)
    with pytest.raises(BadInput, match="--steps 0"):
        sample.generate(still, given, 1.0, 0, key=jr.key(0))


def test_expression_is_clipped_and_counted():
    """Negative log-expression becomes zero and its share is told; values of an SCM stay as they are."""
    cells = np.array([[[-1.0, 2.0], [0.0, -3.0]]], np.float32)
    clipped, share = sample.clip_expression(cells, True)
    assert clipped.tolist() == [[[0, 2], [0, 0]]] and share == 0.5
    kept, share = sample.clip_expression(cells, False)
    assert np.array_equal(kept, cells) and share == 0


@pytest.mark.parametrize("genes, size, subsets, treated", [
    (100, 50, 8, 9), (100, 50, 3, 1), (7, 5, 6, 2), (12, 4, 11, 3), (9, 9, 2, 4), (6, 4, 5, 0), (10, 9, 7, 1),
])
def test_gene_subsets_are_fair(genes, size, subsets, treated):
    """Treated genes are in every subset, the others in equally many give or take one; no gene twice, none left out; the
    same generator gives the same subsets."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        always = np.sort(rng.permutation(genes)[:treated])
        chosen = sample.gene_subsets(np.random.default_rng(seed), genes, size, subsets, always)
        assert np.array_equal(chosen, sample.gene_subsets(np.random.default_rng(seed), genes, size, subsets, always))
        assert chosen.shape == (subsets, size)
        assert all(len(set(subset)) == size for subset in chosen.tolist())
        count = np.bincount(chosen.ravel(), minlength=genes)
        assert (count[always] == subsets).all()
        others = np.delete(count, always)
        assert len(count) == genes and (not len(others) or (others.min() >= 1 and np.ptp(others) <= 1))


@pytest.mark.parametrize("genes, size, subsets, treated", [(100, 50, 1, 0), (20, 5, 3, 6), (20, 5, 9, 5), (4, 6, 3, 1)])
def test_impossible_subsets_are_refused(rng, genes, size, subsets, treated):
    """Too few subsets, too many treated genes, or fewer genes than the model has, end in a message, not in a loop."""
    with pytest.raises(BadInput, match=f"{genes} genes"):
        sample.gene_subsets(rng, genes, size, subsets, np.arange(treated))


def test_augmented_pools_each_gene_from_its_own_subsets(rng):
    """On 11 genes with a model of 5: each value in a gene's column was predicted for that gene; none is twice."""
    genes, size, subsets, n = 11, 5, 7, 4
    mark = Velocity(lambda y, tau, given, drop: 1000 * given.controls.mean(0) + 0 * y)  # ends at 1000 gene + noise
    population, one_hot = np.tile(np.arange(genes, dtype=np.float32), (n, 1)), np.eye(genes, dtype=np.float32)
    given = Given(population, population[None], one_hot[[2]], one_hot[7])
    pooled = sample.augmented(mark, given, size, subsets, rng, 2.0, 2, key=jr.key(0))
    rarest = subsets * (size - 2) // (genes - 2)  # subsets that hold the least frequent gene
    assert pooled.shape == (n * rarest, genes)
    assert (np.round(pooled / 1000) == np.arange(genes)).all()
    assert all(len(set(column)) == len(column) for column in pooled.T.tolist())


@pytest.fixture
def elsewhere(trained, tmp_path):
    """The trained model under another name, in a place of its own, beside no guidance.json; and its settings."""
    file = trained.settings.out / "smoke" / "train" / tmp_path.name / "split-0" / "model.eqx"
    file.parent.mkdir(parents=True)
    file.write_bytes((trained.folder / "model.eqx").read_bytes())
    return file


def test_guidance_is_chosen_on_validation_tasks(trained, settings, monkeypatch, elsewhere):
    """Of predictions that are wrong by |weight - 1.5|, 1.5 is chosen, on tasks of validation conditions, never of test
    ones; the choice is written down and not made twice; a damaged record is made again."""
    batch, asked = train.validation_tasks(trained.settings, trained.screen), []

    def generate(network, given, guidance, steps, *, key):
        asked.append(given.query)
        return batch.target + np.float32(guidance - 1.5)

    monkeypatch.setattr(sample, "generate", generate)
    assert sample.guidance_of(settings, elsewhere) == 1.5 and len(asked) == len(sample.GUIDANCE)
    record = json.loads(elsewhere.with_name("guidance.json").read_text())
    assert record["guidance"] == 1.5 and record["validation_rmse"]["2.5"] == pytest.approx(1, abs=1e-5)
    test = trained.screen.treatments[trained.screen.split == TEST]
    assert not set(asked[0].max(-1).tolist()) & set(test.max(-1).tolist())
    assert sample.guidance_of(settings, elsewhere) == 1.5 and len(asked) == len(sample.GUIDANCE)
    head, network = model.load_model(elsewhere)
    model.write_leaves(elsewhere, head | {"note": "trained anew"}, network)
    assert sample.guidance_of(settings, elsewhere) == 1.5 and len(asked) == 2 * len(sample.GUIDANCE)
    for damaged in ("{}", "{"):
        elsewhere.with_name("guidance.json").write_text(damaged)
        assert sample.guidance_of(settings, elsewhere) == 1.5
    assert len(asked) == 4 * len(sample.GUIDANCE)


@pytest.mark.parametrize("chosen, expected", [(3.0, 3.0), (None, 2.0)])
def test_without_validation_conditions_guidance_is_the_trained_one(trained, settings, monkeypatch, elsewhere, chosen,
                                                                   expected):
    """A model whose training was told a weight keeps it, and one that was not takes 2."""
    head, network = model.load_model(elsewhere)
    model.write_leaves(elsewhere, head | {"guidance": chosen}, network)
    monkeypatch.setattr(train, "validation_tasks", lambda *a: None)
    assert sample.guidance_of(settings, elsewhere) == expected


@pytest.fixture
def stage(monkeypatch, main):
    """main() with given settings."""
    def run(s):
        monkeypatch.setattr(scales, "parse", lambda *a: s)
        main(sample)
    return run


def test_stage_writes_what_it_says_and_is_skipped_next_time(stage, settings, trained, monkeypatch):
    """One file for each row, split and draw, with the tasks that were evaluated and all that tells where it comes from;
    other settings are refused. Of five treatments of each held-out graph two are for testing, so three are known."""
    assert sample.most_experiments(trained.screen) == 3 and sample.most_experiments(trained.screen, 2) == 2
    with pytest.raises(BadInput, match="--context 4: .*split-0 has only 3 experiments"):
        stage(dataclasses.replace(settings, context=4))
    stage(settings)
    evaluation = tasks.evaluation_tasks(trained.screen, CELLS, 2)
    file = settings.out / "smoke" / "samples" / "dags" / "mappfn-seed0-split0-draw0.npz"
    assert [f.name for f in file.parent.iterdir() if f.suffix != ".lock"] == [file.name]
    p = metrics.load_predictions(file)
    assert np.array_equal(p.target, evaluation.target) and np.array_equal(p.treatments, evaluation.given.query)
    assert np.array_equal(p.controls, evaluation.given.controls) and not p.log_expression
    assert (p.meta["screen"], p.meta["row"], p.meta["split"], p.meta["draw"]) == ("dags", "mappfn-seed0", 0, 0)
    assert p.meta["training"]["width"] == 16 and p.meta["guidance"] == 2.0 and len(p.meta["genes"]) == GENES
    assert p.meta["trained_seed"] == trained.settings.seed
    assert p.meta["fitted_to"] == (trained.screen.split[:, 1:] == tasks.TRAIN).sum() > 0
    assert {"scale", "seed", "revision", "seconds", "clipped_fraction", "model", "title"} <= p.meta.keys()
    monkeypatch.setattr(sample, "generate", lambda *a, **k: pytest.fail("predicted again"))
    stage(settings)
    with pytest.raises(BadInput, match="guidance"):
        stage(dataclasses.replace(settings, guidance=1.5))


@pytest.mark.parametrize("changed, named", [
    ({"model": ()}, "--model"), ({"model": ("a/b=dags",)}, "a/b"), ({"model": ("none",)}, "none/split-0"),
    ({"screen": "nothing"}, "nothing"), ({"context": 11}, "--context 11"),
    ({}, "a model of 5 genes, but the data have 7")])
def test_bad_settings_are_refused_before_work(stage, settings, trained, monkeypatch, changed, named):
    """Each ends in a message that names what cannot be used, a model of another size with both numbers of genes."""
    monkeypatch.setattr(sample, "generate", lambda *a, **k: pytest.fail("worked"))
    if not changed:
        seven = dataclasses.replace(trained.screen, genes=tuple("abcdefg"))
        monkeypatch.setattr(tasks, "load_screen", lambda folder: seven)
    with pytest.raises(BadInput, match=named):
        stage(dataclasses.replace(settings, **changed))


def test_counterfactual_cells_need_a_model_that_knows_no_knock_out(trained, main):
    """A model that was never asked for no knock-out is refused by name, before any work."""
    s = trained.settings
    with pytest.raises(BadInput, match="without --no-knock-out"):
        main(sample, "--screen", "dags", "--scale", "smoke", "--out", s.out, "--model", "dags", "--counterfactual")


def test_counterfactual_cells_are_of_the_cells_that_rules_move(stage, settings, trained, monkeypatch):
    """Not of those that differential expression is tested against, in which case it would be tested with less noise."""
    load = model.load_model

    def told_of_no_knock_out(file):
        head, network = load(file)
        return head | {"no_knock_out": 0.1}, network

    monkeypatch.setattr(model, "load_model", told_of_no_knock_out)
    stage(dataclasses.replace(settings, counterfactual=True, model=("moved=dags",)))
    p = metrics.load_predictions(settings.out / "smoke" / "samples" / "dags" / "moved-split0-draw0.npz")
    evaluation = tasks.evaluation_tasks(trained.screen, CELLS, 2)
    assert np.array_equal(p.source, evaluation.identity) and np.array_equal(p.controls, evaluation.given.controls)
    assert not np.array_equal(p.source, p.controls)
    np.testing.assert_array_equal(p.twins, prior.twins(trained.screen, evaluation, evaluation.identity))


@pytest.mark.parametrize("context, rows", [(1, ["", "~controls"]), (2, ["", "~controls", "~exchanged"])])
def test_one_experiment_has_none_to_exchange_with(stage, settings, context, rows):
    """So there is no such row of it."""
    stage(dataclasses.replace(settings, context=context, context_gain=True, model=(f"with{context}=dags",)))
    found = (settings.out / "smoke" / "samples" / "dags").glob(f"with{context}*.npz")
    assert sorted(file.name for file in found) == sorted(f"with{context}{row}-split0-draw0.npz" for row in rows)


def test_training_conditions_to_choose_by(trained, tmp_path, main):
    """A screen that the model has not met: each of its training conditions, from others that are known, in a folder of
    their own. Not the model's own screen."""
    place = "--scale", "smoke", "--eval-cells", "8", "--draws", "1", "--steps", "2", "--guidance", "1", "--model", "dags"
    (tmp_path / "smoke" / "screens").mkdir(parents=True)
    (tmp_path / "smoke" / "train").symlink_to(trained.settings.out / "smoke" / "train")
    write_linear(tmp_path / "smoke" / "screens" / "other", systems=3, seed=5)
    main(sample, "--screen", "other", "--out", tmp_path, "--training", *place)
    p = metrics.load_predictions(tmp_path / "smoke" / "samples" / "other-training" / "dags-split0-draw0.npz")
    screen = tasks.load_screen(tmp_path / "smoke" / "screens" / "other" / "split-0")
    assert len(p.target) == (screen.split[:, 1:] == tasks.TRAIN).sum() == 15
    assert p.meta["title"].endswith("training conditions")
    assert not (tmp_path / "smoke" / "samples" / "other").exists()
    assert sample.most_experiments(screen, split=tasks.TRAIN) == 4  # of five, since a query is no experiment of its own
    with pytest.raises(BadInput, match="was trained on these conditions"):
        main(sample, "--screen", "dags", "--out", trained.settings.out, "--training", *place)


def test_uninformed_contexts():
    """Control cells in the place of every experiment, or every experiment under the treatment of another: all else is
    as it was."""
    rng = np.random.default_rng(0)
    given = tasks.Given(rng.normal(size=(2, 5, 4)), rng.normal(size=(2, 3, 5, 4)),
                        np.stack([np.eye(4)[:3], np.eye(4)[1:]]), np.eye(4)[[3, 0]])
    controls, exchanged = (sample.uninformed(given, how) for how in sample.UNINFORMED)
    assert (controls.context == given.controls[:, None]).all() and controls.context.shape == given.context.shape
    assert (exchanged.context_treatments != given.context_treatments).any(axis=-1).all()
    np.testing.assert_array_equal(exchanged.context_treatments.sum(axis=1), given.context_treatments.sum(axis=1))
    for changed, name in ((controls, "context"), (exchanged, "context_treatments")):
        for field in tasks.Given._fields:
            assert (getattr(changed, field) is getattr(given, field)) == (field != name)
