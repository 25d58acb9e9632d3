#!/usr/bin/env bash
# Check everything: style, types, tests. Sets up on first use. On 2 idle cores:
#   scripts/test.sh          6 minutes: without the tests marked slow or long
#   scripts/test.sh --all    25 minutes: with the slow ones
#   scripts/test.sh --long   hours: what is left, and mutation testing (tests/mutants.py)
# Other arguments go to pytest: scripts/test.sh tests/unit/config/test_config.py -k base
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/setup.sh"
set_up "$root" dev
cd "$root"
select="not (slow or long)" takes="6 minutes"
case "${1:-}" in
    --all) select="not long" takes="25 minutes" && shift ;;
    --long) select="long" takes="some hours" && shift ;;
esac
if [ $# -gt 0 ]; then
    exec "$PYTHON" -m pytest -m "$select" "$@"
fi
say "this takes about $takes on 2 idle cores"
# Two processes of pytest for two cores, each with one thread: a file's tests in one place for what they share. Then
# those that measure time or need a GPU, one after the other.
workers=$("$PYTHON" -c "import os; print(min(os.cpu_count() or 1, 4))")
threads=$("$PYTHON" -c "import os; print(max((os.cpu_count() or 1) // $workers, 1))")
failed=0
if [ "$select" != long ]; then
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m mypy
fi
OMP_NUM_THREADS=$threads "$PYTHON" -m pytest -m "($select) and not (alone or gpu)" -n "$workers" --dist loadfile \
    --no-loadscope-reorder || failed=$?
# Their files alone: to read all others takes a while.
files=$(grep -rlE 'mark\.(alone|gpu)' tests --include='test_*.py')
# shellcheck disable=SC2086  # a word for each
"$PYTHON" -m pytest -m "($select) and (alone or gpu)" $files || failed=$?
if [ "$select" = long ]; then
    "$PYTHON" -m tests.mutants mutants.json || failed=$?
fi
exit "$failed"
