"""The planner: operations against closed formulas, bytes against what a pass really keeps, cuts,
costs, the command."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from apecache_cli.app import app
from apecache_cli.plan import _compare as compare
from apecache_cli.plan import _show as show_one
from apecache_cli.plan import parse_count
from small_towers import pictures, sentences, shapes_only, small_bert, small_t5, small_vit
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer import BadParameter
from typer.testing import CliRunner

from apecache.encoders.load import count_classes, shape_tower
from apecache.encoders.spec import parse_encoder
from apecache.encoders.tower import Tower, build_tower
from apecache.errors import EncoderError, OptionError, RecipeError
from apecache.models.adapters import insert_adapters
from apecache.models.dual_encoder import Teacher, build_shared
from apecache.plan.counting import PlanSpec, SidePlan, example, measure
from apecache.plan.counting_shared import TeacherSizes, count_teacher
from apecache.plan.devices import DEVICES, Device, block_flops, find_device
from apecache.plan.plan import Plan, plan
from apecache.recipes.recipe import load_recipe
from apecache.recipes.sections import AdapterSpec

BERT_FLOPS = 12 * block_flops(768, 32)
VIT_FLOPS = 12 * block_flops(768, 257) + 2 * 256 * 768 * 768
SMALL = {
    "image": 3 * block_flops(16, 17) + 2 * 16 * 48 * 16,
    "text": 3 * block_flops(16, 32, expansion=2),
}
CPU = torch.device("cpu")
UNIT = Device(name="unit", flops=1e6, memory_bytes=None, source="made up")


def on_meta(make: Any, **settings: Any) -> Tower:
    with torch.device("meta"):
        return make(**settings)  # type: ignore[no-any-return]


def make_plan(recipe: str, *settings: str, device: Device = UNIT, **options: Any) -> Plan:
    options = {"rows": 100, "captions": 5, **options}
    return plan(
        load_recipe(recipe, settings),
        image=partial(on_meta, small_vit),
        text=partial(on_meta, small_bert),
        spec=PlanSpec(**options),
        device=device,
    )


def base_plan(recipe: str, *settings: str, **options: Any) -> Plan:
    towers = (lambda: shapes_only("base")[0], lambda: shapes_only("base")[1])
    return plan(
        load_recipe(recipe, settings),
        *towers,
        PlanSpec(**{"rows": 1000, **options}),
        find_device("H100"),
    )


# --- operations -----------------------------------------------------------------------------------


def test_forward_operations_of_base_towers_are_those_of_the_formulas() -> None:
    """Of ViT-B/16 at 256 px 46.39 GFLOP (23.20 G multiplications and additions), of BERT-base at 32
    tokens 5.47."""
    found = base_plan("projection")
    assert (found.image.below_flops, found.text.below_flops) == (VIT_FLOPS, BERT_FLOPS)
    assert (found.image.live_flops, found.text.live_flops) == (0, 0)


def test_a_backward_pass_costs_twice_the_forward_pass() -> None:
    """But for the patch embedding, whose input needs no gradient."""
    found = base_plan("clip")
    assert found.text.live_flops == 3 * BERT_FLOPS
    assert found.image.live_flops == 3 * VIT_FLOPS - 2 * 256 * 768 * 768


def test_frozen_blocks_above_trained_embeddings_cost_all_but_their_own_gradients() -> None:
    found = make_plan("freeze/Vuf-Tuu").image
    matrices = 3 * 2 * 17 * 12 * 16**2
    assert found.live_flops == make_plan("clip").image.live_flops - matrices
    assert (found.cut, found.below_flops, found.cache_bytes) == (None, 0, 0)


def test_above_a_cut_only_what_lies_there_is_run() -> None:
    found = make_plan(
        "clip",
        "towers.freezing=Vff-Tff",
        'towers.rules=[{part = "image.blocks[-1:]"}]',
    ).image
    assert found.cut == 2
    assert found.below_flops == 2 * block_flops(16, 17) + 2 * 16 * 48 * 16
    assert found.live_flops == 3 * block_flops(16, 17)
    assert found.cache_bytes == 100 * 17 * 16 * 2


@pytest.mark.parametrize("recipe", ["token-anchors", "freeze-align", "sail", "structure"])
def test_heads_on_tokens_are_counted_on_the_tokens_that_are_cached(recipe: str) -> None:
    found = make_plan(recipe)
    heads = load_recipe(recipe)
    for side, spec, flops, n in (
        (found.image, heads.image, SMALL["image"], 17),
        (found.text, heads.text, SMALL["text"], 32),
    ):
        tokens = n if spec.cut == "tokens" else 0
        assert (side.cut, side.tokens, side.below_flops) == ("pooled", tokens, flops)
        assert side.cache_bytes == (100 if side.side == "image" else 500) * max(1, tokens) * 16 * 2
        assert ("tokens are computed once" in side.reason) == bool(tokens)
    assert found.path == "fit-head"


def test_checkpointing_runs_every_block_once_more() -> None:
    kept, again = (
        make_plan("clip", f"towers.checkpointing={value}") for value in ("false", "true")
    )
    assert again.text.live_flops == kept.text.live_flops + SMALL["text"]
    assert again.text.saved_bytes < 0.5 * kept.text.saved_bytes


def test_layerwise_adapters_cost_what_they_are() -> None:
    plain = make_plan("lilt-c").without_cache.step_flops
    frozen = ('towers.rules=[{part = "adapters", train = false}]', "augmentation={}")
    found = make_plan("lilt-h", *frozen).without_cache.step_flops
    adapters = 3 * 2 * 2 * 2 * 4 * 16
    # LilT's epochs go through pairs, so that a batch is not limited by the 100 images.
    assert found - plain == 128 * (17 + 32) * adapters


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small_vit, small_bert, small_t5])
def test_kept_activations_are_those_of_a_real_pass(make: Any) -> None:
    """Within the CPU's fused attention, which keeps less than the plain one that is counted."""
    tower: Tower = make()
    inputs, mask = (
        (pictures(1), None) if tower.modality == "image" else (t[:1] for t in sentences())
    )
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = tower(inputs, mask)
    assert out.requires_grad
    meta = on_meta(make)
    like = [None if x is None else torch.zeros_like(x, device="meta") for x in (inputs, mask)]
    _, _, counted = measure(lambda: meta(*like), backward=True)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert 0.99 * real <= counted <= 1.5 * real


