"""Names of encoders: parsing, folders, and the names of their arrays."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.errors import EncoderError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder `my-vit@2` with a config.json."""
    folder = tmp_path / "my-vit@2"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("text", "library", "name", "revision"),
    [
        ("timm:resnet18", "timm", "resnet18", None),
        (
            "timm:vit_base_patch14_dinov2.lvd142m@abc123",
            "timm",
            "vit_base_patch14_dinov2.lvd142m",
            "abc123",
        ),
        (
            "hf:sentence-transformers/all-MiniLM-L6-v2",
            "hf",
            "sentence-transformers/all-MiniLM-L6-v2",
            None,
        ),
        ("hf:facebook/dinov2-small@main", "hf", "facebook/dinov2-small", "main"),
        ("hf:bert-base-uncased@", "hf", "bert-base-uncased", None),
    ],
)
def test_a_name_is_parsed_and_printed(
    text: str,
    library: str,
    name: str,
    revision: str | None,
) -> None:
    spec = parse_encoder(text, "image")
    assert spec == EncoderSpec(library, name=name, modality="image", revision=revision)
    assert spec.folder is None
    assert parse_encoder(str(spec), "image") == spec
    assert str(spec) == text.removesuffix("@")


def test_a_local_folder_may_hold_an_at_sign_and_need_not_begin_with_a_dot(
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(saved.parent)
    monkeypatch.setenv("HOME", str(saved.parent))
    for name in (
        str(saved),
        f"./{saved.name}",
        saved.name,
        f"../{saved.parent.name}/{saved.name}",
        f"~/{saved.name}",
    ):
        spec = parse_encoder(f"hf:{name}", "text")
        assert (spec.name, spec.revision, spec.slug) == (name, None, "my-vit-2")
        assert spec.folder is not None
        assert spec.folder.resolve() == saved
    monkeypatch.chdir(saved)
    assert parse_encoder("hf:.", "text").slug == "my-vit-2"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "resnet18",
            ["expected LIBRARY:NAME", "timm, hf", "did you mean timm:resnet18 or hf:resnet18?"],
        ),
        ("tim:resnet18", ["LIBRARY one of timm, hf, open_clip, st; did you mean timm?"]),
        ("http://example.org/x", ["LIBRARY one of timm, hf"]),
        ("", ["expected LIBRARY:NAME"]),
        ("timm:", ["the name after timm: is empty"]),
        ("hf:@main", ["the name after hf: is empty"]),
        ("hf:/nowhere/at/all", ["there is no folder /nowhere/at/all"]),
        ("hf:~no-such-user/x", ["there is no folder ~no-such-user/x"]),
        ("hf:/" + "x" * 300, ["there is no folder"]),
    ],
)
def test_what_is_no_encoder_is_refused_with_what_is_expected(text: str, parts: list[str]) -> None:
    with pytest.raises(EncoderError) as caught:
        parse_encoder(text, "image")
    message = str(caught.value)
    assert [part for part in [repr(text), *parts] if part not in message] == []
    assert caught.value.exit_code == 3


def test_timm_has_no_text_encoders() -> None:
    with pytest.raises(EncoderError, match="timm has no text encoders; use hf:ID"):
        parse_encoder("timm:resnet18", "text")


def test_a_missing_folder_is_refused_with_a_near_name(saved: Path) -> None:
    with pytest.raises(
        EncoderError,
        match=r"there is no folder .*my-vit@3; did you mean my-vit@2\?",
    ):
        parse_encoder(f"timm:{saved.parent}/my-vit@3", "image")


def test_a_folder_without_a_model_is_refused(saved: Path) -> None:
    (saved / "config.json").unlink()
    with pytest.raises(
        EncoderError,
        match=r"has no config\.json, so it is not a saved model; save one with",
    ):
        parse_encoder(f"hf:{saved}", "image")


def test_the_slug_names_every_setting_that_is_not_the_default() -> None:
    spec = EncoderSpec("hf", "a/b c", "image")
    assert spec.slug == "a--b-c"
    assert replace(spec, pooling="cls").slug == "a--b-c-cls"
    assert replace(spec, resolution=98).slug == "a--b-c-98px"
    assert replace(spec, max_tokens=32).slug == "a--b-c-32t"
    assert replace(spec, dtype="bfloat16").slug == "a--b-c-bfloat16"
    every = replace(
        spec,
        pooling="mean",
        resolution=98,
        max_tokens=32,
        dtype="float16",
        revision="main",
    )
    assert every.slug == "a--b-c-mean-98px-32t-float16"


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("-.x.-", "x"),
        ("?!", "encoder"),
        ("漢字", "encoder"),
        ("x" * 300, "x" * 100),
        ("a\0\nb", "a-b"),
    ],
)
def test_the_slug_is_never_hidden_empty_or_long(name: str, slug: str) -> None:
    assert EncoderSpec("hf", name, "image").slug == slug


@settings(max_examples=200, deadline=None)
@example(name="~\0", library="timm")
@given(name=st.text(min_size=1), library=st.sampled_from(["timm", "hf"]))
def test_whatever_the_name_the_slug_is_a_safe_name_of_a_folder(name: str, library: str) -> None:
    slug = EncoderSpec(library, name, "image").slug
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", slug)


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text().map(lambda name: f"hf:{name}"))
def test_whatever_the_text_only_a_spec_or_an_encoder_error_come_out(text: str) -> None:
    try:
        spec = parse_encoder(text, "image")
    except EncoderError:
        return
    assert parse_encoder(str(spec), "image") == spec


def test_a_moved_encoder_keeps_its_settings(saved: Path) -> None:
    spec = EncoderSpec(
        "hf",
        name="a/b",
        modality="text",
        revision="main",
        pooling="cls",
        resolution=None,
        max_tokens=32,
        dtype="float16",
    )
    moved = spec.with_name(f"hf:{saved}")
    assert moved == replace(spec, name=str(saved), revision=None)
    with pytest.raises(EncoderError, match="there is no folder"):
        spec.with_name("hf:./nowhere")
