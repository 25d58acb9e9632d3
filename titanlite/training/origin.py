"""The start of a run: its own last checkpoint, another checkpoint, published weights, or new weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titanlite.checkpoint import CheckpointManager, HuggingFaceFolder, Process, SavedCheckpoint, is_hugging_face
from titanlite.config import JobConfig
from titanlite.errors import ConfigError, NothingToDo
from titanlite.models.spec import ModelSpec


@dataclass(frozen=True)
class Start:
    """The state that a run begins with; :func:`find_start` finds it.

    Attributes:
        checkpoint: the checkpoint to load.
        pretrained: or the Hugging Face folder to load.
        whole: load more of the checkpoint than its weights.
        excluded: the parts of the checkpoint that are not loaded.
    """

    checkpoint: SavedCheckpoint | None = None
    pretrained: HuggingFaceFolder | None = None
    whole: bool = False
    excluded: tuple[str, ...] = ()

    @property
    def keeps_step(self) -> bool:
        """True if the run continues after the step of the checkpoint; False if it begins at step 1."""
        return self.whole and "train_state" not in self.excluded

    @property
    def continues(self) -> bool:
        """True if this continues the earlier run of the run folder."""
        return self.checkpoint is not None and self.checkpoint.from_this_run and self.keeps_step

    @property
    def seed(self) -> int | None:
        """The seed in the checkpoint; None if the checkpoint is not loaded as a whole."""
        return self.checkpoint.info.seed if self.checkpoint is not None and self.whole else None

    def load(self, checkpoints: CheckpointManager, process: Process, spec: ModelSpec, args: Any) -> str:
        """Load the weights, and other state if there is any, into ``process``. Return the source, for the
        header; an empty string if there is nothing to load. ``args`` are the model's configured arguments.

        Raises:
            ConfigError: the source belongs to another model, or is damaged.
        """
        if self.checkpoint is not None:
            checkpoints.load(self.checkpoint, process, weights_only=not self.whole)
            return f"{self.checkpoint.folder}" + ("" if self.whole else ", its weights alone")
        if self.pretrained is not None and spec.hugging_face is not None:
            family, folder = spec.hugging_face, self.pretrained
            family.check(args, folder.config)
            folder.load_into(process.parameters(), family.weights(args), family.ignored, family.copies(args))
            return f"{folder.folder}, Hugging Face weights"
        return ""


def find_start(config: JobConfig, spec: ModelSpec, checkpoints: CheckpointManager) -> Start:
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
        if is_hugging_face(Path(path).expanduser()):
            return Start(pretrained=_open_pretrained(path, options.initial_load_model_weights_only, spec))
        checkpoint = checkpoints.initial(path)
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
            f"{config.job.dump_folder} has a run of {checkpoint.info.step} steps, and training.steps = {steps}: "
            "nothing to do. Ask for more with --training.steps, or begin another with --job.dump_folder"
        )
    raise ConfigError(
        f"{checkpoint.folder} is at step {checkpoint.info.step} already; ask for more, or begin at "
        "step 1 with --checkpoint.exclude_from_loading=train_state",
        key="training.steps",
        value=steps,
    )


def _open_pretrained(path: str, weights_only: bool, spec: ModelSpec) -> HuggingFaceFolder:
    if not weights_only:
        raise ConfigError(
            "has weights alone, and checkpoint.initial_load_model_weights_only = false asks for more; leave that out",
            key="checkpoint.initial_load_path",
            value=path,
        )
    if spec.hugging_face is None:
        raise ConfigError(
            f'model.name = "{spec.name}" has no form in transformers; take a checkpoint of titanlite',
            key="checkpoint.initial_load_path",
            value=path,
        )
    return HuggingFaceFolder(Path(path).expanduser())
