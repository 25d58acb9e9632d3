"""The keys of torchtitan's job configuration between 1 June and 31 July 2025, with its defaults, as we read them in its
history. None is unset."""

from __future__ import annotations

from typing import Any

Keys = dict[str, Any]

ON_1_JUNE: dict[str, Keys] = {
    "job": {
        "config_file": None,
        "dump_folder": "./torchtitan/outputs",
        "description": "default job",
        "use_for_integration_test": False,
        "print_args": False,
    },
    "profiling": {
        "enable_profiling": False,
        "save_traces_folder": "profile_traces",
        "profile_freq": 10,
        "enable_memory_snapshot": False,
        "save_memory_snapshot_folder": "memory_snapshot",
    },
    "metrics": {
        "log_freq": 10,
        "enable_tensorboard": False,
        "disable_color_printing": False,
        "save_tb_folder": "tb",
        "save_for_all_ranks": False,
        "enable_wandb": False,
    },
    "model": {
        "name": "llama3",
        "flavor": "debugmodel",
        "tokenizer_path": "./torchtitan/datasets/tokenizer/tokenizer.model",
        "converters": [],
        "print_after_conversion": False,
    },
    "optimizer": {
        "name": "AdamW",
        "lr": 8e-4,
        "eps": 1e-8,
        "implementation": "fused",
        "early_step_in_backward": False,
    },
    "lr_scheduler": {"warmup_steps": 200, "decay_ratio": None, "decay_type": "linear", "lr_min": 0.0},
    "training": {
        "dataset": "c4_test",
        "dataset_path": None,
        "batch_size": 8,
        "seq_len": 2048,
        "max_norm": 1.0,
        "steps": 10000,
        "enable_cpu_offload": False,
        "mixed_precision_param": "bfloat16",
        "mixed_precision_reduce": "float32",
        "compile": False,
        "gc_freq": 50,
        "gc_debug": False,
        "seed": None,
        "deterministic": False,
    },
    "parallelism": {
        "data_parallel_replicate_degree": 1,
        "enable_compiled_autograd": False,
        "data_parallel_shard_degree": -1,
        "fsdp_reshard_after_forward": "default",
        "tensor_parallel_degree": 1,
        "disable_loss_parallel": False,
        "enable_async_tensor_parallel": False,
        "pipeline_parallel_degree": 1,
        "pipeline_parallel_split_points": [],
        "pipeline_parallel_layers_per_stage": None,
        "pipeline_parallel_schedule": "1F1B",
        "pipeline_parallel_schedule_csv": "",
        "pipeline_parallel_microbatch_size": 1,
        "context_parallel_degree": 1,
        "context_parallel_rotate_method": "allgather",
    },
    "checkpoint": {
        "enable_checkpoint": False,
        "folder": "checkpoint",
        "interval": 500,
        "model_weights_only": False,
        "export_dtype": "float32",
        "create_seed_checkpoint": False,
        "async_mode": "disabled",
        "keep_latest_k": 10,
        "load_step": -1,
        "exclude_from_loading": [],
    },
    "activation_checkpoint": {"mode": "selective", "selective_ac_option": "2"},
    "float8": {
        "enable_fsdp_float8_all_gather": False,
        "precompute_float8_dynamic_scale_for_fsdp": False,
        "force_recompute_fp8_weight_in_bwd": False,
        "recipe_name": None,
        "filter_fqns": [],
        "emulate": False,
    },
    "mx": {"use_fp8_dim1_cast_triton_kernel": True, "recipe_name": "mxfp8", "filter_fqns": ["output"]},
    "comm": {"init_timeout_seconds": 300, "train_timeout_seconds": 100, "trace_buf_size": 20000},
    "memory_estimation": {"enabled": False, "disable_fake_mode": False},
    "fault_tolerance": {
        "enable": False,
        "replica_id": 0,
        "group_size": 0,
        "min_replica_size": 1,
        "semi_sync_method": None,
        "sync_steps": 5,
    },
    "experimental": {"custom_import": "", "custom_args_module": ""},
}

