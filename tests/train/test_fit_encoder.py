"""The encoder trainer on small real encoders: what it changes and what it never does, resuming,
what it writes."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from close_reports import assert_close_reports
from PIL import Image
from tiny import extract_tiny, make_shapes
from torch import nn

from apecache.data.sources import open_pairs
from apecache.encoders.spec import parse_encoder
from apecache.encoders.tower import Tower
from apecache.errors import DataError, MismatchError, OptionError, RecipeError, RunError
from apecache.evaluate.embeddings import embed_store
from apecache.extraction.run import ExtractSpec, extract
from apecache.metrics.retrieval import retrieval_report
from apecache.models.dual_encoder import EncoderModel
from apecache.recipes.recipe import Recipe, load_recipe
from apecache.recipes.schedule import OptimizerSpec
from apecache.runs.checkpoint import CHECKPOINT, save_checkpoint
from apecache.runs.encoders import DESCRIPTION, WEIGHTS, load_encoders, read_tensors
from apecache.runs.folder import HISTORY
from apecache.runs.ledger import load_ledger, stored_bytes
from apecache.runs.load import image_embedder, text_embedder
from apecache.store.reader import FeatureStore
from apecache.train import encoder_data
from apecache.train import encoder_setup as module
from apecache.train.batches import SplitSpec
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.fit_encoder import FitEncoderReport, fit_encoder
from apecache.train.live import ImageInputs, TextInputs
from apecache.train.optim import parameter_groups

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC: dict[str, Any] = {"splits": SplitSpec(dev="val"), "device": "cpu"}
OpenImage = Callable[[str], Image.Image]


@pytest.fixture(scope="module")
def data(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> tuple[FeatureStore, OpenImage]:
    """24 images with two captions each, and their store."""
    folder = tmp_path_factory.mktemp("encoder-data")
    table = make_shapes(folder / "shapes", copies=2)
    extract_tiny(table, store=folder / "store", image=tiny_image_encoder, text=tiny_text_encoder)
    return FeatureStore.open(folder / "store"), lambda key: Image.open(table.parent / key).convert(
        "RGB"
    )


def recipe_of(name: str, *settings: str) -> Recipe:
    short = [
        "schedule.epochs=3",
        "schedule.batch_size=8",
        "schedule.warmup=0",
        "schedule.warmup_steps=0",
        "optimizer.lr=1e-3",
    ]
    if load_recipe(name).towers.text_pooling == "cls" and not load_recipe(name).towers.may_train(
        "text"
    ):
        # The stores of these tests hold mean-pooled texts.
        short.append("towers.text_pooling=default")
    return load_recipe(name, [*short, *settings])


class Watch:
    """Keeps the model that is trained, and its parameters before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = None
        self.before = {}
        build = module.build_model

        def watched(*arguments: Any, **keywords: Any) -> EncoderModel:
            model = build(*arguments, **keywords)
            self.model = model
            self.before = {name: p.detach().clone() for name, p in model.named_parameters()}
            return model

        monkeypatch.setattr(module, "build_model", watched)

    def changed(self) -> set[str]:
        assert self.model is not None
        return {
            name
            for name, p in self.model.named_parameters()
            if not torch.equal(p, self.before[name])
        }

    def trained(self) -> set[str]:
        assert self.model is not None
        return {name for name, p in self.model.named_parameters() if p.requires_grad}


def fit(
    data: Any,
    recipe: Recipe,
    out: Path,
    progress: Any = None,
    **settings: Any,
) -> FitEncoderReport:
    store, open_image = data
    return fit_encoder(
        store,
        recipe=recipe,
        out=out,
        spec=FitEncoderSpec(**SPEC | settings),
        open_image=open_image,
        progress=progress or (lambda _: None),
    )


def history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / HISTORY).read_text().splitlines()]


# --- what trains ----------------------------------------------------------------------------------


