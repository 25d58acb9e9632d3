"""The task of a validation: choices between endings, with the model that is being trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from titanlite.config import JobConfig
from titanlite.data import Tokenizer
from titanlite.distributed.runtime import Runtime
from titanlite.errors import renaming
from titanlite.inference.score import Scorer
from titanlite.inference.tasks import Accuracy, accuracy_of, encode, read_task


class ValidationTask:
    """``validation.tasks``: its examples, and the accuracy in them. The processes share the work, and each has a model
    that is whole but for FSDP.

    Args:
        parts: the model, as one module.

    Raises:
        ConfigError: the task cannot be read, or an ending has more than ``training.seq_len`` tokens.
    """

    def __init__(self, config: JobConfig, parts: Sequence[nn.Module], tokenizer: Tokenizer, runtime: Runtime) -> None:
        validation, self._seq_len = config.validation, config.training.seq_len
        self._tokenizer = tokenizer
        self._scorer = Scorer(parts[0], tokenizer.vocab_size, runtime)
        with renaming(_of_validation):
            self._examples = read_task(validation.tasks, validation.task_data, validation.max_examples)
            for example in self._examples:
                encode(example, tokenizer, self._seq_len)
        runtime.check_same("the examples of validation.tasks", self._examples)

    def accuracy(self, asked_to_stop: Callable[[], bool]) -> Accuracy | None:
        """Return the accuracy, the same on all processes; None if ``asked_to_stop`` becomes true meanwhile.

        Raises:
            TrainingError: a log-likelihood is not finite.
        """

        def stop_if_asked(_: str) -> None:
            if asked_to_stop():
                raise _Stopped

        try:
            return accuracy_of(self._scorer, self._tokenizer, self._examples, self._seq_len, stop_if_asked)
        except _Stopped:
            return None


class _Stopped(Exception):
    pass


def _of_validation(text: str) -> str:
    """Rename options in a message: tasks use the names of ``titanlite evaluate``."""
    for name in ("tasks", "task_data", "max_examples"):
        text = text.replace(f"--{name}", f"validation.{name}")
    return text.replace("--seq_len", "training.seq_len")
