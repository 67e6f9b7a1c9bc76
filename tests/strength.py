"""Knock-outs are strong in one screen and weak in another: what screens hold, and how well each row reads it. Printed.

    python tests/strength.py screen out/laptop/screens/panel           zeros, brightness, strength, effects of a screen
    python tests/strength.py rows out/laptop/samples/panel-held-out    rows, where knock-outs are strong and where weak

The first: 5th and 95th percentile over systems and splits. The second wants `metrics.py` to have been there; the error
of the treated gene is that of the change of its mean from control: root mean square over the conditions of a system,
mean over systems, ± standard error.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from jaxtyping import Float

import metrics
import tasks


def screen(folder: Path) -> None:
    """Log-expression: of control cells; what a knock-out leaves of its target, where that had 0.2 or more; effects on
    the other genes, and how many of them are above 0.2."""
    zeros, brightness, left, off = [], [], [], []
    for split in sorted(folder.glob("split-*")):
        data = tasks.load_screen(split)
        for system in range(len(data.systems)):
            control = data.pool(system, 0)
            zeros.append((control == 0).mean())
            brightness.append(control[control > 0].mean())
            before = control.mean(axis=0)
            for treatment in np.flatnonzero(data.count[system, 1:]) + 1:
                own = data.treatments[system, treatment] != 0
                mean = data.pool(system, treatment).mean(axis=0)
                left += list(mean[own & (before > 0.2)] / before[own & (before > 0.2)])
                off.append((np.abs(mean - before)[~own] > 0.2).mean())
    for name, values in {"share of zeros in control cells": zeros, "mean of the rest": brightness,
                         "left of a target's mean": left}.items():
        print(f"{name}: {np.percentile(values, 5):.2f} to {np.percentile(values, 95):.2f}")
    print(f"effects above 0.2 on other genes: {np.mean(off):.0%}")


def own_change(p: metrics.Predictions) -> tuple[Float[np.ndarray, "P"], Float[np.ndarray, "P"], Float[np.ndarray, "P"]]:
    """Of the treated gene of each condition: its mean in control cells, and its change, true and predicted."""
    own = p.treatments != 0

    def mean(cells):
        return (cells.mean(axis=1) * own).sum(axis=1)

    return mean(p.controls), mean(p.target) - mean(p.controls), mean(p.prediction) - mean(p.source)


def by_system(systems: np.ndarray, values: np.ndarray) -> Float[np.ndarray, "S"]:
    return np.array([np.mean(values[systems == system]) for system in np.unique(systems)])


def rows(folder: Path) -> None:
    """Systems in two halves: where less than half of the targets' expression is left, and where more is."""
    files = metrics.prediction_files((folder,))
    for path in files:
        p = metrics.load_predictions(path)
        numbers = json.loads(path.with_suffix(".json").read_text())["metrics"]["conditions"]
        before, true, predicted = own_change(p)
        left = 1 + by_system(p.systems, true) / by_system(p.systems, before)
        found = {"treated gene": np.sqrt(by_system(p.systems, (predicted - true) ** 2)),
                 "RMSE": by_system(p.systems, np.array(numbers["rmse"])),
                 "PDS": by_system(p.systems, np.array(numbers["pds"]))}
        for name, chosen in {"strong": left < 0.5, "weak": left >= 0.5, "all": left < np.inf}.items():
            said = [f"{what} {values[chosen].mean():.3f} ± {values[chosen].std(ddof=1) / np.sqrt(chosen.sum()):.3f}"
                    for what, values in found.items() if chosen.sum() > 1]
            print(f"{path.stem}, {name} ({chosen.sum()} systems): {', '.join(said)}")


if __name__ == "__main__":
    {"screen": screen, "rows": rows}[sys.argv[1]](Path(sys.argv[2]))
