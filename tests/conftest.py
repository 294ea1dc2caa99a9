"""Real encoders, small: random weights in the libraries' own file formats, and the packaged pretrained ones."""

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never reach for a hub

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 220, 40)}
SHAPES = ("circle", "square", "triangle")
WORDS = ("a", "the", "of", "photo", "drawing", "shape", "##s", "in", "on", "white", *COLOURS, *SHAPES)


@pytest.fixture(scope="session")
def tiny_image_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm folder: test_vit (CLS token and patches) with random weights, 32 x 32 pixels."""
    import timm
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("encoders") / "tiny-vit"
    folder.mkdir()
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, img_size=32, num_classes=3)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    config = {
        "input_size": [3, 32, 32],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }
    config |= {"num_classes": 3, "first_conv": "patch_embed.proj", "classifier": "head", "fixed_input_size": True}
    description = {
        "architecture": "test_vit",
        "num_classes": 3,
        "model_args": {"img_size": 32},
        "pretrained_cfg": config,
    }
    (folder / "config.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="session")
def tiny_text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder: a two-layer BERT with random weights and a WordPiece tokenizer, at most 16 tokens."""
    return make_text_encoder(tmp_path_factory.mktemp("encoders") / "tiny-bert", seed=0)


@pytest.fixture(scope="session")
def other_text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture and tokenizer with other weights."""
    return make_text_encoder(tmp_path_factory.mktemp("encoders") / "other-bert", seed=1)


def make_text_encoder(folder: Path, seed: int) -> Path:
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **names).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, **sizes)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def packaged_encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """efficientnet-lite0 and minilm-l6, pretrained; skips without the extra `demo`."""
    from apecache.encoders.packaged import write_packaged_encoders
    from apecache.errors import MissingExtraError

    try:
        return write_packaged_encoders(tmp_path_factory.mktemp("packaged"))
    except MissingExtraError as error:
        pytest.skip(str(error))


def draw_shape(colour: str, shape: str, side: int = 48):  # type: ignore[no-untyped-def]
    """An RGB picture of one shape on white."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    box = (side // 8, side // 8, side - side // 8, side - side // 8)
    match shape:
        case "circle":
            pen.ellipse(box, fill=COLOURS[colour])
        case "square":
            pen.rectangle(box, fill=COLOURS[colour])
        case _:
            pen.polygon([(box[0], box[3]), (box[2], box[3]), (side // 2, box[1])], fill=COLOURS[colour])
    return image


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """A table of 12 images and 24 captions in tmp_path/shapes/pairs.tsv, splits train (8), val (4), labels = shape."""
    return make_shapes(tmp_path / "shapes")


@pytest.fixture(scope="session")
def shapes_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same table, made once; for tests that only read it."""
    return make_shapes(tmp_path_factory.mktemp("shapes") / "shapes")


def make_shapes(folder: Path, copies: int = 1) -> Path:
    """`copies` sizes of each of the 12 shapes; returns the path of pairs.tsv."""
    (folder / "images").mkdir(parents=True)
    lines = ["image\tcaption\tsplit\tlabel\tlang"]
    for copy in range(copies):
        for number, (colour, shape) in enumerate((c, s) for c in COLOURS for s in SHAPES):
            key = f"images/{colour}-{shape}-{copy}.png"
            draw_shape(colour, shape, 48 + 2 * copy).save(folder / key)
            split = "val" if number % 3 == 2 else "train"
            for caption in (f"a {colour} {shape}", f"the {shape} in {colour} on white"):
                lines.append(f"{key}\t{caption}\t{split}\t{shape}\ten")
    table = folder / "pairs.tsv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


@pytest.fixture(scope="session")
def tiny_store(
    tmp_path_factory: pytest.TempPathFactory, tiny_image_encoder: Path, tiny_text_encoder: Path, shapes_once: Path
) -> Path:
    """A finished store of the shapes under the tiny encoders, several shards each; for tests that only read it."""
    store = tmp_path_factory.mktemp("stores") / "store"
    extract_tiny(shapes_once, store, tiny_image_encoder, tiny_text_encoder)
    return store


def extract_tiny(table: Path, store: Path, image: Path, text: Path, **options: object):  # type: ignore[no-untyped-def]
    """Extract with batches of 4 and shards of 5 rows."""
    from apecache.data.tables import read_pairs
    from apecache.encoders.spec import parse_encoder
    from apecache.extraction import ExtractSpec, extract

    settings: dict[str, object] = {"image_batch": 4, "text_batch": 4, "shard_rows": 5, "device": "cpu", **options}
    spec = ExtractSpec(parse_encoder(f"timm:{image}", "image"), parse_encoder(f"hf:{text}", "text"), **settings)  # type: ignore[arg-type]
    return extract(read_pairs(table), table.parent, store, spec)
