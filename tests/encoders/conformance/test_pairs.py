"""An image-text model as both encoders: a ready-made CLIP is a run like any other, with the
similarities that its own library computes, and a starting point."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from apecache_cli.app import app
from families import (
    CLIP_CONFIG,
    CROPPED,
    SIGLIP_TEXT,
    SQUASHED,
    build_open_clip,
    build_sentence_clip,
    clip,
    metaclip2,
    randomize,
    siglip,
)
from model_tokenizers import save_tokenizer
from PIL import Image
from tiny import make_shapes
from torch import Tensor
from typer.testing import CliRunner

import apecache
from apecache.encoders.calibration import read_calibration
from apecache.encoders.spec import parse_encoder
from apecache.errors import EncoderError, RecipeError
from apecache.recipes.recipe import load_recipe

TEXTS = ("a red circle", "the square in blue on white", "日本語", "x" * 100)


@dataclass(frozen=True, kw_only=True)
class Pair:
    library: str
    build: Callable[[Path], None]
    similarity: Callable[[Path, Sequence[Image.Image], Sequence[str]], Tensor]
    """(folder, pictures, texts) -> logits per image, by the library alone."""
    needs: str | None = None
    has_bias: bool = False


def build_hf(model: Any, style: str, max_length: int, processor: Any) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        randomize(model()).save_pretrained(folder)
        save_tokenizer(folder, style, max_length)
        processor().save_pretrained(folder)
        (folder / "README.md").write_text("A model.")

    return build


def hf_similarity(padding: Any) -> Callable[..., Tensor]:
    def similarity(folder: Path, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        tokens = tokenizer(list(texts), padding=padding, truncation=True, return_tensors="pt")
        processor = hf.AutoImageProcessor.from_pretrained(folder)
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
        model = hf.AutoModel.from_pretrained(folder).eval()
        if padding == "max_length":
            tokens.pop("attention_mask")
        with torch.no_grad():
            logits: Tensor = model(pixel_values=pixels, **tokens).logits_per_image
        return logits

    return similarity


def open_clip_similarity(
    folder: Path,
    images: Sequence[Image.Image],
    texts: Sequence[str],
) -> Tensor:
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(list(texts))
    with torch.no_grad():
        logits: Tensor
        pixels = torch.stack([transform(image) for image in images])
        logits, _ = model.eval().get_logits(pixels, tokens)
    return logits


def sentence_similarity(
    folder: Path,
    images: Sequence[Image.Image],
    texts: Sequence[str],
) -> Tensor:
    """By its own cosines, and the scale of the model within."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    image = model.encode(list(images), convert_to_tensor=True)
    text = model.encode(list(texts), convert_to_tensor=True)
    scale = model[0].auto_model.logit_scale.exp()
    logits: Tensor = (model.similarity(image, text) * scale).detach()
    return logits


PAIRS = {
    "hf: clip": Pair(
        library="hf",
        build=build_hf(clip(257), "clip", 77, lambda: hf.CLIPImageProcessor(**CROPPED)),
        similarity=hf_similarity(True),
    ),
    "hf: metaclip 2": Pair(
        library="hf",
        build=build_hf(metaclip2, "roberta", 77, lambda: hf.CLIPImageProcessor(**CROPPED)),
        similarity=hf_similarity(True),
    ),
    "hf: siglip": Pair(
        library="hf",
        build=build_hf(lambda: siglip(32), "t5", 64, lambda: hf.SiglipImageProcessor(**SQUASHED)),
        similarity=hf_similarity("max_length"),
        has_bias=True,
    ),
    "open_clip: clip": Pair(
        library="open_clip",
        build=build_open_clip(CLIP_CONFIG),
        similarity=open_clip_similarity,
        needs="open_clip",
    ),
    "open_clip: siglip": Pair(
        library="open_clip",
        build=build_open_clip(
            {
                **CLIP_CONFIG,
                "custom_text": True,
                "text_cfg": SIGLIP_TEXT,
                "init_logit_bias": -10,
            }
        ),
        similarity=open_clip_similarity,
        needs="open_clip",
        has_bias=True,
    ),
    "st: clip": Pair(
        library="st",
        build=build_sentence_clip,
        similarity=sentence_similarity,
        needs="sentence_transformers",
    ),
}


def command(*words: str) -> Any:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if "--json" in words else result.stdout


