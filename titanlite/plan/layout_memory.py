"""The memory of a layout from its sizes alone, in microseconds: what :mod:`titanlite.plan.estimate` counts in a step on
tensors without data, by formulas, and what the allocator reserves beyond it."""

from __future__ import annotations

from typing import NamedTuple

from titanlite.config.parallelism import V_SCHEDULES
from titanlite.plan.work import Work

_GIB = 1024**3
_BF16, _FP32 = 2, 4
# What the allocator reserves of what comes and goes in a step, of what tensors take: it rounds up, and cannot reuse
# all. From the published runs of docs/benchmarks/step_time.json; state is held for good, and fragments nothing.
FRAGMENTATION = 1.17
ROOM = 0.90  # of a device's memory: CUDA and NCCL take some, and published runs needed up to 11% more than predicted


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


def reserved_gib(work: Work, *, worst: bool = False) -> LayoutMemory:
    """Return the memory as torchtitan prints it: the peak that the allocator reserves. The peak is at the loss, or in
    the backward of a block; of a pipeline, that of the rank that needs most.

    Args:
        worst: all tokens of the devices of expert parallelism choose experts of this one, in all mixtures. Otherwise
            all devices have equal load.
    """
    forward, again = _activations(work, worst)
    return max((_of_rank(work, rank, forward, again) for rank in range(len(work.parts))), key=lambda it: it.total)


def _of_rank(work: Work, rank: int, forward: float, again: float) -> LayoutMemory:
    """Return the memory of a rank of the pipeline, from the bytes that a block keeps, and that its backward needs."""
    a, tp, part = work.args, work.degrees.tensor_parallel, work.parts[rank]
    groups = work.groups_of(part)
    held = sum(group.parameters for group in groups)
    state = sum((8 + 2 * work.bytes_per_moment) * group.parameters / group.shards for group in groups)
    block = sum(group.parameters for group in work.groups(1, 0))
    # Two blocks, and the embedding or the output; where weights stay gathered, all.
    kept = held if not work.reshards else 2 * block + a.vocab_size * a.dim / tp
    gathered = _BF16 * kept if work.shards > 1 or work.reshards else _BF16 * held
    gathered += (_BF16 + _FP32) * block
    if work.microbatches > 1 and not work.reduces_each:  # whole gradients are summed before they are reduced
        gathered += _FP32 * held
    logits = _logits(work) if part.output else 0.0
    activations = part.blocks * forward * _in_flight(work, rank) + (again if again >= logits else 0)
    logits = logits if logits > again else 0
    moving = gathered + activations + logits
    parts = (state, gathered, activations, logits, (FRAGMENTATION - 1) * moving)
    return LayoutMemory(*(part / _GIB for part in parts))


def _in_flight(work: Work, rank: int) -> float:
    """Return the microbatches whose activations a rank of the pipeline keeps at most, those of each of its stages
    counted as a part (torch/distributed/pipelining, schedules.py: the operations of the warm-up, and one)."""
    ranks, microbatches, stages = work.degrees.pipeline_parallel, work.microbatches, work.stages
    if ranks == 1:
        return 1
    if work.schedule in ("GPipe", "LoopedBFS"):
        return microbatches
    if stages == 1:
        return min(microbatches, ranks - rank)
    if work.schedule in V_SCHEDULES:
        return min(microbatches, ranks)
    each_round = microbatches // max(1, microbatches // ranks)
    warm_up = (stages - 1) * each_round + 2 * (ranks - 1 - rank)
    return min(microbatches * stages, warm_up + 1) / stages


def _activations(work: Work, worst: bool) -> tuple[float, float]:
    """Return the bytes that a block keeps for the backward of one microbatch, and those of a block whose backward
    runs."""
    a, tp = work.args, work.degrees.tensor_parallel
    per_row = _BF16 * a.dim / tp  # the hidden states of a token, which sequence parallelism shards
    attention, ffn = work.attention, _dense_ffn_dim(work) / tp
    cast = 0.5 if work.cost is not None and work.cost.grad_weight else 1.0  # of what a linear layer keeps of its input
    # Both norms' inputs and outputs; what attention keeps; gate, up and product.
    inside = per_row * (2 + 2 * cast) + _BF16 * attention.kept + _BF16 * ffn * (2 + cast)
    # Per operation, checkpointing keeps every second matmul's result (w1 too; w2 where nothing is compiled).
    per_op = per_row * (1 if work.compiled else 2) + _BF16 * (attention.kept_per_op + ffn)
    if not work.compiled:
        inside += 2 * _FP32 * a.dim / tp + _BF16 * ffn  # norms in float32, and silu(gate)
    inside, per_op = work.rows * inside, work.rows * per_op
    if a.mixture is not None:
        of_experts, of_experts_per_op = _of_experts(work, worst)
        inside, per_op = inside + of_experts, per_op + of_experts_per_op
    none = 1 - work.whole - work.per_op
    kept = work.whole * work.rows * per_row + work.per_op * per_op + none * inside
    return kept, inside if none == 1 else 2 * inside  # with gradients as large


def _dense_ffn_dim(work: Work) -> float:
    """Return the features inside the feed-forward of a block that every token uses: the mean over the blocks."""
    a, m = work.args, work.args.mixture
    return a.active_ffn_dim if m is None else a.active_ffn_dim - work.mixed * m.experts_per_token * m.expert_dim


def _of_experts(work: Work, worst: bool) -> tuple[float, float]:
    """Return the bytes that the experts of a block keep for backward, and those by operation, the mean over the blocks:
    of each token that comes to an expert itself, gate, up and product. By operation they are the token, if it has been
    exchanged, and gate."""
    a, m = work.args, work.args.mixture
    assert m is not None
    rows = work.mixed * (work.most_tokens_of_experts if worst else work.tokens_of_experts)
    cast = 1 - work.experts_converted / 2  # a byte of each element of an input, in a number format
    inside = a.dim * cast + m.expert_dim * (2 + cast + (not work.compiled))  # as plain operations, silu(gate) too
    per_op = m.expert_dim + a.dim * (work.degrees.expert_parallel > 1)
    return _BF16 * rows * inside, _BF16 * rows * per_op


def _logits(work: Work) -> float:
    """Return the bytes of the logits, their copies and gradients: compiled, the logits and their gradient in bfloat16;
    as plain operations also float32 copies, of which sharded ones make one more."""
    a, tp = work.args, work.degrees.tensor_parallel
    per_logit = 2 * _BF16
    if not work.loss_compiled and work.loss_chunks == 1:
        per_logit += (2 if tp == 1 else 3) * _FP32
    return work.rows / work.loss_chunks * a.vocab_size * per_logit / tp
