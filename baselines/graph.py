"""Reference rows of linear SCMs that are told what nobody knows of real cells: the causal graph, or its order.

Paper: B.1 (the model). Reads and writes nothing; departure: D32. They say how much of a network's error is from not
knowing the graph, and how much from having so few control cells.

    paper      name here    shape    meaning
    B          weights      D D      effect of a parent j on k, in units of standard deviations of control cells
               left         D        variance of k that its parents do not explain, in the same units

    N cells   D variables
"""

import numpy as np
from jaxtyping import Bool, Float

from baselines.simple import BilinearRidge, left_out_error, ridge, treated_gene
from tasks import Screen


class KnownGraph:
    """Least squares of each variable on its parents, in the control cells, and from there what do(t) does."""

    def __init__(self, screen: Screen, rng: np.random.Generator):
        self.parents = screen.weights != 0

    def allowed(self, system: int) -> Bool[np.ndarray, "D D"]:
        """[k, j]: j may be a cause of k."""
        return self.parents[system]

    def regress(self, x: Float[np.ndarray, "N a"], y: Float[np.ndarray, "N"]) -> Float[np.ndarray, "a"]:
        """Weights of a variable's causes."""
        return np.linalg.lstsq(x, y, rcond=None)[0]

    def predict(self, controls: Float[np.ndarray, "N D"], system: int, treatment: Float[np.ndarray, "D"],
                rng: np.random.Generator) -> Float[np.ndarray, "N D"]:
        """New cells of the fitted model under do(t)."""
        node, allowed = treated_gene(treatment), self.allowed(system)
        x = (controls - controls.mean(axis=0)) / controls.std(axis=0)
        weights, left = np.zeros(allowed.shape), np.ones(len(allowed))
        for k in range(len(allowed)):
            causes = np.flatnonzero(allowed[k])
            if len(causes):
                weights[k, causes] = self.regress(x[:, causes], x[:, k])
                left[k] = np.var(x[:, k] - x[:, causes] @ weights[k, causes])
        noise = rng.standard_normal((len(controls), len(left))) * np.sqrt(left)
        # Noise has variance 1 in every variable before they are scaled (B.1), so that a control cell's is 1 / left.
        value = treatment[node] * np.sqrt(left[node])
        weights[node], noise[:, node] = 0, value
        transfer = np.linalg.inv(np.eye(len(left)) - weights)
        left[node] = 0
        spread = np.sqrt(transfer**2 @ left)  # by which each variable is divided, as the screen's are
        cells = noise @ transfer.T / np.where(spread > 0, spread, 1)
        cells[:, node] = treatment[node]
        return cells.astype(np.float32)


class KnownOrder(KnownGraph):
    """Ridge regression of each variable on all that come before it in the causal order."""

    def allowed(self, system):
        earlier = self.parents[system].copy()
        for _ in range(len(earlier)):  # ancestors: parents, their parents, ...
            earlier |= earlier @ earlier
        place = earlier.sum(axis=1)  # who has fewer ancestors comes earlier; an order that fits the graph
        order = np.argsort(place, kind="stable")
        rank = np.argsort(order)
        return rank[None, :] < rank[:, None]

    def regress(self, x, y):
        errors = [left_out_error(x, y[:, None], penalty) for penalty in BilinearRidge.PENALTIES]
        return ridge(x, y[:, None], BilinearRidge.PENALTIES[np.argmin(errors)])[:, 0]
