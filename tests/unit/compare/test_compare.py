"""``titanlite compare``: the runs that it finds, what it says of them, and what it writes."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.runs import environment
from tests.support.synthetic_runs import losses, write_run
from titanlite.commands import compare as command
from titanlite.compare.comparison import Comparison, compare
from titanlite.compare.plot import highest_loss
from titanlite.compare.text import main_sentences
from titanlite.config.run_changes import keep_changes


def two_runs(tmp_path: Path, percent: float = -1.0, **other: Any) -> Comparison:
    first, second = losses(percent)
    paths = [write_run(tmp_path / "first", first), write_run(tmp_path / "second", second, **other)]
    return compare(paths)


@pytest.mark.parametrize(("percent", "verdict"), [(-1.0, "lower"), (1.0, "higher"), (0.0, "within the noise")])
def test_the_verdict(percent: float, verdict: str, tmp_path: Path) -> None:
    comparison = two_runs(tmp_path, percent)
    (run,) = (run for run in comparison.runs if run is not comparison.baseline)
    for at in ("steps", "tokens"):
        d = comparison.difference(run, "loss", at)
        assert d is not None
        assert d.verdict == verdict
        assert d.low_percent is not None
        assert d.high_percent is not None
        assert d.low_percent <= percent <= d.high_percent
        assert d.difference == pytest.approx(percent / 100 * 2.97, abs=0.01)
        assert d.difference == pytest.approx(d.difference_percent / 100 * 2.97, rel=0.05)
    assert {"lower": "lower loss", "higher": "higher loss"}.get(verdict, verdict) in comparison.verdicts["second"]


KNOWN = "if their content differs, is not known"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"content": "d" * 32}, ["other data", "content of the files", "cccccccc", "dddddddd"]),
        ({"content": "c" * 31 + "d"}, ["other data", "c" * 32, "c" * 31 + "d"]),
        ({"options": {"training": {"dataset": "c4"}}, "content": None}, ["other data", "training.dataset", '"c4"']),
        (
            {"options": {"training": {"dataset_path": "/x"}}, "content": None},
            ["other data: training.dataset_path", KNOWN],
        ),
        ({"options": {"data": {"packing": "examples"}}, "content": None}, ["other data", "data.packing"]),
        ({"options": {"training": {"seq_len": 512}}}, ["training.seq_len"]),
        ({"tokens_per_step": 2048}, ["other tokens per step", "2,048", "1,024"]),
        ({"tokenizer": "b" * 64}, ["other tokenizer"]),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[0],
)
def test_runs_that_do_not_compare_get_no_verdict(other: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    comparison = two_runs(tmp_path, **other)
    sentence = comparison.verdicts["second"]
    assert sentence.startswith("No verdict")
    assert all(word in sentence for word in words)
    assert {d.verdict for d in comparison.differences} == {"not comparable"}
    assert all(d.low is not None for d in comparison.differences)  # but how far they are apart is shown


def test_the_data_are_their_content(tmp_path: Path) -> None:
    """Not their place: a copy elsewhere is the same; an edited file under the same path was refused above."""
    elsewhere = two_runs(tmp_path / "1", options={"training": {"dataset": "text", "dataset_path": "/copy"}})
    assert elsewhere.verdicts["second"].startswith("second has a lower loss")
    assert "not known" not in elsewhere.verdicts["second"]
    unknown = two_runs(tmp_path / "2", content=None).verdicts["second"]
    assert "second has a lower loss" in unknown
    assert "It is not known if they have the same content in the files of their data" in unknown


def test_without_its_copy_the_path_of_the_tokenizer_counts(tmp_path: Path) -> None:
    first, second = losses(-1)
    options = [{"model": {"tokenizer_path": f"/{name}"}} for name in ("x", "x", "y")]
    paths = [write_run(tmp_path / f"{i}", first if i else second, options[i]) for i in range(3)]
    for path in paths:
        (path / "tokenizer" / "tokenizer_identity.json").unlink()
    verdicts = compare(paths).verdicts
    assert "higher loss" in verdicts["1"]
    assert "not known" not in verdicts["1"]
    assert "other tokenizer" in verdicts["2"]


@pytest.mark.parametrize("options", [{"optimizer": {"lr": 0.1}}, {"training": {"steps": 7}}, {"job": {"name": "x"}}])
def test_other_options_do_compare(options: dict[str, Any], tmp_path: Path) -> None:
    assert two_runs(tmp_path, options=options).reasons == {}


def test_runs_that_chose_the_same_do_not_differ_by_its_reason(tmp_path: Path) -> None:
    """Such as the times of the kernels that a run has chosen from."""
    first, second = losses(0)
    chosen = ("triton: took 1.5 ms", "triton: took 1.6 ms", "inductor: took 1.4 ms")
    paths = [
        write_run(tmp_path / str(i), loss, {"float8": {"kernels_chosen": choice}})
        for i, (loss, choice) in enumerate(zip((first, second, second), chosen, strict=True))
    ]
    assert "float8.kernels_chosen" not in compare(paths[:2]).options
    assert compare(paths).options["float8.kernels_chosen"] == ["triton", "triton", "inductor"]


def test_too_few_rows_get_no_verdict(tmp_path: Path) -> None:
    comparison = compare([write_run(tmp_path / name, np.full(6, 3.0 + i)) for i, name in enumerate("ab")])
    assert comparison.verdicts["b"].startswith("No verdict")
    assert {(d.verdict, d.low, d.difference) for d in comparison.differences} == {("too few rows", None, 1.0)}


def test_few_rows_that_show_no_difference_are_said(tmp_path: Path) -> None:
    """A first run logs 21 steps: the interval of so few is too wide to call a difference of some percent one."""
    (first, second), (long_first, long_second) = losses(0, steps=21), losses(0)
    pairs = ("few", first, second), ("many", long_first, long_second), ("apart", first, 9 * second)
    runs = {n: [write_run(tmp_path / n / x, y) for x, y in zip("ab", pair, strict=True)] for n, *pair in pairs}
    verdicts = {name: compare(folders).verdicts["b"] for name, folders in runs.items()}
    advice = "The interval is wide because it is of 10 logged steps alone"
    assert [name for name, verdict in verdicts.items() if advice in verdict] == ["few"]
    assert "metrics.log_freq" not in verdicts["few"]
    seldom = [write_run(tmp_path / f"seldom {x}", y, log_freq=10) for x, y in zip("ab", (first, second), strict=True)]
    assert "or log every step (metrics.log_freq=1)" in compare(seldom).verdicts["seldom b"]


def test_options_that_a_run_had_before_are_said(tmp_path: Path) -> None:
    """Else its name and the table would explain all of its steps by the options of the last ones."""
    first, second = losses(0)
    a, b = (write_run(tmp_path / name, values) for name, values in (("a", first), ("b", second)))
    keep_changes(b, 300, {"optimizer.lr": ("0.003", "0.001"), "training.steps": ("300", "600")})
    sentence = "b had optimizer.lr = 0.003, training.steps = 300 in steps 1 to 300."
    assert sentence in compare([a, b]).verdicts["b"]
    assert sentence in compare([b, a]).verdicts["a"]
    keep_changes(b, 400, {"optimizer.lr": ("0.001", "0.01")})
    assert " in steps 1 to 300; optimizer.lr = 0.001 in steps 301 to 400." in compare([a, b]).verdicts["b"]
    for step in range(1, 5):
        keep_changes(b, 300 + step, {"optimizer.lr": (f"{step}", f"{step + 1}")})
    verdict = compare([a, b]).verdicts["b"]
    assert "b went on several times with other options, the last time after step 304." in verdict
    assert "in steps" not in verdict


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_text("[training")])
def test_a_lost_configuration_is_said(damage: Any, tmp_path: Path) -> None:
    first, second = losses(0)
    a, b = (write_run(tmp_path / name, values) for name, values in (("a", first), ("b", second)))
    damage(b / "config.toml")
    file = b / "config.toml"
    assert compare([a, b]).notes == [f"The options of b are not known: {file} is not there, or is no TOML."]


def test_no_step_in_common(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", np.arange(20.0), log_freq=2)
    (tmp_path / "a" / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": 2 * i + 1, "loss": 3.0}) + "\n" for i in range(40))
    )
    comparison = compare([a, write_run(tmp_path / "b", np.arange(20.0), log_freq=2)])
    assert "no step in common" in comparison.verdicts["b"]


def test_equal_tokens_pair_other_steps(tmp_path: Path) -> None:
    """A run with twice the tokens in a step, whose loss is the same function of tokens."""
    curve = 2 + 8 * np.arange(1, 2001) ** -0.5
    paths = [write_run(tmp_path / "a", curve), write_run(tmp_path / "b", curve[1::2], tokens_per_step=2048)]
    comparison = compare(paths)
    steps, tokens = (comparison.difference(comparison.runs[1], "loss", at) for at in ("steps", "tokens"))
    assert steps is not None
    assert tokens is not None
    assert tokens.difference == pytest.approx(0, abs=1e-6)
    assert steps.difference < -0.05
    assert (tokens.first, tokens.last) == (2048 * 751, 2048 * 1000)


VALIDATION = {"validation": {"enable": True, "dataset": "text", "dataset_path": "/x"}}
ONE_CURVE = np.linspace(4, 3, 60)


def validating(tmp_path: Path, percent: float = 0.0, above: float = 0.1, count: int = 60, **second: Any) -> Comparison:
    """Two runs, the second of which is ``above`` the first in validation."""
    first, other = losses(percent)
    arguments = {"options": VALIDATION, "validation": ONE_CURVE[:count] + above} | second
    paths = [
        write_run(tmp_path / "a", first, VALIDATION, validation=ONE_CURVE[:count]),
        write_run(tmp_path / "b", other, **arguments),
    ]
    return compare(paths)


def verdicts_on(comparison: Comparison) -> dict[str, str]:
    return {d.metric: d.verdict for d in comparison.differences if d.at == "steps"}


def test_validation_is_compared(tmp_path: Path) -> None:
    comparison = validating(tmp_path)
    for at in ("steps", "tokens"):
        d = comparison.difference(comparison.runs[1], "validation_loss", at)
        assert d is not None
        assert (d.difference, d.verdict) == (pytest.approx(0.1), "higher")
    assert "The validation loss of b is higher, by 3." in comparison.verdicts["b"]


def test_validation_on_other_text_has_no_verdict(tmp_path: Path) -> None:
    other = validating(tmp_path / "1", validation_content="w" * 32)
    assert verdicts_on(other) == {
        "loss": "within the noise",
        "validation_loss": "not comparable",
        "bits_per_byte": "not comparable",
    }
    assert "Their validation losses do not compare: other validation text: content of the files" in other.verdicts["b"]
    assert "hold out" not in other.verdicts["b"]
    elsewhere = {"validation": {"enable": True, "dataset": "text", "dataset_path": "/y"}}
    by_path = validating(tmp_path / "2", options=elsewhere, content=None).verdicts["b"]
    assert "validation.dataset_path" in by_path
    assert KNOWN in by_path
    assert verdicts_on(validating(tmp_path / "3", options=elsewhere))["validation_loss"] == "higher"
    more = validating(tmp_path / "4", validation_tokens=8192)
    assert verdicts_on(more)["validation_loss"] == "not comparable"
    assert "(8,192 tokens, not 4,096; raise validation.steps until both read the whole text" in more.verdicts["b"]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"tokens_per_step": 2048}, "global_batch_size (8, not 4; other batches read other documents"),
        ({"num_shards": 2}, "num_shards (2, not 1)"),
        ({"tokens_per_step": 2048, "content": None}, "other tokens per step (2,048, not 1,024)"),
    ],
    ids=["batch", "shards", "batch of an older folder"],
)
def test_validation_with_other_batches_has_no_verdict(other: dict[str, Any], words: str, tmp_path: Path) -> None:
    """They decide which documents are the first of each shard, which are all that a validation reads."""
    comparison = validating(tmp_path, **other)
    verdicts = verdicts_on(comparison)
    assert (verdicts["validation_loss"], verdicts["bits_per_byte"]) == ("not comparable", "not comparable")
    assert f"{words}" in comparison.verdicts["b"].partition("Their validation losses do not compare")[2]
    assert (verdicts["loss"] == "not comparable") == ("tokens_per_step" in other)


def test_each_metric_is_judged_by_its_own_facts(tmp_path: Path) -> None:
    """Validation losses compare after training on other text; with another tokenizer, bits per byte do."""
    loss, validation, bits = "loss", "validation_loss", "bits_per_byte"
    text = validating(tmp_path / "1", content="d" * 32)
    assert verdicts_on(text) == {loss: "not comparable", validation: "higher", bits: "higher"}
    assert "The validation loss of b is higher" in text.verdicts["b"]
    tokenizer = validating(tmp_path / "2", tokenizer="b" * 64)
    assert verdicts_on(tokenizer) == {loss: "not comparable", validation: "not comparable", bits: "higher"}
    assert "The validation in bits per byte of b is higher" in tokenizer.verdicts["b"]


def test_validation_at_equal_tokens_pairs_other_steps(tmp_path: Path) -> None:
    """A run with twice the tokens in a step, whose validation loss is the same function of tokens."""
    curve = 2 + 8 * np.arange(1, 2001) ** -0.5
    of_tokens = 2 + 8 * np.arange(10, 2001, 10) ** -0.5
    paths = [
        write_run(tmp_path / "a", curve, VALIDATION, validation=of_tokens),
        write_run(tmp_path / "b", curve[1::2], VALIDATION, tokens_per_step=2048, validation=of_tokens[1::2]),
    ]
    d = compare(paths).difference(compare(paths).runs[1], "validation_loss", "tokens")
    assert d is not None
    assert (d.difference, d.verdict) == (pytest.approx(0, abs=1e-9), "not comparable")


@pytest.mark.parametrize(("count", "words"), [(60, "95% interval"), (8, "fewer than")])
def test_a_validation_that_contradicts_is_named(count: int, words: str, tmp_path: Path) -> None:
    """As where a run has learned its training text by heart; also with too few validations for an interval."""
    sentence = validating(tmp_path, percent=-2.0, above=0.5, count=count).verdicts["b"]
    assert sentence.startswith("b has a lower loss than a")
    assert re.search(r"But the (last )?validation loss of b is higher", sentence)
    assert words in sentence


def test_documents_that_one_run_holds_out_are_said(tmp_path: Path) -> None:
    first, second = losses(0)
    paths = [write_run(tmp_path / "a", first), write_run(tmp_path / "b", second, {"validation": {"enable": True}})]
    assert "They hold out other documents for validation" in compare(paths).verdicts["b"]


@pytest.mark.parametrize("diverged", ["a", "b"])
def test_a_run_that_ends_without_a_finite_loss_does_not_win(
    diverged: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {name: np.array(v) for name, v in zip("ab", losses(-2))}
    values[diverged][200:] = np.nan
    values["a" if diverged == "b" else "b"][100] = np.nan  # a single step is no divergence
    comparison = compare([write_run(tmp_path / name, v) for name, v in values.items()])
    assert comparison.verdicts["b"] == f"No verdict: there is no finite loss in {diverged} from step 201 on."
    assert {d.verdict for d in comparison.differences} == {"diverged"}
    summaries = {run["run"]: run["loss"] for run in json.loads(comparison.json())["runs"]}
    assert [name for name, loss in summaries.items() if loss is None] == [diverged]


@pytest.mark.parametrize("rows", [1, 100])
def test_the_end_of_a_run_that_does_not_compare_is_said(rows: int, tmp_path: Path) -> None:
    first, second = losses(-2)
    second[-rows:] = np.nan
    paths = [write_run(tmp_path / "a", first), write_run(tmp_path / "b", second, content="d" * 32)]
    comparison = compare(paths)
    sentence = comparison.verdicts["b"]
    assert sentence.startswith("No verdict: b and a do not compare")
    ends = "Also, there is no finite loss in b from step 501 on." if rows > 1 else "step of b had no finite loss."
    assert sentence.endswith(ends)
    assert {d.verdict for d in comparison.differences} == {"diverged" if rows > 1 else "not comparable"}


def test_equal_validations_contradict_nothing(tmp_path: Path) -> None:
    comparison = validating(tmp_path, percent=-2.0, above=0.0, count=8)
    sentences = comparison.sentences["b"]
    assert sentences.training.startswith("b has a lower loss than a")
    assert sentences.validation.startswith("The last validation loss is the same")
    assert not sentences.contradicts


def test_a_skipped_step_at_the_end_is_no_divergence(tmp_path: Path) -> None:
    first, second = losses(-1)
    one, logged_seldom = second.copy(), second.copy()
    one[-1] = logged_seldom[-1] = np.nan
    paths = [write_run(tmp_path / name, v) for name, v in (("a", first), ("b", one), ("c", logged_seldom))]
    rows = [json.loads(line) for line in (paths[2] / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["skipped_steps"] = 10  # of the steps since the row before
    (paths[2] / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    comparison = compare(paths)
    assert comparison.verdicts["b"].startswith("b has a lower loss than a")
    assert "The last logged step of b had no finite loss." in comparison.verdicts["b"]
    assert comparison.runs[1].final_loss(comparison.last_share) is not None
    assert comparison.verdicts["c"] == "No verdict: there is no finite loss in c from step 600 on."


def test_final_losses_are_of_the_same_steps(tmp_path: Path) -> None:
    """Compare a run that logs every step with one that logs every tenth: the table must not contradict the verdict."""
    first, second = losses(-3)
    comparison = compare([write_run(tmp_path / "a", first), write_run(tmp_path / "b", second[9::10], log_freq=10)])
    assert "b has a lower loss" in comparison.verdicts["b"]
    often, seldom = (run["loss"] for run in json.loads(comparison.json())["runs"])
    assert often == pytest.approx(first[300:].mean())
    assert seldom == pytest.approx(second[309::10].mean())


def test_the_ends_of_a_short_and_a_long_run_are_not_compared(tmp_path: Path) -> None:
    first, second = losses(-1)
    paths = [write_run(tmp_path / "a", first), write_run(tmp_path / "b", second[:100])]
    assert "b ends at step 100, and a at step 600" in compare(paths).verdicts["b"]
    assert "ends at" not in two_runs(tmp_path / "of_one_length").verdicts["second"]


def test_a_copy_of_a_run_has_the_same_losses(tmp_path: Path) -> None:
    comparison = compare([write_run(tmp_path / name, losses(0)[0]) for name in "ab"])
    assert comparison.verdicts["b"] == "b and a have the same losses, steps 451 to 600."
    assert {d.verdict for d in comparison.differences} == {"within the noise"}


def test_one_run_is_called_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also if it is named twice; and that it diverged is said."""
    diverged = write_run(tmp_path / "a", np.where(np.arange(60) < 30, 3.0, np.nan))
    out, _ = run_command(capsys, diverged, diverged)
    assert "There is one run, a. Name another one" in out
    assert "no finite loss in a from step 31 on" in out
    assert "baseline" not in out


