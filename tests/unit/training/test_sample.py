"""The sample that a finished run ends with."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from tests.unit.models.test_llama3 import SMALL, build
from titanlite.config import JobConfig, check_config, load_config
from titanlite.config.parallelism import Degrees
from titanlite.config.schema import Comm
from titanlite.data import load_tokenizer
from titanlite.distributed import runtime
from titanlite.distributed.mesh import build_mesh
from titanlite.errors import ConfigError
from titanlite.models.layers import Decoder
from titanlite.training import sample
from titanlite.training.sample import check_prompt, log_sample, printable

TOKENIZER = load_tokenizer()


@pytest.fixture(scope="module")
def here() -> Iterator[runtime.Runtime]:
    yield runtime.start_runtime(Comm())
    runtime.stop_runtime()


def config_of(options: dict[str, Any]) -> JobConfig:
    return load_config([f"--{key}={value}" for key, value in {"training.seq_len": 64, **options}.items()])


def logged(
    here: runtime.Runtime, caplog: pytest.LogCaptureFixture, model: nn.Module | None = None, **options: Any
) -> list[str]:
    """What is logged after a run with these options of [sample], and others in full."""
    named = {key.replace("__", ".") if "__" in key else f"sample.{key}": value for key, value in options.items()}
    config = config_of(named)
    degrees = Degrees(1, 1, config.parallelism.context_parallel_degree, 1, config.parallelism.pipeline_parallel_degree)
    mesh = replace(build_mesh(Degrees(1, 1, 1, 1, 1), "cpu"), degrees=degrees)
    with caplog.at_level(logging.INFO):
        log_sample([model or language_model()], TOKENIZER, config, mesh, here)
    messages = [f"{record.levelname} {record.getMessage()}" for record in caplog.records]
    begun = bool(messages) and messages[0].startswith("INFO writing a sample of")
    return messages[1:] if begun else messages  # what is said before it takes its time


def language_model() -> Decoder:
    return build(replace(SMALL, vocab_size=2048))


def test_it_continues_what_belongs_to_the_data(here: runtime.Runtime, caplog: pytest.LogCaptureFixture) -> None:
    (message,) = logged(here, caplog, max_new_tokens=20)
    head, *lines = message.split("\n")
    assert head == "INFO a sample of what it learned, from 'import' on:"
    assert lines[0].startswith("    import")
    assert len("".join(lines)) > 30


def test_other_data_begin_with_an_empty_page(here: runtime.Runtime, caplog: pytest.LogCaptureFixture) -> None:
    (message,) = logged(here, caplog, training__dataset="text", max_new_tokens=1)
    head, text = message.split("\n", 1)
    assert head == "INFO a sample of what it learned, from an empty page on:"
    assert len(text) < 4 + 20


def test_a_prompt_of_ones_own(here: runtime.Runtime, caplog: pytest.LogCaptureFixture) -> None:
    (message,) = logged(here, caplog, prompt="To be")
    assert message.startswith("INFO a sample of what it learned, from 'To be' on:\n    To be")


def test_it_fills_what_the_sequence_leaves(here: runtime.Runtime, caplog: pytest.LogCaptureFixture) -> None:
    prompt = "a b c d e f"
    ids = TOKENIZER.encode(prompt)
    (message,) = logged(here, caplog, training__seq_len=len(ids) + 2, prompt=prompt)
    assert message.startswith("INFO a sample")
    options = {"training.seq_len": len(ids) + 2, "sample.prompt": prompt}
    check_prompt(config_of(options), TOKENIZER)
    with pytest.raises(ConfigError, match=f"has {len(ids)} tokens, and training.seq_len = {len(ids) + 1} leaves no"):
        check_prompt(config_of({**options, "training.seq_len": len(ids) + 1}), TOKENIZER)
    check_prompt(config_of({**options, "training.seq_len": 2, "sample.enable": "false"}), TOKENIZER)
    caplog.clear()
    (message,) = logged(here, caplog, training__seq_len=2)  # of the default prompt, which nobody asked for
    assert message == "INFO no sample: training.seq_len = 2 leaves no room for one"


def test_it_can_be_switched_off(here: runtime.Runtime, caplog: pytest.LogCaptureFixture) -> None:
    assert logged(here, caplog, enable="false") == []


@pytest.mark.parametrize("dimension", ["pipeline", "context"])
def test_parts_of_a_model_write_nothing(
    here: runtime.Runtime, caplog: pytest.LogCaptureFixture, dimension: str
) -> None:
    options = {f"parallelism__{dimension}_parallel_degree": 2, "training__steps": 7, "job__dump_folder": "/runs/a"}
    (message,) = logged(here, caplog, **options)
    assert message == (
        f"INFO no sample under {dimension} parallelism; from a checkpoint: titanlite generate --checkpoint "
        "/runs/a/checkpoint/step-7 --prompt ... (which needs checkpoint.enable_checkpoint = true)"
    )
    caplog.clear()
    options |= {"checkpoint__enable_checkpoint": "true", "experimental__custom_import": "mine"}
    (message,) = logged(here, caplog, **options)
    assert message.endswith("step-7 --prompt ... --custom_import mine")


def test_a_large_model_writes_when_asked(
    here: runtime.Runtime, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = language_model()
    size = sum(param.numel() for param in model.parameters())
    monkeypatch.setattr(sample, "LARGE", size - 1)
    (message,) = logged(here, caplog, model)
    assert message.startswith(
        f"INFO no sample of {size:,} parameters unless sample.enable = true: each token would gather them all; from a "
        "checkpoint: titanlite generate --checkpoint outputs/checkpoint/step-10000"
    )
    caplog.clear()
    assert logged(here, caplog, model, enable="true")[0].startswith("INFO a sample")
    caplog.clear()
    monkeypatch.setattr(sample, "LARGE", size)
    assert logged(here, caplog, model)[0].startswith("INFO a sample")


@pytest.mark.parametrize("dimension", ["pipeline", "context"])
def test_to_ask_for_one_of_parts_is_refused(dimension: str) -> None:
    degree = f"--parallelism.{dimension}_parallel_degree=2"
    with pytest.raises(ConfigError, match=r"sample.enable = true \(the argument --sample.enable\): no process has"):
        check_config(load_config(["--sample.enable", degree]), 2)
    check_config(load_config([degree]), 2)


def test_a_model_that_diverged_spoils_no_run(here: runtime.Runtime, caplog: pytest.LogCaptureFixture) -> None:
    model = language_model()
    assert model.norm is not None
    nn.init.constant_(model.norm.weight, math.nan)
    (message,) = logged(here, caplog, model)
    assert message.startswith("WARNING no sample: the model's logits are not finite")


def test_what_a_console_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printable("a\n\tb é\x1b[2J\r") == "    a\n    \tb é\\x1b[2J\\r"
    monkeypatch.setattr("sys.stdout", open("/dev/null", "w", encoding="ascii"))  # noqa: SIM115
    assert printable("é�") == "    \\xe9\\ufffd"


@pytest.mark.slow
def test_a_finished_run_ends_with_one_and_trains_alike_without(train: Any) -> None:
    common = {"training__deterministic": "true", "training__steps": 4}
    shown = train(name="shown", sample__enable="true", **common)
    assert shown.status == 0, shown.output
    head, sample = shown.output.split("INFO - a sample of what it learned, from 'import' on:\n    import")
    assert "training finished" in head
    assert len(sample) > 20
    kept = json.loads((shown.folder / "sample.json").read_text(encoding="utf-8"))
    assert (kept["prompt"], printable(kept["text"])) == ("import", f"    import{sample.rstrip(chr(10))}")
    silent = train(name="silent", sample__enable="false", **common)
    assert "sample" not in silent.output
    assert shown.losses() == silent.losses()
