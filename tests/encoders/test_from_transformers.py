"""transformers encoders against transformers itself, and an identity of what makes their
features."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import parse_encoder
from apecache.errors import EncoderError

Variant = Callable[[Path, Any], Path]

TEXTS = ["a red circle", "the", "a drawing of the blue square in white", ""]
BIAS = "encoder.layer.1.output.dense.bias"
LONG = "a red circle in the white square " * 4
PIXELS = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def load(folder: Path, **settings: Any) -> TextEncoder:
    return load_text_encoder(replace(parse_encoder(f"hf:{folder}", "text"), **settings), "cpu")


def load_image(folder: Path, **settings: Any) -> ImageEncoder:
    return load_image_encoder(replace(parse_encoder(f"hf:{folder}", "image"), **settings), "cpu")


@pytest.fixture(scope="module")
def bert(tiny_text_encoder: Path) -> TextEncoder:
    return load(tiny_text_encoder)


def hidden_states(folder: Path, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The library's own last hidden states and mask, by its own padding."""
    inputs = AutoTokenizer.from_pretrained(folder)(
        texts,
        padding=True,
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
        return model(**inputs).last_hidden_state, inputs["attention_mask"]


# Text


def test_features_are_the_masked_mean_of_the_librarys_hidden_states(
    bert: TextEncoder,
    tiny_text_encoder: Path,
) -> None:
    hidden, mask = hidden_states(tiny_text_encoder, TEXTS)
    expected = torch.stack(
        [row[: int(keep.sum())].mean(0) for row, keep in zip(hidden, mask, strict=True)]
    )
    assert len(set(mask.sum(1).tolist())) > 2  # the mask matters
    found = bert.encode(TEXTS)
    assert (found.shape, found.dtype, bert.dim) == ((4, 32), torch.float32, 32)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_cls_pooling_is_the_first_hidden_state(tiny_text_encoder: Path) -> None:
    hidden, _ = hidden_states(tiny_text_encoder, TEXTS)
    assert torch.equal(load(tiny_text_encoder, pooling="cls").encode(TEXTS), hidden[:, 0])


def test_padding_to_a_longer_neighbor_changes_nothing(bert: TextEncoder) -> None:
    alone = bert.encode(["the"])
    beside = bert.encode(["the", LONG])[:1]
    assert torch.cosine_similarity(alone, beside).item() > 0.99999


def test_over_long_texts_are_truncated_and_counted(bert: TextEncoder) -> None:
    assert bert.max_tokens == 16
    exactly = " ".join(["the"] * 14)  # and two special tokens
    tokens = bert.tokenize([exactly, f"{exactly} photo", "the", LONG])
    assert [len(ids) for ids in tokens.ids] == [16, 16, 3, 16]
    assert tokens.n_truncated == 2
    assert tokens.ids[0] == tokens.ids[1]
    assert tokens.ids[0][0] == 2
    assert tokens.ids[0][-1] == 3  # [SEP] is kept
    assert bert.tokenize([]).ids == []


def test_tokens_are_the_librarys_own(bert: TextEncoder, tiny_text_encoder: Path) -> None:
    expected = AutoTokenizer.from_pretrained(tiny_text_encoder)([*TEXTS, "shapes unknown"])[
        "input_ids"
    ]
    assert bert.tokenize([*TEXTS, "shapes unknown"]).ids == expected
    assert bert.pad_id == 0


def test_the_limit_of_tokens_is_the_smallest_of_the_spec_the_files_and_the_model(
    tiny_text_encoder: Path,
    variant: Variant,
    edits: Any,
) -> None:
    assert load(tiny_text_encoder, max_tokens=5).max_tokens == 5
    assert [len(ids) for ids in load(tiny_text_encoder, max_tokens=5).tokenize([LONG]).ids] == [5]
    assert load(tiny_text_encoder, max_tokens=500).max_tokens == 16
    saved = variant(
        tiny_text_encoder,
        edits.write("sentence_bert_config.json", {"max_seq_length": 8}),
    )
    assert load(saved).max_tokens == 8
    assert load(saved, max_tokens=12).max_tokens == 12
    shorter = variant(tiny_text_encoder, edits.json("tokenizer_config.json", model_max_length=9))
    assert load(shorter).max_tokens == 9


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_a_limit_that_leaves_no_room_for_words_is_refused(
    tiny_text_encoder: Path,
    max_tokens: int,
) -> None:
    with pytest.raises(
        EncoderError,
        match=f"{max_tokens} tokens leave no room for words beside 2 special ones",
    ):
        load(tiny_text_encoder, max_tokens=max_tokens)


@pytest.mark.parametrize(
    ("saved", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["max"]}, "max"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
    ],
)
def test_the_pooling_of_a_sentence_transformers_folder_is_used_unless_the_spec_says_otherwise(
    tiny_text_encoder: Path,
    variant: Variant,
    edits: Any,
    saved: dict[str, Any],
    pooling: str,
) -> None:
    folder = variant(tiny_text_encoder, edits.write("1_Pooling/config.json", saved))
    other = "mean" if pooling == "cls" else "cls"
    assert torch.equal(
        load(folder).encode(TEXTS),
        load(tiny_text_encoder, pooling=pooling).encode(TEXTS),
    )
    assert torch.equal(
        load(folder, pooling=other).encode(TEXTS),
        load(tiny_text_encoder, pooling=other).encode(TEXTS),
    )


