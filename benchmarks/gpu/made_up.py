"""Inputs that a bare machine makes for itself: photographs, captions, encoders, features.

Encoders have random weights: speed does not depend on them.
"""

import json
import os
import random
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apecache.train.batches import FeaturePairs

PHOTO_SIZE = (500, 375)
N_CAPTIONS = 5
ROWS_AT_ONCE = 65_536
BEGINNINGS = [
    "ba",
    "ce",
    "di",
    "fo",
    "gu",
    "ka",
    "le",
    "mi",
    "no",
    "pu",
    "ra",
    "se",
    "ti",
    "vo",
    "wu",
    "za",
]
ENDINGS = ["ra", "se", "ti", "lo", "mu", "na", "ke", "di", "bo", "fu", "ga", "he"]
WORDS = [beginning + ending for beginning in BEGINNINGS for ending in ENDINGS]


@dataclass(frozen=True, kw_only=True)
class PhotoRange:
    """Name the photographs that one process writes."""

    folder: str
    first: int
    end: int


def write_photographs(folder: Path, count: int) -> None:
    """Write JPEGs of smooth shades with noise, which take as long to decode as photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    n_processes = os.cpu_count() or 1
    size = -(-count // (4 * n_processes))
    ranges = [
        PhotoRange(folder=str(folder), first=first, end=min(first + size, count))
        for first in range(0, count, size)
    ]
    with get_context("spawn").Pool(min(n_processes, len(ranges))) as pool:
        pool.map(_write_range, ranges)


def _write_range(photographs: PhotoRange) -> None:
    from PIL import Image

    width, height = PHOTO_SIZE
    for number in range(photographs.first, photographs.end):
        generator = np.random.default_rng(number)
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        shades = np.asarray(coarse.resize(PHOTO_SIZE, Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = shades + generator.integers(-12, 13, (height, width, 3))
        photograph = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        path = Path(photographs.folder) / f"{number:06d}.jpg"
        photograph.save(path, "JPEG", quality=90)


def write_table(path: Path, n_images: int) -> None:
    """Write a table of images below `images/`, with five captions of 6 to 16 words each."""
    chance = random.Random(0)
    lines = ["image\tcaption\tsplit"]
    for number in range(n_images):
        for _ in range(N_CAPTIONS):
            caption = " ".join(chance.choice(WORDS) for _ in range(chance.randint(6, 16)))
            lines.append(f"images/{number:06d}.jpg\t{caption}\ttrain")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_vit(folder: Path, architecture: str, size: int) -> None:
    """Write a timm folder of a vision transformer with random weights."""
    import timm
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False, img_size=size, num_classes=3)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    configuration = {
        "input_size": [3, size, size],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "num_classes": 3,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "fixed_input_size": True,
    }
    description = {
        "architecture": architecture,
        "num_classes": 3,
        "model_args": {"img_size": size},
        "pretrained_cfg": configuration,
    }
    (folder / "config.json").write_text(json.dumps(description), encoding="utf-8")


def write_bert(folder: Path, tiny: bool) -> None:
    """Write a folder of BERT-base, or of a tiny BERT, that knows the words of `write_table`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    vocabulary = {word: number for number, word in enumerate((*special.values(), *WORDS))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        model_max_length=64,
        **special,
    ).save_pretrained(folder)
    small: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
    }
    torch.manual_seed(0)
    configuration = BertConfig(max_position_embeddings=128, **(small if tiny else {}))
    BertModel(configuration, add_pooling_layer=False).save_pretrained(folder)


def feature_pairs(
    n_images: int,
    dims: tuple[int, int],
    device: torch.device,
    tokens: bool = False,
) -> FeaturePairs:
    """Make float16 features of both sides on the device, one caption for each image.

    Args:
        dims: of image and text.
        tokens: whether each row holds four tokens.
    """
    torch.manual_seed(0)
    image_dim, text_dim = dims
    return FeaturePairs(
        image=_noise(n_images, image_dim, tokens).to(device),
        text=_noise(n_images, text_dim, tokens).to(device),
        first_text=torch.arange(n_images + 1),
        device=device,
    )


def _noise(n_rows: int, dim: int, tokens: bool) -> Tensor:
    shape = (4, dim) if tokens else (dim,)
    blocks: list[Tensor] = []
    for first in range(0, n_rows, ROWS_AT_ONCE):
        blocks.append(torch.randn(min(ROWS_AT_ONCE, n_rows - first), *shape).half())
    return torch.cat(blocks)
