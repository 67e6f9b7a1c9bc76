"""The statistics of a comparison: is one row of the tables better than another, or may it be chance?

Paper: silent (section 6 compares means). Used by tables.py and figures.py; no stage of its own. What may differ from
one repetition to the next, and so makes an error, is

    conditions   the systems and treatments that happen to be tested
    splits       which treatments are held out: splits of one screen share most of their conditions, and so do the sets
                 that a method is trained on, so that differences of splits are not independent
    trainings    the seed of a training: one network is one draw
Draws of cells are averaged: they repeat the same conditions.

    unit      what is taken as independent, and counted as n: a condition, a held-out system, a split, or a training
    penalty   a number that is smaller the better; a difference is the rival's minus the row's: positive is better
    item      one comparison as JSON has it: difference, error, df, n, 95% interval, p, corrected p, outcome
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float

LEVEL = 0.05   # of significance, after correction
TRAININGS = 3  # of each trained row, or its comparisons are undecided
GOOD = ("better", "on par", "holds")  # outcomes that speak for a claim


class Row(NamedTuple):
    """The penalties of one row of a table in one metric."""
    by_seed: dict          # seed -> {(split, system, treatment): penalty, mean over draws of cells}
    trained: bool = False  # its seeds are those of a training
    fitted_to: float = 0   # conditions of a split that it was trained on, if anew for every split; else 0

    def mean(self) -> dict:
        """(split, system, treatment) -> mean over seeds."""
        pairs = []
        for penalties in self.by_seed.values():
            pairs += penalties.items()
        return averages(pairs)


def averages(pairs: Iterable[tuple]) -> dict:
    """key -> mean of the values that are paired with it."""
    found: dict = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return {key: float(np.mean(values)) for key, values in found.items()}


def centred(pseudo_values, number) -> Float[np.ndarray, "P"]:
    """Jackknife pseudo-values, moved so that their mean is the number that they were made from; undefined ones are NaN,
    and a single condition has the number itself."""
    values = np.array(pseudo_values, float)
    if np.isnan(values).all():
        return np.full(len(values), number, float)
    return values + (number - np.nanmean(values))


def gather(files: list[dict], metric: str, penalty) -> Row:
    """The `Row` of some files of metrics (metrics.py), all of one row. `penalty` takes a value of the metric."""
    pairs: dict = {}
    for file in files:
        meta, numbers = file["meta"], file["metrics"]
        keys = zip(numbers["systems"], numbers["treatments"])
        values = np.array(numbers["conditions"].get(metric, []), float)  # None is NaN
        if np.isnan(values).all():  # a metric of all conditions together, which are not told apart
            keys, values = [("all", "all")], np.array([numbers[metric]], float)
        elif metric == "auprc":
            values = centred(values, numbers[metric])
        of_seed = pairs.setdefault(meta.get("trained_seed", 0), [])
        for key, value in zip(keys, values.tolist()):
            if np.isfinite(value):
                of_seed.append(((meta["split"], *key), penalty(value)))
    by_seed = {seed: averages(found) for seed, found in pairs.items() if found}
    fitted = [file["meta"].get("fitted_to", 0) for file in files]
    return Row(by_seed, "trained_seed" in files[0]["meta"], float(np.mean(fitted)))


# ------------------------------------------------------------------------------------------------------- one comparison


def t_test(difference: float, parts: list[tuple]) -> dict:
    """Error, 95% interval and two-sided p of a difference whose variance is a sum of `parts`, (estimate, its degrees
    of freedom); those of the sum are Welch and Satterthwaite's. Without a part there is no error."""
    if not parts:
        return {"difference": difference, "error": None, "df": None, "low": None, "high": None, "p": None}
    variances, dfs = np.array(parts).T
    error, df = float(np.sqrt(variances.sum())), float(dfs.sum())
    if error > 0:
        df = float(variances.sum() ** 2 / (variances**2 / dfs).sum())
        p = float(2 * scipy.stats.t.sf(abs(difference) / error, df))
    else:
        p = float(difference == 0)
    half = error * float(scipy.stats.t.ppf(1 - LEVEL / 2, df))
    return {"difference": difference, "error": error, "df": df, "low": difference - half, "high": difference + half,
            "p": p}


