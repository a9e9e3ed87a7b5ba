"""Packages and where they lie; everything else about the project is in pyproject.toml."""

from __future__ import annotations

from setuptools import setup

setup(
    packages=[
        "mpidl",
        "mpidl.bench",
        "mpidl.checkpoint",
        "mpidl.data",
        "mpidl.doctor",
        "mpidl.kernels",
        "mpidl.launching",
        "mpidl.models",
        "mpidl.optimizers",
        "mpidl.parameters",
        "mpidl.report_page",
        "mpidl.runtime",
        "mpidl.scheduling",
        "mpidl.simulation",
        "mpidl.telemetry",
    ],
    # The kernels have a folder of their own. In a checkout the link mpidl/kernels leads there; archives and
    # file systems that lose links, and every built package, rely on this mapping.
    package_dir={"mpidl.kernels": "kernels"},
)
