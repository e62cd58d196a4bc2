#!/usr/bin/env bash
# Train a classifier by each method, attack them all, and print a table of accuracies.
#
#     bash run_cifar.sh                CIFAR-10 in $CIFAR10_DIR, or downloaded to data/ (162 MB)
#     bash run_cifar.sh --synthetic    the embedded data set: no download
#     bash run_cifar.sh --seed 1       with any flags of `l2l_adv.py train`
# The same command goes on after the last finished epoch. Environment variables:
#     METHODS      default "plain advtrain trades rnn-adv rnn-trades"
#     OUT          folder of the runs; the default is named after the flags: runs/cifar10-seed-1
#     TEST_LIMIT   number of test images; default 500, with CUDA all

[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@" # sh may be another shell
set -euo pipefail
fail() { echo "run_cifar.sh: $1" >&2; exit 2; }
trap 'echo "run_cifar.sh: stopped; the same command goes on from here" >&2; exit 130' INT
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
dataset=cifar10
[[ ${1-} != --synthetic ]] || { dataset=synthetic; shift; }
[[ " $*" != *" -h"* && " $*" != *" --h"* ]] || { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit; }
! grep -qE -e ' --(o|me|data-)' <<<" $*" || fail "set OUT, METHODS or CIFAR10_DIR instead"
OUT=${OUT:-runs/$(printf %s "$dataset${*:+ $*}" | tr -cs 'A-Za-z0-9.' '-')}
methods=(${METHODS:-plain advtrain trades rnn-adv rnn-trades})
set -- --dataset "$dataset" "$@"

python=python3
if ! python3 -c 'import numpy, torch' 2>/dev/null; then
    python=$here/.venv/bin/python
    echo "python3 lacks torch or numpy, so $here/.venv is used. Making it takes minutes."
    python3 -m venv "$here/.venv" && "$python" -m pip install --quiet torch numpy ||
        fail "that failed: install torch and numpy yourself, then run this again"
fi
jobs=1
eval_flags=${TEST_LIMIT:+--limit $TEST_LIMIT}
if [[ $("$python" -c 'import torch; print(torch.cuda.is_available())') == False ]]; then
    jobs=2
    set -- --model small --steps 4 $([[ $dataset == synthetic ]] || echo --epochs 2) "$@"
    eval_flags="--attacks pgd-20,cw-20,learned-10 --limit ${TEST_LIMIT:-500}"
fi

mkdir -p "$OUT" && true >"$OUT/.failed" || exit 2
echo "Methods: ${#methods[@]}. Folder: $OUT. On two cores the default takes 20 to 40 minutes," \
    "--synthetic one to three. Nobody has timed it with CUDA."
train_one() { # by method $1, with the flags that follow; its name begins each line
    "$python" "$here/l2l_adv.py" train "${@:2}" --method "$1" --out "$OUT/$1" --resume 2>&1 |
        while IFS= read -r line; do printf '%-12s%s\n' "$1" "$line"; done ||
        echo "$1 failed with status $?: see above" >>"$OUT/.failed"
}
export -f train_one
# With these, glibc keeps freed memory: some CPUs are up to 1.6 times faster.
export MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_MMAP_THRESHOLD_=1073741824 python here OUT
export OMP_NUM_THREADS=$((($(getconf _NPROCESSORS_ONLN) + 1) / 2))
train_one "${methods[0]}" "$@" # alone: it downloads the data and notices mistakes in the flags
! grep -q "status 2" "$OUT/.failed" || exit 2
for ((i = ${#methods[@]} - 1; i > 0; i--)); do echo "${methods[i]}"; done | # the longest first
    xargs -P "$jobs" -I{} "$BASH" -o pipefail -c 'train_one "$@"' _ {} "$@"
runs=()
for m in "${methods[@]}"; do grep -q "^$m failed" "$OUT/.failed" || runs+=("$OUT/$m"); done
[[ ${#runs[@]} == 0 ]] || "$python" "$here/l2l_adv.py" eval "${runs[@]}" $eval_flags
[[ $python == python3 ]] || echo "Before other commands: source '$here/.venv/bin/activate'"
! grep . "$OUT/.failed" >&2
