#!/usr/bin/env bash
# Beyond the paper: what a second network (exchangeable.py) and other priors (prior.py causal, panel) are worth.
#
#   bash beyond.sh [smoke|laptop|paper] [--leukemia FILE] [--genes 20] [--seeds 3] [--out FOLDER]
#
# Both networks are trained on each of five priors for as many seconds, one core each and side by side, and predict held-out
# systems of their prior and, zero-shot, the leukemia screen: its test conditions, and, to choose one by, its training
# conditions, each from the others. Both are fine-tuned on it, from two priors, and tried on linear SCMs. The report,
# <out>/<scale>/report.md, has a table for each screen and the comparisons of claims.py; <out> is out/beyond, or
# out/beyond-50 with --genes 50. Laptop scale: some five hours of two CPU cores (estimated), 20 genes, three seeds. FILE is an
# .h5ad; without one there is no real screen.
# Finished stages are skipped: start it again after a stop. Environment: PYTHON=python3 with requirements.txt installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
fail() { echo "error: $*" >&2; exit 2; }
SCALE=laptop LEUKEMIA='' GENES='' OURS='' SEEDS=3 OUT='' PY=${PYTHON:-python3}
while [ $# -gt 0 ]; do
  case "$1" in
    smoke|laptop|paper) SCALE=$1 ;;
    --leukemia) [ -f "${2:-}" ] || fail "--leukemia ${2:-}: no such file; give the path of an .h5ad file"; LEUKEMIA=$2; shift ;;
    --genes|--seeds) [[ "${2:-}" =~ ^[1-9][0-9]?$ ]] || fail "$1 ${2:-}: expected a number from 1 to 99"
      [ "$1" = --genes ] && GENES=$2 || SEEDS=$2; shift ;;
    --out) OUT=${2:?--out needs a folder}; shift ;;
    -h|--help) sed -n '2,13s/^# \{0,1\}//p' beyond.sh; exit 0 ;;
    *) fail "unknown word '$1'; --help shows what there is" ;;
  esac
  shift
done
"$PY" -c 'import jax, equinox, sergio_rs' || fail "$PY has not all of requirements.txt; install it, or set PYTHON"
OUT=${OUT:-out/beyond${GENES:+-$GENES}}
TO=(--scale "$SCALE" --out "$OUT") SIZE=(${GENES:+--genes "$GENES"})
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$OUT/$SCALE/.compiled} JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
run() { printf '\n== python %s\n' "$*"; "$PY" "$@"; }
case "$SCALE" in  # updates that take both networks as many seconds of one core; of fine-tuning
  smoke) PAPERS=20 PAPERS_LINEAR=20 LINEAR=20 TUNED=8 ;;
  laptop) PAPERS=3200 PAPERS_LINEAR=14000 LINEAR=9000 TUNED=200  # the second network's on other priors: scales.py
    [ "${GENES:-20}" -le 20 ] || { PAPERS=4000 OURS=400; } ;;
  paper) PAPERS=50000 PAPERS_LINEAR=50000 LINEAR=50000 TUNED=375 ;;  # not tried
esac
PRIORS="panel causal grn grn-unpaired grn-unpaired-redrawn"
TO_TUNE="panel grn"
OURS_IS=(--network exchangeable.Exchangeable --snapshots 0)
PAPERS_IS=(--no-knock-out 0.1 --snapshots 0)

if [ "${GENES:-20}" = 20 ]; then  # as many variables as linear SCMs have
  run prior.py linear "${TO[@]}"
  # More cells of a condition than a task has: of 100 cells that were standardised together each gene would have the very
  # same mean and spread in every task, which those of the test have not.
  run prior.py linear --seed 1 --systems 1000 --population 500 --name linear-many "${TO[@]}"
fi
SIZE_OF_PRIOR=(${SIZE[@]+"${SIZE[@]}"})
[ "$SCALE" != laptop ] || SIZE_OF_PRIOR+=(--test-population 200)  # enough for a fresh oracle
for prior in grn "grn --unpaired" "grn --unpaired --redraw-amplitude" causal panel; do
  run prior.py $prior ${SIZE_OF_PRIOR[@]+"${SIZE_OF_PRIOR[@]}"} "${TO[@]}"
done
[ -z "$LEUKEMIA" ] || run data.py --dataset leukemia --h5ad "$LEUKEMIA" ${SIZE[@]+"${SIZE[@]}"} "${TO[@]}"

