#!/usr/bin/env bash
# Train and judge the runs behind results/README.md. The same command again goes on from there.
#
#     bash results/reproduce.sh mnist [SEED…]       or mnist-long, cifar10, cifar10-quick: hours
#     timeout 540 bash results/reproduce.sh gpu     with CUDA; repeat it until it is done
# Environment: MNIST_DIR, CIFAR10_DIR; RUNS, folder of the runs (runs); NUMBERS, folder of
# runs.jsonl and logs.jsonl (results, where what is judged already is not judged again); ROWS, such
# as "gaussian/rnn-adv gaussian/advtrain"; to rehearse, EXTRA flags of train, and TEST_LIMIT.
set -euo pipefail
python3 -c 'import torchattacks' 2>/dev/null ||
    { echo "first: python3 -m pip install --no-deps torchattacks scipy" >&2; exit 2; }
cd "$(dirname "$0")/.."
seeds="0 1 2" jobs=2
rows="gaussian/rnn-adv gaussian/advtrain gaussian/advtrain-decay gaussian/rnn-trades
    gaussian/trades"
case ${1-} in
    mnist) flags="--dataset mnist --limit 16000" seeds="0 1 2 3 4"
        rows="$rows gaussian/rnn-adv-rnn gaussian/advtrain-third gaussian/advtrain-half
            gaussian/trades-decay ${rows//gaussian/uniform} uniform/rnn-adv-rnn
            uniform/advtrain-third uniform/trades-decay uniform/advtrain-search" ;;
    mnist-long) flags="--dataset mnist"
        rows="gaussian/rnn-adv gaussian/advtrain gaussian/advtrain-decay" ;;
    cifar10) flags="--dataset cifar10 --model small --epochs 5" ;;
    cifar10-quick) flags="--dataset cifar10 --model small --epochs 2 --steps 4" ;;
    gpu) flags="--dataset cifar10" seeds=0 jobs=1 ;;
    *) echo "reproduce.sh: say mnist, mnist-long, cifar10, cifar10-quick or gpu" >&2; exit 2 ;;
esac
rows=${ROWS:-$rows}
export target=$1 FLAGS="$flags ${EXTRA-}" RUNS=${RUNS:-runs}/$1 NUMBERS=${NUMBERS:-results}
export TEST_LIMIT=${TEST_LIMIT-} OMP_NUM_THREADS=1
# With these, glibc keeps freed memory: some CPUs are up to 1.6 times faster.
export MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_MMAP_THRESHOLD_=1073741824

train_row() { # $1, such as uniform/advtrain-decay, with seed $2
    run=$RUNS/$1-s$2 method=${1#*/} more=""
    case $1 in
        *-rnn) more="--cell rnn" ;;
        *-third) more="--step-size 0.1" ;; # eps/3
        *-half) more="--step-size 0.15" ;; # eps/2
        *-decay) more=--decay ;;
        *-search) more=--line-search ;;
    esac
    [[ -z $more ]] || method=${method%-*}
    mkdir -p "$run"
    python3 l2l_adv.py train --resume --out "$run" --method "$method" --start "${1%/*}" \
        --seed "$2" $more $FLAGS >>"$run/output.txt" 2>&1 || { tail -n 1 "$run/output.txt"; false; }
}
judge_row() {
    run=$RUNS/$1-s$2 twin=$RUNS/${1%/*}/rnn-adv-s$2 more=""
    [[ $1 != *trades* ]] || twin=${twin/rnn-adv/rnn-trades}
    if [[ $target == gpu ]]; then
        more=--autoattack
        [[ -e $run/eval.json ]] || python3 l2l_adv.py eval "$run" --attacks pgd-100,cw-100 \
            --limit "${TEST_LIMIT:-10000}"
    fi
    python3 results/judge.py "$run" --twin "$twin" --limit "${TEST_LIMIT:-1000}" $more \
        --numbers "$NUMBERS"
}
export -f train_row judge_row

groups=("$rows") # train all rows of a seed before the first is judged, because it needs its twin
[[ $1 != gpu ]] || groups=($rows) # there, judge each row right after its training
for seed in $([[ $# == 1 ]] && echo "$seeds" || echo "${@:2}"); do
    for group in "${groups[@]}"; do
        ((seed < 3)) || group=${group/uniform\/advtrain-search/}
        printf '%s\n' $group | xargs -P "$jobs" -I{} bash -euc "train_row {} $seed"
        printf '%s\n' $group | xargs -P "$jobs" -I{} bash -euc "judge_row {} $seed"
    done
done
[[ $1 != gpu ]] || python3 results/bench.py --batch-size 128 | tee "$NUMBERS/bench-gpu.txt"
