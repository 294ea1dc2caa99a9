"""The loop around the model: row i is key i, whatever the batches, the workers and the bad rows
between."""

import shutil
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import apecache.extraction.encode_texts as texts
from apecache.data.images import load_image
from apecache.data.media import FolderMedia
from apecache.data.pairs import Pair, PairSource
from apecache.data.sources import open_pairs
from apecache.device import CPU
from apecache.encoders.encoder import BUCKETS, ImageEncoder, TextEncoder
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import parse_encoder
from apecache.extraction.encode import (
    ArrayTarget,
    EncodedShard,
    ImageJob,
    encode_or_halve,
)
from apecache.extraction.encode_texts import TextJob, caption_error
from apecache.fingerprint import content_hash
from apecache.store.layout import ArrayLayout, ArrayRecord


@pytest.fixture(scope="module")
def vit(tiny_image_encoder: Path) -> ImageEncoder:
    return load_image_encoder(parse_encoder(f"timm:{tiny_image_encoder}", "image"), "cpu")


@pytest.fixture(scope="module")
def bert(tiny_text_encoder: Path) -> TextEncoder:
    return load_text_encoder(parse_encoder(f"hf:{tiny_text_encoder}", "text"), "cpu")


def record(
    encoder: ImageEncoder | TextEncoder,
    rows: int,
    batch_size: int,
    shard_rows: int,
) -> ArrayRecord:
    layout = ArrayLayout(
        rows=rows,
        dim=encoder.dim,
        dtype="float32",
        shard_rows=shard_rows,
        batch_size=batch_size,
        threads=1,
    )
    return ArrayRecord(
        modality=encoder.spec.modality,
        name="name",
        spec=encoder.spec,
        fingerprint=encoder.fingerprint,
        layout=layout,
        metadata={},
        environment={},
        table="",
    )


def image_job(
    table: Path,
    encoder: ImageEncoder,
    batch: int,
    shard_rows: int = 5,
    workers: int = 2,
) -> ImageJob:
    source = open_pairs(table)
    return ImageJob(
        source=source,
        targets=(
            ArrayTarget(
                encoder=encoder,
                record=record(encoder, rows=len(source), batch_size=batch, shard_rows=shard_rows),
            ),
        ),
        workers=workers,
    )


def text_job(
    captions: Sequence[str],
    encoder: TextEncoder,
    batch: int,
    shard_rows: int = 5,
) -> TextJob:
    halves = [tuple(captions[:3]), tuple(captions[3:])]
    source = PairSource(
        tuple(
            Pair(key=f"{i}.png", captions=texts, languages=("",) * len(texts))
            for i, texts in enumerate(halves)
        )
    )
    return TextJob(
        source=source,
        targets=(
            ArrayTarget(
                encoder=encoder,
                record=record(encoder, rows=len(captions), batch_size=batch, shard_rows=shard_rows),
            ),
        ),
    )


def run(job: ImageJob | TextJob) -> list[EncodedShard]:
    return list(job.shards(range(job.layout.n_shards), lambda n: None))


def features(job: ImageJob | TextJob) -> NDArray[np.float32]:
    return np.concatenate([shard.features[0] for shard in run(job)])


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(1) / norms, np.float32)


# Images


@pytest.fixture(scope="module")
def one_by_one(shapes_once: Path, vit: ImageEncoder) -> NDArray[np.float32]:
    """Each image of the table alone, through the encoder and nothing else."""
    images = [
        load_image(key, FolderMedia(root=shapes_once.parent)).image
        for key in open_pairs(shapes_once).keys
    ]
    return np.concatenate([vit.encode(vit.preprocess(image)[None]).numpy() for image in images])


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("shard_rows", [5, 100])
def test_row_i_is_image_i_whatever_the_batch(
    shapes_once: Path,
    vit: ImageEncoder,
    one_by_one: NDArray[np.float32],
    batch: int,
    shard_rows: int,
) -> None:
    shards = run(image_job(shapes_once, encoder=vit, batch=batch, shard_rows=shard_rows))
    found = np.concatenate([shard.features[0] for shard in shards])
    assert found.shape == one_by_one.shape == (12, 64)
    assert cosines(found, one_by_one).min() > 0.99999
    others = cosines(found, np.roll(one_by_one, 1, 0))
    assert others.max() < 0.9999  # the images differ enough for a swap to show
    keys = open_pairs(shapes_once).keys
    contents = [content_hash((shapes_once.parent / key).read_bytes()) for key in keys]
    assert [content for shard in shards for content in shard.content] == contents
    assert [shard.bad for shard in shards] == [{}] * len(shards)


