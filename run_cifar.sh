#!/usr/bin/env bash
# From a fresh machine to the table of results: see --help.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
    cat <<'HELP'
Trains a classifier by each method, attacks them all, and prints one table.

    bash run_cifar.sh                on CIFAR-10, which is downloaded (163 MB) if it is not there
    bash run_cifar.sh --synthetic    the same on the embedded data set, nothing downloaded, about three minutes

Settings, as flags or as environment variables (--epochs 3 or EPOCHS=3); what follows -- goes to every training:
    METHODS      default "plain advtrain trades rnn-adv rnn-trades"; there is also advtrain-bls
    MODEL        small, vgg16, resnet18, wrn34       default vgg16 with CUDA, else small
    EPOCHS       passes over the training images     default 30 with CUDA, else 3
    LIMIT        training images, 0 for all          default 0 with CUDA, else 500 (synthetic: 300)0 (synthetic: 0)
    TEST_LIMIT   test images, 0 for all              default 0 with CUDA, else 500 (synthetic: 300)
    SEED         of everything random                default 0
    DEVICE       auto, cpu, cuda, cuda:1             default auto
    OUT          folder of the runs                  default runs/ and a name made of the settings
    CIFAR10_DIR  where CIFAR-10 lies (environment only); default data/, and downloaded to there

Started again with the same settings, it goes on with the methods that are not done. Examples:
    bash run_cifar.sh --model resnet18 --methods "trades rnn-trades" --epochs 100 -- --schedule piecewise
    LIMIT=2000 EPOCHS=2 bash run_cifar.sh
HELP
}

fail() {
    echo "run_cifar.sh: $*" >&2
    exit 2
}

DATASET=cifar10
while (($#)); do
    case $1 in
        -h | --help) usage; exit ;;
        --synthetic) DATASET=synthetic ;;
        --methods | --model | --epochs | --limit | --test-limit | --seed | --device | --out)
            (($# > 1)) || fail "$1 needs a value"
            name=$(printf %s "${1#--}" | tr a-z- A-Z_)
            printf -v "$name" %s "$2"
            shift ;;
        --) shift; break ;;
        *) fail "unknown option $1 (see --help)" ;;
    esac
    shift
done

# ---- Python with torch and numpy: the one at hand, else one of our own -----------------------------------------------
python=python3
if ! "$python" -c 'import torch, numpy' 2>/dev/null; then
    python=$here/.venv/bin/python
    if ! "$python" -c 'import torch, numpy' 2>/dev/null; then
        command -v python3 >/dev/null || fail "no python3 here: install Python 3.9 or newer"
        echo "Installing torch and numpy into $here/.venv"
        python3 -m venv "$here/.venv" || fail "could not make $here/.venv: install python3-venv, or torch and numpy yourself"
        "$python" -m pip install --quiet torch numpy || fail "could not install torch and numpy (no network?)"
    fi
fi
l2l() { "$python" "$here/l2l_adv.py" "$@"; }

