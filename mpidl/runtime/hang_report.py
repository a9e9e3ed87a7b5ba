"""Who keeps the others waiting, in words. Pure: from what is known of every rank to a text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from mpidl.runtime.activity import ENDING, PHASES, RankState


def describe(
    states: Sequence[RankState], silent_hosts: Sequence[tuple[str, Sequence[int]]] = (), *, is_alone: bool = False
) -> list[str]:
    """The lines of a report: whoever does not wait for others first, with its stack; then those that wait.

    Args:
        states: of the ranks that are known of.
        silent_hosts: nodes that nothing was heard of: (host, its ranks).
        is_alone: whether there are other nodes, which cannot be asked.
    """
    culprits = [state for state in states if not waits(state)]
    waiting = [state for state in states if waits(state)]
    awaited = _most_common([_place(state) for state in waiting])
    lines = [line for state in culprits for line in _accuse(state, awaited)]
    for host, ranks in silent_hosts:
        lines.append(
            f"nothing is heard of {host} ({ranks_text(ranks)}): it is down, stopped, or does not see the run directory"
        )
    places = _grouped(waiting)
    if not lines and len(places) > 1:
        wire = ", or is a connection between hosts dead" * (is_alone or len({state.host for state in states}) > 1)
        lines.append(f"no rank computes, and they wait for different things: do all ranks make the same calls{wire}?")
    elif not lines and is_alone:
        lines.append("all ranks here wait for those of other nodes")
    elif not lines and waiting:
        lines.append(
            "all ranks wait for each other in the same place: a connection between hosts may be dead, or a message lost"
        )
    if is_alone and not culprits:
        lines.append("other nodes cannot be asked: mpidl.watch takes a folder for that, the Trainer a run_dir")
    for place, members in places:
        longest = max(state.waits_s or 0.0 for state in members)
        lines.append(f"{_who(members)} in {place}, for {longest:.0f} s")
    # Where nobody is to blame, what they wait in may tell.
    for state in () if culprits or silent_hosts else [members[0] for _, members in places]:
        lines += [f"the stack of rank {state.rank}:", *state.stack.splitlines()] if state.stack else []
    return lines


def describe_gone(host: str, signals: Mapping[int, int]) -> str:
    """The line about a node all of whose ranks were lost.

    Args:
        host: its name.
        signals: of its ranks, rank -> number of the signal; negative: the exit code.
    """
    ends: dict[str, list[int]] = {}
    for rank, number in sorted(signals.items()):
        how = f"died of signal {number}" if number > 0 else f"left with code {-number}"
        ends.setdefault(how, []).append(rank)
    return f"nobody is left on {host}: {', '.join(f'{ranks_text(ranks)} {how}' for how, ranks in ends.items())}"


def ranks_text(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0, 2-5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return f"rank{'s' * (len(runs) > 1 or '-' in texts[0])} {', '.join(texts)}"


def waits(state: RankState) -> bool:
    """Whether a rank waits for others, or has done its work: it is not to blame."""
    return not state.process and (state.waits_s is not None or state.phase == PHASES[ENDING])


def _place(state: RankState) -> str:
    bucket = "" if state.bucket is None else f", bucket {state.bucket}"
    return f"{state.phase} of iteration {state.iteration}{bucket}"


def _most_common(places: Sequence[str]) -> str | None:
    return max(places, key=places.count) if places else None


def _accuse(state: RankState, awaited: str | None) -> list[str]:
    who = f"rank {state.rank} ({state.host}, process {state.pid})"
    if state.process == "dead":
        return [f"{who} has died; it was in {_place(state)}"]
    stopped = "is stopped (SIGSTOP, or a debugger); it " if state.process == "stopped" else ""
    entered = "" if awaited is None or awaited == _place(state) else f"has not entered {awaited}; it "
    told = f"{who} {stopped}{entered}has been in {_place(state)} for {state.phase_s:.0f} s"
    return [f"{told}; its stack:", *state.stack.splitlines()] if state.stack else [told]


def _grouped(states: Sequence[RankState]) -> list[tuple[str, list[RankState]]]:
    ordered = sorted(states, key=lambda state: (_place(state), state.rank))
    groups = [(place, list(members)) for place, members in itertools.groupby(ordered, key=_place)]
    return sorted(groups, key=lambda group: -len(group[1]))


def _who(members: Sequence[RankState]) -> str:
    number = len(members)
    return f"{number} rank{'s' * (number > 1)} wait{'s' * (number == 1)} ({ranks_text(m.rank for m in members)})"