def test_any_number_of_workers_gives_the_same_bits(shapes_once: Path, vit: ImageEncoder) -> None:
    once = features(image_job(shapes_once, vit, 4, workers=1))
    for workers in (2, 8):
        assert features(image_job(shapes_once, vit, 4, workers=workers)).tobytes() == once.tobytes()


def test_any_shards_in_any_order_give_the_same_bits(shapes_once: Path, vit: ImageEncoder) -> None:
    job = image_job(shapes_once, vit, 4)
    whole = run(job)
    assert [len(shard.features[0]) for shard in whole] == [5, 5, 2]
    for shard, index in zip(job.shards([2, 0], lambda n: None), [2, 0], strict=True):
        assert shard.features[0].tobytes() == whole[index].features[0].tobytes()
        assert shard.content == whole[index].content


def test_a_pass_computes_with_the_threads_that_its_arrays_record(
    shapes_once: Path,
    vit: ImageEncoder,
    bert: TextEncoder,
) -> None:
    threads = torch.get_num_threads()
    try:
        for job in (image_job(shapes_once, vit, 4), text_job(["a red circle"] * 6, bert, 4)):
            torch.set_num_threads(2)
            run(job)
            assert torch.get_num_threads() == job.layout.threads == 1
    finally:
        torch.set_num_threads(threads)


def test_every_batch_of_images_has_the_same_shape(shapes_once: Path, vit: ImageEncoder) -> None:
    shapes: list[tuple[int, ...]] = []

    def forward(pixels: Tensor) -> Tensor:
        shapes.append(tuple(pixels.shape))
        result: Tensor = vit.forward(pixels)
        return result

    advanced: list[int] = []
    job = image_job(shapes_once, replace(vit, forward=forward), 4)
    list(job.shards(range(3), advanced.append))
    assert shapes == [(4, 3, 32, 32)] * 5  # shards of 5, 5 and 2 rows
    assert advanced == [4, 1, 4, 1, 2]


@pytest.fixture
def broken(shapes_once: Path, tmp_path: Path) -> Path:
    """The table of shapes with images 0, 4, 6, 7 and 11 broken."""
    shutil.copytree(shapes_once.parent, tmp_path / "broken")
    table = tmp_path / "broken" / "pairs.tsv"
    paths = [table.parent / key for key in open_pairs(table).keys]
    paths[0].unlink()
    paths[4].write_bytes(b"")
    paths[6].write_bytes(paths[6].read_bytes()[:80])
    paths[7].write_bytes(b"<html>")
    paths[11].unlink()
    paths[11].mkdir()
    return table


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_bad_images_leave_their_neighbors_bits_unchanged(
    shapes_once: Path,
    broken: Path,
    vit: ImageEncoder,
    batch: int,
) -> None:
    whole = features(image_job(shapes_once, vit, batch))
    shards = run(image_job(broken, vit, batch))
    bad = {
        5 * i + row: error.reason
        for i, shard in enumerate(shards)
        for row, error in shard.bad.items()
    }
    assert bad == {0: "missing", 4: "empty", 6: "truncated", 7: "not-an-image", 11: "not-a-file"}
    good = [row for row in range(12) if row not in bad]
    found = np.concatenate([shard.features[0] for shard in shards])
    assert found[good].tobytes() == whole[good].tobytes()
    contents = [content for shard in shards for content in shard.content]
    assert [row for row, content in enumerate(contents) if not content] == sorted(bad)


