"""Load a model for inference from a folder of weights: no optimizer, no FSDP, one copy in the requested dtype.

On several processes, the model is tensor parallel over all of them, or each has a copy.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from titanlite.checkpoint.diagnosis import why_no_weights
from titanlite.checkpoint.folder import latest_checkpoint
from titanlite.checkpoint.hugging_face import QUANTIZATION, HuggingFaceFolder, is_hugging_face
from titanlite.checkpoint.metadata import SavedTensor, read_metadata
from titanlite.checkpoint.state import model_state, refuse_another_model
from titanlite.checkpoint.storage import INFO, SUMS, load, read_info, verify
from titanlite.checkpoint.tokenizer import ChosenTokenizer, Weights, choose_tokenizer
from titanlite.config import Degrees, JobConfig
from titanlite.config.schema import Comm
from titanlite.converters import Quantizer, get_quantizer
from titanlite.data import Tokenizer
from titanlite.data.generation_config import GENERATION
from titanlite.data.tokenizer_files import KEY, read_object
from titanlite.distributed.mesh import Mesh, build_mesh
from titanlite.distributed.parallelize import apply_tensor_parallel, check
from titanlite.distributed.runtime import Runtime, start_runtime, stop_runtime
from titanlite.errors import ConfigError
from titanlite.inference.quantize import SCALES, calibrated, linear_layers, quantizer_of, restore
from titanlite.models.layers import DecoderArgs
from titanlite.models.spec import ModelSpec, get_model_spec, model_spec_of
from titanlite.models.weight_map import buffers_of
from titanlite.untrusted.files import is_of

_MOST_LAYERS = 10_000
_ONE_DAY = 24 * 60 * 60  # seconds
_BUFFERS = 1 << 28  # bytes that computed buffers may take in any case: 262,144 positions of heads of 128 features


class ModelDescription(NamedTuple):
    """The model of a folder of weights. ``args`` is a configured flavor. ``flavor`` is its name, which need not be
    registered here; empty if it has none. ``files`` are those of Hugging Face; None: it is a checkpoint. ``quantizer``
    is how its weights are quantized; None: they are not."""

    spec: ModelSpec
    flavor: str
    args: Any
    weights: Weights
    files: HuggingFaceFolder | None = None
    quantizer: Quantizer | None = None


class Outline(NamedTuple):
    """A model on the meta device, whose weights are in its folder; ``saved`` says where, if that is a checkpoint."""

    model: nn.Module
    saved: dict[str, SavedTensor]


class LoadedModel(NamedTuple):
    """A loaded model; ``max_seq_len`` is the number of its positions."""

    model: nn.Module
    tokenizer: Tokenizer
    max_seq_len: int


def fill_weights(model: nn.Module, description: ModelDescription, saved: Mapping[str, SavedTensor]) -> None:
    """Read the parameters of ``model`` (plain or sharded, of any dtype) from its folder; ``saved`` is that of its
    :class:`Outline`.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    family, files = description.spec.hugging_face, description.files
    if files is None or family is None:
        load(description.weights.folder, model_state([model]), saved=saved)
        return
    weights = family.weights(description.args)
    if description.quantizer is not None:
        restore(model, linear_layers(model, description.spec.layout.output), files, weights)
    state = {**dict(model.named_parameters(remove_duplicate=False)), **buffers_of(model, weights)}
    files.load_into(state, weights, _ignored(description), family.copies(description.args))


def _ignored(description: ModelDescription) -> str | None:
    family = description.spec.hugging_face
    ignored = None if family is None else family.ignored
    return ignored if description.quantizer is None else "|".join(filter(None, (SCALES, ignored)))


