"""The work of one device of a layout in a step: the sizes that memory and time are computed from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from titanlite.config import Degrees, JobConfig, global_batch_size, resolve_degrees
from titanlite.config.format_cost import FormatCost
from titanlite.config.number_formats import formats_of
from titanlite.config.parallelism import SINGLE_STAGE_SCHEDULES, V_SCHEDULES
from titanlite.distributed.activation_checkpoint import checkpointed_blocks
from titanlite.distributed.data_parallel import reduces_each_microbatch
from titanlite.distributed.pipeline_plan import balanced
from titanlite.errors import ConfigError
from titanlite.models.layers import DecoderArgs
from titanlite.optim.moments import bytes_per_element
from titanlite.plan.attention import Attention, attention_of
from titanlite.plan.linear import Linear
from titanlite.quant.convertible import name_matches

LOOPED = 2  # stages of each process in schedules with several


class Group(NamedTuple):
    """Parameters that FSDP2 shards alike.

    Attributes:
        parameters: that a device has before they are sharded.
        shards: the devices that they are sharded over, every ``stride``-th.
        collectives: how many gathers get them all, one for each block and end of the model.
        experts: they are experts', which no number format gathers.
    """

    parameters: float
    shards: int
    stride: int
    collectives: float
    experts: bool = False


class Part(NamedTuple):
    """The part of the model on a rank of a pipeline: ``blocks`` blocks, and the ends."""

    blocks: int
    embedding: bool
    output: bool


@dataclass(frozen=True)
class Work:
    """A layout of a model.

    Attributes:
        cost: that of the number format of the linear layers; None: all are in high precision.
        batch: sequences of a microbatch.
        microbatches: of a step, on each device.
        whole, per_op: the shares of blocks that are computed again, whole, and by operation.
        loss_compiled: the loss is compiled.
        reshards: FSDP2 gathers weights again for backward.
        reduce_gradients: ``parallelism.fsdp_reduce_gradients``.
        bytes_per_moment: of the optimizer, for each parameter.
        experts_converted: the share of mixtures whose experts compute in the number format.
    """

    args: DecoderArgs
    degrees: Degrees
    seq_len: int
    batch: int
    microbatches: int
    compiled: bool = True
    cost: FormatCost | None = None
    asynchronous: bool = False
    schedule: str = "1F1B"
    whole: float = 0.0
    per_op: float = 0.0
    loss_compiled: bool = True
    loss_chunks: int = 1
    reshards: bool = True
    reduce_gradients: str = "default"
    bytes_per_moment: float = 4.0
    experts_converted: float = 0.0

    @property
    def devices(self) -> int:
        d = self.degrees
        return d.data_parallel * d.context_parallel * d.tensor_parallel * d.pipeline_parallel

    @property
    def shards(self) -> int:
        """The devices that FSDP2 shards over."""
        return self.degrees.data_parallel_shard * self.degrees.context_parallel

    @property
    def rows(self) -> int:
        """The tokens of a microbatch that a device's matmuls see: tensor parallelism gathers them."""
        return self.batch * self.seq_len // self.degrees.context_parallel

    @property
    def tokens_per_step(self) -> int:
        """The tokens of a step over all devices."""
        return self.batch * self.microbatches * self.seq_len * self.degrees.data_parallel

    @property
    def tokens_per_device(self) -> float:
        return self.tokens_per_step / self.devices

    @property
    def reduces_each(self) -> bool:
        """Gradients are reduced after each of several microbatches, as the trainer chooses."""
        if self.microbatches == 1 or self.degrees.pipeline_parallel > 1:
            return False
        whole = 4 * self.parameters / self.degrees.tensor_parallel
        return reduces_each_microbatch(self.reduce_gradients, int(whole * (1 - 1 / self.shards)))

    @property
    def stages(self) -> int:
        """The pipeline stages of each process."""
        several = self.schedule not in SINGLE_STAGE_SCHEDULES and self.degrees.pipeline_parallel > 1
        return LOOPED if several else 1

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The part of the model on each rank of the pipeline: the trainer cuts stages by the elements of their matmuls.

        Raises:
            ConfigError: there are more stages than blocks and ends.
        """
        ranks, stages = self.degrees.pipeline_parallel, self.degrees.pipeline_parallel * self.stages
        a = self.args
        if stages > a.n_layers + 2:
            raise ConfigError(
                f"{stages} stages, and the model has {a.n_layers} blocks and two ends; use fewer processes",
                key="parallelism.pipeline_parallel_degree",
                value=ranks,
            )
        cuts = _cuts(self._block_matmuls, a.dim * a.vocab_size, stages)
        parts = [Part(0, False, False)] * ranks
        for stage, cut in enumerate(cuts):
            rank = min(stage, 2 * ranks - 1 - stage) if self.schedule in V_SCHEDULES else stage % ranks
            first, last, so_far = cut.start == 0, cut.stop == a.n_layers + 2, parts[rank]
            blocks = so_far.blocks + len(cut) - first - last
            parts[rank] = Part(blocks, so_far.embedding or first, so_far.output or last)
        return tuple(parts)

    @property
    def _block_matmuls(self) -> tuple[int, ...]:
        """The elements that a token is multiplied with in each block: of experts, those of the ones that it chooses."""
        a, m = self.args, self.args.mixture
        attention = attention_of(a).elements
        dense = attention + 3 * a.dim * a.ffn_dim
        if m is None:
            return (dense,) * a.n_layers
        mixed = attention + 3 * a.dim * m.active_dim + a.dim * m.n_experts
        first = min(m.n_dense_layers, a.n_layers)
        return (dense,) * first + (mixed,) * (a.n_layers - first)

    def groups(self, blocks: float, ends: int) -> tuple[Group, ...]:
        """Return the parameters of a device with ``blocks`` blocks and so many ends of the model: those that tensor
        parallelism shards, and the experts, which have a mesh of their own (titanlite/distributed/mesh.py)."""
        d, a = self.degrees, self.args
        dense = blocks * (self.block_parameters - self.expert_parameters) + ends * a.vocab_size * a.dim
        groups = [Group(dense / d.tensor_parallel, self.shards, d.tensor_parallel, blocks + ends)]
        if a.mixture is not None:
            spread = d.expert_parallel
            shards = self.shards * d.tensor_parallel // spread
            groups.append(Group(blocks * self.expert_parameters / spread, shards, spread, blocks, experts=True))
        return tuple(groups)

    def groups_of(self, part: Part) -> tuple[Group, ...]:
        """Return the parameters of a rank of the pipeline."""
        ends = part.embedding + part.output
        return self.groups(part.blocks, 1 if ends == 2 and self.args.tie_embeddings else ends)

    @cached_property
    def attention(self) -> Attention:
        """The attention of a block on one device."""
        return attention_of(self.args, self.degrees.tensor_parallel)

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of a block, in the order of the forward, and the matrices of experts. Where the first
        blocks have no experts, they are taken to have some."""
        a, t, attention = self.args, self.degrees.tensor_parallel, self.attention.linears
        if a.mixture is None:
            return attention + _feed_forward(a.dim, a.ffn_dim // t, t > 1)
        m = a.mixture
        shared = _feed_forward(a.dim, m.n_shared_experts * m.expert_dim // t, t > 1) if m.n_shared_experts else ()
        each = m.n_experts // self.degrees.expert_parallel
        experts = (
            Linear(a.dim, m.expert_dim, experts=each),
            Linear(a.dim, m.expert_dim, experts=each, shares_input=True),
            Linear(m.expert_dim, a.dim, experts=each),
        )
        return attention + shared + experts

    @property
    def has_even_rows(self) -> bool:
        """True if the shards of each linear layer of a block have the same number of rows."""
        shards = self.degrees.data_parallel_shard * self.degrees.context_parallel
        return all(linear.n % shards == 0 for linear in self.linears if not linear.experts)

    @property
    def gathers_uneven_rows(self) -> bool:
        """True if shards with different numbers of rows are gathered with scales of rows. The trainer refuses that,
        unless ``filter_fqns`` leaves out these layers."""
        return self.cost is not None and self.cost.gathers_weights and self.cost.row_scales and not self.has_even_rows

    @property
    def mixed(self) -> float:
        """The share of blocks that have experts."""
        m = self.args.mixture
        return 0.0 if m is None else 1 - min(m.n_dense_layers, self.args.n_layers) / self.args.n_layers

    @property
    def tokens_of_experts(self) -> float:
        """The tokens of a microbatch that a device's experts compute, each as often as it has chosen an expert: all
        experts have as many. Tensor parallelism does not gather them."""
        assert self.args.mixture is not None
        return self.rows / self.degrees.tensor_parallel * self.args.mixture.experts_per_token

    @property
    def most_tokens_of_experts(self) -> float:
        """As :attr:`tokens_of_experts`, where all tokens of the devices of expert parallelism choose experts of one."""
        m, ep = self.args.mixture, self.degrees.expert_parallel
        assert m is not None
        return self.tokens_of_experts * ep * min(m.experts_per_token, m.n_experts // ep) / m.experts_per_token

    @cached_property
    def expert_parameters(self) -> int:
        """The parameters of a block's experts that tokens choose: the mean over the blocks."""
        a, m = self.args, self.args.mixture
        if m is None:
            return 0
        mixed = a.n_layers - min(m.n_dense_layers, a.n_layers)
        return mixed * m.n_experts * 3 * a.dim * m.expert_dim // a.n_layers

    @cached_property
    def block_parameters(self) -> int:
        """The parameters of a whole block, all experts included: the mean over the blocks."""
        a = self.args
        attention = attention_of(a).elements
        if a.mixture is None:
            return attention + 3 * a.dim * a.ffn_dim + 2 * a.dim
        m, dense = a.mixture, min(a.mixture.n_dense_layers, a.n_layers)
        experts = (m.n_experts + m.n_shared_experts) * 3 * a.dim * m.expert_dim + a.dim * m.n_experts
        mixed = (dense * 3 * a.dim * a.ffn_dim + (a.n_layers - dense) * experts) // a.n_layers
        return attention + mixed + 2 * a.dim

    @cached_property
    def parameters(self) -> int:
        """The parameters of the whole model."""
        ends = self.args.vocab_size * self.args.dim
        return (
            self.args.n_layers * self.block_parameters + (1 if self.args.tie_embeddings else 2) * ends + self.args.dim
        )


def _feed_forward(dim: int, inside: int, spread: bool) -> tuple[Linear, ...]:
    first = Linear(dim, inside, spread)
    return first, Linear(dim, inside, spread, shares_input=True), Linear(inside, dim, gathered_grad=spread)


@lru_cache
def _cuts(blocks: tuple[int, ...], output: int, stages: int) -> list[range]:
    """Return the stages of a chain of the embedding, blocks and the output, by the elements of their matmuls."""
    return balanced([0, *blocks, output], stages)


def _share_of_experts(args: DecoderArgs, moe_fqns: tuple[str, ...]) -> float:
    """Return the share of mixtures whose experts an entry names."""
    if args.mixture is None or not moe_fqns:
        return 0.0
    names = [f"layers.{block}.feed_forward.experts" for block in range(args.mixture.n_dense_layers, args.n_layers)]
    chosen = [name for name in names if any(name_matches(entry, name) for entry in moe_fqns)]
    return len(chosen) / max(1, len(names))


def work_of(config: JobConfig, args: DecoderArgs, world_size: int) -> Work:
    """Return the work of a configuration. ``args`` are the configured arguments of its model; activation checkpointing
    must be resolved.

    Raises:
        ConfigError: the global batch does not divide.
    """
    degrees, training = resolve_degrees(config.parallelism, world_size), config.training
    p, ac = config.parallelism, config.activation_checkpoint
    pipeline = degrees.pipeline_parallel > 1
    batch = p.pipeline_parallel_microbatch_size if pipeline else training.local_batch_size
    sequences = global_batch_size(config, degrees.data_parallel) // degrees.data_parallel
    costs = [number_format.cost(config) for number_format in formats_of(config) if number_format.cost is not None]
    share = 0.0
    if ac.mode != "none":
        share = len(checkpointed_blocks(map(str, range(args.n_layers)), ac)) / args.n_layers
    per_op = ac.mode == "selective" and ac.selective_ac_option == "op"
    return Work(
        args=args,
        degrees=degrees,
        seq_len=training.seq_len,
        batch=batch,
        microbatches=sequences // batch,
        compiled=config.compile_options("model") is not None,
        cost=costs[0] if costs else None,
        asynchronous=p.enable_async_tensor_parallel,
        schedule=p.pipeline_parallel_schedule,
        whole=0.0 if per_op else share,
        per_op=share if per_op else 0.0,
        loss_compiled=config.compile_options("loss") is not None,
        loss_chunks=training.loss_chunks,
        reduce_gradients=p.fsdp_reduce_gradients,
        bytes_per_moment=bytes_per_element(config.optimizer.moments),
        experts_converted=_share_of_experts(args, costs[0].moe_fqns) if costs else 0.0,
        reshards=p.fsdp_reshard_after_forward == "always"
        or (p.fsdp_reshard_after_forward == "default" and not pipeline and degrees.model_shards > 1),
    )
