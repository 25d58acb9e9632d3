"""A model to compute with, from a folder of weights: no optimizer, no FSDP, one copy in the dtype asked for.

On several processes it is tensor parallel over all of them.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load

from titanlite.config import JobConfig
from titanlite.data import Tokenizer, load_tokenizer
from titanlite.distributed.mesh import Mesh
from titanlite.errors import ConfigError
from titanlite.model_spec import ModelSpec, get_model_spec

CHECKPOINT_JSON = "checkpoint.json"


class Described(NamedTuple):
    """What a folder says that its weights belong to; ``args`` is a configured flavor."""

    spec: ModelSpec
    args: Any
    tokenizer_path: str


class LoadedModel(NamedTuple):
    """``max_seq_len``: positions that the model knows."""

    model: nn.Module
    tokenizer: Tokenizer
    max_seq_len: int


def fill_weights(model: nn.Module, folder: Path) -> None:
    """Read the parameters of ``model``, plain or sharded, of any dtype, from a checkpoint."""
    load({"model": model.state_dict()}, checkpoint_id=folder)


def load_model(
    path: str | Path,
    dtype: torch.dtype,
    mesh: Mesh,
    device: torch.device,
    *,
    tokenizer_path: str | None = None,
    fill: Callable[[nn.Module, Path], None] = fill_weights,
) -> LoadedModel:
    """Build the model of a checkpoint's folder and give it its weights.

    Args:
        path: the folder of one step.
        dtype: of the parameters; buffers keep theirs.
        mesh: of tensor parallelism alone.
        tokenizer_path: in place of the one that the checkpoint names.
        fill: writes the parameters.

    Raises:
        ConfigError: the folder is no checkpoint, or its model does not divide over the processes.
    """
    folder = Path(path).expanduser()
    found = describe(folder)
    tokenizer = load_tokenizer(found.tokenizer_path if tokenizer_path is None else tokenizer_path)
    model = build(found.spec, found.args, dtype, mesh, device)
    fill(model, folder)
    return LoadedModel(model.eval(), tokenizer, found.args.max_seq_len)


def build(spec: ModelSpec, args: Any, dtype: torch.dtype, mesh: Mesh, device: torch.device) -> nn.Module:
    """The model with its memory and its buffers; what its parameters hold is left to chance."""
    config = JobConfig()
    config.parallelism.tensor_parallel_degree = mesh.tp.size()
    config.parallelism.disable_loss_parallel = True
    config.activation_checkpoint.mode = "none"
    spec.check(args, mesh, config)
    with torch.device("meta"):
        model = spec.build(args)
    for param in model.parameters():
        param.data = param.data.to(dtype)
    if mesh.tp.size() > 1:
        if spec.tensor_parallel is None:
            raise ConfigError(
                f'the model family "{spec.name}" has no tensor parallelism of its own (ModelSpec.tensor_parallel): '
                "start one process"
            )
        spec.tensor_parallel(model, mesh, config)
    # A parameter that two modules share is one afterwards too.
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to_empty(device=device)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
    model.init_weights(_BuffersAlone())  # type: ignore[operator]
    return model.requires_grad_(False)


class _BuffersAlone:
    """The initialization of a model whose parameters come from a file: a :class:`WeightInit` that leaves them."""

    def trunc_normal(self, param: Tensor, std: float, bound: float = 3.0) -> None: ...
    def normal(self, param: Tensor, std: float) -> None: ...
    def ones(self, param: Tensor) -> None: ...


def describe(folder: Path) -> Described:
    """Read what a checkpoint's folder says of itself."""
    file = folder / CHECKPOINT_JSON
    if not file.is_file():
        raise ConfigError(f"{folder} is no checkpoint: {_what_is_there(folder)}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        name, flavor, values = (found["model"][key] for key in ("name", "flavor", "args"))
        tokenizer_path = found["tokenizer_path"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{file} cannot be read ({type(e).__name__}: {e}): take another checkpoint") from e
    spec = get_model_spec(name)
    try:
        args = _rebuilt(type(spec.flavor(flavor)), values)
    except TypeError as e:
        raise ConfigError(
            f'{file}: its model.args are not those of a {name} "{flavor}" ({e}); it is of another version'
        ) from e
    return Described(spec, args, tokenizer_path)


def _what_is_there(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no such folder (relative to {Path.cwd()})"
    inside = sorted(file.parent for pattern in ("*/", "*/*/") for file in folder.glob(pattern + CHECKPOINT_JSON))
    if inside:
        return f"there are some in it, so name one: {', '.join(map(str, inside))}"
    return f"it has no {CHECKPOINT_JSON}, which is written last"


def _rebuilt(kind: Any, value: Any) -> Any:
    """What ``dataclasses.asdict`` made ``value`` of; ``kind`` is its type."""
    if isinstance(value, dict):
        for cls in (kind, *typing.get_args(kind)):
            if dataclasses.is_dataclass(cls):
                kinds = typing.get_type_hints(cls)
                return cls(**{key: _rebuilt(kinds.get(key), v) for key, v in value.items()})  # type: ignore[operator]
    return value
