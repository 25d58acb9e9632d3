"""The trainer. Read this first: set-up in named steps, then the loop.

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

import json
import logging
import math
import os
import shlex
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from titanlite.checkpoint import CheckpointManager, Info, Process
from titanlite.config import (
    JobConfig,
    check_config,
    dump_toml,
    global_batch_size,
    import_custom,
    resolve_degrees,
)
from titanlite.config.data_rules import packing_of
from titanlite.config.job_name import job_name
from titanlite.config.number_formats import stored_as
from titanlite.config.run_config import CONFIG as CONFIG_TOML
from titanlite.config.run_config import METRICS, MODEL, read_earlier_runs, read_run_config, section_in
from titanlite.data import merge_states
from titanlite.distributed import runtime
from titanlite.distributed.attention_kernel import preferred_kernels
from titanlite.distributed.compile import CompileWatch
from titanlite.distributed.context_parallel import ContextParallel
from titanlite.distributed.data_parallel import DTYPES, allocate
from titanlite.distributed.experts import ExpertBalance
from titanlite.distributed.gradients import gradient_scale
from titanlite.distributed.init import WeightInit
from titanlite.distributed.mesh import build_mesh
from titanlite.distributed.one_shard import gather_in_place
from titanlite.distributed.waiting import MessageWatch
from titanlite.doctor import timed_choice
from titanlite.errors import TrainingError, counted
from titanlite.launch.stacks import keep_stacks
from titanlite.metrics.console import ConsoleSink, TerminalSink, init_logging
from titanlite.metrics.device import GIB, device_name, peak_flops, peak_memory
from titanlite.metrics.flops import flops_per_token
from titanlite.metrics.profiling import Profiler
from titanlite.metrics.progress import Progress
from titanlite.metrics.recorder import Recorder
from titanlite.metrics.report import next_command, shown_path, summary, table, what_next
from titanlite.metrics.sinks import Sink, shown_memory
from titanlite.optim import build_optimizer, build_schedule
from titanlite.plan import auto_checkpoint
from titanlite.plan.least import check_memory
from titanlite.plan.predicted import predict
from titanlite.training.build import build_loss, build_model, build_pipeline
from titanlite.training.data import build_encoder, build_loader, describe_packing, open_source
from titanlite.training.failure import report_failure
from titanlite.training.loss_watch import LossWatch, rank_of_claim
from titanlite.training.model_shape import choose_shape
from titanlite.training.origin import find_start
from titanlite.training.outputs import check_outputs, open_outputs, open_tensorboard
from titanlite.training.run_folder import RunFolder, loss_of_first_step
from titanlite.training.sample import check_prompt, log_sample
from titanlite.training.step import StepRunner
from titanlite.training.step_guard import IS_BAD, StepGuard
from titanlite.training.validate import Validator, read_validation_data, training_part
from titanlite.training.validate_task import ValidationTask

logger = logging.getLogger()


class Trainer:
    """One process's share of a training run."""

    def __init__(self, config: JobConfig, stop_request: StopRequest | None = None) -> None:
        self.config = config
        self.stop_request = stop_request or StopRequest()
        self.about: dict[str, str] = {}  # the rows of the header
        self.sinks: list[Sink] = []
        with ExitStack() as opened:  # a refused run gives back what it has taken, signal handlers for example
            opened.callback(self.stop_request.close)
            self._opened = opened
            self._start_process()
            self.run_path = Path(config.job.dump_folder).expanduser()
            self.runtime.on_rank_zero(self._lock_run_folder)
            try:
                with self.console.live(self.progress.line):
                    self._set_up()
            except Exception:
                if self.runtime.rank == 0:
                    self.run_folder.discard()
                raise
            self._opened = opened.pop_all()

    def _set_up(self) -> None:
        self.profiler = Profiler(self.config.profiling, self.run_path, self.runtime.rank, self.runtime.device)
        self._find_checkpoint()
        self._load_tokenizer()
        self._build_data()
        self._build_model()
        self._build_optimizer()
        self._build_validator()
        self._load_checkpoint()
        self.runtime.on_rank_zero(self._fill_run_folder)  # last: a refused run leaves earlier files as they are
        self._build_recorder()

    def _start_process(self) -> None:
        config = self.config
        self.console = init_logging(int(os.environ.get("RANK", 0)), config.metrics.disable_color_printing)
        self.progress = Progress(
            config.training.steps,
            config.checkpoint.interval if config.checkpoint.enable_checkpoint else None,
            colored=self.console.colored,
            unicode=self.console.unicode,
        )
        for notice in config.notices:
            logger.info(notice)
        check_config(config, int(os.environ.get("WORLD_SIZE", 1)))
        import_custom(config)
        self.shape = choose_shape(config)
        self.spec = self.shape.spec
        self.runtime = runtime.start_runtime(config.comm)
        self.gc = runtime.GarbageCollection(config.training.gc_freq, config.training.gc_debug)
        self._opened.callback(self.gc.close)
        self.degrees = resolve_degrees(config.parallelism, self.runtime.world_size)
        experts = getattr(self.shape.flavor, "mixture", None) is not None
        self.mesh = build_mesh(self.degrees, self.runtime.device.type, experts=experts)
        self._opened.enter_context(preferred_kernels(self.runtime.device))
        self.about["device"] = f"{device_name(self.runtime.device)} ({self.runtime.why_device})"
        self.about["processes"] = f"{self.runtime.world_size}"

    def _find_checkpoint(self) -> None:
        """Find the start: the last checkpoint of this run, another checkpoint, or new weights from the seed."""
        config, training = self.config, self.config.training
        root = self.run_path / config.checkpoint.folder
        self.checkpoints = CheckpointManager(
            config.checkpoint, root, self.runtime.device, config.comm.init_timeout_seconds
        )
        self._opened.callback(self.checkpoints.close)
        self.start = find_start(config, self.spec, self.checkpoints.reader)
        if not self.start.from_this_run:
            self.runtime.on_rank_zero(lambda: self.run_folder.refuse_to_retire(config))
            if config.checkpoint.enable_checkpoint:
                logger.info("no checkpoint found in %s, starting at step %d", root, self.start.step + 1)
        present = read_run_config(self.run_path)
        before = section_in(present, "job").get("name") if self.start.continues else None
        config.job.name = job_name(config, before, [present, *read_earlier_runs(self.run_path)])
        seed = self.start.seed if training.seed is None else training.seed
        self.seed = training.seed = runtime.set_seed(seed, training.deterministic, self.runtime)
        self.about["seed"] = f"{self.seed}" + (", deterministic" if training.deterministic else "")

    def _load_tokenizer(self) -> None:
        """Load the tokenizer, which belongs to the weights; every checkpoint gets a copy."""
        self.tokenizer, self.tokenizer_source, reason = self.start.choose_tokenizer(self.config)
        self.checkpoints.files = self.tokenizer.files()
        check_prompt(self.config, self.tokenizer)
        named = self.tokenizer.path, "" if self.config.model.tokenizer_path else reason
        vocab_size, seq_len = self.tokenizer.vocab_size, self.config.training.seq_len
        self.model_args = self.spec.configure(self.shape.flavor, vocab_size, seq_len, *named)
        self.about["tokenizer"] = f"{self.tokenizer.description()} ({reason})"

    def _build_data(self) -> None:
        training = self.config.training
        self.context = None
        if self.degrees.context_parallel > 1:
            self.context = ContextParallel(self.mesh.cp, self.config.parallelism.context_parallel_rotate_method)
        goes_on = self.runtime.rank == 0 and self.start.continues
        earlier = section_in(self.run_folder.earlier, "activation_checkpoint") if goes_on else {}
        vocab_size = self.tokenizer.vocab_size
        self.about |= timed_choice.choose(self.config, self.runtime, self.run_folder.earlier if goes_on else {})
        self.about |= auto_checkpoint.resolve(self.config, self.runtime, vocab_size, dict(earlier))
        check_memory(self.config, self.spec, self.model_args, self.degrees, self.runtime.device)
        self.global_batch_size = global_batch_size(self.config, self.degrees.data_parallel)
        self.encoder = build_encoder(training.dataset, self.tokenizer, self.config)
        self.source = open_source(training.dataset, training.dataset_path, self.config, self.encoder, self.seed)
        part = training_part(self.source, self.config)
        self.loader = build_loader(part, self.tokenizer, self.encoder, self.config, self.mesh, self.runtime)
        self._opened.callback(self.loader.close)
        identity = {**self.loader.identity, "tokenizer": self.tokenizer.identity["sha256"]}
        self.runtime.check_same("the data or tokenizers", identity)
        self.about["data"] = f"{training.dataset}{f' ({training.dataset_path})' if training.dataset_path else ''}"
        self.about["packing"] = describe_packing(self.config)
        self.about["tokens per step"] = (
            f"{self.global_batch_size * training.seq_len:,} = "
            f"{counted(self.global_batch_size, 'sequence')} x {training.seq_len}"
        )

    def _build_model(self) -> None:
        config, device = self.config, self.runtime.device
        before = peak_memory(device).active
        built = build_model(self.spec, self.model_args, config, self.mesh)
        self.model_parts = built.parts
        self.parameters, self.named_parameters = built.parameters, built.named_parameters
        self.size, self.converters = built.size, built.converters
        self.compile_watch = CompileWatch()
        self._opened.callback(self.compile_watch.close)
        loss_fn = build_loss(config, self.mesh)
        pipeline = build_pipeline(built, loss_fn, config, self.mesh, device)
        self.runner = StepRunner(built.parts, loss_fn, pipeline, self.context, device, self.mesh, built.reduce_each)
        self.experts = ExpertBalance(built.parts, config.experts, self.mesh)
        self.about.update(built.about)
        for part in self.model_parts:  # nothing was allocated before
            allocate(part, device, config.training.enable_cpu_offload)
            if self.runtime.world_size == 1 and not (config.training.enable_cpu_offload and device.type != "cpu"):
                training = config.training
                dtypes = DTYPES[training.mixed_precision_param], DTYPES[training.mixed_precision_reduce]
                self.runner.in_place = gather_in_place(part, *dtypes)
            part.init_weights(WeightInit(part, self.seed))  # type: ignore[operator]
            part.train()
        self.flops_per_token = flops_per_token(self.size, config.training.seq_len)
        self.prediction = predict(config, self.model_args, device_name(device), self.runtime.world_size)
        self.about["model"] = f"{self.shape.about}, {self.size.params:,} parameters"
        if self.shape.config_json is not None:
            self.about["shape"] = self.shape.sizes()
        self.about["flops per token"] = f"{self.flops_per_token:,}"
        self.about["memory"] = f"{before / GIB:.2f} GiB before building, {peak_memory(device).active / GIB:.2f} after"

    def _build_optimizer(self) -> None:
        config = self.config
        self.optimizer = build_optimizer(self.named_parameters(), config.optimizer, self.seed)
        self.step_guard = StepGuard(config.training, self.parameters()[0].device)
        self.schedule = build_schedule(config.lr_scheduler, config.optimizer.lr, config.training.steps)

    def _build_validator(self) -> None:
        self.validator = None
        if self.config.validation.enable:
            data = read_validation_data(self.source, self.encoder, self.tokenizer, self.config, self.mesh, self.runtime)
            task = None
            if self.config.validation.tasks:
                task = ValidationTask(self.config, self.model_parts, self.tokenizer, self.runtime)
            self.validator = Validator(self.config, data, self.runner, self.mesh, self.runtime.device, task)
            self.about["validation"] = data.about

    def _load_checkpoint(self) -> None:
        config = self.config
        self.step = self.tokens_before = 0
        shape = json.loads(json.dumps(asdict(self.model_args)))  # the same types as when read from a file
        model = {"name": config.model.name, "flavor": config.model.flavor, "args": shape}
        self.process = Process(self.runtime.rank, self.runtime.device, self.model_parts, self.optimizer, model)
        source = self.start.load(self.checkpoints.reader, self.process, self.spec, self.model_args)
        if source:
            self.about["starts from"] = source
        info = self.start.restore(self.loader, self.step_guard)
        if info is not None:
            self.step, self.tokens_before = info.step, info.tokens_seen
        if self.start.continues:
            self.checkpoints.last_saved = self.step
        self.first_step = self.step + 1

    def _not_as_they_are(self) -> tuple[int, int]:
        """Return how many documents are left out, and truncated, over all ranks."""
        if self.config.data.on_corrupt != "skip" and packing_of(self.config) == "stream":
            return 0, 0  # the first one ends the run: no collective is needed
        counts = (self.loader.skipped, self.loader.truncated)
        skipped, truncated = (self.runtime.sum(count, self.degrees.data_parallel) for count in counts)
        return skipped, truncated

    def _lock_run_folder(self) -> None:
        self.run_folder = RunFolder(self.run_path)

    def _fill_run_folder(self) -> None:
        check_outputs(self.config)
        checkpoint = self.start.checkpoint
        if self.start.continues and checkpoint is not None:
            processes = checkpoint.info.world_size, self.runtime.world_size
            self.run_folder.go_on(self.config, self.step, processes, self.shape.config_json)
        else:
            self.run_folder.begin(self.config, self.shape.config_json)
        self.run_folder.keep_tokenizer(self.tokenizer)
        validation = {"validation": self.validator.data.identity} if self.validator is not None else {}
        self.run_folder.keep_data_identity({"training": self.loader.identity, **validation})
        self.sinks += open_outputs(self.config, self.run_path, self.step)

    def _build_recorder(self) -> None:
        config = self.config
        steps = config.training.steps
        start = loss_of_first_step(self.run_path) if self.step else None
        losses = self.step_guard.state_dict()["losses"]
        uniform = math.log(self.tokenizer.vocab_size)
        self.loss_watch = LossWatch(config.training, self.runtime.rank, losses, start=start, uniform=uniform)
        self.progress.losses = losses = self.loss_watch.losses
        on_terminal = self.console.on_terminal
        self.sinks.insert(0, TerminalSink(self.console, losses, steps) if on_terminal else ConsoleSink())
        if config.metrics.enable_tensorboard and config.metrics.save_for_all_ranks:
            self.sinks.append(open_tensorboard(config, self.run_path, self.step, self.runtime.rank))
        self.recorder = Recorder(
            self.sinks,
            self.runtime.device,
            self.flops_per_token,
            config.metrics.log_freq,
            steps,
            steps_before=self.step,
            tokens_seen=self.tokens_before,
        )
        self._opened.callback(self.recorder.close)

    # ---- the loop

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

    def close(self) -> None:
        """Stop what runs in the background, close the files, and restore the signal handlers."""
        self._opened.close()


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
