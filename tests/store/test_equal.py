"""Captions that are equal word for word, against a definition that compares every two of them."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apecache.store import equal
from apecache.store.equal import equal_captions, fold_caption, is_shared

WORDS = st.sampled_from(
    ["a", "A", "dog", " ", "\t", "\u00a0", "é", "e\u0301", "ß", "ss", "İ", "\n"]
)
CAPTIONS = st.lists(st.lists(WORDS, max_size=4).map("".join), max_size=12)


def plain_fold(caption: str) -> str:
    composed = unicodedata.normalize("NFC", caption)
    return " ".join(unicodedata.normalize("NFC", composed.casefold()).split())


def numbers_by_definition(captions: list[str]) -> list[int]:
    folded = [plain_fold(caption) for caption in captions]
    return [folded.index(caption) for caption in folded]


@given(captions=CAPTIONS)
def test_equal_captions_have_the_row_of_the_first_of_them(captions: list[str]) -> None:
    found = equal_captions(np.array(captions, object))
    assert found.dtype == np.int64
    assert found.tolist() == numbers_by_definition(captions)


@given(captions=CAPTIONS)
def test_captions_whose_hashes_collide_are_told_apart(captions: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equal, "hash", lambda text: len(text) % 2, raising=False)
        assert equal_captions(np.array(captions, object)).tolist() == numbers_by_definition(
            captions
        )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A Dog", "a dog"),
        ("a  dog\n", " a dog"),
        ("café", "cafe\u0301"),
        ("STRASSE", "straße"),
        ("a\u00a0dog", "a dog"),
    ],
)
def test_composition_case_and_whitespace_are_no_difference(one: str, other: str) -> None:
    assert fold_caption(one) == fold_caption(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("a dog.", "a dog"), ("adog", "a dog"), ("cafe", "café")],
)
def test_other_words_and_marks_are_a_difference(one: str, other: str) -> None:
    assert fold_caption(one) != fold_caption(other)


@given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=10))
def test_ids_are_shared_if_two_images_have_one(pairs: list[tuple[int, int]]) -> None:
    ids = np.array([caption for caption, _ in pairs], np.int64)
    images = np.array([image for _, image in pairs], np.int64)
    owners: dict[int, set[int]] = {}
    for caption, image in pairs:
        owners.setdefault(caption, set()).add(image)
    assert is_shared(ids, images) == any(len(found) > 1 for found in owners.values())