# ---- Settings --------------------------------------------------------------------------------------------------------
METHODS=${METHODS:-plain advtrain trades rnn-adv rnn-trades}
DEVICE=${DEVICE:-auto} SEED=${SEED:-0}
facts=$(PYTHONPATH=$here "$python" - "$DEVICE" <<'FACTS'
import sys, torch, baselines, l2l_adv
print(int(sys.argv[1] != "cpu" and torch.cuda.is_available()), int(baselines.find_dataset("cifar10") is not None),
      *l2l_adv.METHODS)
FACTS
)
read -r cuda found known <<<"$facts"
[[ -n ${METHODS// /} ]] || fail "METHODS is empty"
for method in $METHODS; do
    [[ " $known " == *" $method "* ]] || fail "unknown method '$method'"
done
if [[ $DATASET == synthetic ]]; then
    MODEL=${MODEL:-small} EPOCHS=${EPOCHS:-3} LIMIT=${LIMIT:-0} TEST_LIMIT=${TEST_LIMIT:-300}
elif [[ $cuda == 1 ]]; then
    MODEL=${MODEL:-vgg16} EPOCHS=${EPOCHS:-30} LIMIT=${LIMIT:-0} TEST_LIMIT=${TEST_LIMIT:-0}
else
    MODEL=${MODEL:-small} EPOCHS=${EPOCHS:-3} LIMIT=${LIMIT:-5000} TEST_LIMIT=${TEST_LIMIT:-500}
fi
for name in EPOCHS LIMIT TEST_LIMIT SEED; do
    [[ ${!name} =~ ^[0-9]+$ ]] || fail "$name must be a whole number, not '${!name}'"
done
OUT=${OUT:-runs/$DATASET-$MODEL-n$LIMIT-e$EPOCHS-s$SEED}

# ---- CIFAR-10: where it is, else the binary version from its authors -------------------------------------------------
download() {
    "$python" - <<'DOWNLOAD'
import hashlib, pathlib, shutil, sys, tarfile, urllib.request
folder = pathlib.Path("data/cifar-10-batches-bin")
archive, partial = folder.with_name("cifar-10-binary.tar.gz.part"), folder.with_name("cifar-10-batches-bin.part")
try:
    partial.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", timeout=60) as source:
        with open(archive, "wb") as target:
            shutil.copyfileobj(source, target)
    if hashlib.md5(archive.read_bytes()).hexdigest() != "c32a1d4ab5d03f1284b67883e8d87530":
        sys.exit("the MD5 sum of the download is wrong")
    with tarfile.open(archive) as tar:
        for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:  # these six, and nothing else
            (partial / name).write_bytes(tar.extractfile(f"cifar-10-batches-bin/{name}").read())
    partial.rename(folder)
except (OSError, KeyError, tarfile.TarError) as error:
    sys.exit(str(error))
finally:
    archive.unlink(missing_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    if not any(folder.parent.iterdir()):
        folder.parent.rmdir()
DOWNLOAD
}

if [[ $DATASET == cifar10 && $found == 0 ]]; then
    [[ -z ${CIFAR10_DIR:-} ]] || fail "no CIFAR-10 in CIFAR10_DIR=$CIFAR10_DIR: it should hold data_batch_1.bin …"
    echo "Downloading CIFAR-10 (163 MB) to data/"
    advice="unpack cifar-10-binary.tar.gz into $PWD/data, or set CIFAR10_DIR; or try --synthetic, which needs no data"
    reason=$(download 2>&1) || fail "CIFAR-10 is not here and could not be downloaded ($reason): $advice"
fi

# ---- What is going to happen -----------------------------------------------------------------------------------------
limit=() test_limit=()
((LIMIT == 0)) || limit=(--limit "$LIMIT")
((TEST_LIMIT == 0)) || test_limit=(--limit "$TEST_LIMIT")
echo "$DATASET, $MODEL, $EPOCHS epochs, methods: $METHODS; runs in $OUT"
if [[ $DATASET == cifar10 && $cuda == 0 ]]; then
    echo "No CUDA device is used, so this is the small version of the experiment: $((LIMIT ? LIMIT : 49000)) training images."
    if [[ $MODEL == small ]]; then
        # Milliseconds per training image and epoch, and per test image, measured on 2 cores with this model
        ms=0
        for method in $METHODS; do
            case $method in plain) cost=1 ;; advtrain | trades) cost=9 ;; advtrain-bls) cost=18 ;; *) cost=13 ;; esac
            ms=$((ms + EPOCHS * (cost * (LIMIT ? LIMIT : 49000) + 8000) + 160 * (TEST_LIMIT ? TEST_LIMIT : 10000)))
        done
        echo "Estimate: $((ms / 60000 + 1)) minutes on 2 cores."
    fi
    echo "For more: LIMIT=0 EPOCHS=30 MODEL=vgg16 bash run_cifar.sh (on a CUDA device that is the default)."
fi

# ---- Train, each method into a folder that gets its name when it is done ---------------------------------------------
stamp="$DATASET $MODEL, $EPOCHS epochs, limit $LIMIT, seed $SEED${*:+, $*}"
mkdir -p "$OUT"
if [[ -f $OUT/.settings && $(<"$OUT/.settings") != "$stamp" ]]; then
    fail "$OUT holds runs of other settings ($(<"$OUT/.settings")): choose another --out, or delete it"
fi
echo "$stamp" >"$OUT/.settings"
trained=() failed=()
for method in $METHODS; do
    if [[ -f $OUT/$method/last.pt ]]; then
        echo "$method is trained already: $OUT/$method"
    else
        rm -rf "$OUT/.$method.partial"
        if l2l train --method "$method" --dataset "$DATASET" --model "$MODEL" --epochs "$EPOCHS" --seed "$SEED" \
            --device "$DEVICE" ${limit[@]+"${limit[@]}"} "$@" --out "$OUT/.$method.partial"; then
            mv "$OUT/.$method.partial" "$OUT/$method"
        else
            failed+=("$method")
            continue
        fi
    fi
    trained+=("$OUT/$method")
done

# ---- Evaluate --------------------------------------------------------------------------------------------------------
((${#trained[@]})) && l2l eval "${trained[@]}" --device "$DEVICE" ${test_limit[@]+"${test_limit[@]}"}
echo "Checkpoints, logs and eval.json: $OUT/METHOD"
((${#failed[@]} == 0)) || { echo "run_cifar.sh: failed: ${failed[*]}" >&2; exit 1; }
