"""The device mesh: which processes form which dimension of parallelism."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titanlite.config import Degrees


def build_mesh(degrees: Degrees, device_type: str) -> DeviceMesh:
    """A mesh with the dimension ``dp_shard``, over which FSDP2 shards; on one process too, so that there is one code
    path and one precision."""
    return init_device_mesh(device_type, (degrees.data_parallel_shard,), mesh_dim_names=("dp_shard",))
