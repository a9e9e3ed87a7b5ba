"""What `bench step` has measured, for `bench simulate --step`: compute of each model, and how fast memory is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from mpidl.bench.report import Row, milliseconds
from mpidl.bench.simulate_points import Speeds, check_row, read_rows
from mpidl.bench.step_ways import ALONE, ORDERED
from mpidl.errors import ConfigError


class StepFigures:
    """The rows of some files, and what has been taken from them.

    Args:
        files: as `bench step --json` wrote them.
        batch: samples of a rank.

    Raises:
        ConfigError: a file cannot be read, is another's, or damaged.
    """

    def __init__(self, files: Sequence[str], batch: int) -> None:
        kinds = {"way": str, "case": str, "ranks": int, "nodes": int}
        self._rows = [(row, path) for path in map(Path, files) for row in read_rows(path, "step", kinds)]
        self._files, self._batch = ", ".join(files), batch
        self.told: list[str] = []
        """Which number is from where."""

    def compute(self, name: str) -> tuple[float, float]:
        """Forward's and backward's seconds of a model, without any exchange.

        Raises:
            ConfigError: not measured with this batch; or damaged.
        """
        alone = [(row, path) for row, path in self._rows if row["way"] == ALONE]
        for row, path in alone:
            if row["case"].startswith(f"{name}, batch {self._batch} a rank"):
                check_row(row, {"phases": dict}, path)
                check_row(row["phases"], {"forward": float, "backward": float}, path)
                forward_s, backward_s = row["phases"]["forward"], row["phases"]["backward"]
                times = f"{milliseconds(forward_s)} + {milliseconds(backward_s)} ms"
                self.told.append(f"measured: compute of {name}: {times}, {path}, {ALONE}, {_where(row)}")
                return forward_s, backward_s
        cases = "; ".join(dict.fromkeys(row["case"] for row, _ in alone)) or f"no {ALONE}"
        raise ConfigError(
            f"{self._files}: no figures of {name} with batch {self._batch} a rank, but of {cases}; measure it with "
            "bench step, give other --models or --batch, or no --step"
        )

    def speeds(self) -> Speeds | None:
        """How fast a rank's sums and its optimizer are, medians over the files; None: nothing on one node has told.

        Raises:
            ConfigError: damaged.
        """
        found = [(row, path) for row, path in self._rows if row["way"] == ORDERED and "sum_bytes_per_s" in row]
        for row, path in found:
            check_row(row, {"sum_bytes_per_s": float, "update_bytes_per_s": float}, path)
        if not found:
            self.told.append(f"assumed: how fast sums and updates are (no {ORDERED} on one node in {self._files})")
            return None
        sums, updates = (
            statistics.median(row[f"{kind}_bytes_per_s"] for row, _ in found) for kind in ("sum", "update")
        )
        paths = ", ".join(str(path) for _, path in found)
        rates = f"sums {sums / 1e9:.3g} and updates {updates / 1e9:.3g} GB/s"
        self.told.append(f"measured: a rank's {rates}: {paths}, {ORDERED}, medians")
        return sums, updates


def _where(row: Row) -> str:
    return f"{row['ranks']} rank(s) on {row['nodes']} node(s)"
