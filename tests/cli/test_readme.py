"""README.md and pages of docs/ are run: their programs, their commands, and their links into the repository."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch import ROOT, launch, run

README = ROOT / "README.md"
TIMEOUT_S = 240.0
COMMANDS = ("mpirun", "mpidl", "python", "torchrun", "cmp")
PAGES = ("getting-started", "own-loop", "reproducibility", "coming-from")
"""Of docs/: those with programs of their own; files are named in their first lines."""
FENCE = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.* -->\s*\Z")
LINK = re.compile(r"\]\((?!\w+:|#)(?P<path>[^)#\s]+)")


@dataclass(frozen=True)
class Block:
    """A fenced block that is to be run."""

    line: int
    language: str
    text: str


def blocks(*languages: str, page: Path = README) -> list[Block]:
    text = page.read_text()
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
    assert_command_works(command, folder)


def assert_command_works(command: str, folder: Path) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "mpirun":
        assert words[1] == "-n", f"how many ranks? {command}"
        ended = launch(int(words[2]), words[3:], timeout=TIMEOUT_S, cwd=folder)
    else:
        ended = run([_executable(words[0]), *words[1:]], timeout=TIMEOUT_S, cwd=folder)
    assert ended.returncode == 0, ended.output


@pytest.mark.parametrize("block", PYTHON, ids=[f"line {block.line}" for block in PYTHON])
def test_a_python_block_of_readme_works(block: Block, folder: Path) -> None:
    # A file, as a reader would save it: programs that start other processes are imported by them.
    script = folder / f"readme_line_{block.line}.py"
    script.write_text(block.text)
    ended = run([sys.executable, script], timeout=TIMEOUT_S, cwd=folder)
    assert ended.returncode == 0, ended.output


@pytest.mark.thorough
@pytest.mark.parametrize("name", PAGES)
def test_a_page_s_programs_and_commands_work_from_top_to_bottom(name: str, tmp_path: Path) -> None:
    page = ROOT / "docs" / f"{name}.md"
    for block in blocks("python", "toml", page=page):
        file = re.match(r"# (\S+\.(py|toml))\n", block.text)
        assert file, f"{page.name}, line {block.line}: what is this file's name?"
        (tmp_path / file[1]).write_text(block.text)
    to_run = [command for block in blocks("console", page=page) for command in commands(block)]
    assert to_run, f"{page.name} has no command that is run"
    for command in to_run:
        assert_command_works(command, tmp_path)


def test_links_into_the_repository_lead_somewhere() -> None:
    pages = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for match in LINK.finditer(page.read_text()):
            assert (page.parent / match["path"]).exists(), f"{page.name} links to {match['path']}"


def _executable(name: str) -> Path:
    """The command of this environment, whatever PATH says."""
    own = Path(sys.prefix) / "bin" / name
    return own if own.exists() else Path(shutil.which(name) or name)
