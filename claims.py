"""The claims of the paper's section 6 in its words, and what has to be compared to judge them; tables.py does that.

Claims 1 to 7 are of Tables 2 to 4, 8 to 12 of figures, which bring their own evidence (figures.py). Each is judged on
every screen that it is about, by itself: leukemia does not speak for melanoma, nor the other way round.
"""

from typing import NamedTuple

PUBLISHED = ("cpa", "condot", "mfm", "cellflow", "state")
ALL = ("wasserstein", "mmd", "rmse", "pds", "magnitude_ratio", "auprc")
# Non-inferiority: the largest standard deviation that the paper's Table 3 gives the AUPRC of a baseline on the screen:
# what is less apart than repetitions of one method are is on a par. Other screens have the wider one.
MARGINS = {"leukemia": 0.01, "melanoma": 0.05}


class Claim(NamedTuple):
    """A claim that tables can judge: each row of `pairs` against the hardest of its rivals, in the metrics that are
    `wanted` on a screen: one of the paper's, or "real", any other screen of log-expression that has the rows."""
    says: str                                       # the paper's words, shortened
    asks: str                                       # what is compared
    pairs: tuple[tuple[str, tuple[str, ...]], ...]  # row, rivals
    wanted: dict[str, tuple[str, ...]]              # screen -> metrics
    margin: dict[str, float] = {}                   # screen -> the row is to be no worse than this


CLAIMS = [
    Claim("MapPFN achieves the best performance across all metrics [on linear SCMs], only tied with MFM on Wasserstein "
          "distance",
          "MapPFN is better than CondOT and than MFM",
          (("mappfn", ("condot", "mfm")),),
          {"linear": ALL[:5]}),
    # MR near 0.1 alone shows no collapse: it is measured from the cells that a prediction was made from, and shifting
    # those as they should be gives no more. So what has to be beaten is such a shift, of the treated variable alone.
    Claim("The magnitude ratio reveals identity collapse: CondOT and MFM yield around 0.1, MapPFN is the only method "
          "close to one",
          'In MR, "target only", which sets the treated variable and moves nothing else, is closer to 1 than CondOT '
          'and than MFM: these move even less; and MapPFN is closer than "target only"',
          (("target-only", ("condot",)), ("target-only", ("mfm",)), ("mappfn", ("target-only",))),
          {"linear": ("magnitude_ratio",)}),
    Claim("Fine-tuned MapPFN achieves best PDS, MR and AUPRC on both datasets, and best performance on all metrics "
          "except W2 on the leukemia dataset",
          "Fine-tuned MapPFN is better than every published baseline",
          (("mappfn-finetuned", PUBLISHED),),
          {"leukemia": ALL[1:], "real": ("pds", "magnitude_ratio", "auprc")}),
    Claim("Random initialization performs worse on all metrics except W2 across both datasets",
          "Fine-tuned MapPFN is better than the one trained on the screen from random initialisation",
          (("mappfn-finetuned", ("mappfn-random",)),),
          {"real": ALL[1:]}),
    Claim("Conditioning on interventional distributions improves performance across all metrics (Table 4)",
          "Pre-trained MapPFN is better than the one trained and used without context experiments",
          (("mappfn-pretrained", ("mappfn-no-context",)),),
          {"real": ALL}),
    Claim("On both datasets, pre-trained MapPFN recovers differentially expressed genes zero-shot and on par with the "
          "best baselines trained on real data",
          "Pre-trained MapPFN is at most a margin worse than the best published baseline (leukemia 0.01, else 0.05)",
          (("mappfn-pretrained", PUBLISHED),),
          {"real": ("auprc",)}, MARGINS),
    Claim("The paired prior results in a substantial improvement across all metrics on real single-cell data (Table 4)",
          "MapPFN pre-trained on the paired prior is better than on the unpaired one",
          (("mappfn-pretrained", ("mappfn-unpaired",)),),
          {"real": ALL}),
]
# What a trained row has to beat. Not "constant-mean", which is no set of cells.
SIMPLE = ("identity", "target-only", "system-mean", "additive", "target-gene", "bilinear-ridge")
GRAPH = ("known-graph", "known-order")
LINEAR = ("wasserstein", "mmd", "rmse", "pds", "off_target_r2")
PRIORS = ("grn-unpaired-redrawn", "grn-unpaired", "grn", "causal", "panel")
NETWORKS = {"exchangeable": "the exchangeable network", "mappfn": "the paper's network"}


