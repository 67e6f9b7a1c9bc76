#!/usr/bin/env bash
# Everything, from an empty environment to the report: prior, data, training, sampling, metrics, figures, tables.
#
#   bash run_all.sh [smoke|laptop|paper|test] [--leukemia FILE] [--melanoma FILE] [--screen FILE] [--out FOLDER]
#
#   smoke    every stage and every table, on toy sizes: shows that it runs, nothing else. Minutes on two CPU cores.
#   laptop   small networks and few tasks that do learn. Under an hour on two CPU cores.
#   paper    the paper's sizes; wants one 80 GB GPU, days of it.
#   test     installs, and runs the tests.
# Without a word: paper if there is an NVIDIA GPU, laptop otherwise. FILE is an .h5ad; --screen is a screen of your own. The
# paper's two are downloaded where no file is given, but not at smoke scale; what is missing is left out, and tables say so.
# Finished stages are skipped, interrupted ones go on: start it again after a stop. All seeds are 0.
# Environment: PYTHON=python3.11 to install from, DEVICE=cpu|cuda12|cuda13 (default: by nvidia-smi),
# WORKERS=2 processes for the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
fail() { echo "error: $*" >&2; exit 2; }
DEVICE=${DEVICE:-$(if nvidia-smi >/dev/null 2>&1; then echo cuda12; else echo cpu; fi)}
case "$DEVICE" in cpu) SCALE=laptop; export JAX_PLATFORMS=cpu ;; cuda12|cuda13) SCALE=paper ;; *) fail "DEVICE=$DEVICE: expected cpu, cuda12 or cuda13" ;; esac
OUT=out LEUKEMIA='' MELANOMA='' OWN=()
while [ $# -gt 0 ]; do
  case "$1" in
    smoke|laptop|paper|test) SCALE=$1 ;;
    --leukemia|--melanoma|--screen) [ -f "${2:-}" ] || fail "$1 ${2:-}: no such file; give the path of an .h5ad file"
      case "$1" in --leukemia) LEUKEMIA=$2 ;; --melanoma) MELANOMA=$2 ;; *) OWN+=("$2") ;; esac
      shift ;;
    --out) OUT=${2:?--out needs a folder}; shift ;;
    -h|--help) sed -n '2,16s/^# \{0,1\}//p' run_all.sh; exit 0 ;;
    *) fail "unknown word '$1'; --help shows what there is" ;;
  esac
  shift
done

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
  "$PY" "$@" || return $?
  echo "$title,$((SECONDS - start))" >> "$ROOT/times.csv"
}
at() { "$PY" -c "import scales; print(scales.at('$SCALE', '$1').get('$2', $3))"; }  # a number of the table of scales

stage "prior: linear SCMs" prior.py linear "${TO[@]}"
stage "prior: GRNs" prior.py grn "${TO[@]}"
stage "prior: unpaired GRNs" prior.py grn --unpaired "${TO[@]}"

SCREENS=() GENES=$(at real genes 50) MIN_CELLS=$(at real min_cells 200)
prepare() {  # prepare NAME ARGUMENTS...: a screen, and one with twice the genes for test-time augmentation (Figure 3)
  local name=$1 note=$ROOT/screens/$1/not-run.txt; shift
  mkdir -p "$ROOT/screens/$name"
  if stage "data: $name" data.py --name "$name" "$@" "${TO[@]}" 2> "$note"; then
    rm "$note"; SCREENS+=("$name")
    stage "data: $name-wide" data.py --name "$name-wide" "$@" --splits 1 --genes $((2 * GENES)) "${TO[@]}" \
      || echo "   $name-wide is left out: no test-time augmentation"
  else
    grep '^error: ' "$note" | tail -n 1 > "$note.1"; mv "$note.1" "$note"; cat "$note" >&2
    [[ "$*" != *--h5ad* ]] || exit 1  # a file that was given has to be usable; tables tell why a download is missing
  fi
}
[ "$SCALE" != smoke ] || prepare toy --dataset toy
if [ -n "$LEUKEMIA" ] || [ "$SCALE" != smoke ]; then
  prepare leukemia --dataset leukemia ${LEUKEMIA:+--h5ad "$LEUKEMIA"}
  # Its replicates as systems, where the file tells them apart: several systems of real cells (B.4), for the simple rows.
  if [ -d "$ROOT/screens/leukemia/split-0" ] && stage "data: replicates" data.py --dataset leukemia --name replicates --system-col replicate \
      ${LEUKEMIA:+--h5ad "$LEUKEMIA"} --min-cells $((MIN_CELLS / 2)) "${TO[@]}"; then
    stage "baselines: replicates" -m baselines --screen replicates "${TO[@]}" --methods identity target-only system-mean \
      additive target-gene bilinear-ridge constant-mean observed oracle
  fi
fi
if [ -n "$MELANOMA" ] || [ "$SCALE" != smoke ]; then
  prepare melanoma --dataset melanoma ${MELANOMA:+--h5ad "$MELANOMA"}
fi
for file in ${OWN[@]+"${OWN[@]}"}; do
  prepare "$(basename "$file" .h5ad)" --h5ad "$file"
done

LINEAR=()
for seed in $(seq 0 $(($(at linear seeds 1) - 1))); do
  stage "train: linear SCMs, seed $seed" train.py --screen linear --seed "$seed" --name "linear-seed$seed" "${TO[@]}"
  LINEAR+=("mappfn-seed$seed=linear-seed$seed")
done
stage "train: GRNs" train.py --screen grn "${TO[@]}"
stage "train: GRNs, unpaired (Table 4)" train.py --screen grn-unpaired "${TO[@]}"
stage "train: GRNs, without context (Table 4)" train.py --screen grn --context 0 --name grn-no-context --snapshots 0 "${TO[@]}"
stage "sample: linear SCMs" sample.py --screen linear --model "${LINEAR[@]}" "${TO[@]}"
stage "baselines: linear SCMs" -m baselines --screen linear "${TO[@]}"
for screen in ${SCREENS[@]+"${SCREENS[@]}"}; do
  stage "train: $screen from random initialisation" train.py --screen "$screen" --name "$screen-scratch" "${TO[@]}"
  stage "train: $screen fine-tuning" train.py --screen "$screen" --init grn --name "$screen-finetuned" "${TO[@]}"
  stage "sample: $screen" sample.py --screen "$screen" --model mappfn-random="$screen-scratch" mappfn-pretrained=grn \
    mappfn-finetuned="$screen-finetuned" mappfn-unpaired=grn-unpaired mappfn-no-context=grn-no-context "${TO[@]}"
  stage "baselines: $screen" -m baselines --screen "$screen" "${TO[@]}"
done
stage "metrics" metrics.py "$ROOT/samples"
stage "figures" figures.py "${TO[@]}"
stage "report" tables.py "${TO[@]}"
echo "== all done in $SECONDS s: $ROOT/report.md"
