"""What an encoder's repository asks for and hf: cannot give is refused, with the remedy; never
guessed. Sizes are the model's own, or the asked ones within its limits."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import (
    DECODER,
    FAMILIES,
    SIZES,
    VISION,
    bert,
    build_dense,
    build_image,
    build_text,
    clip,
    modernbert,
    pictures,
    sentence_files,
    siglip,
    t5,
    write_json,
)
from model_tokenizers import N_TOKENS, save_tokenizer

from apecache.encoders.encoder import pool_tokens
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.errors import EncoderError
from apecache.extraction.arrays import array_name
from apecache.extraction.spec import ExtractSpec

CHOICES = "give --text-cut cls, mean, last or max"


def text_spec(folder: Path, library: str = "hf", **settings: Any) -> EncoderSpec:
    return replace(parse_encoder(f"{library}:{folder}", "text"), **settings)


def two_way_decoder() -> Any:
    """A decoder that was trained to look at later tokens too."""
    config = hf.Qwen3Config(**DECODER, max_position_embeddings=128)
    config.is_causal = False
    return hf.Qwen3Model(config)


def mobilebert() -> Any:
    sizes = {**SIZES, "intra_bottleneck_size": 32, "embedding_size": 32}
    return hf.MobileBertModel(hf.MobileBertConfig(**sizes, vocab_size=N_TOKENS))


UNPOOLED = sentence_files(
    {"pooling_mode": "mean", "include_prompt": False},
    prompts={"q": "Represent: "},
    default="q",
)
NO_POOLING = {
    "modules.json": [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
    ]
}
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "dense": (build_dense, rf"needs the module 2_Dense; take st:.*{CHOICES}"),
    "weighted mean": (
        build_text(bert, "bert", 128, sentence_files({"pooling_mode": "weightedmean"})),
        rf"pooling weightedmean is not supported; take st:.*{CHOICES}",
    ),
    "a prompt that is not pooled": (
        build_text(bert, "bert", 128, UNPOOLED),
        r"its pooling leaves the prompt 'Represent: ' out; take st:.*--text-prefix ''",
    ),
    "modules without pooling": (
        build_text(bert, "bert", 128, NO_POOLING),
        rf"its modules.json names no pooling; take st:.*{CHOICES}",
    ),
    "a decoder that looks ahead": (
        build_text(two_way_decoder, "llama", 128),
        rf"convention for qwen3 says how its tokens are pooled; {CHOICES}",
    ),
    "mobilebert": (
        build_text(mobilebert, "bert", 128),
        "the output of mobilebert depends on the padding of its batch.*choose another model",
    ),
    "half a modules.json": (
        build_text(bert, "bert", 128, {"modules.json": {"0": "Transformer"}}),
        "modules.json is not a list of modules",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_hf_cannot_give_is_refused_with_a_remedy(tmp_path: Path, name: str) -> None:
    build, message = REFUSED[name]
    build(tmp_path)
    with pytest.raises(EncoderError, match=message) as caught:
        load_text_encoder(text_spec(tmp_path), "cpu")
    assert "\n" not in str(caught.value)


def test_mobilebert_is_refused_whatever_is_asked_for(tmp_path: Path) -> None:
    build_text(mobilebert, "bert", 128)(tmp_path)
    with pytest.raises(EncoderError, match="depends on the padding"):
        load_text_encoder(text_spec(tmp_path, pooling="mean"), "cpu")


def test_a_siglip_without_a_fast_tokenizer_names_open_clip(tmp_path: Path) -> None:
    build_text(siglip, "t5", 64)(tmp_path)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(EncoderError, match="take the same model from open_clip:"):
        load_text_encoder(text_spec(tmp_path), "cpu")


@pytest.mark.parametrize(
    "model",
    [
        lambda: hf.PoolFormerModel(hf.PoolFormerConfig(hidden_sizes=[8, 8, 8, 8])),
        lambda: hf.Aimv2Model(hf.Aimv2Config(vision_config=VISION, text_config=SIZES)),
    ],
    ids=["poolformer", "aimv2 with its text tower"],
)
def test_other_image_models_are_refused_with_other_libraries(tmp_path: Path, model: Any) -> None:
    model().config.save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="many others are in timm: and open_clip:") as caught:
        load_image_encoder(parse_encoder(f"hf:{tmp_path}", "image"), "cpu")
    assert "swin" in str(caught.value)


@pytest.mark.parametrize("name", ["dense", "weighted mean", "a decoder that looks ahead"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last", "max"])
def test_a_pooling_that_is_asked_for_is_never_refused(
    tmp_path: Path,
    name: str,
    pooling: Any,
) -> None:
    REFUSED[name][0](tmp_path)
    encoder = load_text_encoder(text_spec(tmp_path, pooling=pooling), "cpu")
    assert encoder.encode(["a red circle"]).shape == (1, 32)
    assert encoder.fingerprint.fields["inputs"]["pooling"] == pooling


def test_the_last_token_is_that_of_the_text_whichever_side_is_padded() -> None:
    hidden = torch.arange(24, dtype=torch.float32).reshape(3, 4, 2)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    pooled = pool_tokens(hidden, mask, "last")
    assert torch.equal(pooled, hidden[torch.arange(3), torch.tensor([1, 3, 3])])


def test_a_clip_tokenizer_without_its_end_of_text_is_refused(tmp_path: Path) -> None:
    build_text(clip(257), "bert", 77)(tmp_path)
    with pytest.raises(EncoderError, match="does not end a text by the token 257"):
        load_text_encoder(text_spec(tmp_path), "cpu")


def cached(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a folder into a hub's cache as org/model, and the process offline."""
    kept = home / "models--org--model"
    shutil.copytree(folder, kept / "snapshots" / ("0" * 40))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_cache_with_a_part_of_the_repository_is_no_ground_for_a_guess(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another program may have cached the weights and the tokenizer only."""
    folder = tmp_path / "model"
    build_text(bert, "bert", 128)(folder)
    (folder / "README.md").unlink()
    cached(folder, tmp_path / "cache", monkeypatch)
    spec = parse_encoder("hf:org/model", "text")
    with pytest.raises(EncoderError, match=rf"cache holds only some of its files.*{CHOICES}"):
        load_text_encoder(spec, "cpu")
    asked = load_text_encoder(replace(spec, pooling="mean"), "cpu")
    by_folder = load_text_encoder(text_spec(folder, pooling="mean"), "cpu")
    assert asked.fingerprint == by_folder.fingerprint


@pytest.mark.parametrize("library", ["hf", "st", "timm", "open_clip"])
def test_a_repository_that_is_not_cached_is_refused_offline(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    library: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    prefix = "hf-hub:" if library in ("timm", "open_clip") else ""
    modality: Any = "image" if library == "timm" else "text"
    spec = parse_encoder(f"{library}:{prefix}org/absent", modality)
    load: Any = load_image_encoder if modality == "image" else load_text_encoder
    with pytest.raises(EncoderError, match=rf"cannot be opened.*{library}:/folder") as caught:
        load(spec, "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["timm:org/model", "timm:hf-hub:org/model"])
def test_timm_takes_a_repository_by_either_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    folder = tmp_path / "model"
    FAMILIES["timm"].build(folder)
    cached(folder, tmp_path / "cache", monkeypatch)
    by_id = load_image_encoder(parse_encoder(name, "image"), "cpu")
    by_folder = load_image_encoder(parse_encoder(f"timm:{folder}", "image"), "cpu")
    assert by_id.fingerprint == by_folder.fingerprint


@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.model"])
def test_a_tokenizer_that_needs_sentencepiece_names_the_extra(tmp_path: Path, file: str) -> None:
    if _has("sentencepiece") or _has("tiktoken"):
        pytest.skip("sentencepiece is installed")
    model = t5() if file == "spiece.model" else hf.LlamaModel(hf.LlamaConfig(**DECODER))
    model.save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(EncoderError, match=r"pip install 'apecache\[sentencepiece\]'"):
        load_text_encoder(text_spec(tmp_path), "cpu")


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


# Lengths


@pytest.mark.parametrize(
    ("build", "asked", "used"),
    [
        (build_text(modernbert, "bert", 8192), None, 8192),
        (build_text(modernbert, "bert", 8192), 600, 600),
        (build_text(modernbert, "bert", 512), 8192, 8192),
        (build_text(modernbert, "bert", 512), 9000, 8192),
        (build_text(t5, "t5", 512), None, 512),
        (build_text(t5, "t5", 512), 4000, 4000),
        (build_text(t5, "t5", None), None, 512),
        (build_text(bert, "bert", 64), None, 64),
        (build_text(bert, "bert", 64), 100, 100),
        (build_text(bert, "bert", 64), 500, 128),
        (build_text(bert, "bert", 64, sentence_files({"pooling_mode": "cls"}, 100)), None, 100),
        (build_text(bert, "bert", 64, sentence_files({"pooling_mode": "cls"}, 100)), 50, 50),
    ],
)
@pytest.mark.parametrize("library", ["hf", "st"])
def test_lengths_are_the_models_own_or_the_asked_ones_up_to_its_positions(
    tmp_path: Path,
    library: str,
    build: Callable[[Path], None],
    asked: int | None,
    used: int,
) -> None:
    build(tmp_path)
    if library == "st":
        pytest.importorskip("sentence_transformers")
        if not (tmp_path / "modules.json").exists():
            for name, content in sentence_files({"pooling_mode": "mean"}, None).items():
                write_json(tmp_path, name, content)
    encoder = load_text_encoder(text_spec(tmp_path, library, max_tokens=asked), "cpu")
    assert encoder.max_tokens == used
    tokens = encoder.tokenize(["x" * (used + 1), "a"])
    assert len(tokens.ids[0]) == used
    assert tokens.n_truncated == 1
    name = array_name(encoder, ExtractSpec(text=encoder.spec))
    assert name == tmp_path.name + (f"-{used}t" if asked else "")


def test_a_long_text_runs_through_all_asked_positions(tmp_path: Path) -> None:
    build_text(bert, "bert", 64)(tmp_path)
    encoder = load_text_encoder(text_spec(tmp_path, max_tokens=500), "cpu")
    assert encoder.encode(["x" * 500]).isfinite().all()


# Sizes of pictures

VIT = {"height": 32, "width": 32}


def vit_folder(folder: Path, **processor: Any) -> Path:
    size = processor.pop("image_size", 32)
    settings = {**VISION, "image_size": size}
    build_image(
        lambda: hf.ViTModel(hf.ViTConfig(**settings)),
        lambda: hf.BitImageProcessor(**processor),
    )(folder)
    return folder


@pytest.mark.parametrize(
    ("saved", "asked"),
    [
        (
            {"size": VIT, "do_center_crop": False},
            {"size": {"height": 64, "width": 64}},
        ),
        (
            {"size": {"height": 40, "width": 40}, "crop_size": VIT, "do_center_crop": True},
            {
                "size": {"height": 80, "width": 80},
                "crop_size": {"height": 64, "width": 64},
            },
        ),
        (
            {"size": {"shortest_edge": 40}, "crop_size": VIT, "do_center_crop": True},
            {"size": {"shortest_edge": 80}, "crop_size": {"height": 64, "width": 64}},
        ),
    ],
    ids=["squash", "squash and crop", "shorter edge and crop"],
)
def test_another_resolution_keeps_the_processors_geometry(
    tmp_path: Path,
    saved: dict[str, Any],
    asked: dict[str, Any],
) -> None:
    folder = vit_folder(tmp_path / "model", **saved)
    spec = replace(parse_encoder(f"hf:{folder}", "image"), resolution=64)
    encoder = load_image_encoder(spec, "cpu")
    expected = hf.BitImageProcessor(**{**saved, **asked})
    assert encoder.input_shape == (3, 64, 64)
    for image in pictures():
        pixels = expected(images=image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(encoder.preprocess(image), pixels)


@pytest.mark.parametrize("resolution", [None, 64])
def test_a_resize_without_a_crop_is_refused_before_anything_is_encoded(
    tmp_path: Path,
    resolution: int | None,
) -> None:
    folder = vit_folder(tmp_path / "model", size={"shortest_edge": 32}, do_center_crop=False)
    (folder / "model.safetensors").unlink()
    spec = replace(parse_encoder(f"hf:{folder}", "image"), resolution=resolution)
    with pytest.raises(EncoderError, match=r"resizes without cropping.*do_center_crop"):
        load_image_encoder(spec, "cpu")


def test_a_resolution_needs_a_square(tmp_path: Path) -> None:
    size = {"height": 32, "width": 16}
    folder = vit_folder(tmp_path / "model", size=size, do_center_crop=False, image_size=[32, 16])
    spec = parse_encoder(f"hf:{folder}", "image")
    assert load_image_encoder(spec, "cpu").input_shape == (3, 32, 16)
    with pytest.raises(EncoderError, match="gives 32 x 16 pixels, not a square"):
        load_image_encoder(replace(spec, resolution=64), "cpu")


def test_the_last_token_is_not_a_pooling_of_pictures(tmp_path: Path) -> None:
    folder = vit_folder(tmp_path / "model", size=VIT, do_center_crop=False)
    spec = replace(parse_encoder(f"hf:{folder}", "image"), pooling="last")
    with pytest.raises(EncoderError, match="the last token is for texts only"):
        load_image_encoder(spec, "cpu")


def test_a_beit_without_the_norm_of_its_mean_patch_is_refused_by_default(tmp_path: Path) -> None:
    """microsoft/beit-base-patch16-224-pt22k is such a model."""
    build_image(
        lambda: hf.BeitModel(hf.BeitConfig(**VISION), add_pooling_layer=False),
        lambda: hf.BeitImageProcessor(size=VIT, do_center_crop=False),
    )(tmp_path)
    spec = parse_encoder(f"hf:{tmp_path}", "image")
    with pytest.raises(EncoderError, match=r"lack 2 parameters.*give --image-cut mean or cls"):
        load_image_encoder(spec, "cpu")
    assert load_image_encoder(replace(spec, pooling="mean"), "cpu").row_shape == (32,)


# open_clip


def open_clip_folder(folder: Path, name: str = "open_clip: xlm-roberta, text") -> Path:
    pytest.importorskip("open_clip")
    FAMILIES[name].build(folder)
    return folder


@pytest.mark.parametrize("style", ["roberta", "bert"])
def test_texts_that_open_clip_cuts_are_counted_whatever_the_padding(
    tmp_path: Path,
    style: str,
) -> None:
    name = {"roberta": "open_clip: xlm-roberta, text", "bert": "open_clip: bert, text"}[style]
    spec = parse_encoder(f"open_clip:{open_clip_folder(tmp_path / 'm', name)}", "text")
    encoder = load_text_encoder(spec, "cpu")
    assert encoder.max_tokens == 77
    # 75 letters and two special tokens just fit.
    texts = ["a", "x" * 75, "x" * 76, "y" * 600, ""]
    tokens = encoder.tokenize(texts)
    assert tokens.n_truncated == 2
    # The tower hides its padding, which is left out here.
    assert [len(ids) for ids in tokens.ids] == [3, 77, 77, 77, 2]


def test_a_tokenizer_that_open_clip_cannot_reach_is_an_error_with_a_remedy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = open_clip_folder(tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EncoderError, match=r"tokenizer nobody/nothing cannot be used.*save the"):
        load_text_encoder(parse_encoder(f"open_clip:{folder}", "text"), "cpu")


def test_a_tokenizer_without_padding_is_refused(tmp_path: Path) -> None:
    folder = open_clip_folder(tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    save_tokenizer(folder, "gpt2", None)
    with pytest.raises(EncoderError, match=r"cannot be used.*padding token"):
        load_text_encoder(parse_encoder(f"open_clip:{folder}", "text"), "cpu")


def test_a_tokenizer_of_another_repository_is_read_from_its_snapshot(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = open_clip_folder(tmp_path / "model")
    beside = load_text_encoder(parse_encoder(f"open_clip:{folder}", "text"), "cpu")
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.glob("tokenizer*"):
        path.rename(other / path.name)
    described = json.loads((folder / "open_clip_config.json").read_text())
    described["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "org/model"
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    cached(other, tmp_path / "cache", monkeypatch)
    encoder = load_text_encoder(parse_encoder(f"open_clip:{folder}", "text"), "cpu")
    assert torch.equal(encoder.encode(["a red circle"]), beside.encode(["a red circle"]))
