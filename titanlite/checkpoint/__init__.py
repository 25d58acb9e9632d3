"""Checkpoints. One is complete or absent, is verified on load, and does not depend on the parallelism."""

from titanlite.checkpoint.folder import DamagedCheckpoint, saved_steps
from titanlite.checkpoint.hugging_face import HuggingFaceFolder, is_hugging_face
from titanlite.checkpoint.manager import CheckpointManager
from titanlite.checkpoint.reader import CheckpointReader, SavedCheckpoint
from titanlite.checkpoint.state import Process
from titanlite.checkpoint.storage import Info
from titanlite.checkpoint.tokenizer import ChosenTokenizer, Weights, choose_tokenizer
from titanlite.checkpoint.torchtitan import TorchtitanFolder, is_torchtitan

__all__ = [
    "CheckpointManager",
    "CheckpointReader",
    "ChosenTokenizer",
    "DamagedCheckpoint",
    "HuggingFaceFolder",
    "Info",
    "Process",
    "SavedCheckpoint",
    "TorchtitanFolder",
    "Weights",
    "choose_tokenizer",
    "is_hugging_face",
    "is_torchtitan",
    "saved_steps",
]
