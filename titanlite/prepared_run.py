"""The set-up of a training run, in named steps; :mod:`titanlite.train` has the loop."""

from __future__ import annotations

import json
import logging
import math
import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from titanlite.checkpoint import CheckpointManager, Process
from titanlite.config import JobConfig, check_config, global_batch_size, import_custom, resolve_degrees
from titanlite.config.job_name import job_name
from titanlite.config.run_config import read_earlier_runs, read_run_config, section_in
from titanlite.distributed import runtime
from titanlite.distributed.attention_kernel import preferred_kernels
from titanlite.distributed.compile import CompileWatch
from titanlite.distributed.context_parallel import ContextParallel
from titanlite.distributed.data_parallel import DTYPES, allocate
from titanlite.distributed.experts import ExpertBalance
from titanlite.distributed.init import WeightInit
from titanlite.distributed.mesh import build_mesh
from titanlite.distributed.one_shard import gather_in_place
from titanlite.errors import counted
from titanlite.launch.stop_request import StopRequest
from titanlite.metrics.console import ConsoleSink, TerminalSink, init_logging
from titanlite.metrics.device import GIB, device_name, peak_memory
from titanlite.metrics.flops import flops_per_token
from titanlite.metrics.profiling import Profiler
from titanlite.metrics.progress import Progress
from titanlite.metrics.recorder import Recorder
from titanlite.metrics.sinks import Sink
from titanlite.optim import build_optimizer, build_schedule
from titanlite.plan import auto_checkpoint
from titanlite.plan.least import check_memory
from titanlite.plan.predicted import predict
from titanlite.training.build import build_loss, build_model, build_pipeline
from titanlite.training.data import build_encoder, build_loader, describe_packing, open_source
from titanlite.training.loss_watch import LossWatch
from titanlite.training.model_shape import choose_shape
from titanlite.training.origin import find_start
from titanlite.training.outputs import check_outputs, open_outputs, open_tensorboard
from titanlite.training.run_folder import RunFolder, loss_of_first_step
from titanlite.training.sample import check_prompt
from titanlite.training.step import StepRunner
from titanlite.training.step_guard import StepGuard
from titanlite.training.validate import Validator, read_validation_data, training_part
from titanlite.training.validate_task import ValidationTask

logger = logging.getLogger()


class PreparedRun:
    """One process's share of a training run, ready for its first step: nothing is trained here.

    Args:
        stop_request: tells that the run was asked to stop; None: made here.
    """

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
            if self.runtime.world_size == 1 and not config.training.enable_cpu_offload:
                dtypes = config.training.mixed_precision_param, config.training.mixed_precision_reduce
                self.runner.in_place = gather_in_place(part, *(DTYPES[dtype] for dtype in dtypes))
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

    def close(self) -> None:
        """Stop what runs in the background, close the files, and restore the signal handlers."""
        self._opened.close()
