"""Read damaged files and messages for as long as you like, and tell what mpidl should not have done.

    python jobs/fuzz.py --seconds 600                   # all that is read, in turn, from changes made at random
    python jobs/fuzz.py --seconds 600 npz manifest      # these only
    python jobs/fuzz.py --atheris plan                  # one of them, guided by coverage (pip install atheris)

What is read and what must not happen is in tests/fuzz_targets.py and tests/fuzzing.py. Contents that break something
are left in a folder that is named.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.fuzz_targets import TARGETS
from tests.fuzzing import Broken, Target, assert_harmless, damaged


def main() -> int:
    """Returns 1 where anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: all of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="in all (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the changes (default: 0)")
    parser.add_argument("--atheris", action="store_true", help="let atheris choose the contents of one target")
    given = parser.parse_args()
    names = given.targets or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"there is no target {unknown.pop()!r}; known are {', '.join(TARGETS)}")
    if given.atheris and len(names) != 1:
        parser.error("--atheris takes one target")
    warnings.filterwarnings("ignore", "Reading `.npy` or `.npz` file")  # NumPy's, of files of Python 2
    if given.atheris:
        return guided(TARGETS[names[0]], given.seconds)
    return max([at_random(name, given.seconds / len(names), given.seed) for name in names])


def at_random(name: str, seconds: float, seed: int) -> int:
    """Change good contents until the time is over; each kind of finding is told once."""
    target, found = TARGETS[name], dict[str, Path]()
    begin, number = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="mpidl-fuzz-") as folder:
        while time.monotonic() < begin + seconds:
            content = damaged(target, random.Random(seed + number))
            number += 1
            try:
                assert_harmless(target, Path(folder), content)
            except Broken as error:
                kind = " ".join(word for word in str(error).split() if word.isalpha())
                if kind not in found:
                    found[kind] = keep(name, content)
                    print(f"{name}: {error}: {found[kind]}", flush=True)
    print(f"{name}: {number} contents in {seconds:.0f} s, {len(found)} finding(s)", flush=True)
    return int(bool(found))


def keep(name: str, content: bytes) -> Path:
    """Write a content where it stays."""
    path = Path(tempfile.mkdtemp(prefix="mpidl-found-")) / name.replace(" ", "-")
    path.write_bytes(content)
    return path


def guided(target: Target, seconds: float) -> int:
    """Let atheris search; it ends the process itself, at the first finding with a traceback and a file."""
    import atheris

    folder = Path(tempfile.mkdtemp(prefix="mpidl-fuzz-"))
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, content in enumerate(target.seeds + target.hostile):
        (corpus / str(number)).write_bytes(content)
    (folder / "read").mkdir()
    atheris.instrument_all()
    options = [f"-max_total_time={seconds:.0f}", f"-artifact_prefix={folder}/", "-max_len=20000", str(corpus)]
    atheris.Setup([sys.argv[0], *options], lambda content: assert_harmless(target, folder / "read", content) and None)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
