"""The time of a training step on devices that need not be there, term by term.

Counts of FLOPs and bytes are divided by what the device reaches. The step is that of the busiest device, where the
stages of a pipeline are balanced: its matmuls, attention and memory traffic, one after the other; what of the
communication computing does not hide; and the bubble. :mod:`titanlite.plan.constants` has what counts cannot tell. Each
term's source is at its function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from titanlite.config.parallelism import SPLIT_BACKWARD_SCHEDULES
from titanlite.plan.constants import FITTED, Constants
from titanlite.plan.devices import Device
from titanlite.plan.linear import Linear
from titanlite.plan.work import Group, Part, Work
from titanlite.quant.convertible import name_matches

BF16, FP32 = 2, 4  # bytes
LINK_SHARE, NETWORK_SHARE = 0.8, 0.85  # of the data sheet's speed that NCCL's large rings reach (nccl-tests)
# Seconds of a collective, and of each step of its ring in a machine and between machines (NCCL, tuning.cc: "Simple").
BASE_LATENCY, STEP_LATENCY, NETWORK_LATENCY = 8.4e-6, 3.4e-6, 14e-6
SMALL_LATENCY, SMALL_STEP = 6.6e-6, 0.6e-6  # of a few bytes in a machine ("LL")
LAUNCH = 6e-6  # seconds in which the host launches a kernel
KERNELS = {True: 40, False: 160}  # of a block in forward and backward, compiled and not, without casts
RING_LOSS = 0.35  # of attention's speed over many processes, which compute parts of it (assumed)
_TILE = 128, 256  # of a matmul's result
_DEPTH = 512  # bytes of a row: as long as it takes to fill a matmul's pipeline


class Parts(NamedTuple):
    """Seconds of a step on the busiest device.

    Attributes:
        matmuls, attention, memory, casts: computing, everything that is computed again included.
        optimizer: the optimizer, the norm of the gradients, and FSDP2's copies.
        tensor, context, expert, data, pipeline: exposed communication of each dimension.
        bubble: waiting for other stages of the pipeline.
        host: what launching takes longer than computing.
    """

    matmuls: float
    attention: float
    memory: float
    casts: float
    optimizer: float
    tensor: float
    context: float
    expert: float
    data: float
    pipeline: float
    bubble: float
    host: float

    @property
    def seconds(self) -> float:
        return sum(self)

    @property
    def exposed(self) -> float:
        """Communication that computing does not hide."""
        return self.tensor + self.context + self.expert + self.data + self.pipeline


def step_time(work: Work, device: Device, constants: Constants = FITTED) -> Parts:
    """Return the time of an optimizer step."""
    clock = Clock(work, device, constants)
    return clock.step()


class Clock:
    """The terms of a step of ``work`` on ``device``."""

    def __init__(self, work: Work, device: Device, constants: Constants) -> None:
        self.work, self.device, self.constants = work, device, constants
        self.bf16 = device.bf16_tflops * 1e12 * device.matmul_share * constants.matmul
        self.fp8 = device.fp8_tflops * 1e12 * device.fp8_share * constants.fp8_matmul
        self.bandwidth = device.bandwidth_tbs * 1e12 * constants.memory
        self.tp, self.cp = work.degrees.tensor_parallel, work.degrees.context_parallel
        self.pp = work.degrees.pipeline_parallel

    def step(self) -> Parts:
        """Return the step of the busiest rank of the pipeline. It waits while the first microbatch fills the pipeline,
        and the last one leaves it: as long as the other ranks need for a microbatch (Narayanan et al. 2021, section
        2.2), divided by the stages of each rank; zero-bubble schedules fill two thirds of it (Qi et al. 2023)."""
        work = self.work
        block = {
            "matmuls": self.matmuls(),
            "attention": self.attention(),
            "memory": self.memory(),
            "casts": self.casts(),
            "tensor": self.tensor_parallel(),
            "context": self.context_parallel(),
            "expert": self.expert_parallel(),
        }
        output, loss, embedding = self.output(), self.loss(), self.embedding()
        of_block = sum(block.values())

        def microbatch(part: Part) -> float:
            return part.blocks * of_block + part.output * (output + loss) + part.embedding * embedding

        part = max(work.parts, key=microbatch)
        seconds = {name: part.blocks * each for name, each in block.items()}
        seconds["matmuls"] += part.output * output
        seconds["memory"] += part.output * loss + part.embedding * embedding
        parts = {name: each * work.microbatches for name, each in seconds.items()}
        busy = sum(parts.values())
        share = 1 / 3 if work.schedule in SPLIT_BACKWARD_SCHEDULES else 1.0
        bubble = share * (sum(map(microbatch, work.parts)) - microbatch(part)) / work.stages
        groups = max(map(work.groups_of, work.parts), key=lambda groups: sum(group.parameters for group in groups))
        launching = part.blocks * self.launches() * LAUNCH * work.microbatches
        return Parts(
            **parts,
            optimizer=sum(map(self.optimizer, groups)),
            data=self.data_parallel(groups, busy),
            pipeline=self.pipeline_parallel(),
            bubble=bubble,
            host=max(0.0, launching - busy),
        )

    # ---- matmuls

    def matmul(self, m: int, k: int, n: int, rate: float, element: int, count: int = 1) -> float:
        """Return the seconds of (m, k) times (k, n): of its FLOPs or of its bytes, whichever is longer (Williams et al.
        2009, "Roofline"). A last wave of tiles that does not fill the processors, and the start of each tile, lower the
        rate (NVIDIA, "Matrix Multiplication Background User's Guide"). ``count`` of them run as one, as those of
        experts do."""
        tiles = count * -(-m // _TILE[0]) * -(-n // _TILE[1])
        waves = tiles / self.device.processors
        filled = waves / max(1.0, -(-tiles // self.device.processors))
        steady = k * element / (k * element + _DEPTH)
        large = 8192 * element / (8192 * element + _DEPTH)  # devices' shares are those of such matmuls
        computing = count * 2 * m * k * n / (rate * filled * steady / large)
        moving = count * (element * (m * k + k * n) + BF16 * m * n) / self.bandwidth
        return max(computing, moving)

    def linear(self, linear: Linear, converted: bool) -> tuple[float, float]:
        """Return the seconds of the output's matmul, and of those of both gradients."""
        m, k, n, count = self.work.rows, linear.k, linear.n, max(1, linear.experts)
        if linear.experts:
            m = math.ceil(self.work.tokens_of_experts / linear.experts)
        cost = self.work.cost if converted else None
        if cost is None or not self.fp8:
            shapes = (m, k, n), (m, n, k), (n, m, k)
            output, *gradients = (self.matmul(*shape, self.bf16, BF16, count) for shape in shapes)
            return output, sum(gradients)
        rate = self.fp8 * (self.constants.row_scales if cost.row_scales else 1.0)
        weight = self.matmul(n, m, k, rate, 1) if cost.grad_weight else self.matmul(n, m, k, self.bf16, BF16)
        return self.matmul(m, k, n, rate, 1), self.matmul(m, n, k, rate, 1) + weight

    def matmuls(self) -> float:
        """Return the seconds of a block's matmuls, with those that checkpointing computes again: all, or by operation
        every second one (titanlite/distributed/activation_checkpoint.py)."""
        work, total = self.work, 0.0
        for i, linear in enumerate(work.linears):
            share = work.experts_converted if linear.experts else 1.0
            forward, backward = self.linear(linear, share > 0)
            if 0 < share < 1:
                pairs = zip((forward, backward), self.linear(linear, False), strict=True)
                forward, backward = (share * mine + (1 - share) * other for mine, other in pairs)
            again = work.whole + (work.per_op if i % 2 else 0.0)
            total += forward * (1 + again) + backward
        return total

    def output(self) -> float:
        """Return the seconds of the output projection, on the stage that has it; chunks compute it twice."""
        work = self.work
        linear = Linear(work.args.dim, work.args.vocab_size // self.tp)
        left_out = work.cost is None or any(name_matches(entry, "output") for entry in work.cost.filter_fqns)
        forward, backward = self.linear(linear, not left_out)
        return forward * (2 if work.loss_chunks > 1 else 1) + backward

    # ---- attention

    def attention(self) -> float:
        """Return the seconds of a block's causal attention: two matmuls in forward and five in backward, of the pairs
        below the diagonal and within a sliding window (Dao 2023, "FlashAttention-2", section 4.1): four of the features
        of queries and keys, and three of those of values. Per operation, checkpointing keeps its result."""
        work, a = self.work, self.work.args
        window = min(work.seq_len, a.sliding_window or work.seq_len)
        pairs = work.batch * window * (work.seq_len - window / 2) / self.cp
        qk, v = work.attention.qk_features, work.attention.v_features
        if self.cp > 1:
            v = qk  # values travel, and are multiplied, in the size of keys
        rate = self.device.bf16_tflops * 1e12 * self.device.matmul_share * self.constants.attention
        ring = 1 + RING_LOSS * (1 - 1 / self.cp)
        flops = 2 * pairs * (4 * qk + 3 * v + work.whole * (qk + v))
        return flops / rate * ring

    # ---- memory

    def memory(self) -> float:
        """Return the seconds of a block's norms, rotation, SwiGLU and additions: bytes as of
        scripts/benchmarks/step_floor.py, each operation fused with its neighbours. Checkpointing computes them
        again."""
        work, a = self.work, self.work.args
        rotated = work.attention.rotated * self.tp
        forward = BF16 * (2 * 4 * a.dim + 2 * rotated) + 3 * BF16 * a.active_ffn_dim
        backward = BF16 * (2 * 4 * a.dim + 2 * rotated) + 5 * BF16 * a.active_ffn_dim
        again = (work.whole + work.per_op) * forward
        if a.mixture is not None:  # tokens on their way to the experts and back
            forward += 4 * BF16 * a.mixture.experts_per_token * a.dim
        per_token = (forward + backward + again) / self.tp
        return per_token * work.rows * self._unfused() / self.bandwidth

    def embedding(self) -> float:
        """Return the seconds of the embedding, which reads and writes rows, and adds to their gradients."""
        return 3 * BF16 * self.work.args.dim * self.work.rows / self.tp / self.bandwidth

    def loss(self) -> float:
        """Return the seconds of the last norm and the loss: compiled it reads the logits twice and writes their
        gradient; as plain operations it makes float32 copies (torch's cross_entropy)."""
        work, a = self.work, self.work.args
        per_logit = 4 * BF16 if work.loss_compiled else 3 * BF16 + 6 * FP32
        per_token = 4 * BF16 * a.dim + per_logit * a.vocab_size
        return per_token * work.rows / self.tp / self.bandwidth

    def casts(self) -> float:
        """Return the seconds of the casts of a block, by the bytes of the recipe
        (:class:`~titanlite.config.format_cost.FormatCost`). Tensor parallelism casts what it has gathered, unless the
        format can be gathered."""
        work, cost = self.work, self.work.cost
        if cost is None or not self.fp8:
            return 0.0
        moved = 0.0
        # What a collective delivers is read once more: no kernel before it could find the largest magnitudes.
        shard, late = (self.tp, 0) if cost.casts_shards else (1, BF16)
        for linear in work.linears:
            share, rows, weight_bytes = 1.0, float(work.rows), cost.weight_bytes
            if linear.experts:
                share, rows = work.experts_converted, work.tokens_of_experts
                weight_bytes = cost.expert_weight_bytes * linear.experts
            if cost.gathers_weights and not linear.experts:
                weight_bytes += cost.recast_bytes
            each = float(weight_bytes * linear.k * linear.n)
            again = cost.recast_bytes if shard > 1 else 0.0
            if not linear.shares_input:
                of_input = (cost.input_bytes + late) / shard + again if linear.gathered_input else cost.input_bytes
                each += of_input * linear.k * rows * (1 + work.whole + work.per_op)
            of_grad = (cost.grad_bytes + late) / shard + again if linear.gathered_grad else cost.grad_bytes
            moved += share * (each + of_grad * linear.n * rows)
        return moved * self._unfused() / self.bandwidth

    def _unfused(self) -> float:
        return 1.0 if self.work.compiled else self.constants.eager

    def optimizer(self, group: Group) -> float:
        """Return the seconds of what is done for each parameter of a group.

        AdamW reads and writes the parameter and both moments and reads the gradient (28 bytes), the norm of the
        gradients (4), casts of the shard (6 + 4). FSDP2 copies out what it has gathered, for each microbatch, and into
        the buffer of each reduction; gradients of several microbatches are summed in float32, whole ones or shards
        (torch/distributed/fsdp, _fsdp_collectives.py and _fsdp_param.py)."""
        work, element = self.work, self._gathered(group)
        copies = (BF16 + 2.0 * FP32) * self._reductions()
        if group.shards > 1:
            copies += 2 * element * self._gathers()
        summed = 0.0
        if work.reduces_each:
            summed = (work.microbatches - 1) * 3 * FP32 / group.shards
        elif work.microbatches > 1:
            summed = (BF16 + FP32) + (work.microbatches - 1) * (BF16 + 2 * FP32)
        return (copies + summed + 42 / group.shards) * group.parameters / self.bandwidth

    def _gathered(self, group: Group) -> int:
        """Return the bytes of an element that FSDP2 gathers."""
        cost = self.work.cost
        return 1 if cost and cost.gathers_weights and not group.experts else BF16

    def _gathers(self) -> int:
        """Return how often FSDP2 gathers a weight in a step."""
        return 2 * self.work.microbatches if self.work.reshards else 1

    def _reductions(self) -> int:
        """Return how often FSDP2 reduces the gradients of a weight in a step."""
        return self.work.microbatches if self.work.reduces_each else 1

    # ---- communication

    def over_ring(self, nbytes: float, ranks: int, stride: int, pieces: float = 1) -> float:
        """Return the seconds of an all-gather or reduce-scatter of ``nbytes`` over ``ranks`` devices, every
        ``stride``-th of the machines' devices, in so many pieces one after the other. A ring passes
        (ranks - 1) / ranks of it over its slowest link; between machines it uses the network of every member (Chan et
        al. 2007; NCCL's "busbw")."""
        if ranks == 1:
            return 0.0
        device = self.device
        members = max(1, min(ranks, device.per_node // stride))  # of one machine
        rate, latency = device.link_gbs * 1e9 * LINK_SHARE, BASE_LATENCY + (ranks - 1) * STEP_LATENCY
        if ranks > members:
            rate = min(rate, members * device.network_gbs * 1e9 * NETWORK_SHARE)
            latency += (ranks / members - 1) * NETWORK_LATENCY
        return nbytes * (ranks - 1) / ranks / rate + pieces * latency

    def tensor_parallel(self) -> float:
        """Return the exposed seconds of a block's gathers and scatters of the sequence: four in forward and in backward
        (Korthikanti et al. 2022), and those that checkpointing repeats: the first three of a whole forward, per
        operation the two gathers. Asynchronous tensor parallelism hides a part of them behind the matmuls. One scale
        for a tensor has to be agreed on, for each linear layer in forward and in backward. Experts take the tokens
        as they are sharded."""
        work = self.work
        if self.tp == 1:
            return 0.0
        hidden = work.rows * work.args.dim
        in_format = work.cost is not None and work.cost.casts_shards and self.fp8 > 0
        element = 1 if in_format else BF16
        gather = self.over_ring(hidden * element, self.tp, 1)
        scatter = self.over_ring(hidden * BF16, self.tp, 1)
        layers = 2 if work.args.mixture is None or work.args.mixture.n_shared_experts else 1
        both = 2 * layers * (gather + scatter)
        again = work.whole * (layers * gather + (layers - 1) * scatter) + work.per_op * layers * gather
        # Latents are gathered too, and their gradients, of which each rank has a part, are summed.
        latents = (
            self.over_ring(work.rows * work.attention.latents * BF16, self.tp, 1) if work.attention.latents else 0.0
        )
        both, again = both + 3 * latents, again + (work.whole + work.per_op) * latents
        hidden_share = self.constants.asynchronous if work.asynchronous else 0.0
        agreements = (
            sum(not linear.experts for linear in work.linears) * (2 + work.whole + work.per_op) * self.agreement()
            if in_format and work.cost is not None and work.cost.agrees
            else 0.0
        )
        return (both + again) * (1 - hidden_share) + agreements

    def expert_parallel(self) -> float:
        """Return the seconds of the exchange of a block's tokens: to their experts and back, in forward, in backward
        and in what checkpointing computes again (Lepikhin et al. 2020, "GShard", section 3). Each device sends to all
        others, at once over the links of its machine and over its own of the network."""
        ranks = self.work.degrees.expert_parallel
        if ranks == 1:
            return 0.0
        device, inside = self.device, min(ranks, self.device.per_node)
        to_each = self.work.tokens_of_experts * self.work.args.dim * BF16 / ranks
        near = (inside - 1) * to_each / (device.link_gbs * 1e9 * LINK_SHARE)
        far = (ranks - inside) * to_each / (device.network_gbs * 1e9 * NETWORK_SHARE)
        latency = BASE_LATENCY + (NETWORK_LATENCY if ranks > inside else STEP_LATENCY)
        return (4 + 2 * (self.work.whole + self.work.per_op)) * (max(near, far) + latency)

    def agreement(self) -> float:
        """Return the seconds in which ranks agree on the scale of a tensor that they share: three small kernels, of
        which one reduces (titanlite/quant/agreement.py), and whose results the casts wait for."""
        return 3 * LAUNCH + SMALL_LATENCY + 2 * (self.tp - 1) * SMALL_STEP

    def context_parallel(self) -> float:
        """Return the seconds of the exchange of keys and values that attention does not hide: they are gathered once in
        forward, and in backward with their gradients in float32 (Liu et al. 2023, "Ring Attention")."""
        if self.cp == 1:
            return 0.0
        work, a = self.work, self.work.args
        elements = 2 * work.rows * self.cp * a.n_kv_heads * a.head_size / self.tp
        once = self.over_ring(elements * BF16, self.cp, self.tp)
        exchange = once * (2 + work.whole) + self.over_ring(elements * FP32, self.cp, self.tp)
        return max(0.0, exchange - self.attention()) + self.constants.exposed * exchange

    def data_parallel(self, groups: Sequence[Group], busy: float) -> float:
        """Return the exposed seconds of FSDP2: its gathers, its reductions in float32, of a step or of each microbatch,
        and an all-reduce among replicas. They run beside computing, and slow it by the share that they take of the
        device.

        A pipeline reduces after its last backward, with nothing beside it, and the first microbatch alone can hide the
        gathers (torch/distributed/pipelining, stage.py)."""
        work = self.work
        replicas = work.degrees.data_parallel_replicate
        gathers = reduction = 0.0
        for group in groups:
            held, shards, stride, pieces, _ = group
            gathers += self._gathers() * self.over_ring(held * self._gathered(group), shards, stride, pieces)
            reduction += self._reductions() * self.over_ring(held * FP32, shards, stride, pieces)
            reduction += 2 * self.over_ring(held * FP32 / shards, replicas, stride * shards, pieces)
        if self.pp > 1:
            beside = busy / (1 if work.reshards else work.microbatches)
            return reduction + max(0.0, gathers - beside) + self.constants.exposed * min(gathers, beside)
        total = gathers + reduction
        return max(0.0, total - busy) + self.constants.exposed * min(total, busy)

    def pipeline_parallel(self) -> float:
        """Return the seconds in which hidden states and their gradients go from stage to stage. Each stage waits for
        both before it goes on with a microbatch (torch/distributed/pipelining, schedules.py), and the first and last
        microbatch pass all ranks."""
        work = self.work
        if self.pp == 1:
            return 0.0
        nbytes = work.rows * work.args.dim * BF16 / self.tp
        across = work.devices > self.device.per_node
        rate = (self.device.network_gbs * NETWORK_SHARE if across else self.device.link_gbs * LINK_SHARE) * 1e9
        return 2 * (work.microbatches * work.stages + self.pp - 1) * (nbytes / rate + BASE_LATENCY)

    def launches(self) -> float:
        """Return the kernels of a block: more where nothing is compiled, and those of casts."""
        kernels = KERNELS[self.work.compiled] * (1 + (self.work.whole + self.work.per_op) / 3)
        casts = 0 if self.work.cost is None else (20 if self.work.compiled else 100)
        return kernels + casts


def mfu(work: Work, device: Device, seconds: float, flops_per_token: int) -> float:
    """Return the model FLOPs utilization in percent, of the dense bfloat16 peak."""
    return 100 * flops_per_token * work.tokens_per_device / seconds / (device.bf16_tflops * 1e12)


__all__ = ["Clock", "Parts", "mfu", "step_time"]
