"""What hostile input may do to whoever reads it: nothing but an error of mpidl's that names the file.

`Guard` runs a reader and fails where it raises anything else, starts or unpickles anything, opens a socket, or takes
more memory than the content justifies. `damaged` makes hostile contents from good ones.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpidl.errors import MpidlError

SPARE_BYTES = 16 << 20
"""What any reader may take, whatever it reads."""

_ADDRESSES_BYTES = 1 << 30
"""And of addresses, which counts memory that tracemalloc does not see, such as torch's."""

_FORBIDDEN = (
    "pickle.find_class", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "socket.", "shutil.",
)  # fmt: skip

DEEP = "@deep@"
"""Stands for lists in lists, so many that whoever follows them recursively runs out of stack."""

_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**30, 1e308, float("inf"), float("nan"), "", "x", "\ud800", "a\x00b",
    "../../etc/passwd", [], {}, [[]], {"a": 1}, [None], DEEP,
)  # fmt: skip
_BYTES = (
    b"", b"\0", b"\xff", b"\0" * 8, b"\xff" * 4, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\1\0",
    b"0", b"9" * 30, b"-1", b"[" * 4000, b"{", b'"', b"\n", b"nan", b"1e999", b"\x80\x04cos\nsystem\n",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """Something that is read."""

    seeds: tuple[bytes, ...]
    """Contents that are read without an error."""
    read: Callable[[Path, bytes], object]
    """Put the content into an empty folder and read it."""
    hostile: tuple[bytes, ...] = ()
    """Contents that are refused, such as headers that state more than there is."""
    is_json: bool = False
    """Whether each line is of JSON."""
    names_the_file: bool = True
    """Whether an error says which file it is about, by a name that `read` has made."""
    ratio: int = 100
    """Bytes of memory that a byte of the content justifies."""


class Broken(AssertionError):
    """A reader did what it must not do."""


_watching = False
_seen: list[str] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _watching and event.startswith(_FORBIDDEN):
        _seen.append(f"{event} {args}")


sys.addaudithook(_hook)


def assert_harmless(target: Target, folder: Path, content: bytes) -> str | None:
    """Read a content; returns the error's message, None where it was read.

    Raises:
        Broken: the reader did what it must not do.
    """
    message = None
    with _watched(SPARE_BYTES + target.ratio * len(content)):
        try:
            target.read(folder, content)
        except MpidlError as error:
            message = str(error)
        except Exception as error:
            raise Broken(f"{type(error).__name__} instead of an error of mpidl's: {error}") from error
    if message is not None and target.names_the_file and str(folder) not in message:
        raise Broken(f"the message does not name the file: {message}")
    return message


@contextlib.contextmanager
def _watched(num_bytes: int) -> Iterator[None]:
    global _watching
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _seen.clear()
    tracemalloc.start()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ADDRESSES_BYTES, hard))
    _watching = True
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        _watching = False
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        tracemalloc.stop()
    if _seen:
        raise Broken(f"it ran or opened something: {_seen}")
    if peak > num_bytes:
        raise Broken(f"it took {peak} bytes of memory, {num_bytes} are justified")


def damaged(target: Target, chance: random.Random) -> bytes:
    """One of the target's seeds with some changes."""
    content = chance.choice(target.seeds)
    if target.is_json and chance.random() < 0.7:
        return _damaged_json(content, chance)
    for _ in range(chance.randint(1, 4)):
        place = chance.randint(0, len(content))
        if chance.random() < 0.5:
            place = min(place, chance.randint(0, 200))  # headers are in front
        length = chance.choice((0, 0, 1, 2, 4, 8, 64, len(content)))
        if chance.random() < 0.5:
            new = chance.choice(_BYTES)
            length = chance.choice((length, len(new)))
        else:
            new = chance.randbytes(min(length, 8) or 1)
        content = content[:place] + new + content[place + length :]
    return content


def _damaged_json(content: bytes, chance: random.Random) -> bytes:
    lines = content.decode().splitlines()
    for _ in range(chance.randint(1, 2)):
        number = chance.randrange(len(lines))
        lines[number] = json.dumps(_changed(json.loads(lines[number]), chance))
    if chance.random() < 0.2:
        lines.insert(chance.randrange(len(lines)), lines[chance.randrange(len(lines))])
    return "\n".join(lines).replace(f'"{DEEP}"', "[" * 20000 + "]" * 20000).encode() + b"\n"


def _changed(value: Any, chance: random.Random) -> Any:
    """The value with one of its parts, or itself, replaced or taken away."""
    if isinstance(value, dict | list) and value and chance.random() < 0.9:
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = value.copy()
        if chance.random() < 0.1:
            del value[key]
        else:
            value[key] = _changed(value[key], chance)
        return value
    return chance.choice(_VALUES)
