"""``activation_checkpoint.mode = "auto"``: the mode that recomputes least of those that fit into the devices' memory.

One process of a run chooses, before the model is built, and all take its choice.
"""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from titanlite.config import JobConfig, check_config
from titanlite.config.refuse import refuse
from titanlite.distributed.runtime import Runtime
from titanlite.errors import ConfigError
from titanlite.metrics.device import GIB, device_name, host_memory, total_memory
from titanlite.plan.devices import device_called
from titanlite.plan.layout_memory import ROOM
from titanlite.plan.least import least_peak
from titanlite.plan.lone_rank import in_a_process
from titanlite.plan.predicted import reserved_peak

logger = logging.getLogger(__name__)

KEY = "activation_checkpoint.mode"
# The share of a device's memory that is left to what estimates do not count: the CUDA context, buffers of NCCL and
# cuBLAS, and what the allocator rounds up and cannot reuse. Estimates are 4 to 21% below what published runs of the
# same options had reserved, of which an unknown part was free (docs/internals/memory-estimates.md).
RESERVED_SHARE = 0.15
RESERVED_LEAST = 1 * GIB  # of a small device; on the CPU, a process without a model takes half of it


class Mode(NamedTuple):
    """A mode of activation checkpointing, with its option if it is selective."""

    mode: str
    option: str = ""

    def __str__(self) -> str:
        return f"{self.mode} {self.option}".strip()

    def set_in(self, config: JobConfig) -> JobConfig:
        """Return ``config`` with this mode."""
        changed = copy.deepcopy(config)
        options = changed.activation_checkpoint
        options.mode = self.mode  # type: ignore[assignment]
        options.selective_ac_option = self.option or options.selective_ac_option
        return changed


# By what they recompute, the least first. "op" computes the pointwise operations and every second matmul again (wk, wo
# and w3: 37% of the matmuls of a Llama 3 8B block), and no attention; "2" half of everything; "full" everything.
MODES = (Mode("none"), Mode("selective", "op"), Mode("selective", "2"), Mode("full"))


@dataclass(frozen=True)
class Choice:
    """The mode that was chosen, and in words why: its estimate, the memory, and what did not fit."""

    mode: Mode
    why: str

    def __str__(self) -> str:
        return f"{self.mode}: {self.why}"

    def apply(self, config: JobConfig) -> None:
        """Put the choice into ``config`` in place of "auto"."""
        chosen = self.mode.set_in(config).activation_checkpoint
        config.activation_checkpoint = replace(chosen, chosen=str(self))


def usable(memory: int) -> int:
    """Return the bytes that a device of ``memory`` bytes has for what estimates count; 0 if it is below the reserve."""
    return max(0, memory - max(round(RESERVED_SHARE * memory), RESERVED_LEAST))


def choose(
    config: JobConfig,
    world_size: int,
    vocab_size: int | None,
    memory: int,
    earlier: Mode | None = None,
    known: bool = False,
) -> Choice:
    """Return the first of :data:`MODES` whose estimated peak fits. On a device that ``titanlite plan`` knows, that is
    the mode of its plan for this layout, if it covers the model and the options.

    Args:
        vocab_size: as for :func:`titanlite.plan.estimate.estimate`.
        memory: of the smallest device, in bytes; on the CPU, the share of a process.
        earlier: the choice for the run that goes on here, which it keeps if it fits.
        known: the device is known to plans.

    Raises:
        ConfigError: no mode fits, or training with this configuration would raise it.
    """
    from titanlite.plan.estimate import ASSUMED_VOCAB_SIZE  # it imports the compiler, which plans do not need

    check_config(config, world_size, train=False)
    size = vocab_size or ASSUMED_VOCAB_SIZE
    planned = known and reserved_peak(MODES[0].set_in(config), world_size, size) is not None
    room = round(ROOM * memory) if planned else usable(memory)
    device = f"{room / GIB:.2f} GiB ({memory / GIB:.2f} less {(memory - room) / GIB:.2f} in reserve)"
    too_large: list[str] = []
    for mode in (*(mode for mode in MODES if mode == earlier), *(mode for mode in MODES if mode != earlier)):
        if planned:
            peak, exact = reserved_peak(mode.set_in(config), world_size, size) or 0, True
        else:
            peak, exact = _peak(mode.set_in(config), world_size, size, room)
        if peak <= room:
            return Choice(mode, "; ".join([f"an estimated {peak / GIB:.2f} GiB of {device}", *too_large]))
        too_large.append(f"{mode} needs {'' if exact else 'at least '}{peak / GIB:.2f}")
    more = "use more devices, a smaller training.local_batch_size or training.seq_len, or a smaller model.flavor"
    refuse(config, KEY, f"no mode fits into {device}: {', '.join(too_large)} GiB; {more}")


