"""Load Llama 3's ``tokenizer.model`` (tiktoken's file format) as a BPE of the ``tokenizers`` library.

The vocabulary, the split pattern and the special tokens are those published with Llama 3
(https://github.com/meta-llama/llama3, ``llama/tokenizer.py``).
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from titanlite.data.tokenizer_files import MAX_IDS, damaged

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_NUM_SPECIAL = 256
_MAX_TOKEN = 1024  # bytes; those of Llama 3 have at most 128


def special_tokens() -> list[str]:
    """Return the 256 special tokens of Llama 3. Their ids follow the last rank."""
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(_NUM_SPECIAL - 5)]
    return [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        *reserved[:4],
        "<|start_header_id|>",
        "<|end_header_id|>",
        reserved[4],
        "<|eot_id|>",
        *reserved[5:],
    ]


def split_like_llama3() -> pre_tokenizers.PreTokenizer:
    """Return a pre-tokenizer that splits text with Llama 3's pattern and maps bytes to printable characters."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def load_tiktoken(file: Path, content: bytes) -> tokenizers.Tokenizer:
    """Return the tokenizer of a file of ``base64 rank`` lines.

    Args:
        content: that of ``file``, whose name is for messages.

    Raises:
        ConfigError: the file is a SentencePiece model, or is not in this format.
    """
    ranks = _read_ranks(file, content)
    character = _byte_characters()
    names = {token: "".join(character[byte] for byte in token) for token in ranks}
    vocab = {names[token]: rank for token, rank in ranks.items()}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=_merges(ranks, names), ignore_merges=True))
    backend.pre_tokenizer = split_like_llama3()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special_tokens())
    return backend


def _read_ranks(file: Path, content: bytes) -> dict[bytes, int]:
    # A SentencePiece model is a protobuf. Its first field has the tag 0x0a, and it always contains an <unk> piece.
    if content[:1] == b"\n" and b"<unk>" in content:
        raise damaged(
            file,
            "this is a SentencePiece model (Llama 1 and 2, Mistral), which is not "
            "supported; use the same model's tokenizer.json",
        )
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise damaged(
                file,
                f'line {number} is not "base64 rank", so this is no Llama 3 '
                "tokenizer.model; download it again, or use the model's tokenizer.json",
            ) from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise damaged(
            file,
            f"the ranks must be 0 to {len(ranks) - 1} and hold all 256 single bytes "
            f"({len(missing)} are missing): the file is cut short or damaged; download it again",
        )
    longest = max(map(len, ranks))
    if longest > _MAX_TOKEN or len(ranks) > MAX_IDS:
        raise damaged(
            file,
            f"has {len(ranks):,} tokens, the longest of {longest:,} bytes, and at most {MAX_IDS:,} of {_MAX_TOKEN:,} "
            "bytes are read; download it again",
        )
    return ranks


def _merges(ranks: dict[bytes, int], names: dict[bytes, str]) -> list[tuple[str, str]]:
    """Return every split of every token into two tokens, in the order in which tiktoken would merge them."""
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(left, right) for left, right in splits if left in ranks and right in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(names[left], names[right]) for left, right in pairs]
    return merges


def _byte_characters() -> list[str]:
    """Return the printable character for each byte in a byte-level BPE (GPT-2's table).

    Printable bytes keep their Latin-1 character. All other bytes get the code points from 256 on, in order.
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    code_points = iter(range(256, 512))
    return [chr(byte if byte in printable else next(code_points)) for byte in range(256)]
