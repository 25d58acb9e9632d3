"""Mixtures of experts as ``transformers`` keeps them: keys of ``config.json``, and a tensor for each expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from titanlite.models.config_json import ConfigJson
from titanlite.models.layers import MixtureArgs
from titanlite.models.weight_map import Place, Stack


@dataclass(frozen=True)
class MixtureFiles:
    """The form in which ``transformers`` stores the mixtures of one family.

    Attributes:
        keys: the attributes of :class:`~titanlite.models.layers.MixtureArgs` that ``config.json`` states -> the keys.
        tensors: the name of each parameter of a mixture -> its name in a layer of the files. Where that has "{}", the
            parameter is a stack of tensors, with the number of the expert in this place.
        aliases: keys of ``config.json`` -> other names that some versions of ``transformers`` give them.
        args: the attributes that all models of the family have, where they are not the default ones.
    """

    keys: Mapping[str, str]
    tensors: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    args: Mapping[str, Any] = field(default_factory=dict)

    def read(self, stated: ConfigJson) -> MixtureArgs:
        """Return the mixture of a ``config.json``.

        Raises:
            ConfigError: a key is missing, or its value is not one of these sizes.
        """
        values: dict[str, Any] = dict(self.args)
        for name, key in self.keys.items():
            default, alias = getattr(MixtureArgs, name, None), self.aliases.get(key, "")
            key = key if stated.get(alias) is None else alias  # key has a default then
            if isinstance(default, bool):
                if not isinstance(stated.get(key), bool):
                    raise stated.unsupported(key, "must be true or false")
                values[name] = stated.get(key)
            elif isinstance(default, float):
                values[name] = stated.number(key)
            else:
                least = 1 if default is None or default else 0
                values[name] = stated.size(key, required=True, least=least)
        mixture = MixtureArgs(**values)
        if (broken := mixture.broken_rule()) is not None:
            raise stated.unsupported(self.keys[broken[0][0]], broken[1])
        return mixture

    def written(self, mixture: MixtureArgs) -> dict[str, Any]:
        """Return the keys of ``config.json`` that state ``mixture``."""
        return {key: getattr(mixture, name) for name, key in self.keys.items()}

    def places(self, mixture: MixtureArgs, there: str) -> dict[str, Place]:
        """Return the places of the parameters of a mixture in the layer ``there`` of the files."""
        experts = range(mixture.n_experts)
        return {
            name: Stack(tuple(f"{there}.{tensor.format(i)}" for i in experts))
            if "{}" in tensor
            else f"{there}.{tensor}"
            for name, tensor in self.tensors.items()
            if mixture.n_shared_experts or not name.startswith("shared.")
        }
