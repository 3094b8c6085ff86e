#!/usr/bin/env bash
# Build, test and time the GPU backend: one command, under nine minutes on an H100 or H200, its tables printed last.
#   benchmarks/device.sh [OUTPUT FOLDER]          on a machine with a GPU
#   DRY_RUN=1 benchmarks/device.sh                the Python parts on the CPU, with tiny shapes
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-benchmarks/results}}
mkdir -p "$out"
python=${PYTHON:-python3}
export OMP_NUM_THREADS=4 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
status=0
# -P: the checkout's own folders must not hide the package that was installed from it.
run() { "$python" -P -W ignore "$@"; }
step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }

if [ -n "${DRY_RUN:-}" ]; then
    export PYTHONPATH="$PWD:$PWD/benchmarks"
    cp kernels/tiling.py "$out/tiling.py"
    run -m device.run --dry-run --repeats 3 --output "$out" &&
        TRITON_INTERPRET=1 run -m device.sweep --dry-run --output "$out" --write "$out/tiling.py"
    exit
fi

step build
install() { timeout 200 "$python" -m pip install -q --no-index --no-build-isolation --no-deps --force-reinstall . ; }
if ! install && ! FASTLORA_BUILD=0 install; then
    echo "pip could not install the checkout: using it as it is"
    export PYTHONPATH="$PWD"
fi
run -c "import fastlora, torch, triton; print(fastlora.__file__, torch.__version__, triton.__version__, torch.cuda.get_device_name())" || exit 1

export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD/benchmarks"
step sweep
# What is measured is what is tested and timed below; copy $out/tiling.py over kernels/tiling.py to keep it.
cp kernels/tiling.py "$out/tiling.py"
if run -m device.sweep --seconds 60 --output "$out" --write "$out/tiling.py"; then
    cp "$out/tiling.py" "$(run -c 'import fastlora.kernels.tiling as t; print(t.__file__)')"
else
    status=1
fi

step tests
workers=$(run -c 'import importlib.util as u; print("-n 8" if u.find_spec("xdist") else "")')
FASTLORA_KERNEL_DEVICE=cuda FASTLORA_KERNEL_SEED=fresh timeout 180 "$python" -P -W ignore -m pytest -q --tb=short \
    -p no:cacheprovider $workers -o addopts= -o 'python_files=cases_*.py' --confcutdir=tests/kernels tests/kernels \
    2>&1 | tee "$out/tests.txt" | tail -n 60
[ "${PIPESTATUS[0]}" = 0 ] || { status=1; echo "TESTS FAILED: the figures below are not to be trusted"; }

if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        step "$tool"
        FASTLORA_KERNEL_DEVICE=cuda timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 3 \
            "$python" -P -W ignore -m pytest -q -p no:cacheprovider -o addopts= -o 'python_files=cases_*.py' \
            --confcutdir=tests/kernels tests/kernels/cases_statistics.py tests/kernels/cases_grouped.py \
            -k 'test_every_committed_verb or one_row' > "$out/$tool.txt" 2>&1
        code=$?
        [ $code = 3 ] && status=1
        echo "$tool: exit $code (3: errors found, 124: out of time)"; tail -n 3 "$out/$tool.txt"
    done
else
    echo "compute-sanitizer is not installed: memcheck and racecheck were left out"
fi

step benchmarks
run -m device.run --seconds "$((400 - SECONDS > 60 ? 400 - SECONDS : 60))" --output "$out" || status=1
echo "done after ${SECONDS}s, status $status"
exit $status
