"""``titanlite train [FILE] [--section.key=value ...]``: the same as run_train.sh."""

from __future__ import annotations

from titanlite.launch import launcher


def main(argv: list[str]) -> int:
    """Train as the arguments say; a TOML file, or the name of a packaged one, may come first."""
    if argv and not argv[0].startswith("-"):
        argv = [f"--job.config_file={argv[0]}", *argv[1:]]
    return launcher.main(argv)
