"""List the files below a folder.

Hidden files are skipped. A link to a folder is followed if it leads outside the tree to a folder
that is allowed; folders of the tree itself are read anyway.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from apecache.data.images import REFUSED_SUFFIXES, SUFFIXES
from apecache.data.media import FolderMedia, media_below
from apecache.data.signatures import SIGNATURE_BYTES, is_readable_image

LINK_OUTSIDE = "links to folders outside (allow them with --allow-root)"
LINK_INSIDE = "links to folders that are read anyway"
HIDDEN = "hidden files and folders"


@dataclass(frozen=True, kw_only=True)
class FileTree:
    """Hold the files below a folder."""

    folder: Path
    files: tuple[str, ...]
    """Paths below the folder, sorted, because the file system lists files in no defined order."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of files and folders that were not listed, by reason."""

    def ending(self, suffix: str) -> list[str]:
        """Return the files with an ending."""
        return [name for name in self.files if name.lower().endswith(suffix)]

    def images(self) -> list[str]:
        """Return the images: by their ending, or by their content if they have none."""
        return [name for name in self.files if self._is_image(name)]

    def _is_image(self, name: str) -> bool:
        suffix = PurePosixPath(name).suffix.lower()
        if suffix:
            return suffix in SUFFIXES or suffix in REFUSED_SUFFIXES
        try:
            with (self.folder / name).open("rb") as file:
                return is_readable_image(file.read(SIGNATURE_BYTES))
        except OSError:
            return False


def read_tree(folder: Path, allow_root: Sequence[object] = ()) -> FileTree:
    """List the files below a folder.

    Args:
        folder: The folder.
        allow_root: Folders outside it that links may lead to.
    """
    media = media_below(folder, tuple(map(str, allow_root)))
    assert isinstance(media, FolderMedia)
    walk = _Walk(folder, media.allowed)
    return FileTree(folder=folder, files=tuple(sorted(walk.files())), skipped=walk.skipped)


class _Walk:
    """Walk below a folder, and count what is skipped."""

    def __init__(self, folder: Path, allowed: Sequence[Path]) -> None:
        self.folder = folder
        self.root = os.path.realpath(folder)
        self.allowed = [os.path.realpath(path) for path in allowed]
        self.skipped: Counter[str] = Counter()
        self.followed: set[str] = set()

    def files(self) -> Iterator[str]:
        for directory, subfolders, names in os.walk(self.folder, followlinks=True):
            # In place: os.walk then does not enter the folders that are left out.
            subfolders[:] = [name for name in subfolders if self._enters(directory, name)]
            relative = Path(directory).relative_to(self.folder)
            for name in names:
                if name.startswith("."):
                    self.skipped[HIDDEN] += 1
                elif not _is_pipe_or_device(os.path.join(directory, name)):
                    yield (relative / name).as_posix()

    def _enters(self, directory: str, name: str) -> bool:
        if name.startswith("."):
            self.skipped[HIDDEN] += 1
            return False
        path = os.path.join(directory, name)
        if not os.path.islink(path):
            return True
        target = os.path.realpath(path)
        if os.path.commonpath([self.root, target]) == self.root or target in self.followed:
            self.skipped[LINK_INSIDE] += 1
            return False
        if not any(os.path.commonpath([base, target]) == base for base in self.allowed):
            self.skipped[LINK_OUTSIDE] += 1
            return False
        self.followed.add(target)
        return True


def _is_pipe_or_device(path: str) -> bool:
    # A link that leads nowhere is listed: its row says so.
    return os.path.exists(path) and not os.path.isfile(path)
