"""Every family of encoders gives what its model card computes: as a folder, as a snapshot in the
hub's cache, and by hub id without a network."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, TEXTS, Family, pictures
from safetensors.torch import load_file
from torch import Tensor

from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import parse_encoder

REVISION = "0123456789abcdef0123456789abcdef01234567"
HERE = Path(__file__).parent


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name).strip("-")


def installed(family: Family) -> bool:
    return family.needs is None or find_spec(family.needs) is not None


class Models:
    """The folders of all families, built when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "home"
        self.folder = cache(self._folder)
        self.expected = cache(self._expected)
        self.from_hub = cache(self._from_hub)

    def _folder(self, name: str) -> Path:
        # No word of the family's own name, for a name says nothing.
        folder = self.root / f"model-{list(FAMILIES).index(name)}"
        folder.mkdir()
        FAMILIES[name].build(folder)
        return folder

    def repository(self, name: str) -> str:
        return f"org/m{list(FAMILIES).index(name)}"

    def snapshot(self, name: str) -> Path:
        """The same files as the hub client keeps them."""
        kept = self.home / "hub" / f"models--{self.repository(name).replace('/', '--')}"
        snapshot = kept / "snapshots" / REVISION
        if not snapshot.exists():
            shutil.copytree(self.folder(name), snapshot)
            (kept / "refs").mkdir()
            (kept / "refs" / "main").write_text(REVISION)
        return snapshot

    def _expected(self, name: str) -> Tensor:
        family = FAMILIES[name]
        inputs: Any = TEXTS if family.modality == "text" else pictures()
        return family.reference(self.folder(name), inputs)

    def _from_hub(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Encode all families by hub id in one process that is offline."""
        jobs: dict[str, Any] = {}
        for name, family in FAMILIES.items():
            if not installed(family):
                continue
            self.snapshot(name)
            prefix = "hf-hub:" if family.library in ("timm", "open_clip") else ""
            encoder = f"{family.library}:{prefix}{self.repository(name)}"
            jobs[name] = {"encoder": encoder, "modality": family.modality}
        (self.root / "jobs.json").write_text(json.dumps(jobs))
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.home),
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[2])]),
        }
        environment.pop("HF_HUB_CACHE", None)
        script = str(HERE / "encode_from_hub.py")
        subprocess.run(
            [sys.executable, script, str(self.root / "jobs.json"), str(self.root)],
            env=environment,
            stdin=subprocess.DEVNULL,
            check=True,
            timeout=3000,
        )
        digests = json.loads((self.root / "digests.json").read_text())
        return load_file(self.root / "features.safetensors"), digests


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("conformance"))


def load(family: Family, folder: Path) -> ImageEncoder | TextEncoder:
    spec = parse_encoder(f"{family.library}:{folder}", family.modality)
    is_image = family.modality == "image"
    return load_image_encoder(spec, "cpu") if is_image else load_text_encoder(spec, "cpu")


def encode(encoder: ImageEncoder | TextEncoder, batches: list[list[int]]) -> Tensor:
    """Encode the suite's inputs in batches of these rows; returns them in their own order."""
    if isinstance(encoder, TextEncoder):
        ids = encoder.tokenize(TEXTS).ids
        encoded = [encoder.encode_ids([ids[row] for row in rows]) for rows in batches]
    else:
        pixels = [encoder.preprocess(image) for image in pictures()]
        encoded = [encoder.encode(torch.stack([pixels[row] for row in rows])) for rows in batches]
    order = torch.tensor([row for rows in batches for row in rows])
    return torch.cat(encoded)[order.argsort()]


def assert_same(features: Tensor, expected: Tensor) -> None:
    """Kernels differ between batch sizes in the last bits, so the tolerance is relative too."""
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_gives_what_the_card_computes_in_any_batch(models: Models, name: str) -> None:
    family = FAMILIES[name]
    if not installed(family):
        pytest.skip(f"{family.needs} is not installed")
    encoder = load(family, models.folder(name))
    expected = models.expected(name)
    n_inputs = len(expected)
    whole = [list(range(n_inputs))]
    alone = [[row] for row in range(n_inputs)]
    backwards = [[row, row - 1] for row in range(n_inputs - 1, 0, -2)]
    backwards += [[0]] if n_inputs % 2 else []
    assert encoder.row_shape == tuple(expected.shape[1:])
    for batches in (whole, alone, backwards):
        assert_same(encode(encoder, batches), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_snapshot_and_a_hub_id_give_what_the_folder_gives(models: Models, name: str) -> None:
    family = FAMILIES[name]
    if not installed(family):
        pytest.skip(f"{family.needs} is not installed")
    folder = load(family, models.folder(name))
    snapshot = load(family, models.snapshot(name))
    assert snapshot.fingerprint == folder.fingerprint
    features, digests = models.from_hub()
    assert digests[name] == folder.fingerprint.digest
    assert_same(features[name], models.expected(name))
