"""The checkpoint that a run starts from: which one, whether it is whole, and its state loaded into this process."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from titanlite.checkpoint.collectives import from_rank_zero, shapes_on_all
from titanlite.checkpoint.folder import (
    DamagedCheckpoint,
    clear_leftovers,
    saved_steps,
    set_damaged_aside,
    step_folder,
    strays_in,
)
from titanlite.checkpoint.metadata import read_metadata
from titanlite.checkpoint.moments import converted, difference
from titanlite.checkpoint.state import (
    Process,
    State,
    disagreements,
    model_state,
    optimizer_state,
    prepare_optimizer,
    random_state,
    set_random_state,
    size_text,
)
from titanlite.checkpoint.storage import Info, load, read_info, verify
from titanlite.config.schema import Checkpoint
from titanlite.errors import ConfigError, counted
from titanlite.models.spec import same_network

logger = logging.getLogger()


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint to start from.

    Attributes:
        from_this_run: True if this run saved it and continues from it; False if it comes from another run.
    """

    folder: Path
    info: Info
    from_this_run: bool


class CheckpointReader:
    """Finds, verifies and loads checkpoints. All processes must make the same calls.

    Args:
        root: the folder of the run's checkpoints.
        group: the processes that read together.
    """

    def __init__(self, options: Checkpoint, root: Path, group: dist.ProcessGroup) -> None:
        self.options, self.root, self.group = options, root, group

    # ---- choosing

    def find(self) -> SavedCheckpoint | None:
        """Return the checkpoint that this run continues from, with its files verified; None if there is none.

        Raises:
            ConfigError: there is no checkpoint of ``load_step``, or it is damaged and there is no fallback.
        """
        if not self.options.enable_checkpoint:
            return None
        step = from_rank_zero(self.group, self._choose)
        while step is not None:
            folder = step_folder(self.root, step)
            try:
                info = self._open(folder)
            except DamagedCheckpoint as e:
                step = self._fall_back(step, e)
            else:
                return SavedCheckpoint(folder, info, from_this_run=True)
        return None

    def initial(self, path: str, folder: Path) -> SavedCheckpoint:
        """Return the checkpoint ``folder``, which ``checkpoint.initial_load_path`` = ``path`` names.

        Raises:
            ConfigError: there is no checkpoint, or it is damaged.
        """
        try:
            return SavedCheckpoint(folder, self._open(folder), from_this_run=False)
        except DamagedCheckpoint as e:
            raise ConfigError(f"{e}, or choose another", key="checkpoint.initial_load_path", value=path) from e

    def _choose(self) -> int | None:
        if self.root.is_symlink() and not self.root.exists():
            raise ConfigError(
                f"{self.root} is a link to {self.root.readlink()}, which is not there; make that folder, or remove the "
                "link",
                key="checkpoint.folder",
                value=self.options.folder,
            )
        leftovers = clear_leftovers(self.root)
        if leftovers:
            logger.info("cleared what was left of saves that did not end: %s", ", ".join(leftovers))
        for path in strays_in(self.root):
            logger.warning("%s has the name of a checkpoint, and not its files: a save of that step renames it", path)
        steps, step = saved_steps(self.root), self.options.load_step
        if step == -1 or _restarted():
            return steps[-1] if steps else None
        if step not in steps:
            hint = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
            raise ConfigError(f"{self.root} has no such checkpoint; {hint}", key="checkpoint.load_step", value=step)
        return step

    def _open(self, folder: Path) -> Info:
        info = from_rank_zero(self.group, lambda: read_info(folder))
        if self.options.verify:
            start = time.perf_counter()
            size = verify(folder, self.group)
            logger.info("%s: %s verified in %.1f s", folder, size_text(size), time.perf_counter() - start)
        return info

    def _fall_back(self, step: int, damage: DamagedCheckpoint) -> int:
        def choose() -> int:
            earlier = [s for s in saved_steps(self.root) if s < step]
            if not self.options.fallback:
                other = "continue from the one before with --checkpoint.fallback"
                raise ConfigError(f"{damage}, or {other if earlier else 'begin anew in another folder'}")
            if not earlier:
                raise ConfigError(f"{damage}: there is none before it to fall back to")
            logger.error("%s; it is now %s", damage.description, set_damaged_aside(damage.folder))
            return earlier[-1]

        return from_rank_zero(self.group, choose)

    # ---- loading

    def load(self, checkpoint: SavedCheckpoint, process: Process, *, weights_only: bool = False) -> None:
        """Load the model and, unless ``weights_only``, the optimizer and the random generators.

        Raises:
            ConfigError: the checkpoint is of another model or optimizer, or has only weights.
        """
        start = time.perf_counter()
        if checkpoint.info.weights_only and not weights_only:
            raise ConfigError(
                f"{checkpoint.folder} has weights only (checkpoint.last_save_model_weights_only), which a run cannot "
                "continue from; take an earlier one with --checkpoint.load_step, or begin another run from it with "
                f"--checkpoint.initial_load_path={checkpoint.folder}"
            )
        saved_tensors = from_rank_zero(self.group, lambda: read_metadata(checkpoint.folder))
        shapes = {name: tensor.shape for name, tensor in saved_tensors.items()}
        state = self._matching(checkpoint, process, shapes)
        after: list[Callable[[], None]] = []
        if not weights_only:
            if "optimizer" not in self.excluded(checkpoint) and checkpoint.info.step > 0:
                saved = {name for name in shapes if name.startswith("optimizer.")}
                prepare_optimizer(process.optimizer, process.parts, saved)
                of_run = optimizer_state(process.optimizer, process.parts)
                local, after = converted(of_run, saved_tensors)
                if change := difference(of_run, saved_tensors):
                    logger.info("%s: the moments are converted from %s", checkpoint.folder, change)
                self._check_optimizer(checkpoint, local, {name: shapes[name] for name in saved})
                state |= local
            state |= self._random(checkpoint, process, shapes)
        load(checkpoint.folder, state, self.group, saved_tensors)
        for convert in after:
            convert()
        if not weights_only:
            try:
                set_random_state(state, process.rank, process.device)
            except (ValueError, TypeError, RuntimeError, OverflowError) as e:
                raise DamagedCheckpoint(checkpoint.folder, [f"the state of a random generator is none ({e})"]) from e
        content = "its weights" if weights_only else f"step {checkpoint.info.step}"
        logger.info("%s: %s loaded in %.1f s", checkpoint.folder, content, time.perf_counter() - start)

    def excluded(self, checkpoint: SavedCheckpoint) -> list[str]:
        """Return the parts of ``checkpoint`` not to load. A checkpoint of this run is loaded completely after a restart
        or if ``initial_load_path`` is set: ``exclude_from_loading`` then applies to the initial checkpoint only."""
        complete = checkpoint.from_this_run and (self.options.initial_load_path or _restarted())
        return [] if complete else list(self.options.exclude_from_loading)

    def _matching(self, checkpoint: SavedCheckpoint, process: Process, shapes: dict[str, torch.Size]) -> State:
        """Return the tensors of the model to load; raise ConfigError if the checkpoint is of another model."""
        state, info = model_state(process.parts), checkpoint.info
        model = shapes_on_all(self.group, state)
        saved = {name: shape for name, shape in shapes.items() if name.startswith("model.")}
        # Buffers, such as the scales of delayed scaling, may be in one of the two alone.
        new = {name for name in process.buffers_on_all(self.group) if name not in saved}
        gone = {name for name in info.buffers if name in saved and name not in model}
        lines = [f"{key} was {before}, is {now}" for key, before, now in _changes(info.model, process.model)]
        lines += disagreements(
            {name: shape for name, shape in saved.items() if name not in gone},
            {name: shape for name, shape in model.items() if name not in new},
        )
        if lines:
            raise ConfigError(
                f"{checkpoint.folder} is a checkpoint of another model:\n    " + "\n    ".join(lines) + "\n"
                "restore [model] as it was, or choose another job.dump_folder"
            )
        for changed, outcome in ((new, "not in the checkpoint"), (gone, "of the checkpoint left out")):
            if changed:
                logger.warning("%s %s, such as %s", counted(len(changed), "buffer"), outcome, min(changed))
        return {name: tensor for name, tensor in state.items() if name not in new}

    def _check_optimizer(self, checkpoint: SavedCheckpoint, local: State, saved: dict[str, torch.Size]) -> None:
        if lines := disagreements(saved, shapes_on_all(self.group, local)):
            raise ConfigError(
                f"{checkpoint.folder} was saved by another optimizer: {'; '.join(lines)}; restore optimizer.name and "
                "optimizer.moments, or begin its state anew with --checkpoint.exclude_from_loading=optimizer"
            )

    def _random(self, checkpoint: SavedCheckpoint, process: Process, shapes: dict[str, torch.Size]) -> State:
        world = dist.get_world_size()
        if checkpoint.info.world_size != world:
            logger.info(
                "the random generators begin from the seed: the number of processes was %d, and is %d",
                checkpoint.info.world_size,
                world,
            )
            return {}
        state = random_state(process.rank, process.device)
        for name in state.keys() - shapes.keys():  # such as that of a GPU, if the saved run had none
            logger.warning("%s begins from the seed: the checkpoint is of a run without it", name)
        return {name: tensor for name, tensor in state.items() if name in shapes}


def _restarted() -> bool:
    """Return True if torchrun has restarted this process after a failure. Then the run continues from its latest
    checkpoint, whatever ``load_step`` says."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def _changes(saved: dict[str, Any], current: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (key, saved, current) for each model setting that differs, except max_seq_len: no weight depends on it.
    Return nothing if only names differ: that of the flavor, and that of the family if both build the same network."""
    old, new = ({"name": m["name"], "flavor": m["flavor"], **m["args"]} for m in (saved, current))
    for settings in (old, new):
        settings.pop("max_seq_len", None)
    # An earlier version did not save the options that it did not have, which are None or False where they are not used.
    keys = [key for key in {**old, **new} if (old.get(key) or None) != (new.get(key) or None)]
    names = {"flavor", "name"} if same_network(old["name"], new["name"]) else {"flavor"}
    return [(key, old.get(key), new.get(key)) for key in keys] if {*keys} - names else []
