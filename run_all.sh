#!/usr/bin/env bash
# Everything, from an empty environment to the report: prior, data, training, sampling, metrics, figures, tables.
#
#   bash run_all.sh [smoke|laptop|paper|test] [--seeds N] [--leukemia FILE] [--melanoma FILE] [--screen FILE] [--out FOLDER]
#   bash run_all.sh paper --dry
#
#   smoke    every stage and every table, on toy sizes: shows that it runs, nothing else. Minutes on two CPU cores.
#   laptop   small networks and few tasks that do learn. An hour or more on two CPU cores.
#   paper    the paper's sizes; wants one 80 GB GPU, some 15 hours of an H100 (estimated).
#   test     installs, and runs the tests.
#   --dry    with paper: one or two of everything at the paper's shapes, without a GPU, and a table of what all would cost.
#   --seeds  trainings of each row. Claims that compare trainings are decided from 3 on; by default there is one (of linear
#            SCMs at paper scale 3). A later call with more seeds adds them to what is there.
# Without a word: paper if there is an NVIDIA GPU, laptop otherwise. FILE is an .h5ad; --screen is a screen of your own. The
# paper's two are downloaded where no file is given, but not at smoke scale; what is missing is left out, and tables say so.
# Finished stages are skipped, interrupted ones go on: start it again after a stop. Seeds count up from 0.
# Environment: PYTHON=python3.11 to install from, DEVICE=cpu|cuda12|cuda13 (default: by nvidia-smi),
# WORKERS=2 processes for the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
fail() { echo "error: $*" >&2; exit 2; }
DEVICE=${DEVICE:-$(if nvidia-smi >/dev/null 2>&1; then echo cuda12; else echo cpu; fi)}
case "$DEVICE" in cpu) SCALE=laptop; export JAX_PLATFORMS=cpu ;; cuda12|cuda13) SCALE=paper ;; *) fail "DEVICE=$DEVICE: expected cpu, cuda12 or cuda13" ;; esac
OUT=out LEUKEMIA='' MELANOMA='' OWN=() SEEDS='' DRY=''
while [ $# -gt 0 ]; do
  case "$1" in
    smoke|laptop|paper|test) SCALE=$1 ;;
    --leukemia|--melanoma|--screen) [ -f "${2:-}" ] || fail "$1 ${2:-}: no such file; give the path of an .h5ad file"
      case "$1" in --leukemia) LEUKEMIA=$2 ;; --melanoma) MELANOMA=$2 ;; *) OWN+=("$2") ;; esac
      shift ;;
    --out) OUT=${2:?--out needs a folder}; shift ;;
    --seeds) [[ "${2:-}" =~ ^[1-9][0-9]?$ ]] || fail "--seeds ${2:-}: expected a number of trainings, such as 3"
      SEEDS=$2; shift ;;
    --dry) DRY=yes ;;
    -h|--help) sed -n '2,21s/^# \{0,1\}//p' run_all.sh; exit 0 ;;
    *) fail "unknown word '$1'; --help shows what there is" ;;
  esac
  shift
done
if [ "$DRY" ]; then
  [ "$SCALE" = paper ] || fail "--dry: only with paper"
  SCALE=dry
fi

# An environment that already has everything is used as it is; otherwise it is made in .venv.
PY=${PYTHON:-python3}
HAS='import importlib.util as u, sys; sys.exit(sys.version_info < (3, 11) or not all(map(u.find_spec, sys.argv[1:])))'
MODULES="jax equinox diffrax optax ott scanpy sergio_rs tyro jaxtyping beartype tqdm matplotlib pytest xdist"
[ "$DEVICE" = cpu ] || MODULES+=" jax_${DEVICE}_plugin"
if ! "$PY" -c "$HAS" $MODULES 2>/dev/null; then
  if ! .venv/bin/python -c "$HAS" $MODULES 2>/dev/null; then
    "$PY" -c "$HAS" || fail "$PY is missing or older than 3.11; install Python 3.11 or set PYTHON=/path/to/it"
    echo "== installing into .venv (a few minutes the first time)"
    "$PY" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt "jax[${DEVICE/#cpu/}]"
  fi
  PY=.venv/bin/python
