"""The clock of plans: what it runs, how it extrapolates, and that a fit then takes about as
long."""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from apecache_cli.app import app
from PIL import Image
from typer.testing import CliRunner

from apecache.data.images import decode_image
from apecache.encoders.load import load_image_encoder, load_preprocess, shape_tower
from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.errors import OptionError
from apecache.plan import step_timer
from apecache.plan.counting import PlanSpec
from apecache.plan.devices import Device
from apecache.plan.plan import Cuts, Plan, plan
from apecache.plan.step_timer import (
    RandomTexts,
    StepTimer,
    made_up_images,
    made_up_lengths,
    made_up_texts,
)
from apecache.recipes.recipe import Recipe, load_recipe
from apecache.train.fit import HeadFit
from apecache.train.live import CachedInputs, ImageInputs, TokenInputs
from apecache.train.tower_fit import EncoderFit

pytestmark = pytest.mark.usefixtures("one_thread")

UNIT = Device(name="here", flops=1e9, memory_bytes=None, source="made up")
SPEC = PlanSpec(rows=40, captions=2, tokens=12)


@pytest.fixture(scope="module")
def specs(tiny_image_encoder: Path, tiny_text_encoder: Path) -> tuple[EncoderSpec, EncoderSpec]:
    image = parse_encoder(f"timm:{tiny_image_encoder}", "image")
    text = parse_encoder(f"hf:{tiny_text_encoder}", "text")
    return replace(image, pooling="cls"), replace(text, pooling="cls")


def recipe_of(name: str, *settings: str) -> Recipe:
    return load_recipe(name, ["schedule.batch_size=8", "schedule.epochs=1", *settings])


LAST = ['towers.rules=[{part = "image.blocks[3:]"}, {part = "text.blocks[1:]"}]']