@pytest.mark.parametrize(
    "saved",
    [
        {"pooling_mode_weightedmean_tokens": True},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode": "weightedmean"},
        {"pooling_mode": ["cls", "mean"]},
        {"pooling_mode": "mean_sqrt_len_tokens"},
        {},
    ],
)
def test_a_pooling_that_is_not_there_is_refused(
    tiny_text_encoder: Path,
    variant: Variant,
    edits: Any,
    saved: dict[str, Any],
) -> None:
    folder = variant(tiny_text_encoder, edits.write("1_Pooling/config.json", saved))
    with pytest.raises(
        EncoderError,
        match=r"is not supported; take st:.*, or give --text-cut cls, mean, last or max",
    ):
        load(folder)


def test_the_text_encoder_is_frozen(bert: TextEncoder) -> None:
    assert not bert.module.training
    assert not any(parameter.requires_grad for parameter in bert.module.parameters())


def test_loading_leaves_the_librarys_own_messages_as_they_were(tiny_text_encoder: Path) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(tiny_text_encoder)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# Identity


def next_float(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[0] = torch.nextafter(tensor.view(-1)[0], torch.tensor(torch.inf))
    return tensor


def vocabulary(edits: Any) -> Any:
    def swap(folder: Path) -> None:
        saved = json.loads((folder / "tokenizer.json").read_text())
        words = saved["model"]["vocab"]
        words["circle"], words["square"] = words["square"], words["circle"]
        (folder / "tokenizer.json").write_text(json.dumps(saved))

    return swap


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (lambda edits: edits.tensor(BIAS, next_float), {"weights"}),
        (lambda edits: edits.tensor("embeddings.word_embeddings.weight", next_float), {"weights"}),
        (vocabulary, {"inputs.tokenizer"}),
        (lambda edits: edits.json("tokenizer.json", normalizer=None), {"inputs.tokenizer"}),
        (
            lambda edits: edits.json("tokenizer_config.json", model_max_length=12),
            {"inputs.max_tokens"},
        ),
        (
            lambda edits: edits.write("1_Pooling/config.json", {"pooling_mode": "cls"}),
            {"inputs.pooling"},
        ),
        (
            lambda edits: edits.json("config.json", num_attention_heads=4),
            {"architecture.num_attention_heads"},
        ),
        (lambda edits: edits.json("config.json", hidden_act="relu"), {"architecture.hidden_act"}),
        (
            lambda edits: edits.json("config.json", layer_norm_eps=0.1),
            {"architecture.layer_norm_eps"},
        ),
    ],
)
def test_the_fingerprint_changes_with_whatever_makes_the_features(
    bert: TextEncoder,
    tiny_text_encoder: Path,
    variant: Variant,
    edits: Any,
    change: Any,
    fields: set[str],
) -> None:
    other = load(variant(tiny_text_encoder, change(edits)))
    assert other.fingerprint.digest != bert.fingerprint.digest
    assert {path for path, _, _ in other.fingerprint.difference(bert.fingerprint)} == fields


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"pooling": "cls"}, "inputs.pooling"),
        ({"max_tokens": 8}, "inputs.max_tokens"),
        ({"dtype": "bfloat16"}, "compute_dtype"),
        ({"revision": "main"}, "revision"),
    ],
)
def test_the_fingerprint_changes_with_every_setting(
    bert: TextEncoder,
    tiny_text_encoder: Path,
    settings: dict[str, Any],
    field: str,
) -> None:
    other = load(tiny_text_encoder, **settings)
    assert [path for path, _, _ in other.fingerprint.difference(bert.fingerprint)] == [field]


