"""Cuts: where features are taken. Each has the same bits whichever others are taken in the same
forward pass."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from PIL import Image
from tiny import draw_shape

from apecache.encoders.encoder import (
    ImageEncoder,
    TextEncoder,
    encode_images,
    encode_texts,
    pool_tokens,
)
from apecache.encoders.load import (
    load_image_encoder,
    load_image_encoders,
    load_text_encoder,
    load_text_encoders,
)
from apecache.encoders.spec import EncoderSpec, parse_cut, parse_encoder
from apecache.errors import EncoderError, OptionError

E5_CARD = 'Each input text should start with "query: " or "passage: ", even for non-English texts.'
CUTS = (
    "default",
    "cls",
    "mean",
    "max",
    "cls+mean",
    "tokens",
    "mean@0",
    "cls@1",
    "tokens@-1",
    "tokens@-2",
    "cls+mean@1",
)


def cut(spec: EncoderSpec, text: str) -> EncoderSpec:
    pooling, layer = parse_cut(text)
    return replace(spec, pooling=pooling, layer=layer)


def image_spec(folder: Path) -> EncoderSpec:
    return parse_encoder(f"timm:{folder}", "image")


def text_spec(folder: Path) -> EncoderSpec:
    return parse_encoder(f"hf:{folder}", "text")


@pytest.fixture
def pixels(tiny_image_encoder: Path) -> torch.Tensor:
    encoder = load_image_encoder(image_spec(tiny_image_encoder), "cpu")
    return torch.stack(
        [encoder.preprocess(draw_shape(color, "circle")) for color in ("red", "green", "blue")]
    )


def test_several_cuts_of_one_model_are_one_pass_and_each_has_the_bits_it_has_alone(
    tiny_image_encoder: Path,
    pixels: torch.Tensor,
) -> None:
    specs = [cut(image_spec(tiny_image_encoder), text) for text in CUTS]
    encoders = load_image_encoders(specs, "cpu")
    assert len({id(encoder.module) for encoder in encoders}) == 1
    passes = []
    encoders[0].module.patch_embed.register_forward_hook(lambda *_: passes.append(1))  # type: ignore[union-attr]
    together = encode_images(encoders, pixels)
    assert len(passes) == 1
    for spec, encoder, found in zip(specs, encoders, together, strict=True):
        alone = load_image_encoder(spec, "cpu")
        assert alone.fingerprint == encoder.fingerprint
        assert torch.equal(alone.encode(pixels), found), spec
        assert found.shape == (3, *encoder.row_shape)
    assert len({encoder.fingerprint.digest for encoder in encoders}) == len(CUTS)
    assert len({encoder.spec.slug for encoder in encoders}) == len(CUTS)


def test_image_cuts_are_what_timm_gives(tiny_image_encoder: Path, pixels: torch.Tensor) -> None:
    model = timm.create_model(
        f"local-dir:{tiny_image_encoder}",
        pretrained=True,
        num_classes=0,
    ).eval()
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        end, states = model.forward_intermediates(
            pixels,
            norm=False,
            output_fmt="NLC",
            return_prefix_tokens=True,
        )
        last = torch.cat((states[-1][1], states[-1][0]), 1)
        first = torch.cat((states[0][1], states[0][0]), 1)
    wanted = {
        "cls": end[:, 0], "mean": end[:, prefix:].mean(1), "max": end[:, prefix:].amax(1), "tokens": end,
        "cls+mean": torch.cat((end[:, 0], end[:, prefix:].mean(1)), 1), "tokens@-1": last, "cls@1": first[:, 0],
        "mean@1": first[:, prefix:].mean(1),
    }  # fmt: skip
    for text, value in wanted.items():
        found = load_image_encoder(cut(image_spec(tiny_image_encoder), text), "cpu").encode(pixels)
        assert torch.allclose(found, value, atol=1e-6), text


def test_text_cuts_leave_padding_out_and_are_one_pass(tiny_text_encoder: Path) -> None:
    specs = [cut(text_spec(tiny_text_encoder), text) for text in CUTS]
    encoders = load_text_encoders(specs, "cpu")
    ids = encoders[0].tokenize(["a red circle", "the blue square on white", "circle"]).ids
    together = encode_texts(encoders, ids)
    for spec, found in zip(specs, together, strict=True):
        alone = load_text_encoder(spec, "cpu")
        assert torch.equal(alone.encode_ids(ids), found), spec
        for row, one in enumerate(ids):  # a caption by itself has no padding
            single = alone.encode_ids([one])[0]
            ours = found[row, : len(one)] if found.ndim == 3 else found[row]
            assert torch.allclose(ours, single, atol=1e-5), spec
    tokens = encoders[CUTS.index("tokens")]
    assert tokens.row_shape == (tokens.max_tokens, tokens.dim)
    with pytest.raises(EncoderError, match="one vector for each text is needed"):
        tokens.encode(["a"])


def test_text_layers_are_the_librarys_hidden_states(tiny_text_encoder: Path) -> None:
    model = transformers.AutoModel.from_pretrained(tiny_text_encoder).eval()
    encoders = [
        load_text_encoder(cut(text_spec(tiny_text_encoder), f"tokens@{layer}"), "cpu")
        for layer in (0, 1, 2)
    ]
    ids = torch.tensor(encoders[0].tokenize(["the blue square"]).ids)
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    for encoder, state in zip(encoders, states, strict=True):
        assert torch.allclose(encoder.encode_ids(ids.tolist()), state, atol=1e-6)


@pytest.mark.parametrize("layer", [3, -4, 100])
def test_a_layer_that_is_not_there_is_refused(tiny_text_encoder: Path, layer: int) -> None:
    with pytest.raises(EncoderError, match="has 2 blocks: the layer is 0 to 2"):
        load_text_encoder(replace(text_spec(tiny_text_encoder), pooling="mean", layer=layer), "cpu")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("men", "did you mean mean"), ("mean@", "expected one of"), ("mean@x", "expected one of"),
        ("", "expected one of"),
        ("default@3", "no pooling of its own; give mean@3"), ("tokens@1.5", "expected one of"),
    ],
)  # fmt: skip
def test_a_cut_that_cannot_be_read_is_refused(text: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        parse_cut(text)


def test_networks_without_blocks_have_no_layers(tmp_path: Path) -> None:
    from timm.models import save_for_hf

    model = timm.create_model("test_resnet", pretrained=False)
    save_for_hf(model, tmp_path / "resnet", safe_serialization=True)
    spec = image_spec(tmp_path / "resnet")
    with pytest.raises(EncoderError, match="several lists of blocks"):
        load_image_encoder(replace(spec, pooling="mean", layer=1), "cpu")
    maps = load_image_encoder(replace(spec, pooling="tokens"), "cpu")
    mean = load_image_encoder(replace(spec, pooling="mean"), "cpu")
    pixels = torch.randn(2, *maps.input_shape)
    assert maps.row_shape[1] == mean.dim
    assert torch.allclose(maps.encode(pixels).mean(1), mean.encode(pixels), atol=1e-6)


def test_pooling_over_masked_tokens() -> None:
    hidden = torch.tensor([[[1.0, -5.0], [3.0, -4.0], [100.0, 100.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert pool_tokens(hidden, mask, "max").tolist() == [[3.0, -4.0]]
    assert pool_tokens(hidden, mask, "cls+mean").tolist() == [[1.0, -5.0, 2.0, -4.5]]
    assert pool_tokens(hidden, None, "mean", n_prefix=1).tolist() == [[51.5, 48.0]]
    assert pool_tokens(hidden, None, "max", n_prefix=2).tolist() == [[100.0, 100.0]]


# Families


def test_t5_is_its_encoder_alone(tmp_path: Path, tiny_text_encoder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=1000,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    transformers.AutoTokenizer.from_pretrained(tiny_text_encoder).save_pretrained(tmp_path / "t5")
    encoder = load_text_encoder(text_spec(tmp_path / "t5"), "cpu")
    ids = encoder.tokenize(["a red circle"]).ids
    with torch.no_grad():
        reference = transformers.T5EncoderModel.from_pretrained(tmp_path / "t5").eval()
        wanted = reference(input_ids=torch.tensor(ids)).last_hidden_state.mean(1)
    assert torch.allclose(encoder.encode_ids(ids), wanted, atol=1e-6)
    with pytest.raises(EncoderError, match="t5 has no CLS token"):
        load_text_encoder(cut(text_spec(tmp_path / "t5"), "cls"), "cpu")


@pytest.mark.parametrize("whole", [True, False])
def test_siglip_is_its_vision_tower_with_its_own_pooling(tmp_path: Path, whole: bool) -> None:
    """From the files of the whole model or of the vision tower alone."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    config = transformers.SiglipConfig(
        text_config={**sizes, "vocab_size": 50, "projection_size": 16},
        vision_config=vision,
    )
    model: Any = (
        transformers.SiglipModel(config)
        if whole
        else transformers.SiglipVisionModel(config.vision_config)
    )
    model.save_pretrained(tmp_path)
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    encoder = load_image_encoder(parse_encoder(f"hf:{tmp_path}", "image"), "cpu")
    pixels = encoder.preprocess(Image.new("RGB", (50, 40), "red")).unsqueeze(0)
    with torch.no_grad():
        out = transformers.SiglipVisionModel.from_pretrained(tmp_path).eval()(pixel_values=pixels)
    assert torch.allclose(encoder.encode(pixels), out.pooler_output, atol=1e-6)
    mean = load_image_encoder(cut(parse_encoder(f"hf:{tmp_path}", "image"), "mean"), "cpu")
    assert torch.allclose(mean.encode(pixels), out.last_hidden_state.mean(1), atol=1e-6)
    with pytest.raises(EncoderError, match="has no CLS token"):
        load_image_encoder(cut(parse_encoder(f"hf:{tmp_path}", "image"), "cls"), "cpu")


