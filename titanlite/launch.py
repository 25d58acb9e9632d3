"""The launcher: one command for one process or many.

It checks the configuration before anything starts, then becomes the trainer (one process) or runs torchrun's elastic
agent (several). Beyond torchrun it

- ends with status 2 and one message on bad input, whichever worker found it;
- on SIGTERM, SIGINT or SIGHUP asks the workers to stop after their step and waits as long as they need (torchrun kills
  them after 30 s), ending with status 0; a second signal ends them at once;
- leaves no worker behind when it is killed itself.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import uuid
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from titanlite.command_line import read_config, report, reported
from titanlite.config import check_config
from titanlite.environment import CONFIG_FILE, LAUNCH_DIR, LAUNCHER_PID, NGPU
from titanlite.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

HERE = Path(__file__).parent
# Beside the package in a clone, inside it in a wheel.
TRAIN_CONFIGS = next((d for d in (HERE / "train_configs", HERE.parent / "train_configs") if d.is_dir()), HERE)


def main() -> None:
    argv = sys.argv[1:]
    os.environ.setdefault(CONFIG_FILE, _default_file())
    config = read_config(argv)
    try:
        processes = _process_count()
        check_config(config, processes)
    except ConfigError as e:
        sys.exit(report(e))
    if processes == 1:
        os.execv(sys.executable, [sys.executable, "-m", "titanlite.train", *argv])
    sys.exit(_run_workers(processes, argv))


def _default_file() -> str:
    path = TRAIN_CONFIGS / "debug_model.toml"
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _process_count() -> int:
    asked, gpus = os.environ.get(NGPU), _gpu_count()
    if not asked:
        return max(gpus, 1)
    if not asked.isdecimal() or int(asked) < 1:
        raise ConfigError(f"NGPU={asked}: must be the number of processes, at least 1")
    if gpus and int(asked) > gpus:
        raise ConfigError(
            f"NGPU={asked}: this machine has {gpus} GPUs, and each process needs one; set NGPU={gpus} or less"
        )
    return int(asked)


def _gpu_count() -> int:
    # Importing torch takes seconds, so look first whether there can be a GPU at all (CUDA, WSL, ROCm).
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")):
        return 0
    import torch

    return torch.cuda.device_count()


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_workers(processes: int, argv: list[str]) -> int:
    """Run the trainer in ``processes`` processes; returns the exit status."""
    import logging

    logging.disable(logging.CRITICAL)  # the agent repeats what the workers say themselves, in forty lines
    threads = str(max(1, _cpus() // processes))
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    os.environ.setdefault("RAYON_NUM_THREADS", threads)  # the tokenizer's
    with tempfile.TemporaryDirectory(prefix="titanlite-") as folder:
        os.environ.update({LAUNCH_DIR: folder, LAUNCHER_PID: str(os.getpid())})
        _stop_in_order(Path(folder, "stop"))  # before the imports: they take seconds, and a signal counts then too
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            signals_to_handle="SIGQUIT",
        )
        try:
            elastic_launch(launch, sys.executable)("-u", "-m", "titanlite.train", *argv)
        except ChildFailedError as e:
            return _explain(folder, *e.get_first_failure())
        except SignalException as e:
            print(f"titanlite: the workers were ended with {e.sigval.name}", file=sys.stderr)
            return 128 + e.sigval
    return 0


def _stop_in_order(stop_file: Path) -> None:
    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop_file.exists():
            from torch.distributed.elastic.multiprocessing import SignalException

            # Whatever they are in: a rank that waits in a collective does not see a milder signal.
            raise SignalException(f"second signal {number}", signal.SIGKILL)
        stop_file.touch()
        name = signal.Signals(number).name
        print(f"titanlite: {name}: the workers stop after this step; send it again to end them now", file=sys.stderr)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, on_signal)


def _explain(folder: str, rank: int, failure: ProcessFailure) -> int:
    """Show why the workers failed: their own message where they left one, else who ended how."""
    for path in reported(folder):
        print(path.read_text(), file=sys.stderr)
        return int(path.suffix[1:])
    how = f"status {failure.exitcode}" if failure.exitcode >= 0 else signal.Signals(-failure.exitcode).name
    print(
        f"titanlite: error: rank {rank} (process {failure.pid}) ended with {how}; the others were ended",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    main()
