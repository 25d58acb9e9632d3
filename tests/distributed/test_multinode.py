"""Several launchers, or torchrun's agents, that meet and train one model, as on several machines."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_launcher import Started, start_in
from tests.support.forks import free_port
from tests.support.runs import ROOT, TINY, command, environment, run_trainer


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Any]:
    """Starts the launchers of two hosts with one process each, on this machine."""
    with contextlib.contextmanager(start_in)(tmp_path) as start:

        def two(**options: Any) -> list[Started]:
            env = {"NNODES": "2", "RDZV_ENDPOINT": f"localhost:{free_port()}"}
            return [start(1, env=env, run_folder=tmp_path / "run", **options) for _ in range(2)]

        yield two


def output(runs: list[Started]) -> str:
    return "".join(run.output() for run in runs)


def wait_for(runs: list[Started], text: str) -> None:
    end = time.monotonic() + 120
    while text not in output(runs):
        assert time.monotonic() < end, output(runs)
        time.sleep(0.1)


@pytest.fixture(scope="module")
def one_host_losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return run_trainer(tmp_path_factory.mktemp("one-host"), ngpu=2).losses()


def losses_in(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long  # test_hosts_on_a_network is this with a real network
def test_two_hosts_train_as_one(hosts: Any, one_host_losses: list[float]) -> None:
    runs = hosts(training__steps=3)
    assert [run.process.wait(timeout=200) for run in runs] == [0, 0], output(runs)
    assert "processes                 2\n" in output(runs)
    assert losses_in(runs[0].folder) == one_host_losses


@pytest.mark.slow
@pytest.mark.parametrize("host", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_signal_to_one_host_ends_both_in_order(hosts: Any, host: int) -> None:
    runs = hosts()
    wait_for(runs, "step:  2")
    runs[host].process.send_signal(signal.SIGTERM)
    assert [run.process.wait(timeout=60) for run in runs] == [0, 0]
    assert "training stopped early" in output(runs)
    assert "most recent call" not in output(runs)


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, pytest.param(1, marks=pytest.mark.long)])  # the first is the meeting place
def test_a_killed_worker_ends_both_hosts(hosts: Any, host: int) -> None:
    runs = hosts(comm__train_timeout_seconds=60)
    wait_for(runs, "step:  2")
    (rank, pid), (other,) = *runs[host].ranks().items(), runs[1 - host].ranks()
    os.kill(pid, signal.SIGKILL)
    assert [run.process.wait(timeout=60) for run in runs] == [1, 1]
    assert f"titanlite: error: rank {rank} (process {pid}) ended with SIGKILL" in runs[host].output()
    assert runs[1 - host].says_where(other)
    assert "titanlite: error: " in runs[1 - host].output()
    assert "titanlite/launch/launcher.py" not in output(runs)  # no traceback of the launcher


@pytest.mark.slow
def test_a_killed_launcher_ends_the_other_host(hosts: Any) -> None:
    runs = hosts(comm__train_timeout_seconds=60)
    wait_for(runs, "step:  2")
    runs[0].process.kill()  # with it goes the meeting place
    assert runs[1].process.wait(timeout=60) == 1
    assert "titanlite: error: " in runs[1].output()
    assert "titanlite/launch/launcher.py" not in runs[1].output()


BAD = [
    ({"NNODES": "two"}, "NNODES=two: must be the number of machines"),
    ({"NNODES": "2"}, "NNODES=2: the machines must know where to meet; set RDZV_ENDPOINT"),
    ({"RDZV_ENDPOINT": "node0:29500"}, "RDZV_ENDPOINT=node0:29500: has no effect on one machine; set NNODES"),
    ({"NNODES": "2", "RDZV_ENDPOINT": "node0"}, "RDZV_ENDPOINT=node0: must be host:port"),
    ({"NNODES": "2", "RDZV_ENDPOINT": "no.such.host.invalid:1"}, "no.such.host.invalid cannot be reached"),
    ({"NNODES": "2", "NGPU": "3", "RDZV_ENDPOINT": "localhost:1"}, "does not divide the 6 processes"),
]


@pytest.mark.parametrize(("env", "message"), BAD)
def test_bad_input_is_refused_before_anything_starts(tmp_path: Path, env: dict[str, str], message: str) -> None:
    given = command(tmp_path / "run", {"parallelism.data_parallel_replicate_degree": 4} if "NGPU" in env else {})
    done = subprocess.run(given, env=environment(**env), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_host_that_waits_alone_gives_up(tmp_path: Path) -> None:
    env = environment(NNODES="2", NGPU="1", RDZV_ENDPOINT=f"localhost:{free_port()}")
    given = command(tmp_path / "run", {"comm.init_timeout_seconds": 5})
    done = subprocess.run(given, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "titanlite: error: the launchers of the other machines do not answer" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_torchrun_on_two_hosts(tmp_path: Path, one_host_losses: list[float]) -> None:
    meet = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}"]
    with contextlib.contextmanager(start_in)(tmp_path) as start:
        runs = [start(1, torchrun=meet, run_folder=tmp_path / "run", training__steps=3) for _ in range(2)]
        assert [run.process.wait(timeout=200) for run in runs] == [0, 0], output(runs)
    assert losses_in(tmp_path / "run") == one_host_losses


@pytest.mark.slow
def test_the_slurm_script(tmp_path: Path, one_host_losses: list[float]) -> None:
    """With two commands in Slurm's place: all that the script asks of Slurm is a process on each node."""
    stand_in = tmp_path / "bin"
    stand_in.mkdir()
    (stand_in / "scontrol").write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames node[0-1]" ] && printf "localhost\\nnode1\\n"\n'
    )
    (stand_in / "srun").write_text(
        '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\n"$@" & first=$!\n"$@" && wait $first\n'
    )
    for file in stand_in.iterdir():
        file.chmod(0o755)
    config = tmp_path / "three.toml"
    config.write_text("[training]\nsteps = 3\n")
    slurm = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": str(free_port()),
        "PATH": f"{stand_in}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CONFIG_FILE": str(config),
        "NGPU": "1",
    }
    options = [f"--{key}={value}" for key, value in TINY.items() if key != "training.steps"]
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "multinode.slurm"), *options, f"--job.dump_folder={tmp_path / 'run'}"],
        env=environment(**slurm),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert losses_in(tmp_path / "run") == one_host_losses


