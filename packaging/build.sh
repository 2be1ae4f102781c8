#!/usr/bin/env bash
# Builds the sdist and, from it, the wheel, and checks both. Usage: packaging/build.sh PYTHON OUT
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?PYTHON, with build, twine and auditwheel installed} out=${2:?OUT, a folder}

rm -rf "$out" && mkdir -p "$out"
"$python" -m build --outdir "$out" . > "$out/build.log" 2>&1 || { tail -n 40 "$out/build.log"; exit 1; }
"$python" -m twine check --strict "$out"/*.tar.gz "$out"/*.whl
for needed in csrc/ kernels/ CMakeLists.txt ddmd/pretrained/LICENSE.md; do
    tar -tzf "$out"/*.tar.gz | grep "$needed" > /dev/null || { echo "the sdist lacks $needed"; exit 1; }
done
case "$(uname -s)" in
    Linux) "$python" -m auditwheel show "$out"/*-linux_*.whl | grep -A1 "constrains the platform" ;;
esac