def outline(description: ModelDescription) -> Outline:
    """Build the model of a folder on the meta device, and compare it with the weights there: what they do not have is
    not allocated.

    Raises:
        ConfigError: no model can be built of the sizes in the folder, or its weights are not those of this model.
    """
    args, family, files = description.args, description.spec.hugging_face, description.files
    folder = description.weights.folder
    saved = read_metadata(folder) if files is None else {}
    if args.n_layers > min(_MOST_LAYERS, len(saved if files is None else files.tensors)):
        raise ConfigError(
            f"{folder}: its model has {args.n_layers} layers, more than there are tensors in its files, or than "
            f"{_MOST_LAYERS:,}"
        )
    try:
        if isinstance(args, DecoderArgs) and (broken := args.broken_rule()) is not None:
            raise ValueError(broken[1])
        with torch.device("meta"):
            model = description.spec.build(args)
    except (RuntimeError, ValueError, TypeError, ArithmeticError, AssertionError) as e:
        reason = str(e).partition("\n")[0]  # torch adds a stack trace
        raise ConfigError(f"{folder}: no model can be built of its sizes, {args} ({reason})") from e
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters(remove_duplicate=False)}
    if files is not None and family is not None:
        places = family.weights(args)
        shapes |= {name: tuple(buffer.shape) for name, buffer in buffers_of(model, places).items()}
        files.check(shapes, places, _ignored(description), family.copies(args))
    elif description.weights.info is not None:
        buffers = set(description.weights.info.buffers)
        of_model = {name: tensor.shape for name, tensor in saved.items() if name.startswith("model.")}
        kept = {name.removeprefix("model."): shape for name, shape in of_model.items() if name not in buffers}
        refuse_another_model(folder, kept, shapes)
    # No file has the buffers that are computed, such as the table of positions: their sizes are a claim.
    computed = sum(buffer.nbytes for buffer in model.buffers())
    weights = sum(4 * param.numel() for param in model.parameters())
    if computed > max(_BUFFERS, weights):
        raise ConfigError(
            f"{folder}: its model has tables of {computed / 2**30:,.1f} GiB for {args.max_seq_len:,} positions, more "
            f"than its weights, and than {_BUFFERS >> 20} MiB; state the positions that it was trained with"
        )
    return Outline(model, saved)