fi
[ "$SCALE" != test ] || exec "$PY" -m pytest -q -n "${WORKERS:-2}" --dist loadfile tests
[ "$SCALE" != smoke ] || export JAX_DISABLE_MOST_OPTIMIZATIONS=1  # compiling is most of it: five times faster

ROOT=$OUT/$SCALE
mkdir -p "$ROOT/screens"
# What one stage has compiled, however small, the next need not compile again.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$ROOT/.compiled} JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
TO=(--scale "$SCALE" --out "$OUT")
stage() {  # stage TITLE SCRIPT ARGUMENTS...: a banner, the script, and how long it took
  local title=$1 start=$SECONDS; shift
  printf '\n== %s\n   python %s\n' "$title" "$*"
  "$PY" -c "$WATCHED" "$ROOT/memory.csv" "$title" "$PY" "$@" || return $?
  echo "$title,$((SECONDS - start))" >> "$ROOT/times.csv"
}
WATCHED='import resource, subprocess, sys  # run a command, and note its peak memory in kilobytes
file, title, *command = sys.argv[1:]
status = subprocess.call(command)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(f"{title},{peak}", file=open(file, "a"))
sys.exit(status)'
at() { "$PY" -c "import scales; print(scales.at('$SCALE', '$1').get('$2', $3))"; }  # a number of the table of scales

stage "prior: linear SCMs" prior.py linear "${TO[@]}"
stage "prior: GRNs" prior.py grn "${TO[@]}"
stage "prior: unpaired GRNs" prior.py grn --unpaired "${TO[@]}"
stage "prior: panel" prior.py panel "${TO[@]}"

SCREENS=() GENES=$(at real genes 50) MIN_CELLS=$(at real min_cells 200)
prepare() {  # prepare NAME ARGUMENTS...: a screen, and one with twice the genes for test-time augmentation (Figure 3)
  local name=$1 note=$ROOT/screens/$1/not-run.txt; shift
  mkdir -p "$ROOT/screens/$name"
  if stage "data: $name" data.py --name "$name" "$@" "${TO[@]}" 2> "$note"; then
    rm "$note"; SCREENS+=("$name")
    stage "data: $name-wide" data.py --name "$name-wide" "$@" --splits 1 --genes $((2 * GENES)) "${TO[@]}" \
      || echo "   $name-wide is left out: no test-time augmentation"
  else
    { grep '^error: ' "$note" || echo "error: data.py stopped: $(tail -n 1 "$note")"; } | tail -n 1 > "$note.1"
    mv "$note.1" "$note"; cat "$note" >&2
    [[ "$*" != *--h5ad* ]] || exit 1  # a file that was given has to be usable; tables tell why a download is missing
  fi
}
REAL=yes  # are the paper's screens wanted where no file is given?
if [ "$SCALE" = smoke ] || [ "$SCALE" = dry ]; then
  REAL=
  prepare toy --dataset toy
fi
if [ "$LEUKEMIA$REAL" ]; then
  prepare leukemia --dataset leukemia ${LEUKEMIA:+--h5ad "$LEUKEMIA"}
  # Its replicates as systems, where the file tells them apart: several systems of real cells (B.4), for the simple rows.
  if [ -d "$ROOT/screens/leukemia/split-0" ] && stage "data: replicates" data.py --dataset leukemia --name replicates --system-col replicate \
      ${LEUKEMIA:+--h5ad "$LEUKEMIA"} --min-cells $((MIN_CELLS / 2)) "${TO[@]}"; then
    stage "baselines: replicates" -m baselines --screen replicates "${TO[@]}" --methods identity target-only system-mean \
      additive target-gene bilinear-ridge constant-mean observed oracle
  fi
fi
if [ "$MELANOMA$REAL" ]; then
  prepare melanoma --dataset melanoma ${MELANOMA:+--h5ad "$MELANOMA"}
