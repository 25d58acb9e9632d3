"""The launcher: one command for one process or many, on one machine or on each of several.

It checks the configuration before anything starts, then becomes the trainer (one process) or runs torchrun's elastic
agent (several). Beyond torchrun it

- ends with status 2 and one message on bad input, no matter which worker detected it;
- on SIGTERM, SIGINT or SIGHUP asks the workers to stop after their step and waits as long as they need (torchrun kills
  them after 30 s), ending with status 0; a second signal ends them at once;
- says which rank died first, with its status, and shows the stacks of the other ranks;
- leaves no worker behind when it is killed itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from titanlite.config import JobConfig, check_config, packaged
from titanlite.environment import (
    COMM_MODE,
    CONFIG_FILE,
    LAUNCH_DIR,
    LAUNCHER_PID,
    NGPU,
    NNODES,
    RDZV_ENDPOINT,
    RDZV_ID,
)
from titanlite.errors import ConfigError, counted
from titanlite.launch.command_line import read_config, report, reported
from titanlite.launch.limits import let_segments_grow, raise_descriptor_limit
from titanlite.launch.shortage import advise
from titanlite.launch.stacks import stacks_file
from titanlite.launch.stop_request import STOP_SIGNALS

_PROCESS_BYTES = 64 << 20  # a lower bound of what a process has to itself


class Failure(Protocol):
    """The end of a worker: the fields of torch's ``ProcessFailure``, whose import would take seconds."""

    pid: int
    exitcode: int
    timestamp: int


@dataclass(frozen=True)
class Plan:
    """The processes that a command starts.

    Attributes:
        module: the module that each process runs, ``titanlite.train`` or ``titanlite.plan.command``.
        machines: the number of machines; each has one launcher.
        processes: the number of processes on this machine; 1 for an estimate.
        meeting: the rendezvous of the launchers, as arguments of torchrun's ``LaunchConfig``.
        env: environment variables for the process of an estimate.
    """

    module: str
    machines: int = 1
    processes: int = 1
    meeting: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)


def plan(argv: list[str]) -> Plan:
    """Make the plan from the arguments and the environment, and check it against this machine.

    Raises:
        ConfigError: the request is impossible. Bad input among the options ends the process instead.
    """
    os.environ.setdefault(CONFIG_FILE, packaged.find("debug_model") or "")
    config = read_config(argv)
    if _is_estimate(config):
        devices = (_count(NNODES, "machines") or 1) * (_count(NGPU, "processes") or max(_gpu_count(), 1))
        return Plan("titanlite.plan.command", env={"WORLD_SIZE": str(devices)})
    machines, processes = _count(NNODES, "machines") or 1, _process_count()
    check_config(config, machines * processes)
    return Plan("titanlite.train", machines, processes, _meeting(machines, config.comm.init_timeout_seconds))


def main(argv: list[str]) -> int:
    """Train or estimate, as the arguments and the environment say. Several processes: return their exit status. A
    single process: replace this process by it, and do not return."""
    # Block signals until handlers are installed, also across the exec below: importing torch takes seconds.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        planned = plan(argv)
    except ConfigError as e:
        return report(e)
    if planned.module == "titanlite.train":
        let_segments_grow()
        raise_descriptor_limit(planned.machines * planned.processes)
    if planned.machines * planned.processes == 1:
        os.environ.update(planned.env)
        if planned.module == "titanlite.plan.command":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # an estimate has nothing to save
        os.execv(sys.executable, [sys.executable, "-m", planned.module, *argv])
    nodes = {"min_nodes": planned.machines, "max_nodes": planned.machines}
    return _run_workers({**nodes, **planned.meeting}, planned.processes, argv)


def _is_estimate(config: JobConfig) -> bool:
    mode = os.environ.get(COMM_MODE)
    if mode not in (None, "", "fake"):
        raise ConfigError(
            f"{COMM_MODE}={mode}: there is no such mode; known: fake, which estimates what NGPU devices would hold and "
            "send, without them"
        )
    return mode == "fake" or config.memory_estimation.enabled


def _count(variable: str, unit: str) -> int | None:
    value = os.environ.get(variable)
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{variable}={value}: must be the number of {unit}, at least 1")
    return int(value)


