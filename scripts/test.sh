#!/usr/bin/env bash
# Check everything: style, types, tests. Sets up on first use. Plain: without the tests marked slow; --all: with them,
# under an hour on 2 cores. Other arguments go to pytest: scripts/test.sh tests/unit/test_config.py -k base
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/setup.sh"
set_up "$root" dev
cd "$root"
select="not slow"
if [ "${1:-}" = --all ]; then
    select="slow or not slow"
    shift
fi
if [ $# -gt 0 ]; then
    exec "$PYTHON" -m pytest -m "$select" "$@"
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
# Most of the time is that of short runs in processes of their own, mostly of one thread: side by side, a file's tests in
# one place for what they share. Then those that measure time or need a GPU, one after the other.
workers=$("$PYTHON" -c "import os; print(min(os.cpu_count() or 1, 4))")
threads=$("$PYTHON" -c "import os; print(max((os.cpu_count() or 1) // $workers, 1))")
failed=0
OMP_NUM_THREADS=$threads "$PYTHON" -m pytest -m "($select) and not (alone or gpu)" -n "$workers" --dist loadfile \
    --no-loadscope-reorder || failed=$?
"$PYTHON" -m pytest -m "($select) and (alone or gpu)" || failed=$?
exit "$failed"
