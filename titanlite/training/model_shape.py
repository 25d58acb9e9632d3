"""The shape of a run's model: a flavor of a family, or what the config.json of a Hugging Face folder says, with the
sizes of [model.args]."""

from __future__ import annotations

import logging
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from titanlite.checkpoint import is_hugging_face, saved_steps
from titanlite.checkpoint.diagnosis import why_no_weights
from titanlite.checkpoint.folder import INFO, latest_checkpoint
from titanlite.checkpoint.hugging_face import CONFIG
from titanlite.config import JobConfig
from titanlite.config.model_sections import Model
from titanlite.config.refuse import refuse
from titanlite.config.run_config import HF_CONFIG
from titanlite.errors import ConfigError, shown
from titanlite.models.spec import ModelSpec, get_model_spec, model_spec_of
from titanlite.untrusted.files import contained, read_json

logger = logging.getLogger(__name__)

HF = "hf"  # the flavor that means a config.json
# Values of [model.args] that switch an option off.
_OFF = {"sliding_window": 0, "partial_rotary_factor": 1.0}


class ModelShape(NamedTuple):
    """The shape of a model.

    Attributes:
        flavor: the arguments of the model, not yet completed for a tokenizer.
        about: the family and the flavor, for the log.
        config_json: the content of the config.json that the shape is from; None: it is from a flavor.
    """

    spec: ModelSpec
    flavor: Any
    about: str
    config_json: dict[str, Any] | None = None

    def sizes(self) -> str:
        """Return the arguments of the model, for the log; those that are off are left out."""
        values = {f.name: getattr(self.flavor, f.name) for f in fields(self.flavor)}
        return ", ".join(f"{name} = {shown(value)}" for name, value in values.items() if value not in (None, False))


def choose_shape(config: JobConfig) -> ModelShape:
    """Return the shape that ``config`` asks for. If it is that of a folder, ``config.model`` names family, flavor and
    folder afterwards, so that the configuration of the run is complete.

    Raises:
        ConfigError: there is no such family, flavor or folder, what they say contradicts each other, or no family
            computes such a model.
    """
    model, sizes = config.model, sizes_of(config)
    file = _config_json(config)
    if file is None:
        spec = get_model_spec(model.name)
        flavor, content, about = spec.flavor(model.flavor), None, f"{model.name} {model.flavor}"
    else:
        key = "model.hf_config" if model.hf_config else "checkpoint.initial_load_path"
        try:
            content = read_json(contained(file.parent, file.name))
            spec, flavor = _described(config, content)
        except ConfigError as e:
            raise e if e.key else ConfigError(e.why, key=key, value=str(file.parent)) from None
        model.name, model.flavor, model.hf_config = spec.name, HF, str(file.parent)
        about = f"{model.name} as in {file}"
    changed = "".join(f", {name} = {shown(value)}" for name, value in sizes.items())
    return ModelShape(spec, spec.resized(flavor, sizes), about + changed, content)


def sizes_of(config: JobConfig) -> dict[str, Any]:
    """Return the sizes that [model.args] sets, as arguments of a model."""
    given = {name: value for name, value in asdict(config.model.args).items() if value is not None}
    return {name: None if _OFF.get(name) == value else value for name, value in given.items()}


def _described(config: JobConfig, content: dict[str, Any]) -> tuple[ModelSpec, Any]:
    """Return the family and flavor of a config.json; the family is that of the configuration, if it asks for one."""
    if not _is_asked(config, "name"):
        return model_spec_of(content)
    spec = get_model_spec(config.model.name)
    if spec.hugging_face is None:
        refuse(config, "model.name", "has no form in transformers, so no config.json says its shape; name a flavor")
    kind, asked = content.get("model_type"), spec.hugging_face.model_type
    if kind != asked:
        raise ConfigError(
            f"config.json: model_type = {shown(kind)}: must be {shown(asked)}, as model.name = {shown(spec.name)} "
            f"({config.origin('model.name')}) asks for; name a folder of such a model, or set model.name to its family"
        )
    return spec, spec.hugging_face.from_config(content)


def _is_asked(config: JobConfig, key: str) -> bool:
    """Return whether the user has set this option of [model]."""
    return f"model.{key}" in config.origins or getattr(config.model, key) != getattr(Model(), key)


def _config_json(config: JobConfig) -> Path | None:
    """Return the config.json that says the shape; None: the flavor says it."""
    model, names_flavor = config.model, _is_asked(config, "flavor") and config.model.flavor != HF
    if model.hf_config:
        if names_flavor:
            refuse(config, "model.hf_config", f"says the shape, and so does model.flavor = {shown(model.flavor)} "
                f"({config.origin('model.flavor')}); leave one of them out")  # fmt: skip
        asked = Path(model.hf_config).expanduser()
        path = _or_copy(config, asked)
        if path != asked:
            logger.warning('model.hf_config = "%s": there is no such folder; the copy in %s is used', asked, path)
        file = path if path.name == CONFIG and not path.is_dir() else path / CONFIG
        if not file.is_file():
            refuse(config, "model.hf_config", f"there is no {CONFIG}; name it, or its folder")
        return file
    if names_flavor:
        return None
    weights = config.checkpoint.initial_load_path
    folder = _of_weights(config, Path(weights).expanduser()) if weights else None
    if folder is None and model.flavor == HF:
        folder = (None if weights else _copy_to_go_on(config)) or _refuse_no_folder(config)
    return None if folder is None else folder / CONFIG


def _of_weights(config: JobConfig, weights: Path) -> Path | None:
    """Return the folder of the config.json that says the shape of the start of the run; None: none does."""
    path = _or_copy(config, weights)
    if path != weights or is_hugging_face(path):
        return path
    checkpoint = latest_checkpoint(weights)
    of_its_run = checkpoint.parent.parent / HF_CONFIG
    return of_its_run if (checkpoint / INFO).is_file() and (of_its_run / CONFIG).is_file() else None


def _refuse_no_folder(config: JobConfig) -> NoReturn:
    """Refuse the flavor "hf" of a run whose start says no shape."""
    weights = config.checkpoint.initial_load_path
    if not weights:
        refuse(
            config,
            "model.flavor",
            "takes the shape from a folder; add --checkpoint.initial_load_path=FOLDER, one of Hugging Face weights "
            "(config.json, *.safetensors, tokenizer.json), or --model.hf_config=FOLDER for new weights of its shape",
        )
    checkpoint = latest_checkpoint(weights)
    if (checkpoint / INFO).is_file():
        why = f"{checkpoint} is a checkpoint of another flavor; name that with model.flavor"
    else:
        why = why_no_weights(Path(weights).expanduser())
    refuse(config, "checkpoint.initial_load_path", f'model.flavor = "{HF}" takes the shape from a folder: {why}')


def _or_copy(config: JobConfig, path: Path) -> Path:
    """Return ``path``; where it is gone, the folder of the copy that the run that goes on has made, if it does."""
    return path if path.exists() else _copy_to_go_on(config) or path


def _copy_to_go_on(config: JobConfig) -> Path | None:
    """Return the folder of the config.json that the run of the run folder has kept, if that run goes on."""
    run_folder = Path(config.job.dump_folder).expanduser()
    copy = run_folder / HF_CONFIG
    goes_on = config.checkpoint.enable_checkpoint and saved_steps(run_folder / config.checkpoint.folder)
    return copy if goes_on and (copy / CONFIG).is_file() else None
