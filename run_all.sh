#!/usr/bin/env bash
# Everything, from an empty environment to the report: prior -> data -> training -> sampling -> metrics -> figures, tables.
#
#   bash run_all.sh [smoke|laptop|paper|test] [--leukemia FILE.h5ad] [--melanoma FILE.h5ad] [--out FOLDER]
#
#   smoke    every stage and every table, on toy sizes: shows that it runs, nothing else. Minutes on two CPU cores.
#   laptop   small networks and few tasks that do learn. An hour on two CPU cores.
#   paper    the paper's sizes; wants one 80 GB GPU, days of it. Downloads both data sets unless files are given.
#   test     installs, and runs the tests.
# Without a word: paper if JAX sees an accelerator, laptop otherwise.
#
# The screens are downloaded at laptop scale too, unless files are given; what is missing is left out and the tables say so.
# Finished stages are skipped, interrupted ones go on: start it again after a stop. All seeds are 0 unless a script is told.
# Environment: PYTHON=python3.11 to install from, DEVICE=cpu|cuda12|cuda13 (default: by nvidia-smi), WORKERS=2.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() { sed -n '2,16s/^# \{0,1\}//p' run_all.sh; }
fail() { echo "error: $*" >&2; exit 2; }
SCALE= LEUKEMIA= MELANOMA= OUT=out
while [ $# -gt 0 ]; do
  case "$1" in
    smoke|laptop|paper|test) [ -z "$SCALE" ] || fail "two scales: $SCALE and $1"; SCALE=$1 ;;
    --leukemia|--melanoma|--out) [ $# -gt 1 ] || fail "$1 needs a value"
      case "$1" in --leukemia) LEUKEMIA=$2 ;; --melanoma) MELANOMA=$2 ;; --out) OUT=$2 ;; esac; shift ;;
    -h|--help) usage; exit 0 ;;
    *) usage >&2; fail "unknown word '$1'" ;;
  esac
  shift
done
for file in "$LEUKEMIA" "$MELANOMA"; do
  [ -z "$file" ] || [ -f "$file" ] || fail "$file: no such file; give the path of an .h5ad file"
done

# ---------------------------------------------------------------------------------------------------------- installation
# An environment that already has everything is used as it is: the active one, or .venv from an earlier run.

MODULES="jax equinox diffrax optax ott numpy scipy scanpy anndata sergio_rs tyro jaxtyping beartype tqdm matplotlib pytest xdist"
complete() {
  "$1" -c 'import importlib.util as u, sys
sys.exit(sys.version_info < (3, 11) or any(u.find_spec(m) is None for m in sys.argv[1:]))' $MODULES 2>/dev/null
}
if [ -z "${DEVICE:-}" ]; then
  DEVICE=cpu
  if cuda=$(nvidia-smi 2>/dev/null | grep -o 'CUDA Version: [0-9]*' | grep -o '[0-9]*$'); then
    DEVICE=cuda12; [ "$cuda" -lt 13 ] || DEVICE=cuda13
  fi
fi
case "$DEVICE" in cpu|cuda12|cuda13) ;; *) fail "DEVICE=$DEVICE: expected cpu, cuda12 or cuda13" ;; esac
VENV_PYTHON=.venv/bin/python
if complete "${PYTHON:-python3}"; then
  PY=${PYTHON:-python3}
else
  PY=$VENV_PYTHON
  if ! complete "$PY"; then
    echo "== installing into .venv (a few minutes the first time)"
    if command -v uv >/dev/null; then
      [ -x "$PY" ] || uv venv --quiet --python "${PYTHON:-3.11}" .venv
      uv pip install --quiet --compile-bytecode --python "$PY" -r requirements.txt
    else
      "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
        || fail "${PYTHON:-python3} is missing or older than 3.11; install Python 3.11 or set PYTHON=/path/to/it"
      [ -x "$PY" ] || "${PYTHON:-python3}" -m venv .venv
      "$PY" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    fi
  fi
fi
if [ "$DEVICE" != cpu ] && ! "$PY" -c "import jax_${DEVICE}_plugin" 2>/dev/null; then
  echo "== installing JAX for $DEVICE"
  if command -v uv >/dev/null; then uv pip install --quiet --compile-bytecode --python "$PY" "jax[$DEVICE]"
  else "$PY" -m pip install --quiet --disable-pip-version-check "jax[$DEVICE]"; fi
fi
[ "$DEVICE" != cpu ] || export JAX_PLATFORMS=cpu
BACKEND=$("$PY" -c 'import jax; print(jax.default_backend(), *jax.devices())') || fail "JAX does not start; see above"
echo "== $("$PY" --version), JAX devices: $BACKEND"
case "$DEVICE $BACKEND" in cuda*cpu*) fail "DEVICE=$DEVICE, but JAX sees no GPU; check the driver, or set DEVICE=cpu" ;; esac
if [ -z "$SCALE" ]; then case "$BACKEND" in cpu*) SCALE=laptop ;; *) SCALE=paper ;; esac; fi

if [ "$SCALE" = smoke ]; then export JAX_DISABLE_MOST_OPTIMIZATIONS=1; fi  # compiling is most of it: five times faster
if [ "$SCALE" = test ]; then exec "$PY" -m pytest -q -n "${WORKERS:-2}" --dist loadfile tests; fi

