"""Draw the batches of all members of a group, gathered together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apecache.heads.head import mask_of
from apecache.losses.contrastive import Groups
from apecache.train.batches import (
    Batch,
    EpochRows,
    FeaturePairs,
    draw_rows,
    gather,
    gather_lengths,
    groups_of,
    n_items,
)
from apecache.train.fit import HeadFit, StepCount
from apecache.train.loop import begin_draws


@dataclass(frozen=True, kw_only=True)
class StackedBatch:
    """Hold one batch of every member."""

    image: Tensor
    """[k, n, dim] or [k, n, tokens, dim]."""
    text: Tensor
    """[k, n * captions, dim] or [k, n * captions, tokens, dim]."""
    groups: tuple[Groups | None, ...]
    """For each member, as in `Batch`."""
    image_mask: Tensor | None = None
    """bool [k, n, tokens], as in `Batch`."""
    text_mask: Tensor | None = None
    """bool [k, n * captions, tokens], as in `Batch`."""

    def of(self, member: int) -> Batch:
        """Return the batch of one member."""
        return Batch(
            image=self.image[member],
            text=self.text[member],
            image_mask=None if self.image_mask is None else self.image_mask[member],
            text_mask=None if self.text_mask is None else self.text_mask[member],
            groups=self.groups[member],
        )

    def tensors(self) -> list[Tensor]:
        """List images, texts and the masks that there are."""
        listed = [self.image, self.text]
        listed += [mask for mask in (self.image_mask, self.text_mask) if mask is not None]
        return listed

    def with_tensors(self, tensors: Iterator[Tensor]) -> "StackedBatch":
        """Return a batch with other tensors, in the order of `tensors`, and without groups."""
        return StackedBatch(
            image=next(tensors),
            text=next(tensors),
            image_mask=None if self.image_mask is None else next(tensors),
            text_mask=None if self.text_mask is None else next(tensors),
            groups=(None,) * len(self.groups),
        )

    @staticmethod
    def join(batches: Sequence[Batch]) -> "StackedBatch":
        """Stack one batch of each member."""
        return StackedBatch(
            image=torch.stack([batch.image for batch in batches]),
            text=torch.stack([batch.text for batch in batches]),
            image_mask=_joined_masks([batch.image_mask for batch in batches]),
            text_mask=_joined_masks([batch.text_mask for batch in batches]),
            groups=tuple(batch.groups for batch in batches),
        )


def draw_stacked(
    members: Sequence[HeadFit],
    train: FeaturePairs,
    plan: StepCount,
) -> Iterator[StackedBatch]:
    """Draw what `draw_epoch` draws for each member, in one gather a batch."""
    recipe = members[0].recipe
    size = min(recipe.schedule.batch_size, n_items(train, recipe.schedule.epoch))
    rows = [_draw_member(member, train=train, plan=plan, size=size) for member in members]
    count = len(members)
    n_captions = recipe.loss.captions
    images = gather(
        train.image,
        rows=_by_batch([member_rows.images for member_rows in rows], size),
        size=count * size,
        device=train.place,
        views=train.image_views,
    )
    texts = gather(
        train.text,
        rows=_by_batch([member_rows.texts for member_rows in rows], size),
        size=count * size * n_captions,
        device=train.place,
        views=train.text_views,
    )
    image_lengths = gather_lengths(
        train.image_lengths,
        rows=_by_batch([member_rows.order for member_rows in rows], size),
        size=count * size,
        device=train.place,
    )
    text_lengths = gather_lengths(
        train.text_lengths,
        rows=_by_batch([member_rows.captions for member_rows in rows], size),
        size=count * size * n_captions,
        device=train.place,
    )
    groups = [groups_of(train, r.order, r.captions, size) for r in rows]
    for image, text, image_length, text_length, batch_groups in zip(
        images,
        texts,
        image_lengths,
        text_lengths,
        zip(*groups, strict=True),
        strict=True,
    ):
        yield StackedBatch(
            image=image.unflatten(0, (count, size)),
            text=text.unflatten(0, (count, size * n_captions)),
            image_mask=_masks(image_length, image, count),
            text_mask=_masks(text_length, text, count),
            groups=batch_groups,
        )


def _masks(lengths: Tensor | None, features: Tensor, count: int) -> Tensor | None:
    """Return the valid tokens of the rows of `count` members, bool [count, n, tokens]."""
    return None if lengths is None else mask_of(lengths, features).unflatten(0, (count, -1))


def _draw_member(member: HeadFit, train: FeaturePairs, plan: StepCount, size: int) -> EpochRows:
    recipe = member.recipe
    skip = begin_draws(member, plan)
    # Each member has its own generator: it draws what it would draw alone.
    return draw_rows(
        train,
        batch_size=size,
        generator=member.generator,
        captions=recipe.loss.captions,
        skip=skip,
        epoch=recipe.schedule.epoch,
    )


def _by_batch(rows_of_members: Sequence[Tensor], size: int) -> Tensor:
    """Order rows by batch, then by member: one batch of all members is one slice."""
    batches = torch.stack(list(rows_of_members)).unflatten(1, (-1, size))
    in_order: Tensor = batches.transpose(0, 1).flatten()
    return in_order


def _joined_masks(masks: Sequence[Tensor | None]) -> Tensor | None:
    """Stack masks; None where no member has one."""
    first = next((mask for mask in masks if mask is not None), None)
    if first is None:
        return None
    # A member without a mask has valid tokens only.
    return torch.stack([torch.ones_like(first) if mask is None else mask for mask in masks])
