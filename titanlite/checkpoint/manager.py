"""The checkpoints of a run: when to save, how a failed save ends, and which ones to keep."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from titanlite.checkpoint.background import BackgroundSaver
from titanlite.checkpoint.collectives import SaveError, on_all
from titanlite.checkpoint.folder import delete, saved_steps, step_folder
from titanlite.checkpoint.hashing_file import HashingFile
from titanlite.checkpoint.plan_cache import PlanCache
from titanlite.checkpoint.quantized import as_plain
from titanlite.checkpoint.reader import CheckpointReader
from titanlite.checkpoint.state import (
    Process,
    State,
    local_bytes,
    model_state,
    optimizer_state,
    random_state,
    size_text,
)
from titanlite.checkpoint.storage import Info, save
from titanlite.checkpoint.tensor_writer import NewFile
from titanlite.config.schema import Checkpoint
from titanlite.errors import TrainingError
from titanlite.quant.stored import stored_weight

logger = logging.getLogger()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CheckpointManager:
    """Saves and deletes the checkpoints of one run. All processes must make the same calls.

    Args:
        root: the folder of the checkpoints.
        timeout: seconds that a process waits for the slowest process to write or read.

    Attributes:
        reader: finds and loads them.
        files: the names and contents of text files that every checkpoint gets.
    """

    def __init__(self, options: Checkpoint, root: Path, device: torch.device, timeout: int) -> None:
        self.options, self.root = options, root
        # A separate group, because background saves communicate during training.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self.reader = CheckpointReader(options, root, self.group)
        self._background = None
        if options.async_mode != "disabled":
            self._background = BackgroundSaver(device, pin=options.async_mode == "async_with_pinned_mem")
        self._plans = PlanCache(f"{root} {self.group.group_name}")
        self.last_saved: int | None = None
        self.files: dict[str, str] = {}
        self._deleting: threading.Thread | None = None

    def is_due(self, step: int) -> bool:
        options = self.options
        return options.enable_checkpoint and (
            step % options.interval == 0 or (step == 1 and options.enable_first_step_checkpoint)
        )

    def save(self, info: Info, process: Process, *, last: bool = False, ends: bool = False) -> None:
        """Save a checkpoint, in the background unless ``async_mode`` is "disabled".

        Args:
            last: this is the last save of the run, which may have weights only (``last_save_model_weights_only``).
            ends: the process ends after this save. Then the call waits for it, and raises if it fails.

        Raises:
            TrainingError: this save or the previous background save failed, and the failure ends the run.
        """
        self.wait()
        if not self.options.enable_checkpoint or info.step == self.last_saved:
            return
        state = model_state(process.parts)
        info.weights_only = last and self.options.last_save_model_weights_only
        self._complete(info, process)
        if info.weights_only:
            dtype = DTYPES[self.options.export_dtype]
            kept = {name for name, t in state.items() if name in info.buffers or stored_weight(t) is not None}
            state = {name: t if name in kept else t.to(dtype) for name, t in state.items()}
        else:
            state |= optimizer_state(process.optimizer, process.parts) | random_state(process.rank, process.device)
        state = as_plain(state)
        saver = self._background
        if saver is not None and not ends:
            saver.start(info.step, state, lambda copies, error: self._write_copies(copies, error, info, saver.new_file))
            return
        try:
            self._write(state, info)
        except SaveError as e:
            if ends or self.options.on_save_failure == "stop":
                raise self._fatal(e, info.step) from None
            self._log_failed(e, info.step)

    def keep_model(self, info: Info, process: Process, root: Path) -> None:
        """Save the weights alone as ``root/step-N``, after the last step of a run without checkpoints.

        Raises:
            TrainingError: they cannot be written.
        """
        info.weights_only = True
        self._complete(info, process)
        try:
            folder = save(root, model_state(process.parts), info, self.group, self.files)
        except SaveError as e:
            raise TrainingError(f"THE MODEL COULD NOT BE SAVED ({e}); make room in {root.parent}") from None
        logger.info("the model is kept in %s", folder)

    def _complete(self, info: Info, process: Process) -> None:
        info.world_size, info.model = dist.get_world_size(), process.model
        info.buffers = process.buffers_on_all(self.group)

    def _write_copies(self, copies: State, failure: Exception | None, info: Info, new_file: NewFile) -> None:
        """Write the copies, in the background thread; log a failure at once, not at the next save."""

        def raise_failure() -> None:
            if failure is not None:
                raise failure

        try:
            on_all(self.group, raise_failure)
            self._write(copies, info, new_file)
        except Exception as e:
            self._log_failed(e, info.step)
            raise

    def _write(self, state: State, info: Info, new_file: NewFile = HashingFile) -> None:
        start = time.perf_counter()
        folder = save(self.root, state, info, self.group, self.files, self._plans, new_file)
        self.last_saved = info.step
        logger.info(
            "step %d: checkpoint %s saved in %.2f s (%s of this process)",
            info.step,
            folder,
            time.perf_counter() - start,
            size_text(local_bytes(state)),
        )
        if dist.get_rank() == 0 and self.options.keep_latest_k:
            self._delete_old(self.options.keep_latest_k)

    def _delete_old(self, kept: int) -> None:
        """Delete all but the last ``kept`` checkpoints, in a thread: it may take minutes; other ranks would wait."""
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
            if dist.get_rank() == 0:  # the message is the same on all ranks
                logger.error(
                    "%s. Training goes on; checkpoint.on_save_failure=stop would end it", self._failed(error, step)
                )
        else:
            logger.error("%s", self._failed(error, step))

    def before_update(self) -> None:
        """Wait until the background copy is complete; call this before each optimizer step."""
        if self._background is not None:
            self._background.wait_for_copy()

    def wait(self) -> None:
        """Wait for the running background save; raise TrainingError if its failure ends the run."""
        if self._background is None:
            return
        try:
            waited = self._background.wait()
        except SaveError as e:
            if self.options.on_save_failure == "stop":
                raise self._fatal(e, self._background.step) from None
        except Exception as e:  # the processes did not agree on this failure: they cannot continue together
            raise TrainingError(self._failed(e, self._background.step)) from e
        else:
            if waited > 1:
                logger.warning("waited %.1f s for the checkpoint before; raise checkpoint.interval", waited)

    def close(self) -> None:
        if self._background is not None:
            self._background.close()
        if self._deleting is not None:
            self._deleting.join()
        self._plans.clear()
