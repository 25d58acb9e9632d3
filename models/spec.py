"""What a model family must provide, and the registry of families.

A family is a package ``titanlite.models.<name>`` whose module ``spec`` calls :func:`register_model`; third-party code
does the same from the module that ``experimental.custom_import`` names.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from titanlite.config import JobConfig
from titanlite.distributed.mesh import Mesh
from titanlite.errors import ConfigError
from titanlite.metrics.flops import ModelSize
from titanlite.registry import Registry, nearest


@dataclass(frozen=True)
class HuggingFaceFormat:
    """How a family's weights are kept by ``transformers``, as builders.

    Attributes:
        to_config: a configured flavor -> what ``config.json`` says of the model. The dtype of the weights and the ids
            of special tokens are not the model's; who writes the file adds them.
        from_config: a parsed ``config.json`` -> the configured flavor that it describes. Raises :class:`ConfigError`
            for what the family does not compute.
        check: ``(configured flavor, parsed config.json)``; raises :class:`ConfigError`, naming what differs, where the
            file describes another model.
        names: a configured flavor -> the name in the files of every parameter by its name here. Tied parameters have
            several names here and one there.
        ignored: a regular expression; tensors in the files whose whole name matches hold nothing to load.
    """

    to_config: Callable[[Any], dict[str, Any]]
    from_config: Callable[[Mapping[str, Any]], Any]
    check: Callable[[Any, Mapping[str, Any]], None]
    names: Callable[[Any], dict[str, str]]
    ignored: str | None = None


@dataclass(frozen=True)
class ModelSpec:
    """A model family, as builders.

    Attributes:
        flavors: the sizes, by name; what an entry is, only the family knows.
        configure: ``(flavor, vocab_size, seq_len)`` -> the flavor completed for a tokenizer and a sequence length.
        build: a configured flavor -> the module, called under the meta device. Its ``init_weights(init)`` fills every
            parameter through :class:`titanlite.distributed.init.WeightInit`, and every buffer. ``forward`` maps token
            ids [batch, seq_len] to logits [batch, seq_len, vocab_size].
        check: ``(configured flavor, mesh, config)``; raises :class:`ConfigError` where the degrees of parallelism, or
            other options, do not fit the flavor. Called before anything is built.
        chain: a built module -> the names of its children, and of the entries of its ``ModuleDict``, in the order of
            the forward: where pipeline parallelism can cut it. Names in one tuple stay together. In the part that a
            pipeline stage has, the other children are None, and ``forward`` takes and returns hidden states
            [batch, seq_len, dim] where it has not the model's ends.
        parallelize: ``(module or part of it, mesh, config)`` shards it in place, and returns what it did, for the log.
        size: a built module -> the numbers that FLOPs follow from.
        hugging_face: None for a family that ``transformers`` does not have.
        tensor_parallel: the part of ``parallelize`` that splits layers, ``(module, mesh, config)``, for models that
            are not trained, which have no use for FSDP2. None: they run on one process.

    For text from a checkpoint, and for conversion, the flavors are dataclasses of one type, with ``vocab_size``, the
    token ids that the model knows, and ``max_seq_len``, the positions; :mod:`titanlite.inference.generate` says what
    it needs of the module.
    """

    name: str
    flavors: Mapping[str, Any]
    configure: Callable[[Any, int, int], Any]
    build: Callable[[Any], nn.Module]
    check: Callable[[Any, Mesh, JobConfig], None]
    chain: Callable[[nn.Module], list[tuple[str, ...]]]
    parallelize: Callable[[nn.Module, Mesh, JobConfig], dict[str, str]]
    size: Callable[[nn.Module], ModelSize]
    hugging_face: HuggingFaceFormat | None = None
    tensor_parallel: Callable[[nn.Module, Mesh, JobConfig], str] | None = None

    def flavor(self, name: str) -> Any:
        """A flavor, or a :class:`ConfigError` that lists the known ones."""
        if name not in self.flavors:
            raise ConfigError(
                f"{self.name} has no such flavor{nearest(name, self.flavors)}; it has {', '.join(self.flavors)}",
                key="model.flavor",
                value=name,
            )
        return self.flavors[name]


_registry: Registry[ModelSpec] = Registry("model", "model.name")


def register_model(spec: ModelSpec) -> None:
    _registry.add(spec.name, spec)


def get_model_spec(name: str) -> ModelSpec:
    """The family ``name``, imported from ``titanlite.models.<name>`` if it is not registered yet."""
    if name not in _registry.names():
        packages = _packages()
        # Of a name that is not there all, so that the message can list them.
        _import([name] if name in packages else packages)
    return _registry.get(name)


def model_spec_of(config: Mapping[str, Any]) -> tuple[ModelSpec, Any]:
    """The family that a Hugging Face folder's ``config.json`` describes, and its configured flavor.

    Raises:
        ConfigError: no family computes such a model; in the words of the one that comes first.
    """
    _import(_packages())
    refusals: list[ConfigError] = []
    for name in _registry.names():
        spec = _registry.get(name)
        if spec.hugging_face is not None:
            try:
                return spec, spec.hugging_face.from_config(config)
            except ConfigError as e:
                refusals.append(e)
    raise refusals[0]


def _packages() -> list[str]:
    import titanlite.models

    return [module.name for module in pkgutil.iter_modules(titanlite.models.__path__) if module.ispkg]


def _import(packages: list[str]) -> None:
    for package in packages:
        if importlib.util.find_spec(f"titanlite.models.{package}.spec"):
            importlib.import_module(f"titanlite.models.{package}.spec")