CORES=($("$PY" -c 'import os; print(*sorted(os.sched_getaffinity(0)))' 2>/dev/null || true))
on() {  # on NUMBER COMMAND...: on that core only, where there are two, so that both networks have the same
  local number=$1; shift
  if [ ${#CORES[@]} -ge 2 ] && command -v taskset >/dev/null; then taskset -c "${CORES[$number]}" "$@"; else "$@"; fi
}
LAST=$((SEEDS - 1))
all_of() {  # all_of NUMBER ROW LINEAR PRIOR-UPDATES OPTIONS...: the trainings of one network, on the core of that number
  local number=$1 row=$2 linear=$3 updates=$4 seed prior choice; shift 4
  for seed in $(seq 0 $LAST); do for prior in $PRIORS; do
    on "$number" "$PY" train.py --screen "$prior" ${updates:+--updates $updates} "$@" --seed "$seed" \
      --name "$row-$prior-seed$seed" "${TO[@]}"
  done; done
  [ "${GENES:-20}" != 20 ] || for seed in $(seq 0 $LAST); do
    on "$number" "$PY" train.py --screen linear-many --fresh 500 --updates "$linear" "$@" --seed "$seed" \
      --name "$row-seed$seed" "${TO[@]}"
  done
  [ -z "$LEUKEMIA" ] || for prior in $TO_TUNE; do for seed in $(seq 0 $LAST); do
    choice=()  # rate and length are chosen once, for the first seed
    [ "$seed" = 0 ] || choice=(--choice "$row-$prior-tuned-seed0")
    on "$number" "$PY" train.py --screen leukemia --init "$row-$prior-seed$seed" "$@" --seed "$seed" --updates $TUNED \
      ${choice[@]+"${choice[@]}"} --name "$row-$prior-tuned-seed$seed" "${TO[@]}"
  done; done
}
printf '\n== training both networks on all priors, %s seeds; their progress is in %s\n' "$SEEDS" "$OUT/$SCALE/*.log"
all_of 0 mappfn "$PAPERS_LINEAR" "$PAPERS" "${PAPERS_IS[@]}" > "$OUT/$SCALE/mappfn.log" 2>&1 & PAPERS_RUN=$!
all_of 1 exchangeable "$LINEAR" "$OURS" "${OURS_IS[@]}" > "$OUT/$SCALE/exchangeable.log" 2>&1 & OURS_RUN=$!
FAILED=''  # neither is left running when this ends
wait $PAPERS_RUN || FAILED="$OUT/$SCALE/mappfn.log"
wait $OURS_RUN || FAILED="$OUT/$SCALE/exchangeable.log"
[ -z "$FAILED" ] || fail "see $FAILED"

# Guidance 1, as in training: a weight above it exaggerates what a knock-out does.
predict() {  # predict SCREEN OPTIONS ROW...: what all trainings of these rows say, in cells of their own
  local screen=$1 options=$2 models=() seed row; shift 2
  for seed in $(seq 0 $LAST); do for row in "$@"; do models+=("$row-seed$seed"); done; done
  run sample.py --screen "$screen" --model "${models[@]}" --guidance 1 $options "${TO[@]}"
}
twins() {  # twins SCREEN OPTIONS ROW...: the same in counterfactual cells; these rows end in -cf
  local screen=$1 options=$2 models=() seed row; shift 2
  for seed in $(seq 0 $LAST); do for row in "$@"; do models+=("$row-cf-seed$seed=$row-seed$seed"); done; done
  run sample.py --screen "$screen" --model "${models[@]}" --guidance 1 --counterfactual --steps 10 $options "${TO[@]}"
}
both() { predict "$@"; twins "$@"; }
simple() { run -m baselines --screen "$1" "${TO[@]}" --methods identity target-only system-mean additive target-gene \
  bilinear-ridge constant-mean observed oracle ${2:+known-graph known-order}; }
if [ "${GENES:-20}" = 20 ]; then
  simple linear graph
  both linear --context-gain mappfn exchangeable
fi
for prior in $PRIORS; do
  simple "$prior"
  both "$prior" "" "mappfn-$prior" "exchangeable-$prior"
done
if [ "$LEUKEMIA" ]; then
  simple leukemia
  for prior in $PRIORS; do
    both leukemia --context-gain "mappfn-$prior" "exchangeable-$prior"
    both leukemia --training "mappfn-$prior" "exchangeable-$prior"
  done
  for prior in $TO_TUNE; do
    both leukemia --context-gain "mappfn-$prior-tuned" "exchangeable-$prior-tuned"
  done
  run answer.py --screen leukemia --model exchangeable-panel-seed0 --steps 10 "${TO[@]}" || echo "no picture of IFNGR2 and JAK2"
fi
run metrics.py "$OUT/$SCALE/samples"
run tables.py --beyond "${TO[@]}"
