"""What laboratories call things: which label is the control, which gene a label means, where the counts are.

Paper: silent (its two data sets are known). Used by data.py; reads and writes nothing. Where two readings are possible
the error shows both, with the option that chooses each.

    labels that are read             as
    NT, ctrl, NT1 and NT2, WT, ...   control
    STAT1g2, STAT1_1, sgSTAT1-3      STAT1, if that is a measured gene
    stat1, " STAT1"                  STAT1, if no two genes differ in case only
    STAT1+ctrl, ctrl_STAT1           STAT1
"""

import re
from collections.abc import Iterable

import numpy as np

from scales import BadInput

SEPARATORS = r"[\s_\-.:|#/]"
CONTROLS = ("control|ctrl|ctl|nt|ntc|non-?targeting|safe-?targeting|safe-?harbor|negative|neg|negctrl|negcontrol|"
            "wt|wildtype|unperturbed|untreated|nonperturbed|scrambled?|mock|intergenic|aavs1")
CONTROL = re.compile(rf"({CONTROLS})({CONTROLS}|guide|sgrna|grna|sg|g)?\d*")
GUIDE = re.compile(rf"({SEPARATORS}+(sgrna|grna|guide|sg|g)?|sgrna|grna|guide|sg|g){SEPARATORS}*\d+", re.IGNORECASE)
BEFORE = re.compile(r"^(sgrna|grna|sg)(?=[A-Z0-9])[_\-]?")
COUNT_LAYERS = ("counts", "raw_counts", "raw", "count", "umi", "umis", "spliced_counts")


def is_control(label: str) -> bool:
    """Does this label look like one of unperturbed cells?"""
    return CONTROL.fullmatch(re.sub(rf"{SEPARATORS}", "", label).lower()) is not None


def by_upper_case(genes: Iterable[str]) -> dict[str, str]:
    """Upper case -> gene; without those that differ from another one in case only."""
    found: dict[str, str] = {}
    twice = set()
    for gene in genes:
        if found.setdefault(gene.upper(), gene) != gene:
            twice.add(gene.upper())
    return {upper: gene for upper, gene in found.items() if upper not in twice}


def gene_of(label: str, genes: set[str], upper: dict[str, str]) -> str | None:
    """The measured gene that a label means, None if none. A name that is a gene as it stands is that gene."""
    label = label.strip()
    if label in genes:
        return label
    parts = [part for part in re.split(r"[+;,&]|(?<=ctrl)_|_(?=ctrl)", label) if part and not is_control(part)]
    if len(parts) != 1:
        return None
    name = parts[0].strip()
    for candidate in (name, BEFORE.sub("", name)):
        if candidate.upper() in upper:
            return upper[candidate.upper()]
        for end in range(len(candidate) - 1, 0, -1):  # the longest gene that a guide's number follows
            if candidate[:end].upper() in upper and GUIDE.fullmatch(candidate[end:]):
                return upper[candidate[:end].upper()]
    return None


def stem(label: str) -> str:
    """The label without numbers, separators and case: NT1 and NT-2 are both nt."""
    return re.sub(rf"{SEPARATORS}|\d", "", label).lower()


def controls_among(labels: Iterable[str], genes: set[str], asked: str | None) -> list[str]:
    """The control labels: what was asked for; else all that look like one, and are no measured gene."""
    if asked is not None:
        return [label for label in labels if label.strip() == asked]
    return [label for label in labels if is_control(label) and label.strip() not in genes]


def read_labels(labels: Iterable[str], genes: Iterable[str], control: str, controls: Iterable[str]) -> dict[str, str]:
    """Label -> `control`, a measured gene, or what it says if it is neither."""
    names, controls = set(genes), set(controls)
    upper = by_upper_case(names)
    found = {}
    for label in labels:
        if label in controls:
            found[label] = control
        else:
            found[label] = gene_of(label, names, upper) or label.strip()
    return found


def gene_names(cells, labels: Iterable[str]) -> tuple[str, list[str]]:
    """Where the genes' names are that most labels mean, 'var_names' or a column of var, and these names."""
    def known(names: list[str]) -> int:
        genes = set(names)
        upper = by_upper_case(genes)
        return sum(gene_of(label, genes, upper) is not None for label in labels)

    labels = list(labels)
    places = {"var_names": list(map(str, cells.var_names))}
    for column in cells.var.columns:
        if cells.var[column].dtype == object or str(cells.var[column].dtype) in ("category", "string", "str"):
            places[f"var['{column}']"] = cells.var[column].astype(str).tolist()
    best = max(places, key=lambda place: known(places[place]))  # the first of equals
    return best, places[best]


# ------------------------------------------------------------------------------------------------- where the counts are


def nonzero(values, most: int = 200_000) -> np.ndarray:
    """Some of the values that are not zero."""
    data = values[: max(1, most // max(1, values.shape[1]) + 200)]
    data = data.data if hasattr(data, "tocsr") else np.asarray(data).ravel()
    return data[data != 0]


def kind_of(values) -> str:
    """counts, corrected counts (by SoupX, CellBender and the like: nearly all are nearly whole), negative or fractions,
    by a look at some rows."""
    data = nonzero(values)
    if not np.isfinite(data).all() or (data < 0).any():
        return "negative"
    off = np.abs(data - np.round(data))
    if not off.any():
        return "counts"
    if np.quantile(off, 0.9) < 0.1 and data.max() > 15:  # no logarithm of a count is as large
        return "corrected counts"
    return "fractions"


def find_counts(cells) -> tuple[str, object]:
    """Where raw counts are, in words, and an AnnData whose X they are: X itself, a layer, or .raw; corrected counts
    only where there are no others. Raises BadInput if there are none; negative values alone are left to data.py."""
    places = {"X": lambda: cells}
    for layer in sorted(cells.layers, key=lambda name: (name.lower() not in COUNT_LAYERS, name)):
        def of_layer(layer=layer):
            other = cells.copy()
            other.X = other.layers[layer]
            return other

        places[f"layer '{layer}'"] = of_layer
    kinds = {"X": kind_of(cells.X)} | {f"layer '{name}'": kind_of(cells.layers[name]) for name in cells.layers}
    if cells.raw is not None:
        places[".raw"], kinds[".raw"] = lambda: cells.raw.to_adata(), kind_of(cells.raw.X)
    for wanted in ("counts", "corrected counts"):
        for place, get in places.items():
            if kinds[place] == wanted:
                return f"{wanted} (in {place})", get()
    if kinds == {"X": "negative"}:  # data.py says which value it is
        return "X", cells
    seen = "; ".join(f"{place}: {kind}" for place, kind in kinds.items())
    raise BadInput(f"no raw counts ({seen}): put them into X, a layer or .raw, or say --log-transformed if X is the "
                   "natural log1p of normalised counts")
