"""The shared decoder as ``transformers`` keeps it: its ``config.json`` and the names of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from titanlite.errors import ConfigError
from titanlite.models.config_json import ConfigJson, shown
from titanlite.models.hugging_face_latent import latent_from_config, latent_layer, latent_to_config
from titanlite.models.hugging_face_mixture import MixtureFiles
from titanlite.models.hugging_face_rope import rope_from_config, rope_to_config
from titanlite.models.layers import DecoderArgs, LatentArgs
from titanlite.models.spec import HuggingFaceFormat
from titanlite.models.weight_map import Place, Rows, WeightMap

_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")

# The name of each parameter of a block -> its name in a layer of the files, without ".weight".
LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
HEAD_NORMS = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}


@dataclass(frozen=True)
class DecoderFiles:
    """The form in which ``transformers`` stores one family of decoders.

    Attributes:
        family: titanlite's name of the family, for messages.
        model_type, architecture: as in ``config.json``.
        fixed: the only values in ``config.json`` that the network computes; a missing or null key means the same.
        defaults: the values that ``transformers`` takes for missing keys, where those are others than
            :meth:`from_config` states.
        args: the arguments of every model of the family that differ from those of :class:`DecoderArgs`.
        window: ``config.json`` has the key ``sliding_window``.
        rope_kinds: the values of ``rope_type`` that are computed.
        partial_rotary: ``config.json`` has the key ``partial_rotary_factor``.
        layer: the name of each parameter of a block, without ".weight" -> its name in a layer of the files.
        mixture: the form of the mixtures of experts; None: the family has none.
        latent: attention is latent.
        fused: tensors in a layer of the files -> the parameters of a block that they concatenate, in order.
        ignored: see :class:`~titanlite.models.spec.HuggingFaceFormat`.
    """

    family: str
    model_type: str
    architecture: str
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    args: Mapping[str, Any] = field(default_factory=dict)
    window: bool = False
    rope_kinds: tuple[str, ...] = ("default", "llama3", "yarn")
    partial_rotary: bool = False
    layer: Mapping[str, str] = field(default_factory=lambda: LAYER)
    mixture: MixtureFiles | None = None
    latent: bool = False
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ignored: str | None = None

    def format(self) -> HuggingFaceFormat:
        return HuggingFaceFormat(
            self.model_type, self.to_config, self.from_config, self.check, self.weights, self.copies, self.ignored
        )

    def weights(self, args: DecoderArgs) -> WeightMap:
        """Return the place of each parameter. The weights need no permutation: titanlite and ``transformers`` both pair
        the elements i and i + rotary_dim/2 in rotary embeddings."""
        heads, groups = args.n_heads * args.head_size, args.n_kv_heads * args.head_size
        rows = {"wq": heads, "wk": groups, "wv": groups, "w1": args.ffn_dim, "w3": args.ffn_dim}
        places: dict[str, Place] = {"tok_embeddings.weight": "model.embed_tokens.weight"}
        every = self.layer if args.latent is None else {**self.layer, **latent_layer(args.latent)}
        for i in range(args.n_layers):
            here, there = f"layers.{i}", f"model.layers.{i}"
            layer = every
            if self.mixture is not None and args.mixture is not None and i >= args.mixture.n_dense_layers:
                layer = {name: tensor for name, tensor in layer.items() if not name.startswith("feed_forward.")}
                experts = self.mixture.places(args.mixture, there)
                places |= {f"{here}.feed_forward.{name}": place for name, place in experts.items()}
            places |= {f"{here}.{name}.weight": f"{there}.{tensor}.weight" for name, tensor in layer.items()}
            for tensor, names in self.fused.items():
                start = 0
                for name in names:
                    stop = start + rows[name.rpartition(".")[2]]
                    places[f"{here}.{name}.weight"] = Rows(f"{there}.{tensor}.weight", start, stop)
                    start = stop
            for name in ("attention.wq", "attention.wk", "attention.wv") if args.qkv_bias else ():
                places[f"{here}.{name}.bias"] = f"{there}.{self.layer[name]}.bias"
        places["norm.weight"] = "model.norm.weight"
        places["output.weight"] = "model.embed_tokens.weight" if args.tie_embeddings else "lm_head.weight"
        return places

    def copies(self, args: DecoderArgs) -> dict[str, str]:
        """Return the tensors that the files may hold twice: the head of a model that ties it to the embedding."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if args.tie_embeddings else {}

    def to_config(self, args: DecoderArgs) -> dict[str, Any]:
        """Return the model's part of ``config.json``.

        Raises:
            ConfigError: the family's files have no place for one of ``args``; the message names it.
        """
        config = self._written(args)
        # A sequence may be longer than a config.json is believed.
        read = self.from_config({**config, "max_position_embeddings": 1})
        lost = {name: here for name, (_, here) in _differences(read, args).items()}
        if lost:
            stated = ", ".join(f"{name} = {shown(value)}" for name, value in lost.items())
            raise ConfigError(
                f"{stated}: a config.json of {self.family} (model_type {shown(self.model_type)}) cannot say it; leave "
                "it out, or choose the family that has it",
                key=f"model.args.{next(iter(lost))}",
                value=next(iter(lost.values())),
            )
        return config

    def _written(self, args: DecoderArgs) -> dict[str, Any]:
        window = {"sliding_window": args.sliding_window} if self.window else {}
        partial = {"partial_rotary_factor": args.partial_rotary_factor or 1.0} if self.partial_rotary else {}
        mixture = self.mixture.written(args.mixture) if self.mixture and args.mixture else {}
        head = latent_to_config(args.latent) if self.latent and args.latent else {"head_dim": args.head_size}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_size": args.dim,
            "intermediate_size": args.ffn_dim,
            "num_hidden_layers": args.n_layers,
            "num_attention_heads": args.n_heads,
            "num_key_value_heads": args.n_kv_heads,
            **head,
            "vocab_size": args.vocab_size,
            "max_position_embeddings": args.max_seq_len,
            "rms_norm_eps": args.norm_eps,
            "rope_theta": args.rope_theta,
            "rope_scaling": rope_to_config(args.rope_scaling),
            "tie_word_embeddings": args.tie_embeddings,
            **window,
            **partial,
            **mixture,
            **self.fixed,
            "pad_token_id": None,  # Phi-3 has a default, which another vocabulary may not have
            "initializer_range": 0.02,
            "use_cache": True,
        }

    def from_config(self, config: Mapping[str, Any]) -> DecoderArgs:
        """Return the model that a ``config.json`` describes; ``max_seq_len`` is its ``max_position_embeddings``.

        Raises:
            ConfigError: a size is missing, or a key has a value that this network does not compute.
        """
        stated = ConfigJson(
            {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, **self.defaults, **config}, self.family
        )
        self._check_fixed(stated)
        dim, layers, heads, ffn_dim, vocab_size = (stated.size(key, required=True) for key in _REQUIRED)
        max_seq_len = stated.size("max_position_embeddings")
        if stated.get("tie_word_embeddings") not in (None, True, False):
            raise stated.unsupported("tie_word_embeddings", "must be true or false")
        latent = latent_from_config(stated) if self.latent else None
        kv_heads, head_dim = _heads(stated, dim, heads, latent)
        theta, scaling, partial = rope_from_config(stated, self.rope_kinds, self.partial_rotary, mscale=self.latent)
        args = DecoderArgs(
            dim=dim,
            n_layers=layers,
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=None if latent is not None or head_dim * heads == dim else head_dim,
            ffn_dim=ffn_dim,
            vocab_size=vocab_size,
            rope_theta=theta,
            rope_scaling=scaling,
            partial_rotary_factor=partial,
            norm_eps=stated.number("rms_norm_eps"),
            tie_embeddings=bool(stated.get("tie_word_embeddings")),
            max_seq_len=max_seq_len or 2048,
            sliding_window=stated.size("sliding_window") if self.window else None,
            mixture=self.mixture.read(stated) if self.mixture is not None else None,
            latent=latent,
            **self.args,
        )
        if args.rotary_size % 2 or not args.rotary_size:
            raise stated.unsupported("partial_rotary_factor", f"must make an even part of {head_dim} features", partial)
        return args

    def _check_fixed(self, stated: ConfigJson) -> None:
        if stated.get("model_type") != self.model_type:
            raise stated.unsupported("model_type", f"must be {shown(self.model_type)}")
        if stated.get("quantization_config"):
            raise ConfigError(
                "config.json: has a quantization_config: quantized weights are for inference; take the weights in high "
                "precision"
            )
        for key, value in {"architectures": [self.architecture], **self.fixed}.items():
            stated.only(key, value)
        kinds = stated.get("layer_types")
        kind = "sliding_attention" if self.window and stated.get("sliding_window") else "full_attention"
        if kinds is not None and kinds != [kind] * stated.size("num_hidden_layers", True):
            raise stated.unsupported("layer_types", f"must be {kind} for all layers")

    def check(self, args: DecoderArgs, config: Mapping[str, Any]) -> None:
        """Check that ``config.json`` describes the model ``args``; the sequence length may differ.

        Raises:
            ConfigError: it describes another model; the message names every difference.
        """
        described = self.from_config(config)
        there, here = self._written(replace(described, max_seq_len=args.max_seq_len)), self._written(args)
        pairs = {key: (there[key], here[key]) for key in there if there[key] != here[key]}
        differing = [f"{key} is {shown(one)} there and {shown(other)} here"
            for key, (one, other) in (pairs or _differences(described, args)).items()]  # fmt: skip
        if differing:
            raise ConfigError(
                f"config.json: describes another model than model.flavor: {'; '.join(differing)}; choose the flavor "
                "that these weights belong to"
            )