def test_a_shard_of_nothing_but_bad_images_is_encoded_too(broken: Path, vit: ImageEncoder) -> None:
    for path in (broken.parent / "images").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for shard in run(image_job(broken, vit, 4)):
        assert sorted(shard.bad) == list(range(len(shard.features[0])))
        assert np.isfinite(shard.features[0]).all()


def test_keys_are_those_of_the_rows(
    shapes_once: Path,
    vit: ImageEncoder,
    bert: TextEncoder,
) -> None:
    source = open_pairs(shapes_once)
    image = image_job(shapes_once, vit, 4)
    assert [image.key(row) for row in range(12)] == source.keys
    text = TextJob(
        source=source,
        targets=(
            ArrayTarget(encoder=bert, record=record(bert, rows=24, batch_size=4, shard_rows=5)),
        ),
    )
    assert [text.key(row) for row in range(24)] == [key for key in source.keys for _ in range(2)]


def test_stopping_between_shards_leaves_no_decoding_thread(
    shapes_once: Path,
    vit: ImageEncoder,
) -> None:
    before = threading.active_count()
    shards = image_job(shapes_once, vit, 1, workers=4).shards(range(3), lambda n: None)
    next(shards)
    shards.close()  # type: ignore[attr-defined]
    assert threading.active_count() <= before


# Captions

CAPTIONS = [
    "a red circle",
    "the",
    "a drawing of the blue square in white on the photo of a triangle in the red",
    "a photo",
    "the yellow triangle in white",
    "a green square",
    "of",
    "a shape in the photo of shapes",
    "white",
    "a blue circle in white",
    "the the the the the the",
    "a",
]


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("shard_rows", [5, 100])
def test_row_i_is_caption_i_whatever_the_batch(
    bert: TextEncoder,
    batch: int,
    shard_rows: int,
) -> None:
    shards = run(text_job(CAPTIONS, encoder=bert, batch=batch, shard_rows=shard_rows))
    found = np.concatenate([shard.features[0] for shard in shards])
    expected = np.concatenate([bert.encode([caption]).numpy() for caption in CAPTIONS])
    assert cosines(found, expected).min() > 0.99999
    assert cosines(found, np.roll(expected, 1, 0)).max() < 0.9999
    assert [content for shard in shards for content in shard.content] == [
        content_hash(text) for text in CAPTIONS
    ]
    assert sum(shard.n_truncated for shard in shards) == 1  # the third


def test_captions_are_batched_by_length_inside_their_shard(bert: TextEncoder) -> None:
    lengths: list[list[int]] = []

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        lengths.append(mask.sum(1).tolist())
        result: Tensor = bert.forward(ids, mask)
        return result

    advanced: list[int] = []
    job = text_job(CAPTIONS, encoder=replace(bert, forward=forward), batch=2, shard_rows=6)
    list(job.shards(range(2), advanced.append))
    assert [len(batch) for batch in lengths] == [n for n in advanced if n] == [2] * 6
    for shard in (lengths[:3], lengths[3:]):
        flat = [length for batch in shard for length in batch]
        assert flat == sorted(flat)
    assert max(lengths[2]) > max(lengths[3])  # not sorted across shards


def in_tokens(job: TextJob, tokens: int, compiled: bool = False) -> TextJob:
    """Return the job with batches of so many tokens."""
    (target,) = job.targets
    layout = replace(target.record.layout, batch_tokens=tokens, compiled=compiled)
    record = replace(target.record, layout=layout)
    return replace(job, targets=(replace(target, record=record),))


