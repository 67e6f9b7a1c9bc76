"""The rows that need no training: what a mean effect, or a single gene, already explains.

Paper: 5.2 (identity); the others are departures, D32. Reads and writes nothing; `python -m baselines` runs them.

    symbol       name here              shape     meaning
    mu_s         control_means[s]       D         mean control cell of system s
    delta_st     effects[r]             D         mean cell of the known condition r = (s, t), minus mu_s
    X_s          controls               N D       control cells to move, others than the metrics compare with
    t            treatment              D         one-hot times the do-value, as the model gets it

    S systems   T treatments   D genes   N cells   R known conditions   Q their genes, each once
    d principal components

Most rows are X_s plus a shift, so the spread between cells is that of the control cells. In linear SCMs each condition
was divided by its own standard deviations and each system is another graph, so that effects hardly carry over, but for
one: the treated gene's own. The rows are computed all the same, and additive comes close to target only.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from scales import BadInput
from tasks import CONTROL, KNOWN, Screen

# ------------------------------------------------------------------------------------------ what is known of a screen


def known_conditions(screen: Screen) -> Bool[np.ndarray, "S T"]:
    """Conditions that a baseline is fitted to: TRAIN and KNOWN_ONLY (B.4), and controls. Raises BadInput if none is."""
    known = np.isin(screen.split, KNOWN) & (screen.count > 0)
    known[:, CONTROL] = screen.count[:, CONTROL] > 0
    known &= known[:, [CONTROL]]
    if not known[:, 1:].any():
        raise BadInput("no training condition, of a system that has control cells: nothing to fit a baseline to; "
                       "lower --min-cells, or use another split")
    return known


def treated_gene(treatments: Float[np.ndarray, "*batch D"]) -> Int[np.ndarray, "*batch"]:
    """Index of the treated gene; -1 if it is not among the genes."""
    return np.where(treatments.any(-1), np.abs(treatments).argmax(-1), -1)


def lowest_value(screen: Screen) -> float:
    """What predictions are clipped at: expression is never negative, values of an SCM may be."""
    return 0.0 if screen.log_expression else -np.inf


def means_by(index: Int[np.ndarray, "R"], effects: Float[np.ndarray, "R D"],
             size: int) -> Float[np.ndarray, "size D"]:
    """Mean effect of each index below `size`; NaN where it has none."""
    total = np.zeros((size, effects.shape[1]))
    np.add.at(total, index, effects)
    count = np.bincount(index, minlength=size)
    return np.where(count, total.T, np.nan).T / np.maximum(count, 1)[:, None]


class Effects:
    """Mean control cell of each system, the effect delta_st of each known condition, and their means, in float64."""

    def __init__(self, screen: Screen):
        known = known_conditions(screen)
        genes = len(screen.genes)
        self.control_means = np.full((len(known), genes), np.nan)  # S D
        for s in np.flatnonzero(known[:, CONTROL]).tolist():
            self.control_means[s] = screen.pool(s, CONTROL).mean(axis=0, dtype=float)
        self.systems, treatments = np.nonzero(known[:, 1:])  # R, R
        treatments += 1
        self.effects = np.empty((len(treatments), genes))  # R D
        for r, (s, t) in enumerate(zip(self.systems.tolist(), treatments.tolist())):
            self.effects[r] = screen.pool(s, t).mean(axis=0, dtype=float) - self.control_means[s]
        self.genes = treated_gene(screen.treatments[self.systems, treatments])  # R
        inside = self.genes >= 0
        self.of_gene = means_by(self.genes[inside], self.effects[inside], genes)  # D D, a row per treated gene
        self.of_system = means_by(self.systems, self.effects, len(known))  # S D
        nothing = np.isnan(self.of_system[:, 0])
        self.of_system[nothing] = self.effects.mean(axis=0)  # of a system without effects: that of all systems


# ------------------------------------------------------------------------------------------------ the simple rows (5.2)

# [D32] paper: identity and "observed" are the only rows besides trained methods; here: six more, because a
# trained method that does not beat a mean effect has learnt nothing about treatments.


class Identity:
    """Control cells as they are (5.2): no treatment does anything."""

    def __init__(self, screen: Screen, rng: np.random.Generator):
        self.log_expression = screen.log_expression

    def predict(self, controls: Float[np.ndarray, "N D"], system: int, treatment: Float[np.ndarray, "D"],
                rng: np.random.Generator) -> Float[np.ndarray, "N D"]:
        return controls


class TargetOnly(Identity):
    """Control cells with the treated gene at its do-value, or silent if it was knocked out: nothing lies downstream."""

    def predict(self, controls, system, treatment, rng):
        cells, gene = controls.copy(), treated_gene(treatment)
        if gene >= 0:
            cells[:, gene] = 0 if self.log_expression else treatment[gene]
        return cells


class SystemMean:
    """X_s plus the mean effect of the system's known treatments: the row to beat for unseen treatments."""

    def __init__(self, screen: Screen, rng: np.random.Generator):
        self.effects = Effects(screen)
        self.lowest = lowest_value(screen)

    def delta(self, system: int, treatment: Float[np.ndarray, "D"]) -> Float[np.ndarray, "D"]:
        """The shift that is predicted for all cells."""
        return self.effects.of_system[system]

    def predict(self, controls: Float[np.ndarray, "N D"], system: int, treatment: Float[np.ndarray, "D"],
                rng: np.random.Generator) -> Float[np.ndarray, "N D"]:
        moved = controls + self.delta(system, treatment)
        return np.maximum(moved, self.lowest).astype(np.float32)


