"""Checkpoints. One is complete or absent, is verified on load, and does not depend on the parallelism."""

from titanlite.checkpoint.folder import saved_steps
from titanlite.checkpoint.hugging_face import HuggingFaceFolder, is_hugging_face
from titanlite.checkpoint.manager import CheckpointManager, Process, SavedCheckpoint
from titanlite.checkpoint.storage import Info

__all__ = [
    "CheckpointManager",
    "HuggingFaceFolder",
    "Info",
    "Process",
    "SavedCheckpoint",
    "is_hugging_face",
    "saved_steps",
]
