"""The trainer as its users meet it: whole runs of the real command."""

from __future__ import annotations

import json
import re
import resource
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.runs import LITTLE, checkpoints, command, environment
from titanlite.config import load_config

# A converter that makes rank ``RANK`` compute a loss of ``VALUE`` at step ``STEP``.
POISON = """
import os
from titanlite.converters import register_converter

@register_converter("poison")
class Poison:
    def __init__(self, config, mesh):
        self.calls = 0
    def convert(self, model):
        model.register_forward_hook(self.hook)
        return "poisoned"
    def hook(self, model, inputs, logits):
        self.calls += 1
        if self.calls == int(os.environ["STEP"]) and os.environ.get("RANK", "0") == os.environ["BAD_RANK"]:
            return logits * float(os.environ["VALUE"])
    def post_optimizer_hook(self, model):
        pass
"""


def test_the_run_folder_describes_the_run(train: Any) -> None:
    run = train(metrics__enable_tensorboard="true", training__steps=5, metrics__log_freq=2)
    assert run.status == 0, run.output
    rows = run.rows()
    assert [row["step"] for row in rows] == [1, 2, 4, 5]
    assert rows[-1]["tokens_seen"] == 5 * 4 * 32
    assert rows[0]["loss"] == pytest.approx(8.1, abs=0.3)  # about ln(2048) plus the spread of the output projection
    events = EventAccumulator(str(next((run.folder / "tb").iterdir())))
    events.Reload()
    assert [e.step for e in events.Scalars("loss_metrics/global_avg_loss")] == [1, 2, 4, 5]
    assert [e.value for e in events.Scalars("lr")] == pytest.approx([row["lr"] for row in rows])


def test_the_effective_configuration_runs_again_to_the_same_losses(train: Any, tmp_path: Path) -> None:
    drawn = train(name="drawn", training__deterministic="true", training__seed="none")
    assert drawn.status == 0, drawn.output
    config = load_config([], str(drawn.folder / "config.toml"))
    assert config.training.seed is not None
    assert config.training.seq_len == 32
    again = train(
        name="again", env={"CONFIG_FILE": str(drawn.folder / "config.toml")}, training__seed=config.training.seed
    )
    assert again.losses() == drawn.losses()  # JSON keeps every bit of a float


@pytest.mark.parametrize("ngpu", [1, 2])
def test_deterministic_runs_are_byte_identical(train: Any, ngpu: int) -> None:
    runs = [train(ngpu, name=f"run{i}", training__deterministic="true", training__steps=6) for i in range(2)]
    texts = [
        re.findall(r'"loss": [^,]+, "max_loss": [^,]+, "grad_norm": [^,]+', (r.folder / "metrics.jsonl").read_text())
        for r in runs
    ]
    assert len(texts[0]) == 6
    assert texts[0] == texts[1]


def test_other_seeds_give_other_losses(train: Any) -> None:
    assert train(name="a", training__seed=1).losses() != train(name="b", training__seed=2).losses()


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpoint__mode": "full"},
        {"activation_checkpoint__mode": "selective", "activation_checkpoint__selective_ac_option": "2"},
        {"activation_checkpoint__mode": "selective", "activation_checkpoint__selective_ac_option": "op"},
    ],
    ids=["full", "selective 2", "selective op"],
)
def test_activation_checkpointing_changes_no_bit(train: Any, options: dict[str, Any]) -> None:
    plain = train(name="plain", training__deterministic="true")
    other = train(name="other", training__deterministic="true", **options)
    assert other.status == 0, other.output
    assert other.losses() == plain.losses()
    assert f"activation checkpointing  {options['activation_checkpoint__mode']}" in other.output


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", *(pytest.param(m, marks=pytest.mark.long) for m in ("full", "selective"))])
def test_compiled_blocks_train_alike(train: Any, mode: str) -> None:
    ac = {"activation_checkpoint__mode": mode, "activation_checkpoint__selective_ac_option": "op"}
    common = {**LITTLE, "training__mixed_precision_param": "float32", "training__steps": 5, **ac}
    eager = train(name="eager", **common)
    compiled = train(name="compiled", training__compile="true", timeout=600, **common)
    assert compiled.status == 0, compiled.output
    assert compiled.losses() == pytest.approx(eager.losses(), rel=1e-5)
    assert "2 blocks, inductor" in compiled.output


@pytest.mark.slow
def test_a_converter_is_pluggable(train: Any) -> None:
    common = {**LITTLE, "training__mixed_precision_param": "float32", "training__steps": 5}
    plain = train(name="plain", **common)
    fused = train(name="fused", model__converters="fused_rmsnorm", timeout=600, **common)
    assert fused.status == 0, fused.output
    assert "5 RMSNorm layers fused" in fused.output
    assert fused.losses() == pytest.approx(plain.losses(), rel=1e-5)
    compiled = re.compile(r"compiled \d+ graph")  # it is another kernel
    assert compiled.search(fused.output)
    assert not compiled.search(plain.output)


