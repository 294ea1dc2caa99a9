"""The packaged pretrained encoders: written as ordinary folders, and what they know."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apecache.data.images import load_image
from apecache.data.media import FolderMedia
from apecache.encoders import packaged
from apecache.encoders.encoder import TextEncoder
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.packaged import write_packaged_encoders
from apecache.encoders.spec import parse_encoder
from apecache.errors import MissingExtraError

PHOTOS = Path(__file__).parents[2] / ".." / "shared" / "data" / "clothing10"


@pytest.fixture(scope="module")
def minilm(packaged_encoders: tuple[Path, Path]) -> TextEncoder:
    return load_text_encoder(parse_encoder(f"hf:{packaged_encoders[1]}", "text"), "cpu")


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}


def test_writing_twice_writes_once(packaged_encoders: tuple[Path, Path]) -> None:
    folder = packaged_encoders[0].parent
    before = snapshot(folder)
    assert write_packaged_encoders(folder) == packaged_encoders
    assert snapshot(folder) == before


def test_an_interrupted_copy_is_not_taken_as_complete(
    packaged_encoders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image, text = packaged_encoders
    (tmp_path / image.name).mkdir()
    shutil.copy(image / "config.json", tmp_path / image.name)
    n_files = len([path for path in text.rglob("*") if path.is_file()])
    assert n_files > 1
    copy = shutil.copyfile
    for n_copied in range(n_files):
        calls = iter(range(n_copied))

        def interrupted(source: str, target: str, calls: Any = calls) -> object:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return copy(source, target)

        monkeypatch.setattr(shutil, "copyfile", interrupted)
        # The last file is written, not copied.
        if n_copied == n_files - 1:
            monkeypatch.setattr(packaged, "replace_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_packaged_encoders(tmp_path)
        monkeypatch.undo()
    write_packaged_encoders(tmp_path)
    for path in text.rglob("*"):
        if path.is_file():
            copied = tmp_path / text.name / path.relative_to(text)
            assert copied.read_bytes() == path.read_bytes()


def test_what_is_written_holds_no_pickle(packaged_encoders: tuple[Path, Path]) -> None:
    files = [path for folder in packaged_encoders for path in folder.rglob("*") if path.is_file()]
    assert [
        path for path in files if path.read_bytes()[:2] in (b"PK", b"\x80\x02")
    ] == []  # as torch.save writes
    assert packaged_encoders[0] / "model.safetensors" in files


def test_efficientnet_loads_with_its_own_preprocessing(
    packaged_encoders: tuple[Path, Path],
) -> None:
    encoder = load_image_encoder(parse_encoder(f"timm:{packaged_encoders[0]}", "image"), "cpu")
    assert (encoder.dim, encoder.input_shape) == (1280, (3, 224, 224))
    config = encoder.fingerprint.fields["inputs"]["config"]
    assert (config["mean"], config["std"], config["crop_pct"]) == ([0.5] * 3, [0.5] * 3, 0.875)
    variances = [
        value for name, value in encoder.module.state_dict().items() if name.endswith("running_var")
    ]
    assert len(variances) == 49
    assert (
        min(float(value.min()) for value in variances) >= 0
    )  # each variance came into the place of a variance


def test_minilm_loads_with_mean_pooling(minilm: TextEncoder) -> None:
    assert minilm.dim == 384
    assert minilm.fingerprint.fields["inputs"]["pooling"] == "mean"
    assert minilm.encode(["a dog"]).shape == (1, 384)


def test_minilm_puts_sentences_of_like_meaning_together(minilm: TextEncoder) -> None:
    dog, puppy, tax = torch.nn.functional.normalize(
        minilm.encode(["a dog in the snow", "a puppy playing in snow", "quarterly tax report"])
    )
    assert dog @ puppy > 0.6
    assert dog @ tax < 0.3


def test_efficientnet_puts_garments_of_one_class_together(
    packaged_encoders: tuple[Path, Path],
) -> None:
    if not PHOTOS.is_dir():
        pytest.skip(f"no photos in {PHOTOS}")
    encoder = load_image_encoder(parse_encoder(f"timm:{packaged_encoders[0]}", "image"), "cpu")
    kinds = sorted(path.name for path in (PHOTOS / "test").iterdir())
    keys = [
        f"test/{kind}/{path.name}"
        for kind in kinds[:6]
        for path in sorted((PHOTOS / "test" / kind).iterdir())[:5]
    ]
    pixels = torch.stack(
        [encoder.preprocess(load_image(key, FolderMedia(root=PHOTOS)).image) for key in keys]
    )
    features = torch.nn.functional.normalize(encoder.encode(pixels))
    nearest = (features @ features.T).fill_diagonal_(-1).argmax(1).numpy()
    labels = np.array([key.split("/")[1] for key in keys])
    assert (labels[nearest] == labels).mean() > 0.4  # chance: 0.14


def test_without_the_packages_the_extra_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packaged, "find_spec", lambda module: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'apecache\[demo\]'"):
        write_packaged_encoders(tmp_path)
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_an_encoder_that_is_there_already_is_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packaged, "find_spec", lambda module: None)  # nothing to write from
    for name in ("efficientnet-lite0", "minilm-l6"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"mine": True}))
    assert [folder.name for folder in write_packaged_encoders(tmp_path)] == [
        "efficientnet-lite0",
        "minilm-l6",
    ]
