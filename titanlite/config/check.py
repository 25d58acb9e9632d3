"""Checks of the options against each other and against the number of processes, before anything is built."""

from __future__ import annotations

import os
from pathlib import Path, PurePath

from titanlite.config.data_rules import check_data
from titanlite.config.number_formats import NUMBER_FORMATS
from titanlite.config.parallelism import check_parallelism, global_batch_size, resolve_degrees
from titanlite.config.refuse import refuse
from titanlite.config.run_config import FIXED_NAMES, FOLDERS
from titanlite.config.schema import Checkpoint, JobConfig
from titanlite.config.unsupported import check_unsupported
from titanlite.config.validation import check_validation
from titanlite.environment import is_installed

MOST_TOKENS = 1 << 40  # of a step


def check_config(config: JobConfig, world_size: int, *, train: bool = True) -> None:
    """Refuse options that this machine or this version cannot honour. A missing tokenizer is reported first.

    Args:
        train: check for training; False: for an estimate, which opens no files.
    """
    if train:
        _check_tokenizer(config)
        if config.memory_estimation.enabled:
            refuse(
                config,
                "memory_estimation.enabled",
                "the trainer makes no estimates; start run_train.sh, or titanlite train",
            )
        if config.metrics.enable_wandb and not is_installed("wandb"):
            refuse(config, "metrics.enable_wandb", "needs the package wandb; install it with: pip install wandb")
    _check_sizes(config)
    _check_folders(config)
    degrees = resolve_degrees(config.parallelism, world_size)
    check_unsupported(config)
    _check_optimizer(config)
    _check_checkpoint(config)
    for number_format in NUMBER_FORMATS:
        number_format.check(config)
    check_data(config)
    check_validation(config)
    if config.training.compile and not config.compile.components:
        refuse(config, "compile.components", "names nothing to compile for training.compile; leave out one of them")
    if config.sample.enable and degrees.pipeline_parallel * degrees.context_parallel > 1:
        refuse(
            config,
            "sample.enable",
            "no process has the whole model, or the whole text, under pipeline or context parallelism; leave it out, "
            "and let titanlite generate write from a checkpoint",
        )
    global_batch_size(config, degrees.data_parallel)
    check_parallelism(config, degrees)


def _check_sizes(config: JobConfig) -> None:
    """Refuse sizes of which torch cannot count the bytes; where memory begins to be short, plan.least knows."""
    sizes = {key: getattr(config.training, key) for key in ("seq_len", "local_batch_size", "global_batch_size")}
    for key in sizes:
        if sizes[key] * (sizes["seq_len"] if key != "seq_len" else sizes["local_batch_size"]) > MOST_TOKENS:
            refuse(
                config, f"training.{key}", "no device holds a step of as many tokens; use fewer or shorter sequences"
            )


def _check_folders(config: JobConfig) -> None:
    """Refuse folders that are, by mistake, the current one or files of the run folder."""
    if not config.job.dump_folder.strip():
        refuse(config, "job.dump_folder", 'the run folder needs a name; for the current folder, write "."')
    for section, key in FOLDERS:
        name = getattr(getattr(config, section), key)
        if PurePath(name).parts[0] in FIXED_NAMES:
            refuse(config, f"{section}.{key}", "the run folder has a file or folder of this name; choose another")


def _check_optimizer(config: JobConfig) -> None:
    options, key = config.optimizer, "optimizer.moments"
    if options.moments == "float32":
        return
    if options.name not in ("Adam", "AdamW"):
        refuse(config, key, f'Adam and AdamW have moments of low precision, not optimizer.name = "{options.name}"')
    if options.implementation == "foreach":
        refuse(config, key, 'is updated by parameter; set optimizer.implementation to "fused" or "for-loop"')


