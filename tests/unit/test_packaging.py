"""What is built from the checkout: a wheel and a source archive that are whole, and nothing else's names."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.launch import ROOT, run

pytestmark = pytest.mark.launches

BUILD = "import setuptools.build_meta as build; build.build_{kind}('dist')"


def modules() -> set[str]:
    """The checkout's modules, as a wheel names them."""
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mpidl").rglob("*.py")}
    kernels = {f"mpidl/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    return package | kernels


def build(source: Path, kind: str) -> Path:
    """Build with the setuptools that is installed here: nothing is downloaded."""
    run([sys.executable, "-c", BUILD.format(kind=kind)], cwd=source).check()
    (built,) = (source / "dist").glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built from: building in the checkout would leave files there, and find old ones."""
    copy = tmp_path_factory.mktemp("source") / "mpidl-checkout"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("mpidl", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    return build(source, "wheel")


@pytest.fixture(scope="module")
def archive(source: Path) -> Path:
    return build(source, "sdist")


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return {name for name in file.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_every_module_and_the_data(wheel: Path) -> None:
    data = {"mpidl/py.typed", "mpidl/data/digits.npz", "mpidl/data/DIGITS.md"}
    assert names_in(wheel) == modules() | data


def test_the_wheel_has_no_top_level_name_but_mpidl(wheel: Path) -> None:
    assert {name.partition("/")[0] for name in names_in(wheel)} == {"mpidl"}


def test_the_wheel_tells_its_version_licence_and_command(wheel: Path) -> None:
    version = re.search(r'__version__ = "(.+)"', (ROOT / "mpidl" / "_version.py").read_text())
    assert version is not None
    with zipfile.ZipFile(wheel) as file:
        info = f"mpidl-{version[1]}.dist-info"
        assert "mpidl = mpidl.cli:main" in file.read(f"{info}/entry_points.txt").decode()
        assert "License-Expression: Apache-2.0" in file.read(f"{info}/METADATA").decode()
        assert file.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_imports_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    code = "import mpidl, mpidl.kernels as k; print(mpidl.__file__); print(k.__file__)"
    # The copy comes before the checkout, which the tests put on the path.
    ended = run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {code}"], cwd=tmp_path)
    found = ended.check().stdout.split()
    assert found == [str(site / "mpidl" / "__init__.py"), str(site / "mpidl" / "kernels" / "__init__.py")]


def test_a_wheel_from_the_source_archive_is_the_same(wheel: Path, archive: Path, tmp_path: Path) -> None:
    run(["tar", "xzf", archive, "-C", tmp_path]).check()
    (unpacked,) = tmp_path.iterdir()
    assert not (unpacked / "mpidl" / "kernels").exists(), "the archive has lost the link, and has to do without"
    assert names_in(build(unpacked, "wheel")) == names_in(wheel)


def test_setup_lists_every_package() -> None:
    tree = ast.parse((ROOT / "setup.py").read_text())
    (packages,) = (node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "packages")
    assert set(ast.literal_eval(packages)) == {name.rpartition("/")[0].replace("/", ".") for name in modules()}


def test_the_kernels_link_is_committed_as_a_link() -> None:
    assert (ROOT / "mpidl" / "kernels").readlink() == Path("../kernels")
    listed = subprocess.run(["git", "ls-files", "-s", "mpidl/kernels"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:  # not in an unpacked archive
        assert listed.stdout.startswith("120000 ")


def test_every_dependency_is_pinned_once() -> None:
    pins = [line.split("==")[0] for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines() if "==" in line]
    assert len(pins) == len(set(pins))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    names = {re.split(r"[\[<>=]", each)[0] for each in wanted} - {"mpidl"}
    assert names <= set(pins)
