#!/usr/bin/env bash
# Everything that needs a GPU, offline, in under nine minutes: build with CUDA, test, measure, look for bad memory
# accesses and races. Usage: benchmarks/gpu_check.sh [WHEELS] [OUT]; WHEELS is a folder of wheels of
# what the system Python lacks (nibabel, say), OUT takes logs and JSON. The last lines are the table of goals, and
# what failed. The most important parts come first. Every part has a limit, their sum is under TOTAL seconds, and what
# a part measured before its limit is kept.
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
TOTAL=${TOTAL:-530}
mkdir -p "$OUT" build
OUT=$(cd "$OUT" && pwd)
export MAX_JOBS=${MAX_JOBS:-$(nproc)} DDMD_CUDA=ON PYTHONUNBUFFERED=1
export PATH="$PWD/$VENV/bin:$PATH:/usr/local/cuda/bin"
unset TRITON_INTERPRET DDMD_BACKEND

# part NAME SECONDS COMMAND...: its log in OUT/NAME.log; one that fails or hangs does not lose the rest
part() {
    local name=$1 limit=$2 begun=$SECONDS status=0 left=$((TOTAL - SECONDS))
    shift 2
    if [ "$left" -lt 5 ]; then
        failed+=("$name")
        echo "FAILED $name: left out, $TOTAL s are over"
        return 1
    fi
    [ "$limit" -le "$left" ] || limit=$left
    timeout --kill-after=5 "$limit" "$@" > "$OUT/$name.log" 2>&1 || status=$?
    if [ "$status" -eq 0 ]; then
        echo "ok     $name ($((SECONDS - begun)) s): $(tail -n 1 "$OUT/$name.log")"
    else
        failed+=("$name")
        [ "$((SECONDS - begun))" -lt "$limit" ] || echo "stopped at its limit of $limit s" >> "$OUT/$name.log"
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

if ! part build 100 bash -c build; then
    echo "nothing else can run; logs in $OUT"
    exit 1
fi
python="$VENV/bin/python"
part info 15 "$python" -m ddmd info
part core 10 build/gpu/ddmd_test
part tests 75 "$python" -m pytest -m gpu -q -p no:cacheprovider --junit-xml="$OUT/tests.xml" tests/test_gpu.py tests/test_kernels.py \
    tests/test_sampling.py
# compiling the rivals takes longest: `--limit` ends it in order, and what is missing is said in the JSON
part rivals 75 "$python" -m benchmarks.end_to_end --device cuda --output "$OUT" --limit 60 --sections computation rivals
machine=$("$python" -c 'from benchmarks.timing import machine; print(machine())')
part ops 90 "$python" -m pytest benchmarks/test_ops.py --benchmark-only -o addopts=-q -p no:cacheprovider \
    --benchmark-json="$OUT/$machine-$(date +%F).json"
part volume 45 "$python" -m benchmarks.end_to_end --device cuda --output "$OUT" --limit 35 --sections parts shell work scaling
if command -v compute-sanitizer > /dev/null; then
    part memcheck-core 10 bash -c 'sanitize memcheck build/gpu/ddmd_test'
    part memcheck-ops 30 bash -c 'sanitize_ops memcheck "(op_is_the_reference or gradients) and float32"'
fi
part training 40 "$python" -m benchmarks.training - made-up --rounds 1 --steps 100 --threads "$MAX_JOBS" --output "$OUT"
if command -v compute-sanitizer > /dev/null; then
    # sums and normalisation are the kernels that use shared memory
    part racecheck-ops 30 bash -c 'sanitize_ops racecheck "op_is_the_reference and float32 and (norm or kl or pairwise)"'
else
    echo "left out: compute-sanitizer is not on PATH, so memory accesses and races were not looked at"
fi
"$python" -m benchmarks.table "$OUT" || failed+=(table)
"$python" -m benchmarks.goals "$OUT" --device cuda || failed+=(goals)

echo "logs and JSON in $OUT; $SECONDS s in all"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
