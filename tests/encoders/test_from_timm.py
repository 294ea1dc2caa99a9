"""timm image encoders against timm itself: the same pixels, the same features, and an identity of
what makes them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

from apecache.encoders.encoder import ImageEncoder
from apecache.encoders.load import load_image_encoder
from apecache.encoders.spec import parse_encoder
from apecache.errors import EncoderError

Variant = Callable[[Path, Any], Path]

BATCH = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def load(folder: Path, **settings: Any) -> ImageEncoder:
    return load_image_encoder(replace(parse_encoder(f"timm:{folder}", "image"), **settings), "cpu")


def reference(folder: Path, **arguments: Any) -> Any:
    """timm's own way to the same model."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments).eval()


def save_model(folder: Path, architecture: str, **arguments: Any) -> Path:
    """A random model with three classes, 32 x 32 pixels, as timm saves it."""
    folder.mkdir()
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False, num_classes=3, **arguments)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "model.safetensors",
    )
    config = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 3}
    config |= {key: model.pretrained_cfg[key] for key in ("first_conv", "classifier")}
    described = {
        "architecture": architecture,
        "num_classes": 3,
        "model_args": arguments,
        "pretrained_cfg": config,
    }
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


@pytest.fixture(scope="module")
def vit(tiny_image_encoder: Path) -> ImageEncoder:
    return load(tiny_image_encoder)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("timm") / "resnet", "test_resnet")


@pytest.mark.parametrize("size", [(32, 32), (60, 40), (17, 90), (5, 5), (640, 480)])
@pytest.mark.parametrize("resolution", [None, 48])
def test_preprocessing_is_timms_own_to_the_pixel(
    tiny_image_encoder: Path,
    size: tuple[int, int],
    resolution: int | None,
) -> None:
    config = resolve_model_data_config(reference(tiny_image_encoder))
    if resolution:
        config["input_size"] = (3, resolution, resolution)
    expected = create_transform(**config, is_training=False)(picture(*size))
    found = load(tiny_image_encoder, resolution=resolution).preprocess(picture(*size))
    assert found.shape == (3, resolution or 32, resolution or 32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_preprocessing_is_what_the_saved_config_says(vit: ImageEncoder) -> None:
    image = picture(60, 40)
    resized = image.resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    expected = (torch.from_numpy(np.array(resized)).permute(2, 0, 1).float().div(255) - 0.5) / 0.5
    assert torch.equal(vit.preprocess(image), expected)


def test_features_are_the_models_own_before_its_classifier(
    vit: ImageEncoder,
    tiny_image_encoder: Path,
) -> None:
    model = reference(tiny_image_encoder)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(BATCH), pre_logits=True)
    found = vit.encode(BATCH)
    assert torch.equal(found, expected)
    assert (found.shape, found.dtype, vit.dim) == ((3, 64), torch.float32, 64)
    assert vit.input_shape == (3, 32, 32)
    assert torch.equal(vit.encode(BATCH), found)


def test_the_encoder_is_frozen(vit: ImageEncoder) -> None:
    assert not vit.module.training
    assert not any(parameter.requires_grad for parameter in vit.module.parameters())


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooling_can_be_chosen(tiny_image_encoder: Path, pooling: str) -> None:
    with torch.no_grad():
        tokens = reference(tiny_image_encoder).forward_features(BATCH)
    expected = (
        tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(1)
    )  # one prefix token, the CLS token
    assert torch.equal(load(tiny_image_encoder, pooling=pooling).encode(BATCH), expected)


