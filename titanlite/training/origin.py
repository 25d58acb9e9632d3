"""The start of a run: its own last checkpoint, another checkpoint, published weights, or new weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from titanlite.checkpoint import (
    CheckpointReader,
    ChosenTokenizer,
    DamagedCheckpoint,
    HuggingFaceFolder,
    Info,
    Process,
    SavedCheckpoint,
    TorchtitanFolder,
    Weights,
    choose_tokenizer,
    is_hugging_face,
    is_torchtitan,
)
from titanlite.checkpoint.collectives import from_rank_zero
from titanlite.checkpoint.diagnosis import why_no_weights
from titanlite.checkpoint.folder import INFO, SUMS, latest_checkpoint
from titanlite.config import JobConfig
from titanlite.data import DataLoader
from titanlite.errors import ConfigError, NothingToDo, counted
from titanlite.models.spec import ModelSpec
from titanlite.models.weight_map import buffers_of
from titanlite.training.step_guard import StepGuard

logger = logging.getLogger()


@dataclass(frozen=True)
class Start:
    """The state that a run begins with; :func:`find_start` finds it.

    Attributes:
        checkpoint: the checkpoint to load.
        pretrained: or the folder of Hugging Face or torchtitan to load.
        whole: load more of the checkpoint than its weights.
        excluded: the parts of the checkpoint that are not loaded.
    """

    checkpoint: SavedCheckpoint | None = None
    pretrained: HuggingFaceFolder | TorchtitanFolder | None = None
    whole: bool = False
    excluded: tuple[str, ...] = ()

    @property
    def keeps_step(self) -> bool:
        """True if the run continues after the step of the checkpoint; False if it begins at step 1."""
        return self.whole and "train_state" not in self.excluded

    @property
    def continues(self) -> bool:
        """True if this continues the earlier run of the run folder."""
        return self.from_this_run and self.keeps_step

    @property
    def from_this_run(self) -> bool:
        """True if the checkpoint lies in the run folder."""
        return self.checkpoint is not None and self.checkpoint.from_this_run

    @property
    def step(self) -> int:
        """The number of steps that are made already."""
        return self.checkpoint.info.step if self.checkpoint is not None and self.keeps_step else 0

    @property
    def seed(self) -> int | None:
        """The seed in the checkpoint; None if the checkpoint is not loaded as a whole."""
        return self.checkpoint.info.seed if self.checkpoint is not None and self.whole else None

    def choose_tokenizer(self, config: JobConfig) -> ChosenTokenizer:
        """Return the tokenizer of the run: the configured one, else that of the weights, else the shipped one.

        Raises:
            ConfigError: see :func:`titanlite.checkpoint.tokenizer.choose_tokenizer`.
        """
        weights, resume = None, False
        if self.checkpoint is not None:
            weights, resume = Weights(self.checkpoint.folder, self.checkpoint.info), self.checkpoint.from_this_run
        elif self.pretrained is not None:
            weights = Weights(self.pretrained.folder)
        replace = "tokenizer" in config.checkpoint.exclude_from_loading and not resume
        return choose_tokenizer(config.model.tokenizer_path, weights, replace=replace, resume=resume)

    def restore(self, loader: DataLoader, step_guard: StepGuard) -> Info | None:
        """Set the place in the data, and what the guard knows of earlier steps, as far as they are loaded. Return the
        rest of the checkpoint if the run goes on after its step, else None.

        Raises:
            DamagedCheckpoint: they are of another form.
        """
        if self.checkpoint is None or not self.whole:
            return None
        folder, info = self.checkpoint.folder, self.checkpoint.info
        try:
            if "dataloader" not in self.excluded:
                loader.load_state_dict(info.data)
            if self.keeps_step:
                step_guard.load_state_dict(info.step_guard)
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError, OverflowError) as e:
            why = f"data or step_guard in checkpoint.json is of another form ({e!r})"
            raise DamagedCheckpoint(folder, [why]) from e
        if not self.keeps_step:
            return None
        logger.info("resuming from step %d: %s", info.step, folder)
        return info

    def load(self, checkpoints: CheckpointReader, process: Process, spec: ModelSpec, args: Any) -> str:
        """Load the weights, and other state if there is any, into ``process``. Return the source, for the
        header; an empty string if there is nothing to load. ``args`` are the model's configured arguments.

        Raises:
            ConfigError: the source belongs to another model, or is damaged.
        """
        if self.checkpoint is not None:
            checkpoints.load(self.checkpoint, process, weights_only=not self.whole)
            return f"{self.checkpoint.folder}" + ("" if self.whole else ", its weights alone")
        folder = self.pretrained
        if isinstance(folder, TorchtitanFolder) and spec.torchtitan is not None:
            folder.load_into(process.parameters(), spec.torchtitan(args), checkpoints.group)
            return f"{folder.folder}, torchtitan's weights, without checksums"
        if isinstance(folder, HuggingFaceFolder) and spec.hugging_face is not None:
            family = spec.hugging_face
            family.check(args, folder.config)
            weights, state = family.weights(args), process.parameters()
            for part in process.parts:
                state |= buffers_of(part, weights)
            folder.load_into(state, weights, family.ignored, family.copies(args))
            return f"{folder.folder}, Hugging Face weights"
        return ""


def find_start(config: JobConfig, spec: ModelSpec, checkpoints: CheckpointReader) -> Start:
    """Find the start of the run. All processes must call this.

    Raises:
        NothingToDo: the run has already made all its steps.
        ConfigError: the requested start does not exist, is damaged, or does not fit the configuration.
    """
    options, checkpoint = config.checkpoint, checkpoints.find()
    if checkpoint is not None and options.create_seed_checkpoint:
        raise ConfigError(
            f"{checkpoints.root} has checkpoints already; choose another folder with --job.dump_folder",
            key="checkpoint.create_seed_checkpoint",
            value=True,
        )
    path = options.initial_load_path
    if checkpoint is None and path:
        folder = latest_checkpoint(path)
        if is_hugging_face(folder) or is_torchtitan(folder):
            weights_only = options.initial_load_model_weights_only
            return Start(pretrained=_open_pretrained(path, folder, weights_only, spec, checkpoints.group))
        if not any((folder / name).exists() for name in (INFO, SUMS)):
            raise ConfigError(
                f"there are no weights: {why_no_weights(folder)}", key="checkpoint.initial_load_path", value=path
            )
        checkpoint = checkpoints.initial(path, folder)
    if checkpoint is None:
        return Start()
    whole = checkpoint.from_this_run or not options.initial_load_model_weights_only
    start = Start(checkpoint, whole=whole, excluded=tuple(checkpoints.excluded(checkpoint)))
    if start.keeps_step:
        _refuse_no_steps(checkpoint, config)
    return start


def _refuse_no_steps(checkpoint: SavedCheckpoint, config: JobConfig) -> None:
    steps = config.training.steps
    if checkpoint.info.step < steps:
        return
    if checkpoint.from_this_run:
        raise NothingToDo(
            f"{config.job.dump_folder} has a run of {counted(checkpoint.info.step, 'step')}, and training.steps = "
            f"{steps}: nothing to do. Ask for more with --training.steps, or begin another with --job.dump_folder"
        )
    raise ConfigError(
        f"{checkpoint.folder} is at step {checkpoint.info.step} already; ask for more, or begin at "
        "step 1 with --checkpoint.exclude_from_loading=train_state",
        key="training.steps",
        value=steps,
    )


def _open_pretrained(
    path: str, folder: Path, weights_only: bool, spec: ModelSpec, group: ProcessGroup
) -> HuggingFaceFolder | TorchtitanFolder:
    torchtitan = is_torchtitan(folder)
    why = ""
    if not weights_only:
        why = "has weights alone, and checkpoint.initial_load_model_weights_only = false asks for more; leave that out"
    elif (spec.torchtitan if torchtitan else spec.hugging_face) is None:
        other = "torchtitan" if torchtitan else "transformers"
        why = f'model.name = "{spec.name}" has no form in {other}; take a checkpoint of titanlite'
    if why:
        raise ConfigError(why, key="checkpoint.initial_load_path", value=path)
    if torchtitan:
        return from_rank_zero(group, lambda: TorchtitanFolder(folder))
    return HuggingFaceFolder(folder)
