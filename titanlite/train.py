"""The trainer. Read this first: the loop; :mod:`titanlite.prepared_run` has the set-up, in named steps.

``python -m titanlite.train`` is one process of a run: the only one, or one that the launcher or torchrun starts.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys

from titanlite.launch.command_line import read_config
from titanlite.launch.stop_request import StopRequest

# Read the options before the imports: --help and bad input must not wait seconds for torch.
CONFIG = read_config(sys.argv[1:]) if __name__ == "__main__" else None
STOP = StopRequest() if __name__ == "__main__" else None

import logging
import math
import shlex
import time

import torch
import torch.distributed as dist
from torch import Tensor

from titanlite.checkpoint import Info
from titanlite.config import JobConfig, dump_toml
from titanlite.config.data_rules import packing_of
from titanlite.config.number_formats import stored_as
from titanlite.config.run_config import CONFIG as CONFIG_TOML
from titanlite.config.run_config import METRICS, MODEL
from titanlite.data import merge_states
from titanlite.distributed import runtime
from titanlite.distributed.gradients import gradient_scale
from titanlite.distributed.waiting import MessageWatch
from titanlite.errors import TrainingError
from titanlite.launch.stacks import keep_stacks
from titanlite.metrics.device import device_name, peak_flops
from titanlite.metrics.report import next_command, shown_path, summary, table, what_next
from titanlite.metrics.sinks import shown_memory
from titanlite.prepared_run import PreparedRun
from titanlite.training.failure import report_failure
from titanlite.training.loss_watch import rank_of_claim
from titanlite.training.run_folder import loss_of_first_step
from titanlite.training.sample import log_sample
from titanlite.training.step_guard import IS_BAD

logger = logging.getLogger()


class Trainer(PreparedRun):
    """One process's share of a training run."""

    def train(self) -> None:
        try:
            with self.console.live(self.progress.line):
                self._train()
        except BaseException:
            self.recorder.failed = True
            raise

    def _train(self) -> None:
        self._log_header()
        if self.config.checkpoint.create_seed_checkpoint:
            self._save(ends=True)
            return
        if self.config.training.compile:
            logger.info("step %d compiles the model, which can take minutes", self.first_step)
        self.progress.begin(self.step, "compiling" if self.config.training.compile else "making the first step")
        self.recorder.restart()
        with self.profiler.steps(after=self.step, last=self.config.training.steps) as step_done:
            stop = self._should_stop()
            while self.step < self.config.training.steps and not stop:
                stop = self.advance()
                step_done()
        keeps_model = self.config.checkpoint.keep_model and not self.config.checkpoint.enable_checkpoint and not stop
        if keeps_model:
            self.checkpoints.keep_model(self._info(), self.process, self.run_path / MODEL)
        self._log_summary()
        if not stop:
            with self.progress.doing("writing a sample"):
                sample = log_sample(self.model_parts, self.tokenizer, self.config, self.mesh, self.runtime)
            if sample is not None and self.runtime.rank == 0:
                self.run_folder.keep_sample(*sample)
        if keeps_model:
            logger.info(what_next(self.config, self.run_path, self.runtime.world_size))
        self.recorder.check_complete()

    def advance(self) -> bool:
        """Make one step, then log, validate and save if they are due. Return True if the run was asked to stop here."""
        self.step += 1
        loss, record, lr = self.train_step()
        self.compile_watch.step_done(self.step)
        self.loss_watch.add(self.step, record)
        due, save = self.recorder.is_due(self.step), self.checkpoints.is_due(self.step)
        # The ranks agree where something may end the run, and before a log line or a save: do not save a bad step.
        stop = (due or save or self.loss_watch.calls(self.step)) and self._should_stop()
        last = self.step == self.config.training.steps
        if logged := due or stop:
            self._log_step(loss, lr)
        if self.validator is not None and self.validator.is_due(self.step):
            with self.progress.doing("validating"):
                self.validator.run(self.step, self.recorder, self.compile_watch, self._asked_to_stop)
            stop = stop or self._should_stop()
        if self.step == self.first_step:
            self._set_timeouts()
        if save or stop or last:
            self._save(last=last, ends=stop or last)
        if save and not (stop or last) and self._should_stop():  # the request came during the save
            self._save(ends=True)
            stop = True
        if stop and not logged:  # the request came after the step
            self._log_step(loss, lr)
        self.gc.run(self.step)
        return stop

    def _set_timeouts(self) -> None:
        """From now on, end what waits for other ranks for ``comm.train_timeout_seconds``."""
        comm = self.config.comm
        runtime.set_train_timeout(comm, except_for=self.checkpoints.group)
        if self.runner.pipeline is not None and self.runtime.device.type == "cpu":
            watch = MessageWatch(self.runner.pipeline.messages, comm.train_timeout_seconds, lambda: self.step)
            self._opened.callback(watch.close)

    def train_step(self) -> tuple[Tensor, Tensor, float]:
        """Make one optimizer step. Return this rank's mean loss and the result of :meth:`StepGuard.step`, both on the
        device, and the learning rate."""
        waited = time.perf_counter()
        batch = next(self.loader)
        waited = time.perf_counter() - waited
        step_loss = self.runner.forward_backward(batch)
        max_norm = self.config.training.max_norm
        stop = self.stop_request.requested()
        scale = gradient_scale(self.parameters(), max_norm, self.mesh, *step_loss, stop)
        loss = step_loss.mean()
        lr = self.schedule.apply(self.optimizer, self.step)
        self.checkpoints.before_update()
        judged = scale.loss, scale.norm, scale.divisor, scale.stops, None if self.encoder is None else scale.scored
        record = self.step_guard.step(self.optimizer, loss, *judged)
        self.optimizer.zero_grad()
        self.experts.step_done(bad=record[IS_BAD])
        for converter in self.converters.values():
            for part in self.model_parts:
                converter.post_optimizer_hook(part)
        tokens = self.global_batch_size * self.config.training.seq_len
        self.recorder.step_done(tokens / self.runtime.world_size, tokens, waited)
        self.progress.step_done(self.step, tokens / self.runtime.world_size)
        return loss, record, lr

    def _log_step(self, loss: Tensor, lr: float) -> None:
        largest = loss.clone() if self.runner.has_loss else torch.full_like(loss, -torch.inf)
        if self.runtime.world_size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        skipped, truncated = self._not_as_they_are()
        latest = self.loss_watch.latest
        assert latest is not None  # _should_stop has drained
        self.recorder.log(
            self.step,
            loss=latest.loss,
            # The maximum of NaN and a number depends on the implementation.
            max_loss=largest.item() if math.isfinite(latest.loss) else latest.loss,
            grad_norm=latest.grad_norm,
            lr=lr,
            skipped_steps=latest.skipped,
            skipped_documents=skipped,
            truncated_examples=truncated,
            experts=self.experts.report(),
        )

    def _not_as_they_are(self) -> tuple[int, int]:
        """Return how many documents are left out, and truncated, over all ranks."""
        if self.config.data.on_corrupt != "skip" and packing_of(self.config) == "stream":
            return 0, 0  # the first one ends the run: no collective is needed
        counts = (self.loader.skipped, self.loader.truncated)
        skipped, truncated = (self.runtime.sum(count, self.degrees.data_parallel) for count in counts)
        return skipped, truncated

    def _asked_to_stop(self) -> bool:
        (stop,) = self.runtime.agree_max(int(self.stop_request.requested()))
        return bool(stop)

    def _should_stop(self) -> bool:
        """Wait for the verdict on this step, and return True on every rank if the run was asked to end. If a step is
        bad and not skipped, raise :class:`TrainingError` on all ranks, with the message of the first affected rank."""
        self.loss_watch.drain()
        stop, claim = self.runtime.agree_max(int(self.stop_request.requested()), self.loss_watch.claim())
        if claim:
            message = [self.loss_watch.describe()]
            dist.broadcast_object_list(message, src=rank_of_claim(claim), group=self.runtime.control)
            raise TrainingError(message[0])
        if stop:
            logger.info("asked to stop: ending after step %d", self.step)
        return bool(stop)

    def _save(self, *, last: bool = False, ends: bool = False) -> None:
        """Save a checkpoint of this step, if checkpoints are enabled. The time is excluded from the training speed."""
        if not self.config.checkpoint.enable_checkpoint:
            return
        start = time.perf_counter()
        with self.progress.doing("saving"):
            self.checkpoints.save(self._info(), self.process, last=last, ends=ends)
        self.recorder.exclude(time.perf_counter() - start)

    def _info(self) -> Info:
        return Info(
            step=self.step,
            model=self.process.model,
            tokenizer_path=self.tokenizer_source,
            tokenizer=self.tokenizer.identity,
            seed=self.seed,
            tokens_seen=self.recorder.tokens_seen,
            data=merge_states(self.runtime.gather(self.loader.state_dict())),
            step_guard=self.step_guard.state_dict(),
        )

    # ---- what the user reads

    def _log_header(self) -> None:
        training = self.config.training
        precision = (
            f"{training.mixed_precision_param} forward and backward, {training.mixed_precision_reduce} reduction, "
            f"{stored_as(self.config)} weights"
        )
        if self.config.job.print_args:
            logger.info("the effective configuration:\n%s", dump_toml(self.config))
        if peak_flops(device_name(self.runtime.device)) is None:
            self.about["mfu"] = "n/a: the peak of this device is not known"
        if self.prediction is not None:
            self.about["predicted"] = self.prediction.describe()
        places = {"steps": f"{training.steps}", "precision": precision, "run folder": f"{self.run_path}"}
        logger.info(table(self.config.job.description, {**self.about, **places}))

    def _log_summary(self) -> None:
        places = {}
        if self.prediction is not None and self.recorder.peak is not None:
            gib, _ = shown_memory(self.recorder.peak)
            places["predicted"] = self.prediction.error(self.recorder.median("tps"), gib)
        places["metrics"] = f"{self.run_path / METRICS}"
        if self.config.metrics.enable_tensorboard:
            command = (shown_path(sys.executable), "-m", "tensorboard.main", "--logdir", str(self.run_path))
            places["look at it"] = shlex.join(command)
        places |= next_command(self.config, self.run_path / CONFIG_TOML, self.step, self.runtime.world_size)
        logger.info(summary(self.recorder, places, loss_of_first_step(self.run_path), [*self.loss_watch.losses]))


def main(config: JobConfig | None = None) -> int:
    """Train as the command line or ``config`` says, and return the exit status."""
    config = config or CONFIG or read_config(sys.argv[1:])
    runtime.end_with_launcher()
    if STOP is not None:
        keep_stacks()
    trainer = None
    try:
        trainer = Trainer(config, STOP)
        trainer.train()
    except Exception as e:
        step, profiler = (0, None) if trainer is None else (trainer.step, trainer.profiler)
        return report_failure(e, config, step, profiler, is_process=STOP is not None)
    finally:
        try:
            if trainer is not None:
                trainer.close()
        finally:
            runtime.stop_runtime()
    return 0


if __name__ == "__main__":
    sys.exit(main())
