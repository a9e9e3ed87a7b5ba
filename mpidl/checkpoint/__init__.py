"""Checkpoints in shards, and plain weights."""

from mpidl.checkpoint.files import checkpoint_path, list_checkpoints
from mpidl.checkpoint.sharded import load, save
from mpidl.checkpoint.weights import WEIGHTS, load_weights, save_weights

__all__ = ["WEIGHTS", "checkpoint_path", "list_checkpoints", "load", "load_weights", "save", "save_weights"]
