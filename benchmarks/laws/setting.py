"""What the laws are tried on: pairs, encoders by role, how large the runs are; and parts of the
pairs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from apecache.data.pairs import Pair, PairSource
from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.errors import DataError, OptionError
from apecache.fingerprint import content_hash


@dataclass(frozen=True, kw_only=True)
class Size:
    """None: all there are, or what the recipe says. `images`: of training, in laws whose arms train
    towers; `steps` and `batch`: of all their arms alike; `lr`: of those that train towers;
    `autocast`: how towers that train compute. `head_images`, `head_steps`: in laws of heads alone.
    `test_images`: reported on.

    `all-data` has all images and the same number of samples for every arm, so that its comparisons
    can be testable; `full` leaves steps to the recipes, of which each has its own number.

    Where the batch is smaller than the recipe's, its learning rate falls with its square root (for
    Adam the usual rule). Nothing else of a recipe changes.
    """

    name: str
    images: int | None = None
    steps: int | None = None
    batch: int | None = None
    head_images: int | None = None
    head_steps: int | None = None
    test_images: int | None = None
    lr: float | None = None
    autocast: Literal["float32", "bfloat16"] = "float32"


SIZES = {
    "smoke": Size(
        name="smoke",
        images=36,
        steps=3,
        batch=8,
        head_images=36,
        head_steps=4,
        test_images=24,
    ),
    "small": Size(
        name="small",
        images=1000,
        steps=150,
        batch=64,
        head_images=None,
        head_steps=None,
        test_images=1000,
    ),
    "all-data": Size(
        name="all-data",
        steps=600,
        batch=64,
        head_steps=250,
    ),
    "full": Size(name="full"),
}


@dataclass(frozen=True)
class LawsSetting:
    """`encoders`: by role; `image` and `text` are always there. `labels`: images of classes;
    `languages`: captions of the reported images in other languages. `price`: of an hour of this
    machine. Runs and results go below `work`."""

    pairs: PairSource
    encoders: Mapping[str, EncoderSpec]
    work: Path
    size: Size = SIZES["small"]
    seeds: int = 3
    split: str = "val"
    labels: PairSource | None = None
    languages: PairSource | None = None
    device: str = "auto"
    price: float | None = None


def parse_roles(texts: list[str], sizes: list[str]) -> dict[str, EncoderSpec]:
    """`ROLE=ENCODER` and `ROLE=PIXELS`. A role that ends in text, and the text encoders of the
    laws, are of texts.

    Raises:
        OptionError: not of that form, a role twice, or pixels of a role that is not given.
            EncoderError: the encoder.
    """
    found: dict[str, EncoderSpec] = {}
    for text in texts:
        role, equals, name = text.partition("=")
        if not equals or not role or role in found:
            raise OptionError(f"--encoder {text}: expected ROLE=ENCODER, each role once")
        found[role] = parse_encoder(name, "text" if is_text_role(role) else "image")
    for text in sizes:
        role, equals, pixels = text.rpartition("=")
        role = role or "image"
        if role not in found or is_text_role(role) or not pixels.isdecimal() or int(pixels) < 1:
            raise OptionError(
                f"--resolution {text}: expected PIXELS or ROLE=PIXELS of an image encoder "
                "that is given"
            )
        found[role] = replace(found[role], resolution=int(pixels))
    return found


def is_text_role(role: str) -> bool:
    return role.endswith("text") or role in ("mbert", "roberta", "t5")


def part_of(
    source: PairSource,
    split: str,
    images: int | None,
    test_images: int | None,
    noise: float,
) -> PairSource:
    """So many images of train and of `split`, chosen by a hash of their keys, so that fewer are
    always among more; in the order of the table. Of the share `noise` of the training images each
    has the captions of another one of them.

    Raises:
        DataError: one of the splits has no image with a caption.
    """
    kept = {
        "train": _first([p for p in source if p.split == "train" and p.captions], images),
        split: _first([p for p in source if p.split == split and p.captions], test_images),
    }
    for name, pairs in kept.items():
        if not pairs:
            raise DataError(
                f"{source.origin}: no image with a caption in split {name!r}; laws need train "
                f"and {split}"
            )
    chosen = {pair.key for pairs in kept.values() for pair in pairs}
    wrong = _exchanged(kept["train"][: round(noise * len(kept["train"]))])
    return replace(
        source,
        pairs=tuple(wrong.get(pair.key, pair) for pair in source if pair.key in chosen),
    )


def _first(pairs: list[Pair], count: int | None) -> list[Pair]:
    return sorted(pairs, key=lambda pair: content_hash(pair.key))[:count]


def _exchanged(pairs: list[Pair]) -> dict[str, Pair]:
    """Each with the captions of the next one."""
    if len(pairs) < 2:
        return {}
    others = [*pairs[1:], pairs[0]]
    return {
        pair.key: replace(pair, captions=other.captions, languages=other.languages)
        for pair, other in zip(pairs, others, strict=True)
    }


def translated(pairs: PairSource, table: PairSource, split: str) -> PairSource:
    """The reported images of `pairs` with all captions that `table` has of them.

    Raises:
        DataError: none of them has one.
    """
    wanted = {pair.key for pair in pairs if pair.split == split}
    found = tuple(
        replace(pair, split=split) for pair in table if pair.key in wanted and pair.captions
    )
    if not found:
        raise DataError(
            f"{table.origin} has no caption of the images in split {split!r} of {pairs.origin}"
        )
    return replace(table, pairs=found, media=pairs.media)
