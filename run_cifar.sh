#!/usr/bin/env bash
# From a fresh machine to the table: trains a classifier by each method, attacks them all, prints accuracies.
#
#     bash run_cifar.sh                CIFAR-10, downloaded to data/ (163 MB) if it is not there
#     bash run_cifar.sh --synthetic    the embedded data set: nothing is downloaded
#
# Settings are environment variables, as in  EPOCHS=3 MODEL=vgg16 bash run_cifar.sh
#     METHODS      default "plain advtrain trades rnn-adv rnn-trades"; more: in the README
#     MODEL        as in the README                    default vgg16 with CUDA, else small
#     STEPS        T, steps of the attack in training  default 10 with CUDA, as in the paper, else 5
#     EPOCHS       passes over the training images     default 30 with CUDA, else 3
#     LIMIT        training images at most             default 38000 for CIFAR-10 without CUDA, else all
#     TEST_LIMIT   test images at most                 default all with CUDA, else 500
#     JOBS         methods trained at the same time    default 1 with CUDA, else 2, which share the cores
#     SEED         of everything random                default 0
#     OUT          folder of the runs                  default runs/ and a name made of the settings
#     CIFAR10_DIR  where CIFAR-10 lies                 default data/
# Stopped and started again with the same settings, it goes on after the last finished epoch.
set -euo pipefail
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
fail() { echo "run_cifar.sh: $*" >&2; exit 2; }
trap 'echo "run_cifar.sh: stopped; the same command again goes on from here" >&2; exit 130' INT

(($# <= 1)) || fail "settings are environment variables: see --help"
case ${1-} in
    '') dataset=cifar10 all=49000 some=38000 ;;
    --synthetic) dataset=synthetic all=3200 some=3200 ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
    *) fail "unknown option $1: see --help" ;;
esac

# ---- Python with torch and numpy: the one at hand, else one of our own -----------------------------------------------
python=python3 venv=$here/.venv
has_cuda() { "$python" -c 'import numpy, torch; print(int(torch.cuda.is_available()))'; }  # fails without the two
if ! cuda=$(has_cuda 2>/dev/null); then
    python=$venv/bin/python
    if ! cuda=$(has_cuda 2>/dev/null); then
        echo "Installing torch and numpy into $venv (some minutes)"
        python3 -m venv "$venv" || fail "could not make $venv: install python3-venv, or torch and numpy yourself"
        "$python" -m pip install --quiet torch numpy || fail "could not install torch and numpy: is there a network?"
        cuda=$(has_cuda)
    fi
fi

# ---- Settings --------------------------------------------------------------------------------------------------------
METHODS=${METHODS:-plain advtrain trades rnn-adv rnn-trades} SEED=${SEED:-0} JOBS=${JOBS:-$((2 - cuda))}
if [[ $cuda == 1 ]]; then
    MODEL=${MODEL:-vgg16} STEPS=${STEPS:-10} EPOCHS=${EPOCHS:-30} LIMIT=${LIMIT:-$all} TEST_LIMIT=${TEST_LIMIT:-10000}
else
    MODEL=${MODEL:-small} STEPS=${STEPS:-5} EPOCHS=${EPOCHS:-3} LIMIT=${LIMIT:-$some} TEST_LIMIT=${TEST_LIMIT:-500}
fi
OUT=${OUT:-runs/$dataset-$MODEL-t$STEPS-n$LIMIT-e$EPOCHS-s$SEED}
[[ "$STEPS $EPOCHS $LIMIT $TEST_LIMIT $JOBS" =~ ^[1-9][0-9]*(\ [1-9][0-9]*){4}$ ]] ||
    fail "STEPS, EPOCHS, LIMIT, TEST_LIMIT and JOBS are whole numbers from 1 up"
set -- $METHODS
((JOBS <= $#)) || JOBS=$#
cores=$(getconf _NPROCESSORS_ONLN) threads=$(((cores + JOBS - 1) / JOBS))
# glibc is to keep freed memory: on a CPU advtrain was up to 1.6 times faster (results/cost.md)
export MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_MMAP_THRESHOLD_=1073741824

# ---- Train by each method, JOBS at a time; evaluate what was trained -------------------------------------------------
costs=$(OMP_NUM_THREADS=$threads "$python" "$here/results/bench.py" --dataset "$dataset" --model "$MODEL" \
    --steps "$STEPS" --methods "${METHODS// /,}" --batch-size 64 --rounds 2 --json) || exit 2
total='sum(method["ms_per_image"] for method in json.load(sys.stdin)["methods"].values())'
us=$("$python" -c "import json, sys; print(round(1000 * $total))" <<<"$costs")  # per image, by all methods
echo "Training takes about $((1 + us * LIMIT * EPOCHS / JOBS / 55000000)) min from the start; then come the attacks."
mkdir -p "$OUT" && export failed=$OUT/.failed && : >"$failed"  # the names of the methods that fail
reversed=  # so the longest come first
for method; do reversed="$method${reversed:+$'\n'$reversed}"; done
labelled='"${@:2}" 2>&1 | while IFS= read -r line; do printf "%-12s%s\n" "$1" "$line"; done || echo "$1" >>"$failed"'
OMP_NUM_THREADS=$threads xargs -P "$JOBS" -I{} bash -o pipefail -c "$labelled" _ {} \
    "$python" "$here/l2l_adv.py" train --method {} --out "$OUT/{}" --dataset "$dataset" --model "$MODEL" \
    --steps "$STEPS" --epochs "$EPOCHS" --limit "$LIMIT" --seed "$SEED" --resume <<<"$reversed"
trained=()
for method; do grep -qx -- "$method" "$failed" || trained+=("$OUT/$method"); done
((${#trained[@]} == 0)) || "$python" "$here/l2l_adv.py" eval "${trained[@]}" --limit "$TEST_LIMIT" --quick
sed 's/$/ failed: see above/' "$failed"
[[ ! -s $failed ]]
