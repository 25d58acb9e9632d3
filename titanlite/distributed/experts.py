"""The balance of experts: what is refused with them, and their loads, agreed over the processes after each step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from titanlite.config import JobConfig
from titanlite.config.model_sections import Experts
from titanlite.config.refuse import refuse
from titanlite.distributed.mesh import Mesh
from titanlite.errors import ConfigError
from titanlite.models.layers import BalanceLoss, Mixture, MixtureArgs

_RATE = 0.001  # by default: of the bias update, as in DeepSeek-V3, and the coefficient of the balance loss


def check_experts(mixture: MixtureArgs | None, mesh: Mesh, config: JobConfig) -> None:
    """Check the options of experts, and what does not go with them.

    Args:
        mixture: that of the model; None: it has none.

    Raises:
        ConfigError: an option has no effect, or a dimension of parallelism does not know experts.
    """
    options = config.experts
    if mixture is None:
        for key, value in vars(Experts()).items():
            if getattr(options, key) != value:
                refuse(config, f"experts.{key}", "has no effect: this model has no experts; leave it out")
        return
    for name, degree, why in (
        ("tensor", mesh.tp.size(), "the projections of experts are not sharded by their features"),
        ("context", mesh.cp.size(), "the balance of experts is not computed over parts of sequences"),
        ("pipeline", mesh.pp.size(), "the loads of experts are not collected from several stages"),
    ):
        if degree > 1:
            raise ConfigError(
                f"this model has experts, and {why} in this version; shard with data_parallel_shard_degree",
                key=f"parallelism.{name}_parallel_degree",
                value=degree,
            )
    if options.bias_update_rate and not mixture.bias:
        refuse(
            config,
            "experts.bias_update_rate",
            "has no effect: the routers of this family have no bias, and its files no place for one; use "
            "experts.balance_loss",
        )
    if options.balance_loss_over != Experts().balance_loss_over and not balance_loss(mixture, options).coefficient:
        refuse(config, "experts.balance_loss_over", "has no effect without experts.balance_loss; set that too")


def balance_loss(mixture: MixtureArgs, options: Experts) -> BalanceLoss:
    """Return the balance loss that ``options`` ask for."""
    coefficient = options.balance_loss
    if coefficient is None:
        coefficient = 0.0 if mixture.bias else _RATE
    return BalanceLoss(coefficient, options.balance_loss_over, options.z_loss)


class ExpertBalance:
    """The loads of all experts of a model.

    Args:
        parts: the model.
        stage: the processes that hold it; None: this one alone.
    """

    def __init__(self, parts: Iterable[nn.Module], options: Experts, stage: DeviceMesh | None = None) -> None:
        named = ((name, m) for part in parts for name, m in part.named_modules() if isinstance(m, Mixture))
        self._mixtures = dict(named)
        self._rate = _RATE if options.bias_update_rate is None else options.bias_update_rate
        self._group = stage.get_group() if stage is not None and stage.size() > 1 else None
        self._window: Tensor | None = None

    @torch.no_grad()
    def step_done(self, bad: Tensor) -> None:
        """Sum the loads of a step over all processes, and move the biases.

        Args:
            bad: a scalar of any dtype that is not 0 if the step is bad. Then no bias moves.
        """
        if not self._mixtures:
            return
        mixtures = [*self._mixtures.values()]
        tallies = torch.stack([mixture.tally for mixture in mixtures])
        if self._group is not None:
            dist.all_reduce(tallies, group=self._group)
        tallies = torch.where(bad == 0, tallies, 0.0)  # a bad step may have a NaN
        self._window = tallies if self._window is None else self._window + tallies
        for mixture, load in zip(mixtures, tallies[:, : mixtures[0].args.n_experts]):
            mixture.tally.zero_()
            if mixture.router.bias is not None and self._rate:
                mixture.router.bias.add_(self._rate * (load.mean() - load).sign())

    def report(self) -> dict[str, Any]:
        """Return the loads since the last report, for the log; empty without experts. It waits for the device."""
        if self._window is None:
            return {}
        window, self._window = self._window, None
        load, (tokens, entropy, loss) = window[:, :-3], window[:, -3:].unbind(-1)
        return {
            "expert_tokens": dict(zip(self._mixtures, load.long().tolist(), strict=True)),
            "expert_largest_share": (load.amax(-1) / load.sum(-1)).max().item(),
            "expert_mean_share": 1 / load.shape[-1],
            "router_entropy": (entropy / tokens).mean().item(),
            "balance_loss": (loss / tokens).sum().item(),
        }