@pytest.mark.parametrize(
    "change",
    [
        lambda edits: lambda folder: None,
        lambda edits: edits.json(
            "config.json",
            transformers_version="0",
            architectures=["BertForMaskedLM"],
        ),
        lambda edits: edits.json("config.json", _name_or_path="/elsewhere"),
        lambda edits: edits.json("tokenizer_config.json", name_or_path="/elsewhere"),
        lambda edits: edits.json(
            "tokenizer.json",
            truncation={
                "direction": "Right",
                "max_length": 4,
                "strategy": "LongestFirst",
                "stride": 0,
            },
        ),
        lambda edits: edits.write("README.md", "text"),
    ],
    ids=[
        "another path",
        "versions",
        "name",
        "name of the tokenizer",
        "truncation in force",
        "another file",
    ],
)
def test_the_fingerprint_does_not_change_with_what_makes_no_difference(
    bert: TextEncoder,
    tiny_text_encoder: Path,
    variant: Variant,
    edits: Any,
    change: Any,
) -> None:
    other = load(variant(tiny_text_encoder, change(edits)))
    assert other.fingerprint.difference(bert.fingerprint) == []
    assert torch.equal(other.encode([*TEXTS, LONG]), bert.encode([*TEXTS, LONG]))


def test_the_fingerprint_is_the_same_when_loaded_twice_and_used_between(
    tiny_text_encoder: Path,
) -> None:
    first = load(tiny_text_encoder)
    first.encode([LONG])
    second = load(tiny_text_encoder)
    assert first.fingerprint.digest == second.fingerprint.digest
    assert str(tiny_text_encoder) not in str(first.fingerprint.fields)


# What is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda edits: edits.tensor(BIAS, lambda _: None), f"lack 1 parameters of BertModel: {BIAS}"),
        (lambda edits: edits.tensor(BIAS, lambda _: torch.ones(3)), BIAS),
        (lambda edits: edits.cut("model.safetensors", 5000), "cannot be opened"),
        (lambda edits: edits.remove("model.safetensors"), "cannot be opened"),
        (lambda edits: edits.cut("config.json", 30), "config.json is not JSON"),
        (lambda edits: edits.json("config.json", model_type="nope"), "cannot be opened"),
        (lambda edits: edits.json("config.json", hidden_size="wide"), "cannot be opened"),
        (lambda edits: edits.remove("tokenizer*"), "knows no words"),
        (lambda edits: edits.cut("tokenizer.json", 30), "cannot be opened"),
    ],
    ids=["missing", "shape", "cut", "no weights", "half a config", "type", "value", "no tokenizer", "half a tokenizer"],
)  # fmt: skip
def test_a_folder_that_is_not_whole_is_refused(
    tiny_text_encoder: Path, variant: Variant, edits: Any, change: Any, said: str
) -> None:
    folder = variant(tiny_text_encoder, change(edits))
    with pytest.raises(EncoderError) as caught:
        load(folder)
    message = str(caught.value)
    assert message.startswith(f"encoder hf:{folder}")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["BartConfig", "Aimv2Config"])
def test_what_is_no_single_text_encoder_is_refused(tmp_path: Path, name: str) -> None:
    getattr(transformers, name)().save_pretrained(tmp_path)
    with pytest.raises(
        EncoderError,
        match="is not a single text encoder; BERT-like models, T5, causal decoders, CLIP and SigLIP",
    ):
        load(tmp_path)


@pytest.mark.parametrize("loader", [load_text_encoder, load_image_encoder])
def test_a_name_that_cannot_be_reached_is_refused_with_near_names(
    loader: Callable[..., Any],
) -> None:
    spec = parse_encoder("hf:sentence-transformers/all-MiniLM-L6-v3", "text")
    with pytest.raises(EncoderError) as caught:
        loader(spec, "cpu")
    message = str(caught.value)
    assert "did you mean sentence-transformers/all-MiniLM-L6-v2" in message
    assert "hf:/folder" in message
    assert "\n" not in message
    assert caught.value.exit_code == 3


# Images