@pytest.mark.parametrize("tokens", [1, 30, 10_000])
def test_a_batch_has_as_many_captions_as_its_tokens_allow(bert: TextEncoder, tokens: int) -> None:
    shapes: list[tuple[int, ...]] = []

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        shapes.append(tuple(ids.shape))
        result: Tensor = bert.forward(ids, mask)
        return result

    counted = replace(bert, forward=forward)
    job = in_tokens(text_job(CAPTIONS, counted, 64, shard_rows=12), tokens)
    found = features(job)
    assert sum(count for count, _ in shapes) == 12
    # A caption that is longer than the budget is a batch of its own.
    assert all(count * length <= tokens or count == 1 for count, length in shapes)
    lengths = sorted(len(ids) for ids in bert.tokenize(CAPTIONS).ids)
    n_taken = 0
    for count, length in shapes:
        n_taken += count
        # No batch could have taken the next caption as well.
        assert n_taken == 12 or (count + 1) * lengths[n_taken] > tokens
        assert length == lengths[n_taken - 1]
    assert cosines(found, features(text_job(CAPTIONS, bert, 1))).min() > 0.99999


def test_batches_in_tokens_are_the_same_bits_in_any_order_of_shards(bert: TextEncoder) -> None:
    job = in_tokens(text_job(CAPTIONS, bert, 64), 40)
    forward = list(job.shards([0, 1, 2], lambda n: None))
    backward = list(job.shards([2, 1, 0], lambda n: None))[::-1]
    for first, second in zip(forward, backward, strict=True):
        assert first.features[0].tobytes() == second.features[0].tobytes()


