"""A plan of a cluster: sizes are those of a real store, hours follow from rates, and what is
assumed is said."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from apecache_cli.app import app
from apecache_cli.cluster_sheet import parse_count, size
from small_towers import small_bert, small_vit
from tiny import extract_tiny
from typer import BadParameter
from typer.testing import CliRunner

from apecache.encoders.load import shape_tower
from apecache.encoders.spec import parse_encoder
from apecache.encoders.tower import Tower
from apecache.errors import OptionError
from apecache.plan.cluster_plan import ClusterPlan, ClusterSpec, plan_cluster
from apecache.plan.counting import PlanSpec
from apecache.plan.counting_shared import TeacherSizes
from apecache.plan.devices import Device
from apecache.plan.plan import Cuts, Plan, plan
from apecache.recipes.recipe import load_recipe

PAGE = Path(__file__).parents[2] / "docs" / "internet-scale.md"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
UNIT = Device(name="unit", flops=1e6, memory_bytes=10**6, source="made up")


def on_meta(make: Callable[..., Tower]) -> Tower:
    with torch.device("meta"):
        return make()


def planned(
    recipe: str,
    spec: PlanSpec,
    *settings: str,
    device: Device = UNIT,
    **options: Any,
) -> Plan:
    towers = partial(on_meta, small_vit), partial(on_meta, small_bert)
    return plan(load_recipe(recipe, settings), *towers, spec, device, **options)


def sheet(
    recipe: str,
    spec: PlanSpec,
    cluster: ClusterSpec,
    *settings: str,
    **options: Any,
) -> ClusterPlan:
    return plan_cluster(planned(recipe, spec, *settings, **options), spec, cluster)


# --- sizes ----------------------------------------------------------------------------------------


def test_bytes_and_objects_are_those_of_a_real_store(
    shapes: Path,
    tmp_path: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    no_fsync: None,
) -> None:
    store = tmp_path / "store"
    extract_tiny(
        shapes,
        store=store,
        image=tiny_image_encoder,
        text=tiny_text_encoder,
        shard_rows=5,
    )
    names = f"timm:{tiny_image_encoder}", f"hf:{tiny_text_encoder}"
    image, text = (
        parse_encoder(name, side) for name, side in zip(names, ("image", "text"), strict=True)
    )
    spec = PlanSpec(rows=12, captions=2, tokens=16)
    towers = partial(shape_tower, image), partial(shape_tower, text)
    found = plan_cluster(
        plan(load_recipe("projection"), *towers, spec, UNIT),
        spec,
        ClusterSpec(nodes=1, shard_rows=5),
    )
    for array in found.arrays:
        data = [
            path for path in (store / "features.zarr" / array.name).rglob("c.*") if path.is_file()
        ]
        records = list((store / "records" / array.name).glob("*/commits/*.json"))
        assert array.n_shards == len(records)
        assert array.n_objects == len(data) + len(records)
        assert array.n_bytes == sum(path.stat().st_size for path in data)
        written = sum(path.stat().st_size for path in records)
        assert array.record_bytes <= written <= array.record_bytes + 1000 * len(records)
    table = [path for path in (store / "features.zarr" / "pairs").glob("*/**/*") if path.is_file()]
    assert found.n_writes == sum(array.n_objects for array in found.arrays) + len(table)
    assert found.write_bytes == sum(array.n_bytes + array.record_bytes for array in found.arrays)
    assert (found.read_bytes, found.n_reads) == (found.write_bytes, found.n_writes - len(table))


def test_shards_are_as_extraction_makes_them() -> None:
    """4,096 rows unless 64 MiB are less; what the last shard lacks is padded."""
    spec = PlanSpec(rows=10_000, captions=2)
    small, views = (
        sheet("projection", spec, ClusterSpec(nodes=1, views=v)).arrays for v in (1, 1024)
    )
    assert [(a.shard_rows, a.n_shards, a.n_bytes) for a in small] == [
        (4096, 3, 3 * (4096 * 16 * 2 + 4 + 4096 + 4)),
        (4096, 5, 5 * (4096 * 16 * 2 + 4 + 4096 + 4)),
    ]
    assert (views[0].row_bytes, views[0].shard_rows) == (1024 * 32, (64 << 20) // (1024 * 32))
    assert views[1] == small[1]
    assert views[0].device_seconds == pytest.approx(1024 * small[0].device_seconds)
    fewer = sheet("projection", spec, ClusterSpec(nodes=1, shard_rows=100)).arrays
    assert [(a.shard_rows, a.n_shards) for a in fewer] == [(100, 100), (100, 200)]


def test_tokens_of_captions_have_lengths_too_and_are_streamed() -> None:
    found = sheet(
        "lilt-f",
        PlanSpec(rows=100, captions=2, tokens=8),
        ClusterSpec(nodes=1, shard_rows=10),
    )
    image, text = found.arrays
    assert (image.row_bytes, text.row_bytes) == (17 * 16 * 2, 8 * 16 * 2)
    assert (image.n_objects, text.n_objects) == (10 * 3, 20 * 4)
    assert text.n_bytes == 20 * (10 * 8 * 16 * 2 + 4 + 10 + 4 + 10 * 2 + 4)
    assert found.residence == "no features have to be on a device"


# --- hours ----------------------------------------------------------------------------------------


def test_hours_are_operations_over_rates_and_extraction_is_shared_by_all_devices() -> None:
    spec = PlanSpec(rows=1000, captions=5, utilization=0.5, price=3.0)
    one = planned("projection", spec)
    found = plan_cluster(one, spec, ClusterSpec(nodes=4, devices=2, efficiency=0.5))
    hours = (1000 * one.image.below_flops + 5000 * one.text.below_flops) / 1e6 / 0.5 / 3600
    assert asdict(found.extraction) == pytest.approx(
        {"n_devices": 8, "device_hours": hours, "hours": hours / 8, "money": 3 * hours}
    )
    training = one.n_steps * one.planned.step_seconds / 3600
    assert asdict(found.training) == pytest.approx(
        {"n_devices": 1, "device_hours": training, "hours": training, "money": 3 * training}
    )
    assert (found.nodes, found.devices_per_node, found.n_steps) == (4, 2, one.n_steps)
    assert (
        plan_cluster(one, replace(spec, price=None), ClusterSpec(nodes=1)).extraction.money is None
    )


def test_measured_rates_take_the_place_of_computed_ones() -> None:
    spec = PlanSpec(rows=3600, captions=5)
    found = sheet(
        "projection",
        spec,
        ClusterSpec(nodes=10, image_rate=10.0, text_rate=100.0, views=3),
    )
    assert [array.device_seconds for array in found.arrays] == pytest.approx([3 * 360, 180])
    assert found.extraction.hours == pytest.approx((3 * 360 + 180) / 36_000)
    assert "image encoding: 10 rows a second on each device, as given" in found.assumptions
    half = sheet("projection", spec, ClusterSpec(nodes=10, image_rate=10.0))
    assert half.arrays[1] == sheet("projection", spec, ClusterSpec(nodes=10)).arrays[1]


@pytest.mark.parametrize(("views", "seconds"), [(1, 2 / 8), (3, 3 / 10)])
def test_decoding_holds_up_devices_that_are_faster(views: int, seconds: float) -> None:
    """Two devices of a node that encode ten rows a second each, and a node that decodes eight
    images a second."""
    spec = PlanSpec(rows=3600, captions=5)
    found = sheet(
        "projection",
        spec,
        ClusterSpec(nodes=10, devices=2, image_rate=10.0, decode_rate=8.0, views=views),
    )
    assert found.arrays[0].device_seconds == pytest.approx(3600 * seconds)
    assert found.arrays[1] == sheet("projection", spec, ClusterSpec(nodes=10)).arrays[1]
    assert any("held up by 8 images" in said for said in found.assumptions) == (views == 1)
    assert (
        f"reading and decoding keep up: {2 / seconds:.0f} images a second on each node"
        in found.assumptions
    )


def test_a_clock_is_asked_for_each_side_alone() -> None:
    class FakeClock:
        def once(self, cuts: Cuts) -> float:
            assert None in cuts
            return 2.0 if cuts[0] else 0.5

        def step(self, cuts: Cuts) -> float:
            return 1.0

    spec = PlanSpec(rows=100, captions=5, utilization=0.5)
    found = plan_cluster(
        planned("projection", spec),
        spec=spec,
        cluster=ClusterSpec(nodes=2),
        clock=FakeClock(),
    )
    assert [array.device_seconds for array in found.arrays] == pytest.approx([400, 100])
    assert any("timed on this machine" in said for said in found.assumptions)
    assert "seconds of a step are those of this machine" in found.assumptions


def test_training_of_towers_is_shared_at_the_efficiency_that_is_assumed() -> None:
    spec = PlanSpec(rows=1000)
    one = planned("clip", spec, "schedule.batch_size=64")
    alone, many = (plan_cluster(one, spec, ClusterSpec(nodes=n, efficiency=0.8)) for n in (1, 16))
    seconds = one.n_steps * one.planned.step_seconds
    assert alone.training.hours * 3600 == pytest.approx(seconds)
    assert many.training.hours * 3600 == pytest.approx(seconds / 16 / 0.8)
    assert many.training.device_hours == pytest.approx(16 * many.training.hours)
    assert (many.arrays, many.extraction.hours, many.n_writes, many.read_bytes) == ((), 0, 0, 0)
    assert any("efficiency 0.8 on 16 devices" in said for said in many.assumptions)
    with pytest.raises(OptionError, match="65 devices for batches of 64 images; raise"):
        plan_cluster(one, spec, ClusterSpec(nodes=65))


def test_a_teacher_is_one_of_the_arrays() -> None:
    spec = PlanSpec(rows=100)
    settings = (
        "shared.image_blocks=2",
        "shared.text_blocks=1",
        "distillation.bank=50",
        "schedule.batch_size=10",
    )
    found = sheet(
        "shared-encoder",
        spec,
        ClusterSpec(nodes=2),
        *settings,
        teacher=lambda: TeacherSizes(dim=8, flops=10**6),
    )
    (teacher,) = found.arrays
    assert (teacher.name, teacher.rows, teacher.row_bytes) == ("teacher", 100, 16)
    assert teacher.device_seconds == pytest.approx(100)
    assert (found.n_reads, found.read_bytes) == (2 * teacher.n_objects, 2 * found.write_bytes)


# --- what fits, what is refused, what is said -----------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "fits", "n_hold", "said"),
    [
        (5_000, True, 1, "fit on one unit"),
        (100_000, False, 11, "11 would hold them; fit-head keeps them in the host's memory"),
    ],
)
def test_features_that_do_not_fit_are_said_to_be_streamed(
    rows: int,
    fits: bool,
    n_hold: int,
    said: str,
) -> None:
    """Of 10^6 bytes of memory features get 60 %; a row of both sides has 64 bytes."""
    found = sheet("projection", PlanSpec(rows=rows), ClusterSpec(nodes=1))
    assert (found.fits, found.devices_to_hold) == (fits, n_hold)
    assert said in found.residence


def test_towers_need_cached_features_on_every_device() -> None:
    spec = PlanSpec(rows=1000)
    roomy = replace(UNIT, memory_bytes=10**9)
    assert sheet("lit", spec, ClusterSpec(nodes=1), device=roomy).fits
    found = sheet("lit", spec, ClusterSpec(nodes=1))
    assert not found.fits
    assert "fit-encoder does not stream pooled features" in found.residence
    unknown = sheet("lit", spec, ClusterSpec(nodes=1), device=replace(UNIT, memory_bytes=None))
    assert (unknown.fits, unknown.devices_to_hold) == (None, None)
    assert (
        sheet("clip", spec, ClusterSpec(nodes=1)).residence == "no features have to be on a device"
    )


@pytest.mark.parametrize(
    "wrong", [{"devices": 0}, {"efficiency": 0.0}, {"efficiency": 1.5}, {"image_rate": 0.0}, {"views": 0},
              {"text_rate": float("nan")}, {"shard_rows": 0}, {"image_bytes": 0},
              {"decode_rate": -1.0}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="counts are at least 1"):
        sheet("projection", PlanSpec(rows=10), ClusterSpec(**{"nodes": 1, **wrong}))
    with pytest.raises(OptionError, match="caches no images"):
        sheet("clip", PlanSpec(rows=10), ClusterSpec(nodes=1, views=2))


def test_every_number_that_was_not_counted_is_an_assumption() -> None:
    said = sheet("projection", PlanSpec(rows=10), ClusterSpec(nodes=1)).assumptions
    assert said[0] == "computed, not run on a cluster"
    assert any("lower bounds" in line for line in said)
    assert any("reading the image files is not counted" in line for line in said)
    told = sheet(
        "projection",
        PlanSpec(rows=10, utilization=0.4),
        ClusterSpec(nodes=1, image_bytes=1000),
    )
    assert told.source_bytes == 10_000
    assert not any("lower bounds" in line or "not given" in line for line in told.assumptions)


# --- the command, and its page --------------------------------------------------------------------


def test_the_page_shows_what_its_commands_print(tmp_path: Path) -> None:
    """But for the text encoder, whose description comes from the hub: here it has the same
    shapes."""
    sizes = {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    }
    hf.BertModel(hf.BertConfig(**sizes)).save_pretrained(tmp_path)
    blocks = re.findall(
        r"```console\n\$ (.*?[^\\])\n(.*?)\n```",
        PAGE.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    assert len(blocks) == 3
    for command, shown in blocks:
        words = shlex.split(command.replace("\\\n", " ").replace(MINILM, str(tmp_path)))
        result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
        assert [line.rstrip() for line in result.output.rstrip().splitlines()] == shown.splitlines()


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


def test_sizes_as_people_read_them() -> None:
    assert [size(n) for n in (None, 999, 5 * 10**6, 2_500 * 10**9)] == [
        "not given",
        "999 B",
        "5 MB",
        "2.5 TB",
    ]


def test_the_command(tiny_image_encoder: Path, tiny_text_encoder: Path) -> None:
    arguments = ["plan", "--recipe", "projection", "--image", f"timm:{tiny_image_encoder}"]
    arguments += [
        "--text",
        f"hf:{tiny_text_encoder}",
        "--rows",
        "400M",
        "--captions",
        "2",
        "--tokens",
        "12",
        "--device",
        "H100",
    ]
    cluster = [
        "--nodes",
        "8",
        "--devices-per-node",
        "2",
        "--price-per-hour",
        "2.5",
        "--rate-images",
        "1000",
    ]
    runner = CliRunner()
    found = json.loads(
        runner.invoke(app, [*arguments, *cluster, "--json"], catch_exceptions=False).output
    )
    assert (found["rows"], found["extraction"]["n_devices"]) == (400_000_000, 16)
    assert found["arrays"][0]["device_seconds"] == pytest.approx(400_000)
    assert found["arrays"][0]["n_shards"] == 97_657
    shown = runner.invoke(app, [*arguments, *cluster], catch_exceptions=False).output
    for words in (
        "97,657",
        "8 x 2 H100",
        "fit-head",
        "in training: ",
        "assumed:",
        "computed, not run on a cluster",
    ):
        assert words in shown, words
    several = [
        *arguments,
        "--recipe",
        "clip",
        *cluster,
        "--set",
        "schedule.batch_size=64",
        "--json",
    ]
    sheets = json.loads(runner.invoke(app, several, catch_exceptions=False).output)["sheets"]
    assert [of["path"] for of in sheets] == ["fit-head", "fit-encoder"]
    alone = runner.invoke(app, [*arguments, "--rate-images", "1000", "--views", "2"])
    assert alone.exit_code == 2
    assert "image_rate, views: settings of a cluster; add --nodes N" in alone.output
    assert runner.invoke(app, [*arguments, "--rows", "many"]).exit_code == 2
