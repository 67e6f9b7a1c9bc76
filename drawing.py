"""Draws a figure from its JSON alone (figures.py writes both): panels with curves, histograms, points or a matrix.

Paper: Figures 1 to 6. A `Panel` is all that is seen in one panel; `draw` puts them side by side into a picture.

    U units (their mean and spread are drawn)   X values on the horizontal axis   N cells
"""

from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
from jaxtyping import Float

import scales

STYLES = {  # label in a figure: colour, marker, line; others take turns
    "MapPFN": ("C0", "o", "-"), "pre-trained (zero-shot)": ("C1", "^", "--"), "fine-tuned": ("C3", "s", "-"),
    "other control cells": ("0.5", "", "-."), "treated gene only": ("k", "", "--"), "random": ("k", "", ":"),
    "equal": ("0.7", "", "-"), "genes": ("0.2", "o", ""),
    "control": ("0.7", "o", "-"), "truth": ("C0", "s", "-"), "prediction": ("C3", "X", "--"),
}
COLOURS = {"C": "0.88", "Tr": "#9ecae1", "V": "#fdd870", "Te": "#e58a80", "Co": "#c7e9c0"}


class Panel(NamedTuple):
    """All that is seen in one panel, and the content of every JSON: there, undefined numbers are None."""
    title: str
    xlabel: str
    ylabel: str
    x: list = []          # X
    curves: dict = {}     # label -> [U, X]: the mean over U is drawn, with the standard deviation over U
    paired: bool = False  # ... once each unit's own level, its mean over X, is taken out
    ticks: list = []      # labels of x, if not its numbers
    lines: dict = {}      # label -> where a vertical line is
    log: str = ""         # axes that are logarithmic
    bins: list = []       # edges
    bars: dict = {}       # label -> heights; the first is a grey area
    points: dict = {}     # label -> [N, 2]; large symbols are means
    boxes: dict = {}      # label of a row -> for each of the ticks, one of COLOURS and a number


def draw_curve(axis, p: Panel, label: str, values: Float[np.ndarray, "U X"], look: tuple[str, str, str]) -> None:
    """Units with an undefined value are left out."""
    colour, marker, line = look
    values = values[np.isfinite(values).all(axis=1)]
    if not len(values):
        return
    mean, sd, count = values.mean(axis=0), None, values.shape[1]
    if len(values) > 1 and marker:
        if p.paired:
            # Taking the level out makes a standard deviation too small by sqrt((X - 1) / X) (Morey, 2008).
            values = (values - values.mean(axis=1, keepdims=True)) * np.sqrt(count / max(1, count - 1))
        sd = values.std(axis=0, ddof=1)
    axis.errorbar(p.x, mean, sd, color=colour, marker=marker, ls=line, lw=1.3, ms=5, capsize=3, label=label)


def draw_panel(axis, p: Panel) -> None:
    """Whatever is in it."""
    axis.set_title(p.title, fontsize=9)
    axis.set(xlabel=p.xlabel, ylabel=p.ylabel)
    for i, (label, content) in enumerate((p.curves | p.bars | p.points).items()):
        colour, marker, line = look = STYLES.get(label, (f"C{i}", "o^sDv<>ph*d8"[i % 12], "-"))
        content = np.array(content, float)
        if label in p.curves:
            draw_curve(axis, p, label, content, look)
        elif label in p.points:
            axis.scatter(*content.T, s=10, color=colour, marker=marker, alpha=0.4, lw=0)
            axis.scatter(*content.mean(axis=0), s=90, color=colour, marker=marker, ec="k", label=label, zorder=3)
        elif i == 0:
            axis.stairs(content, p.bins, label=label, color="0.8", fill=True)
        else:
            axis.stairs(content, p.bins, label=label, color=colour, ls=line, lw=1.8)
    for label, x in p.lines.items():
        axis.axvline(x, color="k", ls=":", lw=1.3, label=label)
    if "x" in p.log:
        axis.set_xscale("log")
    if "y" in p.log:
        axis.set_yscale("log")
    if p.ticks:
        axis.set_xticks(p.x, p.ticks, fontsize=7)
        axis.minorticks_off()
    if p.bars:
        axis.margins(y=0.3)  # for the legend
    if p.boxes:
        draw_boxes(axis, p)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=7)


def draw_boxes(axis, p: Panel) -> None:
    """A matrix; what has no letter or no number is empty."""
    for i, row in enumerate(p.boxes.values()):
        for j, (letter, number) in enumerate(row):
            if letter and number:
                axis.fill_between([j - 0.48, j + 0.48], i - 0.46, i + 0.46, color=COLOURS[letter], lw=0)
                axis.text(j, i, f"{letter}\n{number}", ha="center", va="center", fontsize=6)
    axis.tick_params(axis="x", rotation=90)
    axis.set_yticks(range(len(p.boxes)), p.boxes, fontsize=7)
    axis.set(xlim=(-0.5, len(p.ticks) - 0.5), ylim=(len(p.boxes) - 0.5, -0.5))


def draw(document: dict, scale: str, path: Path) -> None:
    """Draw a figure from the content of its JSON: at most four panels side by side, matrices below one another."""
    plt.switch_backend("Agg")  # no window
    panels = [Panel(**panel) for panel in document["data"]["panels"]]
    columns, width, height = min(4, len(panels)), 3.6, 3.4
    if panels[0].boxes:
        columns, width, height = 1, 9, 2.2
    rows = -(-len(panels) // columns)
    share = bool(panels[0].points)  # the same plane
    canvas, axes = plt.subplots(rows, columns, figsize=(max(6, width * columns), height * rows), layout="constrained",
                                squeeze=False, sharex=share, sharey=share)
    canvas.suptitle(document["title"] + f" ({scale} scale, not the paper's)" * (scale != "paper"), fontsize=10)
    for axis, p in zip(axes.flat, panels):
        draw_panel(axis, p)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    with scales.atomic(path) as temporary:
        canvas.savefig(temporary, dpi=100, format="png")
        with PIL.Image.open(temporary) as picture:  # 128 colours are enough, and a third of the size
            picture.convert("RGB").quantize(128).save(temporary, format="png", optimize=True)
    plt.close(canvas)
