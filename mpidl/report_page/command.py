"""`mpidl report`: from its arguments to files."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from mpidl.errors import ConfigError
from mpidl.report_page.benches import Bench, read_bench
from mpidl.report_page.runs import Run, read_run


def run(parsed: argparse.Namespace) -> None:
    """Read everything, then write the page.

    Raises:
        ConfigError: matplotlib is missing, an input is not what is asked for or is damaged, or a file cannot be
            written.
    """
    from mpidl.report_page import page

    output, png_dir = Path(parsed.output), Path(parsed.png) if parsed.png else None
    _check(output)
    runs, benches = read(parsed.inputs)
    try:
        if png_dir is not None:
            png_dir.mkdir(exist_ok=True)
        text = page.build(runs, benches, png_dir)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{error.filename or output} cannot be written: {error.strerror}") from None
    pictures = "" if png_dir is None else f", pictures to {png_dir}"
    numbers = ((len(runs), "run"), (len(benches), "benchmark file"))
    told = " and ".join(f"{number} {noun}{'s' * (number > 1)}" for number, noun in numbers if number)
    print(f"report on {told} written to {output}{pictures}")


def read(inputs: list[str]) -> tuple[list[Run], list[Bench]]:
    """Read what was named: a file is a benchmark's, a folder a run's.

    Raises:
        ConfigError: one is neither, or damaged.
    """
    paths = list(dict.fromkeys(map(Path, inputs)))
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path} does not exist; give run directories and files that mpidl bench --json wrote")
    runs = [read_run(path) for path in paths if path.is_dir()]
    return runs, [read_bench(path) for path in paths if not path.is_dir()]


def _check(output: Path) -> None:
    """See that the page can be drawn, and that it replaces nothing but a page."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("mpidl report draws with matplotlib, which is not installed: pip install matplotlib")
    if output.suffix not in (".html", ".htm"):
        raise ConfigError(f"--output {output}: the name must end in .html, since what has the name is replaced")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}; make it first")
