"""The version of mpidl, written here only: packaging and the command line read it."""

from __future__ import annotations

__version__ = "0.1.0"
