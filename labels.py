"""What laboratories call things: which label is the control, which gene a label means, where the counts are.

Paper: silent (its two data sets are known). Used by data.py; reads and writes nothing. Where two readings are possible
the error shows both, with the option that chooses each.

    labels that are read             as
    NT, ctrl, NT1 and NT2, WT, ...   control
    STAT1g2, STAT1_1, sgSTAT1-3      STAT1, if that is a measured gene
    STAT1-KO, STAT1_P1P2_ACGTACGT    STAT1
    stat1, " STAT1"                  STAT1, if no two genes differ in case only
    STAT1+ctrl, STAT1_NT, STAT1g1|STAT1g2   STAT1
    unassigned, multiplet, ...       nothing: nobody knows what was done to these cells
    STAT1+JAK2, STAT1_GFP            nothing: a measured gene, and something besides
"""

import functools
import re
from collections.abc import Iterable

import numpy as np

from scales import BadInput

SEPARATORS = r"[\s_\-.:|#/]"
CONTROLS = ("control|ctrl|ctl|nt|ntc|non-?target(ing)?|no-?target|safe-?targeting|safe-?harbor|negative|neg|negctrl|"
            "negcontrol|wt|wildtype|unperturbed|untreated|nonperturbed|parental|scrambled?|scr|mock|intergenic|"
            "aavs1|lacz|luciferase|rosa26")
CONTROL = re.compile(rf"(sgrna|grna|sg|si|sh)?({CONTROLS})({CONTROLS}|guide|sgrna|grna|sg|g|human|mouse)?\d*")
NOTHING = re.compile(r"nan|na|n/a|none|unknown|un(assigned|mapped|determined)|ambiguous|ambient|multi(plet|ple)?s?|"
                     r"doublets?")
# What may follow a gene: a guide's number, KO, a promoter (P1P2), a strand, a sequence, an identifier.
WORDS = r"sgrna|grna|guide|sg|g|ko|kd|crispri?|p1|p2|p1p2|[+\-]|[acgt]{8,}|ens[a-z]*\d+"
AFTER = re.compile(rf"({SEPARATORS}+({WORDS})?{SEPARATORS}*\d*)+", re.IGNORECASE)
# STAT1g2; but TUBG1 and Tubg1 are genes themselves
GLUED = re.compile(rf"(sgrna|sgRNA|grna|gRNA|guide|sg|g){SEPARATORS}*\d+")
BEFORE = re.compile(r"^(sgrna|grna|guide|sg)[_\-: ]", re.IGNORECASE)
BEFORE_GLUED = re.compile(r"^(sgrna|grna|sg|si|sh)(?=[A-Z0-9])")
# Two guides of one vector: STAT1|STAT1, or STAT1_NT; but in STAT1_+_ it is a strand.
BESIDE = re.compile(r"(?<!_)\+(?!_)|--|[|;,&]|(?<=ctrl)_|_(?=ctrl)|"
                    r"_(?=(?:nt|ntc|non-?targeting|safe-?targeting)\d*$)", re.IGNORECASE)
COUNT_LAYERS = ("counts", "raw_counts", "raw", "count", "umi", "umis", "matrix", "spliced_counts", "spliced")


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
    parts = [part for part in BESIDE.split(label) if part]
    if len(parts) > 1:
        parts = [part for part in parts if not is_control(part)]
    found = {gene_of_guide(part.strip(), upper) for part in parts}
    return found.pop() if len(found) == 1 else None


def gene_of_guide(name: str, upper: dict[str, str]) -> str | None:
    """The measured gene that one guide is of, None if none."""
    for candidate in (name, BEFORE.sub("", name), BEFORE_GLUED.sub("", name)):
        if candidate.upper() in upper:
            return upper[candidate.upper()]
        for end in range(len(candidate) - 1, 0, -1):  # the longest gene that a guide's number follows
            before, after = candidate[:end], candidate[end:]
            glued = GLUED.fullmatch(after) and (before[-1].isdigit() or before[-1].isupper())
            if before.upper() in upper and (glued or AFTER.fullmatch(after)):
                return upper[before.upper()]
    return None


def says_nothing(label: str, upper: dict[str, str]) -> bool:
    """Is it unknown what was done to these cells, or something besides the knock-out of a measured gene?"""
    label = label.strip()
    parts = re.split(r"[\s_+;,&|/]+|--", label)
    return NOTHING.fullmatch(label.lower()) is not None or any(part.upper() in upper for part in parts if len(part) > 1)


def stem(label: str) -> str:
    """The label without numbers, separators and case: NT1 and NT-2 are both nt."""
    return re.sub(rf"{SEPARATORS}|\d", "", label).lower()


