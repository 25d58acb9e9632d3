"""Context parallelism: every sequence is split over the ranks of a mesh, and attention sees all of it.

Ring attention (Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context", 2023): each rank
keeps its queries, and gets the keys and values of the other ranks shard by shard. The results are merged by their
log-sum-exp. Backward recomputes each block from the merged log-sum-exp (Dao, "FlashAttention-2", 2023, section 2.3).

Causal attention costs more for later positions. To balance the ranks, the sequence is cut into ``2 * size`` chunks, and
rank r holds chunk r followed by chunk ``2 * size - 1 - r`` (Llama 3, 2024, section 3.3.2). For another rank's shard, a
rank then computes one of two unmasked blocks of equal cost: all queries with the first half of an earlier rank's keys,
or the second half of the queries with all keys of a later rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

METHODS = ("allgather", "alltoall")

_aten = torch.ops.aten
# The operators are used directly, as in quant/tensor_parallel.py. Their results are not ready before wait_tensor.
_c10d = torch.ops._c10d_functional


class ContextParallel:
    """Context parallelism over ``mesh``, as a model and its trainer need it. Give all blocks the same object: only then
    can torch.compile share code between them.

    Args:
        mesh: a mesh of one dimension.
        method: the exchange of keys and values, see :func:`ring_attention`.
        grouped: the device's kernel supports fewer heads of keys than of queries; None: True except on the CPU.
    """

    def __init__(self, mesh: DeviceMesh, method: str = "allgather", grouped: bool | None = None) -> None:
        if mesh.ndim != 1:
            raise ValueError(f"context parallelism over a mesh of {mesh.ndim} dimensions: must be one; slice the mesh")
        _check_method(method)
        self.device_type = mesh.device_type
        self.group_name: str = mesh.get_group().group_name
        self.rank, self.size, self.method = mesh.get_local_rank(), mesh.size(), method
        self.grouped = mesh.device_type != "cpu" if grouped is None else grouped

    def attention(self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None, documents: None = None) -> Tensor:
        """Compute the causal attention of this rank's queries to the whole sequence; see :func:`ring_attention`. Heads
        of values that have another size than those of keys are exchanged in the larger size, filled up with zeros: for
        DeepSeek-V3's 192 and 128 a fifth more bytes.

        Raises:
            ValueError: a ``window`` is shorter than the sequence.
        """
        if window is not None and window < q.shape[2] * self.size:
            raise ValueError(
                f"context parallelism: a window of {window} positions in a sequence of {q.shape[2] * self.size} is "
                "not computed; must be None or at least the sequence's length"
            )
        size, values = q.shape[-1], v.shape[-1]
        if size != values:
            most = max(size, values)
            if most != size:
                q = q * math.sqrt(most / size)  # the kernels take the size that they see for the scale
            q, k, v = (F.pad(x, (0, most - x.shape[-1])) for x in (q, k, v))
        out = ring_attention(
            *(q, k, v),
            group_name=self.group_name,
            rank=self.rank,
            size=self.size,
            method=self.method,
            grouped=self.grouped,
        )
        return out[..., :values]

    def positions(self, seq_len: int) -> Tensor:
        """Return :func:`load_balanced_positions` of this rank, on the mesh's device."""
        return load_balanced_positions(seq_len, self.rank, self.size).to(self.device_type)

    def shard(self, tokens: Tensor, dim: int) -> Tensor:
        """Return this rank's share, contiguous, of ``tokens``, which has the whole sequence along ``dim``."""
        positions = load_balanced_positions(tokens.shape[dim], self.rank, self.size)
        return tokens.index_select(dim, positions.to(tokens.device))