def test_peak_memory_is_the_sum_of_its_parts() -> None:
    found = make_plan("clip")
    logits = 3 * 4 * 100**2
    trained = found.n_parameters - 1
    held = (
        20 * trained + 20
    )  # weights, gradients, two moments, the best weights; the temperature too
    per_pair = (found.full.peak_bytes - held - logits) / 100
    assert found.planned == found.without_cache == found.full
    assert per_pair > found.image.saved_bytes + found.text.saved_bytes
    sliced = make_plan("clip", slice_size=10)
    assert sliced.full.peak_bytes == held + logits + 10 * per_pair
    assert sliced.full.step_flops == found.full.step_flops + 100 * (SMALL["image"] + SMALL["text"])


def test_a_cached_tower_is_not_in_memory() -> None:
    found = make_plan("lit")
    difference = found.without_cache.peak_bytes - found.planned.peak_bytes
    assert difference == 4 * found.image.n_parameters


# --- cuts and costs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "image", "text", "path"),
    [
        ("ape", "pooled", "pooled", "fit-head"),
        ("projection", "pooled", "pooled", "fit-head"),
        ("lilt-a", "pooled", "pooled", "fit-encoder"),
        ("lilt-c", "pooled", "pooled", "fit-head"),
        ("lilt-f", 3, 3, "fit-encoder"),
        ("lilt-i", None, None, "fit-encoder"),
        ("lilt-e", None, None, "fit-encoder"),
        ("lilt-h", None, None, "fit-encoder"),
        ("lilt-pattern-a", 6, None, "fit-encoder"),
        ("lit", "pooled", None, "fit-encoder"),
        ("clip", None, None, "fit-encoder"),
        ("freeze/Vuf-Tuu", None, None, "fit-encoder"),
        ("freeze/Vcf-Tcf", None, None, "fit-encoder"),
    ],
)
def test_the_cuts_of_the_papers(recipe: str, image: Any, text: Any, path: str) -> None:
    settings = (
        ["towers.rules=[{part = 'image.norms[2:]'}, {part = 'text.norms[:2]'}]"]
        if "pattern" in recipe
        else []
    )
    image = 2 if "pattern" in recipe else image
    found = make_plan(recipe, *settings)
    assert (found.image.cut, found.text.cut, found.path) == (image, text, path)


