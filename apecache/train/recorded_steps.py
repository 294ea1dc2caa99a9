"""Take the steps of a fit of heads by replaying one recorded step.

On an accelerator a step of a small head is some hundred launches, which take longer than what they
compute. A recorded step is one launch. All that changes from step to step lies on the device: rows
of the batches of an epoch, learning rates, losses, and the position in the epoch, which the step
itself moves on.

Not measured on a GPU: the tests replay a record of the same operations on the CPU and on a
pretended device, under the same rules.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apecache.device import float32_products, send
from apecache.heads.head import mask_of
from apecache.losses.contrastive import Groups
from apecache.train.batches import Batch, EpochRows, FeaturePairs, draw_rows, groups_of, n_items
from apecache.train.fit import HeadFit, StepCount
from apecache.train.loop import apply_update, begin_draws, counted_step, rates_at, set_rates
from apecache.train.optim import direct_update, is_direct
from apecache.train.step_graph import Recorder, recorder_of, try_to_record


@dataclass(frozen=True, kw_only=True)
class EpochTables:
    """Hold what the recorded step reads and writes, on the device, at fixed addresses."""

    position: Tensor
    """int64 [1], number of steps of the epoch that are done."""
    images: Tensor
    """int64 [steps, accumulate, n], rows of the image features."""
    texts: Tensor
    """int64 [steps, accumulate, n * captions]."""
    rates: Tensor
    """float32 [steps, groups], learning rates."""
    losses: Tensor
    """float32 [steps]."""


def can_be_recorded(training: HeadFit, train: FeaturePairs) -> bool:
    """Check whether a step is the same operations whatever its batch is."""
    recipe = training.recipe
    is_resident = train.image.device == train.text.device == train.place
    has_views = train.image_views or train.text_views
    return (
        training.optimizer is not None
        and is_direct(training.optimizer)
        and is_resident
        and not has_views
        and recipe.loss.captions == 1
        # The coefficient of mixtures is drawn by the host, a warm-up's weight is a host's number.
        and not recipe.augmentation.mixup
        and not recipe.loss.structure_warmup
        # What others wrote may use numbers of the host, which a record would freeze.
        and "custom" not in (recipe.loss.kind, recipe.image.kind, recipe.text.kind)
    )


class RecordedSteps:
    """Replay the steps of a fit.

    Args:
        training: A fit for which `can_be_recorded` holds.
        train: Training pairs.
        plan: Steps of the fit.
        recorder: Records a step.
    """

    def __init__(
        self,
        training: HeadFit,
        train: FeaturePairs,
        plan: StepCount,
        recorder: Recorder,
    ) -> None:
        self.training = training
        self.train = train
        self.plan = plan
        self.recorder: Recorder | None = recorder
        self.replay: Callable[[], Tensor] | None = None
        schedule = training.recipe.schedule
        self.batch_size = min(schedule.batch_size, n_items(train, schedule.epoch))
        assert training.optimizer is not None
        shape = (plan.per_epoch, plan.accumulate, self.batch_size)
        train_device = train.place
        self.tables = EpochTables(
            position=torch.zeros(1, dtype=torch.int64, device=train_device),
            images=torch.zeros(shape, dtype=torch.int64, device=train_device),
            texts=torch.zeros(shape, dtype=torch.int64, device=train_device),
            rates=torch.zeros(
                plan.per_epoch,
                len(training.optimizer.param_groups),
                device=train_device,
            ),
            losses=torch.zeros(plan.per_epoch, device=train_device),
        )

    def take_steps(self, save: Callable[[bool], None]) -> None:
        """Take the rest of an epoch's steps, as `loop.take_steps` does."""
        training = self.training
        plan = self.plan
        rows = draw_rows(
            self.train,
            batch_size=self.batch_size,
            generator=training.generator,
            captions=1,
            skip=begin_draws(training, plan),
            epoch=training.recipe.schedule.epoch,
        )
        groups = list(groups_of(self.train, rows.order, rows.captions, self.batch_size))
        groups_of_steps = [
            groups[first : first + plan.accumulate]
            for first in range(0, len(groups), plan.accumulate)
        ]
        self._fill(rows)
        training.model.train()
        with float32_products(training.device, tf32=True):
            for step_groups in groups_of_steps:
                if training.in_epoch >= plan.per_epoch or training.step >= plan.n_steps:
                    break
                self._take_step(step_groups)
                training.add_loss(self.tables.losses[training.in_epoch])
                training.step = training.step + 1
                training.in_epoch = training.in_epoch + 1
                # The end of an epoch is saved once it is evaluated.
                if training.in_epoch < plan.per_epoch and training.step < plan.n_steps:
                    save(False)

    def _fill(self, rows: EpochRows) -> None:
        """Send the rows and rates of the steps that are left of an epoch."""
        training = self.training
        plan = self.plan
        first = training.in_epoch
        n_left = min(plan.per_epoch - first, len(rows.images) // self._rows_of_step)
        for table, table_rows in (
            (self.tables.images, rows.images),
            (self.tables.texts, rows.texts.flatten()),
        ):
            used = table_rows[: n_left * self._rows_of_step]
            table[first : first + n_left].copy_(
                send(used, table.device).view(n_left, *table.shape[1:])
            )
        rates = [rates_at(training, training.step + i, plan) for i in range(n_left)]
        self.tables.rates[first : first + n_left].copy_(send(torch.tensor(rates), training.device))
        self.tables.position.fill_(first)

    @property
    def _rows_of_step(self) -> int:
        return self.plan.accumulate * self.batch_size

    def _take_step(self, groups: Sequence[Groups | None]) -> None:
        """Take one step: replayed if its loss is that of the record, else by the usual operations.

        The first step is taken by usual operations too: it makes the optimizer's state.
        """
        training = self.training
        is_warm = training.step_flops is not None and bool(_optimizer(training).state)
        if is_warm and all(batch_groups is None for batch_groups in groups):
            if self.replay is None and self.recorder is not None:
                self.replay = try_to_record(self._recorded_step, self.recorder)
                if self.replay is None:
                    self.recorder = None
            if self.replay is not None:
                set_rates(training, self.plan)
                self.replay()
                return
        step = training.in_epoch
        images = self.tables.images[step]
        texts = self.tables.texts[step]
        step_batches = map(self._batch, images, texts, groups)
        self.tables.losses[step].copy_(counted_step(training, step_batches, self.plan))
        self.tables.position.add_(1)

    def _batch(self, image_rows: Tensor, text_rows: Tensor, groups: Groups | None) -> Batch:
        """Gather a batch from resident features."""
        train = self.train
        image = train.image.index_select(0, image_rows)
        text = train.text.index_select(0, text_rows)
        return Batch(
            image=image,
            text=text,
            image_mask=_mask(train.image_lengths, image_rows, image),
            text_mask=_mask(train.text_lengths, text_rows, text),
            groups=groups,
        )

    def _recorded_step(self) -> Tensor:
        """Take the step at the position that the device holds, and move on. See `take_step`."""
        training = self.training
        tables = self.tables
        position = tables.position
        images = tables.images.index_select(0, position)[0]
        texts = tables.texts.index_select(0, position)[0]
        rates = tables.rates.index_select(0, position)[0]
        optimizer = _optimizer(training)
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros_like(tables.losses[0])
        with torch.enable_grad():
            for image_rows, text_rows in zip(images, texts, strict=True):
                batch = self._batch(image_rows, text_rows, None)
                loss += training.add_gradients(batch, self.plan.accumulate)
        apply_update(training, direct_update(optimizer, rates))
        tables.losses.index_copy_(0, position, loss.unsqueeze(0))
        position.add_(1)
        return loss


def recorded_steps(
    training: HeadFit,
    train: FeaturePairs,
    plan: StepCount,
) -> RecordedSteps | None:
    """Return the recorded steps of a fit; None where steps run one operation at a time."""
    recorder = recorder_of(train.place)
    if recorder is None or not can_be_recorded(training, train):
        return None
    return RecordedSteps(training, train, plan, recorder)


def _mask(lengths: Tensor | None, rows: Tensor, features: Tensor) -> Tensor | None:
    return None if lengths is None else mask_of(lengths.index_select(0, rows), features)


def _optimizer(training: HeadFit) -> torch.optim.Optimizer:
    assert training.optimizer is not None
    return training.optimizer
