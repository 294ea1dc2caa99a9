"""Recorded steps equal those that are taken one operation at a time.

There is no GPU here: what records is a tape of torch's operations with the rules of a CUDA graph.
Nothing takes effect while it records; a replay runs the same operations on the same memory with the
same numbers, and asking a tensor for its value is an error.
"""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from populations import DEV, TRAIN, distance, losses, make, pairs, solo, together, with_tokens
from tapes import Records
from torch import Tensor

from apecache.sweeps.population import member_group as module
from apecache.sweeps.population import population as population_module
from apecache.sweeps.population.member_generators import MemberGenerators
from apecache.sweeps.population.population import train_together
from apecache.train.batches import FeaturePairs
from apecache.train.step_graph import StepGraph, recorder_of, try_to_record

CPU = torch.device("cpu")


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Iterator[Records]:
    """Steps are recorded as on a device that is not a CPU."""
    before = torch.get_num_threads()
    found = Records()
    torch.set_num_threads(1)
    monkeypatch.setattr(module, "recorder_of", lambda device: found)
    monkeypatch.setattr(population_module, "is_accelerator", lambda device: True)
    yield found
    torch.set_num_threads(before)


def cases_of(*settings: str, count: int = 3) -> list[list[str]]:
    """Members that differ in rate, decay, temperature and clipping, with a rate that changes in
    every step."""
    return [
        [
            "image.kind=mlp",
            "image.width=16",
            "schedule.epochs=4",
            "schedule.warmup=0.3",
            f"optimizer.lr={1e-3 * 1.5**i}",
            f"optimizer.weight_decay={0.05 * i}",
            f"loss.temperature={0.05 + 0.01 * i}",
            f"optimizer.clip={float(i % 2)}",
            *settings,
        ]
        for i in range(count)
    ]


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("schedule.accumulate=2",),
        ("optimizer.ema=0.9",),
        ("optimizer.kind=adam", "loss.learnable=false"),
        ("optimizer.kind=lion",),
        ("image.kind=gated", "image.depth=1"),
        ("image.norm=batch", "image.residual=false", "optimizer.eps=1e-1"),
    ],
    ids=["plain", "accumulated", "averaged", "adam", "lion", "gated", "batch norm"],
)
def test_members_whose_steps_are_replayed_equal_their_solo_runs(
    records: Records,
    settings: tuple[str, ...],
) -> None:
    cases = cases_of(*settings)
    found = together(cases)
    assert records.made >= 1
    assert records.replayed >= found[0].step - records.made
    for seed, member in enumerate(found):
        alone = solo(cases[seed], seed)
        assert member.step == alone.step
        assert distance(member, alone) < 1e-4
        assert losses(member) == pytest.approx(losses(alone), rel=1e-4)


def test_steps_on_tokens_are_replayed_with_the_masks_of_their_own_batches(records: Records) -> None:
    train = with_tokens(TRAIN)
    dev = with_tokens(DEV)
    sides = ("image.kind=freeze-align", "image.pooling=cls-and-mean", "text.kind=anchors")
    cases = cases_of(*sides)
    found = together(cases, train=train, dev=dev)
    assert records.made >= 1
    assert records.replayed >= found[0].step - records.made
    for seed, member in enumerate(found):
        alone = solo(cases[seed], seed, train, dev)
        assert distance(member, alone) < 1e-4
        assert losses(member) == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        ("optimizer.kind=sgd",),
        ("loss.kind=sigmoid",),
    ],
)
def test_what_cannot_be_recorded_is_not(records: Records, settings: tuple[str, ...]) -> None:
    cases = cases_of(*settings)
    found = together(cases)
    assert records.made == 0
    assert distance(found[2], solo(cases[2], 2)) < 1e-4


def test_steps_with_dropout_are_recorded_and_those_with_noise_are_not(records: Records) -> None:
    """Members with dropout share their masks: they end elsewhere than fits alone."""
    found = together(cases_of("image.dropout=0.2"))
    assert records.replayed > 0
    assert all(member.best.recall > 20 for member in found)
    n_replayed = records.replayed
    together(cases_of("augmentation.noise=0.1"))
    assert records.replayed == n_replayed


def test_steps_with_equal_images_are_taken_and_the_others_replayed(records: Records) -> None:
    train = pairs(160, 0)
    few = torch.arange(160).where(torch.arange(160) > 3, torch.zeros(160, dtype=torch.int64))
    train = FeaturePairs(
        image=train.image,
        text=train.text,
        first_text=train.first_text,
        content=few,
    )
    cases = cases_of("schedule.batch_size=16")
    found = together(cases, train=train)
    assert 0 < records.replayed < found[0].step - 1
    assert max(distance(member, solo(cases[i], i, train)) for i, member in enumerate(found)) < 1e-4


def test_a_member_that_leaves_makes_a_new_record(records: Records) -> None:
    cases = cases_of("schedule.patience=1", "schedule.epochs=30")
    found = together(cases)
    assert len({member.step for member in found}) > 1
    assert records.made > 1
    assert max(distance(member, solo(cases[i], i)) for i, member in enumerate(found)) < 1e-4


def test_a_device_that_refuses_is_said_and_the_steps_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nat line 3")

    monkeypatch.setattr(module, "recorder_of", lambda device: refuse)
    monkeypatch.setattr(population_module, "is_accelerator", lambda device: True)
    cases = cases_of()
    with pytest.warns(UserWarning, match="not permitted when stream is capturing$"):
        found = together(cases)
    assert max(distance(member, solo(cases[i], i)) for i, member in enumerate(found)) < 1e-4


def test_a_step_that_asks_for_a_value_is_refused_by_the_tape() -> None:
    with pytest.warns(UserWarning, match="not permitted while recording"):
        assert (
            try_to_record(
                lambda: torch.ones(2) * float(torch.ones(2).sum()),
                Records(),
            )
            is None
        )


def test_inputs_are_copied_and_outputs_are_new() -> None:
    kept = torch.zeros(3)
    graph = StepGraph(lambda inputs: kept.add_(inputs[0]).mul(2), [torch.ones(3)], Records())
    assert kept.tolist() == [0, 0, 0]
    first = graph([torch.full((3,), 2.0)])
    second = graph([torch.full((3,), 5.0)])
    assert (first.tolist(), second.tolist(), kept.tolist()) == ([4.0] * 3, [14.0] * 3, [7.0] * 3)


def test_only_cuda_records() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert recorder_of(CPU) is None
    assert recorder_of(torch.device("cuda")) is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_same_weights_with_and_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    train, dev = (
        FeaturePairs(image=p.image.to(cuda), text=p.text.to(cuda), first_text=p.first_text.to(cuda))
        for p in (TRAIN, DEV)
    )
    found = []
    for recorded in (True, False):
        if not recorded:
            monkeypatch.setattr(module, "recorder_of", lambda device: None)
        made = [make(settings, seed, train) for seed, settings in enumerate(cases_of())]
        members = [training for training, _ in made]
        for member in members:
            member.model.to(cuda)
        assert (
            train_together(
                members,
                streams=MemberGenerators.seeded([1, 2, 3], cuda),
                train=train,
                dev=dev,
                plan=made[0][1],
                n_epochs=1000,
            )
            == {}
        )
        found.append(members)
    assert max(distance(one, other) for one, other in zip(*found, strict=True)) < 1e-5
