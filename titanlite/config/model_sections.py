"""The sections [model], [model.args] and [experts] of the schema; see :mod:`titanlite.config.schema`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from titanlite.config.value_rules import AnyPath, Layers, NotNegative, NotNegativeFloat, PositiveFloat, Share, Size


@dataclass
class ModelArgs:
    """Sizes in place of the flavor's. Options that titanlite adds."""

    dim: Size | None = None
    """The features of the hidden states. Unset: as in the flavor; so with all keys of this section."""
    n_layers: Layers | None = None
    """The number of blocks."""
    n_heads: Size | None = None
    """The number of heads of queries."""
    n_kv_heads: Size | None = None
    """The number of heads of keys and values; it divides n_heads."""
    head_dim: Size | None = None
    """The features of a head, where they are not dim / n_heads."""
    ffn_dim: Size | None = None
    """The features inside the feed-forward layers."""
    vocab_size: Size | None = None
    """The number of token ids; at least the tokenizer's."""
    rope_theta: PositiveFloat | None = None
    """The base of the rotary frequencies."""
    norm_eps: PositiveFloat | None = None
    """The epsilon of norms."""
    tie_embeddings: bool | None = None
    """The embedding is also the output projection."""
    sliding_window: NotNegative | None = None
    """The number of positions that each position attends to; 0: all before it. The families mistral and phi3."""
    partial_rotary_factor: Share | None = None
    """The share of a head's features that are rotated. The family phi3."""
    n_experts: Size | None = None
    """The number of experts in each block that has any. This and the next two: families of mixtures."""
    experts_per_token: Size | None = None
    """The number of experts that each token uses."""
    expert_dim: Size | None = None
    """The features inside an expert."""


@dataclass
class Model:
    name: str = "llama3"
    """The model family: a package under models/, or one registered by experimental.custom_import. With hf_config, or
    published weights and no flavor: by default the one of the folder's config.json."""
    flavor: str = "debugmodel"
    """The size of the model, one of the family's flavors. hf: that of a Hugging Face folder's config.json, which is
    also the default with hf_config, or where checkpoint.initial_load_path is such a folder."""
    hf_config: AnyPath = ""
    """A config.json of transformers, or its folder, that says the shape of the model; it needs no weights."""
    args: ModelArgs = field(default_factory=ModelArgs)
    tokenizer_path: AnyPath = ""
    """A Hugging Face tokenizer.json (or its folder), or a Llama 3 tokenizer.model. Empty: that of the weights that
    the run begins with, else the small BPE that titanlite ships."""
    converters: list[str] = field(default_factory=list)
    """Converters to apply to the model, in this order, after it is built and before it is sharded."""
    print_after_conversion: bool = False
    """Log the model's modules after the converters have run."""


@dataclass
class Experts:
    """The balance of the load of experts. Options that titanlite adds."""

    balance_loss: NotNegativeFloat | None = None
    """The coefficient of the loss that pulls the experts of a mixture to equal load. Unset: 0.001 where the router has
    no bias, else 0. The logged loss is without it."""
    balance_loss_over: Literal["sequence", "batch", "global_batch"] = "sequence"
    """The tokens whose load this loss is of: those of each sequence; of a whole microbatch, which is
    training.local_batch_size sequences; or of the microbatches of all data-parallel processes."""
    z_loss: NotNegativeFloat = 0.0
    """The coefficient of the loss that keeps the logits of routers small."""
    bias_update_rate: NotNegativeFloat | None = None
    """The change of a router's bias after each step, up for experts with less than the mean load, down for those with
    more. Unset: 0.001 where the router has a bias; 0 leaves the bias as it is."""