# Runs its arguments in two network namespaces, joined by a cable, with different host names; then prints both statuses.
# The cable is cut after $CUT seconds.
NAMESPACES = """
set -eu
hostname alpha
unshare --net --uts sleep 1000 & other=$!
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.1; done
beta() { nsenter --target $other --net --uts "$@"; }
ip link add cable type veth peer name cable2 netns $other
ip address add 10.77.0.1/24 dev cable
ip link set cable up
ip link set lo up
beta hostname beta
beta ip address add 10.77.0.2/24 dev cable2
beta ip link set cable2 up
beta ip link set lo up
[ $# -gt 0 ] || { kill $other; exit; }
beta "$@" > beta.txt 2>&1 & b=$!
"$@" > alpha.txt 2>&1 & a=$!
if [ -n "${CUT:-}" ]; then
    until grep -q "step:  2" alpha.txt beta.txt; do sleep 0.1; done
    ip link delete cable
fi
status=0; wait $a || status=$?; echo $status
status=0; wait $b || status=$?; echo $status
kill $other
"""


def in_namespaces(folder: Path, given: list[str], **env: str) -> list[str]:
    done = subprocess.run(
        ["unshare", "--map-root-user", "--net", "--uts", "bash", "-c", NAMESPACES, "bash", *given],
        env=environment(NNODES="2", NGPU="1", RDZV_ENDPOINT="10.77.0.1:29500", **env),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def namespaces(tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        in_namespaces(tmp_path_factory.mktemp("namespaces"), [])
    except (OSError, AssertionError) as e:
        pytest.skip(f"this machine does not let its users make network namespaces: {e}")


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_hosts_on_a_network(tmp_path: Path, one_host_losses: list[float]) -> None:
    assert in_namespaces(tmp_path, command(tmp_path / "run", {})) == ["0", "0"], (tmp_path / "alpha.txt").read_text()
    assert losses_in(tmp_path / "run") == one_host_losses


@pytest.mark.long  # a minute of timeouts
@pytest.mark.usefixtures("namespaces")
def test_hosts_that_lose_their_network_end_in_time(tmp_path: Path) -> None:
    """No connection is closed: each host must find out by itself."""
    limits = {"comm.train_timeout_seconds": 5, "comm.init_timeout_seconds": 20, "training.steps": 100000}
    assert in_namespaces(tmp_path, command(tmp_path / "run", limits), CUT="1") == ["1", "1"]
    for log in ("alpha.txt", "beta.txt"):
        assert "Timed out" in (tmp_path / log).read_text()
        assert "titanlite/launch/launcher.py" not in (tmp_path / log).read_text()
