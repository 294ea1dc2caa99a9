"""Names of encoders: what people type, and what a store keeps to find them again."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from apecache.arguments import require_type
from apecache.errors import EncoderError, OptionError, nearest, one_line
from apecache.fingerprint import Modality

Pooling = Literal["default", "cls", "mean", "max", "cls+mean", "tokens"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
ComputeDtype = Literal["float32", "float16", "bfloat16"]
Resize = Literal["reference", "torchvision"]
LIBRARIES = ("timm", "hf", "open_clip", "st")
DESCRIPTIONS = {"open_clip": "open_clip_config.json", "st": "modules.json"}
"""The file that makes a local folder one of the library's; config.json in the others."""


@dataclass(frozen=True)
class EncoderSpec:
    """`timm:NAME@REV`, `hf:ID@REV`, `open_clip:NAME/TAG` or `st:ID@REV` (sentence-transformers); a
    local folder stands in place of the name.

    `pooling`: `default` is the encoder's own (timm's head, a sentence-transformers folder's pooling
    file, SigLIP's attention pooling, CLIP's projection, else CLS for images and the
    attention-masked mean for text); `cls+mean` is CLS and mean patch (or word) one after the other,
    `tokens` all of them. `layer`: after how many blocks, before the final norm; negative counts
    from the end (-1: after the last); None: the model's output. `resolution` in pixels and
    `max_tokens` override what the encoder's files say. `prefix` is put before every text (E5:
    `query: `; None: what the encoder's files or name ask for). `resize`: `torchvision` decodes and
    resizes on uint8 tensors, faster and different in the last bits. `dtype` is that of the
    computation; features are stored as float16.
    """

    library: str
    name: str
    modality: Modality
    revision: str | None = None
    pooling: Pooling = "default"
    resolution: int | None = None
    max_tokens: int | None = None
    dtype: ComputeDtype = "float32"
    layer: int | None = None
    prefix: str | None = None
    resize: Resize = "reference"

    @property
    def folder(self) -> Path | None:
        """The local folder, if the name is one (absolute, `./`, `../`, `~`, or an existing
        folder)."""
        path = os.path.expanduser(self.name)
        return Path(path) if looks_local(self.name) or os.path.isdir(path) else None

    @property
    def slug(self) -> str:
        """A name safe as a folder and as a Zarr group: the last part of a local folder, a hub id
        with `--` for `/`."""
        name = self.folder.resolve().name if self.folder else self.name.replace("/", "--")
        parts = [name, "" if self.pooling == "default" else self.pooling]
        parts += [
            f"layer{self.layer}" if self.layer is not None else "",
            self.resize.removeprefix("reference"),
        ]
        parts += [f"prefix-{self.prefix}" if self.prefix is not None else ""]
        parts += [
            f"{self.resolution}px" if self.resolution else "",
            f"{self.max_tokens}t" if self.max_tokens else "",
        ]
        parts += ["" if self.dtype == "float32" else self.dtype]
        return (
            re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(p for p in parts if p)).strip(".-")[:100]
            or "encoder"
        )

    def __str__(self) -> str:
        return f"{self.library}:{self.name}" + (f"@{self.revision}" if self.revision else "")

    def with_name(self, text: str) -> "EncoderSpec":
        """The same settings for an encoder that now has the name `text` (a local folder that has
        moved)."""
        other = parse_encoder(text, self.modality)
        return replace(self, library=other.library, name=other.name, revision=other.revision)


def spec_from_json(value: object) -> EncoderSpec:
    """A spec as a store or a head keeps it (`dataclasses.asdict`).

    Raises:
        EncoderError: not what an apecache has written.
    """
    try:
        spec = EncoderSpec(**value)  # type: ignore[arg-type]
        texts = (
            spec.library,
            spec.name,
            *(text for text in (spec.revision, spec.prefix) if text is not None),
        )
        sizes = [
            size for size in (spec.resolution, spec.max_tokens, spec.layer) if size is not None
        ]
        known = (
            spec.modality in get_args(Modality)
            and spec.pooling in POOLINGS
            and spec.dtype in get_args(ComputeDtype)
            and spec.resize in get_args(Resize)
        )
        if (
            not known
            or not all(type(text) is str for text in texts)
            or not all(type(size) is int for size in sizes)
        ):
            raise ValueError("fields of other kinds than expected")
    except (TypeError, ValueError) as error:
        raise EncoderError(f"not the description of an encoder: {one_line(error)}") from None
    if spec.library not in LIBRARIES:
        raise EncoderError(
            f"encoder of library {spec.library!r}: this apecache knows {', '.join(LIBRARIES)}"
        )
    return spec


def looks_local(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name in (".", "..")


def parse_encoder(text: str, modality: Modality) -> EncoderSpec:
    """`timm:vit_small_patch14_dinov2`, `hf:sentence-transformers/all-MiniLM-L6-v2@main`,
    `timm:/folder`, …

    Raises:
        EncoderError: no or an unknown library, an empty name, a library without encoders of that
            modality, or a local
        folder that is not there.
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
    if (library, modality) in (("timm", "text"), ("st", "image")):
        other = "hf:ID or st:ID" if library == "timm" else "timm:NAME or hf:ID"
        raise EncoderError(
            f"encoder {text!r}: {library} has no {modality} encoders here; use {other}"
        )
    revision = None
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
    """`POOLING` or `POOLING@LAYER`: `cls`, `mean@8`, `tokens@-1`, …

    Raises:
        OptionError: an unknown pooling, or a layer that is no whole number.
    """
    pooling, at, layer = text.partition("@")
    if pooling not in POOLINGS or (at and not re.fullmatch(r"-?\d+", layer)):
        known = ", ".join(POOLINGS)
        raise OptionError(
            f"cut {text!r}: expected one of {known}, with @LAYER or "
            f"without{nearest(pooling, POOLINGS)}"
        )
    if pooling == "default" and at:
        raise OptionError(
            f"cut {text!r}: inside a model there is no pooling of its own; give mean{at}{layer}, …"
        )
    return pooling, int(layer) if at else None


def missing_folder(folder: Path, description: str) -> str:
    if not os.path.isdir(folder):
        siblings = (
            [p.name for p in folder.parent.iterdir() if p.is_dir()]
            if folder.parent.is_dir()
            else []
        )
        return f"there is no folder {folder}{nearest(folder.name, siblings)}"
    return (
        f"folder {folder} has no {description}, so it is not a saved model; save one with "
        "save_pretrained"
    )
