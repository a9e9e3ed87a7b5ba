"""Networks of nodes, and which of their links limits what all nodes send at once. Pure.

Every node has one link in each direction, and all links have its rate, some of them several lanes:

- *switch*: every node is linked to one switch that limits nothing (what `jobs/local/hosts.py` makes).
- *fat_tree*: two levels of switches up to 256 nodes, three above; 16 nodes or fewer to a leaf. With `taper` 2 a leaf
  has half as many links up as down. Routes by the destination's number, as SimGrid's and many InfiniBand networks'.
- *dragonfly*: four nodes to a router, a group of routers that are all linked to each other by two lanes, and every two
  groups linked by lanes enough for all (1/taper) that a group's nodes can send. Shortest routes, as SimGrid's; or,
  where it `is_adaptive`, those of networks that choose by load (Aries, Slingshot): what a group sends may take all of
  its lanes to other groups, and then takes two of them, unless the shortest routes are less loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from numpy.typing import NDArray

from mpidl.errors import ConfigError
from mpidl.simulation.collectives import Round

_NODES_OF_ROUTER = 4
_LANES_IN_GROUP = 2

Matrix = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Platform:
    """A network, with its links' rate and latency."""

    kind: str
    num_nodes: int
    link_bytes_s: float
    latency_s: float
    """Of one link."""
    shape: tuple[int, ...] = ()
    """fat_tree: nodes or switches below each switch, level by level, then links up; dragonfly: groups, routers of a
    group, lanes between two groups."""
    is_adaptive: bool = False

    @property
    def topology(self) -> tuple[str, str]:
        """As SimGrid's platform files have it: name and parameters."""
        if self.kind == "fat_tree":
            down, up = self.shape[: len(self.shape) // 2], self.shape[len(self.shape) // 2 :]
            texts = [",".join(map(str, each)) for each in (down, up, (1,) * len(down))]
            return "FAT_TREE", ";".join([str(len(down)), *texts])
        if self.kind == "dragonfly":
            groups, routers, lanes = self.shape
            return "DRAGONFLY", f"{groups},{lanes};1,1;{routers},{_LANES_IN_GROUP};{_NODES_OF_ROUTER}"
        return "FLAT", ""

    @property
    def capacity(self) -> int:
        """Nodes that fit; those behind `num_nodes` stay empty."""
        if self.kind == "fat_tree":
            return math.prod(self.shape[: len(self.shape) // 2])
        return self.shape[0] * self.shape[1] * _NODES_OF_ROUTER if self.kind == "dragonfly" else self.num_nodes

    @property
    def path_s(self) -> float:
        """Latency of the longest route."""
        hops = {"switch": 2, "fat_tree": len(self.shape), "dragonfly": 5}[self.kind]
        return hops * self.latency_s

    def seconds(self, sent: Round) -> float:
        """How long the most loaded link needs for a round."""
        num_bytes = _load(self, sent.distances, sent.is_xor) * sent.num_bytes
        return max(num_bytes, len(sent.distances) * sent.busiest_bytes) / self.link_bytes_s


def switch(num_nodes: int, link_bytes_s: float, latency_s: float) -> Platform:
    """One switch for all."""
    return Platform("switch", num_nodes, link_bytes_s, latency_s)


def fat_tree(num_nodes: int, link_bytes_s: float, latency_s: float, taper: int = 1) -> Platform:
    """A tree of switches."""
    levels = 2 if num_nodes <= 256 else 3
    exponents = _spread(max(2, math.ceil(math.log2(num_nodes))), levels)
    down = [2**exponent for exponent in exponents]
    if down[0] % taper:
        raise ConfigError(f"--taper {taper} does not divide the {down[0]} nodes of a leaf switch")
    up = [1, down[0] // taper, *down[1:-1]]
    return Platform("fat_tree", num_nodes, link_bytes_s, latency_s, (*down, *up))


def dragonfly(
    num_nodes: int, link_bytes_s: float, latency_s: float, taper: int = 1, *, is_adaptive: bool = False
) -> Platform:
    """Groups of routers, no more groups than a group has routers; a group has 1/taper of its nodes' rate to others."""
    routers = 2
    while routers * routers * _NODES_OF_ROUTER < num_nodes:
        routers *= 2
    size = routers * _NODES_OF_ROUTER
    groups = max(2, -(-num_nodes // size))
    lanes = -(-size // (taper * (groups - 1)))
    return Platform("dragonfly", num_nodes, link_bytes_s, latency_s, (groups, routers, lanes), is_adaptive)


def _spread(total: int, parts: int) -> list[int]:
    """Numbers as equal as possible, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


@functools.lru_cache(maxsize=20_000)
def _load(platform: Platform, distances: tuple[int, ...], is_xor: bool) -> float:
    """Messages over the most loaded link, lanes counted; of nodes alike, those of the first group stand for all."""
    size = _group_size(platform)
    nodes, steps = np.arange(min(size, platform.num_nodes))[:, None], np.array(distances)[None, :]
    if is_xor:
        sent = received = nodes ^ steps
    else:
        sent, received = (nodes - steps) % platform.num_nodes, (nodes + steps) % platform.num_nodes
    at_node = float((sent != nodes).sum(axis=1).max())
    if platform.kind == "fat_tree":
        return max(at_node, _load_above(platform, sent))
    if platform.kind == "dragonfly":
        return max(at_node, _load_between_routers(platform, sent, received))
    return at_node


def _group_size(platform: Platform) -> int:
    """The nodes of a leaf, or a group: those of the largest subtree below the top."""
    if platform.kind == "fat_tree":
        return platform.capacity // platform.shape[len(platform.shape) // 2 - 1]
    return platform.shape[1] * _NODES_OF_ROUTER if platform.kind == "dragonfly" else 1


def _load_above(platform: Platform, sent: Matrix) -> float:
    """Of the links above the first switch of each level, which routes by destination load alike."""
    num_levels = len(platform.shape) // 2
    down, up = platform.shape[:num_levels], platform.shape[num_levels:]
    load, below, links = 0.0, 1, 1
    for level in range(num_levels - 1):
        below *= down[level]
        links *= up[level + 1]
        load = max(load, int((sent[:below] >= below).sum()) / links)
    return load


def _load_between_routers(platform: Platform, sent: Matrix, received: Matrix) -> float:
    """Of the first group's links: to router x and from there to group x; from group x to router x and on."""
    groups, routers, lanes = platform.shape
    size = routers * _NODES_OF_ROUTER
    own = np.broadcast_to(np.arange(len(sent))[:, None] // _NODES_OF_ROUTER, sent.shape)
    links = np.zeros((routers, routers), np.int64)
    leaving = sent // size != 0
    np.add.at(links, (own, np.where(leaving, sent // size, sent // _NODES_OF_ROUTER)), 1)
    arriving = received // size != 0
    np.add.at(links, ((received // size)[arriving], own[arriving]), 1)
    np.fill_diagonal(links, 0)
    shortest = max(
        float(links.max()) / _LANES_IN_GROUP,
        float(np.bincount((sent // size)[leaving], minlength=groups).max(initial=0)) / lanes,
    )
    return min(shortest, 2 * float(leaving.sum()) / (lanes * (groups - 1))) if platform.is_adaptive else shortest
