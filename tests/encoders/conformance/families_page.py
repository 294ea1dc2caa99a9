"""Write the documentation's table of encoder families from the conformance table.

    python tests/encoders/conformance/families_page.py

builds every family, asks what it can do, and writes docs/reference/encoder-families.md.
"""

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[2] / "docs" / "reference" / "encoder-families.md"
LIBRARIES = {
    "timm": "timm",
    "hf": "transformers",
    "open_clip": "open_clip",
    "st": "sentence-transformers",
}
INTRODUCTION = """# Encoder families

This table is generated from the conformance test (`tests/encoders/conformance`). For each row the
test builds a small model with random weights in the library's own file format, and compares the
features with code written from the model cards: equal to 1e-5 in float32, on pictures of 900 x 130,
61 x 47 and 300 x 301 pixels, on texts of 1 to 600 tokens, in different batches, as a folder, as a
snapshot in the hub's cache and by hub id without a network.

- CLS: whether `--image-cut cls` or `--text-cut cls` exists.
- Layers: whether cuts after a block exist, as `mean@6`. For the others the reason is given when a
  cut is asked for.
- Trains: whether recipes can train within the encoder ([towers](../guide/towers.md)). All others
  can be used frozen, including all convolutional and hierarchical image encoders.

Architectures that no row names are refused, or opened as the nearest row of the same library. What
cannot be followed is refused with the options that remain: a text repository with modules that `hf:`
does not run, a decoder that looks ahead without a pooling, models whose output depends on the
padding (MobileBERT), processors without a fixed output size (SigLIP 2 NaFlex), Python code in a
repository.
"""


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What can be done with a family beside taking its output."""

    has_class: bool
    has_layers: bool
    trains: bool


def read_abilities(name: str, folder: Path) -> Abilities:
    """Build a family in an empty folder and try what it can do."""
    from families import FAMILIES

    from apecache.encoders.load import load_image_encoder, load_text_encoder
    from apecache.encoders.spec import parse_encoder
    from apecache.encoders.tower import tower_of
    from apecache.errors import EncoderError

    family = FAMILIES[name]
    family.build(folder)
    spec = parse_encoder(f"{family.library}:{folder}", family.modality)
    load: Any = load_image_encoder if family.modality == "image" else load_text_encoder

    def works(**settings: Any) -> bool:
        try:
            load(replace(spec, **settings), "cpu")
        except EncoderError:
            return False
        return True

    try:
        tower_of(load(spec, "cpu"))
        trains = True
    except EncoderError:
        trains = False
    return Abilities(
        has_class=works(pooling="cls"),
        has_layers=works(pooling="mean", layer=1),
        trains=trains,
    )


def render_page(abilities: dict[str, Abilities]) -> str:
    """Return the page; families stand in the order of the table."""
    from families import FAMILIES

    lines = [INTRODUCTION]
    for library, title in LIBRARIES.items():
        for modality in ("image", "text"):
            rows = [
                name
                for name, family in FAMILIES.items()
                if (family.library, family.modality) == (library, modality)
            ]
            if not rows:
                continue
            lines.append(f"## {title}: {modality}s\n")
            lines.append("| family | CLS | layers | trains |")
            lines.append("|---|---|---|---|")
            lines += [_row(name, library, abilities[name]) for name in rows]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _row(name: str, library: str, abilities: Abilities) -> str:
    marks = (abilities.has_class, abilities.has_layers, abilities.trains)
    title = "vit" if name == library else name.removeprefix(f"{library}: ")
    for suffix in (", image", ", text", ", classifier's input"):
        title = title.removesuffix(suffix)
    return f"| {title} | {' | '.join('yes' if mark else '-' for mark in marks)} |"


def generate_page() -> str:
    """Build all families and return the page."""
    from families import FAMILIES

    abilities: dict[str, Abilities] = {}
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            abilities[name] = read_abilities(name, Path(folder))
    return render_page(abilities)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    PAGE.write_text(generate_page(), encoding="utf-8")
