"""What a run tells: `metrics.jsonl` for programs, a live bar or plain lines for people."""

from mpidl.telemetry import tables
from mpidl.telemetry.console import Console
from mpidl.telemetry.events import Telemetry

__all__ = ["Console", "Telemetry", "tables"]
