#!/usr/bin/env bash
# The evidence of results/mnist.md, or its like for CIFAR-10: trains every run, attacks it. Started again, it goes on.
#
#   MNIST_DIR=data/mnist bash results/reproduce.sh mnist       hours on two cores; or cifar10, on a GPU
#   MODEL=resnet18 bash results/reproduce.sh cifar10 rnn-trades-s0 trades-s0       another classifier than vgg16, or
#                                        for mnist than cnn4; on a CPU MODEL=small EPOCHS=15
#   MNIST_DIR=data/mnist bash results/reproduce.sh mnist rnn-adv-s0 advtrain-s0    some runs: METHOD-sSEED, or with the
#                                        small cell METHOD-rnn-sSEED; one trained by hand needs its rnn- twin
# Environment: JOBS at once (2), RUNS (runs/DATASET; numbers go to RUNS/numbers), EPOCHS, LIMIT, LR, WHAT is measured
# (all of "referee referee-last best last autoattack", the last at seed 0 alone), to rehearse TEST_LIMIT, TRAINER
# (l2l_adv.py; results/keep.py keeps every epoch's weights).
# A rehearsal and every change of the code take RUNS of their own: what is there is not made again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dataset=${1-} model=${MODEL:-vgg16} batch=128 main=({advtrain,rnn-adv,trades,rnn-trades}-s0) more=() seeds="0 1 2"
autoattacked=${TEST_LIMIT:-1000}
[[ $dataset =~ ^(mnist|cifar10)$ ]] || { echo "reproduce.sh: say mnist or cifar10, see its top" >&2; exit 2; }
if [[ $dataset == mnist ]]; then
    model=${MODEL:-cnn4} batch=64 autoattacked=${TEST_LIMIT:-500} seeds="0 1 2 3 4"
    more=({advtrain-bls,rnn-adv-rnn}-s{0,1,2} {advtrain-decay,trades-decay}-s{0..4} plain-s0)
fi
names=()
for seed in $seeds; do names+=("${main[@]/%0/$seed}"); done
names+=("${more[@]}")
export OMP_NUM_THREADS=1 RUNS=${RUNS:-runs/$dataset${MODEL:+-$MODEL}}
export MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_MMAP_THRESHOLD_=1073741824

if [[ ${2-} == --run ]]; then  # xargs below calls this script for each run: first to train it, then to attack it
    run=$RUNS/$4 numbers=$RUNS/numbers/$4 method=${4%-s*} seed=${4##*-s} cell=lstm lender=$RUNS/$4
    exec >>"$run.log" 2>&1
    case $method in  # those trained by hand face the learned optimizer of their twin
        *-rnn) cell=rnn method=${method%-rnn} ;;
        trades*) lender=$RUNS/rnn-trades-s$seed ;;
        plain | advtrain*) lender=$RUNS/rnn-adv-s$seed ;;
    esac
    [[ $3 == attack ]] || exec python3 "${TRAINER:-l2l_adv.py}" train --resume --out "$run" --method "$method" \
        --cell "$cell" --seed "$seed" --dataset "$dataset" --model "$model" ${EPOCHS:+--epochs "$EPOCHS"} \
        ${LIMIT:+--limit "$LIMIT"} ${LR:+--lr "$LR"}
    cp "$run/log.jsonl" "$numbers.log.jsonl"
    for what in ${WHAT:-referee referee-last best last autoattack}; do
        checkpoint=best same=
        case $what in
            best | last) made=eval.json command=(l2l_adv.py eval --limit "${TEST_LIMIT:-10000}" --attacks
                "pgd-10,pgd-100,cw-100,learned-10,sharp-10") ;;
            referee*) made=referee.json command=(results/sanity.py --judge referee --limit "${TEST_LIMIT:-1000}") ;;
            autoattack) made=autoattack.json command=(results/sanity.py --judge autoattack --limit "$autoattacked")
                [[ $seed == 0 ]] || continue ;;
        esac
        case $what in
            last) checkpoint=last same=best ;;
            referee-last) checkpoint=last same=referee ;;
        esac
        [[ ! -e $numbers.$what.json ]] || continue
        if [[ -e $numbers.$same.json ]] && cmp -s "$run"/{best,last}.pt && cmp -s "$lender"/{best,last}.pt; then
            sed 's/"best"/"last"/' "$numbers.$same.json" >"$numbers.$what.json" && continue  # the same weights
        fi
        python3 "${command[@]}" --checkpoint "$checkpoint" --lend "$lender" "$run"
        mv "$run/$made" "$numbers.$what.json"
    done
    exit
fi
python3 -c 'import torchattacks' 2>/dev/null ||
    { echo "reproduce.sh: first python3 -m pip install --no-deps torchattacks scipy" >&2; exit 2; }
(($# == 1)) || names=("${@:2}")
mkdir -p "$RUNS/numbers"
for stage in train attack; do
    printf '%s\n' "${names[@]}" | xargs -P "${JOBS:-2}" -n 1 bash results/reproduce.sh "$dataset" --run "$stage" ||
        { echo "reproduce.sh: could not $stage every run: see the ends of $RUNS/*.log" >&2; exit 1; }
done
if (($# == 1)); then
    python3 results/bench.py --model "$model" --dataset "$dataset" --batch-size "$batch" --json \
        >"$RUNS/numbers/bench.json"
    python3 results/analyse.py "${main[@]/#/$RUNS/}" --limit "$autoattacked" --json "$RUNS/numbers/analyses.json" \
        --figures "$RUNS/numbers" >"$RUNS/analyse.log"
fi
python3 results/table.py "$RUNS/numbers"
