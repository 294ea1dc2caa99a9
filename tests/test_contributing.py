"""CONTRIBUTING: its drawing of the packages is the contract that `make check` enforces."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_drawing_of_the_packages_is_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "importlinter"
    ]
    layers = next(contract for contract in contracts["contracts"] if contract["id"] == "layers")[
        "layers"
    ]
    enforced = [
        re.sub(r"\bapecache\.", "", layer).replace(" | ", ", ").replace(" : ", ", ")
        for layer in layers
    ]
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    drawn = re.search(r"(?:^    .*\n)+", text[text.index("to its right:") :], flags=re.MULTILINE)
    assert drawn is not None
    assert " ".join(drawn[0].split()).split(" -> ") == enforced


def test_every_package_stands_in_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "importlinter"
    ]
    layers = next(contract for contract in contracts["contracts"] if contract["id"] == "layers")[
        "layers"
    ]
    named = set(re.findall(r"apecache\.(\w+)", " ".join(layers)))
    modules = {
        path.stem for path in (ROOT / "apecache").glob("*.py") if not path.stem.startswith("__")
    }
    packages = {path.parent.name for path in (ROOT / "apecache").glob("*/__init__.py")}
    assert named == modules | packages
