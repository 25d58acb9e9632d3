"""The published sizes of Llama 3, and the family's registration."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from titanlite.errors import ConfigError
from titanlite.metrics.flops import ModelSize
from titanlite.models.llama3.hugging_face import HUGGING_FACE
from titanlite.models.llama3.model import Llama3, Llama3Args, RopeScaling
from titanlite.models.llama3.parallelize import apply_tensor_parallel, check, parallelize
from titanlite.models.spec import ModelSpec, register_model

# 8B and 70B are Llama 3 (8192 positions); 405B exists as Llama 3.1 only, and 1B and 3B as Llama 3.2 only, with their
# scaled rotary frequencies.
FLAVORS = {
    "debugmodel": Llama3Args(dim=256, n_layers=6, n_heads=16, n_kv_heads=16, ffn_dim=768, vocab_size=0),
    "1B": Llama3Args(
        dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim=8192, tie_embeddings=True, rope_scaling=RopeScaling(32)
    ),
    "3B": Llama3Args(
        dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, ffn_dim=8192, tie_embeddings=True, rope_scaling=RopeScaling(32)
    ),
    "8B": Llama3Args(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_dim=14336),
    "70B": Llama3Args(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=28672),
    "405B": Llama3Args(dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, ffn_dim=53248, rope_scaling=RopeScaling(8)),
}


def configure(args: Llama3Args, vocab_size: int, seq_len: int) -> Llama3Args:
    """A flavor for a tokenizer and a sequence length.

    A flavor without a vocabulary of its own takes the tokenizer's, rounded up to a multiple of 128 (tensor cores and
    sharding want round sizes); one that has its own must hold the tokenizer's.
    """
    if args.vocab_size and vocab_size > args.vocab_size:
        raise ConfigError(
            f"model.tokenizer_path: the tokenizer has {vocab_size} tokens, more than the {args.vocab_size} of this "
            "flavor's vocabulary; take the tokenizer that belongs to the model, or the flavor debugmodel, which takes "
            "any vocabulary"
        )
    return replace(args, vocab_size=args.vocab_size or -(-vocab_size // 128) * 128, max_seq_len=seq_len)


def model_size(model: nn.Module) -> ModelSize:
    assert isinstance(model, Llama3)
    args = model.args
    assert model.tok_embeddings is not None
    return ModelSize(
        params=sum(p.numel() for p in model.parameters()),
        # A tied embedding is the output projection too, and that is a matmul.
        embedding_params=0 if args.tie_embeddings else model.tok_embeddings.weight.numel(),
        layers=args.n_layers,
        heads=args.n_heads,
        head_dim=args.head_dim,
        dim=args.dim,
        vocab_size=args.vocab_size,
    )


def chain(model: nn.Module) -> list[tuple[str, ...]]:
    assert isinstance(model, Llama3)
    return [("tok_embeddings",), *((f"layers.{i}",) for i in model.layers), ("output", "norm")]


register_model(
    ModelSpec(
        name="llama3",
        flavors=FLAVORS,
        configure=configure,
        build=Llama3,
        check=check,
        chain=chain,
        parallelize=parallelize,
        size=model_size,
        hugging_face=HUGGING_FACE,
        tensor_parallel=apply_tensor_parallel,
    )
)
