"""What activation checkpointing keeps, and that it computes the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import FlopCounterMode

from titanlite.config.schema import ActivationCheckpoint
from titanlite.distributed.activation_checkpoint import _op_contexts, apply_activation_checkpoint
from titanlite.distributed.init import WeightInit
from titanlite.models.layers import Decoder, DecoderArgs

ARGS = DecoderArgs(dim=64, n_layers=4, n_heads=4, n_kv_heads=4, ffn_dim=128, vocab_size=128, max_seq_len=32)
TOKENS = torch.randint(128, (2, 32), generator=torch.Generator().manual_seed(0))


def build(mode: str, option: str = "2") -> Decoder:
    model = Decoder(ARGS)
    model.init_weights(WeightInit(model, 0))
    apply_activation_checkpoint(model.layers, ActivationCheckpoint(mode=mode, selective_ac_option=option))  # type: ignore[arg-type]
    return model


def matmul_flops(model: Decoder) -> int:
    """FLOPs of the matmuls of a forward and backward: recomputed ones count again."""
    with FlopCounterMode(display=False) as counter:
        model(TOKENS).sum().backward()
    return sum(f for op, f in counter.get_flop_counts()["Global"].items() if op is torch.ops.aten.mm)


def saved_bytes(model: Decoder) -> int:
    """Bytes that the forward keeps for backward, parameters aside."""
    parameters = {p.data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(TOKENS)
    del out
    return sum(storages.values())


# The forward matmuls of one block but w2's: its result is the block's, which nothing in the block keeps.
BLOCK = 2 * TOKENS.numel() * (4 * 64 * 64 + 2 * 64 * 128)


@pytest.mark.parametrize(
    ("mode", "option", "recomputed"),
    [
        ("full", "2", 4 * BLOCK),
        ("selective", "1", 4 * BLOCK),
        ("selective", "2", 2 * BLOCK),
        ("selective", "3", 1 * BLOCK),
        # wk, wo and w3 (in the order of the forward, every second of wq wk wv wo w1 w3 w2)
        ("selective", "op", 4 * 2 * TOKENS.numel() * (2 * 64 * 64 + 64 * 128)),
    ],
)
def test_what_is_recomputed(mode: str, option: str, recomputed: int) -> None:
    plain, other = build("none"), build(mode, option)
    assert matmul_flops(other) - matmul_flops(plain) == recomputed
    # The second step recomputes what the first did.
    assert matmul_flops(other) - matmul_flops(plain) == recomputed
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        assert a.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_full_and_every_block_keep_least() -> None:
    none, half, full = (saved_bytes(build(*arguments)) for arguments in (("none",), ("selective", "2"), ("full",)))
    assert full < half < none
    assert full < 0.2 * none


def test_every_step_keeps_the_same_matmuls() -> None:
    mm = torch.ops.aten.mm.default
    for _ in range(2):
        forward, _ = _op_contexts()
        kept = [forward.policy_fn(SimpleNamespace(is_recompute=False), mm) for _ in range(7)]
        assert [policy is CheckpointPolicy.MUST_SAVE for policy in kept] == [True, False] * 3 + [True]
