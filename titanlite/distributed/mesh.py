"""The device mesh: which processes form which dimension of parallelism."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titanlite.config import Degrees
from titanlite.distributed.target import Target


@dataclass(frozen=True)
class Mesh:
    """The processes of a run, by what they share.

    Ranks are numbered with tensor parallelism innermost, then context, data (shard, then replicate) and pipeline
    parallelism: what communicates most is closest. A dimension that is not used has size 1, so that there is one code
    path.

    Attributes:
        degrees: the size of each dimension.
        world: all processes, (pp, dp_replicate, fsdp, tp); the other meshes are slices of it.
        fsdp: over which FSDP2 shards: data_parallel_shard x context; each sequence is whole only over the latter, but
            parameters are the same in both.
        data_parallel: what ``fully_shard`` takes: ``fsdp``, or with replicas (HSDP) dp_replicate x fsdp.
        tp, cp, pp: of tensor, context and pipeline parallelism.
        stage: all processes that hold the same pipeline stages.
        target: the device that computes; in an estimate, one that is not there.
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
    """Return the mesh of all processes; on one process too.

    Args:
        device_type: where tensors lie, "cpu" or "cuda".
        target: the device that computes; None: that of ``device_type``.
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
        # Apart from the world's own dimensions: FSDP2 wants a plain slice of the mesh that tensor parallelism slices.
        cp=world["fsdp"]._unflatten(0, (d.data_parallel_shard, d.context_parallel), ("dp_shard", "cp"))["cp"],
        pp=world["pp"],
        stage=world["dp_replicate", "fsdp", "tp"]._flatten("stage"),
        target=target or Target("cpu" if device_type == "cpu" else "cuda"),
    )
