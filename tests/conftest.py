"""Real encoders, small: random weights in the libraries' own file formats, and the packaged
pretrained ones."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from tiny import COLORS, SHAPES, Grown, extract_tiny, loaded_once, make_shapes

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never reach for a hub

# A loaded machine is slow, not wrong: no example has a deadline, and none is too slow to draw.
settings.register_profile(
    "any machine",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("any machine")

WORDS = (
    "a",
    "the",
    "of",
    "photo",
    "drawing",
    "shape",
    "##s",
    "in",
    "on",
    "white",
    *COLORS,
    *SHAPES,
)


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
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "model.safetensors",
    )
    config = {
        "input_size": [3, 32, 32],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }
    config |= {
        "num_classes": 3,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "fixed_input_size": True,
    }
    description = {
        "architecture": "test_vit",
        "num_classes": 3,
        "model_args": {"img_size": 32},
        "pretrained_cfg": config,
    }
    (folder / "config.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="session")
def cropping_image_encoder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_image_encoder: Path,
) -> Path:
    """The tiny image encoder with a preprocessing that keeps the middle .875 of each side."""
    folder = tmp_path_factory.mktemp("encoders") / "cropping-vit"
    shutil.copytree(tiny_image_encoder, folder)
    description = json.loads((folder / "config.json").read_text())
    description["pretrained_cfg"]["crop_pct"] = 0.875
    (folder / "config.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="session")
def tiny_text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder: a two-layer BERT with random weights and a WordPiece tokenizer, at
    most 16 tokens."""
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
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=16,
        **names,
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
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


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """A table of 12 images and 24 captions in tmp_path/shapes/pairs.tsv, splits train (8), val (4),
    labels = shape."""
    return make_shapes(tmp_path / "shapes")


@pytest.fixture(scope="session")
def shapes_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same table, made once; for tests that only read it."""
    return make_shapes(tmp_path_factory.mktemp("shapes") / "shapes")


@pytest.fixture(scope="session")
def tiny_store(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    shapes_once: Path,
) -> Path:
    """A finished store of the shapes under the tiny encoders, several shards each; for tests that
    only read it."""
    store = tmp_path_factory.mktemp("stores") / "store"
    extract_tiny(shapes_once, store=store, image=tiny_image_encoder, text=tiny_text_encoder)
    return store


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Path:
    """A finished run on the tiny store: trained on train, epochs chosen on val; for tests that only
    read it."""
    from apecache.recipes.recipe import load_recipe
    from apecache.store.reader import FeatureStore
    from apecache.train.batches import SplitSpec
    from apecache.train.fit_head import fit_head
    from apecache.train.head_data import FitSpec

    run = tmp_path_factory.mktemp("runs") / "run"
    recipe = load_recipe(
        "projection",
        ["image.dim=16", "text.dim=16", "schedule.epochs=4", "schedule.batch_size=4"],
    )
    fit_head(
        FeatureStore.open(tiny_store),
        recipe=recipe,
        out=run,
        spec=FitSpec(splits=SplitSpec(dev="val"), device="cpu"),
    )
    return run


@pytest.fixture(scope="session")
def tiny_index(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path, tiny_store: Path) -> Path:
    """An index of the tiny store under the tiny run; for tests that only read it."""
    from apecache.search.index import build_index
    from apecache.store.reader import FeatureStore

    index = tmp_path_factory.mktemp("indexes") / "index"
    build_index(tiny_run, FeatureStore.open(tiny_store), index)
    return index


@pytest.fixture(scope="session")
def write_store() -> Callable[..., Any]:
    """`write_feature_store`: a store of given features, for tests that need no encoder."""
    from benchmarks.made_up_store import write_feature_store

    return write_feature_store


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let torch use one thread: small models are slower on several, by far on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is made durable: for tests of many small stores that cut no power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extraction and repair load each encoder once per session: for tests that run them often and
    edit no encoder."""
    import apecache.extraction.run

    for modality in ("image", "text"):
        monkeypatch.setattr(
            apecache.extraction.run,
            f"load_{modality}_encoders",
            loaded_once(modality),
        )


@pytest.fixture(scope="session")
def grown_once(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> Grown:
    """A finished store that has grown: 12 rows in three shards of each array and 4 appended ones,
    one caption each.

    Row 3 has no caption, image 4 is HTML and image 13 missing. For tests that only read it.
    """
    folder = tmp_path_factory.mktemp("grown")
    table = make_shapes(folder / "shapes", copies=2)
    head, *lines = table.read_text().splitlines()
    lines = lines[::2]
    lines[3] = lines[3].replace("a green circle", " ")
    (table.parent / "images" / "green-square-0.png").write_bytes(b"<html>")
    (table.parent / "images" / "red-square-1.png").unlink()
    for count in (12, 16):
        table.write_text("\n".join([head, *lines[:count]]) + "\n")
        extract_tiny(
            table,
            store=folder / "store",
            image=tiny_image_encoder,
            text=tiny_text_encoder,
            max_bad=1.0,
        )
    return Grown(table, folder / "store")


@pytest.fixture
def grown(grown_once: Grown, tmp_path: Path) -> Grown:
    """A copy of the store, to be changed; its table is not."""
    return Grown(grown_once.table, Path(shutil.copytree(grown_once.store, tmp_path / "store")))


@pytest.fixture(scope="session")
def s3_server():  # type: ignore[no-untyped-def]
    """An S3 server on loopback; see `remote.S3Server`."""
    from remote import S3Server

    with S3Server() as server:
        yield server


@pytest.fixture
def bucket(s3_server, monkeypatch: pytest.MonkeyPatch) -> str:  # type: ignore[no-untyped-def]
    """The URL of a new bucket, which the environment has credentials for."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("APECACHE_RETRY_SECONDS", "20")
    monkeypatch.setenv("APECACHE_REQUEST_SECONDS", "5")
    return s3_server.new_bucket()


@pytest.fixture
def images_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the images were no longer where the store recorded them; `--root` still works."""
    from apecache.data import recorded
    from apecache.data.media import NoMedia

    original = recorded.recorded_media

    def forgotten(record: Any, root: Any = None, source: Any = None) -> Any:
        is_given = root is not None or source is not None
        return original(record, root=root, source=source) if is_given else NoMedia()

    monkeypatch.setattr(recorded, "recorded_media", forgotten)
