"""The documentation's table of families is what the conformance table gives."""

from importlib.util import find_spec

import pytest
from families import FAMILIES
from families_page import PAGE, generate_page, render_page

NEEDED = {family.needs for family in FAMILIES.values() if family.needs is not None}


def test_every_family_has_its_row() -> None:
    from families_page import Abilities

    nothing = Abilities(has_class=False, has_layers=False, trains=False)
    expected = render_page(dict.fromkeys(FAMILIES, nothing))
    written = PAGE.read_text(encoding="utf-8")
    titles = [line.split(" | ")[0] for line in written.splitlines()]
    assert titles == [line.split(" | ")[0] for line in expected.splitlines()]


@pytest.mark.slow
def test_the_page_says_what_the_families_can_do() -> None:
    if not all(find_spec(package) for package in NEEDED):
        pytest.skip("an optional package is not installed")
    assert generate_page() == PAGE.read_text(encoding="utf-8"), (
        "run: python tests/encoders/conformance/families_page.py"
    )
