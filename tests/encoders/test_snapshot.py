"""What is fetched of a hub repository: enough to open it, and not its copies in other formats."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, build_dense, pictures
from huggingface_hub.utils import filter_repo_objects

from apecache.encoders import snapshot
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import parse_encoder

REVISION = "0123456789abcdef0123456789abcdef01234567"
OTHER_FORMATS = (
    "onnx/model.onnx",
    "onnx/config.json",
    "openvino/openvino_model.bin",
    "tf_model.h5",
    "flax_model.msgpack",
    "rust_model.ot",
    "model.fp16.safetensors.bak",
)


class FakeHub:
    """Serve one folder under every repository's name, file by file as the patterns ask."""

    def __init__(self, served: Path, cache: Path) -> None:
        self.served = served
        self.snapshot = cache / "models--org--model" / "snapshots" / REVISION
        self.n_calls = 0

    def download(
        self,
        repository: str,
        *,
        revision: str | None,
        cache_dir: str,
        allow_patterns: list[str],
        ignore_patterns: list[str],
    ) -> str:
        assert repository == "org/model"
        self.n_calls += 1
        names = [
            str(path.relative_to(self.served)) for path in self.served.rglob("*") if path.is_file()
        ]
        for name in filter_repo_objects(
            names,
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
        ):
            (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.served / name, self.snapshot / name)
        return str(self.snapshot)


def as_bin(folder: Path) -> None:
    """Turn the weights into the older format."""
    from safetensors.torch import load_file

    for path in folder.rglob("*.safetensors"):
        name = {"open_clip_model": "open_clip_pytorch_model"}.get(path.stem, "pytorch_model")
        torch.save(load_file(path), path.with_name(f"{name}.bin"))
        path.unlink()


def nothing(folder: Path) -> None:
    """Leave the weights in their newer format."""


def load(encoder: str, family: Family) -> Any:
    spec = parse_encoder(encoder, family.modality)
    is_image = family.modality == "image"
    return load_image_encoder(spec, "cpu") if is_image else load_text_encoder(spec, "cpu")


@pytest.mark.parametrize("change", [nothing, as_bin], ids=["safetensors", "bin"])
@pytest.mark.parametrize(
    "name",
    ["bge: cls", "vit", "timm", "st: dense", "st: lasttoken", "open_clip: clip, text"],
)
def test_what_is_fetched_suffices_and_no_other_formats_are(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    change: Callable[[Path], None],
) -> None:
    family = FAMILIES[name]
    if family.needs is not None:
        pytest.importorskip(family.needs)
    served = tmp_path / "served"
    served.mkdir()
    family.build(served)
    for path in served.glob("*.bin"):
        path.unlink()
    change(served)
    expected = load(f"{family.library}:{served}", family)
    for other in OTHER_FORMATS:
        (served / other).parent.mkdir(exist_ok=True)
        (served / other).write_bytes(b"{}")
    hub = FakeHub(served, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    prefix = "hf-hub:" if family.library in ("timm", "open_clip") else ""
    encoder = load(f"{family.library}:{prefix}org/model", family)
    assert encoder.fingerprint == expected.fingerprint
    if family.modality == "text":
        assert torch.equal(encoder.encode(["a red circle"]), expected.encode(["a red circle"]))
    else:
        pixels = expected.preprocess(pictures()[0]).unsqueeze(0)
        assert torch.equal(encoder.encode(pixels), expected.encode(pixels))
    fetched = {str(path.relative_to(hub.snapshot)) for path in hub.snapshot.rglob("*")}
    assert fetched.isdisjoint(OTHER_FORMATS)
    n_calls = hub.n_calls
    load(f"{family.library}:{prefix}org/model", family)
    assert hub.n_calls == n_calls


def test_older_weights_are_fetched_only_where_there_are_no_newer_ones(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served = tmp_path / "served"
    build_dense(served)
    (served / "pytorch_model.bin").write_bytes(b"")
    (served / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    hub = FakeHub(served, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    spec = parse_encoder("hf:org/model", "text")
    from apecache.encoders.weight_files import TRANSFORMERS_WEIGHTS

    folder = snapshot.resolve_folder(spec)
    assert not list(folder.rglob("*.safetensors"))
    assert snapshot.resolve_folder(spec, TRANSFORMERS_WEIGHTS) == folder
    assert [path.name for path in folder.rglob("*.safetensors")] == ["model.safetensors"]
    assert not list(folder.rglob("*.bin"))


@pytest.mark.parametrize(
    ("encoder", "repository"),
    [
        ("hf:intfloat/e5-small", "intfloat/e5-small"),
        ("hf:{home}/models--intfloat--e5-small/snapshots/0123", "intfloat/e5-small"),
        ("hf:{home}/e5-small", None),
    ],
)
def test_the_hub_id_is_that_of_the_snapshots_folder(
    tmp_path: Path,
    encoder: str,
    repository: str | None,
) -> None:
    for name in ("models--intfloat--e5-small/snapshots/0123", "e5-small"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    spec = parse_encoder(encoder.format(home=tmp_path), "text")
    assert snapshot.repository_of(spec, spec.folder or tmp_path) == repository
