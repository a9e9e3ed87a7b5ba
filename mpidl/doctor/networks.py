"""The network devices of a machine: which there are, what they should give, and how much they have carried.

Devices and speeds are Linux's (/sys/class); InfiniBand and its kin count as fabrics. The bytes that a device has
carried tell what MPI really uses, whatever library it is and whatever it was told: traffic that no network device
counts went by a fabric, or by memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from mpidl.doctor.facts import Network

_KINDS = {"1": "ethernet", "772": "loopback"}
"""Of /sys/class/net/*/type, from linux/if_arp.h. IPoIB (32) is TCP over a fabric: "other"."""
_FABRIC_CLASSES = ("cxi", "hfi1")
"""Slingshot, Omni-Path; InfiniBand, RoCE and EFA have ports with a rate."""
_SETTINGS = (
    "FI_PROVIDER", "FI_TCP_IFACE", "UCX_TLS", "UCX_NET_DEVICES", "MPIR_CVAR_CH4_NETMOD", "MPIR_CVAR_NOLOCAL",
    "OMPI_MCA_pml", "OMPI_MCA_btl", "OMPI_MCA_mtl", "OMPI_MCA_btl_tcp_if_include", "I_MPI_FABRICS",
)  # fmt: skip
_COUNTERS = Path("/proc/net/dev")


def find_networks(classes: Path = Path("/sys/class")) -> tuple[Network, ...]:
    """All devices that are up, fabrics first."""
    return (*_fabrics(classes), *_devices(classes))


def settings(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The variables, NAME=value, that choose a network for MPI."""
    return tuple(f"{name}={environment[name]}" for name in _SETTINGS if environment.get(name))


def _devices(classes: Path) -> Iterator[Network]:
    for device in sorted(classes.glob("net/*")):
        kind = _KINDS.get(_read(device / "type"), "other")
        if kind != "loopback" and _read(device / "operstate") != "up":
            continue
        speed = _read(device / "speed")  # Mbit/s; -1, or an error, where the driver does not know
        gbit = int(speed) / 1000 if speed.isdigit() and int(speed) > 0 else None
        yield Network(name=device.name, kind=kind, gbit=gbit)  # type: ignore[arg-type]  # of _KINDS


def _fabrics(classes: Path) -> Iterator[Network]:
    for port in sorted(classes.glob("infiniband/*/ports/*")):
        if "ACTIVE" in _read(port / "state"):
            rate = _read(port / "rate").partition(" ")[0]  # "100 Gb/sec (4X EDR)"
            gbit = float(rate) if rate.replace(".", "", 1).isdigit() else None
            yield Network(name=port.parent.parent.name, kind="fabric", gbit=gbit)
    for name in _FABRIC_CLASSES:
        for device in sorted(classes.glob(f"{name}/{name}*[0-9]")):
            if not (classes / "infiniband" / device.name).exists():
                yield Network(name=device.name, kind="fabric", gbit=None)


def carried_bytes(counters: Path = _COUNTERS) -> dict[str, int]:
    """Device -> bytes received and sent since it is up, of this process's network namespace; empty where unknown."""
    found = {}
    for line in _read(counters).splitlines():
        name, colon, numbers = line.partition(":")
        if colon:
            fields = numbers.split()
            found[name.strip()] = int(fields[0]) + int(fields[8])
    return found


def carrier(before: Mapping[str, int], after: Mapping[str, int], num_bytes: int) -> str | None:
    """The device that carried at least half of so many bytes; None: none did.

    Args:
        before: `carried_bytes` then.
        after: and now.
        num_bytes: that were sent and received meanwhile.
    """
    grown = {name: after[name] - before.get(name, 0) for name in after}
    name = max(grown, key=lambda name: grown[name], default=None)
    return name if name is not None and num_bytes and grown[name] >= num_bytes / 2 else None


def _read(path: Path) -> str:
    """A file's text; "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
