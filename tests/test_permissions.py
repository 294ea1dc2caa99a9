"""What the system does not let be read is reported as that, not as damaged or missing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from permissions import modes_bind

from apecache.errors import ApecacheError, ManifestError, nearest_sibling
from apecache.evaluate.class_names import read_class_names
from apecache.evaluate.prompts import read_templates
from apecache.report.run_page import _history as read_history
from apecache.report.sweep_page import sweep_page
from apecache.runs.checkpoint import CHECKPOINT, load_checkpoint
from apecache.runs.encoders import DESCRIPTION as ENCODERS
from apecache.runs.encoders import read_description as read_encoders
from apecache.runs.encoders import read_tensors
from apecache.runs.folder import HISTORY
from apecache.runs.heads import DESCRIPTION, WEIGHTS, load_heads
from apecache.runs.ledger import LEDGER, load_ledger, read_extraction
from apecache.search.faiss_index import open_vectors
from apecache.search.index_files import read_description as read_index
from apecache.search.index_files import read_rows
from apecache.storage.local_files import LocalFiles
from apecache.sweeps.run import DESCRIBED

ARRAYS: Any = ()
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "checkpoint": (CHECKPOINT, load_checkpoint),
    "encoders": (ENCODERS, read_encoders),
    "encoder tensors": ("x", lambda folder: read_tensors(folder / "x")),
    "ledger": (LEDGER, load_ledger),
    "extraction": ("x", lambda folder: read_extraction(folder / "x", ARRAYS)),
    "history": (HISTORY, read_history),
    "sweep": (DESCRIBED, sweep_page),
    "index": ("index.json", read_index),
    "index rows": ("image.jsonl", lambda folder: read_rows(folder, "image")),
    "index vectors": ("x", lambda folder: open_vectors(folder / "x", "Flat")),
    "class names": ("x", lambda folder: read_class_names(folder / "x")),
    "templates": ("x", lambda folder: read_templates(folder / "x")),
}
"""The file that each function reads from a folder, and the function."""


@pytest.mark.parametrize("reader", READERS)
def test_a_missing_permission_is_neither_damage_nor_a_missing_file(
    reader: str,
    tmp_path: Path,
) -> None:
    name, read = READERS[reader]
    path = tmp_path / name
    path.write_bytes(b"\xff not what is expected")
    with pytest.raises(ApecacheError) as damaged:
        read(tmp_path)
    assert str(path) in str(damaged.value) or str(tmp_path) in str(damaged.value)
    path.chmod(0)
    with modes_bind(), pytest.raises(PermissionError) as refused:
        read(tmp_path)
    assert refused.value.filename == str(path)


@pytest.mark.parametrize("name", [DESCRIPTION, WEIGHTS])
def test_heads_without_permission_are_not_a_run_to_train_again(
    name: str,
    tiny_run: Path,
    tmp_path: Path,
) -> None:
    for path in tiny_run.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).chmod(0)
    with modes_bind(), pytest.raises(PermissionError) as refused:
        load_heads(tmp_path)
    assert refused.value.filename == str(tmp_path / name)


def test_a_parquet_table_without_permission_is_not_to_be_written_again(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from apecache.data.sources import open_pairs

    path = tmp_path / "pairs.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(ManifestError, match="write or copy it again"):
        open_pairs(path)
    path.chmod(0)
    with modes_bind(), pytest.raises(ManifestError, match="Permission denied") as refused:
        open_pairs(path)
    assert "again" not in str(refused.value)


def test_a_hint_raises_nothing_where_a_folder_cannot_be_listed_or_searched(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    (parent / "store").mkdir(parents=True)
    missing = parent / "stroe"
    assert nearest_sibling(missing) == LocalFiles(missing).hint() == "; did you mean store?"
    assert nearest_sibling(parent / "store") == LocalFiles(parent / "store").hint() == ""
    for mode in (0o311, 0):
        parent.chmod(mode)
        with modes_bind():
            assert nearest_sibling(missing) == LocalFiles(missing).hint() == ""
            assert LocalFiles(missing).free_bytes() > 0
    parent.chmod(0o755)
