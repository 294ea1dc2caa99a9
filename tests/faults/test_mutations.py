"""Every safeguard of the store is missed by a test when it is gone."""

from dataclasses import replace

import pytest
from mutations import MUTATIONS, ROOT, fsync_mutations, survives, survivors


@pytest.mark.slow
def test_no_safeguard_can_be_removed_unnoticed() -> None:
    tried, unnoticed = survivors()
    assert unnoticed == []
    assert tried == len(MUTATIONS) + len(fsync_mutations()) > 30


def test_every_mutation_still_fits_the_source() -> None:
    """A safeguard that was rewritten would otherwise be left out until the slow tests run."""
    for mutation in (*MUTATIONS, *fsync_mutations()):
        source = (ROOT / "apecache" / mutation.file).read_text(encoding="utf-8")
        assert source.count(mutation.old) == 1, mutation.name
        test_file, _, test_name = mutation.test.partition("::")
        assert f"def {test_name}(" in (ROOT / "tests" / test_file).read_text(encoding="utf-8")


def test_one_removed_safeguard_is_noticed_and_a_harmless_change_is_not() -> None:
    mutation = next(one for one in MUTATIONS if one.name == "refusal of foreign folders")
    assert survives(mutation) == ""
    assert "pytest ended with 0" in survives(replace(mutation, new=mutation.old))
