"""The balance of experts: what is refused with them, and their loads, agreed over the processes after each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from titanlite.config import JobConfig
from titanlite.config.model_sections import Experts
from titanlite.config.refuse import refuse
from titanlite.distributed.mesh import Mesh
from titanlite.errors import ConfigError, counted
from titanlite.models.layers import BalanceLoss, Mixture, MixtureArgs

_c10d = torch.ops._c10d_functional
_RATE = 0.001  # by default: of the bias update, as in DeepSeek-V3, and the coefficient of the balance loss


def check_experts(args: Any, mesh: Mesh, config: JobConfig) -> None:
    """Check the options of experts, and what does not go with them.

    Args:
        args: the arguments of the model.

    Raises:
        ConfigError: an option has no effect, or a dimension of parallelism does not know experts.
    """
    options, mixture = config.experts, getattr(args, "mixture", None)
    if mixture is None:
        for key, value in vars(Experts()).items():
            if getattr(options, key) != value:
                refuse(config, f"experts.{key}", "has no effect: this model has no experts; leave it out")
        if mesh.degrees.expert_parallel > 1:
            refuse(config, "parallelism.expert_parallel_degree", "this model has no experts; leave it out")
        return
    if mesh.experts is None and mesh.tp.size() > 1:
        raise ConfigError(
            "this model has experts, and only training spreads them; use one process, or a copy on each",
            key="parallelism.tensor_parallel_degree",
            value=mesh.tp.size(),
        )
    if mesh.experts is not None and mesh.experts.ep.size() * mesh.tp.size() > 1:
        _check_spread(mixture, args.dim, mesh)
    if options.bias_update_rate and not mixture.bias:
        refuse(
            config,
            "experts.bias_update_rate",
            "has no effect: the routers of this family have no bias, and its files no place for one; use "
            "experts.balance_loss",
        )
    if options.balance_loss_over != Experts().balance_loss_over and not balance_loss(mixture, options).coefficient:
        refuse(config, "experts.balance_loss_over", "has no effect without experts.balance_loss; set that too")


def _check_spread(mixture: MixtureArgs, dim: int, mesh: Mesh) -> None:
    """Check that experts of tokens with ``dim`` features can be sharded over a mesh of their own."""
    assert mesh.experts is not None
    ep, shards, tp = mesh.experts.ep.size(), mesh.experts.fsdp.size(), mesh.tp.size()
    key, value = ("expert", ep) if ep > 1 else ("tensor", tp)
    key = f"parallelism.{key}_parallel_degree"
    if torch.__version__ < "2.12":
        raise ConfigError(
            f"needs torch 2.12 or later with experts, and this is {torch.__version__}, whose FSDP2 shards all "
            "parameters of a block over the same processes; shard with data_parallel_shard_degree",
            key=key,
            value=value,
        )
    if mixture.n_experts % ep:
        raise ConfigError(
            f"must divide the {mixture.n_experts} experts of a mixture; choose another degree",
            key=key,
            value=value,
        )
    each = mixture.n_experts // ep
    if ep > 1 and each % shards and (mixture.expert_dim % shards or dim % shards):
        raise ConfigError(
            f"leaves {counted(each, 'expert')} to each process, and the {shards} processes that have the same ones can "
            f"share neither these evenly nor their features, {mixture.expert_dim} inside and {dim} of a token; choose "
            "another degree",
            key=key,
            value=value,
        )


def pool_of(options: BalanceLoss, mesh: Mesh) -> Callable[[Tensor], Tensor] | None:
    """Return the slot :attr:`Mixture.pool` for a balance loss. None: each process has all the tokens that it is of."""
    over = mesh.stage if options.over == "global_batch" else mesh.experts.sequence if mesh.experts else None
    return _Pool(over) if options.coefficient and over is not None and over.size() > 1 else None


class _Pool:
    """The mean of a tensor over the processes of ``mesh``, which does not change with their order."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group, self.ranks = mesh.get_group().group_name, mesh.size()

    def __call__(self, x: Tensor) -> Tensor:
        return _c10d.wait_tensor(_c10d.all_reduce(x, "sum", self.group)) / self.ranks  # type: ignore[no-any-return]


