"""The contract of a model family, and the registry of families.

A family is a package ``titanlite.models.<name>`` whose module ``spec`` calls :func:`register_model`; third-party code
does the same from the module that ``experimental.custom_import`` names.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from titanlite.errors import ConfigError, shown
from titanlite.models.layers import LAYOUT, Decoder, DecoderArgs, Layout
from titanlite.models.weight_map import WeightMap
from titanlite.registry import Registry, nearest


@dataclass(frozen=True)
class HuggingFaceFormat:
    """The form in which ``transformers`` stores a family's weights, as functions.

    Attributes:
        model_type: the family's name in ``config.json``.
        to_config: a configured flavor -> the model's part of ``config.json``. The writer of the file adds the dtype of
            the weights and the ids of special tokens.
        from_config: a parsed ``config.json`` -> the configured flavor that it describes. Raises :class:`ConfigError`
            if the family does not compute such a model.
        check: ``(configured flavor, parsed config.json)``; raises :class:`ConfigError`, with the differences, if the
            file describes another model.
        weights: a configured flavor -> the place of every parameter in the files.
        copies: a configured flavor -> tensors that the files may hold twice: the name of the copy -> that of the other.
        ignored: a regular expression; tensors in the files whose whole name matches are not loaded.
    """

    model_type: str
    to_config: Callable[[Any], dict[str, Any]]
    from_config: Callable[[Mapping[str, Any]], Any]
    check: Callable[[Any, Mapping[str, Any]], None]
    weights: Callable[[Any], WeightMap]
    copies: Callable[[Any], Mapping[str, str]] = lambda args: {}
    ignored: str | None = None


@dataclass(frozen=True)
class ModelSpec:
    """A model family.

    Attributes:
        flavors: the sizes, by name. They are dataclasses of one type, with ``vocab_size`` (the number of token ids),
            ``max_seq_len`` (the number of positions), ``n_layers``, ``head_size``, ``tie_embeddings``, the sizes that
            ``layout.divisible`` names, and ``configured(vocab_size, seq_len)``, which returns the flavor completed for
            a tokenizer and a sequence length, or raises ``ValueError``.
        build: a configured flavor -> the module, called under the meta device. ``forward(tokens, positions=None)`` maps
            token ids [batch, seq_len] to logits [batch, seq_len, vocab_size]; for ``training.loss_chunks`` it takes
            ``labels=None`` too, passes them to its output projection by name, and returns what that returns; for
            documents that are told apart it takes ``starts=None`` (:class:`~titanlite.models.layers.Decoder`).
            ``init_weights(init)`` fills every parameter through :class:`titanlite.distributed.init.WeightInit`, and
            every buffer; ``size()`` returns a :class:`~titanlite.models.layers.ModelSize`; ``args`` is the flavor;
            ``positions`` is a slot for the positions of a process's tokens, int64 [seq_len]. Its blocks have a slot
            ``run`` and a method ``compute`` without in-place operations, and their attention is an
            :class:`~titanlite.models.layers.AttentionSlot`, which context parallelism and generation fill. In a
            pipeline stage, the children of other stages are None. Its ``forward`` takes and returns hidden states
            [batch, seq_len, dim] if it lacks the first or last children of the model.
        layout: a declaration of the module's parts.
        hugging_face: the form of the files; None if ``transformers`` does not have the family.
        torchtitan: a configured flavor -> the parameters whose rows are the features of rotated heads, and the features
            of one head; torchtitan keeps these rows in another order. None if its family is another.
    """

    name: str
    flavors: Mapping[str, Any]
    build: Callable[[Any], nn.Module] = Decoder
    layout: Layout = LAYOUT
    hugging_face: HuggingFaceFormat | None = None
    torchtitan: Callable[[Any], Mapping[str, int]] | None = None

    def flavor(self, name: str) -> Any:
        """Return a flavor.

        Raises:
            ConfigError: there is no such flavor; the message lists the known ones.
        """
        if name not in self.flavors:
            raise ConfigError(
                f"{self.name} has no such flavor{nearest(name, self.flavors)}; it has {', '.join(self.flavors)}",
                key="model.flavor",
                value=name,
            )
        return self.flavors[name]

    def resized(self, flavor: Any, sizes: Mapping[str, Any]) -> Any:
        """Return ``flavor`` with other ``sizes``.

        Raises:
            ConfigError: the family has no such size, they do not fit together, or the family's form in ``transformers``
                cannot say them. The key is ``model.args.`` and the name.
        """
        known = [f.name for f in fields(flavor) if f.name not in ("mixture", "latent")]
        mixture = getattr(flavor, "mixture", None)
        inner = [] if mixture is None else [f.name for f in fields(mixture)]
        for name, value in sizes.items():
            if name not in (*known, *inner):
                raise ConfigError(
                    f"{self.name} has no such size; it has {', '.join((*known, *inner))}",
                    key=f"model.args.{name}",
                    value=value,
                )
        if "ffn_dim" in sizes and mixture is not None and not mixture.n_dense_layers:
            raise ConfigError(
                f"has no effect: every block of {self.name} has experts; set model.args.expert_dim",
                key="model.args.ffn_dim",
                value=sizes["ffn_dim"],
            )
        args = replace(flavor, **{name: value for name, value in sizes.items() if name in known})
        if mixture is not None:
            args = replace(args, mixture=replace(mixture, **{n: value for n, value in sizes.items() if n in inner}))
        if isinstance(args, DecoderArgs) and (broken := args.broken_rule()) is not None:
            name = next(name for name in (*broken[0], *sizes) if name in sizes)
            raise ConfigError(f"{broken[1]}; change either", key=f"model.args.{name}", value=sizes[name])
        if sizes and self.hugging_face is not None:
            self.hugging_face.to_config(replace(args, vocab_size=args.vocab_size or 1))
        return args

    def configure(self, flavor: Any, vocab_size: int, seq_len: int, tokenizer_path: str = "", origin: str = "") -> Any:
        """Return ``flavor`` completed for a tokenizer and a sequence length. The tokenizer's path, and where it is
        from, are for messages.

        Raises:
            ConfigError: the tokenizer does not fit.
        """
        try:
            return flavor.configured(vocab_size, seq_len)
        except ValueError as e:
            raise ConfigError(
                f"{e}; take the tokenizer that belongs to the model, or a flavor that takes any vocabulary, such as "
                "debugmodel",
                key="model.tokenizer_path",
                value=tokenizer_path,
                origin=origin,
            ) from e


_registry: Registry[ModelSpec] = Registry("model", "model.name")


def register_model(spec: ModelSpec) -> None:
    _registry.add(spec.name, spec)


def get_model_spec(name: str) -> ModelSpec:
    """Return the family ``name``, imported from ``titanlite.models.<name>`` if it is not registered yet."""
    if name not in _registry.names():
        packages = _packages()
        # For an unknown name import all families, so that the message can list them.
        _import([name] if name in packages else packages)
    return _registry.get(name)


def model_spec_of(config: Mapping[str, Any]) -> tuple[ModelSpec, Any]:
    """Return the family and the configured flavor that a Hugging Face folder's ``config.json`` describes.

    Raises:
        ConfigError: no family has its ``model_type``, or those that have it do not compute such a model.
    """
    _import(_packages())
    kind, types, refusal = config.get("model_type"), set(), None
    # First the family of this name; one of somebody else is for those who ask for it.
    for spec in map(_registry.get, sorted(_registry.names(), key=lambda name: name != kind)):
        family = spec.hugging_face
        types |= {family.model_type} if family is not None else set()
        if family is not None and family.model_type == kind:
            try:
                return spec, family.from_config(config)
            except ConfigError as e:
                refusal = refusal or e
    raise refusal or ConfigError(
        f"config.json: model_type = {shown(kind)}: no family of models here is of this type; it must be one of "
        f"{', '.join(sorted(types))}"
    )


def same_network(name: str, other: str) -> bool:
    """Return whether two families build the same network from the same arguments."""
    try:
        one, two = get_model_spec(name), get_model_spec(other)
    except ConfigError:  # one of them is not registered here
        return name == other
    return (one.build, one.layout) == (two.build, two.layout)


def _packages() -> list[str]:
    import titanlite.models

    return [module.name for module in pkgutil.iter_modules(titanlite.models.__path__) if module.ispkg]


def _import(packages: list[str]) -> None:
    for package in packages:
        if importlib.util.find_spec(f"titanlite.models.{package}.spec"):
            importlib.import_module(f"titanlite.models.{package}.spec")
