"""A ready-made model beside a run: the same queries, its own embeddings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from apecache_cli.app import app
from typer.testing import CliRunner

from apecache.errors import OptionError
from apecache.evaluate.baseline import embed_baseline, load_baseline
from apecache.evaluate.embeddings import embed_store
from apecache.metrics.retrieval import retrieval_report
from apecache.runs.heads import load_heads
from apecache.store.reader import FeatureStore
from benchmarks.small_encoders import build_clip_text

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP of transformers with random weights, by its name."""
    return str(build_clip_text(tmp_path_factory.mktemp("clip")))


def test_the_baseline_answers_the_queries_of_the_run(
    clip: str,
    tiny_run: Path,
    tiny_store: Path,
) -> None:
    store = FeatureStore.open(tiny_store)
    reference = embed_store(load_heads(tiny_run), store, split="val")
    baseline = load_baseline(clip, "cpu")
    root = Path(str(store.source["root"]))
    embedded = embed_baseline(
        baseline,
        store=store,
        reference=reference,
        open_image=lambda key: str(root / key),
    )
    assert np.array_equal(embedded.image_rows, reference.image_rows)
    assert np.array_equal(embedded.text_rows, reference.text_rows)
    captions = [str(store.pairs.captions[row]) for row in embedded.text_rows]
    expected = torch.nn.functional.normalize(baseline.text.loaded.encode(captions), dim=-1)  # type: ignore[union-attr]
    assert torch.allclose(embedded.text, expected, atol=1e-5)
    assert torch.allclose(embedded.image.norm(dim=1), torch.ones(len(embedded.image)), atol=1e-5)


def test_the_command_shows_both_on_the_same_split(
    clip: str,
    tiny_run: Path,
    tiny_store: Path,
    tmp_path: Path,
) -> None:
    store = FeatureStore.open(tiny_store)
    lines = ["text\timage\tgrade", f"{store.pairs.keys[8]}#0\t{store.pairs.keys[9]}\t2"]
    (tmp_path / "more.tsv").write_text("\n".join(lines) + "\n")
    command = ["evaluate", str(tiny_run), "--store", str(tiny_store), "--baseline", clip]
    more = ["--relevance", str(tmp_path / "more.tsv"), "--json", "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, *more])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["baseline"]["name"] == clip
    for key in ("n_images", "n_texts", "chance"):
        assert report["baseline"][key] == report[key]
    assert report["baseline"]["image_to_text"] != report["image_to_text"]
    assert report["graded"]["n_pairs"] + report["graded"]["n_unknown"] == 1
    run = load_heads(tiny_run)
    embedded = embed_store(run, store, split="val")
    expected = retrieval_report(embedded.image, embedded.text, embedded.image_of_text)
    assert report["n_images"] == expected.n_images
    shown = CliRunner().invoke(app, [*command, *more[:2], "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    assert "nDCG" in shown.output


def test_a_pair_without_one_space_is_refused(tiny_text_encoder: Path) -> None:
    with pytest.raises(OptionError, match="expected open_clip:NAME/TAG or hf:ID"):
        load_baseline("timm:test_vit")
