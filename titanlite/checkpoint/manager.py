"""When checkpoints are saved, which one a run continues from, and which are kept."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from titanlite.checkpoint.background import BackgroundSaver
from titanlite.checkpoint.folder import (
    DamagedCheckpoint,
    clear_leftovers,
    delete,
    saved_steps,
    set_damaged_aside,
    step_folder,
)
from titanlite.checkpoint.state import (
    State,
    buffer_names,
    differences,
    local_bytes,
    model_state,
    optimizer_state,
    prepare_optimizer,
    random_state,
    set_random_state,
)
from titanlite.checkpoint.storage import (
    Info,
    SaveError,
    from_rank_zero,
    load,
    on_all,
    read_info,
    save,
    saved_shapes,
    verify,
)
from titanlite.config.schema import Checkpoint
from titanlite.errors import ConfigError, TrainingError

logger = logging.getLogger()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Found:
    """A checkpoint to begin from.

    Attributes:
        own: of this run, which continues; not one that another run left elsewhere.
    """

    folder: Path
    info: Info
    own: bool


@dataclass(frozen=True)
class Process:
    """What a process has that is saved.

    Attributes:
        model: name, flavor and args of the model, which a checkpoint must share.
    """

    rank: int
    device: torch.device
    parts: list[nn.Module]
    optimizer: torch.optim.Optimizer
    model: dict[str, Any]

    def parameters(self) -> State:
        """By their names, in place, as they belong in a state dict."""
        buffers, state = buffer_names(self.parts), model_state(self.parts)
        return {name.removeprefix("model."): tensor for name, tensor in state.items() if name not in buffers}


class CheckpointManager:
    """The checkpoints of one run. All processes make the same calls.

    Args:
        root: the folder of the checkpoints.
        timeout: seconds that a process waits for the slowest one to write or to read.
    """

    def __init__(self, options: Checkpoint, root: Path, device: torch.device, timeout: int) -> None:
        self.options, self.root = options, root
        # A group of its own: saves in the background communicate beside training.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._background = None
        if options.async_mode != "disabled":
            self._background = BackgroundSaver(device, pin=options.async_mode == "async_with_pinned_mem")
        self.last_saved: int | None = None
        self._deleting: threading.Thread | None = None

    # ---- which one to begin from

    def find(self) -> Found | None:
        """The checkpoint that this run continues from, with its files verified; None if it has none.

        Raises:
            ConfigError: ``load_step`` is not there, or the checkpoint is damaged and ``fallback`` is not set.
        """
        if not self.options.enable_checkpoint:
            return None
        step = from_rank_zero(self.group, self._choose)
        while step is not None:
            folder = step_folder(self.root, step)
            try:
                info = self._open(folder)
            except DamagedCheckpoint as e:
                step = self._one_before(step, e)
            else:
                return Found(folder, info, own=True)
        return None

    def initial(self, path: str) -> Found:
        """The checkpoint at ``path``: its own folder, or one that holds several, of which the latest is taken.

        Raises:
            ConfigError: there is none, or it is damaged.
        """
        folder = Path(path).expanduser()
        steps = saved_steps(folder)
        if steps:
            folder = step_folder(folder, steps[-1])
        try:
            return Found(folder, self._open(folder), own=False)
        except DamagedCheckpoint as e:
            raise ConfigError(f"{e}, or choose another", key="checkpoint.initial_load_path", value=path) from e

    def _choose(self) -> int | None:
        left = clear_leftovers(self.root)
        if left:
            logger.info("cleared what was left of saves that did not end: %s", ", ".join(left))
        steps, wanted = saved_steps(self.root), self.options.load_step
        if wanted == -1 or _restarted():
            return steps[-1] if steps else None
        if wanted not in steps:
            there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
            raise ConfigError(f"{self.root} has no such checkpoint; {there}", key="checkpoint.load_step", value=wanted)
        return wanted

    def _open(self, folder: Path) -> Info:
        info = from_rank_zero(self.group, lambda: read_info(folder))
        if self.options.verify:
            start = time.perf_counter()
            size = verify(folder, self.group)
            logger.info("%s: %s verified in %.1f s", folder, _size(size), time.perf_counter() - start)
        return info

    def _one_before(self, step: int, damage: DamagedCheckpoint) -> int:
        def choose() -> int:
            before = [s for s in saved_steps(self.root) if s < step]
            if not self.options.fallback:
                way = (
                    "continue from the one before with --checkpoint.fallback"
                    if before
                    else "begin anew in another folder"
                )
                raise ConfigError(f"{damage}, or {way}")
            if not before:
                raise ConfigError(f"{damage}: there is none before it to fall back to")
            logger.error("%s; it is now %s", damage.what, set_damaged_aside(damage.folder))
            return before[-1]

        return from_rank_zero(self.group, choose)

    # ---- loading

    def load(self, found: Found, process: Process, *, weights_only: bool = False) -> None:
        """Fill the model, and unless ``weights_only`` the optimizer and the random generators too.

        Raises:
            ConfigError: the checkpoint is of another model, or has only weights.
        """
        start = time.perf_counter()
        if found.info.weights_only and not weights_only:
            raise ConfigError(
                f"{found.folder} has weights only (checkpoint.last_save_model_weights_only), which a run cannot "
                "continue from; take an earlier one with --checkpoint.load_step, or begin another run from it with "
                f"--checkpoint.initial_load_path={found.folder}"
            )
        shapes = from_rank_zero(self.group, lambda: saved_shapes(found.folder))
        state = self._matching(found, process, shapes)
        if not weights_only:
            if "optimizer" not in self.excluded(found) and found.info.step > 0:
                saved = {name for name in shapes if name.startswith("optimizer.")}
                prepare_optimizer(process.optimizer, process.parts, saved)
                own = optimizer_state(process.optimizer, process.parts)
                self._refuse_another_optimizer(found, own, {name: shapes[name] for name in saved})
                state |= own
            state |= self._random(found, process, shapes)
        load(found.folder, state, self.group)
        if not weights_only:
            set_random_state(state, process.rank, process.device)
        what = "its weights" if weights_only else f"step {found.info.step}"
        logger.info("%s: %s loaded in %.1f s", found.folder, what, time.perf_counter() - start)

    def excluded(self, found: Found) -> list[str]:
        """The parts of ``found`` not to load: where there is an initial checkpoint it is those of that one, and what
        the run saved itself is continued whole; so is a run that was started again after a failure."""
        whole = found.own and (self.options.initial_load_path or _restarted())
        return [] if whole else list(self.options.exclude_from_loading)

    def _matching(self, found: Found, process: Process, shapes: dict[str, torch.Size]) -> State:
        """The tensors of the model to fill, on the condition that they are those of the checkpoint."""
        state, info = model_state(process.parts), found.info
        missing, others = differences(shapes, state)
        gathered: list[Any] = [None] * dist.get_world_size()
        buffers = buffer_names(process.parts)
        dist.all_gather_object(gathered, (set(state), buffers, missing, others), group=self.group)
        names, buffers, lacking = (set().union(*(part[i] for part in gathered)) for i in range(3))
        saved = {name for name in shapes if name.startswith("model.")}
        lines = [
            *(f"{key} was {old}, is {new}" for key, old, new in _changes(info.model, process.model)),
            *sorted({line for part in gathered for line in part[3]}),
            *(f"{name} is not in the checkpoint" for name in sorted(lacking - buffers)),
            *(f"{name} is not in the model" for name in sorted(saved - names - set(info.buffers))),
        ]
        if lines:
            shown = [*lines[:12], *([f"and {len(lines) - 12} more"] if len(lines) > 12 else [])]
            raise ConfigError(
                f"{found.folder} is a checkpoint of another model:\n    " + "\n    ".join(shown) + "\n"
                "restore [model] as it was, or choose another job.dump_folder"
            )
        for names_of, what in ((lacking & buffers, "begin anew"), (saved - names, "are left out")):
            if names_of:
                logger.warning("%d buffers %s, such as %s", len(names_of), what, min(names_of))
        return {name: tensor for name, tensor in state.items() if name not in lacking}

    def _refuse_another_optimizer(self, found: Found, own: State, saved: dict[str, torch.Size]) -> None:
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (set(own), *differences(saved, own)), group=self.group)
        names = set().union(*(part[0] for part in gathered))
        lines = sorted({line for part in gathered for line in (*part[1], *part[2])} | (saved.keys() - names))
        if lines:
            raise ConfigError(
                f"{found.folder} was saved by another optimizer: {len(lines)} of its tensors differ, such as "
                f"{lines[0]}; restore optimizer.name, or begin its state anew with "
                "--checkpoint.exclude_from_loading=optimizer"
            )

    def _random(self, found: Found, process: Process, shapes: dict[str, torch.Size]) -> State:
        world = dist.get_world_size()
        if found.info.world_size != world:
            logger.info(
                "the random generators begin from the seed: they were those of %d processes, now there are %d",
                found.info.world_size,
                world,
            )
            return {}
        state = random_state(process.rank, process.device)
        for name in state.keys() - shapes.keys():  # a GPU's, where there was none
            logger.warning("%s begins from the seed: the checkpoint is of a run without it", name)
        return {name: tensor for name, tensor in state.items() if name in shapes}

    # ---- saving

    def is_due(self, step: int) -> bool:
        options = self.options
        return options.enable_checkpoint and (
            step % options.interval == 0 or (step == 1 and options.enable_first_step_checkpoint)
        )

    def save(self, info: Info, process: Process, *, last: bool = False, ends: bool = False) -> None:
        """Save, in the background if so configured.

        Args:
            last: of the whole run, which may have weights only.
            ends: the process ends after it: it waits, and a failure is an error.

        Raises:
            TrainingError: it failed, or the save before in the background did, and that ends the run.
        """
        self.wait()
        if not self.options.enable_checkpoint or info.step == self.last_saved:
            return
        state = model_state(process.parts)
        info.weights_only = last and self.options.last_save_model_weights_only
        info.world_size, info.model = dist.get_world_size(), process.model
        info.buffers = self._all_buffers(process)
        if info.weights_only:
            dtype = DTYPES[self.options.export_dtype]
            state = {name: t.to(dtype) if name not in info.buffers else t for name, t in state.items()}
        else:
            state |= optimizer_state(process.optimizer, process.parts) | random_state(process.rank, process.device)
        if self._background is not None and not ends:
            self._background.start(info.step, state, lambda copies, failure: self._write_copies(copies, failure, info))
            return
        try:
            self._write(state, info)
        except SaveError as e:
            if ends or self.options.on_save_failure == "stop":
                raise self._fatal(e, info.step) from None
            self._log_failed(e, info.step)

    def _write_copies(self, copies: State, failure: Exception | None, info: Info) -> None:
        """In the thread: what fails is in the log now, not at the next save."""

        def refuse() -> None:
            if failure is not None:
                raise failure

        try:
            on_all(self.group, refuse)
            self._write(copies, info)
        except Exception as e:
            self._log_failed(e, info.step)
            raise

    def _all_buffers(self, process: Process) -> list[str]:
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, buffer_names(process.parts), group=self.group)
        return sorted(set().union(*gathered))

    def _write(self, state: State, info: Info) -> None:
        start = time.perf_counter()
        folder = save(self.root, state, info, self.group)
        self.last_saved = info.step
        logger.info(
            "step %d: checkpoint %s saved in %.2f s (%s of this process)",
            info.step,
            folder,
            time.perf_counter() - start,
            _size(local_bytes(state)),
        )
        if dist.get_rank() == 0 and self.options.keep_latest_k:
            self._delete_old(self.options.keep_latest_k)

    def _delete_old(self, kept: int) -> None:
        """In a thread: it may take minutes, in which the other processes would wait for this one."""
        if self._deleting is not None:
            self._deleting.join()
        steps = saved_steps(self.root)[:-kept]

        def remove() -> None:
            for step in steps:
                try:
                    shutil.rmtree(delete(step_folder(self.root, step)))
                except OSError as e:
                    logger.warning("checkpoint.keep_latest_k: step-%d cannot be deleted: %s", step, e)

        self._deleting = threading.Thread(target=remove, name="delete")
        self._deleting.start()

    def _failed(self, error: Exception, step: int) -> str:
        steps = saved_steps(self.root) if self.root.is_dir() else []
        kept = f"the latest is {step_folder(self.root, steps[-1])}" if steps else "there is no checkpoint"
        return f"step {step}: THE CHECKPOINT COULD NOT BE SAVED ({error}); {kept}"

    def _fatal(self, error: SaveError, step: int) -> TrainingError:
        return TrainingError(f"{self._failed(error, step)}. Make room in {self.root.parent} and start the run again")

    def _log_failed(self, error: Exception, step: int) -> None:
        if isinstance(error, SaveError) and self.options.on_save_failure == "continue":
            if dist.get_rank() == 0:  # it is the same on all
                logger.error(
                    "%s. Training goes on; checkpoint.on_save_failure=stop would end it", self._failed(error, step)
                )
        else:
            logger.error("%s", self._failed(error, step))

    def before_update(self) -> None:
        """To be called before the optimizer changes what may still be being copied."""
        if self._background is not None:
            self._background.wait_for_copy()

    def wait(self) -> None:
        """Return when nothing is being saved any more."""
        if self._background is None:
            return
        try:
            waited = self._background.wait()
        except SaveError as e:
            if self.options.on_save_failure == "stop":
                raise self._fatal(e, self._background.step) from None
        except Exception as e:  # not agreed on by the processes: they cannot go on together
            raise TrainingError(self._failed(e, self._background.step)) from e
        else:
            if waited > 1:
                logger.warning("waited %.1f s for the checkpoint before; raise checkpoint.interval", waited)

    def close(self) -> None:
        if self._background is not None:
            self._background.close()
        if self._deleting is not None:
            self._deleting.join()


def _restarted() -> bool:
    """Whether torchrun has started this process anew after a failure: then the run goes on from where it was, not from
    where it was told to begin."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def _changes(saved: dict[str, Any], own: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The keys of [model] that differ, the shape's beside the name; seq_len is no property of the weights."""
    old, new = ({"name": m["name"], "flavor": m["flavor"], **m["args"]} for m in (saved, own))
    for shape in (old, new):
        shape.pop("max_seq_len", None)
    changed = [(key, old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)]
    return changed if any(key != "flavor" for key, _, _ in changed) else []


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
