#!/usr/bin/env bash
# Beyond the paper: what a second network (exchangeable.py) and other priors (prior.py causal, panel) are worth.
#
#   bash beyond.sh [smoke|laptop|paper] [--leukemia FILE] [--genes 20] [--seeds 3] [--out FOLDER]
#
# Both networks are trained on each of five priors for as many seconds, one core each and side by side, and predict held-out
# systems of their prior and, zero-shot, the leukemia screen: its test conditions, and, to choose one by, its training
# conditions, each from the others. The second network is also fine-tuned on it, and tried on linear SCMs. The report,
# <out>/<scale>/report.md, has a table for each screen and the comparisons of claims.py; <out> is out/beyond, or
# out/beyond-50 with --genes 50. Laptop scale: three hours on two CPU cores, for 20 genes and three seeds. FILE is an
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
case "$SCALE" in  # updates that take both networks as many seconds of one core (the second's: scales.py); linear SCMs; fine-tuning
  smoke) PAPERS=20 LINEAR=20 TUNED=8 ;;
  laptop) PAPERS=3200 LINEAR=9000 TUNED=200; [ "${GENES:-20}" -le 20 ] || OURS=400 ;;
  paper) PAPERS=50000 LINEAR=50000 TUNED=375 ;;  # not tried
esac
PRIORS="panel causal grn grn-unpaired grn-unpaired-redrawn"
OURS_IS=(--network exchangeable.Exchangeable --snapshots 0)

run prior.py linear "${TO[@]}"
# More cells of a condition than a task has: of 100 cells that were standardised together each gene would have the very
# same mean and spread in every task, which those of the test have not.
run prior.py linear --seed 1 --systems 1000 --population 500 --name linear-many "${TO[@]}"
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
papers() {
  for seed in $(seq 0 $LAST); do for prior in $PRIORS; do
    on 0 "$PY" train.py --screen "$prior" --updates $PAPERS --no-knock-out 0.1 --snapshots 0 --seed "$seed" \
      --name "mappfn-$prior-seed$seed" "${TO[@]}"
  done; done
}
ours() {
  for seed in $(seq 0 $LAST); do for prior in $PRIORS; do
    on 1 "$PY" train.py --screen "$prior" ${OURS:+--updates $OURS} "${OURS_IS[@]}" --seed "$seed" \
      --name "exchangeable-$prior-seed$seed" "${TO[@]}"
  done; done
  for seed in $(seq 0 $LAST); do
    on 1 "$PY" train.py --screen linear-many --fresh 500 --updates $LINEAR "${OURS_IS[@]}" --seed "$seed" \
      --name "exchangeable-seed$seed" "${TO[@]}"
  done
}
printf '\n== training both networks on all priors, %s seeds; their progress is in %s\n' "$SEEDS" "$OUT/$SCALE/*.log"
papers > "$OUT/$SCALE/mappfn.log" 2>&1 & PAPERS_RUN=$!
ours > "$OUT/$SCALE/exchangeable.log" 2>&1 || fail "see $OUT/$SCALE/exchangeable.log"
wait $PAPERS_RUN || fail "see $OUT/$SCALE/mappfn.log"

# Guidance 1: on training treatments of the leukemia screen, left out in turn, it had the least RMSE of 1, 1.5 and 2.
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
simple() { run -m baselines --screen "$1" "${TO[@]}" --methods identity target-only system-mean additive target-gene \
  bilinear-ridge constant-mean observed oracle ${2:+known-graph known-order}; }
simple linear graph
predict linear --context-gain exchangeable
twins linear --context-gain exchangeable
for prior in $PRIORS; do
  simple "$prior"
  predict "$prior" "" "mappfn-$prior" "exchangeable-$prior"
  twins "$prior" "" "mappfn-$prior" "exchangeable-$prior"
done
if [ "$LEUKEMIA" ]; then
  simple leukemia
  for seed in $(seq 0 $LAST); do
    CHOICE=()  # rate and length are chosen once, for the first seed
    [ "$seed" = 0 ] || CHOICE=(--choice exchangeable-panel-tuned-seed0)
    run train.py --screen leukemia --init "exchangeable-panel-seed$seed" "${OURS_IS[@]}" --seed "$seed" --updates $TUNED \
      ${CHOICE[@]+"${CHOICE[@]}"} --name "exchangeable-panel-tuned-seed$seed" "${TO[@]}"
  done
  for prior in $PRIORS; do
    predict leukemia --context-gain "mappfn-$prior" "exchangeable-$prior"
    twins leukemia --context-gain "mappfn-$prior" "exchangeable-$prior"
    predict leukemia --training "mappfn-$prior" "exchangeable-$prior"
    twins leukemia --training "mappfn-$prior" "exchangeable-$prior"
  done
  predict leukemia --context-gain exchangeable-panel-tuned
  twins leukemia --context-gain exchangeable-panel-tuned
  run answer.py --screen leukemia --model exchangeable-panel-seed0 --steps 10 "${TO[@]}" || echo "no picture of IFNGR2 and JAK2"
fi
run metrics.py "$OUT/$SCALE/samples"
run tables.py --beyond "${TO[@]}"
