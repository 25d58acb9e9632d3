"""Documents that share a sequence: each has the losses and gradients that it has alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

from titanlite.distributed import document_attention
from titanlite.distributed.document_attention import attend_apart, attend_in_blocks, block_mask, lengths
from titanlite.models.layers import Attention, Block, Decoder, DecoderArgs, causal_attention, document_mask, rope_table
from titanlite.optim import IGNORED, cross_entropy_loss

ROWS = {
    "two": [[20, 44], [64]],
    "many": [[1, 1, 30, 2, 30], [7] * 9 + [1]],
    "ends": [[63, 1], [1, 63]],
}


def starts_of(rows: list[list[int]]) -> Tensor:
    """The index at which the document of each token begins, given the lengths of the documents."""
    begins = [[sum(row[:i]) for i in range(len(row))] for row in rows]
    return torch.tensor(
        [
            [b for b, n in zip(begin, row, strict=True) for _ in range(n)]
            for begin, row in zip(begins, rows, strict=True)
        ]
    )


def model_of(window: int | None) -> Decoder:
    args = DecoderArgs(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=64, max_seq_len=64, sliding_window=window
    )
    torch.manual_seed(0)
    model = Decoder(args)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.2)
    model.rope.copy_(rope_table(64, args.rotary_size, args.rope_theta))
    return model


def compile_blocks(model: Decoder, mask_of: Any, core: Any, backend: str) -> None:
    """Compile each block with a way to compute attention within documents."""
    model.mask_of = mask_of
    for block in model.layers.values():
        assert isinstance(block, Block)
        block.attention.core = core
        block.run = torch.compile(block.compute, backend=backend, fullgraph=True)


@pytest.mark.parametrize("way", ["mask", "apart", "operator"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("name", ROWS)
def test_packed_documents_are_as_alone(name: str, window: int | None, way: str) -> None:
    rows = ROWS[name]
    starts = starts_of(rows)
    generator = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(64, starts.shape, generator=generator) for _ in range(2))
    packed, alone = model_of(window), model_of(window)
    if way != "mask":
        packed.mask_of, core = document_attention.document_attention("cpu", compiling=way == "operator")
        for module in packed.modules():
            if isinstance(module, Attention):
                module.core = core
    logits = packed(tokens, starts=starts)
    loss = cross_entropy_loss(logits, labels)
    loss.backward()
    total = torch.zeros(())
    for row, sizes in enumerate(rows):
        begin = 0
        for size in sizes:
            part = slice(begin, begin + size)
            its_logits = alone(tokens[row : row + 1, part])
            torch.testing.assert_close(logits[row : row + 1, part], its_logits, rtol=1e-4, atol=1e-5)
            total = total + cross_entropy_loss(its_logits, labels[row : row + 1, part])
            begin += size
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    for (param_name, one), other in zip(packed.named_parameters(), alone.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 1e-5 * other.grad.norm(), param_name  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("name", ROWS)
def test_the_operator_keeps_the_rules_of_operators(name: str, window: int) -> None:
    """Its schema, its registration for autograd, and the shapes and strides of results without data. Its numbers are
    held against documents alone, above."""
    q, k, v = (torch.randn(2, 3, 64, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    operator = torch.ops.titanlite.attend_apart.default
    torch.library.opcheck(operator, (q, k, v, starts_of(ROWS[name]), window))


def test_values_of_another_size_are_attended_to_through_a_mask() -> None:
    q, k, v = torch.randn(2, 3, 64, 8), torch.randn(2, 3, 64, 8), torch.randn(2, 3, 64, 6)
    starts = starts_of(ROWS["many"])
    out = document_attention.attend_in_operator(q, k, v, None, starts)
    torch.testing.assert_close(out, causal_attention(q, k, v, None, document_mask(starts)))


@pytest.mark.slow
def test_the_operator_is_in_one_graph_for_all_steps() -> None:
    model, plain = model_of(5), model_of(5)
    mask_of, core = document_attention.document_attention("cpu", compiling=True)
    compile_blocks(model, mask_of, core, "aot_eager_decomp_partition")
    counters.clear()
    tokens = torch.randint(64, (2, 64), generator=torch.Generator().manual_seed(1))
    for rows in ROWS.values():
        for each in (model, plain):
            each.zero_grad()
            each(tokens, starts=starts_of(rows)).square().sum().backward()
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_mask_that_is_not_there_is_noticed() -> None:
    """The property above is no property of causal attention alone."""
    starts, model = starts_of(ROWS["two"]), model_of(None)
    tokens = torch.randint(64, starts.shape, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(model(tokens), model(tokens, starts=starts), atol=1e-2)


@pytest.mark.parametrize("window", [None, 40, 130])
@pytest.mark.parametrize(
    "rows",
    [
        [[512], [100, 412]],
        [[128, 128, 256], [1, 510, 1]],
        [[300, 200], [5, 250, 245]],  # no multiple of a block
        [[3] * 128, [383, 1]],
        [[50], [20, 30]],
    ],
    ids=lambda rows: f"{rows[0][0]}-{rows[1][0]}",
)
def test_blocks_for_gpus_are_those_of_the_mask(rows: list[list[int]], window: int | None) -> None:
    """A block of keys is computed if the mask has a pair in it, and goes without mask only if it has all. FlexAttention
    has no gradients on the CPU: those are in tests/gpu."""
    starts = starts_of(rows)
    mask, blocks = document_mask(starts, window), block_mask(starts, window)
    seq_len = starts.shape[1]
    count = -(-seq_len // document_attention.BLOCK)
    full = dict(zip(("any", "all"), (torch.zeros(2, count, count, dtype=torch.bool) for _ in range(2)), strict=True))
    for i in range(count):
        for j in range(count):
            tile = mask[:, 0, i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            full["any"][:, i, j] = tile.flatten(1).any(1)
            full["all"][:, i, j] = tile.flatten(1).all(1)
    assert torch.equal(blocks.to_dense()[:, 0].bool(), full["any"])
    listed = zip(blocks.full_kv_num_blocks[:, 0], blocks.full_kv_indices[:, 0], full["all"], strict=True)
    for counts, indices, allowed in listed:
        for query in range(count):
            assert allowed[query, indices[query, : counts[query]].long()].all()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, seq_len, 16, generator=generator) for heads in (4, 2, 2))
    expected = causal_attention(q, k, v, window, mask)
    with torch.no_grad():
        torch.testing.assert_close(flex_attention(q, k, v, block_mask=blocks, enable_gqa=True), expected)
    torch.testing.assert_close(attend_apart(q, k, v, window, lengths(starts)), expected)


@pytest.mark.slow
def test_a_compiled_block_takes_the_masks_of_all_steps_in_one_graph() -> None:
    """As on a GPU, but without gradients, and without code for the machine."""
    model, plain = model_of(5), model_of(5)
    compile_blocks(model, block_mask, attend_in_blocks, "eager")
    counters.clear()
    tokens = torch.randint(64, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for rows in ROWS.values():
            starts = starts_of(rows)
            torch.testing.assert_close(model(tokens, starts=starts), plain(tokens, starts=starts), rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_unscored_labels_have_no_gradient() -> None:
    model, starts = model_of(None), starts_of(ROWS["two"])
    tokens = torch.randint(64, starts.shape, generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(tokens, IGNORED)
    cross_entropy_loss(model(tokens, starts=starts), labels).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
