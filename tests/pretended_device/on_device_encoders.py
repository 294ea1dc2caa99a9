"""Encoders on the pretended device: extraction, fit-encoder, a whole fit-head, and plans."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pretended_device import register
from pretended_device.register import (
    DEVICE,
    Counts,
    largest_distance,
    limit_memory,
    relative_distance,
)
from recipes import SMALL
from tiny import extract_tiny, make_shapes

from apecache.device import resolve_device, seeded_generators
from apecache.encoders.encoder import encode_images
from apecache.encoders.load import load_image_encoder
from apecache.encoders.spec import parse_encoder
from apecache.evaluate.embeddings import embed_store
from apecache.extraction.encode import encode_or_halve
from apecache.metrics.retrieval import retrieval_report
from apecache.plan import step_timer
from apecache.plan.counting import PlanSpec
from apecache.recipes.recipe import load_recipe
from apecache.runs.encoders import WEIGHTS, load_encoders, read_tensors
from apecache.runs.folder import read_history
from apecache.runs.heads import load_heads
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.fit_encoder import fit_encoder
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec
from apecache.train.live import CachedInputs

TOLERANCE = 1e-5
NAME = register.NAME


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("shapes") / "shapes", copies=2)


@pytest.fixture(scope="module")
def extracted(
    table: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> Callable[[str], FeatureStore]:
    """Extract once on each device."""
    folder = tmp_path_factory.mktemp("stores")

    def extract(device: str) -> FeatureStore:
        store = folder / device
        if not store.exists():
            extract_tiny(
                table,
                store=store,
                image=tiny_image_encoder,
                text=tiny_text_encoder,
                device=device,
                # Without it the fastest precision of the device is measured, whichever that is.
                precision="float32",
            )
        return FeatureStore.open(store)

    return extract


@pytest.fixture
def no_limit() -> Any:
    yield
    limit_memory(None)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_features_are_those_of_the_cpu(extracted: Any, modality: Any) -> None:
    there = extracted(NAME).array(modality).load()
    here = extracted("cpu").array(modality).load()
    distance = np.linalg.norm(there.astype(np.float64) - here) / np.linalg.norm(here)
    # Stored as float16, whose rounding may differ by a last digit in some numbers.
    assert distance < 1e-3


def test_features_are_those_of_the_cpu_before_they_are_rounded(tiny_image_encoder: Path) -> None:
    spec = parse_encoder(f"timm:{tiny_image_encoder}", "image")
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    there = load_image_encoder(spec, NAME).encode(pixels)
    here = load_image_encoder(spec, "cpu").encode(pixels)
    assert largest_distance([there], [here]) < TOLERANCE


@pytest.mark.parametrize("share", [0.95, 0.65])
def test_a_batch_that_does_not_fit_is_encoded_in_two_halves(
    tiny_image_encoder: Path,
    share: float,
    no_limit: None,
) -> None:
    spec = parse_encoder(f"timm:{tiny_image_encoder}", "image")
    encoder = load_image_encoder(spec, NAME)
    pixels = torch.zeros(8, *encoder.input_shape)
    register.module.reset_peak_memory_stats()
    before = register.module.memory_allocated()
    encode_images([encoder], pixels)
    needed_bytes = register.module.max_memory_allocated() - before
    sizes: list[int] = []

    def encode(batch: torch.Tensor) -> list[torch.Tensor]:
        sizes.append(len(batch))
        return encode_images([encoder], batch)

    limit_memory(int(share * needed_bytes))
    encode_or_halve(encode, pixels, encoder.device)
    assert sizes == [8, 4, 4]


def fitted(store: FeatureStore, out: Path, device: str) -> Path:
    recipe = load_recipe(SMALL, ["schedule.batch_size=8", "schedule.epochs=2"])
    spec = FitSpec(device=device, splits=SplitSpec(dev="val"))
    return fit_head(store, recipe, out, spec).run


def head_weights(run: Path) -> list[torch.Tensor]:
    heads = load_heads(run)
    return [*heads.image.head.state_dict().values(), *heads.text.head.state_dict().values()]


def test_fit_head_gives_the_heads_of_the_cpu(extracted: Any, tmp_path: Path) -> None:
    store = extracted("cpu")
    there = fitted(store, tmp_path / "there", NAME)
    here = fitted(store, tmp_path / "here", "cpu")
    assert largest_distance(head_weights(there), head_weights(here)) < TOLERANCE


@pytest.mark.parametrize("n_bytes", [10_000, 60_000, 150_000], ids=["none", "few", "more"])
def test_fit_head_streams_what_does_not_fit(
    extracted: Any,
    tmp_path: Path,
    n_bytes: int,
    no_limit: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever is said to be free, the same heads come out."""
    monkeypatch.setattr(register.module, "mem_get_info", lambda device: (n_bytes, n_bytes))
    store = extracted("cpu")
    there = fitted(store, tmp_path / "there", NAME)
    here = fitted(store, tmp_path / "here", "cpu")
    assert largest_distance(head_weights(there), head_weights(here)) < TOLERANCE


def test_an_evaluation_on_the_device_is_that_of_the_cpu(extracted: Any, tmp_path: Path) -> None:
    store = extracted("cpu")
    run = fitted(store, tmp_path / "run", "cpu")
    reports = []
    for device in (NAME, "cpu"):
        embedded = embed_store(load_heads(run, device), store, "val")
        report = retrieval_report(
            embedded.image,
            embedded.text,
            embedded.image_of_text,
            relevance=embedded.relevance,
        )
        reports.append(report)
    assert reports[0] == reports[1]


