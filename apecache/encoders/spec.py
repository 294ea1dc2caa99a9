"""Parse the names of encoders: as people type them, and as a store keeps them."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from apecache.arguments import require_type
from apecache.errors import EncoderError, OptionError, nearest, nearest_sibling, one_line
from apecache.fingerprint import Fingerprint, Modality, canonical_json

Pooling = Literal["default", "cls", "mean", "max", "last", "cls+mean", "tokens"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
Precision = Literal["float32", "tf32", "float16", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Resize = Literal["reference", "torchvision"]
LIBRARIES = ("timm", "hf", "open_clip", "st")
IMPORTED = "imported"
"""Stands for the library of features that were imported without naming their encoder."""
JOINED = "joined"
"""The library of a spec that names several encoders. Its name holds their specs as JSON."""
DESCRIPTIONS = {"open_clip": "open_clip_config.json", "st": "modules.json"}
"""The file that marks a local folder as one of the library's; config.json in all others."""


@dataclass(frozen=True)
class EncoderSpec:
    """Name an encoder and the features to take from it.

    Written as `timm:NAME@REV`, `hf:ID@REV`, `open_clip:NAME/TAG` or `st:ID@REV`
    (sentence-transformers).
    """

    library: str
    name: str
    """A name that the library knows, or a local folder."""
    modality: Modality
    revision: str | None = None
    pooling: Pooling = "default"
    """`default` is the encoder's own: timm's head, what a repository's pooling file says, SigLIP's
    attention pooling, CLIP's projection, the normalized mean patch of a fine-tuned BEiT. Else CLS
    for images, the last token for causal decoders, and the attention-masked mean for text encoders.
    `last` is a text's last token, `cls+mean` CLS followed by the mean patch (or word), `tokens` all
    tokens."""
    resolution: int | None = None
    """Pixels; None: what the encoder's files say."""
    max_tokens: int | None = None
    """None: what the encoder's files say."""
    dtype: Precision = "float32"
    """Precision of the computation; `ExtractSpec.storage_dtype` is that of the stored features.
    `tf32`: float32 whose products and convolutions a CUDA device rounds to TF32."""
    layer: int | None = None
    """Number of blocks before the cut, which is before the final norm; a negative one counts from
    the end (-1: after the last block). None: the model's output."""
    prefix: str | None = None
    """Put before every text; None: what the encoder's files ask for (E5: `query: `)."""
    resize: Resize = "reference"
    """`torchvision` decodes and resizes on uint8 tensors: faster, and other last bits."""

    @property
    def is_imported(self) -> bool:
        """Return whether the encoder is not known, as its features were imported without it."""
        return self.library == IMPORTED

    @property
    def folder(self) -> Path | None:
        """Return the local folder, if the name is one (absolute, `./`, `../`, `~`, or existing)."""
        # No path has a zero byte, and the system's functions raise ValueError for one.
        if self.is_imported or "\0" in self.name:
            return None
        path = os.path.expanduser(self.name)
        return Path(path) if looks_local(self.name) or os.path.isdir(path) else None

    @property
    def slug(self) -> str:
        """Return a name that is safe as a folder and as a Zarr group.

        It begins with the last component of a local folder, or a hub id with `--` for `/`, and ends
        with the settings that are not defaults.
        """
        folder = self.folder
        words = [folder.resolve().name if folder else self.name.replace("/", "--")]
        words.append("" if self.pooling == "default" else self.pooling)
        words.append(f"layer{self.layer}" if self.layer is not None else "")
        words.append("" if self.resize == "reference" else self.resize)
        words.append(f"prefix-{self.prefix}" if self.prefix is not None else "")
        words.append(f"{self.resolution}px" if self.resolution else "")
        words.append(f"{self.max_tokens}t" if self.max_tokens else "")
        words.append("" if self.dtype == "float32" else self.dtype)
        joined = "-".join(word for word in words if word)
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", joined).strip(".-")
        return slug[:100] or "encoder"

    @property
    def singles(self) -> tuple["EncoderSpec", ...]:
        """Return the specs that `join_specs` joined, or the spec itself.

        Raises:
            EncoderError: not what `join_specs` writes.
        """
        if self.library != JOINED:
            return (self,)
        try:
            specs = tuple(spec_from_json(value) for value in json.loads(self.name))
        except (ValueError, TypeError, RecursionError):
            specs = ()
        is_sound = all(spec.library != JOINED and spec.modality == self.modality for spec in specs)
        if len(specs) < 2 or not is_sound:
            raise EncoderError("not the description of joined encoders; train again")
        return specs

    def __str__(self) -> str:
        if self.library == JOINED:
            return " + ".join(map(str, self.singles))
        return f"{self.library}:{self.name}" + (f"@{self.revision}" if self.revision else "")

    def with_name(self, text: str) -> "EncoderSpec":
        """Return the same settings for an encoder that now has another name.

        Args:
            text: as `parse_encoder` takes it, such as the folder that a local encoder has moved to.
                For joined encoders one for each, in their order, with commas between them.
        """
        if self.library == JOINED:
            return self._with_names(text)
        other = parse_encoder(text, self.modality)
        return replace(self, library=other.library, name=other.name, revision=other.revision)

    def _with_names(self, text: str) -> "EncoderSpec":
        singles = self.singles
        names = text.split(",")
        if len(names) != len(singles):
            raise OptionError(
                f"the run joins {len(singles)} {self.modality} encoders; found {len(names)} in "
                f"{text!r}: give one for each, in their order, with commas between them"
            )
        moved = [single.with_name(name) for single, name in zip(singles, names, strict=True)]
        return join_specs(moved)


