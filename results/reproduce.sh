#!/usr/bin/env bash
# The evidence of results/mnist.md, or its like for CIFAR-10: trains every run, attacks it. Started again, it goes on.
#
#   MNIST_DIR=data/mnist bash results/reproduce.sh mnist       hours on two cores; or cifar10, on a GPU
#   MODEL=resnet18 bash results/reproduce.sh cifar10 rnn-trades-s0 trades-s0       another classifier than vgg16
#   MNIST_DIR=data/mnist bash results/reproduce.sh mnist rnn-adv-s0 advtrain-s0    some runs: METHOD-sSEED, or with the
#                                        small cell METHOD-rnn-sSEED; one trained by hand needs its rnn- twin
# Environment: JOBS at once (2), RUNS (runs/DATASET; numbers go to RUNS/numbers); to rehearse EPOCHS, LIMIT, TEST_LIMIT.
# AutoAttack needs a package: python3 -m pip install --no-deps torchattacks scipy
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dataset=${1-} model=${MODEL:-vgg16} n_autoattack=${TEST_LIMIT:-1000} n_test=${TEST_LIMIT:-10000}
flags=(--dataset "$dataset") main=({advtrain,rnn-adv,trades,rnn-trades}-s0) names=("${main[@]}" "${main[@]/%0/1}")
[[ $dataset =~ ^(mnist|cifar10)$ ]] || { echo "reproduce.sh: say mnist or cifar10, see its top" >&2; exit 2; }
if [[ $dataset == mnist ]]; then
    export OMP_NUM_THREADS=1
    flags+=(--precision bf16) model=small n_autoattack=${TEST_LIMIT:-500} n_test=${TEST_LIMIT:-2000}
    names+=("${main[@]/%0/2}" {trades,rnn-trades}-s{3,4} {plain,advtrain-bls,rnn-trades-rnn}-s0 rnn-adv-rnn-s{0,1,2})
fi
export RUNS=${RUNS:-runs/$dataset${MODEL:+-$MODEL}} MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_MMAP_THRESHOLD_=1073741824

if [[ ${2-} == --run ]]; then  # xargs below calls this script for each run: first to train it, then to attack it
    run=$RUNS/$4 numbers=$RUNS/numbers/$4 method=${4%-s*} seed=${4##*-s} cell=lstm lender=$RUNS/$4
    exec >>"$run.log" 2>&1
    case $method in  # those trained by hand face the learned optimizer of their twin
        *-rnn) cell=rnn method=${method%-rnn} ;;
        trades) lender=$RUNS/rnn-trades-s$seed ;;
        plain | advtrain*) lender=$RUNS/rnn-adv-s$seed ;;
    esac
    [[ $3 == attack ]] || exec python3 l2l_adv.py train --resume --out "$run" --method "$method" --cell "$cell" \
        --seed "$seed" --model "$model" "${flags[@]}" ${EPOCHS:+--epochs "$EPOCHS"} ${LIMIT:+--limit "$LIMIT"}
    keep() {  # WHAT FILE COMMAND...: unless that is done, run the command, and keep the FILE that it writes
        [[ -e $numbers.$1.json ]] || { "${@:3}" && cp "$run/$2" "$numbers~" && mv "$numbers~" "$numbers.$1.json"; }
    }
    evaluate=(eval.json python3 l2l_adv.py eval "$run" --lend "$lender" --limit)
    cp "$run/log.jsonl" "$numbers.log.jsonl"
    keep best "${evaluate[@]}" "$n_test"
    keep last "${evaluate[@]}" "$n_test" --checkpoint last
    keep sharp "${evaluate[@]}" "$n_test" --attacks learned-10,sharp-10
    [[ $dataset != mnist ]] || keep all "${evaluate[@]}" "${TEST_LIMIT:-10000}" --attacks pgd-10,learned-10
    [[ " ${main[*]} " != *" $4 "* ]] ||
        keep autoattack autoattack.json python3 results/sanity.py "$run" --judge autoattack --limit "$n_autoattack"
    exit
fi
(($# == 1)) || names=("${@:2}")
mkdir -p "$RUNS/numbers"
for stage in train attack; do
    printf '%s\n' "${names[@]}" | xargs -P "${JOBS:-2}" -n 1 bash results/reproduce.sh "$dataset" --run "$stage" ||
        { echo "reproduce.sh: could not $stage every run: see the ends of $RUNS/*.log" >&2; exit 1; }
done
if (($# == 1)); then
    python3 results/bench.py --model "$model" --json >"$RUNS/numbers/bench.json"
    python3 results/analyse.py "${main[@]/#/$RUNS/}" --limit "$n_autoattack" --json "$RUNS/numbers/analyses.json" \
        --figures "$RUNS/numbers" >"$RUNS/analyse.log"
fi
python3 results/table.py "$RUNS/numbers"
