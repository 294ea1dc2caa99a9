"""Repair: exactly what is damaged is made again, bit by bit; interrupted or refused, nothing wrong
is ever served."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import DAMAGES, Grown, damaged, extract_tiny, loaded_once, put, tree

import apecache.extraction.run as extraction
from apecache.data.sources import open_pairs
from apecache.data.spec import OpenSpec
from apecache.encoders.spec import parse_encoder
from apecache.errors import DamagedError, IncompleteError, MismatchError, StoreError
from apecache.extraction.repair import RepairReport, repair
from apecache.extraction.run import ExtractSpec
from apecache.store.reader import FeatureStore
from apecache.store.verify import verify_store

pytestmark = pytest.mark.usefixtures("no_fsync", "load_once")

IMAGE = "image/tiny-vit"
TEXT = "text/tiny-bert"
CHUNK = f"features.zarr/{IMAGE}/features/c.1.0"
SEGMENT = "segments/0001"


def mend(grown: Grown, spec: ExtractSpec | None = None, table: Path | None = None) -> RepairReport:
    return repair(
        grown.store,
        open_pairs(table or grown.table, OpenSpec(root=grown.table.parent)),
        spec or ExtractSpec(device="cpu"),
    )


def hit(grown: Grown, name: str, how: str = "flip") -> None:
    put(grown.store, damaged(tree(grown.store), name, how))


def shard_of(name: str) -> tuple[str, int] | None:
    """The (array, shard) that has to be encoded again when this object is lost."""
    parts = name.removeprefix(f"{SEGMENT}/").split("/")
    if parts[0] == "features.zarr" and parts[-1].startswith("c.") and parts[1] != "pairs":
        number = parts[-1].split(".")[1]
    elif parts[0] == "records" and parts[-2] in ("commits", "quarantine"):
        number = parts[-1].split(".")[0]
    else:
        return None
    array = "/".join(parts[1:3])
    return (f"{SEGMENT}/{array}" if name.startswith(SEGMENT) else array), int(number)


def written_by(shards: dict[str, tuple[int, ...]], files: dict[str, bytes]) -> set[str]:
    """Every object of these shards, and the seals of their arrays."""
    found = {name for name in files if (of := shard_of(name)) and of[1] in shards.get(of[0], ())}
    for array in shards:
        segment, _, plain = array.rpartition(f"{SEGMENT}/")
        found.add(
            f"{segment and f'{SEGMENT}/'}{f'{SEGMENT}/' if array != plain else ''}records/{plain}/seal.json"
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(len(DAMAGES)))
def test_every_damaged_object_is_made_again_bit_by_bit_and_no_other_shard_is_touched(
    grown: Grown,
    turn: int,
) -> None:
    """Each object is damaged in two of the six ways (`verify` is tested on all): one per turn, the
    turn shifted."""
    files = tree(grown.store)
    for number, name in enumerate(sorted(files)):
        if (number + turn) % 3:
            continue
        changed = damaged(files, name, DAMAGES[(number // 3 + turn) % len(DAMAGES)])
        times = {other: (grown.store / other).stat().st_mtime_ns for other in files}
        put(grown.store, changed)
        report = mend(grown)
        assert report.after.problems == ()
        assert tree(grown.store) == files, (name, changed.keys())
        again: dict[str, tuple[int, ...]] = {}
        for array, shard in sorted({of for other in changed if (of := shard_of(other))}):
            again[array] = (*again.get(array, ()), shard)
        seals = {f"{other.split('records/')[0]}{'/'.join(other.split('/')[-3:-1])}"
                 for other in changed if other.endswith("seal.json")}  # fmt: skip
        assert report.shards == {**dict.fromkeys(seals, ()), **again}, (name, changed.keys())
        assert report.nothing_to_do == (not changed)
        features = (
            {other for other in files if shard_of(other)}
            - written_by(again, files)
            - changed.keys()
        )
        assert all((grown.store / other).stat().st_mtime_ns == times[other] for other in features)


def test_many_damages_in_both_segments_are_mended_at_once(grown: Grown) -> None:
    files = tree(grown.store)
    names = [
        "README.md", "records/source.json", f"records/{IMAGE}/fingerprint.json", CHUNK,
        f"records/{TEXT}/commits/00000002.json", f"features.zarr/{TEXT}/status/zarr.json",
        f"{SEGMENT}/records/pairs.json", f"{SEGMENT}/records/source.json", f"{SEGMENT}/features.zarr/zarr.json",
        f"{SEGMENT}/features.zarr/{IMAGE}/status/c.0", f"{SEGMENT}/records/{IMAGE}/commits/00000000.json",
        f"{SEGMENT}/records/{TEXT}/seal.json",
    ]  # fmt: skip
    for name, how in zip(names, DAMAGES[:5] * 3, strict=False):
        hit(grown, name, how)
    report = mend(grown)
    assert tree(grown.store) == files
    wanted = {IMAGE: (1,), TEXT: (2,), f"{SEGMENT}/{IMAGE}": (0,), f"{SEGMENT}/{TEXT}": ()}
    assert report.shards == wanted
    # Without pairs.json nobody knows what Zarr's root metadata should be: it is written again
    # unasked.
    not_listed = {f"{SEGMENT}/records/{TEXT}/seal.json", f"{SEGMENT}/features.zarr/zarr.json"}
    assert {name for name in names if not shard_of(name)} - not_listed == set(report.objects)


@pytest.mark.parametrize("name", ["records/source.json", "records/pairs.json", "README.md"])
def test_what_is_written_again_is_reported(grown: Grown, name: str) -> None:
    hit(grown, name, "delete")
    report = mend(grown)
    assert (report.objects, report.shards, report.nothing_to_do) == ((name,), {}, False)


def test_repairing_a_sound_store_does_nothing(grown: Grown) -> None:
    times = {name: (grown.store / name).stat().st_mtime_ns for name in tree(grown.store)}
    report = mend(grown)
    assert report.nothing_to_do
    assert report.after.sound
    assert {name: (grown.store / name).stat().st_mtime_ns for name in tree(grown.store)} == times


def test_without_its_seal_an_array_is_not_served_until_it_is_repaired(grown: Grown) -> None:
    files = tree(grown.store)
    (grown.store / f"records/{IMAGE}/seal.json").unlink()
    with pytest.raises(IncompleteError):
        FeatureStore.open(grown.store).array("image").load()
    assert mend(grown).shards == {IMAGE: ()}
    assert tree(grown.store) == files


def test_when_nobody_knows_what_the_features_are_the_remedy_is_to_remove_them(grown: Grown) -> None:
    hit(grown, f"records/{IMAGE}/fingerprint.json")
    hit(grown, f"features.zarr/{IMAGE}/zarr.json", "delete")
    files = tree(grown.store)
    with pytest.raises(StoreError, match=f"apecache remove STORE {IMAGE}, and extract again"):
        mend(grown)
    assert tree(grown.store) == files


def test_what_is_not_ours_is_left_alone(grown: Grown) -> None:
    strangers = {"notes.txt": b"mine", f"records/{IMAGE}/commits/copy.json": b"{}"}
    put(grown.store, strangers)
    hit(grown, CHUNK)
    mend(grown)
    assert strangers.items() <= tree(grown.store).items()


# Interrupted


def failing_after(monkeypatch: pytest.MonkeyPatch, n_batches: int) -> None:
    """The image encoder raises after so many batches, as a device that is lost."""
    from dataclasses import replace

    def load(*arguments: Any) -> Any:
        encoder = loaded_once("image")(*arguments)[0]
        calls = iter(range(n_batches))

        def forward(pixels: Any) -> Any:
            if next(calls, None) is None:
                raise RuntimeError("the device is lost")
            return encoder.forward(pixels)

        return [replace(encoder, forward=forward)]

    monkeypatch.setattr(extraction, "load_image_encoders", load)


@pytest.mark.parametrize("n_batches", [0, 2, 4])
def test_an_interrupted_repair_leaves_a_store_that_serves_nothing_wrong_and_can_be_repaired_again(
    grown: Grown,
    monkeypatch: pytest.MonkeyPatch,
    n_batches: int,
) -> None:
    """After 2 batches (the spot check and one of the first shard) nothing is committed anew; after
    4 one of two is."""
    files = tree(grown.store)
    right = FeatureStore.open(grown.store).array("image").load().tobytes()
    hit(grown, f"features.zarr/{IMAGE}/features/c.0.0")
    hit(grown, CHUNK)
    with monkeypatch.context() as patch:
        failing_after(patch, n_batches)
        with pytest.raises(RuntimeError, match="the device is lost"):
            mend(grown)
    array = FeatureStore.open(grown.store).array("image")
    with pytest.raises(IncompleteError, match="% done"):
        array.load()
    assert verify_store(grown.store).sound  # what is not committed does no harm
    again = mend(grown)
    assert len(again.shards[IMAGE]) == (1 if n_batches == 4 else 2)
    assert tree(grown.store) == files
    assert FeatureStore.open(grown.store).array("image").load().tobytes() == right


def test_extracting_again_finishes_an_interrupted_repair_too(
    grown: Grown,
    monkeypatch: pytest.MonkeyPatch,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> None:
    files = tree(grown.store)
    hit(grown, CHUNK)
    with monkeypatch.context() as patch:
        failing_after(patch, 0)
        with pytest.raises(RuntimeError):
            mend(grown)
    extract_tiny(
        grown.table,
        store=grown.store,
        image=tiny_image_encoder,
        text=tiny_text_encoder,
        max_bad=1.0,
    )
    assert tree(grown.store) == files


# Another table


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("a blue circle", "a blue disc"),
        lambda text: text.replace("\tval\t", "\ttest\t"),
        lambda text: "\n".join([*text.splitlines()[:-1]]) + "\n",
        lambda text: text + "images/x.png\tan x\ttrain\tx\ten\n",
    ],
)
@pytest.mark.parametrize(
    "lost",
    [(), ("records/source.json",), ("records/source.json", "records/pairs.json")],
)
def test_another_table_with_the_same_images_will_do(
    grown: Grown,
    tmp_path: Path,
    change: Callable[[str], str],
    lost: tuple[str, ...],
) -> None:
    """Blocks and views say what a lost table was; the user's table says where the images are."""
    whole = tree(grown.store)
    hit(grown, CHUNK)
    for name in lost:
        hit(grown, name, "delete")
    table = tmp_path / "other.tsv"
    table.write_text(change(grown.table.read_text()))
    assert mend(grown, table=table).after.sound
    # It may name the other table as the one that it was made from.
    source = "records/source.json"
    assert tree(grown.store) | {source: whole[source]} == whole


