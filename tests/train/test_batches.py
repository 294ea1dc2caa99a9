"""Batches and splits: who trains, who chooses, and which caption goes with which image."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from apecache.device import CPU
from apecache.errors import IncompleteError, RecipeError
from apecache.store.array import FeatureArray
from apecache.store.reader import FeatureStore
from apecache.store.table import PairTable
from apecache.train import batches as train_batches
from apecache.train.batches import (
    FeaturePairs,
    SplitSpec,
    batches,
    choose_splits,
    join_groups,
)
from apecache.train.paired_rows import Features, select_pairs
from apecache.train.resident import load_rows


def numbered(counts: list[int]) -> FeaturePairs:
    """Image i is [i]; its caption c is [i, c]."""
    owners = [(image, caption) for image, count in enumerate(counts) for caption in range(count)]
    first = torch.tensor([0, *np.cumsum(counts)])
    return FeaturePairs(
        image=torch.arange(len(counts)).unsqueeze(1),
        text=torch.tensor(owners),
        first_text=first,
    )


def epoch(
    pairs: FeaturePairs,
    batch_size: int,
    generator: torch.Generator,
) -> list[tuple[Any, Any]]:
    return [
        (b.image.flatten().tolist(), b.text.tolist()) for b in batches(pairs, batch_size, generator)
    ]


def load_all(array: FeatureArray) -> Features:
    """Every row of an array, in order."""
    return load_rows(array, [np.arange(array.rows)], CPU)[0]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- batches --------------------------------------------------------------------------------------

COUNTS = st.lists(st.integers(1, 4), min_size=2, max_size=20)


@settings(deadline=None, max_examples=60)
@given(counts=COUNTS, batch_size=st.integers(2, 25), seed=st.integers(0, 2**31))
def test_in_an_epoch_every_image_comes_at_most_once_with_a_caption_of_its_own(
    counts: list[int],
    batch_size: int,
    seed: int,
) -> None:
    made = epoch(numbered(counts), batch_size, seeded(seed))
    size = min(batch_size, len(counts))
    assert [len(image) for image, _ in made] == [size] * (len(counts) // size)
    images = [row for image, _ in made for row in image]
    assert len(set(images)) == len(images)
    for image, text in made:
        assert [owner for owner, _ in text] == image
        assert all(caption < counts[owner] for owner, caption in text)


def test_over_many_epochs_all_captions_and_all_images_come_about_equally_often() -> None:
    counts = [1, 2, 5, 3, 4, 2, 5]
    n_epochs = 3000
    pairs = numbered(counts)
    generator = seeded(0)
    seen: dict[tuple[int, int], int] = {}
    for _ in range(n_epochs):
        for _, text in epoch(pairs, 3, generator):
            for owner, caption in text:
                seen[owner, caption] = seen.get((owner, caption), 0) + 1
    assert len(seen) == sum(counts)
    share_of_images = 6 / 7  # batches of 3 leave one of the seven out, another one in each epoch
    for (owner, _), count in seen.items():
        expected = n_epochs * share_of_images / counts[owner]
        assert abs(count - expected) < 5 * expected**0.5


def test_a_seed_gives_the_same_batches_and_another_seed_others() -> None:
    pairs = numbered([2] * 12)
    runs = [
        [epoch(pairs, 4, generator) for _ in range(2)]
        for generator in (seeded(1), seeded(1), seeded(2))
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0][0] != runs[0][1]


@given(COUNTS)
@settings(deadline=None, max_examples=20)
def test_each_text_knows_the_row_of_its_image(counts: list[int]) -> None:
    pairs = numbered(counts)
    assert pairs.image_of_text.tolist() == pairs.text[:, 0].tolist()


# --- which rows are used --------------------------------------------------------------------------


@st.composite
def tables(draw: st.DrawFn) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """(image of each text in any order, images to keep, usable texts); images without a text
    occur."""
    n_images = draw(st.integers(1, 8))
    rows = draw(st.lists(st.integers(0, n_images - 1), min_size=1, max_size=16))
    keep = draw(st.lists(st.booleans(), min_size=n_images, max_size=n_images))
    usable = draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    return np.array(rows, np.int64), np.array(keep), np.array(usable)


@settings(deadline=None, max_examples=80)
@given(tables())
def test_selected_are_exactly_the_kept_images_with_their_usable_captions(
    table: tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]],
) -> None:
    rows, keep, usable = table
    image = torch.arange(len(keep)).unsqueeze(1)
    text = torch.tensor([[owner, row] for row, owner in enumerate(rows)])
    wanted = {
        i: [t for t, owner in enumerate(rows) if owner == i and usable[t]]
        for i in range(len(keep))
        if keep[i]
    }  # by definition
    wanted = {i: texts for i, texts in wanted.items() if texts}
    assume(wanted)
    chosen = select_pairs(
        Features(image),
        text=Features(text),
        image_rows=rows,
        keep_images=keep,
        ok_texts=usable,
    )
    assert chosen.image.flatten().tolist() == list(wanted)
    assert chosen.text[:, 0].tolist() == [i for i, texts in wanted.items() for _ in texts]
    assert chosen.text[:, 1].tolist() == [t for texts in wanted.values() for t in texts]
    assert chosen.first_text.diff().tolist() == [len(texts) for texts in wanted.values()]
    assert chosen.image.flatten()[chosen.image_of_text].tolist() == chosen.text[:, 0].tolist()


def test_quarantined_images_and_texts_never_stand_in_a_batch(
    write_store: Any,
    tmp_path: Path,
) -> None:
    image = np.arange(30, dtype=np.float32).repeat(2).reshape(30, 2)
    text = np.arange(60, dtype=np.float32).repeat(2).reshape(60, 2)
    rows = [i // 2 for i in range(60)]
    bad_images = (0, 17)
    bad_texts = (3, 10, 11, 58)
    store = write_store(
        tmp_path / "s",
        image,
        text,
        rows,
        [""] * 30,
        bad_images=bad_images,
        bad_texts=bad_texts,
        shard_rows=7,
    )
    arrays = store.array("image"), store.array("text")
    features = [load_all(array) for array in arrays]
    ok_images, ok_texts = (array.load_ok() for array in arrays)
    pairs = select_pairs(
        features[0],
        text=features[1],
        image_rows=store.pairs.image_rows,
        keep_images=ok_images,
        ok_texts=ok_texts,
    )
    assert len(pairs) == 27  # of 30: two images are bad, and both captions of image 5 are
    seen = {
        (int(image), int(text))
        for seed in range(60)
        for batch in batches(pairs, 9, seeded(seed))
        for image, text in zip(batch.image[:, 0], batch.text[:, 0], strict=True)
    }
    assert seen == {
        (t // 2, t) for t in range(60) if t // 2 not in bad_images and t not in bad_texts
    }


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_features_are_loaded_as_they_are_stored(
    dtype: str,
    write_store: Any,
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(20, 3)).astype(dtype)
    text = rng.normal(size=(20, 4)).astype(dtype)
    store = write_store(
        tmp_path / "s",
        image,
        text,
        list(range(20)),
        [""] * 20,
        bad_images=(4,),
        shard_rows=6,
    )
    loaded = load_all(store.array("image")).values
    assert str(loaded.dtype) == f"torch.{dtype}"
    assert torch.isnan(loaded[4]).all()
    image[4] = np.nan
    np.testing.assert_array_equal(loaded.numpy(), image)


def test_features_that_are_not_complete_are_not_loaded(write_store: Any, tmp_path: Path) -> None:
    features = np.zeros((40, 2), np.float32)
    store = write_store(
        tmp_path / "s",
        features,
        features,
        list(range(40)),
        [""] * 40,
        shard_rows=10,
        n_shards=3,
    )
    with pytest.raises(IncompleteError, match="image/pixels is 75% done; resume with"):
        load_all(store.array("image"))


# --- splits ---------------------------------------------------------------------------------------


def table_of(splits: list[str]) -> PairTable:
    blank = np.array([""] * len(splits), object)
    return PairTable(
        keys=blank,
        splits=np.array(splits, object),
        labels=blank,
        captions=blank,
        languages=blank,
        image_rows=np.arange(len(splits)),
        digest="digest",
    )


@settings(deadline=None, max_examples=40)
@given(
    n_train=st.integers(10, 400),
    n_val=st.integers(0, 30),
    dev_images=st.integers(1, 60),
    seed=st.integers(0, 10**6),
)
def test_a_drawn_dev_split_is_a_share_of_train_that_never_trains(
    n_train: int,
    n_val: int,
    dev_images: int,
    seed: int,
) -> None:
    splits = ["train"] * n_train + ["val"] * n_val
    train, dev = choose_splits(table_of(splits), SplitSpec(dev_images=dev_images, seed=seed))
    assert not (train & dev).any()
    assert ((train | dev) == (np.array(splits) == "train")).all()
    assert dev.sum() == min(dev_images, n_train // 10)


def test_the_seed_alone_decides_who_is_dev() -> None:
    table = table_of(["train"] * 200)
    draws = [choose_splits(table, SplitSpec(dev_images=20, seed=seed))[1] for seed in (0, 0, 1)]
    assert (draws[0] == draws[1]).all()
    assert (draws[0] != draws[2]).any()


def test_a_drawn_dev_split_takes_all_copies_of_an_image_or_none() -> None:
    table = table_of(["train"] * 60)
    copies = np.arange(60)
    copies[30:] -= 30  # every image stands twice
    for seed in range(20):
        train, dev = choose_splits(table, SplitSpec(dev_images=6, seed=seed), copies)
        assert dev.sum() == 6
        assert not set(copies[dev]) & set(copies[train])


def test_where_no_images_are_equal_the_dev_split_is_drawn_as_without_their_content() -> None:
    table = table_of(["train"] * 60)
    spec = SplitSpec(dev_images=6, seed=3)
    for mask, same in zip(
        choose_splits(table, spec),
        choose_splits(table, spec, np.arange(60)),
        strict=True,
    ):
        assert (mask == same).all()


def test_a_named_dev_split_leaves_all_of_train_to_training() -> None:
    splits = np.array(["val", "train", "train", "test", "val"])
    train, dev = choose_splits(table_of(list(splits)), SplitSpec(dev="val"))
    assert (train == (splits == "train")).all()
    assert (dev == (splits == "val")).all()


@pytest.mark.parametrize("splits", [[""] * 30, ["everything"] * 30], ids=["unnamed", "named"])
def test_the_only_split_there_is_trains_without_being_named(splits: list[str]) -> None:
    train, dev = choose_splits(table_of(splits), SplitSpec(dev_images=2))
    assert (train.sum(), dev.sum()) == (28, 2)


@pytest.mark.parametrize(
    ("splits", "spec", "message"),
    [
        (["train"] * 30, SplitSpec(dev="train"), "--dev-split train is the training split"),
        (
            ["a"] * 20 + ["b"] * 20,
            SplitSpec(train="b", dev="b"),
            "--dev-split b is the training split",
        ),
        ([""] * 30, SplitSpec(dev=""), "is the training split"),
        (
            ["train"] * 9,
            SplitSpec(),
            "no dev split possible: 9 training images; give --dev-split or at least 10",
        ),
        (
            ["training"] * 3 + ["val"] * 2 + [""],
            SplitSpec(),
            r"no split 'train' in the store; found: training \(3 images\), val \(2 images\), "
            r"\(none\) \(1 image\); "
            "did you mean training",
        ),
        (
            ["train"] * 30 + ["val"],
            SplitSpec(dev="vall"),
            r"no split 'vall' .*; did you mean val\?",
        ),
        (
            ["train"] * 30,
            SplitSpec(train="xyz"),
            r"no split 'xyz' in the store; found: train \(30 images\)$",
        ),
    ],
)
def test_splits_that_cannot_work_are_refused(
    splits: list[str],
    spec: SplitSpec,
    message: str,
) -> None:
    with pytest.raises(RecipeError, match=message):
        choose_splits(table_of(splits), spec)


# --- several captions, views, tokens, equal images, streams ---------------------------------------


@settings(deadline=None, max_examples=40)
@given(counts=COUNTS, captions=st.integers(2, 5), seed=st.integers(0, 2**31))
def test_several_captions_of_an_image_are_different_ones_while_it_has_them(
    counts: list[int],
    captions: int,
    seed: int,
) -> None:
    for batch in batches(numbered(counts), batch_size=4, generator=seeded(seed), captions=captions):
        assert batch.groups is not None
        assert batch.groups.text.tolist() == [
            row for row in batch.groups.image.tolist() for _ in range(captions)
        ]
        drawn = batch.text.view(len(batch.image), captions, 2)
        for image, own in zip(batch.image.flatten().tolist(), drawn.tolist(), strict=True):
            assert {owner for owner, _ in own} == {image}
            assert len({caption for _, caption in own}) == min(captions, counts[image])


def test_all_captions_come_about_equally_often_where_several_are_drawn() -> None:
    seen = torch.zeros(5)
    generator = seeded(0)
    for _ in range(500):
        for batch in batches(numbered([5, 5]), batch_size=2, generator=generator, captions=2):
            seen += torch.bincount(batch.text[:, 1], minlength=5)
    assert (seen - 400).abs().max() < 80


def test_images_of_equal_content_are_of_one_group() -> None:
    pairs = replace(numbered([1] * 6), content=torch.tensor([3, 9, 3, 4, 5, 6]))
    for batch in batches(pairs, 6, seeded(0)):
        assert batch.groups is not None
        same = batch.groups.image.unsqueeze(1) == batch.groups.image
        rows = batch.image.flatten()
        twins = torch.isin(rows, torch.tensor([0, 2]))
        assert torch.equal(same, torch.eye(6, dtype=torch.bool) | (twins.unsqueeze(1) & twins))
        assert torch.equal(batch.groups.text, batch.groups.image)
    apart = replace(pairs, content=torch.arange(6))
    assert all(batch.groups is None for batch in batches(apart, 3, seeded(0)))


def closure_by_definition(captions: list[list[int]], content: list[int]) -> list[list[bool]]:
    """[n][n]: whether a chain of equal images and of images with an equal caption leads from one to
    the other."""
    n = len(content)
    linked = [
        [content[i] == content[j] or bool(set(captions[i]) & set(captions[j])) for j in range(n)]
        for i in range(n)
    ]
    for between in range(n):
        for i in range(n):
            for j in range(n):
                linked[i][j] = linked[i][j] or (linked[i][between] and linked[between][j])
    return linked


@settings(deadline=None, max_examples=60)
@given(
    counts=COUNTS,
    captions=st.integers(1, 3),
    few=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
def test_images_whose_drawn_captions_are_equal_are_of_one_group(
    counts: list[int],
    captions: int,
    few: int,
    seed: int,
) -> None:
    pairs = numbered(counts)
    ids = torch.randint(0, few * 2, (len(pairs.text),), generator=seeded(seed))
    content = torch.randint(0, few * 4, (len(pairs),), generator=seeded(seed + 1))
    pairs = replace(pairs, caption_ids=ids, content=content)
    first = pairs.first_text
    for batch in batches(pairs, batch_size=8, generator=seeded(seed), captions=captions):
        drawn = batch.text.view(len(batch.image), captions, 2)
        equal = [
            [int(ids[first[image] + caption]) for image, caption in own] for own in drawn.tolist()
        ]
        linked = closure_by_definition(equal, content[batch.image.flatten()].tolist())
        alone = not any(linked[i][j] for i in range(len(linked)) for j in range(i))
        if captions == 1 and alone:
            assert batch.groups is None
            continue
        assert batch.groups is not None
        same = batch.groups.image.unsqueeze(1) == batch.groups.image
        assert same.tolist() == linked
        assert torch.equal(batch.groups.text, batch.groups.image.repeat_interleave(captions))


def test_a_long_chain_of_shared_captions_is_one_group() -> None:
    links = torch.arange(200)
    ids = torch.stack([links, links + 1], dim=1)[torch.randperm(200, generator=seeded(0))]
    assert join_groups(torch.arange(200), ids).unique().tolist() == [0]


def test_captions_that_no_two_images_share_cost_nothing() -> None:
    """An image may have one caption twice: its captions are of one group anyway."""
    features = Features(torch.arange(3).unsqueeze(1)), Features(torch.arange(4).unsqueeze(1))
    rows = np.array([0, 0, 1, 2])
    all_images = np.ones(3, bool)
    all_texts = np.ones(4, bool)
    alone = select_pairs(*features, rows, all_images, all_texts, caption_ids=np.array([0, 0, 1, 2]))
    assert (alone.caption_ids, alone.relevance) == (None, None)
    shared = select_pairs(
        *features,
        rows,
        all_images,
        all_texts,
        caption_ids=np.array([0, 1, 1, 2]),
    )
    assert shared.caption_ids is not None
    assert shared.relevance is not None
    without_first = np.array([False, True, True])
    assert (
        select_pairs(
            *features,
            rows,
            without_first,
            all_texts,
            caption_ids=np.array([0, 1, 1, 2]),
        ).relevance
        is None
    )


def test_of_several_views_a_random_one_stands_in_the_batch() -> None:
    views = torch.arange(4).view(4, 1, 1) * 10 + torch.arange(3).view(1, 3, 1)
    pairs = replace(numbered([2] * 4), image=views, image_views=True)
    seen: dict[int, int] = {}
    generator = seeded(0)
    for _ in range(300):
        for batch in batches(pairs, 4, generator):
            assert batch.image.shape == (4, 1)
            assert (batch.image.flatten() // 10).tolist() == batch.text[:, 0].tolist()
            for value in batch.image.flatten().tolist():
                seen[value] = seen.get(value, 0) + 1
    assert len(seen) == 12
    assert all(abs(count - 100) < 50 for count in seen.values())


def test_tokens_come_with_the_mask_of_their_own_row() -> None:
    lengths = torch.tensor([2, 1, 3, 2, 1])
    tokens = torch.arange(5).view(5, 1, 1).expand(5, 3, 2)
    pairs = FeaturePairs(
        image=tokens,
        text=tokens,
        first_text=torch.arange(6),
        image_lengths=lengths,
        text_lengths=lengths,
    )
    for batch in batches(pairs, 5, seeded(0)):
        assert batch.image_mask is not None
        assert batch.text_mask is not None
        assert batch.image_mask.sum(1).tolist() == lengths[batch.image[:, 0, 0]].tolist()
        assert torch.equal(batch.text_mask, batch.image_mask)


@pytest.mark.parametrize("captions", [1, 3])
@pytest.mark.parametrize("skip", [0, 1, 5])
def test_the_first_batches_can_be_left_out(captions: int, skip: int) -> None:
    pairs = numbered([3] * 20)
    whole = list(batches(pairs, batch_size=3, generator=seeded(0), captions=captions))
    rest = list(batches(pairs, batch_size=3, generator=seeded(0), captions=captions, skip=skip))
    assert len(rest) == 6 - skip
    for a, b in zip(rest, whole[skip:], strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.text, b.text)


def test_streamed_batches_are_those_of_resident_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that calls itself of another device is gathered on the host in blocks."""
    pairs = numbered([2] * 50)
    wanted = epoch(pairs, 4, seeded(0))
    calls: list[int] = []
    taken = torch.index_select

    def counted(
        source: torch.Tensor,
        dim: int,
        rows: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:
        calls.append(len(rows))
        return taken(source, dim, rows, out=out)

    monkeypatch.setattr(torch, "index_select", counted)
    monkeypatch.setattr(train_batches, "_same_place", lambda source, device: False)
    assert epoch(pairs, 4, seeded(0)) == wanted
    assert sorted(calls) == [16, 16, 32, 32]


def test_ragged_tokens_are_loaded_with_their_lengths(
    tmp_path: Path,
    write_store: Callable[..., FeatureStore],
) -> None:
    tokens = np.arange(24, dtype=np.float16).reshape(3, 4, 2)
    store = write_store(
        tmp_path / "store",
        tokens,
        tokens,
        [0, 1, 2],
        ["train"] * 3,
        text_lengths=np.array([4, 1, 2]),
    )
    patches, words = (load_all(store.array(side)) for side in ("image", "text"))  # type: ignore[arg-type]
    assert patches.lengths is None
    assert torch.equal(patches.values, torch.from_numpy(tokens))
    assert words.lengths is not None
    assert words.lengths.tolist() == [4, 1, 2]
    assert torch.equal(words.values[1, 1:], torch.zeros(3, 2, dtype=torch.float16))


@pytest.mark.parametrize("captions", [1, 3])
def test_groups_know_their_number_of_positive_pairs(captions: int) -> None:
    """Over several blocks of batches, with a batch now and then in which no two images are
    equal."""
    pairs = numbered([3] * 120)
    content = torch.arange(120)
    content[40:100] = content[40:100] // 2
    drawn = list(batches(replace(pairs, content=content), 6, seeded(0), captions))
    assert len(drawn) == 20
    for batch in drawn:
        images = batch.image.flatten()
        same = content[images].unsqueeze(1) == content[images]
        assert (batch.groups is None) == (captions == 1 and int(same.sum()) == len(images))
        if batch.groups is not None:
            assert torch.equal(batch.groups.image.unsqueeze(1) == batch.groups.image, same)
            assert batch.groups.n_pairs == len(replace(batch.groups, n_pairs=None).positives()[0])
            assert batch.groups.n_pairs == captions * int(same.sum())