# Date (Pacific time); keys that went; keys that came, or whose default changed.
CHANGES: list[tuple[str, list[str], Keys]] = [
    ("2025-06-05", ["training.batch_size"], {"training.local_batch_size": 8, "training.global_batch_size": -1}),
    ("2025-06-11", [], {"optimizer.beta1": 0.9, "optimizer.beta2": 0.95, "optimizer.weight_decay": 0.1}),
    (
        "2025-06-13",
        ["checkpoint.model_weights_only"],
        {
            "checkpoint.initial_load_path": None,
            "checkpoint.initial_load_model_weights_only": True,
            "checkpoint.last_save_model_weights_only": False,
        },
    ),
    (
        "2025-06-16",
        [],
        {
            "fault_tolerance.should_quantize": False,
            "fault_tolerance.fragment_sync_delay": 0,
            "fault_tolerance.fragment_update_alpha": 0.0,
        },
    ),
    ("2025-06-17", [], {"checkpoint.enable_first_step_checkpoint": False}),
    ("2025-06-25", [], {"checkpoint.last_save_model_weights_only": True}),
    ("2025-06-27", [], {"float8.moe_fqns_prototype": []}),
    ("2025-07-08", [], {"parallelism.expert_parallel_degree": 1}),
    (
        "2025-07-09",
        [],
        {
            "validation.enabled": False,
            "validation.dataset": "c4_validation",
            "validation.dataset_path": None,
            "validation.local_batch_size": 8,
            "validation.seq_len": 2048,
            "validation.freq": 10,
            "validation.steps": -1,
        },
    ),
    ("2025-07-14", [], {"checkpoint.last_save_in_safetensors_format": False}),
    (
        "2025-07-16",
        [],
        {"activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": ["moe.router.gate"]},
    ),
    (
        "2025-07-18",
        [],
        {"fault_tolerance.process_group": "gloo", "fault_tolerance.process_group_timeout_ms": 10000},
    ),
    (
        "2025-07-20",
        [
            "checkpoint.initial_load_model_weights_only",
            "checkpoint.last_save_model_weights_only",
            "checkpoint.last_save_in_safetensors_format",
        ],
        {
            "checkpoint.initial_load_model_only": True,
            "checkpoint.last_save_model_only": True,
            "checkpoint.last_save_in_hf": False,
        },
    ),
    ("2025-07-23", [], {"comm.save_traces_folder": "comm_traces"}),
    ("2025-07-24", ["mx.use_fp8_dim1_cast_triton_kernel"], {"mx.mxfp8_dim1_cast_kernel_choice": "triton"}),
    ("2025-07-28", ["float8.force_recompute_fp8_weight_in_bwd"], {"checkpoint.initial_load_in_hf": False}),
    ("2025-07-29", [], {"model.tokenizer_path": "./tests/assets/tokenizer"}),
    (
        "2025-07-30",
        ["lr_scheduler.lr_min"],
        {
            "lr_scheduler.min_lr_factor": 0.0,
            "parallelism.module_fqns_per_model_part": None,
            "parallelism.pipeline_parallel_first_stage_less_layers": 1,
            "parallelism.pipeline_parallel_last_stage_less_layers": 1,
        },
    ),
    ("2025-07-31", [], {"mx.moe_fqns_prototype": []}),
]


def keys_by_date() -> dict[str, Keys]:
    """The keys and defaults after each change, by its date; "section.key"."""
    keys = {f"{section}.{key}": value for section, table in ON_1_JUNE.items() for key, value in table.items()}
    dates = {"2025-06-01": keys}
    for date, gone, came in CHANGES:
        keys = {name: value for name, value in keys.items() if name not in gone} | came
        dates[date] = keys
    return dates
