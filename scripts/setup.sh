# shellcheck shell=bash
# Sourced by run_train.sh and scripts/test.sh: finds or makes a Python environment with titanlite in it.

# The modules that show that titanlite, and what an extra brings, are installed.
probe_of() {
    case "$1" in
        "") echo "titanlite, torch, tokenizers, safetensors, tomli_w, datasets, tensorboard, rich, jinja2, matplotlib" ;;
        dev) echo "$(probe_of ""), pytest, pytest_timeout, xdist, hypothesis, jsonschema, pyte, transformers, torchao, tiktoken, mypy, ruff" ;;
    esac
}

# Whether the interpreter $1 has all of $2. Not from the clone's folder, where titanlite is importable without being
# installed; looked up, not imported, because importing takes seconds.
has_modules() {
    (cd / && "$1" -c "
import importlib.util, sys
sys.exit(not all(importlib.util.find_spec(m.strip()) for m in '$2'.split(',')))") >/dev/null 2>&1
}

say() { echo "titanlite: $*" >&2; }

# The first Python that can make the environment: 3.10 or later, with venv and pip.
find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    say "no Python 3.10 or later with venv and pip was found: install one (on Debian and Ubuntu: apt install python3-venv)"
    return 1
}

# uv does not read pip's configuration: where the user has set where packages come from, pip is the one to ask.
pip_is_configured() {
    env | grep -qE '^PIP_(INDEX_URL|EXTRA_INDEX_URL|FIND_LINKS|NO_INDEX|CONSTRAINT|CONFIG_FILE)=' ||
        "$1" -m pip config list 2>/dev/null | grep -qE '\.(index-url|extra-index-url|find-links|no-index|constraint)='
}

# set_up ROOT [EXTRA]: sets PYTHON. The active environment if titanlite is installed there, else ROOT/.venv, which is
# made and filled once, and again when pyproject.toml has changed.
set_up() {
    local root=$1 extra=${2:-} active python target stamp quiet=""
    active=$(command -v python3 || command -v python || true)
    if [ -n "$active" ] && has_modules "$active" "$(probe_of "$extra")"; then
        PYTHON=$active
        return
    fi
    PYTHON=$root/.venv/bin/python
    stamp="$root/.venv/.installed${extra:+-$extra}-$(cksum <"$root/pyproject.toml" | cut -d' ' -f1)"
    if [ -e "$stamp" ] && [ -x "$PYTHON" ]; then
        return
    fi
    target="$root${extra:+[$extra]}"
    [ -t 2 ] || quiet=--quiet
    python=$(find_python || true)
    if command -v uv >/dev/null && { [ -z "$python" ] || ! pip_is_configured "$python"; }; then
        say "installing titanlite and what it needs into $root/.venv, with uv (once, a few minutes)"
        [ -x "$PYTHON" ] || uv venv $quiet --python '>=3.10,<3.14' "$root/.venv"
        # auto: the build of torch that fits the GPU that is there, or the one for the CPU.
        # It needs PyTorch's own index; where only a mirror of PyPI is reached, what that has is taken.
        UV_TORCH_BACKEND=${UV_TORCH_BACKEND:-auto} uv pip install $quiet --python "$PYTHON" --editable "$target" ||
            uv pip install $quiet --python "$PYTHON" --editable "$target"
    else
        [ -n "$python" ] || find_python
        say "installing titanlite and what it needs into $root/.venv, with $python and pip (once, a few minutes)"
        [ -x "$PYTHON" ] || "$python" -m venv "$root/.venv"
        "$PYTHON" -m pip install $quiet --disable-pip-version-check --editable "$target"
    fi
    touch "$stamp"
    say "installed"
}
