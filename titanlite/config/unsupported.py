"""Keys of torchtitan without an implementation in this version, so that its files load."""

from __future__ import annotations

from titanlite.config.refuse import refuse
from titanlite.config.schema import JobConfig

_MX_KERNELS = "one kernel casts along both dimensions; leave it out"
_FAULT_TOLERANCE = "one run is one group of processes; leave it out"
_STAGES = "stages have about equal work; use parallelism.pipeline_parallel_split_points for others"
_EXPERTS_WHOLE = (
    "tensor parallelism gives each of its processes a part of the tokens, for whole experts, which FSDP and "
    "parallelism.expert_parallel_degree shard over these processes too; leave it out"
)

# The key and the way out. Its default is the value at which it does nothing; any other value is an error and never
# silently ignored. (Keys such as checkpoint.interval, which only modify a feature, are not here.)
UNSUPPORTED: dict[str, str] = {
    "optimizer.early_step_in_backward": "leave it out",
    "training.dtype": "weights are float32; training.mixed_precision_param is the dtype that they compute in",
    "parallelism.enable_compiled_autograd": "use training.compile",
    "parallelism.expert_tensor_parallel_degree": _EXPERTS_WHOLE,
    "parallelism.module_fqns_per_model_part": _STAGES,
    "parallelism.pipeline_parallel_first_stage_less_layers": _STAGES,
    "parallelism.pipeline_parallel_last_stage_less_layers": _STAGES,
    "checkpoint.last_save_in_hf": "turn the last checkpoint into a Hugging Face folder with titanlite convert",
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": "op keeps every second matmul; leave it out",
    "mx.use_fp8_dim1_cast_triton_kernel": _MX_KERNELS,
    "mx.mxfp8_dim1_cast_kernel_choice": _MX_KERNELS,
    "validation.local_batch_size": "batches of validation are as large as those of training; leave it out",
    "validation.seq_len": "sequences of validation are as long as those of training; leave it out",
    "comm.save_traces_folder": "the environment variable TORCH_NCCL_DEBUG_INFO_TEMP_FILE says where torch writes them",
    "memory_estimation.disable_fake_mode": "leave it out",
    "fault_tolerance.enable": _FAULT_TOLERANCE,
    "fault_tolerance.process_group": _FAULT_TOLERANCE,
    "fault_tolerance.process_group_timeout_ms": _FAULT_TOLERANCE,
    "fault_tolerance.replica_id": _FAULT_TOLERANCE,
    "fault_tolerance.group_size": _FAULT_TOLERANCE,
    "fault_tolerance.min_replica_size": _FAULT_TOLERANCE,
    "fault_tolerance.semi_sync_method": _FAULT_TOLERANCE,
    "fault_tolerance.sync_steps": _FAULT_TOLERANCE,
    "fault_tolerance.should_quantize": _FAULT_TOLERANCE,
    "fault_tolerance.fragment_sync_delay": _FAULT_TOLERANCE,
    "fault_tolerance.fragment_update_alpha": _FAULT_TOLERANCE,
}


def check_unsupported(config: JobConfig) -> None:
    """Refuse keys of :data:`UNSUPPORTED` that are set to anything but their default. Keys of [validation] may repeat
    what training has, and be anything while nothing is validated."""
    defaults = JobConfig()
    for name, instead in UNSUPPORTED.items():
        section, key = name.split(".")
        value = config.value(name)
        inert = value == defaults.value(name)
        if section == "validation":
            inert = inert or not config.validation.enable or value == getattr(config.training, key)
        if not inert:
            refuse(config, name, f"this version of titanlite does not implement it; {instead}")