def _check_checkpoint(config: JobConfig) -> None:
    """Refuse options of [checkpoint] that would have no effect."""
    options, defaults = config.checkpoint, Checkpoint()

    def no_effect(key: str, reason: str) -> None:
        refuse(config, f"checkpoint.{key}", f"has no effect {reason}")

    def is_set(key: str) -> bool:
        return bool(getattr(options, key) != getattr(defaults, key))

    if not options.enable_checkpoint:
        # Keys such as interval, which only modify the feature, are allowed: files from June 2025 contain them.
        for key in ("create_seed_checkpoint", "load_step", "async_mode", "enable_first_step_checkpoint", "fallback"):
            if is_set(key):
                no_effect(key, "without checkpoints; set checkpoint.enable_checkpoint too")
    if not options.initial_load_path and is_set("initial_load_model_weights_only"):
        no_effect("initial_load_model_weights_only", "without checkpoint.initial_load_path; set that too")
    if options.initial_load_in_hf:
        if not options.initial_load_path:
            no_effect("initial_load_in_hf", "without checkpoint.initial_load_path; set that too")
        elif not (Path(options.initial_load_path).expanduser() / "config.json").is_file():
            refuse(
                config,
                "checkpoint.initial_load_in_hf",
                f'checkpoint.initial_load_path = "{options.initial_load_path}" is no Hugging Face folder, which has a '
                "config.json; correct the path, or leave this out",
            )
    if is_set("export_dtype") and not options.last_save_model_weights_only:
        no_effect("export_dtype", "without checkpoint.last_save_model_weights_only: a run needs float32; set that too")
    excluded = options.exclude_from_loading
    if options.fallback and not options.verify:
        refuse(
            config,
            "checkpoint.fallback",
            "what is not verified is not known to be damaged; set checkpoint.verify = true too",
        )
    # With an initial checkpoint, the exclusion applies to that checkpoint.
    whole = not options.initial_load_model_weights_only if options.initial_load_path else options.enable_checkpoint
    if set(excluded) - {"tokenizer"} and not whole:
        needed = (
            "checkpoint.initial_load_model_weights_only = false"
            if options.initial_load_path
            else "checkpoint.enable_checkpoint"
        )
        no_effect("exclude_from_loading", f"where nothing but weights is loaded; set {needed} too, or leave it out")
    if "tokenizer" in excluded:
        _check_other_tokenizer(config, whole)
    if "lr_scheduler" in excluded and "train_state" not in excluded:
        refuse(
            config,
            "checkpoint.exclude_from_loading",
            "the learning rate is a function of the step, which train_state holds; exclude that too to begin at step "
            "1, or leave lr_scheduler out",
        )


def _check_other_tokenizer(config: JobConfig, whole: bool) -> None:
    key, options = "checkpoint.exclude_from_loading", config.checkpoint
    if not options.initial_load_path or not config.model.tokenizer_path:
        refuse(
            config,
            key,
            'that of "tokenizer" has no effect without checkpoint.initial_load_path and model.tokenizer_path, the '
            "weights and another tokenizer for them; set both, or leave it out",
        )
    if whole and "dataloader" not in options.exclude_from_loading:
        refuse(config, key, "a place in the data counts the tokens of one tokenizer; exclude dataloader too")


def _check_tokenizer(config: JobConfig) -> None:
    path = config.model.tokenizer_path
    if path and not os.path.lexists(os.path.expanduser(path)) and not _has_copy(config):
        refuse(
            config,
            "model.tokenizer_path",
            f"there is no such file or folder (relative to {Path.cwd()}); fetch it with\n"
            "    titanlite tokenizer download --repo_id meta-llama/Llama-3.1-8B --hf_token=...\n"
            "or leave the option empty for the tokenizer that titanlite ships",
        )


def _has_copy(config: JobConfig) -> bool:
    """Return True if the run folder holds a checkpoint with a copy of its tokenizer, which takes the file's place."""
    if not config.checkpoint.enable_checkpoint:
        return False
    root = Path(os.path.expanduser(config.job.dump_folder)) / config.checkpoint.folder
    return any(root.glob("step-*/tokenizer.json"))
