"""The shared decoder as ``transformers`` keeps it: its ``config.json`` and the names of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from titanlite.errors import ConfigError
from titanlite.models.layers import DecoderArgs, RopeScaling
from titanlite.models.spec import HuggingFaceFormat
from titanlite.models.weight_map import Place, WeightMap

_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")

# The largest sizes that are believed. A file that states more would fill the memory before a tensor is compared.
_MOST = {
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"), 1 << 24),
}

_ROPE_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}


@dataclass(frozen=True)
class DecoderFiles:
    """The form in which ``transformers`` stores one family of decoders.

    Attributes:
        family: titanlite's name of the family, for messages.
        model_type, architecture: as in ``config.json``.
        fixed: the only values in ``config.json`` that the network computes; a missing or null key means the same.
        layer: the name of each parameter of a block, without ".weight" -> its name in a layer of the files.
        ignored: see :class:`~titanlite.models.spec.HuggingFaceFormat`.
    """

    family: str
    model_type: str
    architecture: str
    fixed: Mapping[str, Any]
    layer: Mapping[str, str]
    ignored: str | None = None

    def format(self) -> HuggingFaceFormat:
        return HuggingFaceFormat(
            self.model_type, self.to_config, self.from_config, self.check, self.weights, self.copies, self.ignored
        )

    def weights(self, args: DecoderArgs) -> WeightMap:
        """Return the place of each parameter. The weights need no permutation: titanlite and ``transformers`` both pair
        the elements i and i + head_dim/2 in rotary embeddings."""
        places: dict[str, Place] = {"tok_embeddings.weight": "model.embed_tokens.weight"}
        for i in range(args.n_layers):
            places |= {
                f"layers.{i}.{name}.weight": f"model.layers.{i}.{hf_name}.weight"
                for name, hf_name in self.layer.items()
            }
        places["norm.weight"] = "model.norm.weight"
        places["output.weight"] = "model.embed_tokens.weight" if args.tie_embeddings else "lm_head.weight"
        return places

    def copies(self, args: DecoderArgs) -> dict[str, str]:
        """Return the tensors that the files may hold twice: the head of a model that ties it to the embedding."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if args.tie_embeddings else {}

    def to_config(self, args: DecoderArgs) -> dict[str, Any]:
        """Return the model's part of ``config.json``. Scaled rotary frequencies have the keys that ``transformers``
        reads since 4.43, as do other programs."""
        scaling = None
        if args.rope_scaling is not None:
            scaling = {key: getattr(args.rope_scaling, name) for name, key in _ROPE_LLAMA3.items()}
            # transformers warns if a factor is not a float.
            scaling = {key: value if key.startswith("original") else float(value) for key, value in scaling.items()}
            scaling["rope_type"] = "llama3"
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_size": args.dim,
            "intermediate_size": args.ffn_dim,
            "num_hidden_layers": args.n_layers,
            "num_attention_heads": args.n_heads,
            "num_key_value_heads": args.n_kv_heads,
            "head_dim": args.head_size,
            "vocab_size": args.vocab_size,
            "max_position_embeddings": args.max_seq_len,
            "rms_norm_eps": args.norm_eps,
            "rope_theta": args.rope_theta,
            "rope_scaling": scaling,
            "tie_word_embeddings": args.tie_embeddings,
            **self.fixed,
            "initializer_range": 0.02,
            "use_cache": True,
        }

    def from_config(self, config: Mapping[str, Any]) -> DecoderArgs:
        """Return the model that a ``config.json`` describes; ``max_seq_len`` is its ``max_position_embeddings``.

        Raises:
            ConfigError: a size is missing, or a key has a value that this network does not compute.
        """
        if config.get("model_type") != self.model_type:
            raise self._unsupported("model_type", config.get("model_type"), f'must be "{self.model_type}"')
        if config.get("quantization_config"):
            raise ConfigError(
                "config.json: has a quantization_config: quantized weights are for inference; take the weights in high "
                "precision"
            )
        for key, only in {"architectures": [self.architecture], "partial_rotary_factor": 1.0, **self.fixed}.items():
            if config.get(key) not in (None, only):
                raise self._unsupported(key, config[key], f"must be {_shown(only)}")
        for key, most in _MOST.items():
            value = config.get(key)
            if (value is not None or key in _REQUIRED) and (type(value) is not int or not 1 <= value <= most):
                raise self._unsupported(key, value, f"must be a whole number from 1 to {most}")
        if config.get("tie_word_embeddings") not in (None, True, False):
            raise self._unsupported("tie_word_embeddings", config["tie_word_embeddings"], "must be true or false")
        heads, dim = config["num_attention_heads"], config["hidden_size"]
        # Missing and null keys have these defaults, as in transformers.
        kv_heads, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim") or dim // heads
        if not config.get("head_dim") and dim % heads:
            raise self._unsupported("hidden_size", dim, f"must be a multiple of num_attention_heads = {heads}")
        if head_dim % 2:
            raise self._unsupported("head_dim", head_dim, "must be even, for rotary embeddings")
        if heads % kv_heads:
            raise self._unsupported("num_key_value_heads", kv_heads, f"must divide num_attention_heads = {heads}")
        theta, scaling = self._rope(config)
        return DecoderArgs(
            dim=dim,
            n_layers=config["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=None if head_dim * heads == dim else head_dim,
            ffn_dim=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=self._number(config, "rms_norm_eps", 1e-6),
            tie_embeddings=bool(config.get("tie_word_embeddings")),
            max_seq_len=config.get("max_position_embeddings") or 2048,
        )

    def check(self, args: DecoderArgs, config: Mapping[str, Any]) -> None:
        """Check that ``config.json`` describes the model ``args``; the sequence length may differ.

        Raises:
            ConfigError: it describes another model; the message names every difference.
        """
        described = replace(self.from_config(config), max_seq_len=args.max_seq_len)
        there, here = self.to_config(described), self.to_config(args)
        differing = [f"{key} is {_shown(there[key])} there and {_shown(here[key])} here" for key in there
            if there[key] != here[key]]  # fmt: skip
        if differing:
            raise ConfigError(
                f"config.json: describes another model than model.flavor: {'; '.join(differing)}; choose the flavor "
                "that these weights belong to"
            )

    def _rope(self, config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
        """Return the base of the rotary frequencies and their scaling, from the keys of transformers 4 (``rope_theta``
        and ``rope_scaling``) or 5 (both in ``rope_parameters``)."""
        key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        rope = config.get(key) or {}
        if not isinstance(rope, Mapping):
            raise self._unsupported(key, rope, "must be an object")
        theta = self._number(rope, "rope_theta", self._number(config, "rope_theta", 10000.0))
        if rope.get("partial_rotary_factor") not in (None, 1.0):
            raise self._unsupported(f"{key}.partial_rotary_factor", rope["partial_rotary_factor"], "must be 1.0")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return theta, None
        if kind != "llama3":
            raise self._unsupported(f"{key}.rope_type", kind, 'must be "llama3" or "default"')
        return theta, RopeScaling(**{name: self._number(rope, key) for name, key in _ROPE_LLAMA3.items()})

    def _number(self, holder: Mapping[str, Any], key: str, default: Any = None) -> Any:
        value = holder.get(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e15:
            raise self._unsupported(key, value, "must be a number above 0")
        return value

    def _unsupported(self, key: str, value: Any, rule: str) -> ConfigError:
        return ConfigError(
            f"config.json: {key} = {_shown(value)}: {rule}; the folder holds a model that {self.family} does not "
            "compute, or the file is damaged"
        )


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
