"""Checkpoints in shards, and plain weights."""

from mpidl.checkpoint.files import CHECKPOINTS, Keep, checkpoint_path, list_checkpoints
from mpidl.checkpoint.memory import Found, Memory, find
from mpidl.checkpoint.reading import load
from mpidl.checkpoint.weights import WEIGHTS, load_optimizer, load_weights, save_optimizer, save_weights
from mpidl.checkpoint.writer import Outcome, Writer, save

__all__ = [
    "CHECKPOINTS",
    "WEIGHTS",
    "Found",
    "Keep",
    "Memory",
    "Outcome",
    "Writer",
    "checkpoint_path",
    "find",
    "list_checkpoints",
    "load",
    "load_optimizer",
    "load_weights",
    "save",
    "save_optimizer",
    "save_weights",
]
