# %% [markdown]
# # The lab of five minutes, with pictures
#
# Linear causal models: draw some, train on them, predict knock-outs that were never seen, and look. Run the cells one
# by one in an editor that knows `# %%`, or all of it with `python lab.py`; it takes five minutes of two CPU cores, and
# everything is written below `out/laptop` and skipped the next time.

# %%
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import metrics
import tasks

SCALE = os.environ.get("SCALE", "laptop")  # SCALE=smoke only shows that all of it runs
OUT = Path("out") / SCALE


def run(*words: str) -> None:
    """A stage, as on the command line."""
    subprocess.run([sys.executable, *words, "--scale", SCALE], check=True)


# %% [markdown]
# ## 1. Random causal models
# A thousand graphs to train on, and a few that nobody sees in training. A *condition* is all cells of one system under
# one treatment; the first is control.

# %%
run("prior.py", "linear")
screen = tasks.load_screen(OUT / "screens" / "linear" / "split-0")
print(screen.cells.shape, "cells x variables;", screen.split.shape, "systems x treatments")

# %% [markdown]
# What do(variable 0) does in one of the held-out systems: the treated variable is set, what is downstream moves, and
# the rest stays.

# %%
system = int(np.flatnonzero((screen.split == tasks.TEST).any(axis=1))[0])
control, treated = screen.pool(system, 0), screen.pool(system, 1)
plt.figure(figsize=(7, 3))
plt.bar(range(control.shape[1]), treated.mean(0) - control.mean(0), label=f"{len(treated)} cells")
plt.plot(screen.means[system, 1], "k_", ms=12, label="infinitely many")
plt.xlabel("variable")
plt.ylabel("change of the mean")
plt.legend()
plt.tight_layout()
plt.savefig(OUT / "lab-1.png", dpi=100)

# %% [markdown]
# ## 2. Training
# Each task: control cells, four other experiments, and a query whose cells are to be made from noise.

# %%
run("train.py", "--screen", "linear", "--name", "linear-seed0")
log = np.genfromtxt(OUT / "train" / "linear-seed0" / "split-0" / "log.csv", delimiter=",", names=True)
plt.figure(figsize=(7, 3))
plt.plot(log["tasks"], log["loss"], lw=0.7)
plt.xlabel("tasks")
plt.ylabel("flow-matching loss")
plt.tight_layout()
plt.savefig(OUT / "lab-2.png", dpi=100)

# %% [markdown]
# ## 3. Prediction, beside what needs no training

# %%
run("sample.py", "--screen", "linear", "--model", "mappfn-seed0=linear-seed0", "--context-gain")
run("-m", "baselines", "--screen", "linear", "--methods", "identity", "target-only", "known-graph", "oracle")
subprocess.run([sys.executable, "metrics.py", str(OUT / "samples" / "linear")], check=True)
for row in ("mappfn-seed0", "mappfn-seed0~controls", "target-only", "known-graph", "oracle"):
    numbers = json.loads((OUT / "samples" / "linear" / f"{row}-split0-draw0.json").read_text())["metrics"]
    print(f"{row:24} RMSE {numbers['rmse']:.3f}  PDS {numbers['pds']:.3f}  R2 {numbers['off_target_r2']:.2f}")

# %% [markdown]
# The treated variable is right, and what is downstream is not: off-target R2 is below 0, which is to say that nothing
# moves, and it is the same with control cells in the place of all experiments (`~controls`). So nothing was learnt *in
# context*. With the graph known it could be 0.6: exercise 10 begins here.

# %%
p = metrics.load_predictions(OUT / "samples" / "linear" / "mappfn-seed0-split0-draw0.npz")
off = p.treatments == 0
plt.figure(figsize=(4, 4))
plt.plot(p.expected[off], p.prediction.mean(axis=1)[off], ".", ms=3)
plt.axline((0, 0), slope=1, color="0.6")
plt.xlabel("true mean of other variables")
plt.ylabel("predicted")
plt.tight_layout()
plt.savefig(OUT / "lab-3.png", dpi=100)