def save_vision(folder: Path, kind: str, processor: Any, **settings: Any) -> Path:
    """A random two-layer vision transformer, 32-d, patches of 8 pixels."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    config = getattr(transformers, f"{kind}Config")(
        **sizes,
        image_size=32,
        patch_size=8,
        **settings,
    )
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def cropping() -> Any:
    mean_and_std = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    sizes = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    return transformers.BitImageProcessor(**sizes, **mean_and_std)


def squashing() -> Any:
    return transformers.ViTImageProcessor(size={"height": 32, "width": 32})


VISION = {
    "dinov2": ("Dinov2", cropping, 1),
    "registers": ("Dinov2WithRegisters", cropping, 5),
    "vit": ("ViT", squashing, 1),
    "deit": ("DeiT", squashing, 2),  # a CLS and a distillation token
    "ijepa": ("IJepa", squashing, 0),
}


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vision")
    return {
        name: save_vision(root / name, kind, made()) for name, (kind, made, _) in VISION.items()
    }


def picture(width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


@pytest.mark.parametrize("name", VISION)
def test_image_features_are_the_cls_token_or_the_mean_of_the_patches(
    vision: dict[str, Path],
    name: str,
) -> None:
    n_prefix = VISION[name][2]
    with torch.no_grad():
        hidden = (
            AutoModel.from_pretrained(vision[name]).eval()(pixel_values=PIXELS).last_hidden_state
        )
    assert hidden.shape[1] == n_prefix + 16
    default = hidden[:, 0] if n_prefix else hidden.mean(1)
    for pooling, expected in (("default", default), ("mean", hidden[:, n_prefix:].mean(1))):
        encoder = load_image(vision[name], pooling=pooling)
        assert torch.equal(encoder.encode(PIXELS), expected)
        assert (encoder.dim, encoder.input_shape) == (32, (3, 32, 32))


def test_cls_pooling_needs_a_cls_token(vision: dict[str, Path]) -> None:
    with pytest.raises(EncoderError, match="has no CLS token; use --image-cut default or mean"):
        load_image(vision["ijepa"], pooling="cls")


@pytest.mark.parametrize("name", ["dinov2", "vit"])
@pytest.mark.parametrize("size", [(60, 40), (32, 32), (9, 200)])
def test_image_preprocessing_is_the_processors_own_to_the_pixel(
    vision: dict[str, Path],
    name: str,
    size: tuple[int, int],
) -> None:
    processor = AutoImageProcessor.from_pretrained(vision[name])
    expected = processor(images=picture(*size), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(load_image(vision[name]).preprocess(picture(*size)), expected)


@pytest.mark.parametrize("name", VISION)
def test_the_resolution_can_be_overridden(vision: dict[str, Path], name: str) -> None:
    encoder = load_image(vision[name], resolution=48)
    assert encoder.input_shape == (3, 48, 48)
    pixels = encoder.preprocess(picture())
    assert pixels.shape == (3, 48, 48)
    assert encoder.encode(pixels[None]).shape == (1, 32)


def test_a_higher_resolution_keeps_the_share_that_is_cropped(vision: dict[str, Path]) -> None:
    processor = AutoImageProcessor.from_pretrained(vision["dinov2"])
    size = {
        "size": {"shortest_edge": 54},
        "crop_size": {"height": 48, "width": 48},
    }  # 36 : 32 = 54 : 48
    expected = processor(images=picture(), return_tensors="pt", **size)["pixel_values"][0]
    assert torch.equal(load_image(vision["dinov2"], resolution=48).preprocess(picture()), expected)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda edits: edits.json("preprocessor_config.json", image_mean=[0.5, 0.4, 0.31]),
         "inputs.processor.image_mean"),
        (lambda edits: edits.json("preprocessor_config.json", resample=2), "inputs.processor.resample"),
        (lambda edits: edits.json("preprocessor_config.json", do_center_crop=False, size={"height": 32, "width": 32}),
         "inputs.processor.do_center_crop"),
        (lambda edits: edits.tensor("layernorm.bias", next_float), "weights"),
        (lambda edits: edits.json("config.json", num_attention_heads=4), "architecture.num_attention_heads"),
    ],
)  # fmt: skip
def test_the_fingerprint_of_images_changes_with_whatever_makes_the_features(
    vision: dict[str, Path], variant: Variant, edits: Any, change: Any, field: str
) -> None:
    base = load_image(vision["dinov2"])
    other = load_image(variant(vision["dinov2"], change(edits)))
    assert other.fingerprint.digest != base.fingerprint.digest
    assert field in {path for path, _, _ in other.fingerprint.difference(base.fingerprint)}


def test_the_fingerprint_of_images_changes_with_every_setting_and_with_nothing_else(
    vision: dict[str, Path],
    variant: Variant,
) -> None:
    base = load_image(vision["dinov2"])
    base.preprocess(picture())
    digests = {
        base.fingerprint.digest,
        load_image(variant(vision["dinov2"], lambda folder: None)).fingerprint.digest,
    }
    assert len(digests) == 1
    for settings in ({"pooling": "mean"}, {"resolution": 48}, {"dtype": "bfloat16"}):
        digests.add(load_image(vision["dinov2"], **settings).fingerprint.digest)
    assert len(digests) == 4


def test_a_text_encoder_is_refused_for_images(tiny_text_encoder: Path) -> None:
    with pytest.raises(
        EncoderError,
        match=r"bert is not supported as an image encoder; supported are .*dinov2, ",
    ):
        load_image(tiny_text_encoder)


def test_image_weights_that_miss_parameters_are_refused(
    vision: dict[str, Path],
    variant: Variant,
    edits: Any,
) -> None:
    folder = variant(vision["dinov2"], edits.tensor("layernorm.bias", lambda _: None))
    with pytest.raises(EncoderError, match=r"lack 1 parameters of Dinov2Model: layernorm\.bias"):
        load_image(folder)


def test_an_image_encoder_without_its_processor_is_refused(
    vision: dict[str, Path],
    variant: Variant,
    edits: Any,
) -> None:
    folder = variant(vision["dinov2"], edits.remove("preprocessor_config.json"))
    with pytest.raises(EncoderError, match="cannot be opened"):
        load_image(folder)
