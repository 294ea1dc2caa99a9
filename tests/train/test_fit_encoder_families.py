"""The encoder trainer on every family of towers: a few steps train what the rules name, and
nothing else."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import (
    DECODER,
    FAMILIES,
    VISION,
    build_text,
    clip,
    deberta,
    distilbert,
    modernbert,
    mpnet,
    siglip,
)
from model_tokenizers import N_TOKENS
from PIL import Image
from tiny import extract_tiny, make_shapes

from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.errors import EncoderError, RecipeError
from apecache.models.dual_encoder import EncoderModel
from apecache.recipes.recipe import load_recipe
from apecache.store.reader import FeatureStore
from apecache.train import encoder_setup
from apecache.train.batches import SplitSpec
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.fit_encoder import FitEncoderReport, fit_encoder

OpenImage = Callable[[str], Image.Image]
WIDTH, INNER, N_BLOCKS, RANK = 32, 48, 2, 2
"""The sizes of the models of the conformance table."""
PLAIN = 4 * (WIDTH + WIDTH) + 2 * (WIDTH + INNER)
LOW_RANK = {
    "dinov3": PLAIN,
    "siglip's image tower alone": PLAIN,
    "clip, image": PLAIN,
    "mpnet": PLAIN,
    "distilbert": PLAIN,
    # Queries, keys and values are one layer, and so are the gate and what it gates.
    "modernbert": (WIDTH + 3 * WIDTH) + 2 * WIDTH + (WIDTH + 2 * INNER) + (INNER + WIDTH),
    # Four heads of queries share the keys and values of two.
    "qwen3": 2 * (WIDTH + WIDTH) + 2 * (WIDTH + WIDTH // 2) + 3 * (WIDTH + INNER),
    "deberta-v3": PLAIN,
    "clip": PLAIN,
    "siglip": PLAIN,
    # One layer for queries, keys and values, and timm's feed-forward is four times as wide.
    "timm: siglip": (WIDTH + 3 * WIDTH) + 2 * WIDTH + 2 * (WIDTH + 4 * WIDTH),
    "timm: dinov3": (WIDTH + 3 * WIDTH) + 2 * WIDTH + 2 * (WIDTH + 4 * WIDTH),
    "timm: pe": (WIDTH + 3 * WIDTH) + 2 * WIDTH + 2 * (WIDTH + 4 * WIDTH),
    # Its feed-forward is 8 / 3 times as wide, with a gate in the same layer. Its attention, as
    # open_clip's, calls the weights past their layer.
    "timm: eva02": (WIDTH + 2 * (WIDTH * 8 // 3)) + (WIDTH * 8 // 3 + WIDTH),
    "open_clip: clip, image": 2 * (WIDTH + 4 * WIDTH),
    "open_clip: clip, text": 2 * (WIDTH + 4 * WIDTH),
    "open_clip: siglip, text": 2 * (WIDTH + 4 * WIDTH),
    "open_clip: xlm-roberta, text": PLAIN,
}
"""Numbers that LoRA of rank 1 adds to one block, in attention and feed-forward."""
MLP_ONLY = (
    "timm: eva02",
    "open_clip: clip, image",
    "open_clip: clip, text",
    "open_clip: siglip, text",
)
TEXTS: dict[str, Any] = {
    "mpnet": build_text(mpnet, "roberta", 32),
    "distilbert": build_text(distilbert, "bert", 32),
    "modernbert": build_text(modernbert, "bert", 32),
    "qwen3": build_text(
        lambda: hf.Qwen3Model(hf.Qwen3Config(**DECODER, max_position_embeddings=64)),
        "qwen",
        32,
    ),
    "deberta-v3": build_text(deberta, "bert", 32),
    "clip": build_text(clip(257), "clip", 77),
    "siglip": build_text(siglip, "t5", 64),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The same bits whoever else uses the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> tuple[FeatureStore, OpenImage]:
    folder = tmp_path_factory.mktemp("families-data")
    table = make_shapes(folder / "shapes")
    extract_tiny(table, store=folder / "store", image=tiny_image_encoder, text=tiny_text_encoder)
    store = FeatureStore.open(folder / "store")
    return store, lambda key: Image.open(table.parent / key).convert("RGB")


@pytest.fixture(scope="module")
def encoder_spec(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], EncoderSpec]:
    root = tmp_path_factory.mktemp("families-models")

    def spec(name: str) -> EncoderSpec:
        folder = root / "".join(letter if letter.isalnum() else "-" for letter in name)
        if name in TEXTS:
            build, library, modality = TEXTS[name], "hf", "text"
        else:
            family = FAMILIES[name]
            build, library, modality = family.build, family.library, family.modality
            if family.needs is not None:
                pytest.importorskip(family.needs)
        if not folder.exists():
            folder.mkdir()
            build(folder)
        return parse_encoder(f"{library}:{folder}", modality)  # type: ignore[arg-type]

    return spec


class Fitted:
    """A fit with the parameters before it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model: EncoderModel | None = None
        self.before: dict[str, torch.Tensor] = {}
        build = encoder_setup.build_model

        def watched(*arguments: Any, **keywords: Any) -> EncoderModel:
            self.model = build(*arguments, **keywords)
            for name, parameter in self.model.named_parameters():
                self.before[name] = parameter.detach().clone()
            return self.model

        monkeypatch.setattr(encoder_setup, "build_model", watched)

    def run(
        self,
        data: tuple[FeatureStore, OpenImage],
        spec: EncoderSpec,
        out: Path,
        *settings: str,
    ) -> FitEncoderReport:
        store, open_image = data
        short = [
            "schedule.steps=10",
            "schedule.batch_size=4",
            "schedule.warmup=0",
            "optimizer.lr=1e-2",
            # Not all of them have the CLS token that the paper takes.
            "towers.image_pooling=default",
            "towers.text_pooling=default",
        ]
        recipe = load_recipe("freeze/Vff-Tff", [*short, *settings])
        sides: dict[str, Any] = {spec.modality: spec}
        return fit_encoder(
            store,
            recipe=recipe,
            out=out,
            spec=FitEncoderSpec(splits=SplitSpec(dev="val"), device="cpu", **sides),
            open_image=open_image,
            progress=lambda _: None,
        )

    def changed(self, prefix: str) -> set[str]:
        assert self.model is not None
        return {
            name.removeprefix(prefix)
            for name, parameter in self.model.named_parameters()
            if name.startswith(prefix) and not torch.equal(parameter, self.before[name])
        }

    def trained(self, prefix: str) -> int:
        assert self.model is not None
        return sum(
            parameter.numel()
            for name, parameter in self.model.named_parameters()
            if name.startswith(prefix) and parameter.requires_grad
        )


