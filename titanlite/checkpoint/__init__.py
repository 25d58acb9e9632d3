"""Checkpoints: complete or not there, checked when loaded, the same for every parallelism."""

from titanlite.checkpoint.folder import saved_steps
from titanlite.checkpoint.manager import CheckpointManager, Found, Process
from titanlite.checkpoint.storage import Info

__all__ = ["CheckpointManager", "Found", "Info", "Process", "saved_steps"]
