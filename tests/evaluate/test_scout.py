"""The scout: what it draws, that cuts of one encoder share a pass, and that its features are those
of extraction."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from apecache_cli.app import app
from tiny import make_shapes
from typer.testing import CliRunner

import apecache.evaluate.scout
from apecache.data.pairs import PairSource
from apecache.data.sources import open_pairs
from apecache.data.spec import OpenSpec
from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.errors import DataError, OptionError
from apecache.evaluate.scout import ScoutSpec, draw_pairs, of_split, scout
from apecache.extraction.run import ExtractSpec, extract
from apecache.store.reader import FeatureStore


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> PairSource:
    """48 images with two captions each, one of them no image."""
    table = make_shapes(tmp_path_factory.mktemp("scout") / "shapes", copies=4)
    (table.parent / "images" / "red-square-1.png").write_bytes(b"<html>")
    return open_pairs(table)


@pytest.fixture(scope="module")
def cuts(
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> tuple[tuple[EncoderSpec, ...], tuple[EncoderSpec, ...]]:
    image = parse_encoder(f"timm:{tiny_image_encoder}", "image")
    text = parse_encoder(f"hf:{tiny_text_encoder}", "text")
    return (image, replace(image, pooling="mean", layer=1)), (text, replace(text, pooling="cls"))


def test_every_cut_meets_every_cut_best_first(
    source: PairSource,
    cuts: tuple[tuple[EncoderSpec, ...], ...],
) -> None:
    seen: list[tuple[str, int, int]] = []
    report = scout(source, ScoutSpec(*cuts, device="cpu"), lambda *about: seen.append(about))
    pairs = {(row.image, row.text) for row in report.rows}
    assert pairs == {
        (image, text)
        for image in ("tiny-vit", "tiny-vit-mean-layer1")
        for text in ("tiny-bert", "tiny-bert-cls")
    }
    recalls = [row.likeness.recall_at_1 for row in report.rows]
    assert recalls == sorted(recalls, reverse=True)
    assert (report.n_fit, report.n_measured, report.n_unreadable) == (23, 24, 1)
    assert (
        100 / 24 < report.chance < 100
    )  # captions of different images are equal, and each other's right answers
    assert [about[1:] for about in seen] == [(32, 48), (48, 48), (32, 47), (47, 47)]
    assert scout(source, ScoutSpec(*cuts, device="cpu")) == report
    assert scout(source, ScoutSpec(*cuts, device="cpu", seed=1)) != report


def test_features_are_those_of_an_extraction(
    source: PairSource,
    cuts: tuple[tuple[EncoderSpec, ...], ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    real = apecache.evaluate.scout.likeness

    def watched(
        image: torch.Tensor,
        text: torch.Tensor,
        fit: torch.Tensor,
        relevance: Any,
    ) -> object:
        found.append((image, text))
        return real(image, text=text, fit=fit, relevance=relevance)

    monkeypatch.setattr(apecache.evaluate.scout, "likeness", watched)
    scout(source, ScoutSpec(*cuts, device="cpu"))
    extract(
        source,
        tmp_path / "store",
        ExtractSpec(*cuts, storage_dtype="float32", device="cpu", max_bad=1.0),
    )
    store = FeatureStore.open(tmp_path / "store")
    keys, captions = draw_pairs(source, 1000, 0)
    bad = keys.index("images/red-square-1.png")
    image_rows = [store.pairs.row_of_key[key] for key in keys]
    words = store.pairs.captions.tolist()
    text_rows = [
        next(
            t for t in range(len(words)) if store.pairs.image_rows[t] == row and words[t] == caption
        )
        for row, caption in zip(image_rows, captions, strict=True)
    ]
    for modality, rows, place in (("image", image_rows, 0), ("text", text_rows, 1)):
        kept = [row for i, row in enumerate(rows) if i != bad]
        names = [spec.slug for spec in cuts[place]]
        for number, name in enumerate(names):
            stored = torch.from_numpy(store.array(modality, name).load()[kept])  # type: ignore[arg-type]
            made = found[2 * number][0] if place == 0 else found[number][1]
            torch.testing.assert_close(made, stored, atol=2e-5, rtol=1e-4)


def test_cuts_of_one_encoder_cost_one_pass(
    source: PairSource,
    cuts: tuple[tuple[EncoderSpec, ...], ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes = []
    real = apecache.evaluate.scout.encode_images
    monkeypatch.setattr(
        apecache.evaluate.scout,
        "encode_images",
        lambda e, batch: passes.append(len(e)) or real(e, batch),
    )
    scout(source, ScoutSpec(*cuts, device="cpu"))
    assert passes == [2, 2]


def test_a_draw_is_of_usable_captions_and_does_not_grow(source: PairSource) -> None:
    first = source.pairs[0]
    odd = replace(
        source,
        pairs=(replace(first, captions=(" ", "good"), languages=("", "")), *source.pairs[1:30]),
    )
    odd = replace(
        odd,
        pairs=(*odd.pairs, replace(first, key="none", captions=("",), languages=("",))),
    )
    keys, captions = draw_pairs(odd, 1000, 3)
    assert keys == odd.keys[:30]
    assert captions[0] == "good"
    assert len(draw_pairs(odd, 7, 3)[0]) == 7
    assert draw_pairs(odd, 7, 3) == draw_pairs(odd, 7, 3) != draw_pairs(odd, 7, 4)


def test_choosing_is_done_on_train_unless_it_is_said(source: PairSource) -> None:
    splits = {pair.split for pair in source}
    assert splits == {"train", "val"}
    assert {pair.split for pair in of_split(source, None)} == {"train"}
    assert {pair.split for pair in of_split(source, "val")} == {"val"}
    unsplit = replace(source, pairs=tuple(replace(pair, split="") for pair in source))
    assert of_split(unsplit, None) == unsplit
    with pytest.raises(DataError, match=r"no split 'vall'; found: .*did you mean val"):
        of_split(source, "vall")


def test_what_cannot_be_compared_is_refused(
    source: PairSource,
    cuts: tuple[tuple[EncoderSpec, ...], ...],
) -> None:
    images, texts = cuts
    with pytest.raises(OptionError, match="--image-cut tokens"):
        scout(source, ScoutSpec((replace(images[0], pooling="tokens"),), texts))
    with pytest.raises(OptionError, match="no text encoder"):
        scout(source, ScoutSpec(images, ()))
    with pytest.raises(DataError, match="a scout needs 24"):
        scout(source, ScoutSpec(images, texts, n_pairs=20, device="cpu"))


def test_the_command_takes_the_options_of_a_source_and_draws_the_heat_map(
    source: PairSource,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    tmp_path: Path,
) -> None:
    encoders = ["--image", f"timm:{tiny_image_encoder}", "--text", f"hf:{tiny_text_encoder}"]
    command = [
        "scout",
        source.origin,
        *encoders,
        "--text-cut",
        "default",
        "--text-cut",
        "cls",
        "--device",
        "cpu",
        "--json",
    ]
    split = ["--split-fraction", "train=.75,val=.25,seed=1"]
    result = CliRunner().invoke(app, [*command, *split, "--heat-map", str(tmp_path / "map.svg")])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert len(told["rows"]) == 2
    drawn = of_split(
        open_pairs(
            source.origin,
            OpenSpec(split_fraction=(("train", 0.75), ("val", 0.25)), split_seed=1),
        ),
        None,
    )
    assert told["n_fit"] + told["n_measured"] + told["n_unreadable"] == len(drawn) < 48
    assert "tiny-bert-cls" in (tmp_path / "map.svg").read_text(encoding="utf-8")
    refused = CliRunner().invoke(app, [*command, "--image-column", "picture"])
    assert refused.exit_code == 3
    assert "no column 'picture'" in refused.output