def test_frozen_blocks_above_trained_embeddings_are_explained() -> None:
    found = make_plan("freeze/Vuf-Tuf")
    for side in (found.image, found.text):
        assert (
            "nothing can be cached: the 3 frozen blocks above still have to be run" in side.reason
        )


def test_costs_are_once_and_steps_over_the_rate() -> None:
    found = make_plan(
        "lit",
        "schedule.epochs=3",
        "schedule.batch_size=30",
        price=36.0,
        utilization=0.5,
    )
    assert (found.n_steps, found.batch_size) == (9, 30)
    for cost in (found.planned, found.without_cache, found.full):
        assert cost.total_flops == cost.once_flops + 9 * cost.step_flops
        assert cost.seconds == pytest.approx(cost.total_flops / 0.5e6)
        assert cost.money == pytest.approx(cost.seconds / 100)
    assert found.planned.once_flops == 100 * SMALL["image"]
    assert found.planned.step_flops < found.without_cache.step_flops < found.full.step_flops
    assert found.without_cache.step_flops - found.planned.step_flops == 30 * SMALL["image"]
    assert make_plan("lit").planned.money is None


def test_each_caption_is_encoded_once_and_cached() -> None:
    found = make_plan("projection")
    assert found.planned.once_flops == 100 * SMALL["image"] + 500 * SMALL["text"]
    assert (found.image.cache_bytes, found.text.cache_bytes) == (100 * 16 * 2, 500 * 16 * 2)


def test_parts_add_up() -> None:
    found = make_plan("lilt-i")
    parts = {part: (trained, count) for part, trained, count in found.image.parts}
    assert parts["cls"] == (0, 16)
    assert parts["final_norm"] == (32, 32)
    assert parts["block"] == (3 * 64, 3 * (12 * 16 * 16 + 13 * 16))
    assert parts["adapter"] == (6 * (2 * 16 * 4 + 20),) * 2
    assert found.n_trained == found.image.n_trained + found.text.n_trained + 1
    image, text = (tower.parts() for tower in (on_meta(small_vit), on_meta(small_bert)))
    heads = 2 * (16 * 256 + 256)
    adapters = 12 * (2 * 16 * 4 + 20)
    assert found.n_parameters == sum(part.count for part in image + text) + heads + adapters + 1


def test_steps_are_shown_for_epochs_of_images_and_of_pairs() -> None:
    """LilT on COCO: 15 epochs of pairs are 69,345 steps of 128."""
    coco = base_plan("lilt-c", rows=591_753, captions=1)
    assert coco.n_steps == 69_345
    five = make_plan("lilt-d", rows=1_280, captions=5)
    assert five.steps_by_epoch == {"images": 15 * 10, "pairs": 15 * 50}
    assert five.n_steps == 15 * 50
    by_images = make_plan("lilt-d", "schedule.epoch=images", rows=1_280, captions=5)
    assert by_images.n_steps == 15 * 10


def test_a_peak_beyond_the_device_names_the_largest_slice_that_fits() -> None:
    fitting = make_plan("lilt-d", rows=1_280)
    assert fitting.fitting_slice is None
    for share in (0.4, 0.7):
        memory_bytes = int(share * fitting.planned.peak_bytes)
        small_device = replace(UNIT, memory_bytes=memory_bytes)
        found = make_plan("lilt-d", device=small_device, rows=1_280).fitting_slice
        assert found is not None
        assert found > 0
        largest = make_plan("lilt-d", rows=1_280, slice_size=found)
        assert largest.planned.peak_bytes <= memory_bytes
        beyond = make_plan("lilt-d", rows=1_280, slice_size=found + 1)
        assert beyond.planned.peak_bytes > memory_bytes
    tiny_device = replace(UNIT, memory_bytes=1000)
    assert make_plan("lilt-d", device=tiny_device, rows=1_280).fitting_slice == 0


