#!/usr/bin/env bash
# From a fresh machine to the table of results: see --help.
set -euo pipefail
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
trap 'echo "run_cifar.sh: stopped; the same command again goes on from here" >&2; exit 130' INT

usage() {
    cat <<'HELP'
Trains a classifier by each method, attacks them all, and prints one table.

    bash run_cifar.sh                on CIFAR-10, which is downloaded (163 MB) if it is not there
    bash run_cifar.sh --synthetic    the same on the embedded data set, nothing downloaded, about three minutes

Settings, as flags or as environment variables (--epochs 3 or EPOCHS=3); what follows -- goes to every training:
    METHODS      default "plain advtrain trades rnn-adv rnn-trades"; there is also advtrain-bls
    MODEL        small, vgg16, resnet18, wrn34       default vgg16 with CUDA, else small
    EPOCHS       passes over the training images     default 30 with CUDA, else 3
    LIMIT        training images, 0 for all          default 0 with CUDA, else 5000 (synthetic: 0)
    TEST_LIMIT   test images, 0 for all              default 0 with CUDA, else 500 (synthetic: 300)
    SEED         of everything random                default 0
    DEVICE       auto, cpu, cuda, cuda:1             default auto
    OUT          folder of the runs                  default runs/ and a name made of the settings
    CIFAR10_DIR  where CIFAR-10 lies (environment only); default data/, and downloaded to there

Stopped and started again with the same settings, it goes on where it was. Examples:
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
has_torch() { (cd "$here" && "$1" -c 'import sys, torch, numpy; sys.exit(sys.version_info < (3, 9))') 2>/dev/null; }

lock() {  # what fd 9 has open, for this shell and what it starts, unless another has it; without locks, go on
    [[ $("$python" -I -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>&1) != *BlockingIOError* ]]
}

python=python3 venv=$here/.venv
if ! has_torch python3; then
    if [[ -e $venv/.unfinished ]] || ! has_torch "$venv/bin/python"; then  # the first was left behind by kill -9
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null ||
            fail "no python3 here, or an old one: install Python 3.9 or newer"
        [[ ! -e $venv || -e $venv/.unfinished ]] || fail "$venv lacks torch or numpy: install them there, or delete it"
        { mkdir -p "$venv" && exec 9>>"$venv/.unfinished"; } 2>/dev/null ||
            fail "torch or numpy is missing, and $here cannot be written to: install them yourself"
        lock || fail "another run_cifar.sh is making $venv: wait for it"
        trap 'rm -rf "$venv"' EXIT
        echo "Installing torch and numpy into $venv (some minutes)"
        python3 -m venv "$venv" &>/dev/null ||
            fail "could not make $venv: install python3-venv, or torch and numpy yourself"
        reason=$("$venv/bin/python" -m pip install --quiet --disable-pip-version-check torch numpy 2>&1) ||
            fail "could not install torch and numpy; is there a network? (${reason##*$'\n'})"
        rm "$venv/.unfinished"
        trap - EXIT
    fi
    python=$venv/bin/python
fi
l2l() { "$python" "$here/l2l_adv.py" "$@"; }

# ---- Settings --------------------------------------------------------------------------------------------------------
METHODS=${METHODS:-plain advtrain trades rnn-adv rnn-trades}
DEVICE=${DEVICE:-auto} SEED=${SEED:-0}
facts() {  # is there CUDA, and CIFAR-10?
    "$python" - "$here" "$DEVICE" "${MODEL:-small}" "$METHODS" <<'FACTS'
import sys
sys.path[0], device, model, methods = sys.argv[1:]  # in place of the current folder
from baselines import InputError, find_dataset
from l2l_adv import Settings, pick_device
try:
    for method in methods.split():
        Settings(out="-", method=method, model=model)
    print(int(pick_device(device).type == "cuda"), int(find_dataset("cifar10") is not None))
except InputError as error:
    sys.exit(f"run_cifar.sh: {error}")
FACTS
}
[[ -n ${METHODS// /} ]] || fail "METHODS is empty"
facts=$(facts) || exit 2
read -r cuda found <<<"$facts"
if [[ $DATASET == synthetic ]]; then
    MODEL=${MODEL:-small} EPOCHS=${EPOCHS:-3} LIMIT=${LIMIT:-0} TEST_LIMIT=${TEST_LIMIT:-300}
elif [[ $cuda == 1 ]]; then
    MODEL=${MODEL:-vgg16} EPOCHS=${EPOCHS:-30} LIMIT=${LIMIT:-0} TEST_LIMIT=${TEST_LIMIT:-0}
else
    MODEL=${MODEL:-small} EPOCHS=${EPOCHS:-3} LIMIT=${LIMIT:-5000} TEST_LIMIT=${TEST_LIMIT:-500}
fi
for name in EPOCHS LIMIT TEST_LIMIT SEED; do
    [[ ${!name} =~ ^(0|[1-9][0-9]*)$ ]] || fail "$name must be a whole number, not '${!name}'"
done
((EPOCHS > 0)) || fail "EPOCHS must be above 0"
OUT=${OUT:-runs/$DATASET-$MODEL-n$LIMIT-e$EPOCHS-s$SEED}

# ---- CIFAR-10: where it is, else the binary version from its authors -------------------------------------------------
download() {
    "$python" -I - <<'DOWNLOAD'
import contextlib, fcntl, hashlib, pathlib, shutil, sys, tarfile, urllib.request
URL, MD5 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
NAMES, SIZE = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"], 10000 * 3073
folder = pathlib.Path("data/cifar-10-batches-bin")
archive, unpacked = folder.with_name("cifar-10-binary.tar.gz.part"), folder.with_name("cifar-10-batches-bin.part")
try:
    folder.parent.mkdir(exist_ok=True)
    with open(archive, "a+b") as part:  # what there is of it stays when this is stopped, and the next start goes on
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(part, fcntl.LOCK_EX)  # is another download at work? Wait for it
        if (folder / NAMES[0]).exists():
            sys.exit()
        part.truncate(max(0, part.seek(0, 2) - 1))  # a byte less, since a server has no answer when nothing is missing
        request = urllib.request.Request(URL, headers={"Range": f"bytes={part.seek(0, 2)}-"})
        with urllib.request.urlopen(request, timeout=60) as source:
            if source.status != 206:  # it begins again, and so do we
                part.truncate(0)
            shutil.copyfileobj(source, part)
            if source.length:
                sys.exit("the connection broke off; started again, it goes on from there")
        part.seek(0)
        if hashlib.md5(part.read()).hexdigest() != MD5:
            part.truncate(0)
            sys.exit("the MD5 sum of the download is wrong")
        part.seek(0)
        unpacked.mkdir(exist_ok=True)
        with tarfile.open(fileobj=part, mode="r:gz") as tar:
            for name in NAMES:  # these six, as plain files, and nothing else
                member = tar.getmember(f"{folder.name}/{name}")
                if not member.isreg() or member.size != SIZE:
                    sys.exit(f"{name} in the archive is not what it should be")
                (unpacked / name).write_bytes(tar.extractfile(member).read())
        unpacked.rename(folder)
        part.truncate(0)
except Exception as error:
    sys.exit(str(error))
finally:
    shutil.rmtree(unpacked, ignore_errors=True)
    with contextlib.suppress(OSError):
        if archive.stat().st_size == 0:  # done, or of no use
            archive.unlink()
        folder.parent.rmdir()  # if it is empty
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
    echo "No CUDA device is used: a small version of the experiment, $((LIMIT ? LIMIT : 49000)) training images."
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

# ---- Train: each run that was stopped goes on, each that is finished is left as it is --------------------------------
stamp="$DATASET $MODEL, $EPOCHS epochs, limit $LIMIT, seed $SEED${*:+, $*}"
{ mkdir -p "$OUT" && exec 9>>"$OUT/.settings"; } 2>/dev/null || fail "cannot write to $OUT: choose another --out"
lock || fail "another run_cifar.sh, or a training that it left behind, is at work in $OUT"
ls -d "$OUT"/*/ &>/dev/null || : >"$OUT/.settings"  # without a run in it, they do not count
[[ -s $OUT/.settings ]] || echo "$stamp" 2>/dev/null >&9 || fail "cannot write to $OUT: is the disk full?"
[[ $(<"$OUT/.settings") == "$stamp" ]] ||
    fail "$OUT holds runs of other settings ($(<"$OUT/.settings")): choose another --out, or delete it"
trained=() failed=
for method in $METHODS; do
    if l2l train --method "$method" --dataset "$DATASET" --model "$MODEL" --epochs "$EPOCHS" --seed "$SEED" \
        --device "$DEVICE" ${limit[@]+"${limit[@]}"} "$@" --resume --out "$OUT/$method"; then
        trained+=("$OUT/$method")
    else
        failed="$failed $method"
    fi
done

# ---- Evaluate what is finished, and say what is not ------------------------------------------------------------------
status=0
((${#trained[@]} == 0)) || l2l eval "${trained[@]}" --device "$DEVICE" ${test_limit[@]+"${test_limit[@]}"} || status=1
for method in $failed; do
    printf '%-12s failed: see above\n' "$method"
    status=1
done
echo "Checkpoints, logs and eval.json: $OUT/METHOD"
exit "$status"
