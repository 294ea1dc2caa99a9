"""Make augmented views of an image: seeded, so that the same file always gives the same views."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from apecache.errors import StoreError
from apecache.fingerprint import Json, content_hash

Operation = Callable[[Image.Image, float, int], Image.Image]
"""An image, a level from 0 to 1, and a direction, 1 or -1."""
FILL = (128, 128, 128)
APPLIED = 0.5
"""Probability that an operation that was drawn is applied."""
VIEWS_VERSION = 2
"""Of what a seed draws. 1: every operation was applied, at two to three times the strength."""
TRANSLATION = 10 / 256
"""Largest translation, as a share of the side: ten pixels of the 256 that LilT trains on."""


def _affine(image: Image.Image, matrix: Sequence[float]) -> Image.Image:
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        tuple(matrix),
        Image.Resampling.BILINEAR,
        fillcolor=FILL,
    )


def _factor(level: float) -> float:
    """Return the factor of an enhancement: 1.9 at level 1, 1 at level 0.5, 0.1 at level 0."""
    return 1.8 * level + 0.1


def _brightness(image: Image.Image, level: float, _: int) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(_factor(level))


def _sharpness(image: Image.Image, level: float, _: int) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(_factor(level))


def _shear_x(image: Image.Image, level: float, sign: int) -> Image.Image:
    return _affine(image, (1, 0.3 * level * sign, 0, 0, 1, 0))


def _shear_y(image: Image.Image, level: float, sign: int) -> Image.Image:
    return _affine(image, (1, 0, 0, 0.3 * level * sign, 1, 0))


def _translate_x(image: Image.Image, level: float, sign: int) -> Image.Image:
    return _affine(image, (1, 0, TRANSLATION * level * sign * image.width, 0, 1, 0))


def _translate_y(image: Image.Image, level: float, sign: int) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, TRANSLATION * level * sign * image.height))


def _rotate(image: Image.Image, level: float, sign: int) -> Image.Image:
    return image.rotate(30 * level * sign, Image.Resampling.BILINEAR, fillcolor=FILL)


OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, _level, _sign: image,
    "autocontrast": lambda image, _level, _sign: ImageOps.autocontrast(image),
    "equalize": lambda image, _level, _sign: ImageOps.equalize(image),
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
}
"""Operations of RandAugment (Cubuk et al. 2019), by name, as LilT and ALBEF use them.

Operations that change colors are left out, because captions name colors. Magnitude 7 of 10 is
level 0.7: brightness and sharpness by 1.36, a shear of 0.21, a rotation by 21 degrees, a
translation by seven pixels of 256.
"""


@dataclass(frozen=True)
class Views:
    """Make augmented views of each image: a random crop, a mirror image, then RandAugment.

    The crop is stretched to a square of its longer side; the encoder's own preprocessing follows,
    without its crop (`apecache.encoders.whole_view`). Nothing is drawn from a shared generator: a
    view is a function of the file's bytes, its number and the seed.
    """

    count: int
    """Number of views of each image."""
    seed: int = 0
    scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the image's area that a crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop."""
    flip: bool = True
    """Whether half of the views are mirrored."""
    operations: int = 2
    """Number of RandAugment operations drawn for each view, identity among them. Each is applied
    with probability 0.5."""
    magnitude: float = 7.0
    """Strength of the operations, from 0 to 10."""
    jitter: float = 0.0
    """Brightness, contrast and saturation are changed by factors up to this far from 1."""

    def of(self, image: Image.Image, digest: str) -> list[Image.Image]:
        """Return the RGB views of an RGB image.

        Args:
            image: The image.
            digest: Content hash of the image's file.
        """
        return [self._view(image, self._generator(digest, number)) for number in range(self.count)]

    def to_json(self) -> Json:
        """Return the fields that the fingerprint holds."""
        return {
            **asdict(self),
            "scale": list(self.scale),
            "ratio": list(self.ratio),
            "kinds": sorted(OPERATIONS),
            "version": VIEWS_VERSION,
        }

    def _generator(self, digest: str, number: int) -> np.random.Generator:
        seed_hash = content_hash(f"{self.seed} {number} {digest}")
        return np.random.default_rng(int(seed_hash[:32], 16))

    def _view(self, image: Image.Image, chance: np.random.Generator) -> Image.Image:
        view = self._crop(image, chance)
        if self.flip and chance.random() < 0.5:
            view = ImageOps.mirror(view)
        if self.jitter:
            view = _jittered(view, self.jitter, chance)
        # Sorted, so that a seed gives the same operations whatever the order of the table.
        for name in chance.choice(sorted(OPERATIONS), self.operations):
            # Both are drawn whether or not they are used, so that draws stay in step.
            is_applied = chance.random() < APPLIED
            sign = int(chance.choice((-1, 1)))
            if is_applied:
                view = OPERATIONS[str(name)](view, self.magnitude / 10, sign)
        return view

    def _crop(self, image: Image.Image, chance: np.random.Generator) -> Image.Image:
        """Cut a random box out of the image.

        If ten draws do not fit, the largest centered box of an allowed ratio is cut.
        """
        width, height = image.size
        for _ in range(10):
            area = width * height * chance.uniform(*self.scale)
            # Uniform in the logarithm, so that a ratio and its inverse are equally likely.
            ratio = float(np.exp(chance.uniform(*np.log(self.ratio))))
            crop_width = round((area * ratio) ** 0.5)
            crop_height = round((area / ratio) ** 0.5)
            if 0 < crop_width <= width and 0 < crop_height <= height:
                left_edge = int(chance.integers(width - crop_width + 1))
                top_edge = int(chance.integers(height - crop_height + 1))
                return _squared(
                    image,
                    (left_edge, top_edge, left_edge + crop_width, top_edge + crop_height),
                )
        crop_width = min(width, round(height * self.ratio[1]))
        crop_height = min(height, round(width / self.ratio[0]))
        left_edge = (width - crop_width) // 2
        top_edge = (height - crop_height) // 2
        return _squared(
            image,
            (left_edge, top_edge, left_edge + crop_width, top_edge + crop_height),
        )


def views_from_json(value: Json) -> Views:
    """Return the views that `Views.to_json` describes.

    Raises:
        StoreError: Another version of apecache described them, and draws views differently.
    """
    kinds = sorted(OPERATIONS)
    try:
        descriptions = ("kinds", "version")
        arguments = {key: entry for key, entry in value.items() if key not in descriptions}
        views = Views(
            **{**arguments, "scale": tuple(value["scale"]), "ratio": tuple(value["ratio"])}
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise StoreError(
            f"views that this apecache cannot make again ({error}); extract them into a new store"
        ) from None
    if value.get("kinds") != kinds or value.get("version") != VIEWS_VERSION:
        raise StoreError(
            "views of other operations than this apecache has; extract them into a new store"
        )
    return views


def _jittered(image: Image.Image, amount: float, chance: np.random.Generator) -> Image.Image:
    """Change brightness, contrast and saturation in random order."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for index in chance.permutation(len(enhancers)):
        factor = float(chance.uniform(max(0.0, 1 - amount), 1 + amount))
        image = enhancers[index](image).enhance(factor)
    return image


def _squared(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    left_edge, top_edge, right_edge, bottom_edge = box
    side = max(1, max(right_edge - left_edge, bottom_edge - top_edge))
    return image.resize((side, side), Image.Resampling.BICUBIC, box=box)
