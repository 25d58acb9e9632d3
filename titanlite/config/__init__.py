"""The configuration: ``schema`` defines the options, ``load`` reads them, ``check`` checks that they fit together."""

from titanlite.config.check import check_config
from titanlite.config.load import dump_toml, import_module, load_config
from titanlite.config.parallelism import Degrees, global_batch_size, pipeline_microbatches, resolve_degrees
from titanlite.config.schema import JobConfig
from titanlite.config.validation import holds_out

__all__ = [
    "Degrees",
    "JobConfig",
    "check_config",
    "dump_toml",
    "global_batch_size",
    "holds_out",
    "import_module",
    "load_config",
    "pipeline_microbatches",
    "resolve_degrees",
]
