"""Quantize a trained model for inference, in memory or in files.

The files are those of compressed-tensors (https://github.com/vllm-project/compressed-tensors), which vLLM and
transformers read: of each quantized layer its weight in 8 bits, ``weight_scale``, and ``input_scale`` where that is
static; and a ``quantization_config`` in ``config.json``. The output projection stays in high precision.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from titanlite.checkpoint.hugging_face import DTYPES, QUANTIZATION, HuggingFaceFolder, stored_shapes
from titanlite.checkpoint.hugging_face_export import Entry, QuantizedWeights
from titanlite.converters.quantizers import Quantized, Quantizer, quantizers
from titanlite.data import Tokenizer, build_source
from titanlite.data.sources import START
from titanlite.errors import ConfigError
from titanlite.models.weight_map import Place, Rows, WeightMap
from titanlite.untrusted.files import open_file

SEQUENCES, TOKENS = 8, 512  # of calibration, at most
_MOST_TEXT = 1 << 20  # bytes that are read for them
METHOD = "compressed-tensors"
SCALES = r".*\.(weight|input)_scale"


def linear_layers(model: nn.Module, output: str) -> dict[str, nn.Linear]:
    """Return the linear layers to quantize, by name: all but the ``output`` projection."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != output}


def calibrated(
    quantizer: Quantizer, model: nn.Module, tokenizer: Tokenizer, max_seq_len: int, path: str | None
) -> Mapping[str, Tensor] | None:
    """Return the largest magnitudes of the inputs of the layers in ``model``, by name; None where they are not needed.

    Args:
        path: a text file like the texts to come; None: Python's standard library, which titanlite trains on by default.

    Raises:
        ConfigError: the file cannot be read, holds nothing, or is not needed.
    """
    if quantizer.calibrate is None:
        if path is not None:
            raise ConfigError(f"--calibration={path}: has no effect, as no scale is static; leave it out")
        return None
    length = min(max_seq_len, TOKENS)
    ids: list[int] = []
    for text in _texts(path):
        ids += [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        if len(ids) >= SEQUENCES * length:
            break
    device = next(model.parameters()).device
    with torch.no_grad(), quantizer.calibrate(model) as record:
        for sequence in torch.tensor(ids[: SEQUENCES * length]).split(length):
            model(sequence[None].to(device))
    return record


def _texts(path: str | None) -> Iterator[str]:
    if path is None:
        source = build_source("pystdlib", path=None, text_field="text", on_corrupt="stop", seed=0)
        yield from (text for _, text in source.documents(0, 1, 0, START))
        return
    try:
        with open_file(Path(path).expanduser()) as stream:
            content = stream.read(_MOST_TEXT)
            text = codecs.getincrementaldecoder("utf-8")().decode(content, final=not stream.read(1))
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--calibration={path}: cannot be read as UTF-8 text ({e}); name a text file") from e
    if not text.strip():
        raise ConfigError(f"--calibration={path}: is empty; name a text like those to come")
    yield text


# ---- files


def quantization_config(quantizer: Quantizer, kept: list[str]) -> dict[str, Any]:
    """Return what ``config.json`` says of the quantization.

    Args:
        kept: the names in the files of the linear layers that are not quantized.
    """
    return {
        "quant_method": METHOD,
        "format": quantizer.file_format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **quantizer.scheme}},
        "ignore": kept,
    }


def quantized_weights(
    quantizer: Quantizer,
    layers: Mapping[str, nn.Linear],
    weights: WeightMap,
    record: Mapping[str, Tensor] | None,
) -> QuantizedWeights:
    """Return how the weights of ``layers`` are written.

    Raises:
        ConfigError: a layer cannot be quantized, or calibration did not reach it.
    """
    by_tensor: dict[str, str] = {}
    entries: dict[str, dict[str, Entry]] = {}
    for layer, linear in layers.items():
        name = f"{layer}.weight"
        # Layers that are rows of one tensor are quantized as one.
        (tensor, shape), *others = stored_shapes({name: tuple(linear.weight.shape)}, weights).items()
        reason = "it is several tensors in this family's files" if others else quantizer.why_not(shape[1], shape[0])
        if record is not None and layer not in record:
            reason = "calibration did not reach it"
        if reason:
            raise ConfigError(f"--quantize: {layer} ({shape[1]} -> {shape[0]}): {reason}; use the weights as they are")
        entries[tensor] = _entries(quantizer, tensor, shape)
        by_tensor[tensor] = layer

    def encode(tensor: str, weight: Tensor) -> Iterator[Tensor]:
        yield from quantizer.quantize_weight(weight)
        if record is not None:
            yield quantizer.input_scale(record[by_tensor[tensor]])

    return QuantizedWeights(entries, encode)


