"""CPU time of writing and loading features, beside np.save, a memmap copy and plain zarr-python.

    python -m benchmarks.speed.store [--quick] [--json FILE]

Cases are interleaved in one process; figures are medians of CPU milliseconds per 100 MB (wall time
in its own column). Our store does more than any other case: hashes (BLAKE3) and reading back have
rows of their own, and so has the wait for fsync. The share of the store in a real extraction is
measured on the demo's drawings.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec

from apecache.encoders.spec import EncoderSpec
from apecache.fingerprint import Fingerprint, content_hash
from apecache.storage.local_files import LocalFiles
from apecache.store.layout import ArrayLayout, ArrayRecord, with_metadata
from apecache.store.reader import FeatureStore
from apecache.store.writer import ArrayWriter, PairColumns, checksum, create_array, create_store
from benchmarks.record import Goal, print_goals, print_table, write_result

DIM = 768
SHARD_ROWS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rows and repeats")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, repeats = (4 * SHARD_ROWS, 3) if options.quick else (16 * SHARD_ROWS, 9)
    with tempfile.TemporaryDirectory() as folder:
        features = np.random.default_rng(0).standard_normal((rows, DIM)).astype(np.float16)
        table = measure(Path(folder), features, repeats)
    table.append(share_of_extraction(quick=options.quick))
    print_table(table)
    goals = goals_of(table)
    print_goals(goals)
    if options.json or not options.quick:
        write_result("speed-store", goals=goals, rows=table, path=options.json)


def measure(folder: Path, features: NDArray[np.float16], repeats: int) -> list[dict[str, Any]]:
    """Median CPU and wall milliseconds per 100 MB of every case."""
    bench = Bench(folder, features)
    cases = bench.cases()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            times[name].append(timed(case))
    scale = 100e6 / features.nbytes
    return [
        {
            "case": name,
            "CPU ms/100 MB": round(1000 * scale * statistics.median(cpu for cpu, _ in found), 1),
            "wall ms/100 MB": round(1000 * scale * statistics.median(wall for _, wall in found), 1),
        }
        for name, found in times.items()
    ]


def timed(case: Callable[[], object]) -> tuple[float, float]:
    cpu = time.process_time()
    wall = time.perf_counter()
    case()
    return time.process_time() - cpu, time.perf_counter() - wall


class Bench:
    """The cases. Everything that is written is first removed, outside the timed part, by writing to
    new names."""

    def __init__(self, folder: Path, features: NDArray[np.float16]) -> None:
        self.folder = folder
        self.features = features
        self.count = 0
        self.shards = [features[i : i + SHARD_ROWS] for i in range(0, len(features), SHARD_ROWS)]
        self.content = [[content_hash(str(i))] * len(shard) for i, shard in enumerate(self.shards)]
        np.save(folder / "plain.npy", features)
        self.store = self._committed("read")
        self.zarr = self._zarr("read-zarr")
        self.zarr[:] = features
        self.buffer = np.empty_like(features)

    def cases(self) -> dict[str, Callable[[], object]]:
        return {
            "write: np.save": lambda: np.save(self._new("npy"), self.features),
            "write: np.save, one file a shard": self._save_shards,
            "write: np.save a shard + crc32c": self._save_shards_checked,
            "write: chunk files + crc32c, no fsync": self._write_chunks,
            "write: store, whole protocol": lambda: self._committed(self._new("store").name),
            "  of it: hashing (BLAKE3)": lambda: [
                content_hash(shard.data.cast("B")) for shard in self.shards
            ],
            "  of it: reading back and hashing": self._read_back,
            "  of it: write + fsync + rename": self._write_durably,
            "write: zarr-python, crc32c": lambda: self._zarr(self._new("zarr").name).__setitem__(
                slice(None),
                self.features,
            ),
            "load: memmap copy": lambda: np.array(
                np.load(self.folder / "plain.npy", mmap_mode="r")
            ),
            "load: store, crc32c checked": lambda: self.store.array("image").load(),
            "load: memmap copy into a used buffer": self._copy_again,
            "load: store into a used buffer": lambda: self.store.array("image").load(self.buffer),
            "load: zarr-python, crc32c": lambda: self.zarr[:],
        }

    def _copy_again(self) -> None:
        np.copyto(self.buffer, np.load(self.folder / "plain.npy", mmap_mode="r"))

    def _new(self, ending: str) -> Path:
        self.count += 1
        return self.folder / f"case-{self.count}.{ending}"

    def _save_shards(self) -> None:
        for shard in self.shards:
            np.save(self._new("npy"), shard)

    def _save_shards_checked(self) -> None:
        for shard in self.shards:
            checksum(shard.data.cast("B"))
            np.save(self._new("npy"), shard)

    def _write_chunks(self) -> None:
        """What the store writes, without what makes it durable and verified."""
        for shard in self.shards:
            data = shard.data.cast("B")
            with self._new("chunk").open("wb", buffering=0) as file:
                file.write(data)
                file.write(checksum(data).to_bytes(4, "little"))

    def _write_durably(self) -> None:
        files = LocalFiles(self.folder)
        for shard in self.shards:
            files.write(self._new("chunk").name, shard.data.cast("B"))

    def _read_back(self) -> None:
        record = self.store.array("image")
        for shard in range(record.record.layout.n_shards):
            for name in record.commits[shard].objects:
                content_hash(self.store.files.read(name))

    def _committed(self, name: str) -> FeatureStore:
        """A finished store of the features."""
        files = LocalFiles(self.folder / name)
        rows = len(self.features)
        blank = [""] * rows
        create_store(
            files,
            pairs=PairColumns(
                keys=[str(i) for i in range(rows)],
                splits=blank,
                labels=blank,
                captions=[],
                languages=[],
                image_rows=[],
                digest=name,
                origin="",
            ),
            root="",
            version="0",
        )
        layout = ArrayLayout(
            rows=rows,
            dim=DIM,
            dtype="float16",
            shard_rows=SHARD_ROWS,
            batch_size=64,
            threads=1,
        )
        fingerprint = Fingerprint(fields={"encoder": {}, "storage": {}})
        record = with_metadata(
            ArrayRecord(
                modality="image",
                name="e",
                spec=EncoderSpec("timm", "e", "image"),
                fingerprint=fingerprint,
                layout=layout,
                metadata={},
                environment={},
                table=name,
            )
        )
        create_array(files, record)
        writer = ArrayWriter(files, record)
        for shard, (part, content) in enumerate(zip(self.shards, self.content, strict=True)):
            writer.commit(shard, part, content)
        writer.seal()
        return FeatureStore.open(files.root)

    def _zarr(self, name: str) -> Any:
        return zarr.create_array(
            self.folder / name,
            shape=self.features.shape,
            chunks=(SHARD_ROWS, DIM),
            dtype="float16",
            serializer=BytesCodec(endian="little"),
            compressors=[Crc32cCodec()],
            fill_value=float("nan"),
        )


def share_of_extraction(quick: bool) -> dict[str, Any]:
    """Share of the writer's CPU time in an extraction of the demo's drawings with the packaged
    encoders."""
    import apecache
    from apecache.encoders.packaged import write_packaged_encoders

    table = Path(__file__).parents[2] / "examples" / "drawings" / "pairs.tsv"
    source = apecache.open_pairs(table)
    source = source.part(0, 128 if quick else None)
    spent = [0.0]
    commit = ArrayWriter.commit

    def counted(*arguments: Any, **options: Any) -> Any:
        begin = time.thread_time()
        try:
            return commit(*arguments, **options)
        finally:
            spent[0] += time.thread_time() - begin

    with tempfile.TemporaryDirectory() as folder:
        image, text = write_packaged_encoders(Path(folder) / "encoders")
        spec = apecache.ExtractSpec(
            image=apecache.parse_encoder(f"timm:{image}", "image"),
            text=apecache.parse_encoder(f"hf:{text}", "text"),
        )
        ArrayWriter.commit = counted  # type: ignore[method-assign]
        try:
            begin = time.process_time()
            apecache.extract(source, Path(folder) / "store", spec)
            total = time.process_time() - begin
        finally:
            ArrayWriter.commit = commit  # type: ignore[method-assign]
    return {
        "case": f"share of the store in extracting {len(source)} drawings, %",
        "CPU ms/100 MB": 100 * spent[0] / total,
    }


def goals_of(table: list[dict[str, Any]]) -> list[Goal]:
    cpu = {row["case"]: row["CPU ms/100 MB"] for row in table}
    share = next(value for case, value in cpu.items() if case.startswith("share"))
    saved = cpu["write: np.save, one file a shard"]
    copied = cpu["load: memmap copy"]
    return [
        Goal(
            name="write with crc32c / np.save",
            value=cpu["write: chunk files + crc32c, no fsync"] / saved,
            target=2.0,
            better="lower",
        ),
        Goal(
            name="load with crc32c / memmap copy",
            value=cpu["load: store, crc32c checked"] / copied,
            target=1.2,
            better="lower",
        ),
        Goal(
            name="store's share of an extraction's CPU, %",
            value=share,
            target=1.0,
            better="lower",
        ),
    ]


if __name__ == "__main__":
    main()
