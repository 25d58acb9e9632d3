#!/usr/bin/env bash
# All that a GPU should run: its tests, then the benchmarks, the most telling first, each under a limit of its own.
#
#     scripts/gpu_suite.sh OUT [SECONDS [SECTION...]]      # by default 540 s, and all sections
#
# Sections, in this order: tests peers linear casts matmul eager budget train roofline loss_curves. Given after SECONDS,
# only those are run, and they share all of the time. OUT gets summary.txt (what ran, the targets, what was left out and
# why), a JSON file for each benchmark, and rest.tar.gz with the logs; of many benchmarks the last ones' JSON is in there
# too, so that OUT has eight files at most. The Python is $PYTHON, else python3; it needs torch and what titanlite
# imports, and nothing is fetched.
# TITANLITE_COMMIT names the commit where there is no .git. GPU_SUITE_DEVICE=cpu runs toys on the CPU.
# Status: 0; 1 if something failed (not: was left out); 2 for wrong arguments or a Python that lacks what is needed.
set -uo pipefail
usage() { sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
fail() {
    echo "gpu_suite.sh: $*" >&2
    exit 2
}

SECTIONS="tests peers linear casts matmul eager budget train roofline loss_curves"
# The seconds that each may take; of sections that were chosen, how they share.
declare -A MOST=([tests]=100 [peers]=300 [linear]=50 [casts]=40 [matmul]=45 [eager]=110 [budget]=120 [train]=600
    [roofline]=90 [loss_curves]=1500)
case "${1:-}" in
    -h | --help) usage && exit 0 ;;
    "" | -*) usage >&2 && exit 2 ;;
esac
seconds=${2:-540}
[[ $seconds =~ ^[0-9]+$ ]] || fail "SECONDS = $seconds: must be a whole number of seconds"
mkdir -p "$1" || fail "OUT = $1: cannot be made"
out=$(cd "$1" && pwd)
shift $(($# > 1 ? 2 : 1))
chosen=${*:-$SECTIONS}
for name in $chosen; do
    [[ " $SECTIONS " == *" $name "* ]] || fail "section $name: there is no such section; there are $SECTIONS"
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 2
python=${PYTHON:-python3}
device=${GPU_SUITE_DEVICE:-cuda}
deadline=$((SECONDS + seconds))
closing=5 # seconds kept for the summary
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/rest"
export PYTHONPATH="$root:$root/scripts/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
[ "$device" != cpu ] || export CUDA_VISIBLE_DEVICES=""
status=0

missing=$("$python" - <<'END'
import importlib.util
print(*(m for m in ("torch", "numpy", "tomli", "tomli_w", "tokenizers", "safetensors") if not importlib.util.find_spec(m)))
END
) || fail "$python does not run"
[ -z "$missing" ] || fail "$python lacks $missing, without which titanlite does not run: pip install $missing"

note() { # NAME OUTCOME SECONDS DETAIL
    printf '%s\t%s\t%s\t%s\n' "$@" >>"$work/ran.tsv"
    echo "$1: $2 ($3 s) $4"
    "$python" scripts/benchmarks/suite_summary.py "$out" "$work/ran.tsv" >/dev/null
}

share() { # NAME LEFT: the seconds that the section may take
    [ "$chosen" != "$SECTIONS" ] || { echo "${MOST[$1]}" && return; }
    local sum=0 other
    for other in $SECTIONS; do # it, and the chosen ones after it
        if [ "$other" = "$1" ] || { ((sum > 0)) && [[ " $chosen " == *" $other "* ]]; }; then
            sum=$((sum + MOST[$other]))
        fi
    done
    echo $((MOST[$1] * $2 / sum))
}

section() { # NAME FEWEST COMMAND...: in the command, LIMIT stands for the seconds that it may take
    local name=$1 fewest=$2 left most limit signal command begun code log detail
    shift 2
    [[ " $chosen " == *" $name "* ]] || return 0
    left=$((deadline - SECONDS - closing))
    if ((left < fewest)); then
        note "$name" "left out" 0 "$((left > 0 ? left : 0)) s were left, and it needs $fewest"
        return
    fi
    most=$(share "$name" "$left")
    limit=$((most < fewest ? fewest : left < most ? left : most))
    log=$work/rest/$name.log begun=$SECONDS
    # The benchmarks end by themselves a little before; pytest says how far it came if it is interrupted.
    signal=$([ "$name" = tests ] && echo INT || echo TERM)
    command=("${@//LIMIT/$((limit > 20 ? limit - 8 : limit))}")
    timeout --signal="$signal" --kill-after=5 "$limit" "${command[@]}" </dev/null >"$log" 2>&1
    code=$?
    detail=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | cut -c 1-300 | tr '\t' ' ')
    case $code in
        0) note "$name" ran $((SECONDS - begun)) "$detail" ;;
        124 | 137) note "$name" stopped $((SECONDS - begun)) "at its limit of $limit s; last: $detail" ;;
        *) note "$name" "failed ($code)" $((SECONDS - begun)) "$detail" ;;
    esac
    [ "$code" = 0 ] || status=1
}

benchmark() { # SECTION SCRIPT FEWEST OPTION...
    local name=$1 script=scripts/benchmarks/$2.py fewest=$3
    shift 3
    section "$name" "$fewest" "$python" "$script" --out="$out/$name.json" --seconds=LIMIT --device="$device" "$@"
}

gpu_tests() {
    [[ " $chosen " == *" tests "* ]] || return 0
    if ! "$python" -c 'import pytest' 2>/dev/null; then
        note tests "left out" 0 "pytest is not installed"
        return
    fi
    section tests 15 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/gpu # in the order of its conftest.py
}

loss_curves() {
    local shape=(--model.flavor=100M --training.seq_len=1024 --training.local_batch_size=16 --training.steps=300)
    [ "$device" != cpu ] || shape=(--model.flavor=toy --training.seq_len=32 --training.local_batch_size=2 --training.steps=4)
    # What an earlier call left there is gone on from.
    local before=docs/benchmarks/loss_curves.json
    section loss_curves 100 "$python" scripts/benchmarks/loss_parity.py --output="$out/loss_curves.json" --seeds=3 \
        --configs=bf16,float32,tensorwise,rowwise,rowwise_with_gw_hp --seconds=LIMIT --resume="$before" --experimental.custom_import=scripts.benchmarks.benchmark_models --model.name=llama3_benchmark "${shape[@]}" \
        --training.compile --sample.enable=false
}

gpu_tests
benchmark peers peers 100 --steps=16
benchmark linear linear 15
benchmark casts casts 15
benchmark matmul matmul 10
benchmark eager train 60 --modes=eager --batches=1 --configs=bf16,tensorwise,rowwise --windows=2
benchmark budget time_budget 60
benchmark train train 60 --modes=compile --batches=1,2
held=() # results that the roofline is held against
[ ! -f "$out/linear.json" ] || held+=("--check=$out/linear.json")
for name in train peers; do
    [ ! -f "$out/$name.json" ] || held+=("--train=$out/$name.json")
done
benchmark roofline roofline 20 ${held[@]+"${held[@]}"}
loss_curves

"$python" scripts/benchmarks/suite_summary.py "$out" "$work/ran.tsv"
kept=0
for name in $SECTIONS; do
    for file in "$out/$name".*; do
        if [ -f "$file" ] && { [ "${file##*.}" != json ] || ((++kept > 6)); }; then
            mv "$file" "$work/rest/"
        fi
    done
done
tar -czf "$out/rest.tar.gz" -C "$work" rest
exit "$status"