class Additive(SystemMean):
    """X_s plus the treatment's mean effect in the systems where it is known, or else the system's mean effect: the row
    to beat across systems."""

    def delta(self, system, treatment):
        gene = treated_gene(treatment)
        if gene < 0 or np.isnan(self.effects.of_gene[gene, 0]):
            return super().delta(system, treatment)
        return self.effects.of_gene[gene]


class ConstantMean(SystemMean):
    """Every cell at mu_s plus the system's mean effect: a check on the metrics (see W2), never a competitor."""

    def predict(self, controls, system, treatment, rng):
        mean = np.tile(self.effects.control_means[system], (len(controls), 1))
        return super().predict(mean, system, treatment, rng)


class TargetGene(SystemMean):
    """The system's mean effect, with the treated gene moved by the mean relative self-effect of known treatments.

    If known knock-outs left 0.2 of their own gene's mean on average, so will this one. Linear SCMs: do(t) tells.
    """

    def __init__(self, screen: Screen, rng: np.random.Generator):
        super().__init__(screen, rng)
        e = self.effects
        own = np.flatnonzero(e.genes >= 0)
        before = e.control_means[e.systems[own], e.genes[own]]
        after = before + e.effects[own, e.genes[own]]
        usable = before > 0  # of a silent gene there is no relative effect
        self.left = 1.0
        if usable.any():
            self.left = float(np.clip(after[usable] / before[usable], 0, None).mean())

    def predict(self, controls, system, treatment, rng):
        cells, gene = super().predict(controls, system, treatment, rng), treated_gene(treatment)
        if gene >= 0 and self.lowest == 0:
            cells[:, gene] = controls[:, gene] * self.left  # not shifted: none is below zero, silent cells stay so
        elif gene >= 0:
            cells[:, gene] = treatment[gene]
        return cells


def ridge(p: Float[np.ndarray, "Q d"], y: Float[np.ndarray, "Q k"], penalty: float) -> Float[np.ndarray, "d k"]:
    """The weights W that minimise |p W - y|^2 + penalty |W|^2."""
    return np.linalg.solve(p.T @ p + penalty * np.eye(p.shape[1]), p.T @ y)


def left_out_error(p: Float[np.ndarray, "Q d"], y: Float[np.ndarray, "Q k"], penalty: float) -> float:
    """Mean squared error of each row of y when ridge regression has not seen it, in closed form."""
    hat = p @ ridge(p, np.eye(len(p)), penalty)  # Q Q
    error = (y - hat @ y) / (1 - np.diag(hat))[:, None]
    return float((error**2).mean())


class BilinearRidge(SystemMean):
    """effects = G W P' + b (Ahlmann-Eltze et al., 2025): G the principal components of known effects (D x d), P an
    embedding of the treated gene from its correlation with all genes over control cells (Q x d), W by ridge regression.

    The ridge penalty is chosen by leaving out one known gene at a time, so test conditions have no say. What is
    fitted is what the system's mean effect leaves, so that an infinite penalty is the row "system-mean".
    """

    RANK = 10
    PENALTIES = 10.0 ** np.arange(-2, 5)

    def __init__(self, screen: Screen, rng: np.random.Generator):
        super().__init__(screen, rng)
        e = self.effects
        controls = np.concatenate([screen.pool(s, CONTROL) for s in range(len(screen.systems))])
        centred = controls - controls.mean(axis=0)
        _, _, axes = np.linalg.svd(centred / np.maximum(centred.std(axis=0), 1e-6), full_matrices=False)
        self.embedding = axes[: self.RANK].T * np.sqrt(axes.shape[1])  # D d, a row per gene
        inside = e.genes >= 0
        beyond = e.effects - e.of_system[e.systems]  # R D
        of_gene = means_by(e.genes[inside], beyond[inside], len(screen.genes))  # D D
        genes = np.unique(e.genes[inside])  # Q
        _, _, components = np.linalg.svd(of_gene[genes], full_matrices=False)
        self.components = components[: self.RANK]  # d D, G transposed
        scores, p = of_gene[genes] @ self.components.T, self.embedding[genes]  # Q d, both
        self.weights = np.zeros((p.shape[1], scores.shape[1]))
        if len(genes) > 2:
            errors = [left_out_error(p, scores, penalty) for penalty in self.PENALTIES]
            self.weights = ridge(p, scores, self.PENALTIES[np.argmin(errors)])

    def delta(self, system, treatment):
        mean, gene = super().delta(system, treatment), treated_gene(treatment)
        if gene < 0:
            return mean
        return mean + self.embedding[gene] @ self.weights @ self.components