# ---------------------------------------------------------------------------------------------------------------- stages

ROOT=$OUT/$SCALE
mkdir -p "$ROOT" || fail "$ROOT: cannot be written; give another --out"
echo "== scale $SCALE, results in $ROOT, revision $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
# What one stage has compiled, however small, the next need not compile again: a stage of the smoke scale takes half the time.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$ROOT/.compiled} JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
BEGIN=$SECONDS
stage() {  # stage TITLE EXPECTED-TIME SCRIPT ARGUMENTS...: a banner, the script, and how long it took
  local title=$1 expected=$2 start=$SECONDS; shift 2
  printf '\n== %s (expect %s at laptop scale)\n   python %s\n' "$title" "$expected" "$*"
  "$PY" "$@" || return $?
  echo "$title,$((SECONDS - start))" >> "$ROOT/times.csv"
  echo "== $title: $((SECONDS - start)) s"
}
at() { "$PY" -c "import scales; print(scales.at('$SCALE', '$1')['$2'])"; }  # a number of the table of scales

stage "prior: GRNs" "2 min" prior.py --scale "$SCALE" --out "$ROOT/prior" --workers "${WORKERS:-2}"
stage "prior: unpaired GRNs" "2 min" prior.py --unpaired --scale "$SCALE" --out "$ROOT/prior-unpaired" --workers "${WORKERS:-2}"

SCREENS=
prepare() {  # prepare DATASET FILE: split and normalise a screen; one that cannot be had is left out, and the tables say why
  local note=$ROOT/data/$1/not-run.txt file=()
  [ -z "$2" ] || file=(--h5ad "$2")
  mkdir -p "$ROOT/data/$1"
  if stage "data: $1" "20 s" data.py --dataset "$1" --scale "$SCALE" --out "$OUT" ${file[@]+"${file[@]}"} 2> "$note"; then
    rm -f "$note"; SCREENS="$SCREENS $1"
    # twice the genes, one split: for test-time augmentation (Figure 3)
    "$PY" data.py --dataset "$1" --name "$1-wide" --scale "$SCALE" --out "$OUT" ${file[@]+"${file[@]}"} --splits 1 \
      --genes $((2 * $(at real genes)))
    # replicates as contexts, where the file tells them apart: several contexts of real cells (B.4), for the simple rows
    if [ "$1" = leukemia ] && "$PY" data.py --dataset leukemia --name replicates --context-col replicate --scale "$SCALE" --out "$OUT" \
      ${file[@]+"${file[@]}"} --context 2 --min-cells $(($(at real min_cells) / 2)); then
      stage "baselines: replicates" "20 s" -m baselines replicates --scale "$SCALE" --out "$OUT" --context 2 --methods identity \
        target-only context-mean additive target-gene bilinear-ridge constant-mean observed oracle
    fi
  else
    cat "$note" >&2
    [ -z "$2" ] || exit 1  # a file that was given has to be usable
    echo "   $1 is left out; give its file with --$1 FILE.h5ad"
  fi
}
if [ "$SCALE" = smoke ]; then
  prepare toy ""
  for name in leukemia melanoma; do
    mkdir -p "$ROOT/data/$name"; echo "no file was given, and the smoke scale downloads nothing" > "$ROOT/data/$name/not-run.txt"
  done
  [ -z "$LEUKEMIA" ] || prepare leukemia "$LEUKEMIA"
  [ -z "$MELANOMA" ] || prepare melanoma "$MELANOMA"
else
  prepare leukemia "$LEUKEMIA"
  prepare melanoma "$MELANOMA"
fi

for seed in $(seq 0 $(($(at evaluate seeds) - 1))); do
  stage "train: linear SCMs, seed $seed" "3 min" train.py linear --scale "$SCALE" --seed "$seed" --out "$OUT"
done
SNAPSHOTS=$(at figures snapshots)
stage "train: GRNs" "7 min" train.py grn --scale "$SCALE" --out "$OUT" --snapshots "$SNAPSHOTS"
stage "train: GRNs, unpaired (Table 4)" "7 min" train.py grn --unpaired --scale "$SCALE" --out "$OUT" --snapshots "$SNAPSHOTS"
stage "train: GRNs, without context (Table 4)" "4 min" train.py grn --context 0 --name grn-no-context --scale "$SCALE" --out "$OUT"
for screen in $SCREENS; do
  stage "train: $screen from random initialisation" "2 min" train.py scratch --dataset "$screen" --scale "$SCALE" --out "$OUT"
  stage "train: $screen fine-tuning" "2 min" train.py finetune --dataset "$screen" --scale "$SCALE" --out "$OUT"
done
for experiment in linear $SCREENS; do
  stage "sample: $experiment" "1 to 4 min" sample.py "$experiment" --scale "$SCALE" --out "$OUT"
  stage "baselines: $experiment" "1 to 9 min" -m baselines "$experiment" --scale "$SCALE" --out "$OUT"
done
stage "metrics" "2 min" metrics.py "$ROOT/samples"
stage "figures" "6 min" figures.py --scale "$SCALE" --out "$OUT"
stage "report" "20 s" tables.py --scale "$SCALE" --out "$OUT"
echo "== all done in $((SECONDS - BEGIN)) s: $ROOT/report.md"