def test_the_first_step_counts_once(tmp_path: Path) -> None:
    """A run logs its first step, which compiles, and then every tenth."""
    folder = write_run(tmp_path / "a", np.full(5, 3.0), log_freq=10)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows.insert(0, rows[0] | {"step": 1, "step_time_s": 60.0})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (run,) = compare([folder]).runs
    assert run.last("hours") == pytest.approx((60 + 49 * 0.5) / 3600)


# ---- what is written


def run_command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    assert command.main([str(argument) for argument in arguments]) == 0
    out, err = capsys.readouterr()
    return out, err


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    first, second = losses(-1)
    hostile = {"job": {"name": "</script><b>\x1b[31m$x_$"}, "optimizer": {"name": "<img src=http://x.org/>"}}
    paths = [write_run(tmp_path / "a", first), write_run(tmp_path / "b", second, hostile, validation=np.ones(3))]
    (paths[1] / "sample.json").write_text(json.dumps({"prompt": "", "text": "import <os>\n"}))
    return paths


NUMBER, TEXT = (int, float), str
RUN_KEYS: dict[str, Any] = {
    **dict.fromkeys(("run", "path"), TEXT),
    **dict.fromkeys(("steps", "tokens", "skipped_steps"), int),
    **dict.fromkeys(("loss", "tps", "memory_gib", "hours"), float),
    **dict.fromkeys(("validation_loss", "bits_per_byte", "mfu"), (float, type(None))),
    "baseline": bool,
    "options": dict,
}
DIFFERENCE_KEYS: dict[str, Any] = {
    **dict.fromkeys(("run", "baseline", "metric", "at", "verdict"), TEXT),
    **dict.fromkeys(("difference", "difference_percent", "first", "last"), float),
    **dict.fromkeys(("low", "high", "low_percent", "high_percent"), (float, type(None))),
    "rows": int,
}


