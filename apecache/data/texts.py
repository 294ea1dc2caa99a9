"""Open text files: captions without images, one per line, or a table that ends in `.txt`.

A store counts captions by the rows of their images. So each line is a row of its own without an
image, whose key is the 1-based line number. Blank lines are skipped.
"""

from pathlib import Path

from apecache.data.delimited import first_lines, is_table
from apecache.data.images import SUFFIXES
from apecache.data.pairs import Pair, PairSource, SourceFields
from apecache.data.spec import OpenSpec, require_only
from apecache.data.tables import open_table
from apecache.data.text_files import open_text
from apecache.errors import ManifestError


def open_texts(path: Path, spec: OpenSpec) -> PairSource:
    """Open a text file of captions, or of images and captions as Flickr8k has them.

    Raises:
        ManifestError: The file is not UTF-8, has only blank lines, or lines are names of images.
    """
    lines = first_lines(path)
    if lines and is_table(lines, path, spec):
        return open_table(path, spec)
    if lines and all(line.strip().lower().endswith(SUFFIXES) for line in lines):
        raise ManifestError(
            f"{path}: names of images without captions; expected a caption on each line, or a "
            "table of images and captions: give the folder of the images, and lists of a split in "
            "a folder as --split-file"
        )
    require_only(spec, path)
    pairs = []
    with open_text(path, newline=None) as file:
        for number, line in enumerate(file, 1):
            caption = line.removesuffix("\n")
            if caption.strip():
                pairs.append(Pair(key=str(number), captions=(caption,), languages=("",)))
    if not pairs:
        raise ManifestError(f"{path}: no captions; expected one on each line")
    return PairSource(tuple(pairs), origin=str(path), fields=SourceFields(caption="line"))