def test_the_plan_says_in_words_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    peak_bytes = make_plan("lilt-d", rows=1_280).planned.peak_bytes
    device = replace(UNIT, memory_bytes=peak_bytes // 2)
    found = make_plan("lilt-d", device=device, rows=1_280)
    show_one(found, 1_280)
    output = " ".join(capsys.readouterr().out.split())
    assert f"--slice {found.fitting_slice} fits" in output
    assert "750 if an epoch counts pairs, 150 if it counts images" in output
    compare([found, found], 1_280)
    assert "is beyond the" in capsys.readouterr().out


def test_a_recipe_that_does_not_fit_is_refused() -> None:
    with pytest.raises(RecipeError, match="the heads end in different widths"):
        make_plan("clip", "image.dim=5")
    with pytest.raises(RecipeError, match=r"blocks\[5\]' fits nothing"):
        make_plan("clip", 'towers.rules=[{part = "blocks[5]"}]')
    with pytest.raises(OptionError, match="at least 1"):
        make_plan("clip", rows=0)


# --- a shared encoder -----------------------------------------------------------------------------

SHARED = (
    "shared.image_blocks=2",
    "shared.text_blocks=1",
    "distillation.bank=50",
    "schedule.batch_size=10",
)


def test_a_shared_encoder_is_counted_as_it_is_built() -> None:
    found = make_plan("shared-encoder", *SHARED)
    built = build_shared(
        [small_vit(), small_bert()],
        recipe=load_recipe("shared-encoder", SHARED),
        device=CPU,
        teacher=Teacher(dim=16),
    )
    assert found.n_trained == found.n_parameters == built.n_trained
    assert ("temperatures", 2, 2) in found.common
    assert (found.image.cut, found.text.cut, found.path) == (None, None, "fit-encoder")
    assert "nothing can be cached" in found.image.reason
    base = base_plan("shared-encoder")
    assert (
        base.n_trained == 117_318_146 + 256 * 768 - 196 * 768
    )  # the published count, at 256 pixels


def test_a_shared_encoder_costs_its_blocks_its_losses_and_its_teacher_once() -> None:
    teacher = count_teacher(on_meta(small_vit), PlanSpec(rows=1))
    find = partial(
        plan,
        load_recipe("shared-encoder", SHARED),
        partial(on_meta, small_vit),
        partial(on_meta, small_bert),
    )
    found, alone = (
        find(PlanSpec(rows=100, captions=5), UNIT, taught) for taught in (lambda: teacher, None)
    )
    blocks = {
        "image": 3 * block_flops(16, 17),
        "text": block_flops(16, 32, expansion=2) + block_flops(16, 32),
    }
    patches = 2 * 16 * 48 * 16
    items = 3 * blocks["image"] + 2 * patches + 3 * blocks["text"]
    contrast = 3 * 2 * 10**2 * (4 + 1) * 16
    distil = 2 * (6 * 10 * 16 * 16 + 4 * 10 * 60 * 16)
    assert alone.planned.step_flops == 10 * items + contrast + distil
    assert (found.teacher_is_counted, alone.teacher_is_counted) == (True, False)
    assert make_plan("ape").teacher_is_counted
    assert (alone.planned.once_flops, alone.teacher_bytes) == (0, 100 * 16 * 2)
    assert found.planned.once_flops == 100 * SMALL["image"]
    assert found.planned.step_flops == alone.planned.step_flops
    assert found.without_cache.step_flops == alone.planned.step_flops + 10 * SMALL["image"]
    assert found.planned.total_flops < found.without_cache.total_flops


def test_see_hear_read_learns_of_classes_and_says_what_it_needs(tiny_image_encoder: Path) -> None:
    with pytest.raises(RecipeError, match="depends on the teacher; give --teacher"):
        make_plan("see-hear-read", *SHARED[:2])
    spec = parse_encoder(f"timm:{tiny_image_encoder}", "image")
    taught = count_teacher(shape_tower(spec), PlanSpec(rows=1), count_classes(spec))
    assert taught.dim == 3
    with pytest.raises(EncoderError, match="timm: encoders only"):
        count_classes(replace(spec, library="hf"))


@pytest.mark.parametrize("name", ["shared-encoder", "see-hear-read"])
def test_activations_and_operations_are_those_of_a_real_step(name: str) -> None:
    settings = SHARED if name == "shared-encoder" else SHARED[:2]
    recipe = load_recipe(name, settings)
    torch.manual_seed(0)
    model = build_shared(
        [small_vit(), small_bert()],
        recipe=recipe,
        device=CPU,
        teacher=Teacher(dim=5, features=torch.randn(2, 5).softmax(-1)),
    )
    ids, mask = sentences(2)
    rows = [0, 1]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        image, text = model.image.outputs(pictures(2)), model.text.outputs(ids, mask)
        model.terms(image, text, rows).total.backward()
    towers = (partial(on_meta, small_vit), partial(on_meta, small_bert))
    spec = PlanSpec(rows=2, tokens=ids.shape[1])
    counted = plan(
        recipe,
        *towers,
        spec,
        UNIT,
        lambda: TeacherSizes(dim=5),
    ).without_cache.step_flops
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


# --- devices --------------------------------------------------------------------------------------


def test_every_device_has_a_source_and_is_found_by_name() -> None:
    for device in DEVICES:
        assert find_device(device.name.lower()) == device
        assert "NVIDIA" in device.source
    with pytest.raises(OptionError, match=r"no device 'H10'.*did you mean"):
        find_device("H10")


def test_this_machine_is_measured() -> None:
    found = find_device("here")
    assert 1e8 < found.flops < 1e16
    assert found.source.startswith("measured on this")


# --- shapes without weights, and the command ------------------------------------------------------


def test_shapes_are_those_of_the_encoders(
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> None:
    from apecache.encoders.load import load_image_encoder, load_text_encoder
    from apecache.encoders.tower import tower_of

    specs = (
        parse_encoder(f"timm:{tiny_image_encoder}", "image"),
        parse_encoder(f"hf:{tiny_text_encoder}", "text"),
    )
    loaded = (
        tower_of(load_image_encoder(specs[0], "cpu")),
        tower_of(load_text_encoder(specs[1], "cpu")),
    )
    for spec, tower in zip(specs, loaded, strict=True):
        shape = shape_tower(spec)
        assert all(parameter.is_meta for parameter in shape.parameters())
        assert [(p.name, p.count) for p in shape.parts()] == [
            (p.name, p.count) for p in tower.parts()
        ]
        assert (shape.output_dim, shape.pooling == "default") == (
            tower.output_dim,
            spec.library == "timm",
        )
    assert loaded[0].image_size == (32, 32)


def test_images_are_counted_at_the_size_that_preprocessing_gives(tmp_path: Path) -> None:
    """DINOv2 models are made for 518 pixels, and their processors give 224."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    hf.Dinov2Model(hf.Dinov2Config(image_size=56, patch_size=14, **sizes)).save_pretrained(tmp_path)
    size = {"height": 28, "width": 28}
    hf.BitImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(tmp_path)
    spec = parse_encoder(f"hf:{tmp_path}", "image")
    assert shape_tower(spec).image_size == (28, 28)
    assert shape_tower(replace(spec, resolution=42)).image_size == (42, 42)


def test_adapters_do_not_change_what_is_cached_once() -> None:
    tower = on_meta(small_vit)
    insert_adapters(tower, AdapterSpec(kind="deep"))
    assert all(parameter.is_meta for parameter in tower.parameters())


def test_the_command(tiny_image_encoder: Path, tiny_text_encoder: Path) -> None:
    arguments = [
        "plan",
        "--recipe",
        "lit",
        "--image",
        f"timm:{tiny_image_encoder}",
        "--text",
        f"hf:{tiny_text_encoder}",
    ]
    arguments += [
        "--rows",
        "1000",
        "--captions",
        "5",
        "--tokens",
        "12",
        "--device",
        "H100",
        "--price",
        "2",
    ]
    runner = CliRunner()
    found = json.loads(runner.invoke(app, [*arguments, "--json"], catch_exceptions=False).output)
    assert (found["image"]["cut"], found["text"]["cut"], found["path"]) == (
        "pooled",
        None,
        "fit-encoder",
    )
    assert (
        found["planned"]["total_flops"]
        < found["without_cache"]["total_flops"]
        < found["full"]["total_flops"]
    )
    shown = runner.invoke(app, arguments, catch_exceptions=False).output
    for words in (
        "of 320,609 parameters train",
        "cut after the pooling",
        "text: no cut",
        "without the cache",
        "TFLOP/s (NVIDIA H100",
        "temperature",
    ):
        assert words in shown, words


def test_the_command_compares_recipes(tiny_image_encoder: Path, tiny_text_encoder: Path) -> None:
    encoders = [
        "--image",
        f"timm:{tiny_image_encoder}",
        "--text",
        f"hf:{tiny_text_encoder}",
        "--device",
        "H100",
    ]
    arguments = [
        "plan",
        "--recipe",
        "lit",
        "--recipe",
        "clip",
        *encoders,
        "--rows",
        "1000",
        "--price",
        "2",
        "--tokens",
        "12",
    ]
    runner = CliRunner()
    plans = json.loads(runner.invoke(app, [*arguments, "--json"], catch_exceptions=False).output)[
        "plans"
    ]
    assert [found["recipe"] for found in plans] == ["lit", "clip"]
    assert plans[0]["n_trained"] < plans[1]["n_trained"]
    shown = runner.invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "200"}).output
    assert "pooled, none" in shown
    assert "none, none" in shown


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--device": "H1000"}, "no device"),
        ({"--recipe": "freeze/Vuf"}, "expected one like"),
        (
            {"--image": "timm:test_resnet", "--recipe": "clip"},
            "cannot be trained; convolutional and hierarchical encoders can be used frozen only",
        ),
    ],
)
def test_the_command_refuses_in_one_line(
    changed: dict[str, str],
    message: str,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> None:
    given = {
        "--recipe": "lit",
        "--image": f"timm:{tiny_image_encoder}",
        "--text": f"hf:{tiny_text_encoder}",
    }
    given |= {"--rows": "10", "--device": "H100", **changed}
    result = CliRunner().invoke(app, ["plan", *(word for pair in given.items() for word in pair)])
    assert result.exit_code in (2, 3)
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_the_command_plans_a_frozen_side_whose_parts_have_no_names(
    tiny_text_encoder: Path,
) -> None:
    """fit-encoder reads such a side from the store."""
    encoders = ["--image", "timm:test_resnet", "--text", f"hf:{tiny_text_encoder}"]
    sizes = ["--rows", "1000", "--tokens", "12", "--device", "H100", "--json"]
    arguments = ["plan", "--recipe", "lit", *encoders, *sizes]
    output = CliRunner().invoke(app, arguments, catch_exceptions=False).output
    found = json.loads(output)
    module = timm.create_model("test_resnet", pretrained=False, num_classes=0)
    n_parameters = sum(parameter.numel() for parameter in module.parameters())
    (whole,) = [part for part in found["image"]["parts"] if part[0] == "whole"]
    assert whole == ["whole", 0, n_parameters]
    assert found["image"]["cut"] == "pooled"
    assert found["image"]["cache_bytes"] == 1000 * module.num_features * 2
    assert found["image"]["below_flops"] > 0
    costs = [found[name]["total_flops"] for name in ("planned", "without_cache", "full")]
    assert costs == sorted(costs)
    assert len(set(costs)) == 3


@pytest.mark.parametrize("known", [False, True])
def test_a_plan_says_that_a_teacher_is_not_counted(
    known: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = replace(make_plan("shared-encoder", *SHARED), teacher_is_counted=known)
    for show in (lambda: show_one(found, 1000), lambda: compare([found, make_plan("ape")], 1000)):
        show()
        shown = capsys.readouterr().out
        assert ("the teacher is not counted" in shown) is not known
        assert "1,000 images" in shown


def test_a_side_says_its_sums() -> None:
    side = SidePlan(
        side="text",
        parts=(("a", 1, 2), ("b", 3, 4)),
        cut=None,
        reason="",
        cache_bytes=0,
        below_flops=0,
        live_flops=0,
        saved_bytes=0,
    )
    assert (side.n_trained, side.n_parameters) == (4, 6)
    assert isinstance(build_tower(on_meta(small_t5).module, "text"), Tower)


def test_more_tokens_than_the_text_encoder_has_positions_for_are_refused() -> None:
    tower = small_bert()
    limit = tower.module.config.max_position_embeddings
    assert example(tower, PlanSpec(rows=2, tokens=limit))[0].shape == (1, limit)
    with pytest.raises(OptionError, match=rf"positions for {limit} tokens; give --tokens {limit}"):
        example(tower, PlanSpec(rows=2, tokens=limit + 1))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("7", 7),
        ("400M", 400_000_000),
        ("5B", 5 * 10**9),
        ("1.5k", 1500),
        ("2G", 2 * 10**9),
        ("12_000", 12_000),
    ],
)
def test_counts_as_people_write_them(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "0", "-5", "1.5", "4e8", "400 M", "5T", "nan"])
def test_other_counts_are_refused(text: str) -> None:
    with pytest.raises(BadParameter, match="400M or 5B"):
        parse_count(text)
