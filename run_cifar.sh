#!/usr/bin/env bash
# Train a classifier by each method, attack them all, and print a table of accuracies.
#
#     bash run_cifar.sh                CIFAR-10 in $CIFAR10_DIR or data/; 163 MB to download
#     bash run_cifar.sh --synthetic    the embedded data set: no download
#     bash run_cifar.sh --seed 1       with any flags of `l2l_adv.py train`
#
# The same command again goes on after the last finished epoch. Environment variables:
#     METHODS      default "plain advtrain trades rnn-adv rnn-trades"
#     OUT          folder of the runs; the default is named after the flags: runs/cifar10-seed-1
#     TEST_LIMIT   number of test images; default 500, with CUDA all

[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@" # sh may be another shell
set -euo pipefail
fail() { echo "run_cifar.sh: $1" >&2 && exit "${2-2}"; }
trap 'fail "stopped; the same command goes on from here" 130' INT
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
dataset=cifar10
[[ ${1-} != --synthetic ]] || { dataset=synthetic && shift; }
case " $*" in
    *" -h"* | *" --help"*) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
    *" --o"* | *" --me"* | *" --data-"*) fail "set OUT, METHODS or CIFAR10_DIR instead" ;;
esac
name=$(printf %s "$dataset $*" | tr -cs 'A-Za-z0-9.' '-')
OUT=${OUT:-runs/${name%-}}
methods=(${METHODS:-plain advtrain trades rnn-adv rnn-trades})

python=python3
if ! python3 -c 'import numpy, torch' 2>/dev/null; then
    python=$here/.venv/bin/python
    echo "Installing torch and numpy in $here/.venv, because python3 lacks them"
    python3 -m venv "$here/.venv" && "$python" -m pip install --quiet torch numpy ||
        fail "this takes a network and python3-venv; or install torch and numpy yourself"
fi
flags=(--dataset "$dataset")
evaluation=(eval)
jobs=1
if "$python" -c 'import sys, torch; sys.exit(torch.cuda.is_available())'; then
    jobs=2
    flags+=(--model small --epochs 3 --steps 5)
    [[ $dataset == synthetic ]] || flags+=(--limit 38000)
    evaluation+=(--attacks pgd-100,cw-100,learned-10)
    TEST_LIMIT=${TEST_LIMIT:-500}
fi
flags+=("$@")

mkdir -p "$OUT" && true >"$OUT/.failed" || exit 2
echo "${#methods[@]} methods, $jobs at a time, into $OUT. By default, CIFAR-10 takes about 12"\
    "minutes on two cores, --synthetic a minute. CUDA was not timed yet."
# glibc keeps freed memory: some CPUs are up to 1.6 times faster.
export MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_MMAP_THRESHOLD_=1073741824
export python here OUT
train_one() { # by method $1, which labels each line
    "$python" "$here/l2l_adv.py" train "${@:2}" --method "$1" --out "$OUT/$1" --resume 2>&1 |
        while IFS= read -r line; do printf '%-12s%s\n' "$1" "$line"; done || echo "$1" >>"$OUT/.failed"
}
export -f train_one