fi
for file in ${OWN[@]+"${OWN[@]}"}; do
  prepare "$(basename "$file" .h5ad)" --h5ad "$file"
done

seeds() { seq 0 $((${SEEDS:-$(at "$1" seeds 1)} - 1)); }  # of the trainings of a section of the table of scales
LINEAR=()
for seed in $(seeds linear); do
  stage "train: linear SCMs, seed $seed" train.py --screen linear --seed "$seed" --name "linear-seed$seed" "${TO[@]}"
  LINEAR+=("mappfn-seed$seed=linear-seed$seed")
done
stage "sample: linear SCMs" sample.py --screen linear --model "${LINEAR[@]}" --context-gain "${TO[@]}"
stage "baselines: linear SCMs" -m baselines --screen linear --seeds "${#LINEAR[@]}" "${TO[@]}"
for seed in $(seeds grn); do
  stage "train: GRNs, seed $seed" train.py --screen grn --seed "$seed" --name "grn-seed$seed" "${TO[@]}"
  stage "train: GRNs, unpaired (Table 4), seed $seed" \
    train.py --screen grn-unpaired --seed "$seed" --name "grn-unpaired-seed$seed" "${TO[@]}"
  stage "train: GRNs, without context (Table 4), seed $seed" \
    train.py --screen grn --context 0 --snapshots 0 --seed "$seed" --name "grn-no-context-seed$seed" "${TO[@]}"
  # Beside the paper's, what we recommend for screens (beyond.sh): another network and prior, and counterfactual cells.
  stage "train: panel, recommended, seed $seed" train.py --screen panel --network exchangeable.Exchangeable \
    --snapshots 0 --seed "$seed" --name "panel-seed$seed" "${TO[@]}"
done
for screen in ${SCREENS[@]+"${SCREENS[@]}"}; do
  MODELS=() RECOMMENDED=()
  for seed in $(seeds grn); do
    RECOMMENDED+=("recommended-seed$seed=panel-seed$seed")
    CHOICE=() CHOICE_TUNED=()  # rate, length and guidance are chosen once, for the first seed
    if [ "$seed" != 0 ]; then
      CHOICE=(--choice "$screen-scratch-seed0") CHOICE_TUNED=(--choice "$screen-finetuned-seed0")
    fi
    stage "train: $screen from random initialisation, seed $seed" train.py --screen "$screen" --seed "$seed" \
      --name "$screen-scratch-seed$seed" ${CHOICE[@]+"${CHOICE[@]}"} "${TO[@]}"
    stage "train: $screen fine-tuning, seed $seed" train.py --screen "$screen" --init "grn-seed$seed" --seed "$seed" \
      --name "$screen-finetuned-seed$seed" ${CHOICE_TUNED[@]+"${CHOICE_TUNED[@]}"} "${TO[@]}"
    MODELS+=("mappfn-random-seed$seed=$screen-scratch-seed$seed" "mappfn-pretrained-seed$seed=grn-seed$seed"
      "mappfn-finetuned-seed$seed=$screen-finetuned-seed$seed" "mappfn-unpaired-seed$seed=grn-unpaired-seed$seed"
      "mappfn-no-context-seed$seed=grn-no-context-seed$seed")
  done
  stage "sample: $screen" sample.py --screen "$screen" --model "${MODELS[@]}" --context-gain "${TO[@]}"
  stage "sample: $screen, recommended" sample.py --screen "$screen" --model "${RECOMMENDED[@]}" --counterfactual \
    --steps 10 --guidance 1 --context-gain "${TO[@]}"
  stage "baselines: $screen" -m baselines --screen "$screen" --seeds $(seeds grn | wc -l) "${TO[@]}"
done
stage "metrics" metrics.py "$ROOT/samples"
stage "figures" figures.py "${TO[@]}"
stage "report" tables.py "${TO[@]}"
[ "$SCALE" != dry ] || stage "costs" costs.py "${TO[@]}"
echo "== all done in $SECONDS s: $ROOT/report.md"