def controls_among(labels: Iterable[str], genes: set[str], asked: str | None) -> list[str]:
    """The control labels: what was asked for, and what differs from it in numbers only; without such a label, those
    that look like controls and differ from it in case or numbers; if nothing was asked for, all that look like one. No
    measured gene is among them, unless it was asked for."""
    labels, upper = list(labels), by_upper_case(genes)

    def named(label):  # WT1 and its guides; of the gene CTRL no control loses its name
        gene = gene_of(label, genes, upper)
        return label.strip() in genes or gene is not None and gene[-1].isdigit()

    if asked is None:
        return [label for label in labels if is_control(label) and not named(label)]
    if asked in {label.strip() for label in labels}:
        return [label for label in labels if label.strip() == asked or stem(label) == stem(asked) and not named(label)]
    alike = [label for label in labels if stem(label) == stem(asked) and is_control(label) and not named(label)]
    if asked[-1:].isdigit():  # NT stands for NT1 and NT2, but nt3 for NT3 only
        alike = [label for label in alike if label.strip().lower() == asked.lower()]
    return alike


def read_labels(labels: Iterable[str], genes: Iterable[str], control: str, controls: Iterable[str]) -> dict[str, str]:
    """Label -> `control`, a measured gene, nothing if that is what it says or it is another control, or itself. Raises
    BadInput for a label that is two genes but for its case."""
    names, controls = set(genes), set(controls)
    upper = by_upper_case(names)
    found = {}
    for label in labels:
        if label in controls:
            found[label] = control
            continue
        gene = gene_of(label, names, upper)
        same = [name for name in names if gene is None and name.upper() == label.strip().upper()]
        if same:
            raise BadInput(f"label '{label}': {' or '.join(sorted(same))}? These genes differ in case only; rename the "
                           "label as the one that is meant")
        if gene is None and not says_nothing(label, upper) and not is_control(label):
            gene = label.strip()
        found[label] = gene or ""
    return found


def gene_names(cells, labels: Iterable[str]) -> tuple[str, list[str]]:
    """Where the genes' names are that most labels mean, 'var_names' or a column of var, and these names. A gene keeps
    that of var_names where a column has none, or has it twice."""
    def known(names: list[str]) -> int:
        genes = set(names)
        upper = by_upper_case(genes)
        return sum(gene_of(label, genes, upper) is not None for label in labels)

    labels = list(labels)
    places = {"var_names": list(map(str, cells.var_names))}
    for column in cells.var.columns:
        if cells.var[column].dtype == object or str(cells.var[column].dtype) in ("category", "string", "str"):
            values = cells.var[column].astype(object).where(cells.var[column].notna(), "").astype(str)
            once = (values != "") & ~values.duplicated(keep=False)
            places[f"var['{column}']"] = values.where(once, cells.var_names).tolist()
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


def check_layer(cells, name: str) -> None:
    """Raise BadInput unless there is a layer of this name."""
    if name not in cells.layers:
        raise BadInput(f"--layer {name}: there is none of that name; layers: {', '.join(cells.layers) or 'none'}")


def find_counts(cells, layer: str | None = None) -> tuple[str, object]:
    """Where raw counts are, in words, and an AnnData whose X they are: that layer, or X itself, a layer, or .raw;
    corrected counts only where there are no others. Raises BadInput if there are none, or only in several layers of
    unusual names; negative values alone are left to data.py."""
    def of_layer(name):
        other = cells.copy()
        other.X = other.layers[name]
        return other

    if layer is not None:
        check_layer(cells, layer)
    usual = [name for wanted in COUNT_LAYERS for name in cells.layers if name.lower() == wanted]
    unusual = sorted(set(cells.layers) - set(usual))
    places = {}  # the first that has some is taken
    if cells.X is not None:
        places["X"] = cells.X, lambda: cells
    places |= {f"layer '{name}'": (cells.layers[name], functools.partial(of_layer, name)) for name in usual}
    if cells.raw is not None:
        places[".raw"] = cells.raw.X, lambda: cells.raw.to_adata()
    places |= {f"layer '{name}'": (cells.layers[name], functools.partial(of_layer, name)) for name in unusual}
    if layer is not None:
        places = {f"layer '{layer}'": (cells.layers[layer], functools.partial(of_layer, layer))}
    kinds = {place: kind_of(values) for place, (values, _) in places.items()}
    for wanted in ("counts", "corrected counts"):
        having = [place for place in places if kinds[place] == wanted]
        if len(having) > 1 and having[0] in [f"layer '{name}'" for name in unusual]:
            raise BadInput(f"{wanted} in {', '.join(having)}, and no name says which are meant: choose with --layer")
        if having:
            return f"{wanted} (in {having[0]})", places[having[0]][1]()
    if kinds == {"X": "negative"}:  # data.py says which value it is
        return "X", cells
    seen = "; ".join(f"{place}: {kind}" for place, kind in kinds.items()) or "the file has no values"
    raise BadInput(f"no raw counts ({seen}): put them into X, a layer or .raw; or, if X is the natural log1p of "
                   "normalised counts, say --log-transformed")
