"""Read damaged files and messages for as long as you like, and tell what mpidl should not have done.

    python jobs/fuzz.py --seconds 600                   # all that is read, in turn, from changes made at random
    python jobs/fuzz.py --seconds 600 npz manifest      # these only
    python jobs/fuzz.py --atheris --seconds 1200 plan   # guided by coverage (pip install atheris)

What is read and what must not happen is in tests/fuzz_targets.py and tests/fuzzing.py. Contents that break something
are left in a folder that is named; guided, a target's search ends there.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if "--atheris" in sys.argv:  # sees the branches of what is imported below it
    import atheris

    import mpidl.kernels  # noqa: F401  # which Numba compiles: it does not know the instructions that atheris adds

    with atheris.instrument_imports(include=["mpidl", "tomllib", "PIL"]):
        import tests.fuzz_targets  # noqa: F401

from tests.fuzz_targets import TARGETS
from tests.fuzzing import Broken, Target, assert_harmless, damaged

LONGEST_S = 20
"""For which a content may be read; who takes longer hangs."""


def main() -> int:
    """Returns 1 where anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: all of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="in all (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the changes (default: 0)")
    parser.add_argument("--atheris", action="store_true", help="let atheris choose the contents")
    given = parser.parse_args()
    names = given.targets or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"there is no target {unknown.pop()!r}; known are {', '.join(TARGETS)}")
    warnings.filterwarnings("ignore", "Reading `.npy` or `.npz` file")  # NumPy's, of files of Python 2
    search = guided if given.atheris else at_random
    return max([search(name, given.seconds / len(names), given.seed) for name in names])


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


def guided(name: str, seconds: float, seed: int) -> int:
    """Let atheris search until the time is over or it has found something, in a process that it ends itself."""
    folder = Path(tempfile.mkdtemp(prefix="mpidl-fuzz-"))
    for each in ("corpus", "read"):
        (folder / each).mkdir()
    for number, content in enumerate(TARGETS[name].seeds + TARGETS[name].hostile):
        (folder / "corpus" / str(number)).write_bytes(content)
    process = os.fork()
    if not process:
        with (folder / "output").open("wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        _search(TARGETS[name], folder, [f"-max_total_time={seconds:.0f}", f"-seed={seed + 1}"])
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    printed = (folder / "output").read_text(errors="replace")
    number = re.findall(r"^(?:stat::number_of_executed_units:\s*|#)(\d+)", printed, re.MULTILINE)
    cover = re.findall(r"cov: (\d+)", printed)
    what = "nothing found" if code == 0 else "\n".join(["found:", *_reasons(printed), f"see {folder}"])
    print(f"{name}: {number[-1] if number else 0} contents, {cover[-1] if cover else 0} branches: {what}", flush=True)
    if code == 0:
        shutil.rmtree(folder)
    return int(code != 0)


def _search(target: Target, folder: Path, options: list[str]) -> None:
    def read(content: bytes) -> None:
        assert_harmless(target, folder / "read", content)

    def change(content: bytes, most_bytes: int, seed: int) -> bytes:
        """As often in the format's own terms as in libFuzzer's."""
        chance = random.Random(seed)
        if chance.random() < 0.5:
            try:
                return damaged(dataclasses.replace(target, seeds=(content,)), chance)[:most_bytes]
            except (ValueError, RecursionError):  # it is no JSON any more
                pass
        return bytes(atheris.Mutate(content, most_bytes))

    limits = [f"-timeout={LONGEST_S}", "-max_len=20000", "-print_final_stats=1", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *options, *limits, str(folder / "corpus")], read, custom_mutator=change)
    atheris.Fuzz()


def _reasons(printed: str) -> list[str]:
    """The lines that tell a finding: Python's last, or libFuzzer's."""
    return re.findall(r"^(?:\S*(?:Broken|Error)\b.*|==\d+==\s*ERROR.*)$", printed, re.MULTILINE)[-2:]


if __name__ == "__main__":
    sys.exit(main())