@pytest.mark.parametrize(
    ("architecture", "arguments", "axes"),
    [
        ("test_resnet", {}, (2, 3)),
        ("mobilenetv3_small_050", {}, (2, 3)),
        (
            "swin_tiny_patch4_window7_224",
            {
                "img_size": 32,
                "embed_dim": 8,
                "depths": [1, 1],
                "num_heads": [1, 1],
                "window_size": 4,
            },
            (1, 2),
        ),
    ],
)
def test_networks_without_tokens_pool_over_the_picture(
    tmp_path: Path,
    architecture: str,
    arguments: dict[str, Any],
    axes: tuple[int, int],
) -> None:
    folder = save_model(tmp_path / "model", architecture, **arguments)
    model = reference(folder)
    with torch.no_grad():
        maps = model.forward_features(BATCH)
        own = model.forward_head(maps, pre_logits=True)
    for pooling, expected in (("default", own), ("mean", maps.mean(axes))):
        encoder = load(folder, pooling=pooling)
        assert torch.allclose(encoder.encode(BATCH), expected, atol=1e-6)  # we run channels last
        assert encoder.dim == expected.shape[1]


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [("test_resnet", {}), ("test_vit3", {"img_size": 32})],
)
def test_cls_pooling_needs_a_cls_token(
    tmp_path: Path,
    architecture: str,
    arguments: dict[str, Any],
) -> None:
    folder = save_model(tmp_path / "model", architecture, **arguments)
    with pytest.raises(EncoderError, match="has no CLS token; use --image-cut default or mean"):
        load(folder, pooling="cls")


def test_the_resolution_can_be_overridden(tiny_image_encoder: Path, resnet: Path) -> None:
    pixels = torch.rand(2, 3, 48, 48)
    for folder, model in (
        (tiny_image_encoder, reference(tiny_image_encoder, img_size=48)),
        (resnet, reference(resnet)),  # convolutional: no `img_size` to give
    ):
        encoder = load(folder, resolution=48)
        assert encoder.input_shape == (3, 48, 48)
        with torch.no_grad():
            expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
        assert torch.allclose(encoder.encode(pixels), expected, atol=1e-6)


def test_bfloat16_computes_nearly_the_same_and_returns_float32(
    vit: ImageEncoder,
    tiny_image_encoder: Path,
) -> None:
    encoder = load(tiny_image_encoder, dtype="bfloat16")
    assert {parameter.dtype for parameter in encoder.module.parameters()} == {torch.bfloat16}
    found = encoder.encode(BATCH)
    assert found.dtype == torch.float32
    assert not torch.equal(found, vit.encode(BATCH))
    assert torch.cosine_similarity(found, vit.encode(BATCH)).min() > 0.99


@pytest.mark.parametrize("precision", ["float16", "tf32"])
def test_a_cpu_computes_float16_and_tf32_in_float32(
    vit: ImageEncoder,
    tiny_image_encoder: Path,
    precision: str,
) -> None:
    """Its own float16 is slower by far, and it has no TF32."""
    encoder = load(tiny_image_encoder, dtype=precision)
    assert encoder.fingerprint.fields["compute_dtype"] == precision
    assert torch.equal(encoder.encode(BATCH), vit.encode(BATCH))


# Identity


def config(**values: Any) -> Callable[[Any], Any]:
    return lambda edits: edits.json("config.json", **values)


def weight(name: str) -> Callable[[Any], Any]:
    def next_float(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = torch.nextafter(tensor.view(-1)[0], torch.tensor(torch.inf))
        return tensor

    return lambda edits: edits.tensor(name, next_float)


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (weight("blocks.1.mlp.fc2.bias"), {"weights"}),
        (weight("pos_embed"), {"weights"}),
        (config(pretrained_cfg__mean=[0.5, 0.5, 0.50001]), {"inputs.config.mean"}),
        (config(pretrained_cfg__std=[0.5, 0.5, 0.4]), {"inputs.config.std", "inputs.transform"}),
        (config(pretrained_cfg__interpolation="bilinear"), {"inputs.config.interpolation", "inputs.transform"}),
        (config(pretrained_cfg__crop_pct=0.9), {"inputs.config.crop_pct", "inputs.transform"}),
        (config(pretrained_cfg__crop_mode="squash"), {"inputs.config.crop_mode", "inputs.transform"}),
        (config(model_args__global_pool="avg", model_args__fc_norm=False), {
            "architecture.arguments.fc_norm", "architecture.arguments.global_pool", "architecture.pool"}),
        (config(model_args__num_heads=4), {"architecture.arguments.num_heads"}),
    ],
)  # fmt: skip
def test_the_fingerprint_changes_with_whatever_makes_the_features(
    vit: ImageEncoder,
    tiny_image_encoder: Path,
    variant: Variant,
    edits: Any,
    change: Any,
    fields: set[str],
) -> None:
    other = load(variant(tiny_image_encoder, change(edits)))
    assert other.fingerprint.digest != vit.fingerprint.digest
    assert {path for path, _, _ in other.fingerprint.difference(vit.fingerprint)} == fields


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"pooling": "mean"}, "inputs.pooling"),
        ({"pooling": "cls"}, "inputs.pooling"),
        ({"dtype": "bfloat16"}, "compute_dtype"),
        ({"resolution": 48}, "inputs.config.input_size"),
    ],
)
def test_the_fingerprint_changes_with_every_setting(
    vit: ImageEncoder,
    tiny_image_encoder: Path,
    settings: dict[str, Any],
    field: str,
) -> None:
    other = load(tiny_image_encoder, **settings)
    assert other.fingerprint.digest != vit.fingerprint.digest
    assert field in {path for path, _, _ in other.fingerprint.difference(vit.fingerprint)}