def units_of(differences: dict, fitted_to: float) -> tuple[str, Float[np.ndarray, "n"], float]:
    """What the units of these differences are, the difference of each, and the variance of their mean over s^2."""
    splits = averages((key[0], value) for key, value in differences.items())
    systems = averages((key[1], value) for key, value in differences.items())
    conditions = averages((key[1:], value) for key, value in differences.items())
    if len(splits) > 1 and fitted_to:
        # Nadeau & Bengio (2003): J splits share conditions, tested and trained on, so that s^2 / J is far too small.
        # With a correlation of n_test / (n_test + n_train) between splits it is s^2 (1 / J + n_test / n_train).
        tested = len(differences) / len(splits)
        return "splits", np.array(list(splits.values())), 1 / len(splits) + tested / fitted_to
    if len(splits) == 1 and len(systems) >= 3:
        return "held-out systems", np.array(list(systems.values())), 1 / len(systems)
    # The same model or rule in all splits: a condition that several of them test is one condition.
    return "conditions", np.array(list(conditions.values())), 1 / len(conditions)


def seeds_part(row: Row, keys) -> list[tuple]:
    """Variance of a row's mean that comes from its seeds, and its degrees of freedom; none with a single one."""
    if not row.trained:
        return []
    mean, levels = row.mean(), []
    for penalties in row.by_seed.values():
        of_seed = [penalties[key] - mean[key] for key in keys if key in penalties]
        levels += [np.mean(of_seed)] if of_seed else []
    if len(levels) < 2:
        return []
    return [(float(np.var(levels, ddof=1)) / len(levels), len(levels) - 1)]


def compare(row: Row, rival: Row) -> dict | None:
    """By how much the row is better than its rival, over the conditions that both have; None if there is none."""
    one, other = row.mean(), rival.mean()
    differences = {key: other[key] - one[key] for key in one if key in other}
    if not differences:
        return None
    fitted = [each.fitted_to for each in (row, rival) if each.fitted_to]
    units, values, factor = units_of(differences, float(min(fitted, default=0)))
    parts = []
    if len(values) > 1:
        parts = [(float(values.var(ddof=1)) * factor, len(values) - 1)]
        parts += seeds_part(row, differences.keys()) + seeds_part(rival, differences.keys())
    trainings = min((len(each.by_seed) for each in (row, rival) if each.trained), default=None)
    return t_test(float(values.mean()), parts) | {"n": len(values), "units": units, "trainings": trainings}


def compare_uses(row: Row, rival: Row) -> dict | None:
    """The same for one set of trainings that is used in two ways, so that a training is compared with itself."""
    differences = {}
    for seed in sorted(row.by_seed.keys() & rival.by_seed.keys()):
        one, other = row.by_seed[seed], rival.by_seed[seed]
        differences[seed] = {key: one[key] - other[key] for key in one if key in other}
    nothing = Row({0: {key: 0.0 for penalties in differences.values() for key in penalties}})
    return compare(row._replace(by_seed=differences), nothing)


def two_samples(row: list[float], rival: list[float]) -> dict:
    """Of two samples of trainings, how much higher the first one's mean is (Welch's test)."""
    parts = []
    if min(len(row), len(rival)) > 1:
        parts = [(float(np.var(sample, ddof=1)) / len(sample), len(sample) - 1) for sample in (row, rival)]
    fewest = min(len(row), len(rival))
    return t_test(float(np.mean(row) - np.mean(rival)), parts) | {"n": fewest, "units": "trainings",
                                                                  "trainings": fewest}