@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank_updates_train_alone(
    name: str,
    data: Any,
    encoder_spec: Callable[[str], EncoderSpec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = encoder_spec(name)
    side = spec.modality
    fitted = Fitted(monkeypatch)
    targets = '["mlp"]' if name in MLP_ONLY else '["attention", "mlp"]'
    adapter = f'{{kind = "lora", rank = {RANK}, targets = {targets}}}'
    fitted.run(
        data,
        spec,
        tmp_path / "run",
        'towers.rules=[{part = "adapters"}]',
        f"towers.{side}_adapter={adapter}",
    )
    assert fitted.trained(f"{side}.tower.") == N_BLOCKS * RANK * LOW_RANK[name]
    assert fitted.changed(f"{side}.tower.module.") == set()
    changed = fitted.changed(f"{side}.tower.adapters.lora.")
    assert {key.partition(".")[0] for key in changed} == {"0", "1"}


@pytest.mark.parametrize("name", LOW_RANK)
def test_layerwise_adapters_train_alone(
    name: str,
    data: Any,
    encoder_spec: Callable[[str], EncoderSpec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = encoder_spec(name)
    side = spec.modality
    fitted = Fitted(monkeypatch)
    fitted.run(
        data,
        spec,
        tmp_path / "run",
        'towers.rules=[{part = "adapters"}]',
        f'towers.{side}_adapter={{kind = "layerwise", reduction = 4}}',
    )
    narrow = WIDTH // 4
    one = WIDTH * narrow + narrow + narrow * WIDTH + WIDTH
    assert fitted.trained(f"{side}.tower.") == N_BLOCKS * 2 * one
    assert fitted.changed(f"{side}.tower.module.") == set()


def test_low_rank_updates_that_no_hook_reaches_are_refused_by_name(
    data: Any,
    encoder_spec: Callable[[str], EncoderSpec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted = Fitted(monkeypatch)
    for name in ("open_clip: clip, image", "timm: beit"):
        spec = encoder_spec(name)
        with pytest.raises(RecipeError, match=r"past their layer.*use targets = \['mlp'\]"):
            fitted.run(
                data,
                spec,
                tmp_path / "run",
                'towers.rules=[{part = "adapters"}]',
                'towers.image_adapter={kind = "lora"}',
            )


def test_recipes_that_take_a_class_token_name_the_option_for_towers_without(
    data: Any,
    encoder_spec: Callable[[str], EncoderSpec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted = Fitted(monkeypatch)
    for name in ("siglip's image tower alone", "qwen3", "clip", "open_clip: clip, text"):
        spec = encoder_spec(name)
        option = f"towers.{spec.modality}_pooling"
        with pytest.raises(EncoderError, match=f"--set {option}=default"):
            fitted.run(
                data,
                spec,
                tmp_path / "run",
                f'towers.rules=[{{part = "{spec.modality}.blocks"}}]',
                f"{option}=cls",
            )


def test_the_last_token_is_a_pooling_of_recipes(
    data: Any,
    encoder_spec: Callable[[str], EncoderSpec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted = Fitted(monkeypatch)
    fitted.run(
        data,
        encoder_spec("mpnet"),
        tmp_path / "run",
        'towers.rules=[{part = "text.blocks[-1]"}]',
        "towers.text_pooling=last",
    )
    assert fitted.model is not None
    assert fitted.model.text.tower is not None
    assert fitted.model.text.tower.pooling == "last"


@pytest.mark.parametrize("name", LOW_RANK)
def test_the_last_block_and_the_norms_train_by_the_same_names(
    name: str,
    data: Any,
    encoder_spec: Callable[[str], EncoderSpec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = encoder_spec(name)
    side = spec.modality
    fitted = Fitted(monkeypatch)
    fitted.run(
        data,
        spec,
        tmp_path / "run",
        f'towers.rules=[{{part = "{side}.blocks[-1]"}}, {{part = "{side}.norms"}}]',
    )
    changed = fitted.changed(f"{side}.tower.module.")
    assert changed
    assert fitted.model is not None
    tower = getattr(fitted.model, side).tower
    places = {part.name: part for part in tower.parts()}
    assert changed <= places.keys()
    assert all(places[key].norm or places[key].depth == 1 for key in changed)
    assert any(places[key].depth == 1 and not places[key].norm for key in changed)
    assert any(places[key].norm and places[key].depth == 0 for key in changed)


def test_what_a_tower_lacks_is_refused_by_name(
    data: Any,
    encoder_spec: Callable[[str], EncoderSpec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted = Fitted(monkeypatch)
    for name, rule, message in (
        ("siglip's image tower alone", "image.cls", "rule 'image.cls' fits nothing"),
        ("qwen3", "text.biases", "rule 'text.biases' fits nothing"),
        ("qwen3", "text.cls", "rule 'text.cls' fits nothing"),
    ):
        with pytest.raises(RecipeError, match=message):
            fitted.run(
                data,
                encoder_spec(name),
                tmp_path / "run",
                f'towers.rules=[{{part = "{rule}"}}, {{part = "all"}}]',
            )
    with pytest.raises(EncoderError, match=r"cannot be trained.*used frozen only"):
        fitted.run(data, encoder_spec("convnext"), tmp_path / "run", 'towers.rules=[{part="all"}]')


def test_models_of_this_file_are_those_of_the_table() -> None:
    """The formulas are of these sizes."""
    assert clip(257)().config.vision_config.hidden_size == WIDTH
    assert (VISION["intermediate_size"], DECODER["vocab_size"]) == (INNER, N_TOKENS)