@pytest.mark.parametrize(
    "change",
    [
        lambda edits: lambda folder: None,
        weight("head.weight"),
        lambda edits: edits.json(
            "config.json",
            pretrained_cfg__license="mit",
            pretrained_cfg__tag="x",
        ),
        lambda edits: edits.write("README.md", "text"),
    ],
    ids=["another path", "the classifier", "other metadata", "another file"],
)
def test_the_fingerprint_does_not_change_with_what_makes_no_difference(
    vit: ImageEncoder,
    tiny_image_encoder: Path,
    variant: Variant,
    edits: Any,
    change: Any,
) -> None:
    other = load(variant(tiny_image_encoder, change(edits)))
    assert other.fingerprint.difference(vit.fingerprint) == []
    assert torch.equal(other.encode(BATCH), vit.encode(BATCH))


def test_the_fingerprint_is_the_same_when_loaded_twice_and_used_between(
    tiny_image_encoder: Path,
) -> None:
    first = load(tiny_image_encoder)
    first.encode(BATCH)
    first.preprocess(picture(60, 40))
    second = load(tiny_image_encoder)
    assert first.fingerprint.digest == second.fingerprint.digest
    assert str(tiny_image_encoder) not in str(first.fingerprint.fields)


# What is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda edits: edits.tensor("blocks.1.attn.proj.bias", lambda _: None),
            "blocks.1.attn.proj.bias",
        ),
        (lambda edits: edits.tensor("norm.weight", lambda _: torch.ones(65)), "norm.weight"),
        (lambda edits: edits.cut("model.safetensors", 5000), "invalid header length"),
        (lambda edits: edits.remove("model.safetensors"), "No suitable checkpoints"),
        (lambda edits: edits.json("config.json", architecture="test_vitt"), "test_vitt"),
        (lambda edits: edits.json("config.json", model_args={"no_such": 1}), "no_such"),
        (lambda edits: edits.cut("config.json", 30), ""),
        (lambda edits: edits.write("config.json", []), ""),
    ],
    ids=[
        "missing",
        "shape",
        "cut",
        "no weights",
        "architecture",
        "argument",
        "half a config",
        "a list",
    ],
)
def test_a_folder_whose_weights_do_not_fit_is_refused(
    tiny_image_encoder: Path,
    variant: Variant,
    edits: Any,
    change: Any,
    said: str,
) -> None:
    folder = variant(tiny_image_encoder, change(edits))
    with pytest.raises(EncoderError) as caught:
        load(folder)
    message = str(caught.value)
    assert message.startswith(f"encoder timm:{folder}: ")
    assert said in message
    assert "\n" not in message
    assert "timm:/folder with a saved model" in message


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "vit_smal_patch16_224",
            r"timm has no model 'vit_smal_patch16_224'; did you mean vit_small_patch16_224, ",
        ),
        ("resnet18.nope", r"resnet18 has no weights 'nope'; there are a1_in1k, "),
        ("resnet18", r"encoder timm:resnet18: .*(give a name that timm\.list_models knows"),
        ("resnet18@abc", r"encoder timm:resnet18@abc: "),
    ],
)
def test_a_name_that_cannot_be_had_is_refused(name: str, said: str) -> None:
    with pytest.raises(EncoderError, match=said.replace("(", r"\(")) as caught:
        load_image_encoder(parse_encoder(f"timm:{name}", "image"), "cpu")
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
