"""The rows that need no training: what a mean effect, or a single gene, already explains.

Paper: 5.2 (identity); the others are departures D32. Reads and writes nothing; `python -m baselines` runs them.

    symbol       name here           shape     meaning
    mu_c         control_means[c]    D         mean control cell of biological context c
    delta_ct     effects[r]          D         mean cell of the training condition r = (c, t), minus mu_c
    X_c          controls            N D       control cells to transform, others than the metrics compare with
    t            treatment           D         one-hot times the do-value, as the model gets it

    C contexts   D genes   N cells   R training conditions   Q their genes, each once

Most rows are X_c plus a shift, so the spread between cells is that of the control cells. In linear SCMs each condition
was divided by its own standard deviations and each context is another graph, so that effects hardly carry over, but for
one: the treated gene's own. The rows are computed all the same, and additive comes close to target only.
"""

import numpy as np
from jaxtyping import Float, Int

from data import CONTROL, TRAIN, Screen
from scales import BadInput


# ----------------------------------------------------------------------------------- what the training conditions tell


def treated_gene(treatments: Float[np.ndarray, "*batch D"]) -> Int[np.ndarray, "*batch"]:
    """Index of the treated gene; -1 if it is not among the genes."""
    return np.where(treatments.any(-1), np.abs(treatments).argmax(-1), -1)


class Effects:
    """Mean control cell of each context, and the effect delta_ct of each training condition, in float64."""

    def __init__(self, screen: Screen):
        mean = lambda c, t: screen.cells[screen.start[c, t] :][: screen.count[c, t]].mean(0, dtype=float)
        conditions = np.argwhere((screen.split == TRAIN) & (screen.count > 0))
        self.control_means = {c: mean(c, t) for c, t in conditions.tolist() if t == CONTROL}
        conditions = [(c, t) for c, t in conditions.tolist() if t != CONTROL and c in self.control_means]
        if not conditions:
            raise BadInput("no training condition, of a context that has control cells: nothing to fit a baseline to; "
                           "lower --min-cells, or use another split")
        self.contexts, treatments = np.array(conditions).T                                   # R, R
        self.genes = treated_gene(screen.treatments[self.contexts, treatments])              # R
        self.effects = np.array([mean(c, t) - self.control_means[c] for c, t in conditions])  # R D

    def of_context(self, context: int) -> Float[np.ndarray, "D"]:
        """Mean over the training treatments of the context; over all contexts if it has none."""
        same = self.contexts == context
        return self.effects[same if same.any() else slice(None)].mean(0)

    def of_gene(self, gene: int) -> Float[np.ndarray, "D"] | None:
        """Mean over the contexts in which the treatment of this gene is a training condition; None if in none."""
        same = self.genes == gene
        return self.effects[same].mean(0) if gene >= 0 and same.any() else None


# ------------------------------------------------------------------------------------------------ the simple rows (5.2)

# [D32] paper: identity and "observed" are the only rows besides trained methods; here: four more, because a
# trained method that does not beat a mean effect has learnt nothing about treatments.


class Identity:
    """Control cells as they are (5.2): no treatment does anything."""

    def __init__(self, screen: Screen, rng: np.random.Generator):
        self.log_expression = screen.log_expression

    def predict(self, controls: Float[np.ndarray, "N D"], context: int, treatment: Float[np.ndarray, "D"],
                rng: np.random.Generator) -> Float[np.ndarray, "N D"]:
        return controls


class TargetOnly(Identity):
    """Control cells with the treated gene at its do-value, or silent if it was knocked out: nothing lies downstream."""

    def predict(self, controls, context, treatment, rng):
        cells, gene = controls.copy(), treated_gene(treatment)
        if gene >= 0:
            cells[:, gene] = 0 if self.log_expression else treatment[gene]
        return cells


class ContextMean:
    """X_c plus the mean effect of the context's training treatments: the row to beat for unseen treatments."""

    def __init__(self, screen: Screen, rng: np.random.Generator):
        self.effects = Effects(screen)
        self.lowest = 0 if screen.log_expression else -np.inf  # expression is never negative

    def delta(self, context: int, treatment: Float[np.ndarray, "D"]) -> Float[np.ndarray, "D"]:
        return self.effects.of_context(context)

    def predict(self, controls: Float[np.ndarray, "N D"], context: int, treatment: Float[np.ndarray, "D"],
                rng: np.random.Generator) -> Float[np.ndarray, "N D"]:
        return np.maximum(controls + self.delta(context, treatment), self.lowest).astype(np.float32)