def test_json_is_one_object(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its keys and types are a contract."""
    options = {"optimizer": {"lr": 0.5}, "model": {"converters": ["float8"]}, "training": {"compile": True}}
    third = write_run(tmp_path / "c", losses(-1)[1], options)
    content = json.loads(run_command(capsys, *folders, third, "--json")[0])
    types = {"runs": list, "differences": list, "verdicts": dict, "not_comparable": dict, "notes": list}
    assert {key: type(value) for key, value in content.items()} == types | {"last_share": float}
    for entries, keys in (("runs", RUN_KEYS), ("differences", DIFFERENCE_KEYS)):
        for entry in content[entries]:
            assert entry.keys() == keys.keys()
            assert [key for key, value in entry.items() if not isinstance(value, keys[key])] == []
    first, second, changed = content["runs"]
    assert (first["run"], first["baseline"], second["baseline"]) == ("a", True, False)
    assert first["loss"] == pytest.approx(2.98, abs=0.02)
    assert content["last_share"] == 0.25
    d = content["differences"][0]
    assert (d["baseline"], d["metric"], d["at"], d["verdict"]) == ("a", "loss", "steps", "lower")
    values = {"optimizer.lr": 0.5, "model.converters": ["float8"], "training.compile": True, "optimizer.name": "AdamW"}
    assert changed["options"] == values


COLORED = re.compile(r"\x1b\[(?:\d;)*(?:3|4|9|10)\d")


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("kind", ["colored", "no color", "no terminal"])
def test_the_text_fits_the_terminal(
    width: int, kind: str, folders: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal, with NO_COLOR too, and where there is none."""
    monkeypatch.setenv("COLUMNS", f"{width}")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if kind != "no terminal":
        monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    if kind == "no color":
        monkeypatch.setenv("NO_COLOR", "1")
    out, _ = run_command(capsys, *folders)
    text = re.sub(r"\x1b\[[\d;]*m", "", out)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "\x1b" not in text
    assert "…" not in text
    assert ("\x1b[" in out) == (kind != "no terminal")  # bold is no colour
    assert bool(COLORED.search(out)) == (kind == "colored")
    assert any("⠒" <= c <= "⣿" for c in out) == (kind == "colored")
    assert "lower loss" in " ".join(text.split())
    assert "5m00s" in text  # the last column of the runs
    verdicts = text.partition("interval in %")[2].partition("options that differ")[0]
    assert re.search(r"\blower\b", verdicts)  # whole, however narrow its column
    assert "loss, steps" in verdicts or width >= 80


def test_a_terminal_that_is_too_narrow_ends_nothing(
    folders: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "5")
    run_command(capsys, *folders)


@pytest.fixture(scope="module")
def twenty(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The tenth run, the baseline, is neither among the best nor the worst; the last is on other data."""
    folder = tmp_path_factory.mktemp("twenty")
    first, _ = losses(0, steps=300)
    runs = []
    for number in range(20):
        higher = first + 0.05 * ((7 * number) % 20)
        options = {"optimizer": {"lr": number / 100}}
        runs.append(write_run(folder / f"run_{number}", higher, options, content=("d" if number == 19 else "c") * 32))
    return runs


def test_the_validations_of_many_runs_without_a_verdict_on_training_are_said(tmp_path: Path) -> None:
    first, _ = losses(0)
    paths = [
        write_run(tmp_path / name, first + 0.1 * i, VALIDATION, content=name * 32, validation=ONE_CURVE + 0.1 * i)
        for i, name in enumerate("abcde")
    ]
    sentences = main_sentences(compare(paths))
    for number, name in enumerate("bcde", 2):
        (sentence,) = (s for s in sentences if s.startswith(f"The validation loss of {name} is higher, by"))
        assert sentence.endswith(f"(Run {number}.)")


@pytest.mark.parametrize("width", [60, 100])
def test_many_runs_are_one_table_by_loss(
    width: int, twenty: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", f"{width}")
    out, _ = run_command(capsys, *twenty, "--baseline", twenty[10])
    lines = out.splitlines()
    assert "…" not in out
    assert max(map(len, lines)) <= width
    head = next(number for number, line in enumerate(lines) if line.split()[:3] == ["loss", "%", "interval"])
    table = [line.split() for line in lines[head + 1 :] if line.strip()]
    rows = [cells for cells in table if cells[0].isdigit()][:20]
    assert [int(cells[0]) for cells in rows] == [*range(1, 21)]
    values = [float(cells[1]) for cells in rows]
    assert values == sorted(values)
    assert "loss, tokens" not in out
    ours = [line for line in lines if "has a lower loss than" in line or "has a higher loss than" in line]
    assert len(ours) == 1
    assert "No verdict: run_19 and run_10 do not compare" in " ".join(out.split())
    curves = out[out.index("loss by step") :].partition("loss minus")[0].partition("\n")[2]
    assert {*re.sub(r"[\d,.]+ *$|^ *[\d.]+ ", "", curves, flags=re.M).split()[0]} <= {*"12345b"}


def test_many_runs_in_a_picture_and_in_json(
    twenty: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The drawn ones are the best and the baseline; the page has them all."""
    comparison = compare(twenty, str(twenty[10]))
    drawn = comparison.drawn()
    assert drawn[:5] == [0, 1, 2, 3, 4]
    assert comparison.runs[drawn[5]].name == "run_10"
    out, _ = run_command(capsys, *twenty, "--json", "--html", tmp_path / "p.html", "--picture", tmp_path / "p.png")
    content = json.loads(out)
    values = [run["loss"] for run in content["runs"]]
    assert values == sorted(values)
    page = (tmp_path / "p.html").read_text()
    assert page.count("<p class=") >= 19
    assert "<details>" in page


def test_a_run_that_blew_up_leaves_the_frame(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others are told apart: the picture's axis and the terminal's end at 1.5 times the first loss."""
    monkeypatch.setenv("COLUMNS", "80")
    first, second = losses(-1)
    blown = np.where(np.arange(600) < 300, second, 1e30)
    paths = [write_run(tmp_path / name, v) for name, v in (("a", first), ("b", second), ("c", blown))]
    lines = run_command(capsys, *paths)[0].splitlines()
    top = float(lines[lines.index("loss by step") + 1].split()[0])
    assert top == pytest.approx(1.5 * first[0], rel=0.01)
    assert max(map(len, lines)) <= 80
    assert "c has a higher loss than a, by 3.34e+31%" in " ".join(lines)
    assert highest_loss([np.array([np.nan])]) == np.inf
    assert highest_loss([np.array([np.nan, 2.0, 9.0]), np.array([1.0])]) == 3.0
    all_blown = [write_run(tmp_path / name, np.append(1.0, np.full(99, 1e30))) for name in "de"]
    run_command(capsys, *all_blown, "--picture", tmp_path / "p.png")


def test_numbers_name_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is longer than a terminal has columns is cut in one place only, and no table is torn by it."""
    few = losses(0)[0][:40]
    long = "debug_model-float8-rowwise-" * 4
    paths = [write_run(tmp_path / "a", few), write_run(tmp_path / "b", few, {"job": {"name": long}})]
    lines = run_command(capsys, *paths)[0].splitlines()
    (heads,) = (number for number, line in enumerate(lines) if line.split()[:2] == ["steps", "loss"])
    assert [line.split()[:2] for line in lines[heads + 1 : heads + 3]] == [["1", "40"], ["2", "40"]]
    assert any(line.startswith("1") and line.endswith("baseline") for line in lines[:heads])


class Outside(HTMLParser):
    """Collects elements, and everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        links = [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.fetched += [link for link in links if not link.startswith("data:")]


def test_the_page_needs_nothing_else(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "page.html"
    run_command(capsys, *folders, "--html", file)
    text = file.read_text()
    page = Outside()
    page.feed(text)
    assert page.fetched == []
    assert "url(" not in text
    assert "@import" not in text
    assert "img" not in page.elements  # what a run is called is text
    assert page.elements.count("script") == 2
    assert "import &lt;os&gt;" in text
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', text)
    assert data is not None
    content = json.loads(data[1])
    assert [len(run["loss"]) for run in content["runs"]] == [600, 600]
    assert content["runs"][1]["name"].startswith("</script>")


@pytest.mark.parametrize(("name", "begin"), [("p.png", b"\x89PNG"), ("p.svg", b"<?xml")])
def test_pictures(
    name: str, begin: bytes, folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_command(capsys, *folders, "--picture", tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begin)


@pytest.mark.parametrize(
    "option", [["--picture", "x.gif"], ["--picture", "no/x.png"], ["--html", "no/x.html"], ["--html", "torchtitan.log"]]
)
def test_files_that_cannot_be_written(
    option: list[str], folders: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders[0])
    assert command.main([*map(str, folders), *option]) == 2
    assert option[0] in capsys.readouterr().err
    assert not Path(option[1]).exists()


@pytest.mark.slow
@pytest.mark.alone
def test_twenty_runs_of_100000_rows_take_seconds(tmp_path: Path) -> None:
    """10 s and 1 GB, with the page and the picture; also while the last line is being written."""
    first = write_run(tmp_path / "runs" / "run_0", losses(0, steps=100_000)[0])
    with (first / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 100001, "lo')
    for number in range(1, 20):
        copy = tmp_path / "runs" / f"run_{number}"
        copy.mkdir()
        for name in ("metrics.jsonl", "config.toml"):
            (copy / name).hardlink_to(first / name)
    code = (
        "import sys; from titanlite.commands.compare import main; status = main(sys.argv[1:])\n"
        "print(*[line for line in open('/proc/self/status') if line.startswith('VmHWM')]); sys.exit(status)"
    )
    written = ["--html", tmp_path / "page.html", "--picture", tmp_path / "picture.png"]
    line = [sys.executable, "-c", code, tmp_path / "runs", *written]
    # It takes 4 to 5 s. Another program on the machine can double one run, so the fastest of up to three counts.
    tries: list[float] = []
    while len(tries) < 3 and min(tries, default=math.inf) >= 10:
        begin = time.perf_counter()
        done = subprocess.run(line, env=environment(), capture_output=True, text=True)
        tries.append(time.perf_counter() - begin)
        assert done.returncode == 0, done.stderr
        (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", done.stdout)
        assert int(peak) < 1 << 20
    assert min(tries) < 10, tries