def load_balanced_positions(seq_len: int, rank: int, size: int) -> Tensor:
    """Return the positions that ``rank`` of ``size`` ranks holds, in order; int64 [seq_len / size], on the CPU.

    Raises:
        ValueError: ``seq_len`` is not a multiple of ``2 * size``.
    """
    if seq_len % (2 * size):
        raise ValueError(
            f"context parallelism: a sequence of {seq_len} tokens cannot be cut into {2 * size} chunks for {size} "
            f"ranks: must be a multiple of {2 * size}, such as {(seq_len // (2 * size) + 1) * 2 * size}"
        )
    chunks = torch.arange(seq_len, device="cpu").view(2 * size, -1)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group_name: str,
    rank: int,
    size: int,
    method: str = "allgather",
    grouped: bool = False,
) -> Tensor:
    """Compute causal attention, scaled by ``head_dim ** -0.5``, over a sequence of which each rank holds
    :func:`load_balanced_positions`. All ranks of the group call it, with tensors of the same shape.

    Args:
        q: [batch, heads, local_seq, head_dim]; on the CPU of any floating dtype, on CUDA float16 or bfloat16.
        k, v: [batch, kv_heads, local_seq, head_dim]; each of their heads serves ``heads / kv_heads`` heads of ``q``.
        method: "allgather" gathers all keys and values at once, in forward and again in backward, and reduce-scatters
            their gradients: few collectives, but memory for the whole sequence's keys and values. "alltoall" passes
            shards from rank to rank while the previous block is computed: memory for two shards; the gradients travel
            with their shard. Both sum the gradients in float32.
        grouped: do not repeat ``k`` and ``v`` for each head of ``q``. The CPU's kernel needs the repetition; CUDA's
            never does.

    Returns:
        The output, with the shape and dtype of ``q``.

    Raises:
        ValueError: the shapes do not fit together, or the device does not support them.
    """
    _check_method(method)
    _check_inputs(q, k, v)
    out: Tensor = _RingAttention.apply(q, k, v, group_name, rank, size, method, grouped)
    return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: str, rank: int, size: int, method: str, grouped: bool
    ) -> Tensor:
        ctx.ring, ctx.grouped = (group, rank, size, method), grouped
        for step, (k_block, v_block) in enumerate(_shards(torch.stack((k, v)), *ctx.ring)):
            rows, columns = _visible(step, rank, q.shape[2] // 2)
            visible = k_block[:, :, columns], v_block[:, :, columns]
            block, lse_block = _attend(q[:, :, rows], *visible, causal=step == 0, grouped=grouped)
            if step == 0:
                # Copies, because they are updated in place, and selective checkpointing may keep the operator's result.
                merged = block.to(lse_block.dtype, copy=True)
                lse = lse_block.clone(memory_format=torch.contiguous_format)
            else:
                _merge(merged[:, :, rows], lse[:, :, rows], block, lse_block)
            del k_block, v_block  # else this shard would stay in memory while the next two are there
        # A copy also for float32: torch 2.11's compiler loses the gradient of the result of a cast without effect.
        out = merged.to(q.dtype, copy=True)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        group, rank, size, method = ctx.ring
        travel = method == "alltoall"
        dq = torch.zeros_like(q, dtype=lse.dtype)
        by_rank = lse.new_zeros(1 if travel else size, 2, *k.shape)  # gradients of K and V that do not travel
        travelling = None
        for step, (k_block, v_block) in enumerate(_shards(_stack_in_backward(k, v, grad), *ctx.ring)):
            rows, columns = _visible(step, rank, q.shape[2] // 2)
            dq_block, dk, dv = _attend_backward(
                grad[:, :, rows],
                q[:, :, rows],
                k_block[:, :, columns],
                v_block[:, :, columns],
                out[:, :, rows],
                lse[:, :, rows],
                causal=step == 0,
                grouped=ctx.grouped,
            )
            dq[:, :, rows] += dq_block
            dkv = lse.new_zeros(2, *k.shape) if travel and step else by_rank[0 if travel else rank - step]
            dkv[0, :, :, columns] = dk
            dkv[1, :, :, columns] = dv
            if travel and step:
                # They start at the rank after the shard's owner, and reach the owner after the last step.
                if travelling is not None:
                    dkv += _c10d.wait_tensor(travelling)
                travelling = _to_next_rank(dkv, group, rank, size)
            del k_block, v_block
        if travelling is not None:
            by_rank += _c10d.wait_tensor(travelling)
        elif size > 1:
            by_rank = _c10d.wait_tensor(_c10d.reduce_scatter_tensor(by_rank, "sum", size, group))
        dk, dv = by_rank.squeeze(0)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *[None] * 5


@torch.library.custom_op(
    "titanlite::stack_in_backward", mutates_args=(), schema="(Tensor k, Tensor v, Tensor grad) -> Tensor"
)
def _stack_in_backward(k: Tensor, v: Tensor, grad: Tensor) -> Tensor:
    """Stack ``k`` and ``v``, but not before ``grad`` exists.

    It is an operator so that the compiler only sees that it depends on ``grad``. Otherwise the compiler would find that
    forward communicates the same shards, and save all of them for backward.
    """
    return torch.stack((k, v))


@_stack_in_backward.register_fake
def _(k: Tensor, v: Tensor, grad: Tensor) -> Tensor:
    return torch.stack((k, v))


def _shards(kv: Tensor, group: str, rank: int, size: int, method: str) -> Iterator[tuple[Tensor, ...]]:
    """Yield the keys and values of this rank, ``kv`` [2, batch, kv_heads, local_seq, head_dim], then of the rank before
    it, and so on around the ring. The exchange for the next shard starts before a shard is yielded."""
    gather = method == "allgather"
    if size > 1:
        coming = _c10d.all_gather_into_tensor(kv, size, group) if gather else _to_next_rank(kv, group, rank, size)
    yield kv.unbind()
    for step in range(1, size):
        if step == 1 or not gather:
            kv = _c10d.wait_tensor(coming)
        if step < size - 1 and not gather:
            coming = _to_next_rank(kv, group, rank, size)
        yield kv.unflatten(0, (-1, 2))[rank - step if gather else 0].unbind()


def _to_next_rank(x: Tensor, group: str, rank: int, size: int) -> Tensor:
    """Send ``x`` to the next rank and return that of the previous one; the caller waits for it with wait_tensor."""
    sent, received = [0] * size, [0] * size
    sent[(rank + 1) % size] = received[rank - 1] = x.shape[0]
    return _c10d.all_to_all_single(x, received, sent, group)


def _visible(step: int, rank: int, half: int) -> tuple[slice, slice]:
    """Return the queries that see keys of the shard of ``step``, and the keys that they see."""
    if step == 0:
        return slice(None), slice(None)
    if step <= rank:  # an earlier rank: its first chunk is before both chunks of this rank, its second after them
        return slice(None), slice(half)
    return slice(half, None), slice(None)


def _merge(out: Tensor, lse: Tensor, block: Tensor, lse_block: Tensor) -> None:
    """Add a block of other keys to ``out`` [batch, heads, seq, head_dim] and ``lse`` [batch, heads, seq], in place.

    Their weights are exp(lse) / (exp(lse) + exp(lse_block)) and 1 minus that, computed from the difference of the two,
    so that nothing overflows.
    """
    out.lerp_(block.to(out.dtype), torch.sigmoid(lse_block - lse).unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, lse_block))


def _attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, grouped: bool) -> tuple[Tensor, Tensor]:
    """Return the output of a block, like ``q``, and the log-sum-exp of the scores, [batch, heads, seq] in float32
    (float64 for float64)."""
    if q.device.type == "cpu":
        if not grouped:
            k, v = _for_each_head(k, q), _for_each_head(v, q)
        return _aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, causal)
    return _aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, causal)[:2]


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, grouped: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the block's part of the gradients of ``q``, ``k`` and ``v``, given ``out`` and ``lse`` of all blocks."""
    lse = lse.contiguous()  # CUDA's kernel assumes it
    if q.device.type == "cpu":
        each_k, each_v = (k, v) if grouped else (_for_each_head(k, q), _for_each_head(v, q))
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            grad, q, each_k, each_v, out, lse, 0.0, causal
        )
        return dq, _of_the_group(dk, k, lse.dtype), _of_the_group(dv, v, lse.dtype)
    # None: no sequences of different lengths. The state of the random generator is not used without dropout.
    state = q.new_empty(2, dtype=torch.int64)
    return _aten._scaled_dot_product_flash_attention_backward.default(
        grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, state, state
    )


