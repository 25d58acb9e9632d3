"""The configuration: ``schema`` defines the options, ``load`` reads them, ``check`` checks that they fit together."""

from titanlite.config.check import check_config
from titanlite.config.load import load_config
from titanlite.config.parallelism import Degrees, global_batch_size, pipeline_microbatches, resolve_degrees
from titanlite.config.run_config import dump_toml
from titanlite.config.schema import JobConfig
from titanlite.config.third_party import import_custom, import_module
from titanlite.config.validation import holds_out

__all__ = [
    "Degrees",
    "JobConfig",
    "check_config",
    "dump_toml",
    "global_batch_size",
    "holds_out",
    "import_custom",
    "import_module",
    "load_config",
    "pipeline_microbatches",
    "resolve_degrees",
]
