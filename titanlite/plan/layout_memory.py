"""The memory of a layout from its sizes alone, in microseconds: what :mod:`titanlite.plan.estimate` counts in a step on
tensors without data, by formulas, and what the allocator reserves beyond it."""

from __future__ import annotations

from typing import NamedTuple

from titanlite.plan.work import Work

_GIB = 1024**3
_BF16, _FP32 = 2, 4
# What the allocator reserves of what comes and goes in a step, of what tensors take: it rounds up, and cannot reuse
# all.
# From the published runs of docs/benchmarks/step_time.json; state is held for good, and fragments nothing.
FRAGMENTATION = 1.17


class LayoutMemory(NamedTuple):
    """GiB of the busiest device.

    Attributes:
        state: weights, gradients and optimizer state, in float32.
        gathered: the weights that FSDP2 has gathered, and gradients that are not reduced yet.
        activations: those that forward keeps, and at its end those of the block that is computed again.
        logits: with the copies and gradients of the loss, if they are larger than that block.
        fragmentation: what the allocator reserves beyond.
    """

    state: float
    gathered: float
    activations: float
    logits: float
    fragmentation: float

    @property
    def total(self) -> float:
        return sum(self)


def reserved_gib(work: Work) -> LayoutMemory:
    """Return the memory as torchtitan prints it: the peak that the allocator reserves. The peak is at the loss, or in
    the backward of a block."""
    a, tp, pp = work.args, work.degrees.tensor_parallel, work.degrees.pipeline_parallel
    held = work.parameters / tp / pp
    state = (8 + 2 * work.bytes_per_moment) * held / work.shards
    ends = a.vocab_size * a.dim / tp
    # Two blocks, and the embedding or the output; where weights stay gathered, all.
    kept = held if not work.reshards else 2 * work.block_parameters / tp + ends
    gathered = _BF16 * kept if work.shards > 1 or work.reshards else _BF16 * held
    gathered += (_BF16 + _FP32) * work.block_parameters / tp
    if work.microbatches > 1:  # gradients are summed before they are reduced
        gathered += _FP32 * held
    forward, again = _activations(work)
    in_flight = min(work.microbatches, pp * work.stages) / work.stages if pp > 1 else 1
    logits = _logits(work)
    activations = forward * in_flight + (again if again >= logits else 0)
    logits = logits if logits > again else 0
    moving = gathered + activations + logits
    parts = (state, gathered, activations, logits, (FRAGMENTATION - 1) * moving)
    return LayoutMemory(*(part / _GIB for part in parts))


def _activations(work: Work) -> tuple[float, float]:
    """Return the bytes that the blocks of a device keep for the backward of one microbatch, and those of a block whose
    backward runs."""
    a, tp = work.args, work.degrees.tensor_parallel
    per_row = _BF16 * a.dim / tp  # the hidden states of a token, which sequence parallelism shards
    q, kv, ffn = a.n_heads * a.head_size / tp, a.n_kv_heads * a.head_size / tp, a.active_ffn_dim / tp
    cast = 0.5 if work.cost is not None and work.cost.grad_weight else 1.0  # of what a linear layer keeps of its input
    # Both norms' inputs and outputs; queries, keys and values, rotated, and attention's result; gate, up and product.
    inside = per_row * (2 + 2 * cast) + _BF16 * (2 * q + 2 * kv) + _BF16 * ffn * (2 + cast)
    # Per operation, checkpointing keeps every second matmul's result (wq, wv and w1; w2 where nothing is compiled) and
    # attention's.
    per_op = per_row * (1 if work.compiled else 2) + _BF16 * (2 * q + kv + ffn)
    if not work.compiled:
        inside += 2 * _FP32 * a.dim / tp + _BF16 * ffn  # norms in float32, and silu(gate)
    none = 1 - work.whole - work.per_op
    kept = work.blocks * (work.whole * per_row + work.per_op * per_op + none * inside)
    again = inside if none == 1 else 2 * inside  # with gradients as large
    return work.rows * kept, work.rows * again


def _logits(work: Work) -> float:
    """Return the bytes of the logits, their copies and gradients: compiled, the logits and their gradient in bfloat16;
    as plain operations also float32 copies, of which sharded ones make one more."""
    a, tp = work.args, work.degrees.tensor_parallel
    per_logit = 2 * _BF16
    if not work.loss_compiled and work.loss_chunks == 1:
        per_logit += (2 if tp == 1 else 3) * _FP32
    return work.rows / work.loss_chunks * a.vocab_size * per_logit / tp
