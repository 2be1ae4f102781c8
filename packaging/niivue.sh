#!/usr/bin/env bash
# niivue.sh: fetches the viewer of `ddmd report` from npm, and says whether it is the one in ddmd/report/assets.
# Another version: change VERSION, run with --write, renew LICENSES.txt from the packages' own licence files.
set -euo pipefail
VERSION=0.69.0
cd "$(dirname "$0")/.."
asset=$PWD/ddmd/report/assets/niivue.umd.js.gz
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm pack --silent "@niivue/niivue@$VERSION" > /dev/null
tar xzf niivue-niivue-*.tgz package/dist/niivue.umd.js
if [ "${1:-}" = --write ]; then
    gzip -9 -n -c package/dist/niivue.umd.js > "$asset"
fi
gzip -dc "$asset" | cmp - package/dist/niivue.umd.js && echo "it is @niivue/niivue $VERSION"