def balance_loss(mixture: MixtureArgs, options: Experts) -> BalanceLoss:
    """Return the balance loss that ``options`` ask for."""
    coefficient = options.balance_loss
    if coefficient is None:
        coefficient = 0.0 if mixture.bias else _RATE
    return BalanceLoss(coefficient, options.balance_loss_over, options.z_loss)


class ExpertBalance:
    """The loads of all experts of a model.

    Args:
        parts: the model, or this process's stages of a pipeline.
        mesh: the processes that hold it; None: this one alone.
    """

    def __init__(self, parts: Iterable[nn.Module], options: Experts, mesh: Mesh | None = None) -> None:
        named = ((name, m) for part in parts for name, m in part.named_modules() if isinstance(m, Mixture))
        self._mixtures = dict(named)
        self._rate = _RATE if options.bias_update_rate is None else options.bias_update_rate
        self._stage, self._pipeline = (None, None) if mesh is None else (_group(mesh.stage), _group(mesh.pp))
        self._window: Tensor | None = None

    @torch.no_grad()
    def step_done(self, bad: Tensor) -> None:
        """Sum the loads of a step over all processes that hold the same mixtures, and move the biases.

        Args:
            bad: a scalar of any dtype that is not 0 if the step is bad. Then no bias moves.
        """
        if not self._mixtures:
            return
        mixtures = [*self._mixtures.values()]
        tallies = torch.stack([mixture.tally for mixture in mixtures])
        if self._stage is not None:
            dist.all_reduce(tallies, group=self._stage)
        tallies = torch.where(bad == 0, tallies, 0.0)  # a bad step may have a NaN
        self._window = tallies if self._window is None else self._window + tallies
        for mixture, load in zip(mixtures, tallies[:, : mixtures[0].args.n_experts]):
            mixture.tally.zero_()
            if mixture.router.bias is not None and self._rate:
                mixture.router.bias.add_(self._rate * (load.mean() - load).sign())

    def report(self) -> dict[str, Any]:
        """Return the loads since the last report, for the log; empty without experts. All processes must call this. It
        waits for the device."""
        tallies = {}
        if self._window is not None:
            most = torch.stack([mixture.most_rows for mixture in self._mixtures.values()])
            if self._stage is not None:
                dist.all_reduce(most, dist.ReduceOp.MAX, group=self._stage)
            rows = torch.cat((self._window, most[:, None]), 1).cpu()
            tallies = dict(zip(self._mixtures, rows.unbind(), strict=True))
            for mixture in self._mixtures.values():
                mixture.most_rows.zero_()
        self._window = None
        if self._pipeline is not None:
            of_stages: list[Any] = [None] * dist.get_world_size(self._pipeline)
            dist.all_gather_object(of_stages, tallies, group=self._pipeline)
            tallies = {name: tally for stage in of_stages for name, tally in stage.items()}
        if not tallies:
            return {}
        tallies = dict(sorted(tallies.items(), key=lambda item: _numbers(item[0])))
        window, most = (rows := torch.stack([*tallies.values()]))[:, :-1], rows[:, -1]
        load, (tokens, entropy, loss) = window[:, :-3], window[:, -3:].unbind(-1)
        return {
            "expert_tokens": dict(zip(tallies, load.long().tolist(), strict=True)),
            "expert_largest_share": (load.amax(-1) / load.sum(-1)).max().item(),
            "expert_mean_share": 1 / load.shape[-1],
            "expert_most_rows": int(most.max().item()),
            "router_entropy": (entropy / tokens).mean().item(),
            "balance_loss": (loss / tokens).sum().item(),
        }


def _group(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    return mesh.get_group() if mesh.size() > 1 else None


def _numbers(name: str) -> list[int]:
    """Return the numbers in a module's name, by which blocks are in order."""
    return [int(part) for part in name.split(".") if part.isdecimal()]
