"""Identity: canonical JSON, digests, and what a difference looks like."""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apecache.fingerprint import (
    MISSING,
    Fingerprint,
    canonical_json,
    content_hash,
    describe_difference,
    digest_strings,
    digest_tensors,
    flatten,
    shorten,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(value=JSON)
def test_canonical_json_is_json_and_ignores_the_order_of_keys(value: object) -> None:
    raw = canonical_json(value)
    assert json.loads(raw) == value
    assert canonical_json(turned_round(value)) == raw


def turned_round(value: object) -> object:
    if isinstance(value, dict):
        return {key: turned_round(value[key]) for key in reversed(value)}
    return [turned_round(item) for item in value] if isinstance(value, list) else value


def test_canonical_json_has_one_spelling() -> None:
    assert (
        canonical_json({"b": [1, 2.5, None], "a": "é\ud800"})
        == b'{"a":"\xc3\xa9\xed\xa0\x80","b":[1,2.5,null]}'
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_what_is_no_number_has_no_identity(value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(value)


def test_a_fingerprint_is_the_sha256_of_its_canonical_json() -> None:
    fields = {"b": 1, "a": {"c": [1, 2]}}
    assert (
        Fingerprint(fields=fields).digest == hashlib.sha256(b'{"a":{"c":[1,2]},"b":1}').hexdigest()
    )


@settings(max_examples=60, deadline=None)
@given(first=st.dictionaries(st.text("abc", max_size=3), JSON, min_size=1, max_size=3), second=JSON)
def test_fingerprints_differ_exactly_when_a_leaf_differs(
    first: dict[str, object],
    second: object,
) -> None:
    here = Fingerprint(fields=first)
    there = Fingerprint(fields={**first, "added": second})
    assert here.difference(here) == []
    assert here.digest != there.digest
    assert {path.partition(".")[0] for path, _, _ in there.difference(here)} == {"added"}


def test_a_difference_names_every_leaf_with_both_values() -> None:
    here = Fingerprint(fields={"weights": "x", "inputs": {"mean": [0.5], "size": 224}, "gone": 1})
    there = Fingerprint(
        fields={"weights": "y", "inputs": {"mean": [0.4], "size": 224}, "added": {"new": None}}
    )
    assert here.difference(there) == [
        ("added.new", MISSING, None),
        ("gone", 1, MISSING),
        ("inputs.mean", [0.5], [0.4]),
        ("weights", "x", "y"),
    ]


def test_flatten_keeps_empty_branches() -> None:
    assert list(flatten({"b": {}, "a": {"c": [{}], "b": 1}})) == [
        ("a.b", 1),
        ("a.c", [{}]),
        ("b", {}),
    ]


def test_a_described_difference_is_one_line_with_the_first_few() -> None:
    rows = [(f"field{i}", "x" * 100, i) for i in range(5)]
    text = describe_difference(rows, limit=2)
    short = "x" * 19 + "…" + "x" * 19
    assert (
        text
        == f"field0: {short} here, 0 in the store; field1: {short} here, 1 in the store; and 3 more"
    )
    assert describe_difference(rows[:1]).endswith("0 in the store")
    assert shorten("y" * 40) == "y" * 40


def test_contents_are_hashed_with_blake3_and_text_by_its_utf8() -> None:
    assert (
        content_hash(b"") == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    )  # BLAKE3's own test vector
    assert content_hash("é") == content_hash("é".encode()) == content_hash(memoryview("é".encode()))
    assert content_hash("\ud800") != content_hash("?")


@settings(max_examples=100, deadline=None)
@given(a=st.lists(st.text(max_size=3), max_size=4), b=st.lists(st.text(max_size=3), max_size=4))
def test_sequences_of_strings_collide_only_when_equal(a: list[str], b: list[str]) -> None:
    assert (digest_strings(a) == digest_strings(b)) == (a == b)


@pytest.mark.parametrize(
    ("one", "other"),
    [([], [""]), (["ab"], ["a", "b"]), (["a", "b"], ["b", "a"]), (["\ud800"], ["\udc00"])],
)
def test_strings_do_not_run_into_each_other(one: list[str], other: list[str]) -> None:
    assert digest_strings(one) != digest_strings(other)


def test_a_state_dict_is_identified_by_names_dtypes_shapes_and_bytes_but_not_by_order() -> None:
    base = ("w", "float32", (2, 1), memoryview(b"12345678"))
    other = ("b", "float32", (0,), memoryview(b""))
    digest = digest_tensors([base, other])
    assert digest_tensors([other, base]) == digest
    changed = [
        ("v", *base[1:]),
        ("w", "int32", *base[2:]),
        ("w", "float32", (1, 2), base[3]),
        ("w", "float32", (2, 1), memoryview(b"12345679")),
    ]
    assert (
        len({digest, digest_tensors([base]), *(digest_tensors([row, other]) for row in changed)})
        == 6
    )
