"""Run folders on object storage, against moto's S3 on loopback."""

from pathlib import Path

import numpy as np
import pytest
from remote import S3Server
from tiny import tree

import apecache
from apecache.errors import RunError
from apecache.runs.load import load_run
from apecache.runs.remote import fetched_run, kept_run
from apecache.storage.bucket import open_bucket


def test_a_run_is_kept_and_read_as_it_is(bucket: str, tiny_run: Path, s3_server: S3Server) -> None:
    files = tree(tiny_run)
    with kept_run(f"{bucket}/a/run") as here:
        assert not here.exists()
        for name, data in files.items():
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).write_bytes(data)
    with fetched_run(f"{bucket}/a/run") as there:
        assert tree(there) == files
    assert not there.exists()
    texts = ["a red circle", "a blue square"]
    embedded = apecache.load(f"{bucket}/a/run").encode_text(texts)
    assert np.array_equal(embedded, apecache.load(tiny_run).encode_text(texts))


def test_a_folder_is_itself(tiny_run: Path) -> None:
    with fetched_run(tiny_run) as here, kept_run(str(tiny_run)) as there:
        assert here == there == tiny_run


def test_what_an_interrupt_leaves_is_there_for_the_next_time_and_no_finished_run(
    bucket: str,
) -> None:
    def interrupted() -> None:
        with kept_run(f"{bucket}/run") as here:
            here.mkdir()
            (here / "checkpoint.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with (
        fetched_run(f"{bucket}/run") as there,
        pytest.raises(RunError, match="is not a finished run"),
    ):
        load_run(there)
    with kept_run(f"{bucket}/run") as here:
        assert tree(here) == {"checkpoint.safetensors": b"half"}
        (here / "checkpoint.safetensors").unlink()
        (here / "head.json").write_bytes(b"{}")
    assert [entry.key for entry in open_bucket(bucket)[0].walk("run")] == ["run/head.json"]


def test_until_all_is_there_no_run_is_finished(
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def keep(data: bytes) -> None:
        with kept_run(f"{bucket}/run") as here:
            here.mkdir(exist_ok=True)
            for name in ("a.json", "head.json", "head.safetensors", "history.jsonl"):
                (here / name).write_bytes(data)

    keep(b"old")
    opened = open_bucket(bucket)[0]
    seen = []
    real = type(opened).write

    def write(self, key: str, data: bytes) -> None:  # type: ignore[no-untyped-def]
        seen.append((key, self.size("run/head.json")))
        real(self, key, data)

    monkeypatch.setattr(type(opened), "write", write)
    keep(b"new")
    assert [key for key, _ in seen] == [
        "run/a.json",
        "run/head.safetensors",
        "run/history.jsonl",
        "run/head.json",
    ]
    assert {size for _, size in seen} == {None}


def test_a_url_where_only_a_folder_will_do_is_refused(bucket: str) -> None:
    with pytest.raises(RunError, match="is on object storage; this command takes a folder"):
        load_run(Path(f"{bucket}/run"))