@contextmanager
def opened(
    checkpoint: str,
    dtype: str,
    tokenizer_path: str | None = None,
    *,
    quantize: str | None = None,
    calibration: str | None = None,
    tensor_parallel: bool = False,
) -> Iterator[tuple[LoadedModel, Mesh, Runtime]]:
    """Join the other processes, and load the model of a folder.

    Args:
        checkpoint: the folder of one step, or of Hugging Face weights; or that of a run, or of its checkpoints, of
            which the latest is taken.
        dtype: the torch dtype of the weights, by name.
        tokenizer_path, quantize, calibration: see :func:`load_model`.
        tensor_parallel: the processes share one model; else each has all of it.

    Raises:
        ConfigError: the model cannot be loaded.
    """
    # Where each process has its own share, one can be long before the other.
    process = start_runtime(Comm() if tensor_parallel else Comm(init_timeout_seconds=_ONE_DAY))
    try:
        together = process.world_size if tensor_parallel else 1
        degrees = Degrees(process.world_size // together, 1, 1, tensor_parallel=together, pipeline_parallel=1)
        mesh = build_mesh(degrees, process.device.type)
        folder = latest_checkpoint(checkpoint)
        if process.rank == 0 and folder != Path(checkpoint).expanduser():
            print(f"{checkpoint}: its latest checkpoint is {folder}", file=sys.stderr)
        loaded = load_model(
            folder,
            getattr(torch, dtype),
            mesh,
            process.device,
            tokenizer_path=tokenizer_path,
            quantize=quantize,
            calibration=calibration,
        )
        yield loaded, mesh, process
    finally:
        stop_runtime()


def load_model(
    path: str | Path,
    dtype: torch.dtype,
    mesh: Mesh,
    device: torch.device,
    *,
    tokenizer_path: str | None = None,
    quantize: str | None = None,
    calibration: str | None = None,
) -> LoadedModel:
    """Build the model of a folder and load its weights. The checksums of a checkpoint are verified first.

    Args:
        path: a checkpoint (the folder of one step), or a Hugging Face folder.
        dtype: the dtype of the parameters; buffers keep their own.
        mesh: a mesh with tensor parallelism only.
        tokenizer_path: the tokenizer, where the folder has none; None: the one of the folder.
        quantize: the name of a way to quantize the linear layers, but for the output projection; None: leave them as
            they are in the folder.
        calibration: a text file to calibrate with, where ``quantize`` needs it; None: Python's standard library.

    Raises:
        ConfigError: the folder is no checkpoint, the tokenizer does not fit, the model does not divide over the
            processes, or it cannot be quantized.
    """
    folder = Path(path).expanduser()
    description = describe(folder)
    quantizer = None if quantize is None else quantizer_for(quantize, description)
    if mesh.tp.size() > 1 and (quantizer or description.quantizer):
        raise ConfigError(
            f"quantized layers run on one process, and there are {mesh.tp.size()}: start one, or use the weights in "
            "high precision"
        )
    if quantizer is None and calibration is not None:
        raise ConfigError(f"--calibration={calibration}: has no effect without --quantize; leave it out")
    tokenizer = tokenizer_of(description, tokenizer_path).tokenizer
    if description.files is None:
        verify(folder)
    model, saved = outline(description)
    model = allocated(model, description, dtype, mesh, device)
    fill_weights(model, description, saved)
    model.eval()
    max_seq_len = description.args.max_seq_len
    if quantizer is not None:
        record = calibrated(quantizer, model, tokenizer, max_seq_len, calibration)
        try:
            quantizer.quantize(model, set(linear_layers(model, description.spec.layout.output)), record)
        except ValueError as e:
            raise ConfigError(f"--quantize={quantize}: {e}") from e
    return LoadedModel(model, tokenizer, max_seq_len)


def generation_of(folder: Path, tokenizer: Tokenizer) -> Mapping[str, Any]:
    """Return the content of ``generation_config.json`` in ``folder``, else that beside the tokenizer; empty if there is
    none.

    Raises:
        ConfigError: it is damaged.
    """
    return read_object(folder, GENERATION) or tokenizer.generation


def quantizer_for(name: str, description: ModelDescription) -> Quantizer:
    """Return the way to quantize ``name``.

    Raises:
        ConfigError: there is none, the weights are quantized already, or the model has experts.
    """
    quantizer = get_quantizer(name)
    if getattr(description.args, "mixture", None) is not None:
        raise ConfigError(
            f"--quantize={name}: the model has experts, whose weights are most of it and stay in high precision; leave "
            "it out"
        )
    if description.quantizer is not None:
        raise ConfigError(f"--quantize={name}: the weights are quantized already; leave it out")
    return quantizer


def tokenizer_of(description: ModelDescription, path: str | None = None) -> ChosenTokenizer:
    """Load the tokenizer of a folder, or the one at ``path``, which must be the same where the folder says which it is.

    Raises:
        ConfigError: the tokenizer cannot be read, is another one, or has more tokens than the model.
    """
    chosen = choose_tokenizer(path or "", description.weights)
    tokenizer = chosen.tokenizer
    if tokenizer.vocab_size > description.args.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than the {description.args.vocab_size} of the "
            "model's vocabulary; --tokenizer_path names the one that belongs to the model",
            key=KEY,
            value=tokenizer.path,
        )
    return chosen


