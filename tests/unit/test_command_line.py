"""Claims about help, examples and completion: what is shown can be typed, and the shell knows what the parsers know."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from mpidl import cli, command_line, completion, config, data, examples, models
from mpidl.errors import ConfigError
from mpidl.runtime import without_launcher
from tests.launch import ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
END = {":", ";", "|", ">", "&&"}


def words_of(line: str) -> list[str]:
    """What is behind the first mpidl of a shell's line, up to the command's end; nothing where there is none."""
    words = shlex.split(re.sub(r'"?\$\((.*?)\)"?', r"\1", line), comments=True)
    found = words[words.index("mpidl") + 1 :] if "mpidl" in words else []
    return found[: next((at for at, word in enumerate(found) if word in END), len(found))]


def check(words: list[str]) -> str:
    """Parse the words behind mpidl; the settings of a training have to be right, too. Returns the command's name."""
    parsed = cli.parse(words)
    if parsed.command == "launch":
        assert parsed.words[:2] == ["mpidl", "train"]
        assert check(parsed.words[1:]) == "train"
    if parsed.command == "train":
        is_ours = parsed.job is not None and parsed.job.startswith("jobs/")
        config.load(ROOT / parsed.job if is_ours else None, parsed.overrides)
    return f"bench {parsed.bench}" if parsed.command == "bench" else str(parsed.command)


@pytest.mark.parametrize("name", command_line.parsers())
def test_every_help_ends_with_examples_that_are_right(name: str) -> None:
    shown = command_line.parsers()[name].format_help()
    assert 2 <= len(examples.EXAMPLES[name]) <= 4
    assert shown.endswith(f"  {examples.EXAMPLES[name][-1][1]}\n")
    assert max(map(len, examples.epilog(name).splitlines())) <= 80
    told = [check(words_of(line)) for _, line in examples.EXAMPLES[name]]
    assert not name or any(each.startswith(name) for each in told)


def test_there_are_examples_for_nothing_else() -> None:
    assert set(examples.EXAMPLES) == set(command_line.parsers())


def test_what_an_example_must_not_be_is_seen() -> None:
    for line in ("mpirun -n 2 mpidl trian", "mpidl train --lr fast", "mpidl launch -n 2 mpidl train --epoch 3"):
        with pytest.raises(ConfigError):
            check(words_of(line))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_can_be_typed(page: Path) -> None:
    blocks = [re.sub(r"\\\n\s*", " ", block) for block in CONSOLE.findall(page.read_text())]
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith(("$ ", "# "))]
    commands = [words for line in lines if (words := words_of(line))]
    assert bool(commands) == any("mpidl " in line for line in lines), "none is overlooked"
    assert {check(words) for words in commands} <= set(command_line.parsers())


def test_the_built_in_names_of_help_and_completion_are_those_that_work() -> None:
    assert config.MODELS == models.NAMES
    assert config.DATA == data.NAMES


COMPLETE = """\
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_mpidl_last "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completed(line: str, folder: Path) -> set[str]:
    """What bash offers behind the line, whose last word is begun, or empty behind a blank."""
    script = completion.script(command_line.parsers()[""], "bash")
    done = subprocess.run(
        ["bash", "--norc", "-c", script + COMPLETE, "bash", *line.split(" ")],
        cwd=folder, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return set(done.stdout.split())


def test_bash_completes_commands_flags_words_and_files(tmp_path: Path) -> None:
    (tmp_path / "digits.toml").touch()
    (tmp_path / "digits").mkdir()
    assert completed("mpidl ", tmp_path) == {name for name in command_line.parsers() if name and " " not in name}
    assert completed("mpidl train --sche", tmp_path) == {"--schedule", "--schedule-args"}
    assert completed("mpidl train --schedule co", tmp_path) == {"constant", "cosine"}
    assert completed("mpidl train --tensorboard ", tmp_path) == {"true", "false"}
    assert completed("mpidl bench sync --model resn", tmp_path) == {"resnet50"}
    assert completed("mpidl train dig", tmp_path) == {"digits.toml", "digits"}
    assert completed("mpidl top dig", tmp_path) == {"digits"}


@pytest.mark.parametrize("launcher", ["mpirun -n 4", "srun --mpi=pmi2", "mpidl launch -n 4"])
def test_bash_completes_behind_a_launcher(launcher: str, tmp_path: Path) -> None:
    assert completed(f"{launcher} mpidl train --warm", tmp_path) == {"--warmup-iterations"}
    assert completed(f"{launcher} python --warm", tmp_path) == set()


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_shell_gets_a_script_with_commands_and_flags(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in set(os.environ) - set(without_launcher()):  # under a launcher rank 0 alone would print it
        monkeypatch.delenv(name)
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert {"train", "evaluate", "warmup-iterations", "cosine", "run-dir"} <= set(
        re.findall(r"[\w-]+\w", script.replace("--", " "))
    )
