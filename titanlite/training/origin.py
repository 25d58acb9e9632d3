"""Where a run begins: after its own last checkpoint, with one from elsewhere, with published weights, or anew."""

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
    """What a run begins with; :func:`find_start` finds it.

    Attributes:
        found: a checkpoint.
        pretrained: or a Hugging Face folder.
        whole: more than the weights of the checkpoint.
        excluded: the parts of it that are left out.
    """

    found: SavedCheckpoint | None = None
    pretrained: HuggingFaceFolder | None = None
    whole: bool = False
    excluded: tuple[str, ...] = ()

    @property
    def keeps_step(self) -> bool:
        """The run goes on after the step of the checkpoint; else it begins at step 1 with what that has."""
        return self.whole and "train_state" not in self.excluded

    @property
    def continues(self) -> bool:
        """It is the run that was in this run folder before."""
        return self.found is not None and self.found.from_this_run and self.keeps_step

    @property
    def seed(self) -> int | None:
        """Of the run that goes on."""
        return self.found.info.seed if self.found is not None and self.whole else None

    def load(self, checkpoints: CheckpointManager, process: Process, spec: ModelSpec, args: Any) -> str:
        """Fill the model, and what else there is, of the configured ``args``; returns where it came from, for the
        header; empty if there is nothing, and the seed alone decides.

        Raises:
            ConfigError: it is of another model, or damaged.
        """
        if self.found is not None:
            checkpoints.load(self.found, process, weights_only=not self.whole)
            return f"{self.found.folder}" + ("" if self.whole else ", its weights alone")
        if self.pretrained is not None and spec.hugging_face is not None:
            family, folder = spec.hugging_face, self.pretrained
            family.check(args, folder.config)
            folder.load_into(process.parameters(), family.names(args), family.ignored)
            return f"{folder.folder}, Hugging Face weights"
        return ""


def find_start(config: JobConfig, spec: ModelSpec, checkpoints: CheckpointManager) -> Start:
    """Decide, with all processes.

    Raises:
        NothingToDo: the run has made its steps.
        ConfigError: what was asked for is not there, is damaged, or does not fit.
    """
    options, found = config.checkpoint, checkpoints.find()
    if found is not None and options.create_seed_checkpoint:
        raise ConfigError(
            f"{checkpoints.root} has checkpoints already; choose another folder with --job.dump_folder",
            key="checkpoint.create_seed_checkpoint",
            value=True,
        )
    path = options.initial_load_path
    if found is None and path:
        if is_hugging_face(Path(path).expanduser()):
            return Start(pretrained=_open_pretrained(path, options.initial_load_model_weights_only, spec))
        found = checkpoints.initial(path)
    if found is None:
        return Start()
    whole = found.from_this_run or not options.initial_load_model_weights_only
    start = Start(found, whole=whole, excluded=tuple(checkpoints.excluded(found)))
    if start.keeps_step:
        _refuse_no_steps(found, config)
    return start


def _refuse_no_steps(found: SavedCheckpoint, config: JobConfig) -> None:
    steps = config.training.steps
    if found.info.step < steps:
        return
    if found.from_this_run:
        raise NothingToDo(
            f"{config.job.dump_folder} has a run of {found.info.step} steps, and training.steps = {steps}: nothing to "
            "do. Ask for more with --training.steps, or begin another with --job.dump_folder"
        )
    raise ConfigError(
        f"{found.folder} is at step {found.info.step} already; ask for more, or begin at "
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
