"""README.md is run: its Python blocks, its commands, and its links into the repository."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch import ROOT, launch, run

README = ROOT / "README.md"
TIMEOUT_S = 240.0
COMMANDS = ("mpirun", "mpidl", "python")
FENCE = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.* -->\s*\Z")
LINK = re.compile(r"\]\((?!\w+:|#)(?P<path>[^)#\s]+)")


@dataclass(frozen=True)
class Block:
    """A fenced block that is to be run."""

    line: int
    language: str
    text: str


def blocks(*languages: str) -> list[Block]:
    text = README.read_text() if README.exists() else ""
    found = []
    for match in FENCE.finditer(text):
        if match["language"] in languages and not NOT_RUN.search(text[: match.start()]):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(line, match["language"], match["text"]))
    return found


def commands(block: Block) -> list[str]:
    """The commands of a block that can be run here; lines that end in a backslash are joined.

    In a console block with prompts, the lines without one are output.
    """
    lines = re.sub(r"\\\n\s*", " ", block.text).splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.split(maxsplit=1)[:1] and line.split()[0] in COMMANDS]


PYTHON = blocks("python")
SHELL = [(block.line, command) for block in blocks("console", "bash") for command in commands(block)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where README's reader stands: jobs/ is there, and later commands find what earlier ones wrote."""
    path = tmp_path_factory.mktemp("readme")
    (path / "jobs").symlink_to(ROOT / "jobs")
    return path


def test_readme_has_something_to_run() -> None:
    assert PYTHON, "README.md has no python block that is run"
    assert SHELL, "README.md has no command that is run"


@pytest.mark.parametrize("command", [command for _, command in SHELL], ids=[f"line {line}: {c}" for line, c in SHELL])
def test_a_command_of_readme_works(command: str, folder: Path) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "mpirun":
        assert words[1] == "-n", f"how many ranks? {command}"
        launch(int(words[2]), words[3:], timeout=TIMEOUT_S, cwd=folder).check()
    else:
        run([_executable(words[0]), *words[1:]], timeout=TIMEOUT_S, cwd=folder).check()


@pytest.mark.parametrize("block", PYTHON, ids=[f"line {block.line}" for block in PYTHON])
def test_a_python_block_of_readme_works(block: Block, folder: Path) -> None:
    # A file, as a reader would save it: programs that start other processes are imported by them.
    script = folder / f"readme_line_{block.line}.py"
    script.write_text(block.text)
    run([sys.executable, script], timeout=TIMEOUT_S, cwd=folder).check()


def test_links_into_the_repository_lead_somewhere() -> None:
    pages = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for match in LINK.finditer(page.read_text()):
            assert (page.parent / match["path"]).exists(), f"{page.name} links to {match['path']}"


def _executable(name: str) -> Path:
    """The command of this environment, whatever PATH says."""
    return Path(sys.prefix) / "bin" / name