def _peak(config: JobConfig, world_size: int, vocab_size: int, room: int) -> tuple[int, bool]:
    """Return the estimated peak in bytes, and True; a lower bound that is above ``room``, and False."""
    from titanlite.plan.advice import need  # these import the compiler, which a run without "auto" may not need
    from titanlite.plan.depth import peak_memory

    least = least_peak(config, world_size, vocab_size)
    if least > room:
        return least, False
    if config.training.enable_cpu_offload:
        return need(config, world_size, vocab_size).peak, True
    return peak_memory(config, world_size, vocab_size), True


def resolve(config: JobConfig, runtime: Runtime, vocab_size: int, earlier: dict[str, Any]) -> dict[str, str]:
    """Put a mode in place of "auto", the same on all ranks, and return the choice in words for the header.

    Args:
        earlier: the section [activation_checkpoint] of the run that goes on here, on rank 0; empty if none does.

    Raises:
        ConfigError: no mode fits, or there is no estimate.
    """
    options = config.activation_checkpoint
    if options.mode != "auto":
        if not options.chosen.startswith(f"{_mode_of(options.mode, options.selective_ac_option)}: "):
            options.chosen = ""  # of another start
        return {"auto has chosen": options.chosen} if options.chosen else {}
    memory = -runtime.agree_max(-_memory_of_process(runtime.device))[0]
    estimated = copy.deepcopy(config)
    if runtime.device.type == "cpu":
        estimated.training.enable_cpu_offload = False  # host memory is all there is
    known = device_called(device_name(runtime.device)) is not None
    kept = _mode_of(earlier["mode"], earlier["selective_ac_option"]) if earlier.get("chosen") else None
    choice: list[Choice | None] = [None]

    def ask() -> None:
        logger.info("estimating which activation checkpointing fits into %.2f GiB ...", memory / GIB)
        try:  # an estimate needs a process group of its own kind
            choice[0] = in_a_process(
                _choose_without_gpu, estimated, runtime.world_size, vocab_size, memory, kept, known, method="spawn"
            )
        except ConfigError as e:
            raise ConfigError(e.why, key=e.key, value=e.value, origin=config.origin(e.key)) from None
        except Exception as e:  # all ranks must hear of it
            refuse(config, KEY, f"there is no estimate of this configuration ({type(e).__name__}: {e}); name a mode")

    runtime.on_rank_zero(ask)
    if runtime.world_size > 1:
        dist.broadcast_object_list(choice, src=0, group=runtime.control)
    assert choice[0] is not None
    choice[0].apply(config)
    return {"auto has chosen": config.activation_checkpoint.chosen}


def _choose_without_gpu(*args: Any) -> Choice:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return choose(*args)


def _mode_of(mode: str, option: str) -> Mode:
    return Mode(mode, option if mode == "selective" else "")


def _memory_of_process(device: torch.device) -> int:
    """Return the memory of the GPU; on the CPU, this process's share of the machine's, without what is swapped out."""
    if device.type != "cpu":
        return total_memory(device)
    return min(total_memory(device), host_memory()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
