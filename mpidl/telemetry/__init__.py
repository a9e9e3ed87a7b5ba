"""What a run tells: `metrics.jsonl` for programs, a live view or plain lines for people."""

from mpidl.telemetry import tables
from mpidl.telemetry.console import Console
from mpidl.telemetry.events import Listener, Telemetry, open_for_append
from mpidl.telemetry.tensorboard import TensorBoard, check_tensorboard
from mpidl.telemetry.views import check_progress

__all__ = [
    "Console",
    "Listener",
    "Telemetry",
    "TensorBoard",
    "check_progress",
    "check_tensorboard",
    "open_for_append",
    "tables",
]
