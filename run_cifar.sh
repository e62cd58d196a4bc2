#!/usr/bin/env bash
# From a fresh machine to the table: trains a classifier by each method, attacks them all, prints accuracies.
#
#     bash run_cifar.sh                CIFAR-10, downloaded to data/ (163 MB) if it is not there
#     bash run_cifar.sh --synthetic    the embedded data set: nothing is downloaded
#
# Settings are environment variables, as in  EPOCHS=3 MODEL=vgg16 bash run_cifar.sh
#     METHODS      default "plain advtrain trades rnn-adv rnn-trades"; there is also advtrain-bls
#     MODEL        small, vgg16, resnet18, wrn34       default vgg16 with CUDA, else small
#     EPOCHS       passes over the training images     default 30 with CUDA, else 3
#     LIMIT        training images, 0 for all          default 5000 for CIFAR-10 without CUDA, else 0
#     TEST_LIMIT   test images, 0 for all              default 0 with CUDA, else 500 (synthetic: 300)
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
    '') dataset=cifar10 ;;
    --synthetic) dataset=synthetic ;;
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
METHODS=${METHODS:-plain advtrain trades rnn-adv rnn-trades} SEED=${SEED:-0}
if [[ $dataset == synthetic ]]; then
    MODEL=${MODEL:-small} EPOCHS=${EPOCHS:-3} LIMIT=${LIMIT:-0} TEST_LIMIT=${TEST_LIMIT:-300}
elif [[ $cuda == 1 ]]; then
    MODEL=${MODEL:-vgg16} EPOCHS=${EPOCHS:-30} LIMIT=${LIMIT:-0} TEST_LIMIT=${TEST_LIMIT:-0}
else
    MODEL=${MODEL:-small} EPOCHS=${EPOCHS:-3} LIMIT=${LIMIT:-5000} TEST_LIMIT=${TEST_LIMIT:-500}
fi
OUT=${OUT:-runs/$dataset-$MODEL-n$LIMIT-e$EPOCHS-s$SEED}
limit=() test_limit=()
[[ $LIMIT == 0 ]] || limit=(--limit "$LIMIT")
[[ $TEST_LIMIT == 0 ]] || test_limit=(--limit "$TEST_LIMIT")
# glibc is to keep freed memory: on a CPU all training is up to 1.6 times faster (results/cost.md)
export MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_MMAP_THRESHOLD_=1073741824

# ---- Train by each method, and evaluate what was trained -------------------------------------------------------------
trained=() failed=()
for method in $METHODS; do
    status=0
    "$python" "$here/l2l_adv.py" train --method "$method" --dataset "$dataset" --model "$MODEL" --epochs "$EPOCHS" \
        --seed "$SEED" ${limit[@]+"${limit[@]}"} --out "$OUT/$method" --resume || status=$?
    ((status != 2)) || exit 2  # a mistake in the settings or the data: the other methods would say the same
    if ((status == 0)); then trained+=("$OUT/$method"); else failed+=("$method"); fi
done
if ((${#trained[@]})); then
    "$python" "$here/l2l_adv.py" eval "${trained[@]}" ${test_limit[@]+"${test_limit[@]}"}
fi
for method in ${failed[@]+"${failed[@]}"}; do
    echo "$method failed: see above"
done
((${#failed[@]} == 0))
