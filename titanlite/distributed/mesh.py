"""The device mesh: which processes form which dimension of parallelism."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titanlite.config import Degrees
from titanlite.distributed.target import Target


@dataclass(frozen=True)
class Mesh:
    """The processes of a run, by dimension of parallelism.

    Ranks are numbered with tensor parallelism innermost, then context, data (shard, then replicate) and pipeline
    parallelism, so that the dimensions that communicate most have the closest ranks. An unused dimension has size 1, so
    that there is one code path.

    Attributes:
        degrees: the size of each dimension.
        world: all processes, (pp, dp_replicate, fsdp, tp); the other meshes are slices of it.
        fsdp: the mesh over which FSDP2 shards parameters, data_parallel_shard x context_parallel.
        data_parallel: the mesh for ``fully_shard``: ``fsdp``, or with replicas (HSDP) dp_replicate x fsdp.
        tp, cp, pp: the meshes of tensor, context and pipeline parallelism.
        stage: all processes that hold the same pipeline stages.
        target: the device that computes; in an estimate it may not be present.
    """

    degrees: Degrees
    world: DeviceMesh
    fsdp: DeviceMesh
    data_parallel: DeviceMesh
    tp: DeviceMesh
    cp: DeviceMesh
    pp: DeviceMesh
    stage: DeviceMesh
    target: Target

    @property
    def device_type(self) -> str:
        return self.world.device_type

    @property
    def data_parallel_rank(self) -> int:
        """The part of the data, of ``degrees.data_parallel`` parts, that this process reads. Processes that share a
        sequence, or a layer, read the same part."""
        replica, shard = self.world.get_local_rank("dp_replicate"), self.fsdp.get_local_rank()
        return replica * self.degrees.data_parallel_shard + shard // self.degrees.context_parallel


def build_mesh(degrees: Degrees, device_type: str, target: Target | None = None) -> Mesh:
    """Return the mesh of all processes, also if there is only one.

    Args:
        device_type: the device that holds tensors, "cpu" or "cuda".
        target: the device that computes; None: the one of ``device_type``.
    """
    d = degrees
    fsdp = d.data_parallel_shard * d.context_parallel
    world = init_device_mesh(
        device_type,
        (d.pipeline_parallel, d.data_parallel_replicate, fsdp, d.tensor_parallel),
        mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"),
    )
    return Mesh(
        degrees=degrees,
        world=world,
        fsdp=world["fsdp"],
        data_parallel=world["dp_replicate", "fsdp"] if d.data_parallel_replicate > 1 else world["fsdp"],
        tp=world["tp"],
        # Not a dimension of the world: FSDP2 needs its mesh and that of tensor parallelism to be slices of one mesh.
        cp=world["fsdp"]._unflatten(0, (d.data_parallel_shard, d.context_parallel), ("dp_shard", "cp"))["cp"],
        pp=world["pp"],
        stage=world["dp_replicate", "fsdp", "tp"]._flatten("stage"),
        target=target or Target("cpu" if device_type == "cpu" else "cuda"),
    )