def allocated(
    model: nn.Module, description: ModelDescription, dtype: torch.dtype, mesh: Mesh, device: torch.device
) -> nn.Module:
    """Allocate a model of the meta device, and initialize its buffers. The parameters are uninitialized."""
    layout = description.spec.layout
    config = JobConfig()
    config.parallelism.tensor_parallel_degree = mesh.tp.size()
    config.parallelism.disable_loss_parallel = True
    config.activation_checkpoint.mode = "none"
    check(description.args, layout, mesh, config)
    for param in model.parameters():
        param.data = param.data.to(dtype)
    if mesh.tp.size() > 1:
        apply_tensor_parallel(model, layout, mesh, config.parallelism)
    # A parameter that two modules share must stay shared.
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to_empty(device=device)
        model.init_weights(_BuffersAlone())  # type: ignore[operator]
    except RuntimeError as e:
        reason = str(e).partition("\n")[0]
        raise ConfigError(f"the model does not fit into the memory of {device} ({reason})") from e
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
    return model.requires_grad_(False)


class _BuffersAlone:
    """A :class:`WeightInit` that changes no parameters, for a model whose parameters come from a file."""

    def trunc_normal(self, param: Tensor, std: float, bound: float = 3.0) -> None: ...
    def normal(self, param: Tensor, std: float) -> None: ...
    def ones(self, param: Tensor) -> None: ...
    def zeros(self, param: Tensor) -> None: ...


def describe(folder: Path) -> ModelDescription:
    """Read from a folder which model its weights belong to.

    Raises:
        ConfigError: the folder is no checkpoint and no Hugging Face folder, or its model is not known here.
        DamagedCheckpoint: see :func:`titanlite.checkpoint.storage.read_info`.
    """
    if is_hugging_face(folder):
        files = HuggingFaceFolder(folder)
        quantizer = quantizer_of(files.config)
        spec, args = model_spec_of({key: value for key, value in files.config.items() if key != QUANTIZATION})
        return ModelDescription(spec, _flavor_of(spec, args), args, Weights(folder), files, quantizer)
    if not any((folder / name).exists() for name in (INFO, SUMS)):
        raise ConfigError(f"{folder} is no checkpoint: {why_no_weights(folder)}")
    try:
        info = read_info(folder)
    except OSError as e:
        raise ConfigError(f"{folder / INFO} cannot be read ({e}); correct its permissions") from e
    name, flavor, values = (info.model[key] for key in ("name", "flavor", "args"))
    try:
        spec = get_model_spec(name)
    except ConfigError as e:
        raise ConfigError(f"{folder}: {e}; one of your own comes with --custom_import") from e
    try:
        # A custom flavor may be unknown here, but all flavors of a family have the same type.
        args = _rebuilt(type(next(iter(spec.flavors.values()))), values)
    except TypeError as e:
        raise ConfigError(
            f"{folder / INFO}: its model.args are not those of a {name} ({e}); it is of another version"
        ) from e
    return ModelDescription(spec, flavor, args, Weights(folder, info))


def _flavor_of(spec: ModelSpec, args: Any) -> str:
    for name, flavor in spec.flavors.items():
        if flavor.vocab_size and flavor.vocab_size != args.vocab_size:  # it cannot be configured for another vocabulary
            continue
        if spec.configure(flavor, args.vocab_size, args.max_seq_len) == args:
            return name
    return ""


def _rebuilt(kind: Any, value: Any) -> Any:
    """Invert ``dataclasses.asdict``: return the instance of the type ``kind`` that ``value`` was made from."""
    if isinstance(value, dict):
        candidates = [cls for cls in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(cls)]
        # Of several, the one that has these fields; with one alone, the message names a field that it does not have.
        fitting = [cls for cls in candidates if {f.name for f in dataclasses.fields(cls)} >= value.keys()]
        for cls in (fitting or candidates)[:1]:
            kinds = typing.get_type_hints(cls)
            values = {key: _rebuilt(kinds.get(key), v) for key, v in value.items()}
            strange = [f"{key} = {v!r:.60}" for key, v in values.items() if not is_of(v, kinds.get(key, Any))]
            if strange:
                raise TypeError(", ".join(strange))
            return cls(**values)  # type: ignore[operator]
    return value
