#!/usr/bin/env bash
# Compiles the C++ core for Linux on ARM and for macOS, to see that it compiles: nothing is linked or run.
# Usage: packaging/cross_check.sh PYTHON (with ziglang and pybind11 installed)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?PYTHON}
headers=$("$python" -c 'import sysconfig, pybind11; print("-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include())')

for target in aarch64-linux-gnu.2.28 aarch64-macos x86_64-macos; do
    for source in csrc/*.cpp; do
        # shellcheck disable=SC2086  # two options a header folder
        "$python" -m ziglang c++ -target "$target" -std=c++17 -O1 -Icsrc $headers -DDDMD_ISA=baseline -DDDMD_COMPILER='"zig"' \
            -fvisibility=hidden -c "$source" -o /dev/null || { echo "$source does not compile for $target"; exit 1; }
    done
    echo "$target: $(ls csrc/*.cpp | wc -l) files compile"
done
