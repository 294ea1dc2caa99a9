"""What a training step reads: cached features of a frozen tower, or pixels and token ids for a live
one."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from apecache.data.augment import Views
from apecache.data.images import Picture, open_picture
from apecache.encoders.encoder import TextEncoder
from apecache.encoders.preprocess import Preprocess
from apecache.errors import DataError, RowError

OpenImage = Callable[[str], Picture]
"""Key of the pair table -> picture, in any form that `open_picture` takes; raises RowError."""


class Inputs(Protocol):
    """Inputs of one side, by row of the store's table."""

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Features [n, dim], pixels [n, 3, height, width], token ids with their mask [n, length],
        or tokens [n, length, dim] with theirs; on the device."""


@dataclass(frozen=True, kw_only=True)
class CachedInputs:
    features: Tensor

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        return self.features[torch.tensor(rows, device=self.features.device)].float(), None


@dataclass(frozen=True, kw_only=True)
class TokenInputs:
    """Cached tokens [rows, tokens, dim] after some blocks, on the host. `lengths` [rows]: tokens of
    each row, where they differ; batches are cut to the longest."""

    features: Tensor
    lengths: Tensor | None
    device: torch.device

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        index = torch.tensor(rows)
        if self.lengths is None:
            return self.features[index].to(self.device).float(), None
        lengths = self.lengths[index]
        longest = int(lengths.max())
        mask = (torch.arange(longest) < lengths.unsqueeze(1)).long()
        return self.features[index, :longest].to(self.device).float(), mask.to(self.device)


@dataclass(frozen=True, kw_only=True)
class TextInputs:
    ids: list[list[int]]
    encoder: TextEncoder

    @staticmethod
    def of(encoder: TextEncoder, captions: Sequence[str]) -> "TextInputs":
        """All captions tokenised once."""
        return TextInputs(ids=encoder.tokenise(captions).ids, encoder=encoder)

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        return self.encoder.pad([self.ids[row] for row in rows])


@dataclass(frozen=True, kw_only=True)
class ImageInputs:
    """Images are read and preprocessed as for extraction, by `workers` threads, and sent to
    `device`; with `views` a view of them, which depends on its seed, the epoch and the key
    alone."""

    keys: Sequence[str]
    open_image: OpenImage
    preprocess: Preprocess
    device: torch.device
    workers: int = 4
    views: Views | None = None
    epoch: int = 0

    def augmented(self, views: Views, epoch: int) -> "ImageInputs":
        return replace(self, views=views, epoch=epoch)

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        with ThreadPoolExecutor(self.workers) as pool:
            pixels = list(pool.map(self._read, rows))
        return torch.stack(pixels).to(self.device), None

    def _read(self, row: int) -> Tensor:
        try:
            image = open_picture(self.open_image(self.keys[row]), self.keys[row])
        except RowError as error:
            raise DataError(
                f"image of row {row} cannot be read ({error}); mend it, or take it out of the table"
            ) from None
        if self.views is not None:
            image = self.views.of(image, f"epoch {self.epoch} {self.keys[row]}")[0]
        return self.preprocess(image)