def test_a_table_that_nothing_says_is_asked_for(
    tiny_store: Path, shapes: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    files = tree(store)
    (store / "features.zarr/pairs/text_caption/c/0").unlink()
    other = tmp_path / "other.tsv"
    other.write_text(shapes.read_text().replace("a red circle", "a red disc"))
    source = open_pairs(other, OpenSpec(root=shapes.parent))
    with pytest.raises(MismatchError, match="is not the table that it was made from; give that"):
        repair(store, source, ExtractSpec(device="cpu"))
    repair(store, open_pairs(shapes), ExtractSpec(device="cpu"))
    assert tree(store) == files


# Refused


@pytest.mark.parametrize("folder", ["tiny-bert", "elsewhere"])
def test_another_encoder_is_refused_before_anything_is_un_committed(
    grown: Grown,
    tmp_path: Path,
    other_text_encoder: Path,
    folder: str,
) -> None:
    """Under the same name and under another."""
    hit(grown, f"features.zarr/{TEXT}/features/c.0.0")
    files = tree(grown.store)
    other = shutil.copytree(other_text_encoder, tmp_path / folder)
    with pytest.raises(MismatchError, match="weights") as caught:
        mend(grown, ExtractSpec(text=parse_encoder(f"hf:{other}", "text"), device="cpu"))
    assert caught.value.exit_code == 4
    assert [field for field, *_ in caught.value.differences] == ["weights"]
    assert tree(grown.store) == files


def test_encoders_that_have_moved_are_taken_from_their_new_place(
    grown: Grown,
    tmp_path: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> None:
    files = tree(grown.store)
    hit(grown, CHUNK)
    hit(grown, f"{SEGMENT}/features.zarr/{TEXT}/features/c.0.0")
    image = shutil.copytree(tiny_image_encoder, tmp_path / "moved-vit")
    text = shutil.copytree(tiny_text_encoder, tmp_path / "moved-bert")
    spec = ExtractSpec(
        parse_encoder(f"timm:{image}", "image"),
        parse_encoder(f"hf:{text}", "text"),
        device="cpu",
    )
    assert mend(grown, spec).shards == {IMAGE: (1,), f"{SEGMENT}/{TEXT}": (0,)}
    assert tree(grown.store) == files


@pytest.mark.parametrize("lost", [CHUNK, f"records/{IMAGE}/commits/00000001.json"])
def test_inputs_that_changed_are_quarantined_and_never_silently_other_rows(
    grown: Grown,
    tmp_path: Path,
    lost: str,
) -> None:
    """The shard has rows 5 to 9: what each image must be is known, also without the record."""
    before = FeatureStore.open(grown.store).array("image").load()
    root = Path(shutil.copytree(grown.table.parent, tmp_path / "shapes"))
    keys = FeatureStore.open(grown.store).pairs.keys
    changed = root / str(keys[6])
    shutil.copy(root / str(keys[0]), changed)
    hit(grown, lost)
    report = repair(grown.store, open_pairs(root / "pairs.tsv"), ExtractSpec(device="cpu"))
    assert report.shards == {IMAGE: (1,)}
    array = FeatureStore.open(grown.store).array("image")
    reasons = {row["row"]: row["reason"] for row in array.quarantined()}
    assert reasons == {4: "not-an-image", 6: "changed", 13: "missing"}
    after = array.load()
    before[6] = np.nan
    assert np.array_equal(after, before, equal_nan=True)


def test_a_segment_without_its_pair_table_is_not_left_out_of_what_is_served(grown: Grown) -> None:
    hit(grown, f"{SEGMENT}/records/pairs.json", "delete")
    with pytest.raises(DamagedError, match="apecache repair"):
        FeatureStore.open(grown.store)
    mend(grown)
    assert len(FeatureStore.open(grown.store).pairs.keys) == 16


def test_what_is_no_store_is_not_made_one(grown_once: Grown, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="is not a store"):
        repair(tmp_path, open_pairs(grown_once.table))
    assert tree(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("lost", ["record", "source too", "folder"])
def test_a_lost_segment_or_its_record_is_made_again(
    grown: Grown,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    lost: str,
) -> None:
    """A segment that is gone altogether is made again empty; the next extraction fills it."""
    files = tree(grown.store)
    if lost == "folder":
        shutil.rmtree(grown.store / SEGMENT)
    else:
        (grown.store / "records/segments/0001.json").unlink()
    if lost == "source too":
        (grown.store / SEGMENT / "records/source.json").unlink()
    mend(grown)
    if lost == "folder":
        with pytest.raises(IncompleteError):
            FeatureStore.open(grown.store).array("image").load()
        extract_tiny(
            grown.table,
            store=grown.store,
            image=tiny_image_encoder,
            text=tiny_text_encoder,
            max_bad=1.0,
        )
    assert tree(grown.store) == files
