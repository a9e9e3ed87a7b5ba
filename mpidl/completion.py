"""`mpidl completion SHELL`: a script for the shell, which shtab makes from the parsers.

It completes commands, flags, their words, files and folders; in bash also where mpidl stands behind `mpidl launch`,
mpirun or srun, unless something else completes these. It is text that needs no Python once it is made.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from mpidl import config

SHELLS = ("bash", "zsh", "tcsh", "fish")

_FOLDERS = ("RUN_DIR", "FOLDER", "DIR")
_FILES = ("FILE", "PATH", "JOB", "RUN_DIR|BENCH.json")
_FOLDER_SETTINGS = ("data_dir", "run_dir")

_BEHIND_LAUNCHERS = """\
_mpidl_last() { # what is behind the last mpidl of the line
  local at
  for ((at = COMP_CWORD - 1; at >= 0; at--)); do
    if [[ ${COMP_WORDS[at]##*/} == mpidl ]]; then
      COMP_WORDS=("${COMP_WORDS[@]:at}")
      COMP_CWORD=$((COMP_CWORD - at))
      _shtab_mpidl
      return
    fi
  done
}
complete -o bashdefault -F _mpidl_last mpidl
for _mpidl_launcher in mpirun mpiexec srun; do
  complete -p "$_mpidl_launcher" &>/dev/null ||
    complete -o bashdefault -o default -F _mpidl_last "$_mpidl_launcher"
done
unset _mpidl_launcher
"""


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for a shell.

    Args:
        parser: the program's; its actions get what shtab looks for, so it is good for nothing else afterwards.
        shell: one of `SHELLS`.
    """
    import shtab

    for action in _actions(parser):
        setting = "model" if action.dest == "model_name" else action.dest
        if setting in config.field_names() and (words := config.words(setting)):
            action.choices = words
        elif action.dest in _FOLDER_SETTINGS or action.metavar in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return f"{shtab.complete(parser, shell)}\n" + (_BEHIND_LAUNCHERS if shell == "bash" else "")


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Those of the parser and of its commands, at any depth."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _actions(each)