def _heads(stated: ConfigJson, dim: int, heads: int, latent: LatentArgs | None) -> tuple[int, int]:
    """Return the number of heads of keys, and the features of a head."""
    kv_heads = stated.size("num_key_value_heads") or heads  # null means this, as in transformers
    if latent is not None:
        if kv_heads != heads:
            raise stated.unsupported("num_key_value_heads", f"must be num_attention_heads = {heads}", kv_heads)
        return kv_heads, latent.head_dim
    head_dim = stated.size("head_dim")
    if head_dim is None and dim % heads:
        raise stated.unsupported("hidden_size", f"must be a multiple of num_attention_heads = {heads}")
    head_dim = head_dim or dim // heads
    if head_dim % 2:
        raise stated.unsupported("head_dim", "must be even, for rotary embeddings", head_dim)
    if heads % kv_heads:
        raise stated.unsupported("num_key_value_heads", f"must divide num_attention_heads = {heads}", kv_heads)
    return kv_heads, head_dim


def _differences(there: DecoderArgs, here: DecoderArgs) -> dict[str, tuple[Any, Any]]:
    """Return the arguments that differ, but for the sequence length, by name; a head's default size is one. Where all
    blocks have experts, nothing has the size of a plain feed-forward."""
    one, other = (
        replace(args, head_dim=None if args.latent else args.head_size, max_seq_len=1) for args in (there, here)
    )
    if all(args.mixture is not None and not args.mixture.n_dense_layers for args in (one, other)):
        other = replace(other, ffn_dim=one.ffn_dim)
    pairs = {f.name: (getattr(one, f.name), getattr(other, f.name)) for f in fields(one)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