def _entries(quantizer: Quantizer, tensor: str, shape: tuple[int, ...]) -> dict[str, Entry]:
    """Return what a weight, ``tensor`` in the files, becomes there, in the order of :class:`Quantized`."""
    with torch.device("meta"):
        weight, scale = quantizer.quantize_weight(torch.empty(shape))
    stem = tensor.removesuffix(".weight")
    entries = {tensor: (shape, weight.dtype), f"{stem}.weight_scale": (tuple(scale.shape), torch.float32)}
    if quantizer.calibrate is not None:
        entries[f"{stem}.input_scale"] = ((1,), torch.float32)
    return entries


def quantizer_of(config: Mapping[str, Any]) -> Quantizer | None:
    """Return the way in which the weights of a ``config.json`` are quantized; None if they are not.

    Raises:
        ConfigError: in another way than titanlite computes.
    """
    described = config.get(QUANTIZATION)
    if not described:
        return None
    if isinstance(described, dict) and described.get("quant_method") == METHOD:
        groups = described.get("config_groups")
        for quantizer in quantizers():
            if (
                quantizer.file_format is not None
                and isinstance(groups, dict)
                and len(groups) == 1
                and _agrees(quantizer.scheme, *groups.values())
            ):
                return quantizer
    raise ConfigError(
        f"config.json: {QUANTIZATION} = {str(described)[:500]}: titanlite reads {METHOD} as titanlite convert "
        "--quantize writes them; take the weights in high precision"
    )


def _agrees(scheme: Any, described: Any) -> bool:
    """Return whether ``described`` says everything that ``scheme`` says; it may say more."""
    if not isinstance(scheme, Mapping):
        return bool(scheme == described)
    return isinstance(described, Mapping) and all(_agrees(value, described.get(key)) for key, value in scheme.items())


def restore(model: nn.Module, layers: Mapping[str, nn.Linear], folder: HuggingFaceFolder, weights: WeightMap) -> None:
    """Make the layers of ``model`` that the folder has in 8 bits quantized ones with these weights.

    Raises:
        ConfigError: a weight in 8 bits or a scale is missing, of another shape or dtype, or belongs to no such layer.
    """
    quantizer = quantizer_of(folder.config)
    assert quantizer is not None
    stored = folder.tensors
    quantized = {name for name in stored if stored[name].dtype not in DTYPES.values() or re.fullmatch(SCALES, name)}
    unused = set(quantized)
    with folder.opened() as get:
        for name, layer in layers.items():
            place, shape = weights[f"{name}.weight"], tuple(layer.weight.shape)
            ((weight, shape),) = stored_shapes({f"{name}.weight": shape}, weights).items()
            entries = _entries(quantizer, weight, shape)
            if quantized.isdisjoint(entries):  # this one is in high precision
                continue
            unused -= entries.keys()
            tensors = []
            for tensor, (shape, dtype) in entries.items():
                allowed = [dtype] if dtype.itemsize == 1 else DTYPES.values()  # others write scales in bfloat16
                if tensor not in stored or stored[tensor].shape != shape or stored[tensor].dtype not in allowed:
                    raise _not_as_quantized(folder, tensor, f"must be {dtype} {list(shape)}")
                of_rows = isinstance(place, Rows) and shape[0] == stored[weight].shape[0]
                part: Place = Rows(tensor, *place[1:]) if of_rows else tensor  # type: ignore[arg-type]
                tensors.append(get(part).to(layer.weight.device))
            if not all(scale.isfinite().all() and (scale > 0).all() for scale in tensors[1:]):
                raise _not_as_quantized(folder, next(iter(entries)), "has scales that are not above 0 and finite")
            quantizer.restore(layer, Quantized(tensors[0], tensors[1], tensors[2] if len(tensors) > 2 else None))
    if unused:
        raise _not_as_quantized(folder, min(unused), "belongs to no quantized layer")


def _not_as_quantized(folder: HuggingFaceFolder, tensor: str, problem: str) -> ConfigError:
    return ConfigError(
        f"{folder.folder}: {tensor} {problem}: its {QUANTIZATION} says so; take the weights in high precision, or "
        "convert them again"
    )
