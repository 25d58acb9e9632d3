"""The device mesh: which processes form which dimension of parallelism."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titanlite.config import Degrees
from titanlite.distributed.target import Target


@dataclass(frozen=True)
class ExpertMesh:
    """The same processes as those of a :class:`Mesh`, as mixtures of experts use them.

    Experts take the place of no other dimension: expert parallelism borrows the processes of FSDP (those of data and
    context parallelism) and of tensor parallelism, of which each has tokens of its own.

    Attributes:
        ep: the mesh of expert parallelism; each process has a part of the experts. Its ranks are the closest ones.
        fsdp: the mesh over which FSDP2 shards each of these parts, fsdp x tp / ep.
        data_parallel: ``fsdp``, or with replicas (HSDP) dp_replicate x fsdp.
        sequence: the processes that have parts of the same sequences, cp x tp; they are in one ``Mesh.stage``.
    """

    ep: DeviceMesh
    fsdp: DeviceMesh
    data_parallel: DeviceMesh
    sequence: DeviceMesh


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
        experts: the meshes of mixtures of experts; None: they were not asked for.
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
    experts: ExpertMesh | None = None

    @property
    def device_type(self) -> str:
        return self.world.device_type

    @property
    def data_parallel_rank(self) -> int:
        """The part of the data, of ``degrees.data_parallel`` parts, that this process reads. Processes that share a
        sequence, or a layer, read the same part."""
        replica, shard = self.world.get_local_rank("dp_replicate"), self.fsdp.get_local_rank()
        return replica * self.degrees.data_parallel_shard + shard // self.degrees.context_parallel


def build_mesh(degrees: Degrees, device_type: str, target: Target | None = None, *, experts: bool = False) -> Mesh:
    """Return the mesh of all processes, also if there is only one.

    Args:
        device_type: the device that holds tensors, "cpu" or "cuda".
        target: the device that computes; None: the one of ``device_type``.
        experts: make the meshes of mixtures of experts too, which may need more process groups.
    """
    d = degrees
    fsdp = d.data_parallel_shard * d.context_parallel
    world = init_device_mesh(
        device_type,
        (d.pipeline_parallel, d.data_parallel_replicate, fsdp, d.tensor_parallel),
        mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"),
    )
    # Not a dimension of the world: FSDP2 needs its mesh and that of tensor parallelism to be slices of one mesh.
    cp = world["fsdp"]._unflatten(0, (d.data_parallel_shard, d.context_parallel), ("dp_shard", "cp"))["cp"]
    return Mesh(
        degrees=degrees,
        world=world,
        fsdp=world["fsdp"],
        data_parallel=world["dp_replicate", "fsdp"] if d.data_parallel_replicate > 1 else world["fsdp"],
        tp=world["tp"],
        cp=cp,
        pp=world["pp"],
        stage=world["dp_replicate", "fsdp", "tp"]._flatten("stage"),
        target=target or Target("cpu" if device_type == "cpu" else "cuda"),
        experts=_expert_mesh(d, world, cp) if experts else None,
    )


def _expert_mesh(d: Degrees, world: DeviceMesh, cp: DeviceMesh) -> ExpertMesh:
    tp, ep = d.tensor_parallel, d.expert_parallel
    shards = world["fsdp"] if tp == 1 else world["fsdp", "tp"]._flatten("fsdp_tp")
    parts = shards._unflatten(0, (shards.size() // ep, ep), ("expert_fsdp", "ep"))
    fsdp = parts["expert_fsdp"] if ep > 1 else shards
    both = tp > 1 and d.context_parallel > 1
    sequence = world["tp"] if tp > 1 else cp
    if both:
        shape = d.data_parallel_shard, d.context_parallel * tp
        sequence = shards._unflatten(0, shape, ("sequences", "sequence"))["sequence"]
    replicated = d.data_parallel_replicate > 1
    return ExpertMesh(
        ep=parts["ep"],
        fsdp=fsdp,
        data_parallel=DeviceMesh._concatenate([world["dp_replicate"], fsdp]) if replicated else fsdp,
        sequence=sequence,
    )
