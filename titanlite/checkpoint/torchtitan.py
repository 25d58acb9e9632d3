"""Load weights from a folder of ``torch.distributed.checkpoint`` (DCP) that torchtitan has saved.

The folder does not say which model it holds. Only the tensors of the model are read: the rest (optimizer, schedule,
place in the data) are pickles, and belong to torchtitan's own objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from titanlite.checkpoint.collectives import on_all, shapes_on_all
from titanlite.checkpoint.metadata import METADATA, read_metadata
from titanlite.checkpoint.state import refuse_another_model
from titanlite.checkpoint.storage import INFO, SUMS, copy_into
from titanlite.errors import ConfigError
from titanlite.quant.fsdp import shard_with_offset

_PREFIX = "model."  # until May 2025; since then the names of the model have none
_OTHER = ("optimizer.", "lr_scheduler.", "train_state.", "dataloader.", "freqs_cis")


def is_torchtitan(folder: Path) -> bool:
    """Return True if ``folder`` holds DCP's files and no description: another program has saved it."""
    return (folder / METADATA).is_file() and not any((folder / name).exists() for name in (INFO, SUMS))


class TorchtitanFolder:
    """The weights of a folder. The constructor reads which tensors there are.

    Raises:
        ConfigError: see :func:`titanlite.checkpoint.metadata.read_metadata`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, saved = folder, read_metadata(folder)
        prefix = _PREFIX if any(name.startswith(_PREFIX) for name in saved) else ""
        names = (name for name in saved if name.startswith(prefix))
        self._saved = {name.removeprefix(prefix): saved[name] for name in names}
        self._saved = {name: tensor for name, tensor in self._saved.items() if not name.startswith(_OTHER)}

    def load_into(
        self, parameters: Mapping[str, Tensor], heads: Mapping[str, int], group: dist.ProcessGroup | None
    ) -> None:
        """Copy the weights into the parameters, in place; dtypes are converted. All processes of ``group`` must call
        this, each with its own parameters.

        Args:
            parameters: parameter name in the model -> tensor or DTensor.
            heads: the parameters whose rows are the features of rotated heads -> the features of one head. torchtitan
                rotates the features 2i and 2i + 1 of a head together; here these are i and i + head_dim / 2.

        Raises:
            ConfigError: on all processes: names or shapes differ, or a file cannot be read.
        """
        saved = {name: tensor.shape for name, tensor in self._saved.items()}
        refuse_another_model(self.folder, saved, shapes_on_all(group, parameters))

        def copy() -> None:
            for name, tensor in parameters.items():
                self._copy(name, tensor, heads.get(name))

        on_all(group, copy, lambda problems: ConfigError("; ".join(problems)))

    def _copy(self, name: str, tensor: Tensor, head_size: int | None) -> None:
        if head_size is None:
            copy_into({name: tensor}, self._saved, self.folder)
            return
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        copy_into({name: whole}, self._saved, self.folder)
        pairs = whole.unflatten(0, (-1, head_size // 2, 2))
        whole = pairs.transpose(1, 2).flatten(0, 2)
        local, offset = shard_with_offset(tensor)
        local.copy_(whole[tuple(slice(start, start + size) for start, size in zip(offset, local.shape))])
