"""The sample at the end of a run: a few lines of text from its model."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from torch import nn

from titanlite.config import JobConfig
from titanlite.config.refuse import refuse
from titanlite.data import Tokenizer
from titanlite.distributed.mesh import Mesh
from titanlite.distributed.runtime import Runtime
from titanlite.errors import ConfigError, TrainingError, counted
from titanlite.inference.generate import generate
from titanlite.inference.sampling import Sampling, TokenSampler

logger = logging.getLogger()

# Likely words stay likely, but without the loops that always taking the most likely word makes.
SAMPLING = Sampling(temperature=0.8, seed=0)
LARGE = 10**9  # parameters
# No space at the end: tokenizers join a space with the word that follows.
PROMPTS = {"pystdlib": "import"}


def check_prompt(config: JobConfig, tokenizer: Tokenizer) -> None:
    """Refuse a ``sample.prompt`` after which no token has room, before the run rather than at its end."""
    options, positions = config.sample, config.training.seq_len
    tokens = 0 if options.prompt is None or options.enable is False else len(tokenizer.encode(options.prompt))
    if tokens and tokens + 1 >= positions:  # BOS comes before it
        why = f"has {counted(tokens, 'token')}, and training.seq_len = {positions} leaves no room for more; shorten it"
        refuse(config, "sample.prompt", why)


def log_sample(
    parts: list[nn.Module], tokenizer: Tokenizer, config: JobConfig, mesh: Mesh, runtime: Runtime
) -> tuple[str, str] | None:
    """Log how the model continues ``sample.prompt``, or why there is no sample. All processes must call this.

    Args:
        parts: the model as one module, or the modules of this process's pipeline stages.

    Returns:
        The prompt, and the text with the prompt; None without a sample.
    """
    if config.sample.enable is False:
        return None
    if reason := _obstacle(parts, config, mesh):
        logger.info("no sample %s; from a checkpoint: %s", reason, _command(config))
        return None
    prompt = config.sample.prompt
    if prompt is None:
        prompt = PROMPTS.get(config.training.dataset, "")
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    decoder = TokenSampler(
        parts[0],
        runtime.device,
        max_seq_len=config.training.seq_len,
        vocab_size=tokenizer.vocab_size,
        tp=mesh.tp,
        sharded_logits=mesh.tp.size() > 1 and not config.parallelism.disable_loss_parallel,
        group=runtime.control if runtime.world_size > 1 else None,
    )
    room = config.training.seq_len - len(ids)
    if room < 1:
        logger.info("no sample: training.seq_len = %d leaves no room for one", config.training.seq_len)
        return None
    tokens = min(config.sample.max_new_tokens, room)
    logger.info("writing a sample of %s, one after the other", counted(tokens, "token"))
    try:
        generated = generate(decoder, ids, tokens, SAMPLING, {tokenizer.eos_id})
    except (ConfigError, TrainingError) as e:
        logger.warning("no sample: %s", e)  # the run itself is done
        return None
    text = tokenizer.decode([*ids[1:], *generated.ids])
    start = repr(prompt) if prompt else "an empty page"
    logger.info("a sample of what it learned, from %s on:\n%s", start, printable(text))
    return prompt, text


def _obstacle(parts: list[nn.Module], config: JobConfig, mesh: Mesh) -> str | None:
    for dimension in ("pipeline", "context"):
        if getattr(mesh.degrees, f"{dimension}_parallel") > 1:
            return f"under {dimension} parallelism"
    params = sum(param.numel() for param in parts[0].parameters())
    if config.sample.enable is None and params > LARGE:
        return f"of {params:,} parameters unless sample.enable = true: each token would gather them all"
    return None


def _command(config: JobConfig) -> str:
    folder = Path(config.job.dump_folder) / config.checkpoint.folder
    needed = "" if config.checkpoint.enable_checkpoint else " (which needs checkpoint.enable_checkpoint = true)"
    step = folder / f"step-{config.training.steps}"
    module = config.experimental.custom_import
    custom_import = f" --custom_import {module}" if module else ""
    return f"titanlite generate --checkpoint {step} --prompt ...{custom_import}{needed}"


def printable(text: str) -> str:
    """Return ``text`` for the console, indented. Characters that would move the cursor, or are not in the console's
    encoding, are escaped."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    shown = shown.encode(encoding, "backslashreplace").decode(encoding)
    return "\n".join(f"    {line}" for line in shown.split("\n"))
