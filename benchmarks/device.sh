#!/usr/bin/env bash
# Build, test and time the GPU backend: each call at most nine minutes on an H100 or H200, its tables printed last.
#   benchmarks/device.sh [OUTPUT FOLDER]                       the shipped tiles' tests and the headline rows
#   STEPS=build,sweep,bench benchmarks/device.sh FOLDER        other steps, in this order, each call within LIMIT seconds
#   DRY_RUN=1 benchmarks/device.sh                             the Python parts with tiny shapes, without a GPU
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-benchmarks/results}}
python=${PYTHON:-python3}
limit=${LIMIT:-540}
# A sweep comes before what it changes: the tiles it finds are those that are tested and timed.
steps=${STEPS:-build,test,headline}
for name in ${steps//,/ }; do
    case $name in
        build | sweep | test | sanitize | headline | bench | models) ;;
        *) echo "STEPS=$steps: '$name' is none of build, sweep, test, sanitize, headline, bench, models" >&2; exit 2 ;;
    esac
done
mkdir -p "$out"
export OMP_NUM_THREADS=4 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
status=0
# -P: the checkout's own folders must not hide the package that was installed from it.
run() { "$python" -P -W ignore "$@"; }
# within SECONDS COMMAND: at most so long, and never past the limit of the whole call.
within() {
    local left=$((limit - SECONDS)) most=$1
    shift
    [ "$left" -gt 0 ] || { echo "out of time, left out: $*"; return 124; }
    timeout -k 5 "$((most < left ? most : left))" "$@"
}

if [ -n "${DRY_RUN:-}" ]; then
    export PYTHONPATH="$PWD:$PWD/benchmarks"
    cp kernels/tiling.py "$out/tiling.py"
    run -m device.run --dry-run --repeats 3 --output "$out" &&
        TRITON_INTERPRET=1 run -m device.sweep --dry-run --output "$out" --write "$out/tiling.py" &&
        run -m device.run --dry-run null --repeats 3 --output "$out" &&
        run -m device.sweep --dry-run null --output "$out" --write "$out/tiling.py"
    exit
fi

step_build() {
    local install=("$python" -m pip install -q --no-index --no-build-isolation --no-deps --force-reinstall .)
    # First in full, where a failure shows the compiler's words; then without what does not compile.
    within 110 env FASTLORA_BUILD=1 "${install[@]}" && return
    echo "THE FULL BUILD FAILED: what is missing is named below"
    within 90 "${install[@]}" || within 30 env FASTLORA_BUILD=0 "${install[@]}"
}

step_sweep() {
    # Copy $out/tiling.py over kernels/tiling.py to keep what was measured.
    cp kernels/tiling.py "$out/tiling.py"
    within 150 "$python" -P -W ignore -m device.sweep --seconds 130 --output "$out" --write "$out/tiling.py" || return 1
    cp "$out/tiling.py" "$(run -c 'import fastlora.kernels.tiling as t; print(t.__file__)')"
}

step_test() {
    local workers
    workers=$(run -c 'import importlib.util as u; print("-n 8" if u.find_spec("xdist") else "")')
    # shellcheck disable=SC2086
    FASTLORA_KERNEL_DEVICE=cuda within 180 "$python" -P -W ignore -m pytest -q --tb=short \
        -p no:cacheprovider $workers -o addopts= -o 'python_files=cases_*.py' --confcutdir=tests/ops/triton tests/ops/triton \
        2>&1 | tee "$out/tests.txt" | tail -n 60
    [ "${PIPESTATUS[0]}" = 0 ] || { echo "TESTS FAILED: the figures are not to be trusted"; return 1; }
}

step_sanitize() {
    if ! command -v compute-sanitizer > /dev/null; then
        echo "compute-sanitizer is not installed: memcheck and racecheck were left out"
        return
    fi
    local tool code found=0
    for tool in memcheck racecheck; do
        # torch's pool would hide accesses past an allocation.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 FASTLORA_KERNEL_DEVICE=cuda within 60 compute-sanitizer --tool "$tool" --error-exitcode 3 \
            "$python" -P -W ignore -m pytest -q -p no:cacheprovider -o addopts= -o 'python_files=cases_*.py' \
            --confcutdir=tests/ops/triton tests/ops/triton/cases_statistics.py tests/ops/triton/cases_grouped.py \
            -k 'test_every_committed_verb or one_row' > "$out/$tool.txt" 2>&1
        code=$?
        [ $code = 0 ] || found=1
        echo "$tool: exit $code (0: clean, 3: errors found, 124: out of time)"; tail -n 3 "$out/$tool.txt"
    done
    return $found
}

layers="deit_base_qkv roberta_base_qkv llama3_8b_qkv"
# timed OPTIONS: starts nothing new in the last minute; every variant's rows are written as soon as they are there.
timed() {
    local seconds=$((limit - SECONDS - 60))
    within "$limit" "$python" -P -W ignore -m device.run --seconds "$((seconds > 20 ? seconds : 20))" --output "$out" "$@"
}
# shellcheck disable=SC2086
step_headline() { timed --name headline --cases $layers --variants frozen fastlora peft_bf16; }
# shellcheck disable=SC2086
step_bench() { timed --cases $layers; }
step_models() { timed --name models --cases deit_base_step llama_8_layers_step; }

prepared=""
for name in ${steps//,/ }; do
    printf '\n== %s (%ss)\n' "$name" "$SECONDS"
    if [ "$name" = build ]; then
        step_build || { echo "pip could not install the checkout: using it as it is"; export PYTHONPATH="$PWD"; }
        continue
    fi
    if [ -z "$prepared" ]; then
        run -c "import fastlora" 2> /dev/null || export PYTHONPATH="$PWD"
        run -c "import fastlora, torch, triton; print(fastlora.__file__, torch.__version__, triton.__version__, torch.cuda.get_device_name())" || exit 1
        run -c "from fastlora.ops import native, node; from fastlora.ops.backends import plan
print('native library:', native.reason() or 'built', '| node:', node.REASON or 'in C++', '| launches:', *filter(None, plan.launcher()))"
        export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD/benchmarks"
        prepared=1
    fi
    "step_$name" || status=1
done
echo "done after ${SECONDS}s, status $status"
exit $status