def _process_count() -> int:
    requested, gpus = _count(NGPU, "processes"), _gpu_count()
    if requested and gpus and requested > gpus:
        raise ConfigError(
            f"NGPU={requested}: this machine has {counted(gpus, 'GPU')}, and each process needs one; set NGPU={gpus} "
            "or less"
        )
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _PROCESS_BYTES
    if requested and not gpus and requested > most:
        raise ConfigError(
            f"NGPU={requested}: each process takes more than {_PROCESS_BYTES >> 20} MiB before its model, so this "
            f"machine has room for {most} at most; without GPUs, as many as there are processor cores are fastest"
        )
    return requested or max(gpus, 1)


def _gpu_count() -> int:
    # Importing torch takes seconds, so first check for the device files of CUDA, WSL and ROCm.
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")):
        return 0
    with _no_warnings_of_lost_peers():
        import torch

    return torch.cuda.device_count()


def _meeting(machines: int, timeout: int) -> dict[str, Any]:
    """Return the rendezvous of this run's launchers, as arguments of torchrun's LaunchConfig."""
    endpoint = os.environ.get(RDZV_ENDPOINT)
    if machines == 1:
        if endpoint:
            raise ConfigError(f"RDZV_ENDPOINT={endpoint}: has no effect on one machine; set NNODES to their number")
        return {"run_id": uuid.uuid4().hex, "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
    if not endpoint:
        raise ConfigError(
            f"NNODES={machines}: the machines must know where to meet; set RDZV_ENDPOINT on all of them to the address "
            "of one and a free port there, for example RDZV_ENDPOINT=node0:29500"
        )
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"RDZV_ENDPOINT={endpoint}: must be host:port, for example node0:29500")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing, but selects the network
            local_address = probe.getsockname()[0]
    except OSError as e:
        raise ConfigError(f"RDZV_ENDPOINT={endpoint}: {host} cannot be reached ({e.strerror}); give its address") from e
    if ipaddress.ip_address(local_address).is_loopback:
        # All launchers are on one machine. But Debian gives a machine's own name a loopback address too.
        if host not in ("localhost", address[0]):
            raise ConfigError(
                f"RDZV_ENDPOINT={endpoint}: {host} is {address[0]} here, where no other machine reaches it; give the "
                "address that they use"
            )
        hosts = {}
    else:
        # torch compares host names, which fails on a machine with several names.
        hosts = {"is_host": _can_listen(family, address)}
        interface = _interface_of(local_address)
        if interface:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # not the host name's
    return {
        "run_id": os.environ.get(RDZV_ID) or "titanlite",
        "rdzv_endpoint": endpoint,
        "rdzv_configs": {"read_timeout": timeout, "join_timeout": timeout, **hosts},
        "local_addr": local_address,
    }