@pytest.mark.parametrize(("ngpu", "bad_rank", "value"), [(1, 0, "nan"), (2, 1, "inf"), (2, 0, "nan")])
def test_a_loss_that_is_not_finite_stops_the_run(
    train: Any, tmp_path: Path, ngpu: int, bad_rank: int, value: str
) -> None:
    (tmp_path / "poison.py").write_text(POISON)
    run = train(
        ngpu,
        env={"STEP": "4", "VALUE": value, "BAD_RANK": str(bad_rank)},
        experimental__custom_import="poison",
        model__converters="poison",
        training__steps=10,
    )
    assert run.status == 1
    assert run.output.count("titanlite: error:") == 1
    assert f"step 4, rank {bad_rank}: loss nan" in run.output  # infinite logits too: infinity minus infinity
    assert "Traceback" not in run.output
    rows = run.rows()
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert (
        f"loss {rows[-1]['max_loss']:.4f}" in run.output
        or f"grad_norm {rows[-1]['grad_norm']:.4f} at step 3" in run.output
    )


def test_a_loss_that_is_not_finite_can_be_skipped(train: Any, tmp_path: Path) -> None:
    (tmp_path / "poison.py").write_text(POISON)
    run = train(
        env={"STEP": "4", "VALUE": "nan", "BAD_RANK": "0"},
        experimental__custom_import="poison",
        model__converters="poison",
        training__steps=6,
        training__on_bad_step="skip",
        metrics__enable_tensorboard="true",
    )
    assert run.status == 0, run.output
    assert "WARNING - step 4 skipped: loss nan is not finite (skipped 1, 1 in a row)" in run.output
    assert re.search(r"step:  4  loss:     nan  grad_norm:     nan", run.output)
    assert re.search(r"skipped steps +1\n", run.output)
    assert [row["loss"] is None for row in run.rows()] == [step == 4 for step in range(1, 7)]
    assert [row["skipped_steps"] for row in run.rows()] == [0, 0, 0, 1, 1, 1]
    events = EventAccumulator(str(next((run.folder / "tb").iterdir()))).Reload()
    assert [e.step for e in events.Scalars("loss_metrics/global_avg_loss")] == [1, 2, 3, 5, 6]
    assert [e.value for e in events.Scalars("skipped_steps")] == [0, 0, 0, 1, 1, 1]


def test_an_earlier_run_is_set_aside_not_mixed(train: Any) -> None:
    first = train(training__steps=2).rows()
    run = train(training__steps=4)
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4]
    (kept,) = run.folder.glob("earlier/*/metrics.jsonl")
    assert [json.loads(line) for line in kept.read_text().splitlines()] == first


def test_bad_input_leaves_an_earlier_run_alone(train: Any) -> None:
    train(training__steps=2)
    assert train(model__converters="nothing").status == 2
    run = train(training__dataset="nothing")
    assert run.status == 2
    assert len(run.rows()) == 2
    assert not (run.folder / "earlier").exists()


def test_log_rank_chooses_who_speaks(train: Any) -> None:
    run = train(2, env={"LOG_RANK": "1"}, metrics__enable_tensorboard="true", metrics__save_for_all_ranks="true")
    assert "[rank1]:[titan]" in run.output
    assert "[rank0]:[titan]" not in run.output
    assert {p.name for p in (run.folder / "tb").glob("*/*")} == {"rank_0", "rank_1"}
    assert train(env={"LOG_RANK": "x"}).status == 2


NOISY = """
import logging, os, warnings
import torch
from titanlite.converters import register_converter

@register_converter("noisy")
class Noisy:
    def __init__(self, config, mesh): pass
    def convert(self, model):
        rank = os.environ.get("RANK", "0")
        warnings.warn("a warning of Python")
        logging.getLogger("a library").warning("a warning of a library")
        for _ in range(2):
            logging.getLogger("a library").warning("a warning of rank %s", rank)
        torch.searchsorted(torch.arange(8.)[::2], torch.arange(4.))
        logging.getLogger("a library").error("an error")
        return "noisy"
    def post_optimizer_hook(self, model): pass
"""


