"""A writer of feature stores without torch: its features are a pure function of the row, so that
any two runs agree.

It goes through the store in the order in which `apecache.extraction.run` does. As a program
(`python -m benchmarks.reliability.injection.tower`) it imports once and then forks a process for
every run that a line of JSON on its standard input asks for: a kill costs milliseconds, not the
seconds of an import. See `Towers` for the other end of that pipe.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import apecache.store.writer as writer_module
from apecache.encoders.spec import EncoderSpec, Modality
from apecache.fingerprint import Fingerprint, content_hash, digest_strings
from apecache.storage.files import Files
from apecache.storage.open import open_files
from apecache.store.layout import SEGMENTS, ArrayLayout, ArrayRecord, with_metadata
from apecache.store.reader import FeatureStore
from apecache.store.table import PairTable
from apecache.store.views import (
    BlockReference,
    View,
    ViewRecord,
    commit_view,
    draft_view,
    settle_view,
    view_ids,
    view_number,
)
from apecache.store.writer import (
    ArrayWriter,
    PairColumns,
    QuarantinedRow,
    add_segment,
    create_array,
    create_store,
)
from benchmarks.reliability.injection.program import program_command, program_environment

NAME = "tower"
MODALITIES: tuple[Modality, ...] = ("image", "text")
BLOCK = f"{SEGMENTS}/0001"
N_KEPT = 4
"""Images of the first block that the last view has."""
SALT = {"image": 3, "text": 11}


@dataclass(frozen=True, kw_only=True)
class TowerSpec:
    """A table of `images` with two captions each. The defaults give 11 image shards and 14 text
    shards."""

    images: int = 42
    dim: int = 8
    image_shard: int = 4
    text_shard: int = 6
    encoder: str = "a"
    dtype: str = "float16"
    edited: bool = False
    """Whether the table is edited then: a block of three images and five captions, and views."""

    def rows(self, modality: Modality) -> int:
        return self.images if modality == "image" else 2 * self.images

    def layout(self, modality: Modality) -> ArrayLayout:
        shard_rows = self.image_shard if modality == "image" else self.text_shard
        return ArrayLayout(
            rows=self.rows(modality),
            dim=self.dim,
            dtype=self.dtype,
            shard_rows=shard_rows,
            batch_size=2,
            threads=1,
        )

    @property
    def n_shards(self) -> int:
        return sum(self.layout(modality).n_shards for modality in MODALITIES)

    @property
    def block(self) -> "TowerSpec":
        """Return the spec of the block that an edit adds."""
        return replace(self, images=3, encoder=f"{self.encoder}-edited", edited=False)


SMALL = TowerSpec(images=10)
"""3 + 4 shards: for what is tried at every single system call."""
EDITED = replace(SMALL, edited=True)
"""The same, whose table is edited then: 1 + 1 shards more, and two views."""


def columns(spec: TowerSpec) -> PairColumns:
    keys = [f"images/{row:04d}.jpg" for row in range(spec.images)]
    captions = [f"caption {i} of {key}" for key in keys for i in range(2)]
    splits = ["train" if row % 3 else "val" for row in range(spec.images)]
    labels = [str(row % 5) for row in range(spec.images)]
    image_rows = [row for row in range(spec.images) for _ in range(2)]
    languages = ["en"] * len(captions)
    return PairColumns(
        keys=keys,
        splits=splits,
        labels=labels,
        captions=captions,
        languages=languages,
        image_rows=image_rows,
        digest=digest_strings([*keys, *captions]),
        origin="t.tsv",
    )


def block_columns(spec: TowerSpec) -> PairColumns:
    """Return the table of the block that an edit adds; no caption of it has its image there."""
    block = spec.block
    plain = columns(block)
    contents = [content_hash(f"image-{row}") for row in range(block.images)]
    return replace(
        plain,
        keys=[f"new/{key}" for key in plain.keys],
        captions=[f"new {caption}" for caption in plain.captions],
        image_rows=[-1] * len(plain.captions),
        digest=digest_strings(["block", plain.digest]),
        contents=contents,
    )


def edited_view(spec: TowerSpec, n_kept: int) -> View:
    """Return a view of the last `n_kept` rows of the first block and of all rows of the new one."""
    first = columns(spec)
    added = block_columns(spec)
    images = np.array([*range(spec.images - n_kept, spec.images)], np.int64)
    texts = np.array([*range(2 * (spec.images - n_kept), 2 * spec.images)], np.int64)
    new_images = np.arange(spec.images, spec.images + len(added.keys))
    new_texts = np.arange(2 * spec.images, 2 * spec.images + len(added.captions))
    keys = [*(first.keys[row] for row in images), *added.keys]
    captions = [*(first.captions[row] for row in texts), *added.captions]
    digest = digest_strings([*keys, *captions])
    table = PairTable(
        keys=np.array(keys, object),
        splits=np.array(["train"] * len(keys), object),
        labels=np.array([""] * len(keys), object),
        captions=np.array(captions, object),
        languages=np.array(["en"] * len(captions), object),
        image_rows=np.repeat(np.arange(len(keys)), 2),
        digest=digest,
        columns={"color": np.array([f"color {key}" for key in keys], object)},
    )
    blocks = (
        BlockReference(
            folder="",
            digest=first.digest,
            n_images=len(first.keys),
            n_texts=len(first.captions),
        ),
        BlockReference(
            folder=BLOCK,
            digest=added.digest,
            n_images=len(added.keys),
            n_texts=len(added.captions),
        ),
    )
    record = ViewRecord(
        view="",
        name="edited",
        parent="",
        digest=digest,
        table=digest,
        n_images=len(keys),
        n_texts=len(captions),
        origin="t.tsv",
        root="/data",
        blocks=blocks,
        objects={},
    )
    rows: dict[Modality, NDArray[np.int64]] = {
        "image": np.concatenate([images, new_images]),
        "text": np.concatenate([texts, new_texts]),
    }
    return draft_view(table, rows, [""] * len(keys), record)


def edited_values(spec: TowerSpec, modality: Modality, n_kept: int) -> NDArray[Any]:
    """Return what the newest view of an edited store must give."""
    index = edited_view(spec, n_kept).content_rows(modality)
    stored = [expected(spec, modality), expected(spec.block, modality)]
    values: NDArray[Any] = np.concatenate(stored)[index]
    return values


def features(spec: TowerSpec, modality: Modality, rows: Sequence[int]) -> NDArray[Any]:
    """[rows, dim]: what the encoder would say of these rows; never zero, never the same for two
    rows."""
    grid = (
        np.asarray(rows)[:, None] * 7919
        + np.arange(spec.dim) * 104_729
        + SALT[modality]
        + len(spec.encoder)
    )
    return ((grid % 2039 + 1) / 512).astype(spec.dtype)


def bad_rows(modality: Modality, rows: Sequence[int]) -> list[QuarantinedRow]:
    step = 13 if modality == "image" else 17
    return [
        QuarantinedRow(row=row, key=f"{modality}-{row}", reason="truncated", detail="it ends early")
        for row in rows
        if row % step == 5
    ]


@cache
def array_record(spec: TowerSpec, modality: Modality, of_block: bool = False) -> ArrayRecord:
    """Return the record of an array; `of_block` is that of the block that an edit adds."""
    fields = {
        "library": "tower",
        "weights": content_hash(spec.encoder),
        "modality": modality,
        "dtype": spec.dtype,
    }
    fingerprint = Fingerprint(
        fields={"encoder": fields, "storage": {"dtype": spec.dtype, "batch_size": 2}}
    )
    layout = (spec.block if of_block else spec).layout(modality)
    encoder = EncoderSpec("hf", NAME, modality)
    table = (block_columns if of_block else columns)(spec).digest
    return with_metadata(
        ArrayRecord(
            modality=modality,
            name=NAME,
            spec=encoder,
            fingerprint=fingerprint,
            layout=layout,
            metadata={},
            environment={"versions": {}, "device": "cpu"},
            table=table,
        )
    )


def expected(spec: TowerSpec, modality: Modality) -> NDArray[Any]:
    """What `FeatureArray.load` must return."""
    rows = range(spec.rows(modality))
    values = features(spec, modality, rows)
    values[[row.row for row in bad_rows(modality, rows)]] = np.nan
    return values


def run(
    store: str | Path,
    spec: TowerSpec = TowerSpec(),
    files: Files | None = None,
    acknowledge: Callable[[str], None] = lambda _: None,
    shards: dict[str, list[int]] | None = None,
) -> list[str]:
    """Make or finish a store; returns the shards that this run encoded, as `image/3`.

    Args:
        acknowledge: told of everything that has been promised: `store`, `image`, `image/3`,
            `image/seal`, …
        shards: encode these whether they are committed or not, and do not seal (one of several
            writers).
    """
    files = files or open_files(store)
    create_store(files, pairs=columns(spec), root="/data", version="0")
    acknowledge("store")
    done = _fill(files, spec, acknowledge, shards)
    if spec.edited and not shards:
        done += _edit(files, spec, acknowledge)
    return done


def _edit(files: Files, spec: TowerSpec, acknowledge: Callable[[str], None]) -> list[str]:
    """Add a block, fill it, and commit two views, as an extraction of an edited table does."""
    name = BLOCK.removeprefix(f"{SEGMENTS}/")
    add_segment(files, name, pairs=block_columns(spec), root="/data", version="0")
    acknowledge("block")
    done = _fill(files.child(BLOCK), spec, acknowledge, None, of_block=True)
    for number, n_kept in ((1, spec.images - 1), (2, N_KEPT)):
        ids = view_ids(files)
        if number not in map(view_number, ids):
            commit_view(files, edited_view(spec, n_kept), number)
        else:
            settle_view(files, ids[number - 1])
        acknowledge(f"view/{number}")
    return done


def _fill(
    files: Files,
    spec: TowerSpec,
    acknowledge: Callable[[str], None],
    shards: dict[str, list[int]] | None,
    of_block: bool = False,
) -> list[str]:
    """Fill both arrays of a block, and seal them."""
    opened = FeatureStore.block(files)
    done = []
    prefix = "block/" if of_block else ""
    for modality in MODALITIES:
        existing = next(
            (array.record for array in opened.arrays(modality) if array.name == NAME),
            None,
        )
        record = existing or array_record(spec, modality, of_block)
        create_array(files, record)
        acknowledge(f"{prefix}{modality}")
        writer = ArrayWriter(files, record)
        for shard in shards[modality] if shards else writer.pending():
            commit_shard(writer, spec.block if of_block else spec, shard)
            done.append(f"{prefix}{modality}/{shard}")
            acknowledge(done[-1])
        if not shards:
            writer.seal()
            acknowledge(f"{prefix}{modality}/seal")
    return done


def targets(store: Path, spec: TowerSpec) -> Iterator[tuple[str, ArrayWriter, TowerSpec]]:
    """Yield the name of each array, its writer, and the spec of its rows."""
    files = open_files(store)
    for modality in MODALITIES:
        yield modality, ArrayWriter(files, array_record(spec, modality)), spec
    if spec.edited:
        for modality in MODALITIES:
            record = array_record(spec, modality, of_block=True)
            yield f"block/{modality}", ArrayWriter(files.child(BLOCK), record), spec.block


def commit_shard(writer: ArrayWriter, spec: TowerSpec, shard: int) -> None:
    modality = writer.record.modality
    rows = writer.layout.shard(shard)
    content = [content_hash(f"{modality}-{row}") for row in rows]
    writer.commit(
        shard,
        features=features(spec, modality, rows),
        content=content,
        quarantined=bad_rows(modality, rows),
    )


@contextmanager
def cached_tables() -> Iterator[None]:
    """Let Zarr encode each table once: it takes longer than all the rest, and is the same every
    time."""
    real = writer_module.pair_objects, writer_module.root_objects

    def pairs(table: Mapping[str, tuple[str, list[str] | list[int]]]) -> dict[str, bytes]:
        return _cached(repr(table), lambda: real[0](table))

    def roots(version: str) -> dict[str, bytes]:
        return _cached(version, lambda: real[1](version))

    try:
        writer_module.pair_objects = pairs
        writer_module.root_objects = roots
        yield
    finally:
        writer_module.pair_objects, writer_module.root_objects = real


_tables: dict[str, dict[str, bytes]] = {}


def _cached(key: str, make: Callable[[], dict[str, bytes]]) -> dict[str, bytes]:
    if key not in _tables:
        _tables[key] = make()
    return _tables[key]


def tree(store: Path) -> dict[str, bytes]:
    """Every file below a folder, temporary ones too."""
    return {
        str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()
    }


def tree_digest(store: Path) -> str:
    return digest_strings(
        part for path, data in tree(store).items() for part in (path, content_hash(data))
    )


# --- the process ----------------------------------------------------------------------------------


class Towers:
    """A process that forks towers. `with Towers() as towers: towers.start([{"store": …}])`."""

    def __enter__(self) -> "Towers":
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(
            program_command("tower"),
            env=program_environment(),
            **pipes,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def start(self, *runs: dict[str, Any]) -> list[dict[str, Any]]:
        """Run towers side by side until all have ended.

        Each run: `store`, and if need be `spec`, `shards` (see `run`), `unsynced` (fsync does
        nothing), `kill` (see `syscalls.Kill`), `kill_after` in seconds, `environment`, and
        `removal` (see `removals.act`).
        Each result: `killed`, `error` (a string, empty if there was none) and `done`.
        """
        assert self.process.stdin
        assert self.process.stdout
        requests = [
            {**run, "store": str(run["store"]), "spec": asdict(run.get("spec", TowerSpec()))}
            for run in runs
        ]
        self.process.stdin.write(json.dumps(requests) + "\n")
        self.process.stdin.flush()
        answer: list[dict[str, Any]] = json.loads(self.process.stdout.readline())
        return answer

    def run(self, store: str | Path, **options: Any) -> dict[str, Any]:
        return self.start({"store": store, **options})[0]


def serve() -> None:
    for line in sys.stdin:
        children = [_fork(request) for request in json.loads(line)]
        sys.stdout.write(json.dumps([_result(*child) for child in children]) + "\n")
        sys.stdout.flush()


def _fork(request: dict[str, Any]) -> tuple[int, int, float | None]:
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading, request.get("kill_after")
    os.close(reading)
    try:
        answer = {"done": _run(request), "error": ""}
    except Exception as error:
        answer = {"done": [], "error": f"{type(error).__name__}: {error}"}
    os.write(writing, json.dumps(answer).encode())
    os._exit(0)


def _run(request: dict[str, Any]) -> list[str]:
    from benchmarks.reliability.injection.syscalls import Kill, intercepted, unsynced

    os.environ.update(request.get("environment", {}))

    store = request["store"]
    spec = TowerSpec(**request["spec"])
    kill = Kill(**request["kill"]) if request.get("kill") else None
    if request.get("removal"):
        # Imported here: that module imports this one.
        from benchmarks.reliability.injection.removals import act_at

        with intercepted(Path(store).parent, unsynced(kill)):
            return act_at(store)
    if request.get("unsynced") or kill:
        store = Path(store)
        with intercepted(store.parent, unsynced(kill) if request.get("unsynced") else kill):
            return run(store, spec, shards=request.get("shards"))
    return run(store, spec, shards=request.get("shards"))


def _result(child: int, reading: int, kill_after: float | None) -> dict[str, Any]:
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)  # not waited for yet, so the number is still its own
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return {
        "done": [],
        "error": "" if killed else "no answer",
        **json.loads(answer or "{}"),
        "killed": killed,
    }


if __name__ == "__main__":
    serve()
