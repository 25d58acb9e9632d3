"""Say what a path is that holds no weights which can be read, and what to do."""

from __future__ import annotations

import re
from pathlib import Path

from titanlite.checkpoint.folder import INFO
from titanlite.config.run_config import CONFIG

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


def why_no_weights(path: Path) -> str:
    """Return one sentence: what ``path`` is, and what to do. It is neither a checkpoint nor a Hugging Face folder."""
    if not path.exists():
        where = f"there is no such folder (relative to {Path.cwd()})"
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)):
            where += f"; a model of the Hub is downloaded first: hf download {path} --local-dir FOLDER"
        return where
    if not path.is_dir():
        return "it is a file; name the folder that it lies in"
    inside = sorted(file.parent for pattern in ("*/", "*/*/") for file in path.glob(pattern + INFO))
    if inside:
        return f"there are some in it, so name one: {', '.join(map(str, inside))}"
    names = sorted(entry.name for entry in path.iterdir())
    if CONFIG in names:
        return (
            "it is the folder of a run without checkpoints; --checkpoint.enable_checkpoint makes a run save them, and "
            "--checkpoint.keep_model its last weights"
        )
    if ".metadata" in names:
        return (
            f"it has no {INFO}: another program saved these weights, and they do not say which model they belong to; "
            "train with --checkpoint.initial_load_path and the model's options, and save"
        )
    if "snapshots" in names:
        return f"it is a repository of the Hub's cache; name a folder in {path / 'snapshots'}"
    return f"{_described(path, names)}; a checkpoint is a folder such as outputs/checkpoint/step-100"


def _described(path: Path, names: list[str]) -> str:
    def ending(*ends: str) -> str:
        return next((name for name in names if name.lower().endswith(ends)), "")

    if "adapter_config.json" in names:
        return "it holds an adapter, not a whole model; merge it into its base model first"
    if ending(".safetensors"):
        return f"it has {ending('.safetensors')}, and no config.json that says which model these weights belong to"
    if ending(".gguf"):
        return f"its weights are GGUF ({ending('.gguf')}), which is not read; take the folder with *.safetensors"
    if ending(*_PICKLES):
        return (
            f"its weights are in {ending(*_PICKLES)}, which can run code when it is read, and is not read; take "
            "*.safetensors, or let transformers save it as such"
        )
    if "config.json" in names:
        return "it has config.json, and no *.safetensors beside it: the weights are missing"
    return f"it has no {INFO}, and no config.json beside *.safetensors"
