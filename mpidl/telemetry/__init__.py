"""What a run tells: `metrics.jsonl` for programs, a live bar or plain lines for people."""

from mpidl.telemetry import tables
from mpidl.telemetry.console import Console
from mpidl.telemetry.events import Telemetry, open_for_append

__all__ = ["Console", "Telemetry", "open_for_append", "tables"]
