"""What commands that take a run share: encoders that have moved, and images to open."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .option_groups import MovedImage, MovedText, OptionGroup

if TYPE_CHECKING:
    from PIL import Image

    from apecache.encoders.spec import EncoderSpec
    from apecache.store.reader import FeatureStore


@dataclass(frozen=True, kw_only=True)
class MovedEncoders(OptionGroup):
    """Hold the new locations of the encoders of a run."""

    image: MovedImage = None
    text: MovedText = None

    def recorded_in(self, run: Path) -> "tuple[EncoderSpec | None, EncoderSpec | None]":
        """Return the settings that the run recorded, with the new locations."""
        return moved_encoders(run, self.image, self.text)


def moved_encoders(
    run: Path,
    image: str | None,
    text: str | None,
) -> "tuple[EncoderSpec | None, EncoderSpec | None]":
    """Return the recorded settings of the image and the text encoder under new names.

    None for an encoder without a new name: the run's own record holds for it.
    """
    # The file of apecache.runs.bundle, which would import torch here.
    is_bundle = (run / "bundle.json").is_file()
    if image is None and text is None and not is_bundle:
        return None, None
    from apecache.runs.bundle import bundled_encoders
    from apecache.runs.load import recorded_encoder

    bundled_image, bundled_text = bundled_encoders(run)

    moved_image = recorded_encoder(run, "image").with_name(image) if image else bundled_image
    moved_text = recorded_encoder(run, "text").with_name(text) if text else bundled_text
    return moved_image, moved_text


def opener(
    root: str | None,
    store: "FeatureStore | None" = None,
    source: str | None = None,
) -> "Callable[[str], Image.Image] | None":
    """Return a function that reads the image of a key; None if nothing says where the images are.

    Args:
        root: Folder of the images.
        store: Store whose record says where they are otherwise.
        source: Source that the images come with.

    Raises:
        OptionError: Both `root` and `source` are given.
    """
    from apecache.errors import OptionError

    if root is not None and source is not None:
        raise OptionError("--root and --source exclude each other: leave one out")
    if root is None and source is None and store is None:
        return None
    from apecache.data.recorded import RecordedImages

    return RecordedImages(
        None if store is None else store.last_source,
        root=root,
        source=source,
    )