def build(tmp_path: Path, name: str) -> tuple[Pair, Path]:
    pair = PAIRS[name]
    if pair.needs is not None:
        pytest.importorskip(pair.needs)
    folder = tmp_path / "model"
    folder.mkdir()
    pair.build(folder)
    return pair, folder


def extract(tmp_path: Path, encoder: str, *options: str) -> Path:
    table = make_shapes(tmp_path, copies=4)
    store = tmp_path / "store"
    storage = ("--storage", "float32", "--shard-rows", "50", "--device", "cpu")
    command("extract", str(table), "--store", str(store), "--model", encoder, *storage, *options)
    return store


@pytest.mark.parametrize("name", PAIRS)
def test_a_ready_made_model_is_a_run_with_the_librarys_own_similarities(
    tmp_path: Path,
    name: str,
) -> None:
    pair, folder = build(tmp_path, name)
    store = extract(tmp_path, f"{pair.library}:{folder}")
    run = tmp_path / "run"
    fitted = command(
        *("fit-head", str(store), "--recipe", "identity", "--out", str(run)),
        *("--device", "cpu", "--json"),
    )
    assert fitted["n_trained_parameters"] == 0
    model = apecache.load(run, device="cpu")
    images = [Image.open(path) for path in sorted((tmp_path / "images").iterdir())[:3]]
    logits = model.similarity(model.encode_image(images), model.encode_text(TEXTS))
    expected = pair.similarity(folder, [image.convert("RGB") for image in images], TEXTS)
    torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-5, rtol=1e-5)
    assert (model.run.bias is not None) is pair.has_bias
    report = command("evaluate", str(run), "--store", str(store), "--split", "val", "--json")
    assert report
    index = tmp_path / "index"
    command("index", str(run), "--store", str(store), "--out", str(index))
    hits = command("search", str(index), "a red circle", "--json")
    assert hits


def test_a_ready_made_model_is_a_starting_point(tmp_path: Path) -> None:
    """Before the first step the fit gives what the run of the model as it is gives."""
    pair, folder = build(tmp_path, "hf: clip")
    store = extract(tmp_path, f"{pair.library}:{folder}")
    ready = command(
        *("fit-head", str(store), "--recipe", "identity", "--out", str(tmp_path / "run")),
        *("--device", "cpu", "--json"),
    )
    tuned = command(
        *("fit-encoder", str(store), "--recipe", "finetune", "--root", str(tmp_path)),
        *("--out", str(tmp_path / "tuned"), "--set", "schedule.steps=10", "--device", "cpu"),
        *("--set", "schedule.batch_size=4", "--json"),
    )
    assert tuned["untrained"] == ready["dev"]
    own = read_calibration(
        parse_encoder(f"hf:{folder}", "image"),
        parse_encoder(f"hf:{folder}", "text"),
    )
    loss = json.loads((tmp_path / "tuned" / "encoder.json").read_text())["recipe"]["loss"]
    assert loss["temperature"] == pytest.approx(1 / own.scale)
    assert tuned["n_trained_parameters"] > 10_000


def test_a_model_whose_sides_are_two_models_is_refused(tmp_path: Path) -> None:
    _, folder = build(tmp_path, "hf: clip")
    image = parse_encoder(f"hf:{folder}", "image")
    other = tmp_path / "other"
    PAIRS["hf: clip"].build(other)
    with pytest.raises(EncoderError, match="not both sides of one model; extract both with"):
        read_calibration(image, parse_encoder(f"hf:{other}", "text"))
    text = parse_encoder(f"hf:{folder}", "text")
    with pytest.raises(EncoderError, match="extract it without --text-cut"):
        read_calibration(image, replace(text, pooling="mean"))


def test_a_model_without_a_scale_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_hf(
        lambda: hf.CLIPVisionModelWithProjection(clip(257)().config.vision_config),
        "clip",
        77,
        lambda: hf.CLIPImageProcessor(**CROPPED),
    )(folder)
    specs = [parse_encoder(f"hf:{folder}", modality) for modality in ("image", "text")]
    with pytest.raises(EncoderError, match="has no logit_scale"):
        read_calibration(specs[0], specs[1])


def test_heads_that_change_the_models_features_are_refused() -> None:
    with pytest.raises(RecipeError, match="init pretrained takes the model's own features"):
        load_recipe("identity", ["text.kind=linear"])
