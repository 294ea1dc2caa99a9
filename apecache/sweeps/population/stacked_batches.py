"""Draw the batches of all members of a group, gathered together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apecache.losses.contrastive import Groups
from apecache.train.batches import Batch, FeaturePairs, draw_rows, gather, groups_of, n_items
from apecache.train.fit import HeadFit, StepCount
from apecache.train.loop import begin_draws


@dataclass(frozen=True, kw_only=True)
class StackedBatch:
    """Hold one batch of every member."""

    image: Tensor
    """[k, n, dim]."""
    text: Tensor
    """[k, n * captions, dim]."""
    groups: tuple[Groups | None, ...]
    """For each member, as in `Batch`."""

    def of(self, member: int) -> Batch:
        """Return the batch of one member."""
        return Batch(
            image=self.image[member],
            text=self.text[member],
            groups=self.groups[member],
        )

    @staticmethod
    def join(batches: Sequence[Batch]) -> "StackedBatch":
        """Stack one batch of each member."""
        return StackedBatch(
            image=torch.stack([batch.image for batch in batches]),
            text=torch.stack([batch.text for batch in batches]),
            groups=tuple(batch.groups for batch in batches),
        )


def draw_stacked(
    members: Sequence[HeadFit],
    train: FeaturePairs,
    plan: StepCount,
) -> Iterator[StackedBatch]:
    """Draw what `draw_epoch` draws for each member, pooled features, in one gather a batch."""
    recipe = members[0].recipe
    size = min(recipe.schedule.batch_size, n_items(train, recipe.schedule.epoch))
    rows = []
    for member in members:
        skip = begin_draws(member, plan)
        # Each member has its own generator: it draws what it would draw alone.
        member_rows = draw_rows(
            train,
            batch_size=size,
            generator=member.generator,
            captions=recipe.loss.captions,
            skip=skip,
            epoch=recipe.schedule.epoch,
        )
        rows.append(member_rows)
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
    groups = [groups_of(train, r.order, r.captions, size) for r in rows]
    for image, text, batch_groups in zip(images, texts, zip(*groups, strict=True), strict=True):
        yield StackedBatch(
            image=image.unflatten(0, (count, size)),
            text=text.unflatten(0, (count, size * n_captions)),
            groups=batch_groups,
        )


def _by_batch(rows_of_members: Sequence[Tensor], size: int) -> Tensor:
    """Order rows by batch, then by member: one batch of all members is one slice."""
    batches = torch.stack(list(rows_of_members)).unflatten(1, (-1, size))
    in_order: Tensor = batches.transpose(0, 1).flatten()
    return in_order