def test_a_warning_of_all_ranks_is_shown_once(train: Any, tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(NOISY)
    options = {"training__local_batch_size": 2, "model__converters": "noisy", "experimental__custom_import": "noisy"}
    run = train(2, training__steps=2, **options)
    assert run.status == 0, run.output
    for text in ("a warning of Python", "a warning of a library", "boundary tensor is non-contiguous", "warmup_steps"):
        assert len([line for line in run.output.splitlines() if text in line]) == 1, text
    for rank in (0, 1):
        assert run.output.count(f"a warning of rank {rank}") == 2
    assert run.output.count("an error") == 2


def test_header_and_summary_say_what_matters(train: Any) -> None:
    run = train(metrics__enable_tensorboard="true", job__description="what this is", training__global_batch_size=8)
    header, _, rest = run.output.partition("step:  1")
    for part in ("what this is", "CPU", "bfloat16", "parameters", "256 = 8 sequences x 32", "flops per token", "GiB"):
        assert part in header, part
    for part in (
        "training finished",
        "1 to 3 of 3",
        "tokens",
        "median tps",
        "peak memory",
        "tensorboard.main --logdir",
        "config.toml ",
    ):
        assert part in rest, part


@pytest.mark.slow
def test_a_run_that_unlearns_says_so_also_when_it_is_continued(train: Any) -> None:
    options = {
        **checkpoints(4),
        "optimizer__lr": 3,
        "optimizer__weight_decay": 0,
        "metrics__log_freq": 4,
        "lr_scheduler__warmup_steps": 0,
    }
    first = train(training__steps=6, **options)
    assert first.status == 0, first.output
    second = train(training__steps=7, **options)
    assert "7 to 7 of 7" in second.output
    for run in (first, second):
        assert "training finished, and THE LOSS IS ABOVE WHERE IT BEGAN" in run.output
        assert f"above the {run.losses()[0]:.4f} of step 1" in run.output
    assert run.losses()[0] < 9 < run.losses()[-1]
    good = train(name="good", training__steps=6, optimizer__lr=1e-3, lr_scheduler__warmup_steps=1)
    assert "training finished\n" in good.output


def test_documents_the_gc_and_prints_the_configuration(train: Any) -> None:
    run = train(
        training__gc_freq=2, training__gc_debug="true", job__print_args="true", model__print_after_conversion="true"
    )
    assert "garbage collection at step 2" in run.output
    assert "[training]\n" in run.output
    assert "Block" in run.output


def test_the_rotary_table_stays_in_float32_under_mixed_precision(train: Any, tmp_path: Path) -> None:
    (tmp_path / "spy.py").write_text(
        """
from titanlite.converters import register_converter

@register_converter("spy")
class Spy:
    def __init__(self, config, mesh): pass
    def convert(self, built):
        def look(block, args):
            print("SEEN", args[0].dtype, args[1].dtype)
        # Inside the block, so after FSDP's own hook has cast what it casts.
        built.layers["1"].attention.register_forward_pre_hook(look)
        return "watched"
    def post_optimizer_hook(self, model): pass
"""
    )
    run = train(experimental__custom_import="spy", model__converters="spy", training__steps=1)
    assert run.status == 0, run.output
    seen = [line for line in run.output.splitlines() if line.startswith("SEEN")]
    assert seen == ["SEEN torch.bfloat16 torch.float32"]


def test_a_tied_model_trains_sharded_as_whole(train: Any, tmp_path: Path) -> None:
    (tmp_path / "tied.py").write_text(
        """
from dataclasses import replace
from titanlite.models.llama3.spec import FLAVORS
FLAVORS["tied"] = replace(FLAVORS["debugmodel"], n_layers=2, n_kv_heads=4, tie_embeddings=True)
"""
    )
    common = {
        "experimental__custom_import": "tied",
        "model__flavor": "tied",
        "training__mixed_precision_param": "float32",
        "training__global_batch_size": 4,
    }
    one = train(1, name="one", training__local_batch_size=4, **common)
    two = train(2, name="two", training__local_batch_size=2, **common)
    assert two.status == 0, two.output
    assert two.losses() == pytest.approx(one.losses(), rel=1e-5)


@pytest.mark.slow
def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path: Path) -> None:
    for number, redirect in enumerate(("| head -n 1", ">&-")):
        folder = tmp_path / f"run{number}"
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {shlex.join(map(str, command(folder, {})))} {redirect}"],
            env=environment(NGPU="1"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert (folder / "metrics.jsonl").read_text().count("\n") == 3


def test_a_models_folder_of_the_users_own_hides_nothing(train: Any, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    (tmp_path / "models" / "something.py").touch()
    run = train(training__steps=1)
    assert run.status == 0, run.output
    assert "llama3, mistral" in train(model__name="something").output


@pytest.mark.parametrize("ngpu", [1, 2])
def test_what_the_operating_system_refuses_is_one_message(train: Any, tmp_path: Path, ngpu: int) -> None:
    train(training__steps=1)
    (tmp_path / "run" / "earlier").touch()
    run = train(ngpu)
    assert run.status == 2
    assert run.output.count("titanlite: error:") == 1
    assert "earlier" in run.output
    assert "Traceback" not in run.output


@pytest.mark.slow
def test_a_full_disk_does_not_stop_the_run_but_is_an_error_at_its_end(tmp_path: Path) -> None:
    options = {"training.steps": 40, "metrics.enable_tensorboard": "true"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command(tmp_path / "run", options), env=environment(NGPU="1"), **pipes) as run:
        rows = tmp_path / "run" / "metrics.jsonl"
        while not (rows.exists() and rows.read_text()):
            assert run.poll() is None
            time.sleep(0.05)
        resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (rows.stat().st_size,) * 2)  # from now on files do not grow
        out, err = run.communicate(timeout=100)
    assert run.returncode == 1, out
    assert "metrics.jsonl CANNOT BE WRITTEN" in out
    assert "step: 40 " in out
    assert "TENSORBOARD'S FILES CANNOT BE WRITTEN" in out
    assert re.search(r"the run has ended, but .*metrics.jsonl lacks .*; .*tb\S* lacks the rows", err)
    assert err.count("Traceback") == 1  # of TensorBoard's own thread
