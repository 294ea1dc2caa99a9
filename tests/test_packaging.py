"""What an installation brings: the wheel and the sdist hold what they must, and nothing called
cli."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = (
    "apecache",
    "cli",
    "examples",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
    "CHANGELOG.md",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy of the sources."""
    copy = tmp_path_factory.mktemp("sources")
    out = tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel_names(built: Path) -> list[str]:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        return archive.namelist()


def test_the_wheel_has_two_packages_and_none_is_called_cli(wheel_names: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"apecache", "apecache_cli"}


@pytest.mark.parametrize(
    "name",
    [
        "apecache/__init__.pyi",
        "apecache/py.typed",
        "apecache/recipes/zoo/ape.toml",
        "apecache/recipes/zoo/projection.toml",
        "apecache/report/templates/page.html",
        "apecache_cli/app.py",
        "apecache_cli/drawings/pairs.tsv",
        "apecache_cli/drawings/ATTRIBUTION.md",
        "apecache_cli/drawings/images/animals/cow.jpg",
    ],
)
def test_the_wheel_holds_what_it_must(wheel_names: list[str], name: str) -> None:
    assert name in wheel_names


def test_every_module_of_the_sources_is_in_the_wheel(wheel_names: list[str]) -> None:
    modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / "apecache").rglob("*.py")]
    modules += [f"apecache_cli/{path.name}" for path in (ROOT / "cli").glob("*.py")]
    assert not set(modules) - set(wheel_names)


def test_the_sdist_builds_on_its_own_sources(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {
        "pyproject.toml",
        "LICENSE",
        "cli/app.py",
        "examples/drawings/pairs.tsv",
        "CHANGELOG.md",
    } <= names


def test_an_installed_wheel_finds_its_recipes_data_and_command(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        archive.extractall(tmp_path / "site")
    code = """
import apecache, apecache_cli
from apecache.recipes.recipe import zoo_names
from apecache_cli.demo import data_folder
assert "site" in apecache.__file__ and "site" in apecache_cli.__file__
assert {"ape", "projection", "sail"} <= set(zoo_names()), zoo_names()
assert "site" in str(data_folder().resolve()), data_folder()
assert len(apecache.open_pairs(data_folder() / "pairs.tsv")) == 577
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