def _can_listen(family: socket.AddressFamily, address: Any) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def _interface_of(address: str) -> str | None:
    """Return the network interface that has this IPv4 address, on Linux; None if there is none."""
    SIOCGIFADDR = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                request = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # it has no IPv4 address
            if socket.inet_ntoa(request[20:24]) == address:
                return name
    return None


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_workers(meeting: dict[str, Any], processes: int, argv: list[str]) -> int:
    """Run the trainer in ``processes`` processes of this machine, and return the exit status."""
    import logging

    logging.disable(logging.CRITICAL)  # the agent repeats the workers' messages, in forty lines
    threads = str(max(1, _cpus() // processes))
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    os.environ.setdefault("RAYON_NUM_THREADS", threads)  # threads of the tokenizer
    with tempfile.TemporaryDirectory(prefix="titanlite-") as folder:
        os.environ.update({LAUNCH_DIR: folder, LAUNCHER_PID: str(os.getpid())})
        _stop_in_order(Path(folder, "stop"))  # before the imports: a signal counts then too
        with _no_warnings_of_lost_peers():
            from torch.distributed import DistError
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous import RendezvousError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        if meeting["max_nodes"] > 1 and hasattr(os, "waitid"):
            threading.Thread(target=_end_if_stuck, args=(folder, meeting), daemon=True).start()
        launch = LaunchConfig(
            **meeting,
            nproc_per_node=processes,
            rdzv_backend="c10d",
            max_restarts=0,
            signals_to_handle="SIGQUIT",
        )
        try:
            elastic_launch(launch, sys.executable)("-u", "-m", "titanlite.train", *argv)
        except ChildFailedError as e:
            return _explain(folder, e.failures)
        except (RendezvousError, DistError) as e:
            return _peers_lost(folder, meeting, f"{type(e).__name__}: {e}")
        except SignalException as e:
            print(f"titanlite: the workers were ended with {e.sigval.name}", file=sys.stderr)
            return 128 + e.sigval
    return 0


@contextlib.contextmanager
def _no_warnings_of_lost_peers() -> Iterator[None]:
    """Let torch, imported in this context, log no warnings from C++ in this process; the workers still log them.

    The agent writes to the rendezvous after its workers have ended. If the launcher that keeps it ended a moment
    earlier, torch handles the error but logs it as a warning with twenty lines of stack, at the end of a good run.
    """
    variable = "TORCH_CPP_LOG_LEVEL"  # read at the import
    if variable in os.environ:
        yield
        return
    os.environ[variable] = "ERROR"
    try:
        yield
    finally:
        del os.environ[variable]


def _stop_in_order(stop_file: Path) -> None:
    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop_file.exists():
            from torch.distributed.elastic.multiprocessing import SignalException

            # SIGKILL, because a rank that waits in a collective does not react to a milder signal.
            raise SignalException(f"second signal {number}", signal.SIGKILL)
        stop_file.touch()
        name = signal.Signals(number).name
        has_status = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        clear = "\r\033[J" if has_status else ""  # a worker draws it again
        # Short enough for 80 columns.
        print(f"{clear}titanlite: {name}: the run stops after this step; send it again to end it now", file=sys.stderr)

    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _end_if_stuck(folder: str, meeting: dict[str, Any]) -> None:
    """End this launcher when torch's agent no longer watches its workers. The agent polls the rendezvous ten times a
    second. If the network to it fails silently, the agent waits for the answer forever (torch 2.13)."""
    waiting, since = 0, 0.0
    while waiting == 0 or time.monotonic() < since + 40:  # the agent may wait 30 s for another worker
        time.sleep(1)
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # there are no workers
            ended = None
        pid = ended.si_pid if ended else 0
        if pid != waiting:
            waiting, since = pid, time.monotonic()
    status = _peers_lost(folder, meeting, f"process {waiting} ended 40 s ago, and the agent still waits for an answer")
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(status)  # which ends the workers


def _peers_lost(folder: str, meeting: dict[str, Any], reason: str) -> int:
    """Report that the other launchers do not answer, and return the exit status."""
    _show_stacks(folder)
    print(
        f"titanlite: error: the launchers of the other machines do not answer at {meeting['rdzv_endpoint']}: they were "
        f"not there in time, or have ended, or the network is down ({reason})",
        file=sys.stderr,
        flush=True,
    )
    return 1


def _explain(folder: str, failures: Mapping[int, Failure]) -> int:
    """Show the reason of the workers' failure, and return the exit status. The reason is a worker's own message if
    there is one, else the rank that died first and its status."""
    if (status := show_reported(folder)) is not None:
        return status
    first = min(failure.timestamp for failure in failures.values())

    def order(rank: int) -> tuple[bool, float]:
        # By the time when each rank wrote its stacks. A rank that died silently has an older file, and comes first.
        failure, stacks = failures[rank], stacks_file(folder, rank)
        return hung(failure), stacks.stat().st_mtime if stacks.exists() else failure.timestamp

    def hung(failure: Failure) -> bool:
        # The agent kills a process that SIGTERM has not ended in 30 s.
        return failure.exitcode == -signal.SIGKILL and failure.timestamp >= first + 25

    _show_stacks(folder)
    rank, *rest = sorted(failures, key=order)
    for late in rest:
        if hung(failures[late]):
            waited_for = ": it hung or had been stopped, and the others may have waited for it"
            print(
                f"titanlite: rank {late} (process {failures[late].pid}) had not ended 30 s after SIGTERM and was "
                f"killed{waited_for if failures[rank].exitcode > 0 else ''}",
                file=sys.stderr,
            )
    code = failures[rank].exitcode
    ending = f"status {code}" if code >= 0 else signal.Signals(-code).name
    print(
        f"titanlite: error: rank {rank} (process {failures[rank].pid}) ended with {ending}; the others were ended",
        file=sys.stderr,
    )
    return 1


def show_reported(folder: str) -> int | None:
    """Show the first worker's message, and advice if that worker ran out of memory. Return the exit status; None if no
    worker left a message."""
    for path in reported(folder):
        print(path.read_text(), file=sys.stderr, flush=True)
        advise(Path(folder), int(path.stem.partition("-")[2]))
        return int(path.suffix[1:])
    return None


def _show_stacks(folder: str) -> None:
    for path in sorted(Path(folder).glob("stacks-*")):
        text = path.read_text()
        if text:
            rank = path.name.partition("-")[2]
            print(f"titanlite: rank {rank} was here when it was ended:\n{text}", file=sys.stderr)
