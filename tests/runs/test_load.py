"""Runs of both trainers in every command: measured, classified with, searched, without asking which
they are."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from apecache_cli.app import app
from close_reports import assert_close_reports
from tiny import COLORS, SHAPES
from typer.testing import CliRunner, Result

import apecache
from apecache.data.images import load_image
from apecache.data.media import FolderMedia
from apecache.data.sources import open_pairs
from apecache.errors import BadRowsError
from apecache.evaluate import labeled
from apecache.evaluate.embeddings import OpenImage, embed_store
from apecache.evaluate.labeled import LabeledSpec, labeled_features, labeled_images
from apecache.metrics.retrieval import RetrievalReport, retrieval_report
from apecache.recipes.recipe import load_recipe
from apecache.runs.load import image_embedder, load_run, recorded_encoder, text_embedder
from apecache.search.index import build_index
from apecache.search.query import SearchIndex
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.fit_encoder import fit_encoder

NAMES = ("lit", "clip")


@pytest.fixture(scope="module")
def open_image(shapes_once: Path) -> OpenImage:
    media = FolderMedia(root=shapes_once.parent)
    return lambda key: load_image(key, media).image


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_store: Path,
    open_image: OpenImage,
) -> dict[str, tuple[Path, RetrievalReport]]:
    """LiT (images from the cache) and CLIP (both towers live), and what their training found on
    dev."""
    folder = tmp_path_factory.mktemp("encoder-runs")
    found = {}
    for name in NAMES:
        recipe = load_recipe(
            name,
            ["schedule.epochs=2", "schedule.batch_size=4", "schedule.warmup=0"],
        )
        spec = FitEncoderSpec(splits=SplitSpec(dev="val"), device="cpu")
        report = fit_encoder(
            FeatureStore.open(tiny_store),
            recipe=recipe,
            out=folder / name,
            spec=spec,
            open_image=open_image,
        )
        found[name] = (folder / name, report.dev)
    return found


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: object) -> Any:
    done = call(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_a_store_is_embedded_as_training_measured_it(
    name: str,
    runs: Any,
    tiny_store: Path,
    open_image: OpenImage,
) -> None:
    run, dev = runs[name]
    found = embed_store(
        load_run(run),
        store=FeatureStore.open(tiny_store),
        split="val",
        open_image=open_image,
    )
    served = retrieval_report(
        found.image,
        found.text,
        found.image_of_text,
        relevance=found.relevance,
    )
    assert_close_reports(served, dev)
    again = image_embedder(load_run(run).image, "cpu")(
        [open_image(f"images/{c}-{s}-0.png") for c in COLORS for s in SHAPES]
    )
    assert again.shape == (12, found.image.shape[1])


@pytest.mark.parametrize("name", NAMES)
def test_evaluate_serves_it(name: str, runs: Any, tiny_store: Path, shapes_once: Path) -> None:
    run, dev = runs[name]
    found = answer(
        "evaluate",
        run,
        "--store",
        tiny_store,
        "--root",
        shapes_once.parent,
        "--device",
        "cpu",
    )
    assert found["image_to_text"] == {str(k): round(v, 4) for k, v in dev.image_to_text.items()}
    assert found["seen_in_training"] is True
    zero = answer("evaluate", run, "--task", "zeroshot", "--labels", shapes_once, "--device", "cpu")
    assert (zero["n_images"], zero["classes"]) == (12, sorted(SHAPES))
    probe = ("--probe-train-split", "train", "--split", "train", "--device", "cpu")
    measured = answer("evaluate", run, "--task", "probe", "--labels", shapes_once, *probe)
    assert (measured["before"]["n_test"], measured["after"]["n_test"]) == (8, 8)


def test_a_probe_sees_what_training_changed(runs: Any, tiny_store: Path, shapes_once: Path) -> None:
    """Before: the encoder as it was; after: the tower as trained, not the head on the old
    features."""
    run = load_run(runs["clip"][0])
    found = labeled_features(
        run,
        LabeledSpec(open_pairs(shapes_once), tiny_store.parent / "caches", device="cpu"),
    )
    media = FolderMedia(root=shapes_once.parent)
    keys = [pair.key for pair in open_pairs(shapes_once)]
    after = image_embedder(run.image)([load_image(key, media).image for key in keys])
    torch.testing.assert_close(found.embedded, after)
    old = run.image.side.head(found.features.float())  # type: ignore[union-attr]
    assert (old - after).abs().max() > 1e-3


def test_a_trained_image_tower_encodes_labeled_images_once(
    runs: Any,
    shapes_once: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = load_run(runs["clip"][0])
    seen = list[int]()
    embed = type(run.image).embed
    monkeypatch.setattr(
        type(run.image),
        "embed",
        lambda self, x: (seen.append(len(x)), embed(self, x))[1],
    )
    monkeypatch.setattr(labeled, "extract", None)
    table = shutil.copytree(shapes_once.parent, tmp_path / "shapes") / shapes_once.name
    found = labeled_images(run, LabeledSpec(open_pairs(table), tmp_path / "caches", device="cpu"))
    assert (seen, len(found.labels), (tmp_path / "caches").exists()) == ([12], 12, False)
    (table.parent / open_pairs(table).pairs[3].key).write_bytes(b"<html>")
    with pytest.raises(BadRowsError, match="1 of 12 images cannot be read"):
        labeled_images(run, LabeledSpec(open_pairs(table), tmp_path / "caches", device="cpu"))
    less = labeled_images(
        run,
        LabeledSpec(open_pairs(table), tmp_path / "caches", device="cpu", max_bad=0.2),
    )
    assert less.labels == found.labels[:3] + found.labels[4:]
    torch.testing.assert_close(less.embedded, torch.cat([found.embedded[:3], found.embedded[4:]]))


@pytest.mark.parametrize("name", NAMES)
def test_in_use_it_gives_the_embeddings_of_the_evaluation(
    name: str,
    runs: Any,
    tiny_store: Path,
    shapes_once: Path,
    open_image: OpenImage,
) -> None:
    model = apecache.load(runs[name][0], device="cpu")
    store = FeatureStore.open(tiny_store)
    wanted = embed_store(load_run(runs[name][0]), store=store, split="val", open_image=open_image)
    image = model.encode_image(
        [shapes_once.parent / store.pairs.keys[row] for row in wanted.image_rows]
    )
    text = model.encode_text([str(store.pairs.captions[row]) for row in wanted.text_rows])
    torch.testing.assert_close(torch.from_numpy(text), wanted.text, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        torch.from_numpy(image),
        wanted.image,
        rtol=0,
        atol=2e-3 if name == "lit" else 1e-5,
    )
    assert model.dim == image.shape[1] == text.shape[1]
    assert model.scale == load_run(runs[name][0]).scale
    assert model.encode_text([]).shape == (0, model.dim)


@pytest.mark.parametrize("name", NAMES)
def test_an_index_of_it_answers_by_itself(
    name: str,
    runs: Any,
    tiny_store: Path,
    shapes_once: Path,
    open_image: OpenImage,
    tmp_path: Path,
) -> None:
    run = load_run(runs[name][0])
    store = FeatureStore.open(tiny_store)
    build_index(runs[name][0], store, tmp_path / "index", open_image=open_image)
    opened = SearchIndex.open(tmp_path / "index", device="cpu")
    everything = embed_store(run, store=store, split=None, open_image=open_image)
    query = "a red circle"
    best = (everything.image @ text_embedder(run.text, "cpu")([query])[0]).argmax()
    assert opened.search(query, 1)[0].key == store.pairs.keys[everything.image_rows[int(best)]]
    photo = shapes_once.parent / "images" / "red-circle-0.png"
    assert opened.search(str(photo), 1, "images", files=True)[0].score == pytest.approx(1, abs=1e-3)
    hits = answer("search", tmp_path / "index", query, "-k", 1, "--device", "cpu")["hits"]
    assert hits[0]["key"] == store.pairs.keys[everything.image_rows[int(best)]]


def test_a_trained_image_tower_needs_its_images(
    runs: Any,
    tiny_store: Path,
    tmp_path: Path,
    images_are_gone: None,
) -> None:
    for command in (
        ("evaluate", runs["clip"][0]),
        ("index", runs["clip"][0], "--out", tmp_path / "index"),
    ):
        refused = call(*command, "--store", tiny_store)
        assert (refused.exit_code, "needs the images" in refused.output) == (2, True)
        elsewhere = call(*command, "--store", tiny_store, "--root", tmp_path)
        assert (elsewhere.exit_code, "cannot be read" in elsewhere.output) == (3, True)


def test_combine_refuses_it(runs: Any, tiny_run: Path, tmp_path: Path) -> None:
    refused = call("ensemble", tiny_run, runs["lit"][0], "--out", tmp_path / "both")
    assert (refused.exit_code, "ensemble takes runs of fit-head only" in refused.output) == (
        3,
        True,
    )


def test_an_encoder_that_has_moved(
    runs: Any,
    tiny_store: Path,
    tiny_text_encoder: Path,
    other_text_encoder: Path,
) -> None:
    run = runs["lit"][0]
    assert recorded_encoder(run, "text").name == str(tiny_text_encoder)
    moved = ("--text", f"hf:{other_text_encoder}", "--device", "cpu")
    refused = call("evaluate", run, "--store", tiny_store, *moved)
    assert (refused.exit_code, "is not what" in refused.output) == (4, True)
    assert load_run(
        run,
        "cpu",
        text=recorded_encoder(run, "text").with_name(f"hf:{tiny_text_encoder}"),
    ).digest


def test_other_weights_are_another_identity(runs: Any, tiny_run: Path) -> None:
    digests = [load_run(run).digest for run in (runs["lit"][0], runs["clip"][0], tiny_run)]
    assert len(set(digests)) == 3
    assert load_run(runs["lit"][0]).digest == digests[0]
