"""Put a run, its encoders and an index into one folder that opens on another machine.

BUNDLE/head.json, … (or encoder.…)   the run
BUNDLE/encoders/image, text           what was a folder or a hub repository
BUNDLE/index                          a search index of the run
BUNDLE/bundle.json                    where the encoders are, relative to the folder it is in
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apecache.arguments import AnyPath, as_path
from apecache.encoders.snapshot import resolve_folder
from apecache.encoders.spec import EncoderSpec
from apecache.errors import RunError, one_line, require_new
from apecache.fingerprint import Modality
from apecache.runs.load import copy_run, load_run, recorded_encoder
from apecache.runs.model_card import CARD
from apecache.storage.replace import new_folder, replace_text

BUNDLE = "bundle.json"
ENCODERS = "encoders"
SIDES: tuple[Modality, ...] = ("image", "text")
WEIGHT_PATTERNS = (
    ("*.safetensors", "[0-9]*_*/*.safetensors"),
    ("*.bin", "[0-9]*_*/*.bin"),
)
"""Of a hub repository, the preferred ones first."""


@dataclass(frozen=True, kw_only=True)
class BundleReport:
    """Say what is in a bundle."""

    out: Path
    encoders: Mapping[str, str]
    """Of each side, the folder within the bundle or the name that stays."""
    has_index: bool
    n_bytes: int


def bundled_encoders(folder: Path) -> tuple[EncoderSpec | None, EncoderSpec | None]:
    """Return the encoders of a bundle in its folders; None where the run's own name holds.

    Args:
        folder: of a run or an index; without a bundle.json nothing has moved.

    Raises:
        RunError: bundle.json is damaged.
    """
    path = folder / BUNDLE
    if not path.is_file():
        return None, None
    try:
        encoder_folders: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["encoders"]
        moved = [_moved(folder, side, encoder_folders.get(side)) for side in SIDES]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({one_line(error)}); make the bundle again") from None
    return moved[0], moved[1]


def write_bundle(
    run: AnyPath,
    out: AnyPath,
    index: AnyPath | None = None,
    image: EncoderSpec | None = None,
    text: EncoderSpec | None = None,
) -> BundleReport:
    """Copy a run with its encoders, and an index, into a new folder.

    Encoders that are folders or hub repositories are copied. The names of timm and open_clip stay
    names, which the other machine has to reach.

    Args:
        run: folder of a finished run.
        out: folder, which must not exist or be empty.
        index: index of this run; None: none.
        image: image encoder at its new place, if it has moved.
        text: text encoder at its new place, if it has moved.

    Raises:
        RunError: not a finished run, or an index of another one.
        EncoderError: an encoder cannot be reached.
    """
    run = as_path(run, "run")
    out = as_path(out, "out")
    index = None if index is None else as_path(index, "index")
    require_new(out, "folder", remedy="give the name of a new folder")
    final = out.absolute()
    specs: dict[Modality, EncoderSpec] = {
        "image": image or recorded_encoder(run, "image"),
        "text": text or recorded_encoder(run, "text"),
    }
    if index is not None:
        _require_index(index, run, specs)
    names: dict[str, str] = {}
    with new_folder(final) as scratch:
        # The description comes last within it: its presence makes the folder a finished run.
        copy_run(run, scratch)
        if (run / CARD).is_file():
            shutil.copyfile(run / CARD, scratch / CARD)
        encoder_folders: dict[str, str] = {}
        for side, spec in specs.items():
            source = _folder_of(spec)
            if source is None:
                names[side] = str(spec)
                continue
            # Files of the hub's cache are links to blobs: the bundle gets the bytes.
            shutil.copytree(source, scratch / ENCODERS / side, symlinks=False)
            encoder_folders[side] = f"{ENCODERS}/{side}"
            names[side] = encoder_folders[side]
        _write_places(scratch, encoder_folders)
        if index is not None:
            shutil.copytree(index, scratch / "index")
            # The index finds the encoders beside it.
            from_index = {side: f"../{folder}" for side, folder in encoder_folders.items()}
            _write_places(scratch / "index", from_index)
    files = [path for path in final.rglob("*") if path.is_file()]
    return BundleReport(
        out=out,
        encoders=names,
        has_index=index is not None,
        n_bytes=sum(path.stat().st_size for path in files),
    )


def _moved(folder: Path, side: Modality, relative_folder: str | None) -> EncoderSpec | None:
    if relative_folder is None:
        return None
    # Of the recorded encoder only the name changes: pooling and resolution stay.
    recorded = recorded_encoder(folder, side)
    return replace(recorded, name=str((folder / relative_folder).resolve()), revision=None)


def _write_places(folder: Path, encoder_folders: Mapping[str, str]) -> None:
    description = {"format": 1, "encoders": dict(encoder_folders)}
    replace_text(folder / BUNDLE, json.dumps(description, indent=1))


def _folder_of(spec: EncoderSpec) -> Path | None:
    """Return the folder with all files of an encoder; None for a name that no folder stands for."""
    is_hub_name = spec.library in ("hf", "st")
    if spec.folder is None and not is_hub_name:
        return None
    return resolve_folder(spec, WEIGHT_PATTERNS, modules=("[0-9]*_*/*",))


def _require_index(index: Path, run: Path, specs: Mapping[Modality, EncoderSpec]) -> None:
    """Refuse an index that was built with other heads than the run's."""
    path = index / "index.json"
    if not path.is_file():
        raise RunError(f"{index} is not an index; make one with: apecache index {run} …")
    description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    digest = load_run(run, image=specs["image"], text=specs["text"]).digest
    if description.get("head") != digest:
        raise RunError(f"{index} was not built with {run}; build it again with: apecache index")
