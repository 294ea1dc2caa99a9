"""Which candidates are right answers, where captions or images are equal.

A caption is a right answer of an image, and the image one of the caption, if the caption equals one
of the image's own captions word for word, or one of an image of equal content. This is no
equivalence: of an image with captions x and y and another one with y and z, y belongs to both
images, x to the first alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Links:
    """For each group of one side the groups of the other side that belong to it.

    `first` int64 [n_groups + 1]: `others[first[g]]` up to `others[first[g + 1]]` belong to group g.
    """

    first: Tensor
    others: Tensor

    @staticmethod
    def of(groups: Tensor, others: Tensor, n_groups: int) -> "Links":
        """Links of `groups` [e] with `others` [e], each pair given once."""
        order = torch.argsort(groups, stable=True)
        counts = torch.bincount(groups, minlength=n_groups)
        first = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        return Links(first=first, others=others[order])

    def to(self, device: torch.device) -> "Links":
        """The same on another device."""
        return Links(first=self.first.to(device), others=self.others.to(device))

    def mask(self, groups: Tensor, n_others: int) -> Tensor:
        """bool [len(groups), n_others]: which groups of the other side belong to each of these."""
        begin = self.first[groups]
        counts = self.first[groups + 1] - begin
        rows = torch.repeat_interleave(torch.arange(len(groups), device=groups.device), counts)
        skipped = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        within = torch.arange(len(rows), device=groups.device) - skipped
        mask = torch.zeros(len(groups), n_others, dtype=torch.bool, device=groups.device)
        mask[rows, self.others[begin[rows] + within]] = True
        return mask

    def sums(self, sizes: Tensor) -> Tensor:
        """int64 [n_groups]: the sum of the other side's `sizes` over what belongs to each group."""
        n_groups = len(self.first) - 1
        rows = torch.repeat_interleave(
            torch.arange(n_groups, device=sizes.device),
            self.first.diff(),
        )
        return torch.zeros(n_groups, dtype=sizes.dtype, device=sizes.device).index_add_(
            0,
            rows,
            sizes[self.others],
        )


@dataclass(frozen=True, kw_only=True)
class Relevance:
    """The right answers of each image and caption, by groups of equal images and groups of equal
    captions.

    `image_groups` int64 [n_images], `text_groups` int64 [n_texts]: numbers from 0. `texts`: the
    groups of captions that belong to each group of images. `images`: the same pairs, by groups of
    captions.
    """

    image_groups: Tensor
    text_groups: Tensor
    texts: Links
    images: Links

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
            None where every caption belongs to its own image alone, on the device of
            `image_of_text` else.
        """
        if not len(image_of_text) or (caption_ids is None and image_ids is None):
            return None
        device = image_of_text.device
        n_images = int(image_of_text.max()) + 1
        image_groups = (
            torch.arange(n_images, device=device)
            if image_ids is None
            else _compact(image_ids.to(device))
        )
        n_texts = len(image_of_text)
        text_groups = (
            torch.arange(n_texts, device=device)
            if caption_ids is None
            else _compact(caption_ids.to(device))
        )
        n_image_groups = int(image_groups.max()) + 1
        n_text_groups = int(text_groups.max()) + 1
        pairs = torch.unique(image_groups[image_of_text] * n_text_groups + text_groups)
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
        """bool [len(images), n_texts]: the right captions of these images (rows)."""
        groups = self.texts.mask(self.image_groups[images], len(self.images.first) - 1)
        return groups.index_select(1, self.text_groups)

    def right_images(self, texts: Tensor) -> Tensor:
        """bool [len(texts), n_images]: the right images of these captions (rows)."""
        groups = self.images.mask(self.text_groups[texts], len(self.texts.first) - 1)
        return groups.index_select(1, self.image_groups)

    def n_right_texts(self) -> Tensor:
        """int64 [n_images]: the number of right captions of each image."""
        return self.texts.sums(torch.bincount(self.text_groups))[self.image_groups]

    def n_right_images(self) -> Tensor:
        """int64 [n_texts]: the number of right images of each caption."""
        return self.images.sums(torch.bincount(self.image_groups))[self.text_groups]

    def to(self, device: torch.device) -> "Relevance":
        """The same on another device."""
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
        """The same relation among some images and captions alone; `image_of_text` as `of` takes it,
        of those."""
        return Relevance.of(image_of_text, self.text_groups[texts], self.image_groups[images])


def _compact(numbers: Tensor) -> Tensor:
    """Equal numbers from 0 without gaps."""
    compact: Tensor = torch.unique(numbers, return_inverse=True)[1]
    return compact
