"""Encoders as the command line names them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .option_groups import (
    ADVANCED,
    ENCODERS,
    ImageCuts,
    ImageEncoders,
    MaxTokens,
    OptionGroup,
    PairModels,
    Resolution,
    TextCuts,
    TextEncoders,
)
from .terminal import choice

if TYPE_CHECKING:
    from apecache.data.augment import Views
    from apecache.encoders.spec import EncoderSpec
    from apecache.fingerprint import Modality

VIEWS_EXAMPLE = "4,scale=0.2-1,seed=0"


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(OptionGroup):
    """Hold the encoders of an extraction, and what they compute."""

    image: ImageEncoders = None
    text: TextEncoders = None
    model: PairModels = None
    image_cut: ImageCuts = None
    text_cut: TextCuts = None
    text_prefix: Annotated[
        str | None,
        typer.Option(
            help="Text before every caption. Default: what the encoder asks for.",
            rich_help_panel=ENCODERS,
        ),
    ] = None
    views: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Encode N random augmentations of each image in place of the image. Details may "
            f"follow: {VIEWS_EXAMPLE}.",
            rich_help_panel=ENCODERS,
        ),
    ] = None
    resolution: Resolution = None
    max_tokens: MaxTokens = None
    precision: Annotated[
        str,
        typer.Option(
            metavar="TYPE",
            help="Precision of the computation: float32, tf32, float16, bfloat16, or auto: on CUDA "
            "the fastest one that is exact enough on 256 rows, on a CPU float32.",
            rich_help_panel=ENCODERS,
        ),
    ] = "auto"
    resize: Annotated[
        str,
        typer.Option(
            metavar="METHOD",
            help="reference: the encoder's own resize. torchvision: faster, slightly different "
            "pixels.",
            rich_help_panel=ADVANCED,
        ),
    ] = "reference"

    def images(self) -> "tuple[EncoderSpec, ...]":
        """Return every cut of every image encoder."""
        choice("--resize", self.resize, ("reference", "torchvision"))
        return encoder_specs(
            both_sides(self.model, self.image),
            modality="image",
            cuts=self.image_cut,
            dtype="float32",
            resolution=self.resolution,
            resize=self.resize,
        )

    def texts(self) -> "tuple[EncoderSpec, ...]":
        """Return every cut of every text encoder."""
        return encoder_specs(
            both_sides(self.model, self.text),
            modality="text",
            cuts=self.text_cut,
            dtype="float32",
            max_tokens=self.max_tokens,
            prefix=self.text_prefix,
        )


def both_sides(models: list[str] | None, side: list[str] | None) -> list[str]:
    """Return the encoders of one side: those of `--model`, then those of its own option."""
    return [*(models or ()), *(side or ())]


def encoder_specs(
    names: list[str] | None,
    modality: "Modality",
    cuts: list[str] | None,
    dtype: Any,
    **settings: Any,
) -> "tuple[EncoderSpec, ...]":
    """Parse encoder options: every cut of every encoder.

    Args:
        names: The encoders, as `--image` or `--text` takes them.
        modality: The side of all encoders.
        cuts: The poolings, as `--image-cut` takes them; None: the encoder's own.
        dtype: The precision of the computation.
        settings: Other fields of `EncoderSpec`, the same for all encoders.

    Raises:
        OptionError: A cut that cannot be parsed.
        EncoderError: A name that cannot be parsed.
    """
    from dataclasses import replace

    from apecache.encoders.spec import parse_cut, parse_encoder

    parsed_cuts = [parse_cut(cut) for cut in cuts or ["default"]]
    specs = [parse_encoder(name, modality) for name in names or ()]
    # Encoders outside, cuts inside: the cuts of one encoder follow one another.
    return tuple(
        replace(spec, pooling=pooling, layer=layer, dtype=dtype, **settings)
        for spec in specs
        for pooling, layer in parsed_cuts
    )


def view_spec(text: str) -> "Views":
    """Parse the value of `--views`: a count, then `scale=LOW-HIGH` and `seed=N`.

    Raises:
        OptionError: The count is not a positive number, or a detail cannot be parsed.
    """
    from apecache.data.augment import Views
    from apecache.errors import OptionError

    count, *entries = [entry.strip() for entry in text.split(",")]
    scale = (0.2, 1.0)
    seed = 0
    try:
        n_views = int(count)
        if n_views < 1:
            raise ValueError
        for entry in entries:
            name, _, value = entry.partition("=")
            match name:
                case "scale":
                    low, high = (float(share) for share in value.split("-"))
                    scale = (low, high)
                case "seed":
                    seed = int(value)
                case _:
                    raise ValueError
        names = [entry.partition("=")[0] for entry in entries]
        # All mistakes get one message, which shows the form that is expected.
        if not 0 < scale[0] <= scale[1] <= 1 or seed < 0 or len(set(names)) < len(names):
            raise ValueError
    except ValueError:
        raise OptionError(
            f"--views {text}: expected a count, then shares of the area and a seed, like "
            f"{VIEWS_EXAMPLE}"
        ) from None
    return Views(n_views, seed, scale)
