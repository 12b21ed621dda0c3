#!/usr/bin/env bash
# The backend cuda on a real GPU: is it right, is it clean, is it fast. Eight minutes at most.
#
#   1. python -m bnfast finds a GPU
#   2. the conformance suite, whole, and the tests of arrays on a GPU
#   3. a part of it under compute-sanitizer: memcheck, and racecheck for shared memory
#   4. the benchmarks on a GPU, float32, against torch and a copy
#   5. the report on these: goals, then a table for each operation, layout and suite
#
#   benchmarks/gpu.sh [FOLDER]      logs, gpu.json and gpu.md go to FOLDER, default build/gpu
#   PYTHON=python3.12               another interpreter
#   BNFAST_GPU_DRY_RUN=1            without a GPU: a few tests in the simulator, nothing is timed
#
# A step that fails does not keep the others from running; the exit status tells of all of them.
# Needs numba-cuda, torch with CUDA, pytest, pytest-benchmark, and compute-sanitizer in the PATH or
# in /usr/local/cuda/bin. No setting of the GPU is touched.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
dry=${BNFAST_GPU_DRY_RUN:-0}
folder=${1:-build/gpu}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
rm -f "$folder"/*.log "$folder"/gpu.json "$folder"/gpu.md

unset PYTEST_ADDOPTS BNFAST_BACKEND
PATH=$PATH:/usr/local/cuda/bin
NUMBA_ENABLE_CUDASIM=$dry
export PATH NUMBA_ENABLE_CUDASIM

failures=()
fail() { echo "FAILED: $*"; failures+=("$*"); }

# Run a command with a name, for so many seconds at most; keep what it prints.
step() {
    local name=$1 seconds=$2 begin=$SECONDS status=0
    shift 2
    printf '\n==== %s\n' "$name"
    timeout --kill-after=5 "$seconds" "$@" >"$folder/$name.log" 2>&1 || status=$?
    tail -n 15 "$folder/$name.log"
    echo "$name: $((SECONDS - begin)) seconds"
    case $status in
        0) ;;
        124 | 137) fail "$name: more than $seconds seconds" ;;
        *) fail "$name: exit status $status" ;;
    esac
}

# Fail unless a line of the output of the step with this name matches.
require() {
    grep -q -E -- "$2" "$folder/$1.log" || fail "$1: no line like '$2'"
}

tests() { step "$1" "$2" "$python" -m pytest -q -ra -W default -p no:cacheprovider "${@:3}"; }

# Sums, their merging, and what is elementwise; vectors and single elements; both forms.
sanitized() {
    local tool=$1 seconds=$2
    step "$tool" "$seconds" compute-sanitizer --tool "$tool" --error-exitcode 99 \
        "$python" -m pytest -q -W default -p no:cacheprovider tests/test_cuda.py \
        -k "(test_train or test_backward) and ($3) and not bits"
    require "$tool" '^[0-9]+ passed'
}

SECONDS=0
step report 15 "$python" -m bnfast
if [ "$dry" = 1 ]; then
    require report '^cuda +yes: simulator'
    tests conformance 120 tests/test_cuda.py -k "test_train and 2x3x17"
    echo
    echo "dry run: no compute-sanitizer"
else
    require report '^cuda +yes: compute capability'
    tests conformance 105 --require-backend cuda \
        tests/test_cuda.py tests/test_cuda_arrays.py tests/test_cuda_failures.py
    sanitized memcheck 60 "3x2x1025 or 2x67x15 or 67x257 or 1025x16"
    require memcheck 'ERROR SUMMARY: 0 errors'
    sanitized racecheck 60 "2x67x15 or 1025x16"
    require racecheck 'RACECHECK SUMMARY: 0 hazards'
fi
require conformance '^conformance ran on: cuda [0-9]+ tests'
require conformance '^[0-9]+ passed'

rows="gpu and float32 and not (gpu-resnet50 and NHWC)"
if [ "$dry" = 1 ]; then
    tests benchmarks 60 -v --benchmark-disable \
        benchmarks/test_operations.py benchmarks/test_choice.py -k "gpu or choose_in_context"
    require benchmarks '^benchmarks without a GPU: a simulator has no speed'
else
    tests benchmarks 230 benchmarks/test_operations.py -k "$rows" \
        --benchmark-min-rounds=3 --benchmark-json="$folder/gpu.json"
    require benchmarks '^[0-9]+ passed'
    printf '\n==== measured\n'
    if "$python" benchmarks/report.py "$folder/gpu.json" >"$folder/gpu.md"; then
        cat "$folder/gpu.md"
    else
        fail "measured: no report"
    fi
    grep -q '^| goal ' "$folder/gpu.md" || fail "measured: no goals"
    ! grep '^Goals that this run has no rows for' "$folder/gpu.md" || fail "measured: goals without a figure"
fi

printf '\n==== %s seconds\n' "$SECONDS"
[ "$SECONDS" -le 480 ] || fail "more than eight minutes"
[ "$dry" != 1 ] || echo "dry run: nothing was measured"
if [ ${#failures[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failures[@]}"
    exit 1
fi
echo "all green"
