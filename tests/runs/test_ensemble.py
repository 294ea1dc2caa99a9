"""Trained heads side by side: cosines are the mean, and the files are those of any head."""

from pathlib import Path

import pytest
import torch

from apecache.errors import MismatchError, OptionError
from apecache.fingerprint import Fingerprint
from apecache.heads.build import build_heads
from apecache.heads.head import HeadSpec
from apecache.runs.ensemble import ensemble_heads
from apecache.runs.heads import TrainedHeads, TrainedSide, load_heads, save_heads

PAIRS = (
    (HeadSpec(dim=4), HeadSpec()),
    (HeadSpec(kind="identity"), HeadSpec(kind="mlp", width=7)),
    (HeadSpec(kind="gated", dim=3, expansion=2), HeadSpec(standardize=False)),
)


def make(number: int, encoder: str = "vit") -> TrainedHeads:
    torch.manual_seed(number)
    heads = build_heads(*PAIRS[number], 6, 5)
    for head in heads:
        head.fit_statistics(torch.randn(20, head.in_dim) * 3 + 1)
    image, text = (
        TrainedSide(head=h.eval(), encoder={"name": n}, fingerprint=Fingerprint(fields={"w": n}))
        for h, n in zip(heads, (encoder, "bert"), strict=True)
    )
    return TrainedHeads(
        image,
        text=text,
        scale=10.0 + number,
        training={"data": "d", "splits": {"dev": "val"}, "seed": number},
    )


def cosines(heads: TrainedHeads) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(9, 6, generator=generator)
    text = torch.randn(8, 5, generator=generator)
    return heads.image.embed(image) @ heads.text.embed(text).T


def test_cosines_are_the_mean_of_the_runs_also_from_disk(tmp_path: Path) -> None:
    runs = [make(number) for number in range(3)]
    combined = ensemble_heads(runs)
    wanted = sum(cosines(run) for run in runs) / 3
    torch.testing.assert_close(cosines(combined), wanted)
    save_heads(combined, tmp_path / "run")
    loaded = load_heads(tmp_path / "run")
    torch.testing.assert_close(cosines(loaded), wanted)
    assert loaded.digest == combined.digest
    assert loaded.scale == 11
    assert loaded.training["splits"] == {"dev": "val"}
    assert [training["seed"] for training in loaded.training["combined"]] == [0, 1, 2]


def test_a_combination_can_be_combined_again() -> None:
    runs = [make(number) for number in range(3)]
    again = ensemble_heads([ensemble_heads(runs[:2]), runs[2]])
    torch.testing.assert_close(cosines(again), sum(cosines(run) for run in runs) / 3)


def test_runs_of_other_encoders_and_single_runs_are_refused() -> None:
    with pytest.raises(MismatchError, match="run 2: its image head is not of the encoder"):
        ensemble_heads([make(0), make(1, encoder="resnet")])
    with pytest.raises(OptionError, match="give at least two to combine"):
        ensemble_heads([make(0)])
