"""A sentence-transformers folder of both sides embeds as `apecache.load` does."""

from pathlib import Path

import numpy as np
import pytest

import apecache
from apecache.export.check import compare_exported, probe_images
from apecache.export.sentence_transformers import (
    open_sentence_transformers,
    write_sentence_transformers,
)
from apecache.export.whole_model import open_whole_model

pytest.importorskip("sentence_transformers")


def test_both_sides_in_one_folder(tiny_run: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = open_whole_model(tiny_run)
    write_sentence_transformers(model, tmp_path / "out")
    difference = compare_exported(open_sentence_transformers(tmp_path / "out"), model)
    assert difference.image is not None
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    images = probe_images()
    texts = ["a red circle", "the photo of a blue square"]
    original = apecache.load(tiny_run, device="cpu")
    assert np.abs(loaded.encode(images) - original.encode_image(images)).max() < 1e-5
    assert np.abs(loaded.encode(texts) - original.encode_text(texts)).max() < 1e-5
