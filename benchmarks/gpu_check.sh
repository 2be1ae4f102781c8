#!/usr/bin/env bash
# Everything that needs a GPU, offline, in under nine minutes: build with CUDA, test, look for bad memory
# accesses and races, measure. Usage: benchmarks/gpu_check.sh [WHEELS] [OUT]; WHEELS is a folder of wheels of
# what the system Python lacks (nibabel, say), OUT takes logs and JSON. The last lines say what failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

WHEELS=${1:-wheels}
OUT=${2:-build/gpu-check}
# the system's Python by its path: this script's own environment goes in front of it on PATH
if ! PYTHON=$(command -v "${PYTHON:-python3}"); then
    echo "no python3 on PATH; pass PYTHON=/path/to/python3"
    exit 1
fi
VENV=build/gpu-venv
failed=()
mkdir -p "$OUT" build
OUT=$(cd "$OUT" && pwd)
export MAX_JOBS=${MAX_JOBS:-$(nproc)} DDMD_CUDA=ON PYTHONUNBUFFERED=1
export PATH="$PWD/$VENV/bin:$PATH:/usr/local/cuda/bin"
unset TRITON_INTERPRET DDMD_BACKEND

# part NAME SECONDS COMMAND...: its log in OUT/NAME.log; one that fails or hangs does not lose the rest
part() {
    local name=$1 limit=$2 begun=$SECONDS status=0
    shift 2
    timeout --kill-after=5 "$limit" "$@" > "$OUT/$name.log" 2>&1 || status=$?
    if [ "$status" -eq 0 ]; then
        echo "ok     $name ($((SECONDS - begun)) s): $(tail -n 1 "$OUT/$name.log")"
    else
        failed+=("$name")
        [ "$status" -eq 124 ] && echo "stopped at its limit of $limit s" >> "$OUT/$name.log"
        echo "FAILED $name (exit $status, $((SECONDS - begun)) s); the end of $name.log:"
        tail -n 15 "$OUT/$name.log"
    fi
    return "$status"
}

# The system Python's packages stay visible, also where that Python is itself a virtual environment.
build() {
    rm -rf "$VENV" && "$PYTHON" -m venv --without-pip "$VENV" || return
    "$PYTHON" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
        > "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
    local pip=("$PYTHON" -m pip --disable-pip-version-check --python "$PWD/$VENV/bin/python" install --quiet --no-index --no-deps)
    if compgen -G "$WHEELS/*.whl" > /dev/null; then
        "${pip[@]}" "$WHEELS"/*.whl || return
    fi
    "${pip[@]}" --no-build-isolation --editable . || return
    cmake -S . -B build/gpu -G Ninja -DDDMD_CUDA=ON > build/gpu-cmake.log || return
    cmake --build build/gpu --target ddmd_test >> build/gpu-cmake.log || return
    "$VENV/bin/python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name(0))'
}

sanitize() { # TOOL COMMAND...
    local tool=$1
    shift
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$@"
}

# The ops as torch calls them, each allocation its own, so that a byte beyond it is seen. TOOL, SELECTION
sanitize_ops() {
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitize "$1" --target-processes all \
        "$VENV/bin/python" -m pytest -m gpu -q -x -p no:cacheprovider tests/test_gpu.py -k "$2"
}

export -f build sanitize sanitize_ops
export VENV PYTHON WHEELS

if ! part build 120 bash -c build; then
    echo "nothing else can run; logs in $OUT"
    exit 1
fi
python="$VENV/bin/python"
part info 20 "$python" -m ddmd info
part core 15 build/gpu/ddmd_test
part tests 90 "$python" -m pytest -m gpu -q -p no:cacheprovider --junit-xml="$OUT/tests.xml" tests/test_gpu.py tests/test_kernels.py \
    tests/test_sampling.py
if command -v compute-sanitizer > /dev/null; then
    part memcheck-core 20 bash -c 'sanitize memcheck build/gpu/ddmd_test'
    part memcheck-ops 90 bash -c 'sanitize_ops memcheck "(op_is_the_reference or gradients) and float32"'
    # sums and normalisation are the kernels that use shared memory
    part racecheck-ops 90 bash -c 'sanitize_ops racecheck "op_is_the_reference and float32 and (norm or kl or pairwise)"'
else
    echo "left out: compute-sanitizer is not on PATH, so memory accesses and races were not looked at"
fi
machine=$("$python" -c 'from benchmarks.timing import machine; print(machine())')
part benchmarks 90 "$python" -m pytest benchmarks/test_ops.py --benchmark-only -o addopts=-q -p no:cacheprovider \
    --benchmark-json="$OUT/$machine-$(date +%F).json"
part volume 60 "$python" -m benchmarks.end_to_end --device cuda --output "$OUT"
"$python" -m benchmarks.table "$OUT" || failed+=(table)

echo "logs and JSON in $OUT; $SECONDS s in all"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
