"""Every option that ``--help`` lists can be set: alone, or with what it needs, which the refusal says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.support.forks import ROOT
from titanlite.config import check_config, load_config
from titanlite.config.options import Option, options_of
from titanlite.config.schema import JobConfig
from titanlite.errors import ConfigError

OPTIONS = {opt.name: opt for keys in options_of(JobConfig).values() for opt in keys.values()}
# Ordinary values of options that do not take any text, or any number.
VALUES = {
    "job.config_file": "debug_model",
    "model.name": "qwen3",
    "model.flavor": "20M",
    "model.hf_config": "config.json",
    "model.tokenizer_path": f"{ROOT}/titanlite/data/assets/tokenizer.json",
    "model.converters": "fused_rmsnorm",
    "optimizer.name": "Adam",
    "lr_scheduler.decay_type": "cosine",
    "training.dataset": "json",
    "training.dataset_path": "a.jsonl",
    "training.global_batch_size": "64",
    "validation.dataset": "json",
    "validation.dataset_path": "a.jsonl",
    "validation.tasks": "hellaswag",
    "validation.task_data": "a.jsonl",
    "parallelism.pipeline_parallel_split_points": "layers.3",
    "parallelism.pipeline_parallel_microbatch_size": "2",
    "parallelism.pipeline_parallel_schedule": "GPipe",
    "parallelism.pipeline_parallel_schedule_csv": "schedule.csv",
    "checkpoint.exclude_from_loading": "optimizer",
    "activation_checkpoint.selective_ac_option": "op",
    "float8.scaling_type_input": "delayed",
    "float8.scaling_type_weight": "delayed",
    "float8.scaling_type_grad_output": "delayed",
    "compile.backend": "eager",
    "experimental.custom_args_module": "more_options",
}
FLOAT8, SAVE, PIPELINE = "--model.converters=float8", "--checkpoint.enable_checkpoint", "pipeline_parallel_"
LOAD, VALIDATE = "--checkpoint.initial_load_path=.", "--validation.enable"
# What an option needs beside it. Alone it is refused, and the message names the first of these.
NEEDS = {
    "validation.dataset": [VALIDATE, "--validation.dataset_path=a.jsonl"],
    "validation.dataset_path": [VALIDATE, "--validation.dataset=json"],
    "validation.held_out_percent": [VALIDATE],
    "validation.precision": [VALIDATE, FLOAT8],
    "parallelism.disable_loss_parallel": ["--parallelism.tensor_parallel_degree=2"],
    "parallelism.enable_async_tensor_parallel": ["--parallelism.tensor_parallel_degree=2", "--training.compile"],
    "parallelism.context_parallel_rotate_method": ["--parallelism.context_parallel_degree=2"],
    "checkpoint.initial_load_model_weights_only": [LOAD],
    "checkpoint.initial_load_in_hf": [LOAD],
    "checkpoint.export_dtype": ["--checkpoint.last_save_model_weights_only"],
    "checkpoint.exclude_from_loading": [SAVE],
}
for key in ("create_seed_checkpoint", "async_mode", "load_step", "fallback", "enable_first_step_checkpoint"):
    NEEDS[f"checkpoint.{key}"] = [SAVE]
for key in ("prompt_field", "answer_field", "label_field"):
    NEEDS[f"data.{key}"] = ["--training.dataset=instruct"]
NEEDS["data.messages_field"] = ["--training.dataset=chat"]
NEEDS["data.too_long"] = ["--data.packing=examples"]
NEEDS["validation.tasks"] = [VALIDATE]
for key in ("task_data", "max_examples"):
    NEEDS[f"validation.{key}"] = [VALIDATE, "--validation.tasks=hellaswag"]
for key in ("split_points", "layers_per_stage", "schedule", "schedule_csv", "microbatch_size"):
    NEEDS[f"parallelism.{PIPELINE}{key}"] = [f"--parallelism.{PIPELINE}degree=2"]
NEEDS[f"parallelism.{PIPELINE}schedule_csv"] += [f"--parallelism.{PIPELINE}schedule=PipelineScheduleMulti"]
for name in OPTIONS:
    section, key = name.rsplit(".", 1)
    if section in ("float8", "int8", "mx") and key != "filter_fqns":
        NEEDS[name] = [f"--model.converters={section}"]
NEEDS["int8.enable_tensor_parallel_int8_all_gather"] += ["--parallelism.tensor_parallel_degree=2"]
NEEDS["mx.enable_tensor_parallel_mxfp8_all_gather"] += ["--parallelism.tensor_parallel_degree=2"]
NEEDS["float8.precompute_float8_dynamic_scale_for_fsdp"] += ["--float8.enable_fsdp_float8_all_gather"]
NEEDS["float8.moe_fqns"] += ["--float8.recipe_name=rowwise"]
for operand in ("input", "weight", "grad_output"):
    NEEDS[f"float8.static_scale_{operand}"] += [f"--float8.scaling_type_{operand}=static"]


def values_of(opt: Option) -> list[str]:
    """Values that are not the default."""
    if opt.name in VALUES:
        return [VALUES[opt.name]]
    if opt.base is bool:
        return [text for text in ("true", "false") if text != str(opt.default).lower()]
    if opt.choices:
        return [choice for choice in opt.choices if choice != opt.default] or [*opt.choices]
    return {int: ["4"], float: ["0.5"]}.get(opt.base, ["another"])


def check(argv: list[str]) -> None:
    config = load_config(argv, str(ROOT / "train_configs" / "debug_model.toml"))
    check_config(config, 4, train=not config.memory_estimation.enabled)


def test_every_option_that_help_lists_can_be_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("config.json").write_text("{}")
    Path("schedule.csv").write_text("0F0,0B0\n1F0,1B0\n")
    Path("more_options.py").write_text("from dataclasses import dataclass\n\n\n@dataclass\nclass JobConfig: ...\n")
    with pytest.raises(SystemExit, match=r"^0$"):
        load_config(["--help"])
    listed = re.findall(r"^  --([\w.]+)", capsys.readouterr().out, re.MULTILINE)
    assert len(listed) > 120
    for name in listed:
        needs = NEEDS.get(name, [])
        if name == "metrics.enable_wandb" and importlib.util.find_spec("wandb") is None:
            with pytest.raises(ConfigError, match="needs the package wandb"):
                check([f"--{name}"])
            continue
        for value in values_of(OPTIONS[name]):
            check([*needs, f"--{name}={value}"])
            if needs:
                with pytest.raises(ConfigError) as error:
                    check([f"--{name}={value}"])
                assert (error.value.key, error.value.value is None) == (name, False)
                assert re.search(r"[\w.]+", needs[0])[0] in error.value.why, (name, error.value.why)