@pytest.mark.parametrize(
    ("content", "asked", "prefix"),
    [({"README.md": E5_CARD}, None, "query: "), ({"README.md": E5_CARD}, "passage: ", "passage: "),
     ({"README.md": E5_CARD}, "", ""), ({"README.md": "instructions"}, None, ""), ({}, None, ""),
     ({}, "query: ", "query: "), ({"config.json": "intfloat/multilingual-e5-small"}, None, "query: "),
     ({"config.json": "intfloat/multilingual-e5-large-instruct"}, None, ""),
     ({"config.json": "intfloat/e5-mistral-7b-instruct"}, None, "")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["some5-thing", "5e"])
def test_e5_gets_the_prefix_it_was_trained_with_whatever_its_folder_is_named(
    tmp_path: Path,
    tiny_text_encoder: Path,
    name: str,
    content: dict[str, str],
    asked: str | None,
    prefix: str,
) -> None:
    import json
    import shutil

    place = shutil.copytree(tiny_text_encoder, tmp_path / name)
    if "README.md" in content:
        (place / "README.md").write_text(content["README.md"])
    if "config.json" in content:
        saved = json.loads((place / "config.json").read_text())
        saved["_name_or_path"] = content["config.json"]
        (place / "config.json").write_text(json.dumps(saved))
    spec = replace(text_spec(place), prefix=asked)
    plain = load_text_encoder(replace(text_spec(place), prefix=""), "cpu")
    encoder: TextEncoder = load_text_encoder(spec, "cpu")
    assert encoder.tokenize(["a red circle"]).ids == plain.tokenize([f"{prefix}a red circle"]).ids
    assert (encoder.fingerprint == plain.fingerprint) == (prefix == "")


def test_a_folder_that_is_only_named_like_e5_gets_no_prefix_and_a_warning(
    tmp_path: Path,
    tiny_text_encoder: Path,
) -> None:
    import shutil

    place = shutil.copytree(tiny_text_encoder, tmp_path / "multilingual-e5-small")
    with pytest.warns(UserWarning, match="named like an E5 model.*--text-prefix 'query: '"):
        encoder = load_text_encoder(text_spec(place), "cpu")
    plain = load_text_encoder(text_spec(tiny_text_encoder), "cpu")
    assert encoder.fingerprint == plain.fingerprint


def test_convolutional_networks_run_channels_last_and_say_so(
    tmp_path: Path,
    tiny_image_encoder: Path,
) -> None:
    from timm.models import save_for_hf

    save_for_hf(
        timm.create_model("test_efficientnet", pretrained=False),
        tmp_path / "net",
        safe_serialization=True,
    )
    network: ImageEncoder = load_image_encoder(image_spec(tmp_path / "net"), "cpu")
    assert network.fingerprint.fields["inputs"]["memory_format"] == "channels_last"
    vit = load_image_encoder(image_spec(tiny_image_encoder), "cpu")
    assert "memory_format" not in vit.fingerprint.fields["inputs"]
    reference = timm.create_model(
        f"local-dir:{tmp_path / 'net'}",
        pretrained=True,
        num_classes=0,
    ).eval()
    pixels = torch.randn(2, *network.input_shape)
    with torch.no_grad():
        assert torch.allclose(network.encode(pixels), reference(pixels), atol=1e-5)
