#!/usr/bin/env bash
# Makes the tables of results/mnist.md and results/cifar10.md: trains every run, attacks it, and leaves the raw numbers in
# runs/mnist/numbers or runs/cifar10/numbers, one JSON file each. Stopped and started again it goes on where it was; what has
# its file already is skipped, so remove the file to make it anew. What we saw is in results/mnist/ and is not touched.
#
#   MNIST_DIR=data/mnist bash results/reproduce.sh mnist                  everything: five to six hours on two cores
#   MNIST_DIR=data/mnist bash results/reproduce.sh mnist advtrain-s0 rnn-adv-s0    some runs: METHOD-sSEED, METHOD-rnn-sSEED
#                                                                         with the small cell; one trained by hand needs its rnn- twin
#   CIFAR10_DIR=data/cifar-10-batches-bin bash results/reproduce.sh cifar10       on a GPU; METHOD-MODEL-sSEED
#   python3 results/table.py runs/mnist/numbers                           the table of what is there
#
# Environment: JOBS at once (default 2); RUNS, the folder of the checkpoints and logs (default runs/DATASET); RESULTS, that of
# the numbers (default RUNS/numbers); for a rehearsal EPOCHS, LIMIT, TEST_LIMIT (default the real thing).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ ${1-} == mnist || ${1-} == cifar10 ]] || { echo "reproduce.sh: say mnist or cifar10, see the top of this file" >&2; exit 2; }
dataset=$1
export RUNS=${RUNS:-runs/$dataset} JOBS=${JOBS:-2}
export RESULTS=${RESULTS:-$RUNS/numbers}
if [[ $dataset == mnist ]]; then
    export OMP_NUM_THREADS=1
    test_limit=${TEST_LIMIT:-2000} cheap_limit=${TEST_LIMIT:-10000} autoattack_limit=${TEST_LIMIT:-500}
    flags=(--dataset mnist --precision bf16)
    main=({advtrain,rnn-adv,trades,rnn-trades}-s0)
    names=("${main[@]}" {advtrain,rnn-adv,trades,rnn-trades}-s1 {advtrain,rnn-adv,trades,rnn-trades}-s2
        rnn-adv-rnn-s{0,1,2} plain-s0 advtrain-bls-s0 rnn-trades-rnn-s0 {trades,rnn-trades}-s{3,4})
else
    test_limit=${TEST_LIMIT:-10000} cheap_limit='' autoattack_limit=${TEST_LIMIT:-1000}
    flags=(--dataset cifar10)
    main=({advtrain,rnn-adv,trades,rnn-trades}-vgg16-s0)
    names=("${main[@]}" {trades,rnn-trades}-resnet18-s0 {advtrain,rnn-adv,trades,rnn-trades}-vgg16-s1)
fi

evaluate() {  # NAME WHAT ARGUMENTS: the numbers of `eval`, into NAME.WHAT.json
    local json=$RESULTS/$1.$2.json
    [[ -e $json ]] && return
    python3 l2l_adv.py eval "$RUNS/$1" "${@:3}" >>"$RUNS/$1.log" 2>&1
    cp "$RUNS/$1/eval.json" "$json.tmp" && mv "$json.tmp" "$json"
    echo "$json"
}

same_epoch() {  # RUN RUN: whether the best checkpoint of both is their last epoch's
    python3 -c 'import sys, torch
best, last = ([torch.load(f"{run}/{which}.pt")["held_out"]["epoch"] for run in sys.argv[1:]] for which in ("best", "last"))
sys.exit(best != last)' "$@"
}

train() {  # NAME
    local name=$1 method=${1%-s*}
    [[ -e $RESULTS/$name.best.json && -e $RESULTS/$name.last.json ]] && return
    local more=(--seed "${name##*-s}")
    case $method in
        *-rnn) method=${method%-rnn} more+=(--cell rnn) ;;
        *-vgg16 | *-resnet18) more+=(--model "${method##*-}") method=${method%-*} ;;
    esac
    python3 l2l_adv.py train --method "$method" --out "$RUNS/$name" --resume "${flags[@]}" "${more[@]}" \
        ${EPOCHS:+--epochs "$EPOCHS"} ${LIMIT:+--limit "$LIMIT"} >>"$RUNS/$name.log" 2>&1
    cp "$RUNS/$name/log.jsonl" "$RESULTS/$name.log.jsonl"
}

lender() {  # NAME: the run whose learned optimizer attacks it, so that it faces the same attacks as its twin
    case $1 in
        trades-*) echo "$RUNS/rnn-$1" ;;
        plain-*) echo "$RUNS/rnn-adv-${1#plain-}" ;;
        advtrain-bls-*) echo "$RUNS/rnn-adv-${1#advtrain-bls-}" ;;
        advtrain-*) echo "$RUNS/rnn-adv-${1#advtrain-}" ;;
        *) echo "$RUNS/$1" ;;
    esac
}

attack() {  # NAME
    local with
    with=$(lender "$1")
    evaluate "$1" best --limit "$test_limit" --lend "$with"
    if [[ ! -e $RESULTS/$1.last.json ]] && same_epoch "$RUNS/$1" "$with"; then  # the same weights of both
        sed 's/"checkpoint": "best"/"checkpoint": "last"/' "$RESULTS/$1.best.json" >"$RESULTS/$1.last.json"
    fi
    evaluate "$1" last --limit "$test_limit" --lend "$with" --checkpoint last
}

sharp() {  # NAME: the learned optimizer as it was trained (from other noise than in `attack`) and sharpened, side by side
    evaluate "$1" sharp --attacks learned-10,sharp-10 --limit "$test_limit" --lend "$(lender "$1")"
}

cheap() {  # NAME: the cheap attacks on all test images, where the others see only some
    evaluate "$1" all --attacks pgd-10,learned-10 --limit "$cheap_limit" --lend "$(lender "$1")"
}

autoattack() {  # NAME: for the first seed of the four main methods
    [[ ! $1 =~ ^(advtrain|rnn-adv|trades|rnn-trades)(-vgg16|-resnet18)?-s0$ ]] ||
        evaluate "$1" autoattack --attacks pgd-10 --autoattack --limit "$autoattack_limit"
}

if [[ ${2-} == --stage ]]; then  # xargs below calls this script again
    run_name=$4
    trap '(($? == 0)) || echo "reproduce.sh: $run_name failed: $(tail -n 1 "$RUNS/$run_name.log")" >&2' EXIT
    "$3" "$run_name"
    exit
fi
(($# > 1)) && names=("${@:2}")
mkdir -p "$RUNS" "$RESULTS"
for stage in train attack sharp ${cheap_limit:+cheap} autoattack; do
    printf '%s\n' "${names[@]}" | xargs -P "$JOBS" -n 1 bash results/reproduce.sh "$dataset" --stage "$stage"
done
if (($# == 1)); then
    if [[ $dataset == cifar10 && ! -e $RESULTS/bench.json ]]; then
        python3 l2l_adv.py bench --model vgg16 --batch-size 128 --json >"$RESULTS/bench.json.tmp"
        mv "$RESULTS/bench.json.tmp" "$RESULTS/bench.json"
    fi
    figures=$(python3 -c 'import matplotlib; print("yes")' 2>/dev/null) || true
    [[ -e $RESULTS/analyses.json ]] ||
        python3 results/analyse.py "${main[@]/#/$RUNS/}" --limit "$autoattack_limit" --json "$RESULTS/analyses.json" \
            ${figures:+--figures "$RESULTS"} >"$RUNS/analyse.log"
fi
python3 results/table.py "$RESULTS"
