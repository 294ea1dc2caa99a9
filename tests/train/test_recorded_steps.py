"""A fit whose steps are replayed ends where one ends that takes them one operation at a time.

There is no GPU here: what records is a tape of torch's operations with the rules of a CUDA graph.
"""

from typing import Any

import pytest
import torch
from populations import DEV, TRAIN, distance, losses, make, pairs, weights
from tapes import Records

from apecache.runs.checkpoint import load_checkpoint, save_checkpoint
from apecache.train import recorded_steps as module
from apecache.train.batches import FeaturePairs
from apecache.train.fit import HeadFit, seeded
from apecache.train.loop import run_training
from apecache.train.recorded_steps import RecordedSteps, can_be_recorded, recorded_steps

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {
    "plain": [],
    "dropout": ["image.kind=mlp", "image.width=16", "image.dropout=0.3"],
    "noise": ["augmentation.noise=0.1"],
    "accumulated": ["schedule.accumulate=2"],
    "averaged and clipped": ["optimizer.ema=0.9", "optimizer.clip=0.5"],
    "sigmoid": ["loss.kind=sigmoid", "loss.temperature=0.1"],
    "structure": ["loss.structure=0.5"],
    "adam": ["optimizer.kind=adam"],
}


def fitted(
    settings: list[str],
    recorder: Records | None,
    train: FeaturePairs = TRAIN,
    save: Any = lambda _: None,
    training: HeadFit | None = None,
) -> HeadFit:
    made, plan = make(["schedule.epochs=4", "schedule.warmup=0.3", *settings], 0, train)
    fit = training or made
    recorded = None if recorder is None else RecordedSteps(fit, train, plan, recorder)
    with seeded(1, CPU):
        if training is not None:
            # A restored fit has its own random states.
            fit.restore(*load_checkpoint(save.folder))
        run_training(
            fit,
            train=train,
            dev=DEV,
            plan=plan,
            log=lambda _: None,
            save=save,
            recorded=recorded,
        )
    return fit


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_replayed_steps_equal_steps_of_single_operations(settings: list[str]) -> None:
    records = Records()
    replayed = fitted(settings, records)
    alone = fitted(settings, None)
    # All but the first step, which makes the optimizer's state.
    assert (records.made, records.replayed) == (1, replayed.step - 1)
    assert replayed.step == alone.step > 4
    assert distance(replayed, alone) < 1e-5
    assert losses(replayed) == pytest.approx(losses(alone), rel=1e-4)
    assert [line["lr"] for line in replayed.history] == [line["lr"] for line in alone.history]
    terms = contrastive(alone)
    assert contrastive(replayed) == pytest.approx(terms, rel=1e-4)
    # Only where the loss has a further term; epoch 0 has no loss.
    assert len(terms) == (4 if settings == SETTINGS["structure"] else 0)
    assert all(term < loss for term, loss in zip(terms, losses(alone), strict=False))


def contrastive(training: HeadFit) -> list[float]:
    return [line["contrastive"] for line in training.history if "contrastive" in line]


def test_steps_with_equal_images_are_taken_and_the_others_replayed() -> None:
    numbers = torch.arange(160)
    content = numbers.where(numbers > 3, torch.zeros_like(numbers))
    whole = pairs(160, 0)
    train = FeaturePairs(
        image=whole.image,
        text=whole.text,
        first_text=whole.first_text,
        content=content,
    )
    records = Records()
    settings = ["schedule.batch_size=16"]
    replayed = fitted(settings, records, train)
    assert 0 < records.replayed < replayed.step - 1
    assert distance(replayed, fitted(settings, None, train)) < 1e-5


class Stop:
    """Save a checkpoint in the middle of an epoch, then stop."""

    def __init__(self, folder: Any, step: int) -> None:
        self.folder = folder
        self.step = step
        self.training: Any = None

    def __call__(self, now: bool) -> None:
        if self.training is not None and self.training.step == self.step:
            save_checkpoint(self.folder, self.training.tensors(), self.training.state())
            raise KeyboardInterrupt


def test_a_fit_that_stops_within_an_epoch_is_resumed(tmp_path: Any) -> None:
    settings = SETTINGS["dropout"]
    whole = fitted(settings, Records())
    stop = Stop(tmp_path, whole.step // 2 + 2)
    made, plan = make(["schedule.epochs=4", "schedule.warmup=0.3", *settings], 0)
    stop.training = made
    assert stop.step % plan.per_epoch != 0
    with pytest.raises(KeyboardInterrupt), seeded(1, CPU):
        run_training(
            made,
            train=TRAIN,
            dev=DEV,
            plan=plan,
            log=lambda _: None,
            save=stop,
            recorded=RecordedSteps(made, TRAIN, plan, Records()),
        )
    again, _ = make(["schedule.epochs=4", "schedule.warmup=0.3", *settings], 5)
    stop.training = None
    resumed = fitted(settings, Records(), save=stop, training=again)
    assert resumed.step == whole.step
    assert distance(resumed, whole) < 1e-5
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        ["optimizer.kind=lion"],
        ["optimizer.kind=sgd"],
        ["augmentation.mixup=0.5"],
        ["loss.captions=2"],
        ["loss.structure=0.5", "loss.structure_warmup=3"],
    ],
)
def test_what_changes_on_the_host_is_not_recorded(settings: list[str]) -> None:
    training, _ = make(settings, 0)
    assert not can_be_recorded(training, TRAIN)


def test_a_cpu_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    training, plan = make([], 0)
    assert recorded_steps(training, TRAIN, plan) is None
    monkeypatch.setattr(module, "recorder_of", lambda device: Records())
    assert recorded_steps(training, TRAIN, plan) is not None


def test_a_device_that_refuses_is_said_and_the_steps_go_on() -> None:
    def refuse(run: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
        replayed = fitted([], refuse)
    assert all(map(torch.equal, *(weights(fit).values() for fit in (replayed, fitted([], None)))))
