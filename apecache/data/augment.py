"""Augmented views of an image: seeded, so that the same file always gives the same views."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from apecache.errors import StoreError
from apecache.fingerprint import Json, content_hash

Operation = Callable[[Image.Image, float], Image.Image]
"""An image and a strength from -1 to 1."""
FILL = (128, 128, 128)


def _affine(image: Image.Image, matrix: Sequence[float]) -> Image.Image:
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        tuple(matrix),
        Image.Resampling.BILINEAR,
        fillcolor=FILL,
    )


OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "brightness": lambda image, s: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s),
    "sharpness": lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s),
    "shear_x": lambda image, s: _affine(image, (1, 0.3 * s, 0, 0, 1, 0)),
    "shear_y": lambda image, s: _affine(image, (1, 0, 0, 0.3 * s, 1, 0)),
    "translate_x": lambda image, s: _affine(image, (1, 0, 0.45 * s * image.width, 0, 1, 0)),
    "translate_y": lambda image, s: _affine(image, (1, 0, 0, 0, 1, 0.45 * s * image.height)),
    "rotate": lambda image, s: image.rotate(30 * s, Image.Resampling.BILINEAR, fillcolor=FILL),
}
"""RandAugment's operations (Cubuk et al. 2019) without those that change colours, which captions
name: the choice of LilT and of ALBEF before it, whose strengths at magnitude 10 of 10 these are."""


@dataclass(frozen=True)
class Views:
    """`count` views of each image: a random crop of `scale` (share of the area) and `ratio` (of the
    sides), mirrored half of the time, then `operations` of RandAugment at `magnitude` (0 to 10);
    none of them for `operations` 0.

    The crop is stretched to a square of its longer side; the encoder's own preprocessing follows.
    Nothing is drawn from a shared generator: a view is a function of the file's bytes, its number
    and the seed.
    """

    count: int
    seed: int = 0
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    operations: int = 2
    magnitude: float = 7.0

    def of(self, image: Image.Image, digest: str) -> list[Image.Image]:
        """RGB views of an RGB image whose file has this content hash."""
        return [self._view(image, self._generator(digest, number)) for number in range(self.count)]

    def to_json(self) -> Json:
        """What stands in the fingerprint."""
        return {
            **asdict(self),
            "scale": list(self.scale),
            "ratio": list(self.ratio),
            "kinds": sorted(OPERATIONS),
        }

    def _generator(self, digest: str, number: int) -> np.random.Generator:
        return np.random.default_rng(int(content_hash(f"{self.seed} {number} {digest}")[:32], 16))

    def _view(self, image: Image.Image, chance: np.random.Generator) -> Image.Image:
        view = self._crop(image, chance)
        if self.flip and chance.random() < 0.5:
            view = ImageOps.mirror(view)
        for name in chance.choice(sorted(OPERATIONS), self.operations):
            strength = self.magnitude / 10 * chance.choice((-1, 1))
            view = OPERATIONS[str(name)](view, float(strength))
        return view

    def _crop(self, image: Image.Image, chance: np.random.Generator) -> Image.Image:
        """A box inside the image; the largest one of an allowed ratio in the middle if ten draws do
        not fit."""
        width, height = image.size
        for _ in range(10):
            area = width * height * chance.uniform(*self.scale)
            ratio = float(np.exp(chance.uniform(*np.log(self.ratio))))
            w = round((area * ratio) ** 0.5)
            h = round((area / ratio) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                left = int(chance.integers(width - w + 1))
                top = int(chance.integers(height - h + 1))
                return _squared(image, (left, top, left + w, top + h))
        w = min(width, round(height * self.ratio[1]))
        h = min(height, round(width / self.ratio[0]))
        left = (width - w) // 2
        top = (height - h) // 2
        return _squared(image, (left, top, left + w, top + h))


def views_from_json(value: Json) -> Views:
    """The views that `Views.to_json` describes.

    Raises:
        StoreError: they are of another apecache, which draws them otherwise.
    """
    kinds = sorted(OPERATIONS)
    try:
        plain = {key: entry for key, entry in value.items() if key != "kinds"}
        views = Views(**{**plain, "scale": tuple(value["scale"]), "ratio": tuple(value["ratio"])})
    except (TypeError, KeyError, AttributeError) as error:
        raise StoreError(
            f"views that this apecache cannot make again ({error}); extract them into a new store"
        ) from None
    if value.get("kinds") != kinds:
        raise StoreError(
            "views of other operations than this apecache has; extract them into a new store"
        )
    return views


def _squared(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    side = max(1, max(box[2] - box[0], box[3] - box[1]))
    return image.resize((side, side), Image.Resampling.BICUBIC, box=box)
