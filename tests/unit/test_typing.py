"""What an editor and a type checker see of mpidl in a user's own program."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.launch import run

pytestmark = [pytest.mark.launches, pytest.mark.thorough]

PROGRAM = """
import functools

import torch
from torch import nn

import mpidl

model = nn.Linear(4, 2)
manager = mpidl.ParameterManager(model, functools.partial(torch.optim.SGD, lr=0.1), clip_norm=1.0)
reveal_type(manager.step(num_samples=3))
reveal_type(mpidl.rank())
reveal_type(mpidl.triggers.iterations(3) | mpidl.triggers.at_end())
trainer = mpidl.Trainer(
    model, nn.functional.cross_entropy, functools.partial(torch.optim.Adam, lr=1e-3), batch_size=8, run_dir="run"
)
reveal_type(trainer.stopped)
trainer.fit((torch.zeros(8, 4), torch.zeros(8).long()), epochs=1)
mpidl.ParameterManager(model, functools.partial(torch.optim.SGD, lr=0.1), clip_nrom=1.0)
mpidl.size() + "ranks"
"""


def test_a_user_s_program_is_checked_against_the_public_surface(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    ended = run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", program],
        cwd=tmp_path,
        timeout=300,
    )
    revealed = re.findall(r'Revealed type is "(.*)"', ended.stdout)
    kinds = [kind.replace("builtins.", "") for kind in revealed]
    assert kinds == ["float", "int", "mpidl.scheduling.triggers.Trigger", "str | None"], ended.output
    errors = re.findall(r"error: .*", ended.stdout)
    assert len(errors) == 2, ended.output
    assert "clip_nrom" in errors[0], ended.output
    assert "int" in errors[1], ended.output
