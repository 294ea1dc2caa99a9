import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apecache.errors import StoreError
from apecache.storage.files import TEMPORARY
from apecache.storage.local_files import LocalFiles


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@settings(max_examples=30, deadline=None)
@given(buffers=st.lists(st.binary(max_size=300), max_size=4), step=st.integers(1, 50))
def test_an_object_is_read_back_whole_even_where_the_system_writes_a_few_bytes_at_a_time(
    tmp_path_factory: pytest.TempPathFactory,
    buffers: list[bytes],
    step: int,
) -> None:
    files = LocalFiles(tmp_path_factory.mktemp("files") / "store")
    real = os.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:step]))
        files.write("a/b/c", *buffers)
    assert files.read("a/b/c") == b"".join(buffers)
    assert everything(files.root) == ["a/b/c"]


def test_writing_replaces_and_creating_does_not(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path / "store")
    assert files.put_if_absent("x", b"first")
    assert not files.put_if_absent("x", b"second")
    assert files.read("x") == b"first"
    files.write("x", b"third")
    assert files.read("x") == b"third"
    assert everything(tmp_path) == ["store/x"]


def test_of_many_creators_exactly_one_puts_the_object_and_it_is_whole(tmp_path: Path) -> None:
    put: list[int] = []
    gate = threading.Barrier(8)

    def create(number: int) -> None:
        gate.wait()
        if LocalFiles(tmp_path / "store").put_if_absent("x", bytes([number]) * 10_000):
            put.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(put) == 1
    assert LocalFiles(tmp_path / "store").read("x") == bytes(put) * 10_000


def test_a_list_is_sorted_and_leaves_out_temporary_files(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    for name in ("b", "a", f"{TEMPORARY}1-x", "c"):
        (tmp_path / name).write_bytes(b"")
    assert files.list("") == ["a", "b", "c"]
    assert files.list("a") == files.list("missing") == []


@pytest.mark.parametrize(("size", "count"), [(5, 5), (8, 8), (9, 9), (20, 9), (0, 0)])
def test_reading_into_buffers_tells_a_shorter_and_a_longer_object(
    tmp_path: Path,
    size: int,
    count: int,
) -> None:
    data = bytes(range(1, size + 1))
    (tmp_path / "x").write_bytes(data)
    target = bytearray(8)
    view = memoryview(target)
    seen = bytearray()
    assert LocalFiles(tmp_path).read_into("x", [view[:3], view[3:]], seen.extend) == count
    assert target == data[:8].ljust(8, b"\0")
    assert seen == data[:8]


def test_a_missing_object_is_a_missing_file_and_an_unreadable_one_a_store_error(
    tmp_path: Path,
) -> None:
    files = LocalFiles(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError):
        files.read("missing")
    with pytest.raises(FileNotFoundError):
        files.read_into("missing", [], bytes)
    for read in (lambda: files.read("folder"), lambda: files.read_into("folder", [], bytes)):
        with pytest.raises(StoreError, match=r"folder: .*; permit reading"):
            read()


@pytest.mark.parametrize("name", ["file/x", "x" * 300])
@pytest.mark.parametrize("put", [LocalFiles.write, LocalFiles.put_if_absent])
def test_what_the_system_refuses_is_one_line_with_the_path_and_what_to_do(
    tmp_path: Path,
    name: str,
    put,
) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError) as caught:
        put(LocalFiles(tmp_path), name, b"data")
    assert str(tmp_path / name) in str(caught.value)
    assert "run the same command again" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert everything(tmp_path) == ["file"]


def test_an_interrupt_leaves_no_temporary_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    files = LocalFiles(tmp_path / "store")
    files.write("x", b"old")
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write("x", b"new")
    assert everything(tmp_path) == ["store/x"]
    assert files.read("x") == b"old"


def test_a_store_may_be_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    LocalFiles(Path(".")).write("a/x", b"1")
    LocalFiles(Path("below")).write("x", b"2")
    assert everything(tmp_path) == ["a/x", "below/x"]


def test_what_killed_writers_left_is_removed_but_not_while_somebody_writes(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    files.write("a/x", b"1")
    files.write("other/z", b"3")
    for folder in ("", "a", "a/deep", "other"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{TEMPORARY}1-00").write_bytes(b"")
    with files.stage({"a/y": [b"2"]}):
        LocalFiles(tmp_path).remove_temporary("a")
        assert len(everything(tmp_path)) == 7
    files.remove_temporary("a")
    assert everything(tmp_path) == ["a/x", f"other/{TEMPORARY}1-00", "other/z"]


WAITS = """
import sys
from pathlib import Path
from apecache.storage.local_files import LocalFiles
with LocalFiles(Path(sys.argv[1])).exclusive("folder"):
    sys.stdout.write("held\\n")
    sys.stdout.flush()
    sys.stdin.read()
"""


def test_a_folder_is_held_by_one_writer_and_free_again_when_that_writer_is_killed(
    tmp_path: Path,
) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    entered = threading.Event()

    def enter() -> None:
        with LocalFiles(tmp_path).exclusive("folder"):
            entered.set()

    with subprocess.Popen([sys.executable, "-c", WAITS, str(tmp_path)], **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == b"held\n"
        waiting = threading.Thread(target=enter)
        waiting.start()
        assert not entered.wait(0.2)
        other.kill()
        assert entered.wait(10)
        waiting.join()


def test_a_process_forked_by_the_holder_does_not_keep_the_folder(tmp_path: Path) -> None:
    """As data loaders do: the child has a copy of every open file."""
    files = LocalFiles(tmp_path)
    reading, writing = os.pipe()
    with files.exclusive("folder"):
        child = os.fork()
        if not child:
            os.read(reading, 1)
            os._exit(0)
    entered = threading.Event()

    def enter() -> None:
        with files.exclusive("folder"):
            entered.set()

    thread = threading.Thread(target=enter)
    thread.start()
    free = entered.wait(5)
    os.write(writing, b"x")
    os.waitpid(child, 0)
    thread.join()
    assert free


def test_what_was_staged_and_not_put_is_removed(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path / "store")
    files.write("a/x", b"old")
    with files.stage({"a/x": (b"new",), "b/y": (b"1", b"2"), "b/z": (b"3",)}) as put:
        assert files.read("a/x") == b"old"
        assert not files.exists("b/y")
        put(["b/y"])
        assert files.read("b/y") == b"12"
    assert everything(tmp_path) == ["store/a/x", "store/b/y"]
    assert files.read("a/x") == b"old"


def test_an_error_removes_what_was_staged(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path / "store")

    def interrupted() -> None:
        with files.stage({"x": (b"1",), "y": (b"2",)}) as put:
            put(["x"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert everything(tmp_path) == ["store/x"]


def test_many_staged_objects_need_few_open_files(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path / "store")
    objects = {f"a/{number}": (b"1",) for number in range(200)}
    lowest_free = os.dup(0)
    os.close(lowest_free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 50, hard))
    try:
        with files.stage(objects) as put:
            put(objects)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(everything(tmp_path)) == len(objects)
