"""Parts of an extraction: whoever does them, in whatever order or all at once, the store is that of
one run."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from apecache_cli.app import app
from hypothesis import given, settings
from hypothesis import strategies as st
from part_runs import PartRuns
from tiny import extract_tiny, loaded_once, make_shapes, tree
from typer.testing import CliRunner

import apecache.extraction.arrays as preparation
from apecache.data.sources import open_pairs
from apecache.encoders.spec import parse_encoder
from apecache.errors import BadRowsError, DataError, MismatchError, OptionError
from apecache.extraction.arrays import prepare_arrays
from apecache.extraction.run import ExtractionState, ExtractReport, ExtractSpec, extract
from apecache.extraction.shard_range import ShardRange, parse_part
from apecache.extraction.table_plan import plan_table
from apecache.storage.open import open_files
from apecache.store.reader import FeatureStore

pytestmark = pytest.mark.usefixtures("no_fsync", "load_once")


@pytest.fixture
def parted(tiny_image_encoder: Path, tiny_text_encoder: Path) -> Callable[..., ExtractReport]:
    """`parted(table, store, "1/3", **settings)`: extract one part with the tiny encoders."""

    def run(table: Path, store: Path, part: str = "1/1", **settings: Any) -> ExtractReport:
        return extract_tiny(
            table,
            store=store,
            image=tiny_image_encoder,
            text=tiny_text_encoder,
            part=parse_part(part),
            **settings,
        )

    return run


@pytest.fixture(scope="module")
def runs() -> Iterator[PartRuns]:
    with PartRuns() as running:
        yield running


@settings(deadline=None)
@given(st.integers(1, 50).flatmap(lambda count: st.tuples(st.integers(1, count), st.just(count))))
def test_a_part_is_read_as_it_is_written(both: tuple[int, int]) -> None:
    number, count_value = both
    part = ShardRange(number=number, count=count_value)
    assert parse_part(str(part)) == part
    assert part.whole == (both[1] == 1)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 40))
def test_every_shard_is_in_one_part_and_parts_differ_by_one_shard_at_most(
    count: int,
    n_shards: int,
) -> None:
    parts = [
        [shard for shard in range(n_shards) if shard in ShardRange(number=number, count=count)]
        for number in range(1, count + 1)
    ]
    assert sorted(shard for part in parts for shard in part) == list(range(n_shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    "text",
    ["0/4", "5/4", "a/b", "1/0", "", "1", "1/", "/2", "1/2/3", "-1/2", "1.0/2", "²/3", "1 /2"],
)
def test_a_part_out_of_range_is_wrong_usage(text: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"expected i/n with i from 1 to n, such as 2/5"):
        parse_part(text)
    called = [
        "extract",
        str(tmp_path / "none.tsv"),
        "--store",
        str(tmp_path / "store"),
        f"--part={text or '0/0'}",
    ]
    assert CliRunner().invoke(app, called).exit_code == 2


# One after another


@pytest.mark.parametrize("order", list(permutations((1, 2, 3))))
def test_the_order_of_parts_is_of_no_matter(
    shapes_once: Path,
    tmp_path: Path,
    parted: Callable[..., ExtractReport],
    order: tuple[int, ...],
) -> None:
    """12 images are 3 shards, 24 captions 5."""
    parted(shapes_once, tmp_path / "once")
    shares = {1: (5, 10), 2: (5, 9), 3: (2, 5)}
    done = 0
    for place, number in enumerate(order):
        report = parted(shapes_once, tmp_path / "parts", f"{number}/3")
        assert tuple(array.n_encoded for array in report.arrays) == shares[number]
        done += sum(shares[number])
        assert report.share_done == pytest.approx(done / 36)
        assert report.complete == (place == 2)
        assert (report.arrays[0].rows, report.arrays[1].rows) == (12, 24)
    assert tree(tmp_path / "parts") == tree(tmp_path / "once")
    assert parted(shapes_once, tmp_path / "parts", "2/3").nothing_to_do


def test_more_parts_than_shards_leave_some_with_nothing_to_do(
    shapes_once: Path,
    tmp_path: Path,
    parted: Callable[..., ExtractReport],
) -> None:
    parted(shapes_once, tmp_path / "once")
    reports = [parted(shapes_once, tmp_path / "parts", f"{number}/7") for number in range(1, 8)]
    assert [report.nothing_to_do for report in reports] == [False] * 5 + [True] * 2
    assert [report.complete for report in reports] == [False] * 4 + [True] * 3
    assert tree(tmp_path / "parts") == tree(tmp_path / "once")


def test_a_run_of_the_whole_finishes_what_parts_began(
    shapes_once: Path,
    tmp_path: Path,
    parted: Callable[..., ExtractReport],
) -> None:
    parted(shapes_once, tmp_path / "once")
    parted(shapes_once, tmp_path / "parts", "2/3")
    assert [array.n_encoded for array in parted(shapes_once, tmp_path / "parts").arrays] == [7, 15]
    assert tree(tmp_path / "parts") == tree(tmp_path / "once")


def test_appended_rows_come_in_parts_too(
    tmp_path: Path,
    parted: Callable[..., ExtractReport],
) -> None:
    table = make_shapes(tmp_path / "shapes", copies=2)
    whole = table.read_text()
    table.write_text("".join(whole.splitlines(keepends=True)[:25]))
    parted(table, tmp_path / "once")
    shutil.copytree(tmp_path / "once", tmp_path / "parts")
    table.write_text(whole)
    parted(table, tmp_path / "once")
    for number in (2, 1):
        report = parted(table, tmp_path / "parts", f"{number}/2")
    assert report.complete
    assert tree(tmp_path / "parts") == tree(tmp_path / "once")


def test_progress_is_that_of_the_part(
    shapes_once: Path,
    tmp_path: Path,
    tiny_image_encoder: Path,
    parted: Callable[..., ExtractReport],
) -> None:
    parted(shapes_once, tmp_path / "store", "1/3")
    seen: list[ExtractionState] = []
    encoder = parse_encoder(f"timm:{tiny_image_encoder}", "image")
    extract(
        open_pairs(shapes_once),
        store=tmp_path / "store",
        spec=ExtractSpec(encoder, device="cpu", part=ShardRange(number=2, count=3)),
        progress=seen.append,
    )
    assert (seen[0].done, seen[-1].done) == (0, 5)
    assert {standing.rows for standing in seen} == {5}


# What is decided for all parts, and when


def test_unreadable_rows_are_judged_when_the_store_is_complete(
    shapes: Path,
    tmp_path: Path,
    parted: Callable[..., ExtractReport],
) -> None:
    (shapes.parent / "images" / "red-circle-0.png").write_bytes(b"<html>")
    first = parted(shapes, tmp_path / "store", "1/2")
    assert (first.arrays[0].n_quarantined, first.complete) == (1, False)
    with pytest.raises(BadRowsError, match="1 of 12 image rows could not be encoded"):
        parted(shapes, tmp_path / "store", "2/2")
    with pytest.raises(BadRowsError, match="1 of 12"):
        parted(shapes, tmp_path / "store", "1/2")
    assert parted(shapes, tmp_path / "store", "1/2", max_bad=0.1).complete


def test_one_file_in_two_splits_is_found_when_the_store_is_complete(
    shapes: Path,
    tmp_path: Path,
    parted: Callable[..., ExtractReport],
) -> None:
    images = shapes.parent / "images"
    shutil.copy(images / "red-circle-0.png", images / "red-triangle-0.png")
    assert not parted(shapes, tmp_path / "store", "1/2").complete
    with pytest.raises(DataError, match="same file in two splits"):
        parted(shapes, tmp_path / "store", "2/2")


@pytest.mark.parametrize("number", [1, 2])
def test_a_wrong_root_is_found_by_every_part(
    shapes: Path,
    tmp_path: Path,
    parted: Callable[..., ExtractReport],
    number: int,
) -> None:
    shutil.rmtree(shapes.parent / "images")
    with pytest.raises(BadRowsError, match="6 of 6 images are not below"):
        parted(shapes, tmp_path / "store", f"{number}/2")
    assert not (tmp_path / "store").exists()


# At once


def in_parts(
    table: Path,
    store: Path,
    image: Path,
    text: Path,
    count: int,
    **settings: Any,
) -> list[dict[str, Any]]:
    about = {"table": table, "store": store, "image": image, "text": text, **settings}
    return [{**about, "part": f"{number}/{count}"} for number in range(1, count + 1)]


def test_three_processes_that_begin_at_once_make_the_store_of_one(
    runs: PartRuns,
    tmp_path: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> None:
    """The store is made by whoever is first, and sealed by whoever is last; one part is killed and
    done again."""
    table = make_shapes(tmp_path / "shapes", copies=4)
    encoders = (tiny_image_encoder, tiny_text_encoder)
    assert runs.start(*in_parts(table, tmp_path / "once", *encoders, 1)) == ["done"]
    wanted = tree(tmp_path / "once")
    for turn in range(3):
        store = tmp_path / f"parts-{turn}"
        three = in_parts(table, store, *encoders, 3)
        killed = three[turn] | {"kill_at": turn}
        answers = runs.start(
            *(killed if place == turn else part for place, part in enumerate(three))
        )
        assert answers == ["killed" if place == turn else "done" for place in range(3)]
        assert not list(store.glob("records/text/*/seal.json"))
        assert runs.start(three[turn]) == ["done"]
        left = {name for name in tree(store) if "/.tmp-" in name}
        assert {name: data for name, data in tree(store).items() if name not in left} == wanted


@pytest.mark.parametrize("cuts", [("default",), ("default", "cls")])
def test_who_makes_an_array_first_decides_what_was_measured(
    shapes_once: Path,
    tmp_path: Path,
    tiny_image_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
    cuts: tuple[str, ...],
) -> None:
    """Another process measures 2 rows a shard, and makes the first array while this one still
    measures 3."""
    encoder = parse_encoder(f"timm:{tiny_image_encoder}", "image")
    encoders = loaded_once("image")(tuple(replace(encoder, pooling=cut) for cut in cuts), "cpu")  # type: ignore[arg-type]
    plan_table(open_pairs(shapes_once), open_files(tmp_path / "store"), ExtractSpec()).begin()
    store = FeatureStore.open(tmp_path / "store")
    spec = ExtractSpec(encoder, device="cpu")

    def measured(*_: object) -> int:
        monkeypatch.setattr(preparation, "_calibrated_rows", lambda *_: 2)
        torch.set_num_threads(2)
        prepare_arrays(store, encoders=encoders[:1], rows=12, spec=spec)
        torch.set_num_threads(1)
        return 3

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        monkeypatch.setattr(preparation, "_calibrated_rows", measured)
        records = prepare_arrays(store, encoders=encoders, rows=12, spec=spec)
    finally:
        torch.set_num_threads(threads)
    assert [(record.layout.shard_rows, record.layout.threads) for record in records] == [
        (2, 2)
    ] * len(cuts)
    assert [array.record for array in store.arrays("image")] == records


def test_a_process_with_another_encoder_of_that_name_is_refused_in_the_race(
    shapes_once: Path,
    tmp_path: Path,
    tiny_image_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = loaded_once("image")((parse_encoder(f"timm:{tiny_image_encoder}", "image"),), "cpu")[
        0
    ]
    fields = {**encoder.fingerprint.fields, "weights": "0"}
    other = replace(encoder, fingerprint=type(encoder.fingerprint)(fields=fields))
    plan_table(open_pairs(shapes_once), open_files(tmp_path / "store"), ExtractSpec()).begin()
    store = FeatureStore.open(tmp_path / "store")
    spec = ExtractSpec(encoder.spec, device="cpu")

    def measured(*_: object) -> int:
        monkeypatch.setattr(preparation, "_calibrated_rows", lambda *_: 2)
        prepare_arrays(store, encoders=[other], rows=12, spec=spec)
        return 2

    monkeypatch.setattr(preparation, "_calibrated_rows", measured)
    with pytest.raises(MismatchError, match=r"encoder\.weights"):
        prepare_arrays(store, encoders=[encoder], rows=12, spec=spec)


# The command


def test_the_command_says_how_far_the_store_is(
    shapes_once: Path,
    tmp_path: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> None:
    encoders = [
        "--image",
        f"timm:{tiny_image_encoder}",
        "--text",
        f"hf:{tiny_text_encoder}",
        "--shard-rows",
        "5",
    ]

    def call(*more: str) -> Any:
        line = [
            "extract",
            str(shapes_once),
            "--store",
            str(tmp_path / "store"),
            *encoders,
            "--device",
            "cpu",
            *more,
        ]
        return CliRunner().invoke(app, line)

    planned = json.loads(call("--part", "1/2", "--dry-run", "--json").stdout)
    assert [array["n_pending"] for array in planned["arrays"]] == [7, 14]
    first = call("--part", "1/2")
    assert first.exit_code == 0, first.output
    assert first.stdout.splitlines()[-1].endswith(
        f"; part 1/2 is complete; 58% of {tmp_path / 'store'} is done"
    )
    assert "nothing to do: part 1/2 is complete; 58% of" in call("--part", "1/2").stdout
    assert (
        call("--part", "2/2")
        .stdout.splitlines()[-1]
        .endswith(f"; {tmp_path / 'store'} is complete")
    )
    told = json.loads(call("--part", "2/2", "--json").stdout)
    assert (told["part"], told["complete"], told["share_done"]) == ("2/2", True, 1.0)