class Steady:
    """A clock whose times are told."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def once(self, cuts: Cuts) -> float:
        self.asked.append(("once", cuts))
        return 0.25

    def step(self, cuts: Cuts) -> float:
        self.asked.append(("step", cuts))
        return 3.0 if cuts == (None, None) else 2.0


def plan_of(recipe: Recipe, specs: Any, spec: PlanSpec = SPEC, clock: Any = None) -> Plan:
    return plan(recipe, *(partial(shape_tower, one) for one in specs), spec, UNIT, None, clock)


# --- the plan -------------------------------------------------------------------------------------


def test_seconds_are_what_the_clock_says_and_the_rest_is_counted(specs: Any) -> None:
    clock = Steady()
    found = plan_of(
        recipe_of("lit"),
        specs=specs,
        spec=replace(SPEC, price=3600.0, utilization=0.5),
        clock=clock,
    )
    counted = plan_of(recipe_of("lit"), specs, replace(SPEC, price=3600.0, utilization=0.5))
    assert clock.asked == [
        ("step", (None, None)),
        ("step", ("pooled", None)),
        ("once", ("pooled", None)),
    ]
    assert (found.planned.once_seconds, found.planned.step_seconds) == (2 * 40 * 0.25, 2 * 2.0)
    assert found.planned.seconds == found.planned.money == 20 + found.n_steps * 4
    assert (found.without_cache.once_seconds, found.without_cache.step_seconds) == (0.0, 6.0)
    rate = found.without_cache.step_flops / 3
    assert found.full.seconds == pytest.approx(2 * found.full.total_flops / rate)
    plain = {"once_seconds": 0, "step_seconds": 0, "seconds": 0, "money": 0}
    assert replace(found.planned, **plain) == replace(counted.planned, **plain)


def test_one_step_is_timed_where_nothing_is_cached_and_none_where_nothing_trains(
    specs: Any,
) -> None:
    clock = Steady()
    plan_of(recipe_of("clip", "augmentation={}"), specs, clock=clock)
    assert clock.asked == [("step", (None, None)), ("once", (None, None))]
    assert plan_of(load_recipe("procrustes"), specs, clock=Steady()).planned.step_seconds < 1e-3


# --- what is run ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "cuts", "kinds"),
    [
        ("lit", [], ("pooled", None), (CachedInputs, RandomTexts)),
        ("lit", [], (None, None), (ImageInputs, RandomTexts)),
        ("lilt-c", LAST, (3, 1), (TokenInputs, TokenInputs)),
        ("lilt-f", [], (4, 2), (TokenInputs, TokenInputs)),
        ("lilt-h", [], (None, None), (ImageInputs, RandomTexts)),
    ],
)
def test_the_step_is_the_fits_own(
    name: str,
    settings: list[str],
    cuts: Any,
    kinds: Any,
    specs: Any,
) -> None:
    recipe = recipe_of(name, *settings)
    image, text = specs
    clock = StepTimer(recipe=recipe, image=image, text=text, spec=SPEC)
    fit, pairs = clock._fit(cuts, 8, False)
    assert isinstance(fit, EncoderFit)
    assert tuple(map(type, fit.inputs)) == kinds
    assert (fit.seen == fit.inputs) == (recipe.augmentation.image is None)
    assert len(pairs) == 8
    planned = plan_of(recipe, specs)
    assert fit.model.n_trained == planned.n_trained
    assert clock.step(cuts) > 0


@pytest.mark.parametrize("encoder", ["timm:test_resnet", "timm:test_vit3"])
def test_a_frozen_side_is_timed_whatever_it_is(encoder: str, specs: Any) -> None:
    _, text = specs
    image = parse_encoder(encoder, "image")
    clock = StepTimer(recipe=recipe_of("lit"), image=image, text=text, spec=SPEC)
    assert clock.step(("pooled", None)) > 0
    assert clock.once(("pooled", None)) > 0


def test_heads_alone_are_timed_as_fit_head_trains_them(specs: Any) -> None:
    image, text = specs
    clock = StepTimer(
        recipe=recipe_of("projection", "loss.captions=2"),
        image=image,
        text=text,
        spec=SPEC,
    )
    fit, pairs = clock._fit(("pooled", "pooled"), 8, False)
    assert isinstance(fit, HeadFit)
    assert (pairs.image.shape, pairs.text.shape) == ((8, 64), (16, 32))
    assert 0 < clock.step(("pooled", "pooled")) < clock.step((None, None))


def test_slices_accumulation_and_a_shared_encoder_are_run(
    specs: Any,
    tiny_text_encoder: Path,
) -> None:
    image, text = specs
    plain = StepTimer(
        recipe=recipe_of("lit"),
        image=image,
        text=text,
        spec=replace(SPEC, tokens=16),
        clock=time.process_time,
    )
    image_value, text_value = specs
    sliced = StepTimer(
        recipe=recipe_of("lit"),
        image=image_value,
        text=text_value,
        spec=replace(SPEC, slice_size=2),
        clock=time.process_time,
    )
    assert sliced._fit(("pooled", None), 8, False)[0].spec.slice_size == 2  # type: ignore[attr-defined]
    image_4, text_4 = specs
    often = StepTimer(
        recipe=recipe_of("lit", "schedule.accumulate=4"),
        image=image_4,
        text=text_4,
        spec=SPEC,
        clock=time.process_time,
    )
    assert often.step(("pooled", None)) > 1.5 * plain.step(("pooled", None))
    assert plain.once(("pooled", None)) > 0
    assert plain.once((None, None)) == 0


def test_larger_batches_are_extrapolated(specs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bool]] = []

    def seconds(self: StepTimer, cuts: Cuts, n: int, is_part: bool) -> float:
        asked.append((n, is_part))
        return 0.1 + 0.01 * n

    monkeypatch.setattr(StepTimer, "_seconds", seconds)
    big = load_recipe("lit", ["schedule.batch_size=1000"])
    image, text = specs
    assert StepTimer(recipe=big, image=image, text=text, spec=PlanSpec(rows=5000)).step(
        (None, None)
    ) == pytest.approx(10.1)
    assert asked == [(16, True), (32, True), (64, True)]
    asked.clear()
    image_value, text_value = specs
    assert StepTimer(
        recipe=recipe_of("lit"),
        image=image_value,
        text=text_value,
        spec=PlanSpec(rows=5000),
    ).step((None, None)) == pytest.approx(0.18)
    assert asked == [(8, False)]


def test_a_device_that_is_full_ends_the_doubling(
    specs: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def seconds(self: StepTimer, cuts: Cuts, n: int, is_part: bool) -> float:
        if n > 16:
            raise torch.OutOfMemoryError("full")
        return 0.08

    monkeypatch.setattr(StepTimer, "_seconds", seconds)
    big = load_recipe("lit", ["schedule.batch_size=64"])
    image, text = specs
    assert StepTimer(recipe=big, image=image, text=text, spec=PlanSpec(rows=100)).step(
        (None, None)
    ) == pytest.approx(0.32)


# --- made-up inputs -------------------------------------------------------------------------------


def test_made_up_inputs_are_like_real_ones(specs: Any) -> None:
    assert made_up_lengths(4, 12).tolist() == [12, 10, 8, 6]
    ids, mask = made_up_texts(4, 12, 20)
    assert mask.sum(1).tolist() == [12, 10, 8, 6]
    assert ids.max() < 20
    assert int((ids == 0).sum()) == int((mask == 0).sum())
    for data in made_up_images():
        assert decode_image(data, "made up").size == (500, 375)
        assert 20_000 < len(data) < 200_000


def test_preprocessing_without_weights_is_that_of_the_encoder(specs: Any) -> None:
    image = Image.effect_noise((60, 40), 50).convert("RGB")
    whole = load_image_encoder(specs[0], "cpu").preprocess(image)
    assert torch.equal(load_preprocess(specs[0])(image), whole)


def test_a_folder_of_images_is_what_is_decoded(
    specs: Any,
    shapes_once: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image, text = specs
    clock = StepTimer(
        recipe=recipe_of("lit"),
        image=image,
        text=text,
        spec=SPEC,
        sample=shapes_once.parent,
    )
    assert len(clock._sampled()) == 12
    assert clock.step((None, None)) > 0
    image_value, text_value = specs
    with pytest.raises(OptionError, match="has no images"):
        StepTimer(
            recipe=recipe_of("lit"),
            image=image_value,
            text=text_value,
            spec=SPEC,
            sample=tmp_path,
        ).step((None, None))
    assert step_timer.N_SAMPLES == 16


def test_the_command_runs_here(specs: Any, shapes_once: Path) -> None:
    encoders = [
        "--image",
        f"timm:{specs[0].name}",
        "--text",
        f"hf:{specs[1].name}",
        "--rows",
        "20",
        "--tokens",
        "8",
    ]
    short = ["--set", "schedule.batch_size=4", "--sample", str(shapes_once.parent)]
    result = CliRunner().invoke(
        app,
        ["plan", "--recipe", "lit", *encoders, *short],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    refused = CliRunner().invoke(
        app,
        ["plan", "--recipe", "lit", *encoders, *short, "--device", "H100"],
    )
    assert (refused.exit_code, "leave it out" in refused.output) == (2, True)


def test_heads_on_tokens_are_timed_on_tokens(specs: Any) -> None:
    image, text = specs
    clock = StepTimer(recipe=recipe_of("token-anchors"), image=image, text=text, spec=SPEC)
    fit, pairs = clock._fit(("pooled", "pooled"), 8, False)
    assert (pairs.image.shape[0], pairs.image.ndim, pairs.text.shape[1]) == (8, 3, 12)
    assert clock.step(("pooled", "pooled")) > 0
    assert fit is not None
