"""Make augmented views of an image: seeded, so that the same file always gives the same views."""

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
"""Operations of RandAugment (Cubuk et al. 2019), by name.

Operations that change colors are left out, because captions name colors. LilT and ALBEF use the
same list; the strengths are theirs at magnitude 10 of 10.
"""


@dataclass(frozen=True)
class Views:
    """Make augmented views of each image: a random crop, a mirror image, then RandAugment.

    The crop is stretched to a square of its longer side; the encoder's own preprocessing follows.
    Nothing is drawn from a shared generator: a view is a function of the file's bytes, its number
    and the seed.
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
    """Number of RandAugment operations in each view; 0 applies none."""
    magnitude: float = 7.0
    """Strength of the operations, from 0 to 10."""

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
        }

    def _generator(self, digest: str, number: int) -> np.random.Generator:
        seed_hash = content_hash(f"{self.seed} {number} {digest}")
        return np.random.default_rng(int(seed_hash[:32], 16))

    def _view(self, image: Image.Image, chance: np.random.Generator) -> Image.Image:
        view = self._crop(image, chance)
        if self.flip and chance.random() < 0.5:
            view = ImageOps.mirror(view)
        # Sorted, so that a seed gives the same operations whatever the order of the table.
        for name in chance.choice(sorted(OPERATIONS), self.operations):
            strength = self.magnitude / 10 * chance.choice((-1, 1))
            view = OPERATIONS[str(name)](view, float(strength))
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
        arguments = {key: entry for key, entry in value.items() if key != "kinds"}
        views = Views(
            **{**arguments, "scale": tuple(value["scale"]), "ratio": tuple(value["ratio"])}
        )
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
    left_edge, top_edge, right_edge, bottom_edge = box
    side = max(1, max(right_edge - left_edge, bottom_edge - top_edge))
    return image.resize((side, side), Image.Resampling.BICUBIC, box=box)
