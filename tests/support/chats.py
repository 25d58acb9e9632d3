"""Tokenizers and chat templates for tests. The templates are written in the style of the named families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, trainers

from titanlite.data.tokenizer import SHIPPED

# {G} and {E} are where {% generation %} and {% endgeneration %} stand in the template that marks what is scored.
LLAMA3 = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}{% set rest = messages[1:] %}
{%- else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' + system + '<|eot_id|>' }}
{%- for message in rest %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {%- if message['role'] == 'assistant' %}{G}{{- message['content'] | trim + '<|eot_id|>' }}{E}
    {%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""
MISTRAL = """
{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}{{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}{G}{{- ' ' + message['content'] | trim + eos_token }}{E}
    {%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}
"""
# The message of the system goes into the last one of the user, if it is the last of all.
NEMO = """
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message['role'] == 'user' %}
        {{- '[INST]' }}{% if loop.last and system is defined %}{{- system + '\n\n' }}{% endif %}
        {{- message['content'] + '[/INST]' }}
    {%- else %}{G}{{- message['content'] + eos_token }}{E}{% endif %}
{%- endfor %}
"""
QWEN25 = """
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' }}{G}{{- message.content + '<|im_end|>' }}{E}{{- '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
PHI4 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% elif message['role'] == 'user' %}{{ '<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|im_start|>assistant<|im_sep|>' }}"
    "{G}{{ message['content'] + '<|im_end|>' }}{E}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
# The beginning of an answer belongs to the user's message, and add_generation_prompt changes nothing.
PHI4_FIRST = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% elif message['role'] == 'user' %}{{ '<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{{ '<|im_start|>assistant<|im_sep|>' }}"
    "{% else %}{G}{{ message['content'] + '<|im_end|>' }}{E}{% endif %}"
    "{% endfor %}"
)
# EOS after the last message of all, which shares its first letters with the mark of the next message.
PHI4_MINI = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{G}{{ message['content'] + '<|end|>' }}{E}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% elif messages[-1]['role'] == 'assistant' %}{G}{{ eos_token }}{E}"
    "{% else %}{{ eos_token }}{% endif %}"
)
# An empty thought before the last answer, which has none of its own.
QWEN3 = """
{%- set last = namespace(index=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.index = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}{G}
        {%- if loop.index0 > last.index %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
        {{- message.content + '<|im_end|>' }}{E}{{- '\n' }}
    {%- else %}{{- message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""
TEMPLATES = {
    "llama3": LLAMA3, "mistral": MISTRAL, "mistral-nemo": NEMO, "qwen2.5": QWEN25, "qwen3": QWEN3, "phi4": PHI4,
    "phi4-first": PHI4_FIRST, "phi4-mini": PHI4_MINI,
}  # fmt: skip
_SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"]


def plain(template: str) -> str:
    return template.replace("{G}", "").replace("{E}", "")


def marked(template: str) -> str:
    return template.replace("{G}", "{% generation %}").replace("{E}", "{% endgeneration %}")


def byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_file(str(SHIPPED))
    backend.add_special_tokens(_SPECIAL)
    return backend


def sentencepiece() -> tokenizers.Tokenizer:
    """A BPE like Llama 2's and Mistral's: spaces are letters, a text begins with one, and bytes stand for the rest."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    backend.train_from_iterator([Path(__file__).read_text()], trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in bytes_]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def folder(path: Path, backend: tokenizers.Tokenizer, template: object, **config: Any) -> Path:
    """Write a folder of a tokenizer, as model folders have it."""
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    sentences = backend.token_to_id("</s>") is not None
    bos, eos = ("<s>", "</s>") if sentences else ("<|begin_of_text|>", "<|end_of_text|>")
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    template = {} if template is None else {"chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps({**names, **template, **config}))
    return path
