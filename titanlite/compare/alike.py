"""If two runs may be compared: by the facts on which each metric depends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from titanlite.compare.facts import DIGEST, GLOBAL_BATCH, HELD_OUT, SHARDS, Text, value_of
from titanlite.compare.runs import Run
from titanlite.errors import printable, shown

_TOKENIZER = ("tokenizer", "model.tokenizer_path")
# Text that is read once may end within a batch, so that other tokenizers leave out another rest of it.
_SAME_AMOUNT = 0.05
_DIGITS = 8  # of a digest, which are shown
_SPANS = 3  # of steps with other options, which are told one by one


def why_not_comparable(run: Run, baseline: Run, metric: str = "loss") -> list[str]:
    """Return the reasons why a difference of ``metric`` does not say which run is better.

    Training losses need the same text to predict, in the same units and sequences, and as many tokens in a step.
    Validation losses need the same text to validate on, in the same batches, since these decide which documents are
    read, and the same tokenizer; bits per byte do not need the tokenizer.
    """
    tokenizer = [_other(name, run, baseline) for name in _differing(run.facts, baseline.facts) if name in _TOKENIZER]
    if metric == "loss":
        others = [name for name in _differing(run.facts, baseline.facts) if name not in _TOKENIZER]
        text = [f"other data: {difference}" for difference in _other_text(run.text, baseline.text)]
        return [*text, *(_other(name, run, baseline) for name in others), *tokenizer]
    texts = run.validation_text, baseline.validation_text
    text = [f"other validation text: {difference}" for difference in _other_text(*texts)]
    text = text or _other_amount(run, baseline, metric)
    names = ["training.seq_len"]  # what a token is predicted from
    if not _content_is_known(*texts):  # which has the batch
        names.append("tokens per step")
    sequences = [_other(name, run, baseline) for name in _differing(run.facts, baseline.facts) if name in names]
    return [*text, *sequences, *(tokenizer if metric == "validation_loss" else [])]


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return [name for name in theirs if name in ours and ours[name] != theirs[name]]


def _other(name: str, run: Run, baseline: Run) -> str:
    ours, theirs = (
        f"{facts[name]:,}" if name == "tokens per step" else printable(shown(facts[name]))
        for facts in (run.facts, baseline.facts)
    )
    kind = {"training.seq_len": "sequences: ", "model.tokenizer_path": "tokenizer: "}.get(name, "")
    return f"other {kind}{name} ({ours}, not {theirs})"


def _content_is_known(ours: Text, theirs: Text) -> bool:
    return bool(ours.content and theirs.content) and (DIGEST in ours.content) == (DIGEST in theirs.content)


def _other_text(ours: Text, theirs: Text) -> list[str]:
    """Return what makes two texts different ones: their content, wherever they lie; where that is not known, the names
    and places in the configuration."""
    known = _content_is_known(ours, theirs)
    a, b = (ours.content, theirs.content) if known else (ours.options, theirs.options)
    names = [name for name in {**b, **a} if a.get(name) != b.get(name)] if known else _differing(a, b)
    for whole in (DIGEST, "training.dataset", "validation.dataset"):  # then all else may differ
        names = [whole] if whole in names else names
    if GLOBAL_BATCH in names:
        names = [name for name in names if name != SHARDS]  # follows from it
    unknown = "" if known or not (ours.of_files() or theirs.of_files()) else "; if their content differs, is not known"
    notes = {GLOBAL_BATCH: f"; other batches read other documents: set the same training.{GLOBAL_BATCH}"}
    differences = []
    for name in names:
        values = a.get(name), b.get(name)
        if name == DIGEST:
            begins = [f"{value}"[:_DIGITS] for value in values]
            values = (begins[0], begins[1]) if begins[0] != begins[1] else values
        first, second = (printable(shown(value)) for value in values)
        differences.append(f"{name} ({first}, not {second}{notes.get(name, unknown)})")
    return differences


def _other_amount(run: Run, baseline: Run, metric: str) -> list[str]:
    """Return a reason if one validation reads clearly more of the text than the other."""
    unit = "tokens" if metric == "validation_loss" else "bytes"
    ours, theirs = (_amount(r, unit) for r in (run, baseline))
    if ours is None or theirs is None:
        name = "validation.steps"
        values = [value_of(r.options, name) for r in (run, baseline) if r.options]
        if len(values) < 2 or values[0] == values[1]:
            return []
        return [f"other amounts of validation text: {name} ({values[0]}, not {values[1]})"]
    if abs(ours - theirs) <= _SAME_AMOUNT * max(ours, theirs):
        return []
    advice = "raise validation.steps until both read the whole text"
    return [f"other amounts of validation text ({ours:,.0f} {unit}, not {theirs:,.0f}; {advice})"]


def _amount(run: Run, unit: str) -> float | None:
    """Return the tokens or bytes of a validation of a run."""
    tokens = run.last_validation("tokens")
    if unit == "tokens" or tokens is None:
        return tokens
    loss, bits = (run.last_validation(name) for name in ("loss", "bits_per_byte"))
    return tokens * loss / math.log(2) / bits if loss is not None and bits else None


def cautions(run: Run, baseline: Run) -> list[str]:
    """Return sentences on what makes a comparison of the training losses of two runs less exact, or leaves it open."""
    sentences = [*_other_options_before(run), *_other_options_before(baseline)]
    if unknown := not_known(run, baseline):
        sentences.append(f"It is not known if they have the same {', '.join(unknown)}.")
    ours, theirs = (r.validation_text.options.get(HELD_OUT) for r in (run, baseline))
    if None not in (ours, theirs) and ours != theirs:
        sentences.append("They hold out other documents for validation, so their batches differ.")
    return sentences


def _other_options_before(run: Run) -> list[str]:
    """Return a sentence on the options that a run had before it went on with other ones; none: it did not."""
    if len(run.options_before) > _SPANS:
        last = max(last for _, last in run.options_before)
        return [f"{run.name} went on several times with other options, the last time after step {last:,}."]
    parts = []
    for (first, last), options in sorted(run.options_before.items()):
        values = ", ".join(printable(f"{name} = {value}") for name, value in options.items())
        parts.append(f"{values} in steps {first:,} to {last:,}")
    return [f"{run.name} had {'; '.join(parts)}."] if parts else []


def not_known(run: Run, baseline: Run) -> list[str]:
    """Return what decides whether two runs compare, and one of them does not say."""
    unknown = []
    if any("training.dataset" not in r.text.options for r in (run, baseline)):
        unknown.append("data")
    elif not _content_is_known(run.text, baseline.text) and (run.text.of_files() or baseline.text.of_files()):
        unknown.append("content in the files of their data")
    names = ["tokens per step", "tokenizer"]
    if all("model.tokenizer_path" in facts for facts in (run.facts, baseline.facts)):
        names.remove("tokenizer")
    return unknown + [name for name in names if any(name not in r.facts for r in (run, baseline))]


def last_rows_without_loss(run: Run) -> list[str]:
    """Return a sentence if the last logged steps of a run have no finite loss, and are too few to call it diverged."""
    rows = run.rows_without_loss_at_the_end()
    if not rows or run.diverged_at() is not None:
        return []
    return [f"The last {'logged step' if rows == 1 else f'{rows} logged steps'} of {run.name} had no finite loss."]


def other_ends(run: Run, baseline: Run) -> list[str]:
    """Return a sentence if one run is clearly longer than the other: then the difference is not that of their ends."""
    shorter, longer = sorted((run, baseline), key=lambda r: r.steps)
    if shorter.steps >= 0.9 * longer.steps:
        return []
    ends = f"{shorter.name} ends at step {shorter.steps:,}, and {longer.name} at step {longer.steps:,}"
    return [f"{ends}: this is about the steps that both have, not about their ends."]
