#!/usr/bin/env bash
# Five forks in a copy of the repository: a data set, a prior, a network, a baseline and a metric, each in as few files as
# the README says; then the smoke scale with all of them, and a look whether the tables have them. Six minutes on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PY=$PWD/.venv/bin/python
[ -x "$PY" ] || PY=$(command -v "${PYTHON:-python3}")
COPY=$(mktemp -d)
trap 'rm -rf "$COPY"' EXIT
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$COPY"
cd "$COPY"
git init -q . && git add -A && git -c user.name=fork -c user.email=fork@example.org commit -qm "before"
touched() {  # say which files were added or changed since the last call
  git add -A
  echo "== fork: $1: $(git diff --cached --name-only | wc -l) files: $(git diff --cached --name-only | xargs)"
  git -c user.name=fork -c user.email=fork@example.org commit -q --allow-empty -m "$1"
}

# 1. A metric: the largest error of a gene's mean.
cat > .git/metric.py <<'EOF'
from pathlib import Path
text = Path("metrics.py").read_text()
text = text.replace('class Metric(NamedTuple):', '''def worst_gene(x, y):
    """Largest difference of means of any gene."""
    return float(abs(x.mean(0) - y.mean(0)).max())


class Metric(NamedTuple):''')
text = text.replace('METRICS = {\n', 'METRICS = {\n    "worst_gene": Metric("worst gene", 1, "lower", each(worst_gene)),\n')
Path("metrics.py").write_text(text)
EOF
"$PY" .git/metric.py
touched "a metric"

# 2. A baseline: half of target only.
cat > baselines/halfway.py <<'EOF'
"""Between identity and target only."""

from baselines.simple import TargetOnly


class Halfway(TargetOnly):
    """The treated gene half way to its do-value."""

    def predict(self, controls, system, treatment, rng):
        return (controls + super().predict(controls, system, treatment, rng)) / 2
EOF
sed -i 's/^from baselines import graph, simple$/from baselines import graph, halfway, simple/; s/^    "identity": simple.Identity,$/&\n    "halfway": halfway.Halfway,/' baselines/__init__.py
touched "a baseline"

# 3. A prior: independent genes with Poisson counts; a knock-out silences its gene and doubles the next one.
cat > poisson.py <<'EOF'
"""A prior of independent genes."""

from pathlib import Path

import numpy as np

import prior
import scales
import tasks

s = prior.Settings("grn", systems=12, validation=2, test=2, genes=8, population=64, test_population=64)


def blocks():
    """The cells of one system after the other."""
    for number in range(16):
        rng = scales.generator("prior", 7, number)
        mean = rng.uniform(1, 5, 8)
        for knocked_out in range(-1, 8):
            changed = mean.copy()
            if knocked_out >= 0:
                changed[[knocked_out, (knocked_out + 1) % 8]] *= 0, 2
            yield np.log1p(rng.poisson(changed, (64, 8))).astype(np.float32)


count, values = np.full((16, 9), 64), np.ones((16, 8), np.float32)
part = np.repeat([tasks.TRAIN, tasks.VALIDATION, tasks.TEST], [12, 2, 2])
made = {"title": "Independent genes", "section": "grn"}
prior.write(s, Path("out/smoke/screens/poisson/split-0"), blocks(), count, values, part, True, made)
EOF
touched "a prior"

# 4. A network: every cell sees the mean of all cells that are given.
cat > means.py <<'EOF'
"""A network without attention."""

import equinox as eqx
import jax
import jax.numpy as jnp


class Means(eqx.Module):
    """Velocity of a cell from itself, the time, and the means of controls, context and query."""
    mlp: eqx.nn.MLP

    def __init__(self, a, genes, *, key):
        self.mlp = eqx.nn.MLP(4 * genes + 1, genes, a.width, 2, key=key)

    def condition(self, given, slots):
        return jnp.concatenate([given.controls.mean(0), given.context.mean((0, 1)), given.query])

    def __call__(self, y_tau, tau, condition, drop):
        known = jnp.append(jnp.where(drop, 0, condition), tau)
        return jax.vmap(lambda y: self.mlp(jnp.concatenate([y, known])))(y_tau)
EOF
touched "a network"

# 5. A data set: an .h5ad file, and no file of the repository.
"$PY" - <<'EOF'
import anndata, numpy as np, pandas as pd
rng = np.random.default_rng(0)
labels = np.repeat(["ctrl", *(f"G{g}" for g in range(9))], 60)
counts = rng.poisson(rng.uniform(2, 9, (1, 18)), (len(labels), 18)).astype(np.float32)
for g in range(9):
    counts[labels == f"G{g}", g] = 0
obs = pd.DataFrame({"gene": labels}, [f"cell{i}" for i in range(len(labels))])
anndata.AnnData(counts, obs, pd.DataFrame(index=[f"G{g}" for g in range(18)])).write_h5ad(".git/mine.h5ad")
EOF
touched "a data set"

export PYTHON=$PY
bash run_all.sh smoke --screen .git/mine.h5ad
TO="--scale smoke --out out"
export JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1
"$PY" poisson.py
"$PY" train.py --screen poisson --network means.Means --name means $TO
"$PY" sample.py --screen poisson --model means $TO
"$PY" -m baselines --screen poisson --methods identity halfway target-only $TO
"$PY" metrics.py out/smoke/samples
"$PY" tables.py $TO > /dev/null
"$PY" - <<'EOF'
import json
tables = json.load(open("out/smoke/report.json"))["tables"]
rows = {name: {row["row"]: row["metrics"] for row in table["rows"]} for name, table in tables.items() if "rows" in table}
for screen in ("linear", "toy", "mine", "poisson"):
    assert "halfway" in rows[screen], screen
    assert all("worst_gene" in metrics for metrics in rows[screen].values()), screen
assert "means" in rows["poisson"] and "mappfn-finetuned" in rows["mine"]
figures = json.load(open("out/smoke/report.json"))["figures"]
missing = [name for name, figure in figures.items() if "not_run" in figure]
assert not missing, missing
print("== forks: all five are in the tables, and every figure was made")
EOF
SCALE=smoke "$PY" lab.py > /dev/null
echo "== lab.py runs"