class Additive(ContextMean):
    """X_c plus the treatment's mean effect in the contexts where it was trained on, or else the context's mean effect:
    the row to beat across contexts."""

    def delta(self, context, treatment):
        effect = self.effects.of_gene(int(treated_gene(treatment)))
        return self.effects.of_context(context) if effect is None else effect


class ConstantMean(ContextMean):
    """Every cell at mu_c plus the context's mean effect: a check on the metrics (see W2), never a competitor."""

    def predict(self, controls, context, treatment, rng):
        mean = self.effects.control_means[context] + self.delta(context, treatment)
        return np.maximum(np.broadcast_to(mean, controls.shape), self.lowest).astype(np.float32)


class TargetGene(ContextMean):
    """The context's mean effect, with the treated gene moved by the mean relative self-effect of training treatments.

    If training knock-outs left 0.2 of their own gene's mean on average, so will this one. Linear SCMs: do(t) tells.
    """

    def __init__(self, screen: Screen, rng: np.random.Generator):
        super().__init__(screen, rng)
        e = self.effects
        own = np.flatnonzero(e.genes >= 0)
        before = np.array([e.control_means[c][g] for c, g in zip(e.contexts[own], e.genes[own])])
        left = before + e.effects[own, e.genes[own]]
        usable = before > 0  # of a silent gene there is no relative effect
        self.left = float(np.clip(left[usable] / before[usable], 0, None).mean()) if usable.any() else 1.0

    def predict(self, controls, context, treatment, rng):
        cells, gene = super().predict(controls, context, treatment, rng), int(treated_gene(treatment))
        if gene >= 0:  # scaled, not shifted: it has no cell below zero and keeps its silent cells
            cells[:, gene] = controls[:, gene] * self.left if self.lowest == 0 else treatment[gene]
        return cells


class BilinearRidge(ContextMean):
    """effects = G W P' + b (Ahlmann-Eltze et al., 2025): G the principal components of training effects (D x d), P an
    embedding of the treated gene from its correlation with all genes over control cells (Q x d), W by ridge regression.

    The ridge penalty is chosen by leaving out one training gene at a time, so test conditions have no say. What is
    fitted is what the context's mean effect leaves, so that an infinite penalty is the row "context mean effect".
    """

    RANK = 10
    PENALTIES = 10.0 ** np.arange(-2, 5)

    def __init__(self, screen: Screen, rng: np.random.Generator):
        super().__init__(screen, rng)
        e = self.effects
        controls = np.concatenate([screen.cells[screen.start[c, CONTROL] :][: screen.count[c, CONTROL]]
                                   for c in e.control_means])
        centred = controls - controls.mean(0)
        _, _, axes = np.linalg.svd(centred / np.maximum(centred.std(0), 1e-6), full_matrices=False)
        self.embedding = axes[: self.RANK].T * np.sqrt(axes.shape[1])                              # D d, a row per gene
        genes = np.unique(e.genes[e.genes >= 0])                                                   # Q
        beyond = e.effects - [e.of_context(int(c)) for c in e.contexts]                            # R D
        rest = np.array([beyond[e.genes == g].mean(0) for g in genes]).reshape(len(genes), len(self.embedding))  # Q D
        _, _, components = np.linalg.svd(rest, full_matrices=False)
        self.components = components[: self.RANK]                                                  # d D, G transposed
        scores, p = rest @ self.components.T, self.embedding[genes]                                # Q d, both
        solve = lambda p, y, penalty: np.linalg.solve(p.T @ p + penalty * np.eye(p.shape[1]), p.T @ y)
        self.penalty = np.inf
        if len(genes) > 2:
            error = {
                penalty: np.mean([(scores[q] - p[q] @ solve(np.delete(p, q, 0), np.delete(scores, q, 0), penalty)) ** 2
                                  for q in range(len(genes))]) for penalty in self.PENALTIES}
            self.penalty = min(error, key=error.get)
        self.weights = (solve(p, scores, self.penalty) if np.isfinite(self.penalty)
                        else np.zeros((p.shape[1], scores.shape[1])))

    def delta(self, context, treatment):
        gene = int(treated_gene(treatment))
        own = self.embedding[gene] @ self.weights @ self.components if gene >= 0 else 0.0
        return self.effects.of_context(context) + own


METHODS = {"identity": Identity, "target-only": TargetOnly, "context-mean": ContextMean, "additive": Additive,
           "target-gene": TargetGene, "bilinear-ridge": BilinearRidge, "constant-mean": ConstantMean}
