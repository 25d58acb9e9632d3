"""Checkpoints: complete or not there, checked when loaded, the same for every parallelism."""

from titanlite.checkpoint.folder import saved_steps
from titanlite.checkpoint.hugging_face import HuggingFaceFolder, is_hugging_face
from titanlite.checkpoint.manager import CheckpointManager, Found, Process
from titanlite.checkpoint.storage import Info

__all__ = ["CheckpointManager", "Found", "HuggingFaceFolder", "Info", "Process", "is_hugging_face", "saved_steps"]