@pytest.mark.parametrize("slice_size", [None, 3])
@pytest.mark.parametrize("name", ["lit", "lilt-f", "clip"])
def test_fit_encoder_gives_the_weights_of_the_cpu(
    extracted: Any,
    table: Path,
    tmp_path: Path,
    name: str,
    slice_size: int | None,
) -> None:
    # SGD: Adam divides by the root of second moments, and where a gradient is rounding alone, as
    # that of a key's bias, it turns rounding into steps.
    settings = ["schedule.epochs=2", "schedule.batch_size=8", "optimizer.kind=sgd"]
    recipe = load_recipe(name, [*settings, "augmentation={}"])
    tensors = []
    losses = []
    for device in (NAME, "cpu"):
        spec = FitEncoderSpec(splits=SplitSpec(dev="val"), device=device, slice_size=slice_size)
        out = tmp_path / device
        fit_encoder(
            extracted("cpu"),
            recipe=recipe,
            out=out,
            spec=spec,
            open_image=lambda key: Image.open(table.parent / key).convert("RGB"),
        )
        weights, _ = read_tensors(out / WEIGHTS)
        # All weights as one vector: some are nothing but rounding.
        tensors.append(torch.cat([weights[key].flatten() for key in sorted(weights)]))
        losses.append([line["loss"] for line in list(read_history(out))[1:]])
    assert relative_distance(*tensors) < TOLERANCE
    # The loss of the second epoch depends on what the first has changed.
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
    assert losses[0][1] != pytest.approx(losses[0][0], rel=100 * TOLERANCE)
    load_encoders(tmp_path / NAME, device=NAME)


@pytest.mark.parametrize(
    ("name", "cuts"),
    [("projection", ("pooled", "pooled")), ("lit", ("pooled", None)), ("clip", (None, None))],
)
def test_a_plan_times_steps_on_a_device_that_is_named_without_an_index(
    name: str,
    cuts: Any,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_timer, "resolve_device", lambda _: resolve_device(NAME))
    timer = step_timer.StepTimer(
        recipe=load_recipe(name, ["schedule.batch_size=8", "augmentation={}"]),
        image=parse_encoder(f"timm:{tiny_image_encoder}", "image"),
        text=parse_encoder(f"hf:{tiny_text_encoder}", "text"),
        spec=PlanSpec(rows=40, captions=2, tokens=12),
    )
    assert timer.device == DEVICE
    assert timer.step(cuts) > 0


def test_the_clock_is_read_after_the_device_is_done(
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_timer, "resolve_device", lambda _: resolve_device(NAME))
    readings: list[int] = []

    def clock() -> float:
        readings.append(register.extension.counts().get("wait: synchronize", 0))
        return float(len(readings))

    timer = step_timer.StepTimer(
        recipe=load_recipe("projection", ["schedule.batch_size=8"]),
        image=parse_encoder(f"timm:{tiny_image_encoder}", "image"),
        text=parse_encoder(f"hf:{tiny_text_encoder}", "text"),
        spec=PlanSpec(rows=40, captions=2, tokens=12),
        clock=clock,
    )
    with Counts():
        timer.step(("pooled", "pooled"))
    begins = readings[::2]
    ends = readings[1::2]
    assert all(end == begin + 1 for begin, end in zip(begins, ends, strict=True))


def test_dropout_in_slices_is_that_of_the_whole_batch() -> None:
    """Both passes over a slice draw from the device's generator by one seed."""
    draw = partial(torch.rand, 3, device=DEVICE)
    with seeded_generators(3, DEVICE):
        first = draw().cpu()
    assert torch.rand(1).device.type == "cpu"
    with seeded_generators(3, DEVICE):
        assert torch.equal(draw().cpu(), first)


@pytest.mark.parametrize("n_bytes", [100, 2**40], ids=["streamed", "resident"])
def test_fit_encoder_streams_cached_features_that_do_not_fit(
    extracted: Any,
    table: Path,
    tmp_path: Path,
    n_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = ["schedule.epochs=2", "schedule.batch_size=8", "optimizer.kind=sgd"]
    recipe = load_recipe("lit", [*settings, "augmentation={}"])
    monkeypatch.setattr(register.module, "mem_get_info", lambda device: (n_bytes, n_bytes))
    held: list[str] = []
    real_take = CachedInputs.take

    def take(inputs: CachedInputs, rows: Any) -> Any:
        held.append(inputs.features.device.type)
        return real_take(inputs, rows)

    monkeypatch.setattr(CachedInputs, "take", take)
    tensors = []
    for device in (NAME, "cpu"):
        spec = FitEncoderSpec(splits=SplitSpec(dev="val"), device=device)
        fit_encoder(extracted("cpu"), recipe=recipe, out=tmp_path / device, spec=spec)
        weights, _ = read_tensors(tmp_path / device / WEIGHTS)
        tensors.append(torch.cat([weights[key].flatten() for key in sorted(weights)]))
    assert held[0] == ("cpu" if n_bytes == 100 else DEVICE.type)
    assert relative_distance(*tensors) < TOLERANCE
