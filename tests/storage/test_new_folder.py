"""Folders and files that get their name only once they are whole."""

from pathlib import Path

import pytest

from apecache.storage.replace import new_file, new_folder, scratch_of


def test_a_folder_gets_its_name_at_the_end_of_the_block(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with new_folder(out) as scratch:
        (scratch / "inner").mkdir()
        (scratch / "inner" / "x").write_text("1")
        assert not out.exists()
    assert (out / "inner" / "x").read_text() == "1"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_error_leaves_no_folder_and_no_scratch(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out") as scratch:
        (scratch / "x").rename(scratch / "no" / "x")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    left = scratch_of(tmp_path / "out")
    left.mkdir()
    (left / "old").write_text("1")
    with new_folder(tmp_path / "out") as scratch:
        assert list(scratch.iterdir()) == []
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_is_replaced_whole_and_kept_on_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), new_file(path) as scratch:
        scratch.write_text("half \ud800", encoding="utf-8")
    assert path.read_text() == "old"
    with new_file(path) as scratch:
        scratch.write_text("new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