def test_lit_reads_images_from_the_cache_and_learns(
    data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("the frozen encoder was opened")

    monkeypatch.setattr(encoder_data, "load_image_encoder", forbidden)
    watch = Watch(monkeypatch)
    report = fit_encoder(
        data[0],
        recipe=recipe_of("lit", "schedule.epochs=16", "optimizer.lr=5e-3"),
        out=tmp_path / "run",
        spec=FitEncoderSpec(**SPEC),
    )
    assert report.cached == ("image",)
    losses = [line["loss"] for line in history(tmp_path / "run")]
    assert losses[0] is None
    assert losses[-1] < 0.7 * losses[1]
    assert watch.changed() == watch.trained()
    assert "text.tower.module.embeddings.word_embeddings.weight" in watch.changed()
    assert report.dev.mean_recall == max(
        line["dev"]["mean_recall"] for line in history(tmp_path / "run")[1:]
    )
    assert (report.n_train_images, report.n_dev_images) == (16, 8)


def test_equal_captions_are_positives_and_right_answers(
    data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The two sizes of a shape have the same two captions; slices see the groups of the whole
    batch."""
    keys = data[0].pairs.keys
    real = EncoderModel.terms
    joined: list[list[bool]] = []
    alike: list[list[bool]] = []

    def watched(
        self: EncoderModel,
        image: Any,
        text: Any,
        rows: Any,
        groups: Any = None,
        step: int = 0,
    ) -> Any:
        shapes = [str(keys[row]).rpartition("-")[0] for row in rows]
        alike.extend([one == other for other in shapes] for one in shapes)
        joined.extend((groups.image.unsqueeze(1) == groups.image).tolist())
        return real(self, image=image, text=text, rows=rows, groups=groups, step=step)

    monkeypatch.setattr(EncoderModel, "terms", watched)
    recipe = recipe_of("lit", "schedule.batch_size=16", "loss.captions=2", "schedule.epochs=1")
    report = fit(data, recipe, tmp_path / "run", slice_size=5)
    assert joined == alike
    assert [sum(row) for row in joined] == [2] * 16
    assert report.n_negatives == 14
    assert report.dev.chance_text_to_image[1] == pytest.approx(25)  # two of eight images


@pytest.mark.parametrize(
    ("name", "some", "never"),
    [
        ("lilt-d", "image.tower.module.norm.weight", "qkv"),
        ("lilt-i", "text.tower.adapters.layerwise.0.0.down.weight", "word_embeddings"),
        ("lilt-k", "image.tower.adapters.deep.norm1.weight", "pos_embed"),
        ("lilt-m", "image.tower.module.cls_token", "text."),
        (
            "freeze/Vcf-Tcf",
            "text.tower.module.embeddings.word_embeddings.row",
            "word_embeddings.weight",
        ),
        (
            "freeze/Vuf-Tuu",
            "image.tower.module.patch_embed.proj.weight",
            "image.tower.module.blocks",
        ),
    ],
)
def test_frozen_parameters_are_the_same_bits_after_training(
    name: str,
    some: str,
    never: str,
    data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = Watch(monkeypatch)
    report = fit(
        data,
        recipe_of(name, "optimizer.lr=1e-2", "optimizer.weight_decay=0.5"),
        tmp_path / "run",
    )
    assert some in watch.changed() <= watch.trained()
    assert not any(never in parameter for parameter in watch.changed())
    assert report.n_trained_parameters == sum(
        watch.before[parameter].numel() for parameter in watch.trained()
    )
    kept, _ = read_tensors(tmp_path / "run" / WEIGHTS)
    assert {n for n in kept if ".tower." in n} == {n for n in watch.trained() if ".tower." in n}


def test_rules_for_heads_hold_on_the_cached_side_too(
    data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = Watch(monkeypatch)
    rules = 'towers.rules=[{part = "image.head", train = false}, {part = "head", lr = 0.5}]'
    fit(data, recipe_of("lilt-l", rules), tmp_path / "run")
    assert {name for name in watch.changed() if ".head." in name} == {
        "text.head.body.weight",
        "text.head.body.bias",
    }
    assert watch.model is not None
    slow = [p for p, factor in watch.model.rates() if factor == 0.5]
    assert {id(p) for p in slow} == {id(p) for p in watch.model.text.head.parameters()}


def test_the_temperature_alone(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    report = fit(data, recipe_of("lilt-a"), tmp_path / "run")
    assert watch.changed() == {"temperature.temperature"}
    assert (report.n_trained_parameters, report.cached) == (1, ("image", "text"))
    assert report.dev == report.untrained


def test_a_frozen_text_tower_is_read_from_the_cache(data: Any, tmp_path: Path) -> None:
    report = fit(data, recipe_of("freeze/Vuf-Tff", "text.standardize=true"), tmp_path / "run")
    assert report.cached == ("text",)


def test_lora_and_checkpointing(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = [
        'towers.rules=[{part = "text.adapters"}]',
        "towers.text_adapter.kind=lora",
        "towers.text_adapter.rank=2",
    ]
    weights = []
    for checkpointing in ("false", "true"):
        watch = Watch(monkeypatch)
        recipe = recipe_of("lilt-c", *adapter, f"towers.checkpointing={checkpointing}")
        report = fit(data, recipe, tmp_path / checkpointing)
        assert report.cached == ("image",)
        assert any(".lora." in name for name in watch.changed())
        weights.append(read_tensors(tmp_path / checkpointing / WEIGHTS)[0])
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor)


def test_slices_train_like_the_whole_batch(data: Any, tmp_path: Path) -> None:
    """A first step of the same size and no dropout: the tiny text encoder has some, so it is
    switched off here."""
    still = 'towers.rules=[{part = "image.all"}]'
    recipe = recipe_of("lilt-c", still, "schedule.epochs=1", "optimizer.eps=1e-3")
    for name, size in (("whole", None), ("slices", 3)):
        fit(data, recipe, tmp_path / name, slice_size=size)
    whole, sliced = (read_tensors(tmp_path / name / WEIGHTS)[0] for name in ("whole", "slices"))
    assert any(name.startswith("image.tower.") for name in whole)
    for name, tensor in whole.items():
        torch.testing.assert_close(sliced[name], tensor, rtol=1e-3, atol=1e-5)


def test_live_images_are_distorted_in_training_only_and_the_same_when_it_goes_on(
    data: Any,
    tmp_path: Path,
) -> None:
    distort = ("augmentation.image.scale=[0.3, 1.0]", "augmentation.image.operations=2")
    recipe = recipe_of("clip", *distort, "schedule.epochs=2")
    report = fit(data, recipe, tmp_path / "whole")
    plain = fit(data, recipe_of("clip", "schedule.epochs=2"), tmp_path / "plain")
    assert report.untrained == plain.untrained
    assert history(tmp_path / "whole")[1]["loss"] != history(tmp_path / "plain")[1]["loss"]
    with stopped_after(3):
        fit(data, recipe, tmp_path / "broken", save_seconds=0)
    fit(data, recipe, tmp_path / "broken")
    whole, broken = (read_tensors(tmp_path / name / WEIGHTS)[0] for name in ("whole", "broken"))
    assert all(torch.equal(broken[name], tensor) for name, tensor in whole.items())


def test_cached_tokens_cannot_be_distorted(token_data: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="needs images, not cached tokens"):
        fit(
            token_data,
            recipe_of("lilt-c", LAST, "augmentation.image.flip=true"),
            tmp_path / "run",
            **TOKENS,
        )
    assert not (tmp_path / "run").exists()


def test_mixed_precision_keeps_parameters_in_float32(data: Any, tmp_path: Path) -> None:
    report = fit(data, recipe_of("lit"), tmp_path / "run", autocast="bfloat16")
    assert all(
        tensor.dtype == torch.float32
        for tensor in read_tensors(tmp_path / "run" / WEIGHTS)[0].values()
    )
    assert 0 < report.dev.mean_recall <= 100


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_bfloat16_on_the_cpu_trains_without_fused_attention(
    data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpointing: str,
) -> None:
    """Forward, backward, and what checkpointing runs again; float32 keeps it."""
    fused = list[bool]()

    def watched(self: Tower, *arguments: Any) -> Any:
        if torch.is_grad_enabled():
            fused.append(torch.backends.cuda.flash_sdp_enabled())
        return run(self, *arguments)

    run = Tower._call
    monkeypatch.setattr(Tower, "_call", watched)
    recipe = recipe_of("lilt-p", "schedule.epochs=1", f"towers.checkpointing={checkpointing}")
    for autocast, expected in (("bfloat16", False), ("float32", True)):
        fused.clear()
        report = fit(data, recipe, tmp_path / autocast, autocast=autocast)
        assert set(fused) == {expected}
        assert report.dev.mean_recall >= 0


def test_learning_rates_by_rule_and_decay_by_shape() -> None:
    matrix, vector, slow = (nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,), (3, 3)))
    groups = parameter_groups(
        [(matrix, 1.0), (vector, 1.0), (slow, 0.1)],
        OptimizerSpec(weight_decay=0.3),
    )
    found = {(group["factor"], group["weight_decay"]): group["params"] for group in groups}
    assert found == {(1.0, 0.3): [matrix], (1.0, 0.0): [vector], (0.1, 0.3): [slow]}


# --- tokens from the cache ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def token_data(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> tuple[FeatureStore, OpenImage]:
    """The same shapes; beside pooled features the tokens of images after 3 blocks and of texts
    after 1, in float32."""
    folder = tmp_path_factory.mktemp("token-data")
    table = make_shapes(folder / "shapes", copies=2)
    image = parse_encoder(f"timm:{tiny_image_encoder}", "image")
    text = parse_encoder(f"hf:{tiny_text_encoder}", "text")
    images = (image, replace(image, pooling="tokens", layer=3))
    texts = (text, replace(text, pooling="tokens", layer=-2))
    extract(
        open_pairs(table),
        folder / "store",
        ExtractSpec(images, texts, storage_dtype="float32", device="cpu"),
    )
    return FeatureStore.open(folder / "store"), lambda key: Image.open(table.parent / key).convert(
        "RGB"
    )


TOKENS = {"image_features": "tiny-vit-tokens-layer3", "text_features": "tiny-bert-tokens-layer-2"}
POOLED = {"image_features": "tiny-vit", "text_features": "tiny-bert"}
LAST = 'towers.rules=[{part = "image.blocks[3:]"}, {part = "text.blocks[1:]"}]'


def test_from_the_cut_it_is_as_from_the_inputs_without_running_what_lies_below(
    token_data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipe_of("lilt-c", LAST)
    whole = fit(token_data, recipe, tmp_path / "whole", **POOLED)
    watch = Watch(monkeypatch)
    monkeypatch.setattr(Tower, "embed", None)
    cut = fit_encoder(
        token_data[0],
        recipe=recipe,
        out=tmp_path / "cut",
        spec=FitEncoderSpec(**SPEC | TOKENS),
    )
    assert cut.untrained == whole.untrained
    assert cut.n_trained_parameters == whole.n_trained_parameters
    assert watch.changed() == watch.trained()
    assert json.loads((tmp_path / "cut" / DESCRIPTION).read_text())["image"]["cut"] == 3
    monkeypatch.undo()
    loaded = load_encoders(tmp_path / "cut", "cpu")
    pairs = token_data[0].pairs
    assert text_embedder(loaded.text)([str(caption) for caption in pairs.captions[:4]]).shape == (
        4,
        256,
    )


@torch.no_grad()
def test_cached_tokens_give_the_embeddings_of_a_live_run(token_data: Any) -> None:
    recipe = recipe_of("lilt-c", LAST)
    device = torch.device("cpu")
    found = []
    for names in (POOLED, TOKENS):
        spec = FitEncoderSpec(**SPEC | names)
        sources = [
            encoder_data.open_source(
                token_data[0],
                recipe=recipe,
                side=side,
                spec=spec,
                device=device,
            )
            for side in ("image", "text")
        ]
        torch.manual_seed(0)
        encoders = [source.encoder for source in sources]
        cuts = [source.cut for source in sources]
        model = module.build_model(
            recipe,
            encoders=encoders,
            dims=[source.dim for source in sources],
            device=device,
            cuts=cuts,
        ).eval()
        inputs = [encoder_data.open_inputs(source, *token_data, device) for source in sources]
        taken = [source.take([1, 2, 5, 8]) for source in inputs]
        found.append(
            (
                cuts,
                [side(*x) for side, x in zip((model.image, model.text), taken, strict=True)],
                taken[1][1],
            )
        )
    (whole, live, mask), (cut, cached, same_mask) = found
    assert (whole, cut) == ([None, None], [3, 1])
    assert mask is not None
    assert torch.equal(mask, same_mask)
    assert not mask.all()
    for one, other in zip(live, cached, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def cut_data(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> dict[str, tuple[FeatureStore, OpenImage]]:
    """Stores in float32 and float16 with all cuts that recipes have: pooled, after some blocks,
    after all."""
    folder = tmp_path_factory.mktemp("cut-data")
    table = make_shapes(folder / "shapes")
    image = parse_encoder(f"timm:{tiny_image_encoder}", "image")
    text = replace(parse_encoder(f"hf:{tiny_text_encoder}", "text"), pooling="cls")
    images = (image, *(replace(image, pooling="tokens", layer=layer) for layer in (3, -1)))
    texts = (text, *(replace(text, pooling="tokens", layer=layer) for layer in (-2, -1)))
    for dtype in ("float32", "float16"):
        spec = ExtractSpec(images, texts, storage_dtype=dtype, device="cpu")
        extract(open_pairs(table), folder / dtype, spec)
    opener: OpenImage = lambda key: Image.open(table.parent / key).convert("RGB")  # noqa: E731
    return {dtype: (FeatureStore.open(folder / dtype), opener) for dtype in ("float32", "float16")}


ALL_POOLED = {"image_features": "tiny-vit", "text_features": "tiny-bert-cls"}
LAST_TOKENS = {
    "image_features": "tiny-vit-tokens-layer-1",
    "text_features": "tiny-bert-cls-tokens-layer-1",
}
SOME_TOKENS = {
    "image_features": "tiny-vit-tokens-layer3",
    "text_features": "tiny-bert-tokens-layer-2",
}
WITH_CUTS = [
    ("lit", [], ALL_POOLED),
    ("lilt-l", [], ALL_POOLED),
    ("lilt-m", [], ALL_POOLED),
    ("lilt-f", [], LAST_TOKENS),
    ("lilt-c", [LAST], SOME_TOKENS),
    ("lilt-n", [], {**ALL_POOLED, "image_features": LAST_TOKENS["image_features"]}),
    ("freeze/Vff-Tuu", [], ALL_POOLED),
    ("freeze/Vuf-Tff", [], ALL_POOLED),
]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("name", "settings", "features"),
    WITH_CUTS,
    ids=[case[0] for case in WITH_CUTS],
)
def test_logits_and_gradients_from_the_cache_are_those_from_the_inputs_dropout_included(
    name: str,
    settings: list[str],
    features: dict[str, str],
    dtype: str,
    cut_data: Any,
) -> None:
    store, open_image = cut_data[dtype]
    recipe = recipe_of(name, *settings)
    device = torch.device("cpu")
    features = {
        side: value.replace("bert-cls-tokens", "bert-tokens") for side, value in features.items()
    }
    found: list[tuple[Any, dict[str, Any]]] = []
    for cache in (False, True):
        spec = FitEncoderSpec(**SPEC | features, cache=cache)
        sources = [
            encoder_data.open_source(store, recipe=recipe, side=side, spec=spec, device=device)
            for side in ("image", "text")
        ]
        assert all(cache or source.features is None for source in sources)
        torch.manual_seed(0)
        encoders = [source.encoder for source in sources]
        cuts = [source.cut for source in sources]
        model = module.build_model(
            recipe,
            encoders=encoders,
            dims=[source.dim for source in sources],
            device=device,
            cuts=cuts,
        ).train()
        inputs = [
            encoder_data.open_inputs(source, store=store, open_image=open_image, device=device)
            for source in sources
        ]
        torch.manual_seed(1)
        image, text = (
            side.outputs(*source.take(rows))
            for side, source, rows in (
                (model.image, inputs[0], [0, 1, 5]),
                (model.text, inputs[1], [0, 3, 10]),
            )
        )
        model.terms(image, text, [0, 1, 5]).total.backward()
        grads = {
            n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None
        }
        found.append(((image @ text.T).detach() * model.temperature.scale().detach(), grads))
    (live, of_inputs), (cached, of_cache) = found
    exact = dtype == "float32"
    torch.testing.assert_close(cached, live, rtol=0, atol=1e-4 if exact else 0.05)
    assert of_inputs.keys() == of_cache.keys()
    assert of_cache
    for parameter, gradient in of_inputs.items():
        size = max(gradient.abs().max().item(), 1e-3)
        torch.testing.assert_close(
            of_cache[parameter],
            gradient,
            rtol=0,
            atol=(1e-5 if exact else 2e-2) * max(size, 1),
        )


def test_training_below_the_cached_tokens_is_refused(token_data: Any, tmp_path: Path) -> None:
    for rules in (
        'towers.rules=[{part = "image.blocks[2:]"}]',
        'towers.rules=[{part = "image.cls"}]',
    ):
        with pytest.raises(
            RecipeError,
            match=r"tokens after 3 blocks, but (training begins in block 2|cls at the very bottom)",
        ):
            fit(
                token_data,
                recipe_of("lilt-c", rules),
                tmp_path / "run",
                **TOKENS | {"text_features": "tiny-bert"},
            )
    with pytest.raises(RecipeError, match="no pooled features of one view"):
        fit(token_data, recipe_of("lit"), tmp_path / "run", **TOKENS)


def test_tokens_of_other_weights_are_refused(
    token_data: Any,
    tmp_path: Path,
    other_text_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = encoder_data.load_text_encoder
    other = parse_encoder(f"hf:{other_text_encoder}", "text")
    monkeypatch.setattr(encoder_data, "load_text_encoder", lambda spec, device: load(other, device))
    recipe = recipe_of("lilt-c", 'towers.rules=[{part = "text.blocks[1:]"}]')
    with pytest.raises(MismatchError, match="were made with; extract again"):
        fit(token_data, recipe, tmp_path / "run", **TOKENS | {"image_features": "tiny-vit"})


def test_a_smaller_factor_moves_less(
    data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = Watch(monkeypatch)
    rules = 'towers.rules=[{part = "text.blocks[0]", lr = 0.01}, {part = "text.blocks[1]"}]'
    fit(
        data,
        recipe_of("lilt-c", rules, "schedule.epochs=1", "optimizer.weight_decay=0"),
        tmp_path / "run",
    )
    assert watch.model is not None
    now = dict(watch.model.named_parameters())
    step = {}
    for block in (0, 1):
        name = f"text.tower.module.encoder.layer.{block}.intermediate.dense.weight"
        step[block] = (now[name] - watch.before[name]).abs().max().item()
    assert 0 < step[0] < 0.05 * step[1]


# --- resuming and the run folder ------------------------------------------------------------------


class StoppedError(Exception):
    pass


@contextmanager
def stopped_after(n_saves: int) -> Iterator[None]:
    """Broken off right after so many checkpoints, as by a kill: nothing more is written."""
    count = [0]

    def save(*arguments: Any) -> None:
        save_checkpoint(*arguments)
        count[0] += 1
        if count[0] >= n_saves:
            raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apecache.train.session.save_checkpoint", save)
        with suppress(StoppedError):
            yield
    assert count[0] == n_saves


EVERYTHING = {
    "plain": ["lit", "schedule.epochs=4"],
    "average": ["lit", "optimizer.ema=0.8", "schedule.evaluate_every=2", "schedule.epochs=4"],
    "lion, sigmoid": [
        "lit",
        "optimizer.kind=lion",
        "loss.kind=sigmoid",
        "loss.temperature=0.1",
        "optimizer.ema=0.5",
    ],
    "sgd, captions": ["lit", "optimizer.kind=sgd", "loss.captions=2", "schedule.steps=7"],
    "accumulation, structure": [
        "lit",
        "schedule.accumulate=2",
        "schedule.batch_size=4",
        "loss.structure=1",
    ],
    "adapters, temperature itself": [
        "lilt-c",
        'towers.rules=[{part="text.adapters"}]',
        'towers.text_adapter={kind="layerwise"}',
    ],
}
"""Recipe and settings."""


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_run_that_was_broken_off_goes_on_to_the_same_bits(
    name: str,
    data: Any,
    tmp_path: Path,
) -> None:
    recipe = recipe_of(*EVERYTHING[name])
    fit(data, recipe, tmp_path / "whole", slice_size=3)
    for n_saves in (1, 2, 3):
        with stopped_after(n_saves):
            fit(data, recipe, tmp_path / "broken", slice_size=3, save_seconds=0)
        torch.rand(3)
    assert (tmp_path / "broken" / CHECKPOINT).is_file()
    assert not (tmp_path / "broken" / DESCRIPTION).exists()
    assert fit(data, recipe, tmp_path / "broken", slice_size=3).resumed_step == 5
    whole, broken = (read_tensors(tmp_path / name / WEIGHTS)[0] for name in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(broken[name], tensor) for name, tensor in whole.items())
    without_time = [
        [{**line, "seconds": 0} for line in history(tmp_path / name)]
        for name in ("whole", "broken")
    ]
    assert without_time[0] == without_time[1]
    trained = without_time[0][1:] if recipe.loss.structure else []
    assert [line for line in without_time[0] if "contrastive" in line] == trained
    assert all(0 < line["contrastive"] < line["loss"] for line in trained)
    assert {path.name for path in (tmp_path / "broken").iterdir()} == {
        *("recipe.json", "ledger.json", "README.md", HISTORY, WEIGHTS, DESCRIPTION)
    }


def test_the_average_is_what_is_evaluated_and_kept(
    data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = Watch(monkeypatch)
    still = ["optimizer.ema=0.999999", "schedule.epochs=2"]
    report = fit(data, recipe_of("lit", *still), tmp_path / "run")
    assert report.dev == report.untrained
    kept, _ = read_tensors(tmp_path / "run" / WEIGHTS)
    for name, tensor in kept.items():
        if name in watch.before:
            torch.testing.assert_close(tensor, watch.before[name], rtol=0, atol=1e-6)
    plain = fit(data, recipe_of("lit", "schedule.epochs=2"), tmp_path / "plain")
    assert plain.dev != report.dev


def test_the_ledger_says_what_it_has_cost(data: Any, tmp_path: Path) -> None:
    settings = ["schedule.accumulate=2", "schedule.batch_size=4", "schedule.epochs=2"]
    report = fit(data, recipe_of("lit", *settings), tmp_path / "run", price_per_hour=3.6)
    ledger = load_ledger(tmp_path / "run")
    assert ledger == report.ledger
    assert (ledger.n_steps, ledger.n_samples, ledger.n_negatives, ledger.nominal_batch) == (
        4,
        32,
        3,
        8,
    )
    assert ledger.flops == 4 * ledger.step_flops > 0
    assert ledger.money == pytest.approx(ledger.seconds / 1000)
    assert ledger.store_bytes == stored_bytes(data[0].array("image"))
    assert any("accumulate 2 adds none" in warning for warning in ledger.warnings)
    with pytest.raises(DataError, match="selection: the dev split is 'val'"):
        fit(data, recipe_of("lit"), tmp_path / "other", report_split="val")


def test_another_run_is_not_gone_on_with(data: Any, tmp_path: Path) -> None:
    with stopped_after(2):
        fit(data, recipe_of("lit"), tmp_path / "run", save_seconds=0)
    with pytest.raises(
        MismatchError,
        match=r"holds another fit, broken off \(seed is 1, there 0\)",
    ):
        fit(data, recipe_of("lit"), tmp_path / "run", seed=1)
    fit(data, recipe_of("lit"), tmp_path / "run", seed=1, overwrite=True)
    with pytest.raises(RunError, match="exists already"):
        fit(data, recipe_of("lit"), tmp_path / "run")
    assert (
        fit(data, recipe_of("lit", "schedule.epochs=1"), tmp_path / "run", overwrite=True).n_epochs
        == 1
    )


def test_what_is_not_ours_is_never_deleted(data: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(RunError):
            fit(data, recipe_of("lit"), tmp_path / "run", overwrite=overwrite)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "precious"


def test_a_damaged_checkpoint_is_named(data: Any, tmp_path: Path) -> None:
    with stopped_after(2):
        fit(data, recipe_of("lit"), tmp_path / "run", save_seconds=0)
    (tmp_path / "run" / CHECKPOINT).write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"checkpoint\.safetensors is damaged"):
        fit(data, recipe_of("lit"), tmp_path / "run")


@pytest.mark.parametrize("name", ["lit", "lilt-i", "freeze/Vcf-Tcf"])
def test_a_finished_run_embeds_as_it_was_evaluated(name: str, data: Any, tmp_path: Path) -> None:
    report = fit(data, recipe_of(name), tmp_path / "run")
    loaded = load_encoders(tmp_path / "run", "cpu")
    pairs = data[0].pairs
    rows = [row for row, split in enumerate(pairs.splits) if split == "val"]
    texts = [row for row, image in enumerate(pairs.image_rows) if image in rows]
    image = image_embedder(loaded.image, "cpu")([data[1](pairs.keys[row]) for row in rows])
    text = text_embedder(loaded.text, "cpu")([pairs.captions[row] for row in texts])
    owner = torch.tensor([rows.index(pairs.image_rows[row]) for row in texts])
    embedded = embed_store(loaded, store=data[0], split="val", open_image=data[1])
    served = retrieval_report(image, text, owner, relevance=embedded.relevance)
    assert_close_reports(served, report.dev)
    torch.testing.assert_close(embedded.image, image, atol=2e-3, rtol=0)
    torch.testing.assert_close(embedded.text, text, atol=2e-3, rtol=0)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(len(rows)))


def test_a_run_whose_encoder_has_changed_is_refused(
    data: Any,
    tmp_path: Path,
    other_text_encoder: Path,
) -> None:
    fit(data, recipe_of("lit", "schedule.epochs=1"), tmp_path / "run")
    path = tmp_path / "run" / DESCRIPTION
    value = json.loads(path.read_text())
    path.write_text(
        json.dumps(
            {
                **value,
                "text": {
                    **value["text"],
                    "encoder": {**value["text"]["encoder"], "name": str(other_text_encoder)},
                },
            }
        )
    )
    with pytest.raises(MismatchError, match=r"is not what .* was trained with"):
        load_encoders(tmp_path / "run", "cpu")
    path.write_text("{}")
    with pytest.raises(RunError, match="is damaged"):
        load_encoders(tmp_path / "run", "cpu")
    with pytest.raises(RunError, match="not a finished run of fit-encoder"):
        load_encoders(tmp_path / "nothing", "cpu")


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "spec", "error", "message"),
    [
        ("projection", [], {}, RecipeError, "use fit-head"),
        ("lit", ["text.standardize=true"], {}, RecipeError, "set text.standardize=false"),
        (
            "lit",
            ["text.kind=mlp", "text.norm=batch"],
            {"slice_size": 2},
            RecipeError,
            "batch norm needs the whole batch",
        ),
        ("lit", ["text.dim=7"], {}, RecipeError, "different widths"),
        ("lit", [], {"slice_size": 0}, OptionError, "slices of 0 pairs"),
        (
            "lit",
            ["towers.text_pooling=cls", 'towers.rules=[{part = "text.registers"}]'],
            {},
            RecipeError,
            "fits nothing",
        ),
        ("lit", [], {"splits": SplitSpec(dev="dev")}, RecipeError, "no split 'dev'"),
        ("lit", ["init=ridge"], {}, RecipeError, "init is ridge; fit-encoder takes random"),
        ("lit", ["augmentation.mixup=1"], {}, RecipeError, "mixup is for cached features"),
        ("shared-encoder", ["loss.structure=1"], {}, RecipeError, "compares heads"),
    ],
)
def test_what_cannot_be_trained(
    name: str,
    settings: list[str],
    spec: dict[str, Any],
    error: type[Exception],
    message: str,
    data: Any,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        fit(data, recipe_of(name, *settings), tmp_path / "run", **spec)
    assert not (tmp_path / "run").exists()


def test_a_live_image_side_needs_its_images(
    data: Any,
    tmp_path: Path,
    images_are_gone: None,
) -> None:
    from apecache.errors import RowError

    def missing(key: str) -> Image.Image:
        raise RowError("missing", f"{key}: no such file")

    with pytest.raises(OptionError, match="needs the images"):
        fit_encoder(
            data[0],
            recipe=recipe_of("clip"),
            out=tmp_path / "run",
            spec=FitEncoderSpec(**SPEC),
        )
    with pytest.raises(DataError, match=r"cannot be read.*no such file"):
        fit_encoder(
            data[0],
            recipe=recipe_of("clip"),
            out=tmp_path / "run",
            spec=FitEncoderSpec(**SPEC),
            open_image=missing,
        )


def test_a_live_side_may_have_another_encoder_than_the_store(
    data: Any,
    other_text_encoder: Path,
    tmp_path: Path,
) -> None:
    other = parse_encoder(f"hf:{other_text_encoder}", "text")
    fit(data, recipe_of("lit", "schedule.epochs=1"), tmp_path / "run", text=other)
    assert json.loads((tmp_path / "run" / DESCRIPTION).read_text())["text"]["encoder"][
        "name"
    ] == str(other_text_encoder)


@pytest.mark.parametrize("slice_size", [None, 3])
def test_images_are_read_while_the_slice_before_is_computed(
    data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    slice_size: int | None,
) -> None:
    """What a step takes has been asked for before, except for the first images of an epoch."""
    asked: list[tuple[int, ...]] = []
    taken: list[tuple[tuple[int, ...], bool]] = []
    real_take = ImageInputs.take
    real_read = ImageInputs.read_ahead

    def take(inputs: ImageInputs, rows: Any) -> Any:
        if inputs.epoch:
            taken.append((tuple(rows), bool(asked) and asked[-1] == tuple(rows)))
        return real_take(inputs, rows)

    def read_ahead(inputs: ImageInputs, rows: Any) -> None:
        if inputs.epoch:
            asked.append(tuple(rows))
        real_read(inputs, rows)

    monkeypatch.setattr(ImageInputs, "take", take)
    monkeypatch.setattr(ImageInputs, "read_ahead", read_ahead)
    recipe = recipe_of("clip", "schedule.epochs=2", "augmentation={}")
    store, open_image = data
    spec = FitEncoderSpec(**SPEC, slice_size=slice_size)
    report = fit_encoder(store, recipe=recipe, out=tmp_path, spec=spec, open_image=open_image)
    n_batches = report.n_train_images // 8
    # Slices of 3, 3 and 2 images, each twice; or the whole batch once.
    n_takes = n_batches * (6 if slice_size else 1)
    assert len(taken) == 2 * n_takes
    for epoch in range(2):
        begin = epoch * n_takes
        assert [was_asked for _, was_asked in taken[begin : begin + n_takes]] == [
            False,
            *[True] * (n_takes - 1),
        ]
    assert len(asked) == 2 * (n_takes - 1)


def test_a_slice_has_texts_of_similar_lengths(
    data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that least is padded, in training and on dev."""
    ranges: list[int] = []
    real_of = TextInputs.of
    real_take = TextInputs.take

    def of(encoder: Any, captions: Any) -> TextInputs:
        inputs = real_of(encoder, captions)
        ids = [row[: 1 + number % 5] for number, row in enumerate(inputs.ids)]
        return replace(inputs, ids=ids)

    def take(inputs: TextInputs, rows: Any) -> Any:
        lengths = [len(inputs.ids[row]) for row in rows]
        ranges.append(max(lengths) - min(lengths))
        return real_take(inputs, rows)

    monkeypatch.setattr(TextInputs, "of", staticmethod(of))
    monkeypatch.setattr(TextInputs, "take", take)
    monkeypatch.setattr("apecache.train.tower_fit.EVALUATION_BATCH", 3)
    store, open_image = data
    fit_encoder(
        store,
        recipe=recipe_of("lit", "schedule.epochs=1"),
        out=tmp_path,
        spec=FitEncoderSpec(**SPEC, slice_size=3),
        open_image=open_image,
    )
    # Three drawn lengths of 1 to 5 are 2.4 apart in the mean.
    assert sum(ranges) / len(ranges) < 1.5


def test_a_side_that_trains_takes_its_encoder_or_its_features_but_not_both(
    data: Any,
    tiny_text_encoder: Path,
    tmp_path: Path,
) -> None:
    """Features that are named would not be read, and cached tokens would save nothing."""
    text = parse_encoder(f"hf:{tiny_text_encoder}", "text")
    features = data[0].array("text").name
    with pytest.raises(OptionError, match="--text and --text-features are both given"):
        fit(data, recipe_of("lit"), tmp_path / "run", text=text, text_features=features)
