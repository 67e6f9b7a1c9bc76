"""Claims about baselines/cpa.py: each loss trains its own side, labels enter additively."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import scipy.stats
from test_baselines import EFFECTS, GENES, LEVELS, OPTIONS, SYSTEMS, fitted, make_screen, moved_by, one_hot

from baselines import cpa, fitting

SMALL = OPTIONS["cpa"]


@pytest.fixture(scope="module")
def batch():
    data = fitting.training_cells(make_screen(), controls_too=True)
    return jax.jit(lambda key: cpa.draw(data, 32, SYSTEMS, key=key))(jr.key(3))


@pytest.fixture(scope="module")
def networks():
    return cpa.CPA.build(SMALL, jnp.zeros(GENES), SYSTEMS, False, key=jr.key(0))


@pytest.mark.parametrize("treatment", [0, 3])
def test_a_sample_has_the_spread_of_cells_and_the_mean_has_not(treatment):
    """In known conditions decode = "sample" has the true variance within a half, "mean" clearly less, and both nearly
    the same mean; "mean" is deterministic, "sample" depends on the seed and only on it."""
    def predicted(decode, seed=0):
        other = object.__new__(cpa.CPA)  # the fitted method with another way to decode
        vars(other).update(vars(fitted("cpa")), options=dataclasses.replace(SMALL, decode=decode))
        return moved_by(other, treatment, seed=seed)

    mean, sample, truth = predicted("mean"), predicted("sample"), make_screen().pool(2, treatment).var(0).mean()
    assert sample.var(0).mean() == pytest.approx(truth, rel=0.5) and mean.var(0).mean() < 0.8 * truth
    np.testing.assert_allclose(mean.mean(0), sample.mean(0), atol=0.3)
    assert np.array_equal(predicted("mean", seed=1), mean) and np.array_equal(predicted("sample"), sample)
    assert not np.allclose(predicted("sample", seed=1), sample)


def test_known_conditions_are_right():
    """Controls are moved by the treatment's shift in conditions that were trained on, though nothing pairs cells."""
    conditions = [(0, 1), (0, 2), (1, 1), (1, 4), (2, 3)]
    found = [(moved_by(fitted("cpa"), t, s) - make_screen().pool(s, 0)).mean(0) for s, t in conditions]
    truth = EFFECTS[[t for _, t in conditions]]
    np.testing.assert_allclose(found, truth, atol=0.6)
    assert np.linalg.norm(found) / np.linalg.norm(truth) == pytest.approx(1, abs=0.1)


def test_labels_enter_additively():
    """Decoding under (t, c) equals decoding the basal latent plus P(t) plus C(c); an unknown system adds nothing."""
    network, _ = fitted("cpa").networks
    controls = make_screen().pool(2, 0)
    latent = jax.vmap(network.encode)(jnp.asarray(controls))[0] + network.treatment(jnp.asarray(one_hot(2)))
    for system, added in ((2, network.system(jnp.eye(SYSTEMS)[2])), (SYSTEMS, 0)):
        mean, _ = jnp.split(jax.vmap(network.decoder)(latent + added), 2, axis=-1)
        np.testing.assert_allclose(moved_by(fitted("cpa"), 2, system, controls), mean, rtol=1e-4, atol=1e-4)


def test_a_batch_is_half_controls_with_labels(batch):
    """Half of a batch are controls, and labels are the cells' own: less its shift, a cell is around its system."""
    assert np.any(batch.treatments[:16]) and not np.any(batch.treatments[16:])
    t = np.where(np.any(batch.treatments, axis=1), 1 + np.argmax(batch.treatments, axis=1), 0)
    found = (np.asarray(batch.cells) - EFFECTS[t]).mean(1)
    np.testing.assert_allclose(found, LEVELS[np.argmax(batch.systems, axis=1)], atol=1)


def test_the_two_sides_pull_in_opposite_directions(networks, batch):
    """Steps of the adversaries lower the cross-entropy of the labels, steps of the autoencoder raise it; no gradient of
    one side reaches the other."""
    options = dataclasses.replace(SMALL, w_penalty=0.0, w_kl=0.0)
    network, adversaries = networks

    def entropy(network, adversaries):
        mean, log_variance = jax.vmap(network.encode)(batch.cells)
        return float(cpa.cross_entropies(adversaries, cpa.sample_latent(mean, log_variance, key=jr.key(0)), batch))

    @eqx.filter_jit
    def descend(model, loss, rate):
        adam = optax.adam(rate)

        def step(carry, key):
            return fitting.update(adam, eqx.filter_grad(loss)(carry[0], key), *carry), None

        return fitting.scan(step, (model, adam.init(eqx.filter(model, eqx.is_array))), jr.split(jr.key(1), 40))[0][0]

    before = entropy(network, adversaries)
    adversaries = descend(adversaries, lambda a, key: cpa.adversaries_loss(a, network, batch, options, key=key), 1e-2)
    between = entropy(network, adversaries)
    network = descend(network, lambda n, key: cpa.network_loss(n, adversaries, batch, 100.0, options, key=key), 5e-3)
    assert between < before - 0.3 and entropy(network, adversaries) > between + 0.3


def test_warm_up_is_without_adversaries(networks):
    """The weight of the adversaries is 0 in the first tenth of the updates, then at once what the options say; every
    step trains both sides."""
    data = fitting.training_cells(make_screen(), controls_too=True)
    adams, step = cpa.CPA.make_step(dataclasses.replace(SMALL, w_adv=3.0, adv_steps=2, updates=800))
    state = networks, tuple(adam.init(eqx.filter(n, eqx.is_array)) for adam, n in zip(adams, networks))
    step = eqx.filter_jit(step)
    results = [step(state, data, jnp.asarray(i), jr.key(2)) for i in (0, 79, 80)]
    first, last, after = (float(loss) for _, loss in results)
    chance = np.log(GENES + 1) + np.log(SYSTEMS)  # about the entropies of adversaries that have learnt nothing
    assert first == last and first - after == pytest.approx(3 * chance, rel=0.2)
    assert not any(eqx.tree_equal(old, new) for old, new in zip(networks, results[0][0][0]))


def test_the_losses_by_other_routes(networks, batch):
    """The likelihood equals SciPy's normal density, the KL term an average of log q - log p over samples, the gradient
    penalty the one from whole Jacobians, summed over the logits."""
    network, adversaries = networks
    mean, log_variance = (np.asarray(x, float) for x in jax.vmap(network.encode)(batch.cells))
    (without, basal), (with_kl, _) = (cpa.negative_elbo(network, batch, w_kl, key=jr.key(4)) for w_kl in (0.0, 1.0))
    x, variance = (np.asarray(a, float) for a in jax.vmap(network.decode)(basal, batch.treatments, batch.systems))
    nll = -scipy.stats.norm.logpdf(batch.cells, x, np.sqrt(variance)).sum(1).mean()
    assert float(without) == pytest.approx(nll, rel=1e-4)
    q = scipy.stats.norm(mean, np.exp(log_variance / 2))
    z = q.rvs((20_000, *mean.shape), random_state=0)
    kl = (q.logpdf(z) - scipy.stats.norm.logpdf(z)).sum(-1).mean()
    assert float(with_kl - without) == pytest.approx(kl, rel=0.05)
    jacobians = jax.vmap(jax.jacfwd(adversaries))(basal)
    expected = sum(float((jacobian.sum(1) ** 2).mean()) for jacobian in jacobians)
    assert float(cpa.gradient_penalty(adversaries, basal)) == pytest.approx(expected, rel=1e-4)
