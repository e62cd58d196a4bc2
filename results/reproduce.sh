#!/usr/bin/env bash
# Train and judge the runs behind results/README.md. The same command again goes on from there.
#
#     bash results/reproduce.sh mnist [SEED…]    or mnist-long, cifar10: hours on two cores
#     bash results/reproduce.sh gpu [SEED…]      stops after nine minutes: repeat until it is done
# Environment: MNIST_DIR, CIFAR10_DIR; RUNS, folder of the runs (runs); NUMBERS, folder of
# runs.jsonl and logs.jsonl (results); to rehearse, EXTRA flags of train, and TEST_LIMIT.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1-} seeds="0 1 2" jobs=2 seconds=1000000
paper="gaussian/rnn-adv gaussian/advtrain gaussian/rnn-trades gaussian/trades"
case $target in
    mnist) flags="--dataset mnist --limit 16000" seeds="0 1 2 3 4"
        rows="$paper gaussian/rnn-adv-rnn ${paper//gaussian/uniform} uniform/advtrain-third
            uniform/advtrain-decay uniform/trades-decay uniform/advtrain-search" ;;
    mnist-long) flags="--dataset mnist"
        rows="gaussian/rnn-adv gaussian/advtrain uniform/advtrain-decay" ;;
    cifar10) flags="--dataset cifar10 --model small --epochs 5"
        rows="$paper gaussian/advtrain-decay" ;;
    gpu) flags="--dataset cifar10" seeds=0 jobs=1 seconds=540
        rows="gaussian/rnn-adv gaussian/advtrain gaussian/advtrain-decay gaussian/rnn-trades
            gaussian/trades" ;;
    *) echo "reproduce.sh: say mnist, mnist-long, cifar10 or gpu" >&2; exit 2 ;;
esac
export RUNS=${RUNS:-runs}/$target NUMBERS=${NUMBERS:-results} FLAGS="$flags ${EXTRA-}" target
export TEST_LIMIT=${TEST_LIMIT-} deadline=$(($(date +%s) + seconds)) OMP_NUM_THREADS=1
# With these, glibc keeps freed memory: some CPUs are up to 1.6 times faster.
export MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_MMAP_THRESHOLD_=1073741824

run_python() { # until the time is up
    local left=$((deadline - $(date +%s)))
    timeout --foreground "$((left > 1 ? left : 1))" python3 "$@"
}
train_row() { # $1, such as uniform/advtrain-decay, with seed $2
    local more="" method=${1#*/}
    case $1 in
        *-rnn) more="--cell rnn" ;;
        *-third) more="--step-size 0.1" ;; # eps/3
        *-decay) more=--decay ;;
        *-search) more=--line-search ;;
    esac
    [[ -z $more ]] || method=${method%-*}
    mkdir -p "$RUNS/$1-s$2"
    run_python l2l_adv.py train --resume --out "$RUNS/$1-s$2" --method "$method" --seed "$2" \
        --start "${1%/*}" $more $FLAGS >>"$RUNS/$1-s$2/output.txt" 2>&1 ||
        { tail -n 1 "$RUNS/$1-s$2/output.txt" >&2; return 1; }
}
judge_row() {
    local run=$RUNS/$1-s$2 start=${1%/*} twin=rnn-adv more=""
    [[ $1 != *trades* ]] || twin=rnn-trades
    [[ $target != mnist-long ]] || start=gaussian # its uniform row has no twin of its own
    if [[ $target == gpu ]]; then
        more=--autoattack
        [[ -e $run/eval.json ]] || run_python l2l_adv.py eval "$run" --attacks pgd-100,cw-100 \
            --limit "${TEST_LIMIT:-10000}"
    fi
    run_python results/judge.py "$run" --twin "$RUNS/$start/$twin-s$2" $more \
        --limit "${TEST_LIMIT:-1000}" --runs-file "$NUMBERS/runs.jsonl" \
        --logs-file "$NUMBERS/logs.jsonl"
}
export -f run_python train_row judge_row

trap 'echo "reproduce.sh: stopped; the same command goes on from here" >&2' ERR
[[ $# == 1 ]] || seeds=${*:2}
for seed in $seeds; do
    ((seed < 3)) || rows=${rows/uniform\/advtrain-search/}
    groups=("$rows") # train all rows before the first is judged, because it may need its twin
    [[ $target != gpu ]] || groups=($rows) # judge each row right after its training
    for group in "${groups[@]}"; do
        for stage in train_row judge_row; do
            printf '%s\n' $group | xargs -P "$jobs" -I{} bash -euc "$stage {} $seed"
        done
    done
done
if [[ $target == gpu && ! -e $NUMBERS/bench-gpu.json ]]; then
    run_python results/bench.py --batch-size 128 --json "$NUMBERS/bench-gpu.json"
fi
