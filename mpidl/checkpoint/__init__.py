"""Checkpoints in shards, and plain weights."""

from mpidl.checkpoint.files import CHECKPOINTS, Keep, checkpoint_path, list_checkpoints
from mpidl.checkpoint.local import LocalFiles
from mpidl.checkpoint.memory import Found, Memory, find, find_in_files
from mpidl.checkpoint.reading import load
from mpidl.checkpoint.weights import WEIGHTS, find_weights, load_optimizer, load_weights, save_optimizer, save_weights
from mpidl.checkpoint.writer import Outcome, Writer, save

__all__ = [
    "CHECKPOINTS",
    "WEIGHTS",
    "Found",
    "Keep",
    "LocalFiles",
    "Memory",
    "Outcome",
    "Writer",
    "checkpoint_path",
    "find",
    "find_in_files",
    "find_weights",
    "list_checkpoints",
    "load",
    "load_optimizer",
    "load_weights",
    "save",
    "save_optimizer",
    "save_weights",
]
