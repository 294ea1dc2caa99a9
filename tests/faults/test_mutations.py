"""Every safeguard of the store is missed by a test when it is gone."""

import pytest
from mutations import MUTATIONS, fsync_mutations, survivors


@pytest.mark.slow
def test_no_safeguard_can_be_removed_unnoticed() -> None:
    tried, unnoticed = survivors()
    assert unnoticed == []
    assert tried == len(MUTATIONS) + len(fsync_mutations()) > 30