def join_specs(specs: Sequence[EncoderSpec]) -> EncoderSpec:
    """Return one spec that names several encoders of one modality, in this order."""
    name = canonical_json([asdict(spec) for spec in specs]).decode()
    return EncoderSpec(JOINED, name=name, modality=specs[0].modality)


def join_fingerprints(fingerprints: Sequence[Fingerprint]) -> Fingerprint:
    """Return the identity of several encoders whose features stand side by side."""
    return Fingerprint(fields={JOINED: [dict(single.fields) for single in fingerprints]})


def single_fingerprints(fingerprint: Fingerprint) -> tuple[Fingerprint, ...]:
    """Return the identities that `join_fingerprints` joined, or the fingerprint itself."""
    if JOINED not in fingerprint.fields:
        return (fingerprint,)
    return tuple(Fingerprint(fields=fields) for fields in fingerprint.fields[JOINED])


def spec_from_json(value: object) -> EncoderSpec:
    """Read a spec as a store or a head keeps it (`dataclasses.asdict`).

    Raises:
        EncoderError: not what apecache writes.
    """
    try:
        spec = EncoderSpec(**value)  # type: ignore[arg-type]
        has_known_choices = (
            spec.modality in get_args(Modality)
            and spec.pooling in POOLINGS
            and spec.dtype in PRECISIONS
            and spec.resize in get_args(Resize)
        )
        optional_texts = [text for text in (spec.revision, spec.prefix) if text is not None]
        has_texts = all(type(text) is str for text in (spec.library, spec.name, *optional_texts))
        numbers = (spec.resolution, spec.max_tokens, spec.layer)
        # type() and not isinstance: JSON's true is not a number of pixels.
        has_numbers = all(type(number) is int for number in numbers if number is not None)
        if not (has_known_choices and has_texts and has_numbers):
            raise ValueError("fields of other kinds than expected")
    except (TypeError, ValueError) as error:
        raise EncoderError(f"not the description of an encoder: {one_line(error)}") from None
    if spec.library not in (*LIBRARIES, IMPORTED, JOINED):
        raise EncoderError(
            f"encoder of library {spec.library!r}: this apecache knows {', '.join(LIBRARIES)}"
        )
    return spec


def looks_local(name: str) -> bool:
    """Tell whether a name can only be a local folder."""
    return name.startswith(("/", "./", "../", "~")) or name in (".", "..")


def parse_encoder(text: str, modality: Modality) -> EncoderSpec:
    """Parse the name of an encoder.

    Examples: `timm:vit_small_patch14_dinov2`, `hf:sentence-transformers/all-MiniLM-L6-v2@main`,
    `timm:/folder`.

    Raises:
        EncoderError: no or an unknown library, an empty name, a library without encoders of that
            modality, or a local folder that does not exist.
    """
    require_type(text, str, "text")
    if modality not in ("image", "text"):
        raise OptionError(f"modality {modality!r}: expected image or text")
    library, colon, name = text.partition(":")
    if not colon or library not in LIBRARIES:
        hint = nearest(library, LIBRARIES) if colon else f"; did you mean timm:{text} or hf:{text}?"
        raise EncoderError(
            f"encoder {text!r}: expected LIBRARY:NAME with LIBRARY one of "
            f"{', '.join(LIBRARIES)}{hint}"
        )
    if library == "timm" and modality == "text":
        raise EncoderError(f"encoder {text!r}: timm has no text encoders; use hf:ID or st:ID")
    revision = None
    # A folder's path may hold an @ of its own.
    if not looks_local(name) and not os.path.isdir(name):
        name, _, revision = name.partition("@")
    if not name:
        raise EncoderError(f"encoder {text!r}: the name after {library}: is empty")
    spec = EncoderSpec(library, name=name, modality=modality, revision=revision or None)
    description = DESCRIPTIONS.get(library, "config.json")
    if spec.folder and not os.path.isfile(spec.folder / description):
        raise EncoderError(f"encoder {text!r}: {missing_folder(spec.folder, description)}")
    return spec


def parse_cut(text: str) -> tuple[Pooling, int | None]:
    """Parse `POOLING` or `POOLING@LAYER`, for example `cls`, `mean@8` and `tokens@-1`.

    Returns:
        The pooling, and the layer or None.

    Raises:
        OptionError: an unknown pooling, or a layer that is not a whole number.
    """
    pooling, at, layer = text.partition("@")
    if pooling not in POOLINGS or (at and not re.fullmatch(r"-?\d+", layer)):
        pooling_names = ", ".join(POOLINGS)
        raise OptionError(
            f"cut {text!r}: expected one of {pooling_names}, with @LAYER or "
            f"without{nearest(pooling, POOLINGS)}"
        )
    if pooling == "default" and at:
        raise OptionError(
            f"cut {text!r}: inside a model there is no pooling of its own; give mean{at}{layer}, …"
        )
    return pooling, int(layer) if at else None


def no_class_token(name: object, modality: Modality) -> EncoderError:
    """Return the error for a CLS pooling of an encoder that has no CLS token."""
    return EncoderError(
        f"{name} has no CLS token; use --{modality}-cut default or mean; for a recipe that takes "
        f"it, --set towers.{modality}_pooling=default"
    )


def frozen_only(spec: EncoderSpec) -> EncoderError:
    """Return the error for a model of sentence-transformers that is to be trained."""
    return EncoderError(
        f"encoder {spec} cannot be trained: st: encoders can be used frozen only; to train its "
        "transformer take hf:"
    )


def missing_folder(folder: Path, description: str) -> str:
    """Say what is wrong with a local folder: it does not exist, or it has no `description` file."""
    if not os.path.isdir(folder):
        return f"there is no folder {folder}{nearest_sibling(folder)}"
    return (
        f"folder {folder} has no {description}, so it is not a saved model; save one with "
        "save_pretrained"
    )
