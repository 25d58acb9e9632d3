"""Checks of the section [validation]."""

from __future__ import annotations

from titanlite.config.data_sections import Validation
from titanlite.config.number_formats import NUMBER_FORMATS, formats_of, gathers_quantized
from titanlite.config.refuse import refuse
from titanlite.config.schema import JobConfig


def holds_out(config: JobConfig) -> bool:
    """Return True if documents of the training data are held out for validation."""
    training, validation = config.training, config.validation
    named = (validation.dataset or training.dataset, validation.dataset_path or None)
    without_path = not validation.dataset and not validation.dataset_path
    return validation.enable and (without_path or named == (training.dataset, training.dataset_path or None))


def check_validation(config: JobConfig) -> None:
    """Refuse options of [validation] that would have no effect, or cannot be honoured."""
    validation, default = config.validation, Validation()

    if not validation.enable:
        if "validation.enable" in config.origins:  # turned off, with all of its section: by an argument, or in the file
            return
        for key in ("held_out_percent", "precision", "tasks", "task_data", "max_examples", "dataset", "dataset_path"):
            if getattr(validation, key) != getattr(default, key):
                refuse(
                    config,
                    f"validation.{key}",
                    "has no effect unless validation.enable = true; set that, or leave this out",
                )
        return
    if validation.steps == -1:
        refuse(config, "validation.steps", "validation on all of the data is not there; set the number of batches")
    if validation.held_out_percent != default.held_out_percent and not holds_out(config):
        refuse(
            config,
            "validation.held_out_percent",
            "has no effect, as validation.dataset names data of their own and nothing is held out from training; leave "
            "one of them out",
        )
    _check_task(config)
    if validation.precision == "bfloat16":
        if not formats_of(config):
            names = ", ".join(number_format.name for number_format in NUMBER_FORMATS)
            refuse(
                config,
                "validation.precision",
                f"has no effect without a converter that computes in a number format ({names}); leave it out",
            )
        if config.training.mixed_precision_param != "bfloat16":
            refuse(
                config,
                "validation.precision",
                "other layers compute in the dtype of the parameters, and training.mixed_precision_param = "
                f'"{config.training.mixed_precision_param}"; set that to bfloat16, or leave this out',
            )
        if gathers_quantized(config):
            refuse(
                config,
                "validation.precision",
                "the weights are gathered in their number format (for float8: float8.enable_fsdp_float8_all_gather = "
                "true) and are not there in bfloat16; use one or the other",
            )


def _check_task(config: JobConfig) -> None:
    validation = config.validation
    for key in ("task_data", "max_examples"):
        if getattr(validation, key) is not None and not validation.tasks:
            refuse(config, f"validation.{key}", "has no effect without validation.tasks; leave it out")
    for dimension in ("tensor", "context", "pipeline"):
        if validation.tasks and getattr(config.parallelism, f"{dimension}_parallel_degree") > 1:
            refuse(
                config,
                "validation.tasks",
                f"a task is not computed under {dimension} parallelism; leave it out, and give the checkpoints to "
                "titanlite evaluate",
            )
