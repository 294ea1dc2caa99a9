"""The public face: exact, resolvable, and cheap to import."""

import subprocess
import sys
import tomllib
from pathlib import Path

import apecache

ROOT = Path(__file__).parents[1]


def test_every_public_name_resolves_and_none_is_missing() -> None:
    assert sorted(apecache.__all__) == apecache.__all__
    assert dir(apecache) == apecache.__all__
    for name in apecache.__all__:
        assert getattr(apecache, name).__name__ == name


def test_public_names_are_the_same_before_and_after_their_modules_are_imported() -> None:
    code = "import apecache; from apecache import extract; assert callable(extract), extract"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(apecache, "fit_heads")


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "timm", "zarr", "numpy", "faiss", "pydantic")
    code = f"import sys, apecache; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_list_of_pyproject_equals_the_folders() -> None:
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "apecache").rglob("__init__.py")}
    expected = {".".join(folder.parts) for folder in folders} | {
        "apecache_cli",
        "apecache_cli.drawings",
    }
    assert listed == expected
