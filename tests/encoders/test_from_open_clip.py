"""open_clip's two towers: what the library itself makes of images and texts, and nothing padded in
vain."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import draw_shape

from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import parse_encoder
from apecache.errors import EncoderError

open_clip = pytest.importorskip("open_clip", reason="the extra open-clip is not installed")

VISION = {"image_size": 32, "layers": 2, "width": 16, "patch_size": 8, "head_width": 8}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
TOWERS = {
    "clip": {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT},
    "siglip": {
        "embed_dim": 8,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    },
}
TEXTS = [
    "a red circle",
    "the blue square",
    "x",
    "one two three four five six seven eight nine ten eleven twelve",
]


def save(folder: Path, kind: str) -> Path:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder.mkdir()
    preprocess = {
        "size": [32, 32],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "interpolation": "bicubic",
    }
    described = {
        "model_cfg": TOWERS[kind],
        "preprocess_cfg": {**preprocess, "resize_mode": "shortest"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    from open_clip.model import CLIP, CustomTextCLIP

    config = {key: value for key, value in TOWERS[kind].items() if key != "custom_text"}
    model: Any = (CustomTextCLIP if kind == "siglip" else CLIP)(**config)  # type: ignore[operator]
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save(tmp_path_factory.mktemp("open_clip") / kind, kind) for kind in TOWERS}


@pytest.mark.parametrize("kind", TOWERS)
def test_images_are_what_open_clip_makes_of_them_to_the_pixel(
    folders: dict[str, Path],
    kind: str,
) -> None:
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folders[kind]}")
    encoder = load_image_encoder(parse_encoder(f"open_clip:{folders[kind]}", "image"), "cpu")
    image = draw_shape("red", "circle", 61)
    pixels = encoder.preprocess(image)
    assert torch.equal(pixels, transform(image))
    with torch.no_grad():
        wanted = model.eval().encode_image(pixels.unsqueeze(0))
    assert torch.allclose(encoder.encode(pixels.unsqueeze(0)), wanted, atol=1e-6)


@pytest.mark.parametrize("kind", TOWERS)
def test_texts_are_what_open_clip_makes_of_them(folders: dict[str, Path], kind: str) -> None:
    """CLIP without the padding that it never sees; SigLIP with all of it."""
    model = open_clip.create_model(f"local-dir:{folders[kind]}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folders[kind]}")
    encoder = load_text_encoder(parse_encoder(f"open_clip:{folders[kind]}", "text"), "cpu")
    with torch.no_grad():
        wanted = model.encode_text(tokenizer(TEXTS))
    tokens = encoder.tokenize(TEXTS)
    assert torch.allclose(encoder.encode(TEXTS), wanted, atol=1e-5)
    lengths = [len(ids) for ids in tokens.ids]
    assert lengths == ([5, 5, 3, 12] if kind == "clip" else [12] * 4)
    assert tokens.n_truncated == 1
    assert encoder.encode([]).shape == (0, 8)


def test_towers_have_identities_of_their_own(folders: dict[str, Path], tmp_path: Path) -> None:
    specs = [parse_encoder(f"open_clip:{folders['clip']}", side) for side in ("image", "text")]  # type: ignore[arg-type]
    image = load_image_encoder(specs[0], "cpu")
    text = load_text_encoder(specs[1], "cpu")
    assert image.fingerprint.digest != text.fingerprint.digest
    assert load_image_encoder(specs[0], "cpu").fingerprint == image.fingerprint
    prefixed = load_text_encoder(replace(specs[1], prefix="a photo of "), "cpu")
    assert prefixed.fingerprint.digest != text.fingerprint.digest
    assert torch.equal(prefixed.encode(["x"]), text.encode(["a photo of x"]))


def test_a_faster_resize_differs_a_little_and_has_another_identity(
    folders: dict[str, Path],
) -> None:
    spec = parse_encoder(f"open_clip:{folders['clip']}", "image")
    plain, fast = (
        load_image_encoder(replace(spec, resize=how), "cpu") for how in ("reference", "torchvision")
    )  # type: ignore[arg-type]
    image = draw_shape("red", "triangle", 61)
    difference = (plain.preprocess(image) - fast.preprocess(image)).abs().max() * 0.25 * 255
    assert 0 <= difference <= 2.01
    assert fast.fingerprint.fields["inputs"]["backend"] == "torchvision-uint8"


def test_a_tag_has_no_revision() -> None:
    spec = parse_encoder("open_clip:ViT-B-32/openai@main", "image")
    with pytest.raises(EncoderError, match=r"leave @ off, or take open_clip:hf-hub:"):
        load_image_encoder(spec, "cpu")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ViT-B-17/openai", "no pretrained model 'ViT-B-17'; did you mean ViT-B-16"),
        ("ViT-B-16", "give NAME/TAG; the tags of ViT-B-16 are"),
        ("ViT-B-16/opnai", "give NAME/TAG"),
    ],
)
def test_a_model_that_is_not_known_is_refused(name: str, said: str) -> None:
    with pytest.raises(EncoderError, match=said):
        load_image_encoder(parse_encoder(f"open_clip:{name}", "image"), "cpu")


@pytest.mark.parametrize("broken", ["no weights", "other weights", "no folder", "no config"])
def test_a_folder_that_is_not_whole_is_refused(
    folders: dict[str, Path],
    tmp_path: Path,
    broken: str,
) -> None:
    import shutil

    folder = Path(shutil.copytree(folders["clip"], tmp_path / "model"))
    match broken:
        case "no weights":
            (folder / "open_clip_model.safetensors").unlink()
        case "other weights":
            shutil.copy(folders["siglip"] / "open_clip_model.safetensors", folder)
        case "no config":
            (folder / "open_clip_config.json").unlink()
        case _:
            folder = tmp_path / "elsewhere"
    with pytest.raises(
        EncoderError,
        match=r"cannot be opened|there is no folder|has no open_clip_config.json",
    ):
        load_text_encoder(parse_encoder(f"open_clip:{folder}", "text"), "cpu")
