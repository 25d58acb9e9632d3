"""The other side of peers.py: a training step of torchtitan's Llama 3, with torchao's float8.

Theirs: the model (``models.llama3``), its float8 converter, selective activation checkpointing per operation, compile
of each block and of the loss, FSDP2 with bfloat16 parameters and float32 reduction and masters (``parallelize_llama``
and ``apply_fsdp``), the optimizer, the clipping of gradients, and the order of these in their ``Trainer.train_step``.
Not theirs: the trainer around it (data loading, schedule, logging, checkpoints), which would only cost them time; and
FSDP2 on a mesh of one process, for which their trainer has autocast instead: so both sides compute in one precision.
The initial weights are titanlite's: the rotary pairs of wq and wk, which lie differently, are moved.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.optimizer import build_optimizers
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import clip_grad_norm_
from torchtitan.models.llama3 import Transformer, TransformerModelArgs, llama3_args, parallelize_llama
from torchtitan.models.llama3.infra.parallelize import apply_fsdp
from torchtitan.models.llama3.model.args import RoPEScalingArgs
from torchtitan.protocols.model_converter import build_model_converters

from titanlite.config import JobConfig as OurConfig
from titanlite.distributed.init import WeightInit
from titanlite.models.layers import Decoder, DecoderArgs


def model_args(ours: DecoderArgs) -> TransformerModelArgs:
    """torchtitan's words for a shape of ours; Llama 3's rotary frequencies, without the scaling of 3.1."""
    shape: dict[str, Any] = {
        "n_layers": ours.n_layers,
        "vocab_size": ours.vocab_size,
        "max_seq_len": ours.max_seq_len,
        "norm_eps": ours.norm_eps,
        "rope_theta": ours.rope_theta,
        "rope_scaling_args": RoPEScalingArgs(scaling_factor=1.0),
    }
    if ours.dim == llama3_args["8B"].dim:
        return dataclasses.replace(llama3_args["8B"], **shape)
    heads = {"n_heads": ours.n_heads, "n_kv_heads": ours.n_kv_heads}
    return TransformerModelArgs(dim=ours.dim, multiple_of=ours.ffn_dim, **heads, **shape)


def job_config(ours: OurConfig) -> JobConfig:
    """torchtitan's options for what a configuration of ours asks for."""
    job, recipe = JobConfig(), ours.float8.recipe_name
    job.training.seq_len = ours.training.seq_len
    job.training.max_norm = ours.training.max_norm
    job.compile.enable = ours.training.compile
    job.activation_checkpoint.mode = "selective"
    job.activation_checkpoint.selective_ac_option = "op"
    for key in ("name", "lr", "beta1", "beta2", "eps", "weight_decay", "implementation"):
        setattr(job.optimizer, key, getattr(ours.optimizer, key))
    if ours.model.converters:
        job.model.converters = ["quantize.linear.float8"]
        float8 = job.quantize.linear.float8
        float8.recipe_name = None if recipe == "tensorwise" else recipe
        float8.filter_fqns = list(ours.float8.filter_fqns)
        float8.emulate = not torch.cuda.is_available()
    return job


@dataclass
class Peer:
    """Calling it is a step on token ids [batch, seq_len] on the host; the loss, and the gradients' norm before
    clipping, are returned on the device."""

    model: nn.Module
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    optimizers: Any
    max_norm: float
    device: torch.device

    def __call__(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizers.zero_grad()
        tokens = torch.tensor(labels.numel(), dtype=torch.float32).to(self.device, non_blocking=True)
        inputs, labels = inputs.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        logits = self.model(inputs)
        loss = self.loss_fn(logits, labels) / tokens
        del logits
        loss.backward()
        grad_norm = clip_grad_norm_(list(self.model.parameters()), self.max_norm, foreach=True)
        self.optimizers.step()
        return loss.detach(), grad_norm


def build(ours: OurConfig, args: DecoderArgs, device: torch.device) -> Peer:
    """Their step for a configuration of ours.

    Args:
        args: the shape, with its vocabulary and number of positions.
    """
    gc.disable()  # as their trainer and ours do
    store = torch._C._distributed_c10d.HashStore()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    job = job_config(ours)
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    with torch.device("meta"):
        model: nn.Module = Transformer(model_args(args))
    build_model_converters(job, dims).convert(model)
    model = parallelize_llama(model, dims, job)
    mesh = init_device_mesh(device.type, (1,), mesh_dim_names=("fsdp",))
    # Kept gathered, as ours is on one device: by default it would gather again in backward.
    precision = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    apply_fsdp(model, mesh, **precision, pp_enabled=False, reshard_after_forward_policy="never")
    model.to_empty(device=device)
    with torch.no_grad():
        model.init_weights()  # type: ignore[operator]
    copy_weights(args, model, device, ours.training.seed or 0)
    model.train()
    optimizers = build_optimizers([model], job.optimizer, dims)
    return Peer(model, build_cross_entropy_loss(job), optimizers, job.training.max_norm, device)


@torch.no_grad()
def copy_weights(args: DecoderArgs, model: nn.Module, device: torch.device, seed: int) -> None:
    """Give ``model`` the weights that titanlite begins with under ``seed``."""
    with torch.device("meta"):
        ours = Decoder(args)
    ours.to_empty(device=device)
    ours.init_weights(WeightInit(ours, seed))
    wrappers = ("_orig_mod.", "_checkpoint_wrapped_module.")
    theirs: dict[str, Any] = {}
    for name, param in model.named_parameters():
        for wrapper in wrappers:
            name = name.replace(wrapper, "")
        theirs[name] = param.to_local() if hasattr(param, "to_local") else param
    for name, param in ours.named_parameters():
        value = param.detach()
        if name.endswith(("attention.wq.weight", "attention.wk.weight")):
            halves = value.view(-1, 2, args.head_size // 2, value.shape[1])
            value = halves.transpose(1, 2).reshape(value.shape)
        target = theirs.pop(name)
        assert target.shape == value.shape, (name, target.shape, value.shape)
        target.copy_(value)
    assert not theirs, f"without a counterpart: {', '.join(theirs)}"
