"""Make this folder's drawings and their table from the unpacked Debian package pysiogame 4.20.01-1
(eduActiv8).

    dpkg-deb -x pysiogame_4.20.01-1_all.deb SOURCE
    python build.py SOURCE OUT

The drawings are by Art4Apps / Smart4Kids (http://www.art4apps.org/), licensed CC BY-SA. The words
are eduActiv8's own word lists, GPL-3.0. ATTRIBUTION.md has the details of both.

What is changed: byte-for-byte copies, two pictures whose word is not what they show and two of
uncertain origin are left out; what is left becomes plain RGB JPEG, at most 224 pixels on the
longest side, without metadata. Writes OUT/images and OUT/pairs.tsv; the same source gives the same
split.
"""

import argparse
import ast
import hashlib
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from PIL import Image

SIDE = 224
QUALITY = 78
VAL_SHARE = 0.2
HEADER = ("image", "caption", "split", "label", "lang")
ENGLISH = ("en_GB", "en_US")
LEFT_OUT = {
    "actions/clay": "a noun among the verbs",
    "animals/lama": "shows a llama, which has its own picture",
    "people/bride": "replaced in 2019, origin uncertain",
    "people/tribe": "replaced in 2019, origin uncertain",
}


class Picture(NamedTuple):
    name: str  # "animals/cow"
    file: Path
    place: int  # of its word in the word list of its category

    @property
    def category(self) -> str:
        return self.name.split("/")[0]


def file_names(game: Path) -> dict[str, list[str]]:
    """Category to picture names, in the order of the word lists; game082.py is where the program
    pairs the two."""
    names: dict[str, list[str]] = {}
    for node in ast.walk(
        ast.parse((game / "game_boards" / "game082.py").read_text(encoding="utf-8"))
    ):
        if isinstance(node, ast.If):
            found = {
                ast.unparse(s.targets[0]): s.value for s in node.body if isinstance(s, ast.Assign)
            }
            if "category" in found and "self.imgs" in found:
                names[ast.literal_eval(found["category"])] = ast.literal_eval(found["self.imgs"])
    return names


def word_lists(game: Path, language: str) -> dict[str, list[str]]:
    tree = ast.parse(
        (game / "i18n" / "custom" / "a4a_py" / f"{language}.py").read_text(encoding="utf-8")
    )
    return {
        ast.literal_eval(s.targets[0].slice).removeprefix("a4a_"): ast.literal_eval(s.value)
        for s in tree.body
        if isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Subscript)
    }


def pictures(game: Path) -> list[Picture]:
    folder = game / "res" / "images" / "art4apps"
    found = [
        Picture(f"{category}/{name}", folder / category / f"{name}.jpg", place)
        for category, names in file_names(game).items()
        for place, name in enumerate(names)
    ]
    kept: dict[str, Picture] = {}
    for picture in sorted(found):
        first = kept.setdefault(hashlib.sha256(picture.file.read_bytes()).hexdigest(), picture)
        if first is not picture:
            print(f"left out {picture.name}: the same file as {first.name}")
    for name, why in LEFT_OUT.items():
        print(f"left out {name}: {why}")
    return [picture for picture in kept.values() if picture.name not in LEFT_OUT]


def splits(chosen: list[Picture]) -> dict[str, str]:
    """Of every category, the fifth of the pictures whose names hash lowest is for validation."""
    by_hash = sorted(
        (p.category, hashlib.sha256(p.name.encode()).hexdigest(), p.name) for p in chosen
    )
    sizes = Counter(p.category for p in chosen)
    seen = Counter[str]()
    split: dict[str, str] = {}
    for category, _, name in by_hash:
        split[name] = "val" if seen[category] < round(VAL_SHARE * sizes[category]) else "train"
        seen[category] += 1
    return split


def rows(game: Path, chosen: list[Picture]) -> list[tuple[str, ...]]:
    """One row for each English word of each picture (the British and the American list are the same
    today)."""
    split = splits(chosen)
    result = set[tuple[str, ...]]()
    sizes = {category: len(names) for category, names in file_names(game).items()}
    for source in ENGLISH:
        lists = word_lists(game, source)
        if sizes != {category: len(words) for category, words in lists.items()}:
            raise SystemExit(
                f"{source}: the word lists do not have the lengths of the picture lists"
            )
        for picture in chosen:
            word = unicodedata.normalize("NFC", lists[picture.category][picture.place].strip())
            if not word.startswith("<"):
                label = picture.category.replace("_n_veg", " and vegetables").replace(
                    "_n_",
                    " and ",
                )
                result.add((f"images/{picture.name}.jpg", word, split[picture.name], label, "en"))
    return sorted(result, key=lambda row: (row[0], row[4], row[1]))


def write_table(path: Path, table: list[tuple[str, ...]]) -> None:
    path.write_text(
        "".join("\t".join(row) + "\n" for row in (HEADER, *table)),
        encoding="utf-8",
        newline="\n",
    )
    print(f"{path.name}: {len(table)} rows")


def write_image(source: Path, target: Path) -> None:
    with Image.open(source) as opened:
        image = opened.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    image.info.clear()
    target.parent.mkdir(parents=True, exist_ok=True)
    image.save(target, "JPEG", quality=QUALITY, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make the example drawings from the unpacked package pysiogame."
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="the folder the package was unpacked into",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="where images/ and pairs.tsv go")
    options = parser.parse_args()
    source: Path = options.source
    out: Path = options.out
    game = source / "usr" / "share" / "games" / "pysiogame"
    if not game.is_dir():
        parser.error(f"{source} holds no usr/share/games/pysiogame")
    if (out / "images").exists():
        parser.error(f"{out / 'images'} exists already; remove it first")
    chosen = pictures(game)
    for picture in chosen:
        write_image(picture.file, out / "images" / f"{picture.name}.jpg")
    print(f"images: {len(chosen)}")
    write_table(out / "pairs.tsv", rows(game, chosen))


if __name__ == "__main__":
    main()
