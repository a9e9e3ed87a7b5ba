"""Runs commands one after the other on the same ranks: `commands.py FILE`, a JSON object of name -> arguments.

Standard error gets "=== NAME" before a command's own output and "=== codes [...]", one of each rank, after it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mpidl
from mpidl import cli


def tell(text: str) -> None:
    mpidl.barrier()
    if mpidl.rank() == 0:
        print(f"=== {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    for name, arguments in json.loads(Path(sys.argv[1]).read_text()).items():
        tell(name)
        codes = mpidl.init().allgather_object(cli.main(arguments))
        tell(f"codes {codes}")
