#!/usr/bin/env bash
# Check everything: style, types, tests. Sets up on first use. Plain: without the tests marked slow; --all: with them,
# about an hour on 2 cores. Other arguments go to pytest: scripts/test.sh tests/unit/test_config.py -k base
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/setup.sh"
set_up "$root" dev
cd "$root"
select=(-m "not slow")
if [ "${1:-}" = --all ]; then
    select=()
    shift
fi
if [ $# -eq 0 ]; then
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m mypy
fi
"$PYTHON" -m pytest ${select[@]+"${select[@]}"} "$@"
