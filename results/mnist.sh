#!/usr/bin/env bash
# Makes what results/mnist.md reports: trains every run, attacks it, and leaves the raw numbers in results/mnist/. Stopped and
# started again it goes on where it was; a run whose numbers are there already is skipped, so remove them to make it anew.
#
#   MNIST_DIR=data/mnist bash results/mnist.sh                    all of it: some eight hours on two cores
#   MNIST_DIR=data/mnist bash results/mnist.sh advtrain-s0        one run: METHOD-sSEED, METHOD-rnn-sSEED with the small cell
#   python3 results/table.py results/mnist                        the table of what is there
#
# JOBS runs at once, one thread each (default 2); RUNS: the folder of the checkpoints (default runs/mnist).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 RUNS=${RUNS:-runs/mnist}

evaluate() {  # NAME WHAT ARGUMENTS: the numbers of `eval`, into results/mnist/NAME.WHAT.json
    local json=results/mnist/$1.$2.json run=$RUNS/$1
    [[ -e $json ]] && return
    python3 l2l_adv.py eval "$run" "${@:3}"
    cp "$run/eval.json" "$json"
}

same_epoch() {  # RUN: whether its best checkpoint is the last epoch's
    python3 -c 'import sys, torch
a, b = (torch.load(f"{sys.argv[1]}/{which}.pt")["held_out"]["epoch"] for which in ("best", "last"))
sys.exit(a != b)' "$1"
}

first() {  # NAME: its training, and the full attacks on 2,000 images
    local name=$1 method=${1%-s*} cell=lstm step=0.075
    [[ $method == *-rnn ]] && { method=${method%-rnn} cell=rnn; }
    [[ $method == advtrain || $method == trades ]] && step=0.15
    [[ $method == advtrain-bls ]] && step=0.3
    if ! [[ -e results/mnist/$name.best.json && -e results/mnist/$name.last.json ]]; then
        python3 l2l_adv.py train --method "$method" --cell "$cell" --step-size $step --seed "${name##*-s}" --dataset mnist \
            --precision bf16 --out "$RUNS/$name" --resume
        cp "$RUNS/$name/log.jsonl" "results/mnist/$name.log.jsonl"
    fi
    evaluate "$name" best --limit 2000
    if same_epoch "$RUNS/$name"; then
        sed 's/"checkpoint": "best"/"checkpoint": "last"/' "results/mnist/$name.best.json" >"results/mnist/$name.last.json"
    fi
    evaluate "$name" last --limit 2000 --checkpoint last
}

second() {  # NAME: the cheap attacks on all 10,000 images
    local cheap=pgd-10
    [[ $1 == rnn-* ]] && cheap=pgd-10,learned-10
    evaluate "$1" all --attacks $cheap
}

case ${1-} in
    --first) first "$2" ;;
    --second) second "$2" ;;
    *)
        names=("$@")
        if ((!$#)); then
            for seed in 0 1 2; do names+=({advtrain,rnn-adv,trades,rnn-trades,rnn-adv-rnn}-s"$seed"); done
            names+=(plain-s0 advtrain-bls-s0 rnn-trades-rnn-s0)
        fi
        for stage in --first --second; do
            printf '%s\n' "${names[@]}" | xargs -P "${JOBS:-2}" -n 1 bash results/mnist.sh $stage
        done ;;
esac
