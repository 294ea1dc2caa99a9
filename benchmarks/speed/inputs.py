"""What the extraction benchmark reads: photographs as JPEGs of several sizes, short captions,
encoder folders."""

import io
import json
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

SKIMAGE = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "rocket.jpg",
)
SKLEARN = ("china.jpg", "flower.jpg")
NOUNS = (
    "dog",
    "cat",
    "child",
    "woman",
    "man",
    "horse",
    "bicycle",
    "boat",
    "bird",
    "car",
    "train",
    "bridge",
)
VERBS = (
    "runs past",
    "sits beside",
    "looks at",
    "stands near",
    "jumps over",
    "waits for",
    "plays with",
)
ADJECTIVES = ("small", "large", "red", "blue", "old", "young", "brown", "white", "wet", "quiet")


def photographs() -> list[Image.Image]:
    """Those that come inside the wheels of scikit-image and scikit-learn."""
    folders = [
        (_folder("skimage") / "data", SKIMAGE),
        (_folder("sklearn") / "datasets" / "images", SKLEARN),
    ]
    found = [
        folder / name for folder, names in folders for name in names if (folder / name).is_file()
    ]
    return [Image.open(path).convert("RGB") for path in found]


def _folder(module: str) -> Path:
    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{module} is not installed: pip install -e '.[dev]'")
    return Path(next(iter(found.submodule_search_locations)))


def write_photographs(folder: Path, longer_side: int, count: int) -> list[str]:
    """`count` JPEGs whose longer side has so many pixels, each another crop of a photograph;
    returns their names."""
    folder.mkdir(parents=True)
    chance = random.Random(0)
    sources = photographs()
    names = [f"{number:05d}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(_jpeg(sources[number % len(sources)], longer_side, chance))
    return names


def _jpeg(photo: Image.Image, longer_side: int, chance: random.Random) -> bytes:
    width, height = photo.size
    share = chance.uniform(0.8, 1.0)
    left = chance.uniform(0, width * (1 - share))
    top = chance.uniform(0, height * (1 - share))
    scale = longer_side / max(width, height)
    size = (round(width * scale), round(height * scale))
    crop = photo.resize(
        size,
        Image.Resampling.BICUBIC,
        (left, top, left + share * width, top + share * height),
    )
    buffer = io.BytesIO()
    crop.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def captions(count: int) -> Iterator[str]:
    """Sentences of 5 to 20 words, of 14 tokens in the mean, as people write them under
    photographs."""
    chance = random.Random(0)
    for _ in range(count):
        parts = [_clause(chance) for _ in range(chance.choice((1, 1, 1, 2, 3)))]
        yield " while ".join(parts) + "."


def _clause(chance: random.Random) -> str:
    first, second = chance.sample(NOUNS, 2)
    adjective = chance.choice(ADJECTIVES) + " " if chance.random() < 0.5 else ""
    return f"a {adjective}{first} {chance.choice(VERBS)} the {second}"


def write_vit(folder: Path) -> Path:
    """A timm folder of ViT-S/16 with random weights: speed does not depend on them."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0)
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "model.safetensors",
    )
    config = {
        "input_size": [3, 224, 224],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
    }
    config |= {
        "crop_pct": 0.875,
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    description = {
        "architecture": "vit_small_patch16_224",
        "num_classes": 0,
        "pretrained_cfg": config,
    }
    (folder / "config.json").write_text(json.dumps(description))
    return folder
