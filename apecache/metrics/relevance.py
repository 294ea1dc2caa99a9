"""Find the right answers among candidates, where captions or images are equal.

A caption is a right answer of an image, and the image one of the caption, if the caption equals one
of the image's own captions word for word, or one of an image of equal content. This is not an
equivalence. Let one image have captions x and y, and another one y and z. Then y belongs to both
images, and x to the first alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Links:
    """Link each group of one side to the groups of the other side that belong to it.

    The links are sorted by group: `others[first[g]]` up to `others[first[g + 1]]` belong to g.
    """

    first: Tensor
    """int64 [n_groups + 1]."""
    others: Tensor
    """int64 [n_links], groups of the other side."""

    @staticmethod
    def of(groups: Tensor, others: Tensor, n_groups: int) -> "Links":
        """Link `groups` [e] with `others` [e]; each pair must be given once."""
        # Sorted by group, so that the links of a group are a range.
        order = torch.argsort(groups, stable=True)
        n_linked = torch.bincount(groups, minlength=n_groups)
        first = torch.cat((n_linked.new_zeros(1), n_linked.cumsum(0)))
        return Links(first=first, others=others[order])

    def to(self, device: torch.device) -> "Links":
        """Copy the links to another device."""
        return Links(first=self.first.to(device), others=self.others.to(device))

    def mask(self, groups: Tensor, n_others: int) -> Tensor:
        """Return bool [len(groups), n_others]: the groups of the other side that belong to each."""
        device = groups.device
        begin = self.first[groups]
        n_linked = self.first[groups + 1] - begin
        # One entry per link: its row of the mask, and its position among the links of that row.
        rows = torch.repeat_interleave(torch.arange(len(groups), device=device), n_linked)
        links_before = torch.repeat_interleave(n_linked.cumsum(0) - n_linked, n_linked)
        position_in_row = torch.arange(len(rows), device=device) - links_before
        columns = self.others[begin[rows] + position_in_row]
        mask = torch.zeros(len(groups), n_others, dtype=torch.bool, device=device)
        mask[rows, columns] = True
        return mask

    def sums(self, sizes: Tensor) -> Tensor:
        """Return int64 [n_groups]: the sum of `sizes` of the linked groups of the other side."""
        n_groups = len(self.first) - 1
        groups = torch.arange(n_groups, device=sizes.device)
        rows = torch.repeat_interleave(groups, self.first.diff())
        totals = torch.zeros(n_groups, dtype=sizes.dtype, device=sizes.device)
        return totals.index_add_(0, rows, sizes[self.others])


@dataclass(frozen=True, kw_only=True)
class Relevance:
    """Hold the right answers of each image and caption.

    Equal images form a group, and so do equal captions. Groups are numbered from 0.
    """

    image_groups: Tensor
    """int64 [n_images]."""
    text_groups: Tensor
    """int64 [n_texts]."""
    texts: Links
    """The groups of captions that belong to each group of images."""
    images: Links
    """The same pairs, by groups of captions."""

    @staticmethod
    def of(
        image_of_text: Tensor,
        caption_ids: Tensor | None,
        image_ids: Tensor | None,
    ) -> "Relevance | None":
        """Find the right answers of a set of images and captions.

        Args:
            image_of_text: int64 [n_texts], the row of each caption's image. Every image has a
                caption.
            caption_ids: int64 [n_texts], equal numbers for equal captions; None: all differ.
            image_ids: int64 [n_images], equal numbers for images of equal content; None: all
                differ.

        Returns:
            The right answers, on the device of `image_of_text`. None if every caption belongs to
            its own image alone.
        """
        if not len(image_of_text) or (caption_ids is None and image_ids is None):
            return None
        n_images = int(image_of_text.max()) + 1
        n_texts = len(image_of_text)
        image_groups = _groups(image_ids, count=n_images, device=image_of_text.device)
        text_groups = _groups(caption_ids, count=n_texts, device=image_of_text.device)
        n_image_groups = int(image_groups.max()) + 1
        n_text_groups = int(text_groups.max()) + 1
        # One number per pair, so that `unique` removes repeated pairs.
        pairs = torch.unique(image_groups[image_of_text] * n_text_groups + text_groups)
        # No images are equal, and every group of captions belongs to one image.
        if n_image_groups == len(image_groups) and len(pairs) == n_text_groups:
            return None
        of_image = pairs // n_text_groups
        of_text = pairs % n_text_groups
        return Relevance(
            image_groups=image_groups,
            text_groups=text_groups,
            texts=Links.of(of_image, of_text, n_image_groups),
            images=Links.of(of_text, of_image, n_text_groups),
        )

    def right_texts(self, images: Tensor) -> Tensor:
        """Return bool [len(images), n_texts]: the right captions of these images (rows)."""
        n_text_groups = len(self.images.first) - 1
        groups = self.texts.mask(self.image_groups[images], n_text_groups)
        return groups.index_select(1, self.text_groups)

    def right_images(self, texts: Tensor) -> Tensor:
        """Return bool [len(texts), n_images]: the right images of these captions (rows)."""
        n_image_groups = len(self.texts.first) - 1
        groups = self.images.mask(self.text_groups[texts], n_image_groups)
        return groups.index_select(1, self.image_groups)

    def n_right_texts(self) -> Tensor:
        """Return int64 [n_images]: the number of right captions of each image."""
        group_sizes = torch.bincount(self.text_groups)
        return self.texts.sums(group_sizes)[self.image_groups]

    def n_right_images(self) -> Tensor:
        """Return int64 [n_texts]: the number of right images of each caption."""
        group_sizes = torch.bincount(self.image_groups)
        return self.images.sums(group_sizes)[self.text_groups]

    def to(self, device: torch.device) -> "Relevance":
        """Copy the right answers to another device."""
        return Relevance(
            image_groups=self.image_groups.to(device),
            text_groups=self.text_groups.to(device),
            texts=self.texts.to(device),
            images=self.images.to(device),
        )

    def select(
        self,
        image_of_text: Tensor,
        images: Tensor | slice,
        texts: Tensor,
    ) -> "Relevance | None":
        """Restrict the right answers to some images and captions.

        Args:
            image_of_text: as `of` takes it, of the selected images and captions.
            images: the selected images.
            texts: the selected captions.
        """
        return Relevance.of(image_of_text, self.text_groups[texts], self.image_groups[images])


def _groups(ids: Tensor | None, count: int, device: torch.device) -> Tensor:
    """Return int64 [count]: the group of each id, numbered from 0 without gaps."""
    if ids is None:
        return torch.arange(count, device=device)
    groups: Tensor = torch.unique(ids.to(device), return_inverse=True)[1]
    return groups
