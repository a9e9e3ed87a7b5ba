"""What ranks tell each other about a checkpoint: messages of one size, so nobody has to ask for it."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
from numpy.typing import NDArray

from mpidl.checkpoint.transfer import SUM_BYTES
from mpidl.runtime import World

REPORT_BYTES = 1024
_HEAD = struct.Struct(f"<q{SUM_BYTES}s")


@dataclasses.dataclass(frozen=True)
class Report:
    """How a rank's part, or all of it, has ended."""

    checksum: str = ""
    """Of the sums of this rank's file; "" where it has none."""
    num_bytes: int = 0
    """Of the file, or of all files."""
    error: str = ""
    """What went wrong."""

    def of(self, world: World, rank: int) -> Report:
        """The same with the name of the rank that it is about."""
        return dataclasses.replace(self, error=f"{self.error} (rank {rank} on {world.hostnames[rank]})")

    def encode(self) -> NDArray[np.uint8]:
        """As uint8, (REPORT_BYTES,); a long text is cut."""
        text = self.error.encode()[: REPORT_BYTES - _HEAD.size]
        content = _HEAD.pack(self.num_bytes, bytes.fromhex(self.checksum)) + text
        return np.frombuffer(bytearray(content.ljust(REPORT_BYTES, b"\0")), np.uint8)

    @classmethod
    def decode(cls, content: NDArray[np.uint8]) -> Report:
        """What `encode` gave."""
        data = content.tobytes()
        num_bytes, digest = _HEAD.unpack_from(data)
        text = data[_HEAD.size :].rstrip(b"\0").decode(errors="replace")
        return cls(digest.hex() if any(digest) else "", num_bytes, text)
