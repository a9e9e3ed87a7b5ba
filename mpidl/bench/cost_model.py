"""What control would cost on more ranks: models whose coefficients are fitted to what was measured. Pure.

Terms have coefficients of at least zero. The fit is by least squares of relative errors, so that a microsecond that is
wrong by a tenth counts as much as a millisecond that is.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mpidl.bench.control import Groups
from mpidl.bench.report import Row

Terms = Mapping[str, float]
"""What each coefficient is multiplied with, by the term's name."""

ASSUMPTIONS = (
    "every rank has a core of its own; what ranks on shared cores do takes as many times as long as there are of them",
    "one partition a rank, one param group",
    "messages have this machine's latency, once for each of log2(ranks) steps, and its bandwidth at rank 0, for all "
    "bytes of plan and report",
    "an answered task takes as much of rank 0's time, whichever rank answers",
)


@dataclasses.dataclass(frozen=True)
class Model:
    """Seconds as a sum of terms."""

    coefficients: Mapping[str, float]
    """Seconds, by the term's name."""
    residual: float
    """Root mean square of the relative errors."""

    def seconds(self, terms: Terms) -> float:
        """What the model says."""
        return sum(self.coefficients.get(name, 0.0) * value for name, value in terms.items())

    def told(self, names: Iterable[str]) -> str:
        """The coefficients of these terms, in microseconds, and the residual."""
        parts = [f"{1e6 * self.coefficients.get(name, 0.0):.3g} {name}" for name in names]
        return f"{' + '.join(parts)}, in microseconds; residual {100 * self.residual:.0f} %"


def fit(samples: Sequence[Terms], seconds: Sequence[float]) -> Model:
    """The non-negative coefficients with the least squares of relative errors.

    All sets of terms are tried: the best fit whose coefficients are all positive is the one.

    Args:
        samples: the terms of each measurement; a term that is left out is zero.
        seconds: of each, above zero.
    """
    names = list(dict.fromkeys(name for terms in samples for name in terms))
    matrix = np.array([[terms.get(name, 0.0) for name in names] for terms in samples]) / np.array(seconds)[:, None]
    best = Model({}, 1.0)  # no term at all: every error is the whole
    for number in range(1, len(names) + 1):
        for chosen in itertools.combinations(range(len(names)), number):
            part = matrix[:, chosen]
            values, _, rank, _ = np.linalg.lstsq(part, np.ones(len(seconds)))
            residual = math.sqrt(float(np.mean((part @ values - 1) ** 2)))
            if rank == number and (values > 0).all() and residual < best.residual:
                best = Model({names[i]: float(value) for i, value in zip(chosen, values, strict=True)}, residual)
    return best


def terms_of_group(ranks: int, group_size: int, crowd: float = 1.0) -> Terms:
    """What a group's control takes.

    Args:
        ranks: their number.
        group_size: iterations of the group.
        crowd: ranks that share a core; what each has to do takes so many times as long.
    """
    return {
        "a group": crowd,
        "an iteration of it": crowd * group_size,
        "log2(ranks)": crowd * math.log2(ranks),
        "a rank": crowd * ranks,
        "a byte": crowd * Groups.bytes_of(group_size, ranks),
    }


def terms_of_tasks(tasks: int, crowd: float = 1.0) -> Terms:
    """What an iteration of a centralised scheduler takes."""
    return {"an iteration": crowd, "a task": tasks, "a task on a shared core": (crowd - 1) * tasks}


def _terms_of_piece(row: Row) -> Terms:
    ranks, crowd = row["ranks"], row["ranks_per_core"]
    if row["way"] == "messages":
        return {"(messages)": crowd, "log2(ranks)": crowd * math.log2(ranks), "a byte": crowd * row["bytes"]}
    return {"(plan)": crowd, "a rank": crowd * row["entries"]}


@dataclasses.dataclass(frozen=True)
class Models:
    """What a group of mpidl takes, and an iteration of a centralised scheduler."""

    group: Model
    central: Model

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Models | None:
        """Fitted to what was measured; None where ranks of fewer than three numbers were.

        With fewer, what grows with the ranks cannot be told from what grows with those that share a core.
        """
        if len({row["ranks"] for row in rows}) < 3:
            return None
        groups: list[tuple[Terms, float]] = []
        tasks: list[tuple[Terms, float]] = []
        for row in rows:
            seconds, crowd = row["seconds"], row["ranks_per_core"]
            if row["way"] == "mpidl":
                size = row["group_size"]
                groups.append((terms_of_group(row["ranks"], size, crowd), size * seconds))
            elif row["way"] == "central":
                tasks.append((terms_of_tasks(row["partitions"], crowd), seconds))
            else:
                groups.append((_terms_of_piece(row), seconds))
        return cls(fit(*zip(*groups, strict=True)), fit(*zip(*tasks, strict=True)))

    def told(self) -> list[str]:
        """Both, with what they take for granted."""
        group, central = self.group.told(terms_of_group(1, 1)), self.central.told(("an iteration", "a task"))
        return [
            f"model of a group of mpidl: {group}",
            f"model of a centralised iteration: {central}",
            *[f"assumed: {assumption}" for assumption in ASSUMPTIONS],
        ]
