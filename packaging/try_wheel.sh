#!/usr/bin/env bash
# Does the main job with the packages of packaging/build.sh, in a fresh environment away from the source.
# Usage: packaging/try_wheel.sh PYTHON PACKAGES WORK TORCH (a pip requirement)
set -euo pipefail
unset PYTHONPATH  # nothing but what is installed
source=$(cd "$(dirname "$0")/.." && pwd)
python=${1:?PYTHON} packages=$(cd "${2:?PACKAGES}" && pwd) work=${3:?WORK} torch=${4:?TORCH}

rm -rf "$work" && mkdir -p "$work" && work=$(cd "$work" && pwd)
"$python" -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip -qq --disable-pip-version-check install)
"${pip[@]}" "$torch"
cd "$work"

detect() { # NAME
    venv/bin/ddmd detect phantom/phantom-0_flair.nii.gz -o "$1" --overwrite
}

echo "-- the wheel"
"${pip[@]}" "$torch" "$packages"/*.whl nilearn
venv/bin/ddmd info
venv/bin/ddmd phantom phantom --spacing 3
detect wheel

echo "-- the source, installed twice in one checkout"
mkdir checkout
tar -C "$source" --exclude=./build --exclude=./.venv --exclude=./.git -cf - . | tar -C checkout -xf -
for _ in once again; do
    "${pip[@]}" --force-reinstall --no-deps ./checkout
    venv/bin/python -c "import ddmd.ops.native as n; assert n.build_info(), n.why_not()"
done

echo "-- the sdist, without a compiler: DDMD_NATIVE=OFF"
DDMD_NATIVE=OFF CXX=/bin/false CC=/bin/false "${pip[@]}" --force-reinstall --no-deps "$packages"/*.tar.gz
venv/bin/python -c "import ddmd.ops.native as n; assert not n.build_info()"
detect native-off