def less_spread(row: list[float], rival: list[float]) -> dict:
    """Of two series of paired draws, how much less the first one varies: difference of the standard deviations, and
    the test of Pitman and Morgan, in which equal variances make sums and differences uncorrelated."""
    row, rival = np.array(row), np.array(rival)
    ddof = min(1, len(row) - 1)
    item = t_test(float(np.std(rival, ddof=ddof) - np.std(row, ddof=ddof)), [])
    item |= {"n": len(row), "units": "draws", "trainings": None}
    if len(row) > 2 and np.std(row - rival) > 0 and np.std(row + rival) > 0:
        item["p"] = float(scipy.stats.pearsonr(row + rival, row - rival).pvalue)
    return item


# ---------------------------------------------------------------------------------------- several comparisons, a claim


def hardest(items: list[dict], margin: float = 0.0) -> dict:
    """Of the comparisons of a row with several rivals, the one that it is the least likely to win (by `margin`).

    To be the best it has to beat all, so that no correction is due if it beats this one; if it loses, which is the
    worst of several chances, p is multiplied by their number.
    """
    def chance(item: dict) -> float:
        if not item["error"]:
            return 0.5 - np.sign(item["difference"] + margin) / 2
        return scipy.stats.t.sf((item["difference"] + margin) / item["error"], item["df"])

    item = dict(max(items, key=lambda item: (chance(item), -item["difference"])))
    counts = [each["trainings"] for each in items if each["trainings"] is not None]
    item["trainings"] = min(counts, default=None)
    if item["p"] is not None and item["difference"] < 0:
        item["p"] = min(1.0, len(items) * item["p"])
    return item


def holm(p: list[float]) -> list[float]:
    """Holm's corrected p-values: the smallest of m times m, the next times m - 1, ..., never falling."""
    corrected, least = [0.0] * len(p), 0.0
    for done, i in enumerate(np.argsort(p, kind="stable").tolist()):
        least = max(least, min(1.0, (len(p) - done) * p[i]))
        corrected[i] = least
    return corrected


def decide(items: list[dict], margin: float | None = None) -> list[dict]:
    """The items of one claim on one screen, with Holm's correction over them (`p_holm`) and an `outcome`: better,
    worse, not told apart; undecided without an error, or with too few trainings of a trained row.

    With a margin the claim is to be no worse than that: "on par" if the one-sided 95% bound is above -margin.
    """
    tested = [item for item in items if item["p"] is not None]
    for item, p in zip(tested, holm([item["p"] for item in tested])):
        item["p_holm"] = p
    for item in items:
        item["outcome"] = "not told apart"
        few = item["trainings"] is not None and item["trainings"] < TRAININGS
        if margin is not None:
            item["margin"], item["bound"] = margin, None
            if item["error"] is not None:
                quantile = float(scipy.stats.t.ppf(1 - LEVEL, item["df"]))
                item["bound"] = item["difference"] - quantile * item["error"]
        if few or item["p"] is None:
            item["outcome"] = "undecided"
        elif margin is not None and item["bound"] is not None and item["bound"] > -margin:
            item["outcome"] = "on par"
        elif item["p_holm"] < LEVEL:
            item["outcome"] = "better" if item["difference"] > 0 else "worse"
    return items


def verdict(items: list[dict]) -> str:
    """In words, in how many of its items a claim holds, and every item in which it does not."""
    names = [item["what"].split(" against ")[0] for item in items]
    if len(set(names)) < len(names):  # the rival tells them apart
        names = [item["what"] for item in items]
    good = [item for item in items if item["outcome"] in GOOD]
    text = "holds" if len(good) == len(items) else f"holds in {len(good)} of {len(items)}"
    if not good and len({item["outcome"] for item in items}) == 1:
        return items[0]["outcome"]
    others: dict = {}
    for name, item in zip(names, items):
        if item["outcome"] not in GOOD:
            others.setdefault(item["outcome"], []).append(name)
    for outcome in sorted(others, key=("worse", "fails").__contains__, reverse=True):  # losses first
        text += f"; {outcome}: {', '.join(others[outcome])}"
    return text