def steps() -> list[Claim]:
    """From one prior to the next, for each network; from one network to the other, for each prior; from new cells to
    counterfactual ones; and against what needs no training."""
    names = ("Noise of one amplitude is better than one that is redrawn for each condition, as released",
             "Paired noise is better than unpaired",
             "Effects that propagate, twins, repression (causal) are better than sergio-rs's",
             "Made as screens are made (panel) is better than causal")
    asked = []  # what, of what, row, rivals
    for name, before, after in zip(names, PRIORS, PRIORS[1:]):
        asked += [(name, words, f"{network}-{after}", (f"{network}-{before}",)) for network, words in NETWORKS.items()]
    for prior in PRIORS:
        asked.append(("The exchangeable network is better than the paper's", f"on the prior {prior}",
                      f"exchangeable-{prior}", (f"mappfn-{prior}",)))
    for network, words in NETWORKS.items():
        asked.append(("Counterfactual cells are better than new ones", f"{words}, on the prior panel",
                      f"{network}-panel-cf", (f"{network}-panel",)))
    asked.append(("Counterfactual cells of the prior panel are better, zero-shot, than every simple row",
                  "the hardest of them", "exchangeable-panel-cf", SIMPLE))
    for network, words in NETWORKS.items():
        for prior in ("panel", "grn"):
            asked.append(("Fine-tuning improves on zero-shot", f"{words}, prior {prior}, counterfactual cells",
                          f"{network}-{prior}-tuned-cf", (f"{network}-{prior}-cf",)))
    found = [Claim(name, words, ((row, rivals),), {"real": ALL}) for name, words, row, rivals in asked]
    for words, row, rivals, metrics in (
            ("better than the paper's network", "exchangeable", ("mappfn",), LINEAR),
            ("better than every simple row, the hardest of them", "exchangeable", SIMPLE, LINEAR),
            ("as good as if the graph were known, or its order", "exchangeable", GRAPH, ("rmse", "off_target_r2")),
            ("nearer to the true twin of each cell, in counterfactual cells, than every simple row is",
             "exchangeable-cf", SIMPLE, ("twin_rmse",))):
        found.append(Claim("On linear SCMs the exchangeable network learns in context", f"It is {words}",
                           ((row, rivals),), {"linear": metrics}))
    return found


FIGURE_CLAIMS = {  # figure -> what the paper says, what is compared
    "variance": ("The paired prior converges faster and to higher performance than the unpaired prior (Figure 2)",
                 "Correlation of variances: paired minus unpaired in the first third of the snapshots (faster), and in "
                 "the last third (higher)"),
    "tta": ("TTA improves AUPRC and reduces its variance across resampling seeds (Figure 3)",
            "Augmented against single passes, in AUPRC and in its standard deviation over draws of cells"),
    "context": ("Performance improves monotonically with the number of interventional experiments (Figure 5a)",
                "W2 with the most experiments against W2 with one (not whether every step between improves)"),
    "cells": ("Performance improves with more cells, without plateauing at the number seen in training (Figure 5b)",
              "W2 with the most cells given against W2 with as many as in training"),
    "coverage": ("The prior covers the range of expression values and perturbation effects observed in both datasets "
                 "(Figure 6)",
                 "Values of the screen lie within the prior's percentiles 0.5 to 99.5, as many are zero, and the two "
                 "histograms overlap"),
}