def _for_each_head(x: Tensor, q: Tensor) -> Tensor:
    groups = q.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def _of_the_group(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of ``x``, given the gradient of :func:`_for_each_head`."""
    return grad if grad.shape == x.shape else grad.unflatten(1, (x.shape[1], -1)).sum(2, dtype=dtype)


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f'context parallelism by "{method}": must be one of {", ".join(METHODS)}')


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    batch, heads, seq_len, head_dim = q.shape
    if k.shape != v.shape or k.shape != (batch, k.shape[1], seq_len, head_dim) or heads % k.shape[1] or seq_len % 2:
        raise ValueError(
            f"ring_attention: {shapes}: must be [batch, heads, local_seq, head_dim] with even local_seq; k and v must "
            "have the same shape, that of q except for the heads, whose number must divide that of q"
        )
    if q.device.type == "cpu":
        return
    if q.device.type != "cuda":
        raise ValueError(f"ring_attention on {q.device.type}: there are kernels for cpu and cuda only")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"ring_attention of {q.dtype} on cuda: flash attention computes in float16 and bfloat16 only; set "
            'training.mixed_precision_param = "bfloat16"'
        )
    if head_dim % 8 or head_dim > 256:
        raise ValueError(
            f"ring_attention with head_dim {head_dim} on cuda: flash attention needs a multiple of 8, at most 256; "
            "choose another dim or n_heads"
        )