def test_compiled_batches_have_one_shape_for_each_length(
    bert: TextEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Texts are padded to a few lengths, and batches are filled up to one size for each."""
    shapes: list[tuple[int, int]] = []

    def compile_texts(encoders: Sequence[TextEncoder]) -> Any:
        def encode(ids: Sequence[Sequence[int]], length: int) -> list[Tensor]:
            shapes.append((len(ids), length))
            assert all(ids)
            return [encoders[0].encode_ids([*ids, [1] * length])[:-1]]

        return encode

    monkeypatch.setattr(texts, "compile_texts", compile_texts)
    captions = [CAPTIONS[0]] * 9 + list(CAPTIONS[9:])
    job = in_tokens(text_job(captions, bert, 5), 96, compiled=True)
    found = features(job)
    sizes: dict[int, set[int]] = {}
    for size, length in shapes:
        sizes.setdefault(length, set()).add(size)
        assert length in BUCKETS or length == bert.max_tokens
    assert all(len(of_length) == 1 for of_length in sizes.values())
    assert all(max(of_length) * length <= 96 for length, of_length in sizes.items())
    assert cosines(found, features(text_job(captions, bert, 1))).min() > 0.99999


def test_captions_that_cannot_be_encoded_are_named_and_the_others_keep_their_rows(
    bert: TextEncoder,
) -> None:
    bad = {
        0: ("", "empty"),
        3: (" \t\n", "empty"),
        4: ("a red \ud800", "not-unicode"),
        10: ("", "empty"),
    }
    captions = [bad[row][0] if row in bad else caption for row, caption in enumerate(CAPTIONS)]
    advanced: list[int] = []
    job = text_job(captions, bert, 7)
    shards = list(job.shards(range(3), advanced.append))
    found = {
        5 * i + row: error.reason
        for i, shard in enumerate(shards)
        for row, error in shard.bad.items()
    }
    assert found == {row: reason for row, (_, reason) in bad.items()}
    assert sum(advanced) == 12
    good = [row for row in range(12) if row not in bad]
    rows = np.concatenate([shard.features[0] for shard in shards])
    assert cosines(rows[good], features(text_job(CAPTIONS, bert, 7))[good]).min() > 0.99999
    assert [content for shard in shards for content in shard.content] == [
        content_hash(text) for text in captions
    ]


def test_a_shard_of_nothing_but_bad_captions_is_encoded_too(bert: TextEncoder) -> None:
    (shard,) = run(text_job([""] * 4, bert, 2))
    assert sorted(shard.bad) == [0, 1, 2, 3]
    assert shard.features[0].shape == (4, 32)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" ", "empty"),
        ("\n\t\u3000\xa0", "empty"),
        ("\ud83d", "not-unicode"),
        ("a\udc00b", "not-unicode"),
        ("a", None),
        ("\U0001f600", None),
        ("\x00\x07", None),
        ("\u202eright to left", None),
        ("\u200b", None),
        ("漢字", None),
    ],
)
def test_only_empty_captions_and_lone_surrogates_are_refused(text: str, reason: str | None) -> None:
    error = caption_error(text)
    assert (error.reason if error else None) == reason


# Running out of memory


class Small:
    """An encoder's `encode` on a device that holds `limit` rows; counts what it was asked for."""

    def __init__(self, encode: Any, limit: int) -> None:
        self.encode = encode
        self.limit = limit
        self.asked = [0] * 0

    def __call__(self, batch: Any) -> list[Tensor]:
        self.asked.append(len(batch))
        if len(batch) > self.limit:
            raise torch.OutOfMemoryError("made up")
        return [self.encode(batch)]


@pytest.mark.parametrize(
    ("limit", "asked"),
    [(9, [9]), (5, [9, 4, 5]), (2, [9, 4, 2, 2, 5, 2, 3, 1, 2])],
)
def test_a_batch_that_does_not_fit_is_halved_until_it_does(limit: int, asked: list[int]) -> None:
    small = Small(lambda batch: batch * 2, limit)
    batch = torch.arange(27.0).reshape(9, 3)
    (found,) = encode_or_halve(small, batch, CPU)
    assert torch.equal(found, batch * 2)
    assert small.asked == asked


class SmallMemory:
    """Encode with a memory of so many rows, which are in use as long as anything refers to them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_use = weakref.WeakSet[Tensor]()
        self.asked: list[int] = []

    def __call__(self, batch: Tensor) -> list[Tensor]:
        self.asked.append(len(batch))
        activations: list[Tensor] = []
        for row in batch:
            activations.append(self.allocate(row))
        return [torch.stack(activations)]

    def allocate(self, row: Tensor) -> Tensor:
        if len(self.in_use) == self.limit:
            raise torch.OutOfMemoryError("made up")
        activation = row * 2
        self.in_use.add(activation)
        return activation


def test_a_batch_that_failed_is_freed_before_its_halves_are_encoded() -> None:
    memory = SmallMemory(8)
    batch = torch.arange(48.0).reshape(16, 3)
    (doubled,) = encode_or_halve(memory, batch, CPU)
    assert torch.equal(doubled, batch * 2)
    assert memory.asked == [16, 8, 8]


def test_a_batch_of_token_ids_is_halved_too(bert: TextEncoder) -> None:
    ids = bert.tokenize(CAPTIONS).ids
    small = Small(bert.encode_ids, 4)
    (found,) = encode_or_halve(small, ids, CPU)
    assert torch.cosine_similarity(found, bert.encode_ids(ids)).min() > 0.99999
    assert small.asked == [12, 6, 3, 3, 6, 3, 3]


def test_one_row_that_does_not_fit_and_every_other_error_go_on(bert: TextEncoder) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="made up"):
        encode_or_halve(Small(bert.encode_ids, 0), [[2, 3], [2, 3]], CPU)

    def defect(batch: Any) -> Tensor:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        encode_or_halve(defect, [[2], [3]], CPU)


def test_jobs_halve_and_keep_their_rows(
    shapes_once: Path,
    vit: ImageEncoder,
    bert: TextEncoder,
    one_by_one: NDArray[np.float32],
) -> None:
    image = Small(vit.forward, 2)
    found = features(
        image_job(shapes_once, replace(vit, forward=lambda pixels: image(pixels)[0]), 7)
    )
    assert cosines(found, one_by_one).min() > 0.99999
    assert max(image.asked) == 7

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        if len(ids) > 2:
            raise torch.OutOfMemoryError("made up")
        result: Tensor = bert.forward(ids, mask)
        return result

    found = features(text_job(CAPTIONS, replace(bert, forward=forward), 7))
    assert cosines(found, features(text_job(CAPTIONS, bert, 7))).min() > 0.99999
