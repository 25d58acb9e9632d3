"""titanlite: pre-train Llama-style language models, from one laptop to a cluster, with its own float8."""

__version__ = "0.1.0"
