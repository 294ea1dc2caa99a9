"""Extraction beside its limits (the bare model, bare decoding) and beside today's loops.

    python -m benchmarks.speed.extract [--quick] [--json FILE]

Cases of one comparison are interleaved in one process; figures are medians of CPU and wall
milliseconds a row, decoding processes included. Encoders are loaded beforehand; apecache writes a
store, the others keep features in memory. Where model and decoder share the cores, no loop can be
faster than both after another: CPU time is held against that sum, and wall time against the slower
of the two, which only an accelerator of its own lets one reach. The compiled model is what
`--compile` runs, which takes half a minute to begin with.
"""

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from apecache_cli.memory import keep_freed_memory

from apecache.data.images import decode_image, load_image
from apecache.data.media import FolderMedia
from apecache.data.pairs import Pair, PairSource
from apecache.data.tensors import decode_tensor
from apecache.encoders.encoder import ImageEncoder, compile_images
from apecache.encoders.packaged import write_packaged_encoders
from apecache.encoders.preprocess import TensorPreprocess
from apecache.encoders.spec import parse_encoder
from apecache.extraction.arrays import CPU_BATCH
from apecache.extraction.run import (
    ExtractionState,
    ExtractSpec,
    OpenEncoders,
    extract,
    extract_pending,
    open_encoders,
)
from apecache.extraction.segments import Segment, make_segment
from apecache.storage.local_files import LocalFiles
from benchmarks.record import Goal, print_goals, print_table, write_result
from benchmarks.speed.inputs import captions, write_photographs, write_vit
from benchmarks.speed.peers import BATCH, sentence_transformers_encode, timm_loop, transformers_loop

SIZES = (500, 640, 1600)
TEXT_BATCH = CPU_BATCH["text"]
TEXT_BATCH_TOKENS = (512, 2048)
WORKERS = len(os.sched_getaffinity(0))
KILL_SHARDS = 20
PARTS = ("images", "decoding", "texts", "growth", "resume", "finished")
Row = dict[str, Any]


class Cost(NamedTuple):
    """Milliseconds a row, medians."""

    cpu: float
    wall: float


class Scale(NamedTuple):
    photos: int
    vit_photos: int
    vit_sizes: tuple[int, ...]
    texts: int
    decoded: int
    repeats: int


QUICK = Scale(photos=32, vit_photos=0, vit_sizes=(), texts=256, decoded=8, repeats=5)
FULL = Scale(photos=64, vit_photos=32, vit_sizes=SIZES, texts=2048, decoded=24, repeats=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer rows; for a look, not for reporting",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=PARTS, help="one part of it, without writing a result")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        extract_as_child(*map(Path, options.child))
        return
    keep_freed_memory()  # as the command does; here for the loops beside it too
    scale = QUICK if options.quick else FULL
    rows = list[Row]()
    goals = list[Goal]()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), scale)
        for part in [options.only] if options.only else PARTS:
            found, met = getattr(bench, part)()
            rows += found
            goals += met
            print_table(found)
            print_goals(met)
            print(flush=True)
    if not options.only and (options.json or not options.quick):
        write_result("speed-extract", goals=goals, rows=rows, path=options.json)


def cpu_seconds() -> float:
    """Of this process and of the children that have ended."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    rows: int,
    repeats: int,
) -> dict[str, Cost]:
    """One round to warm up, then `repeats` rounds through all cases."""
    times: dict[str, list[Cost]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, case in cases.items():
            cpu = cpu_seconds()
            wall = time.perf_counter()
            case()
            cost = Cost(
                1000 * (cpu_seconds() - cpu) / rows,
                1000 * (time.perf_counter() - wall) / rows,
            )
            if turn:
                times[name].append(cost)
    return {
        name: Cost(*(statistics.median(part) for part in zip(*found, strict=True)))
        for name, found in times.items()
    }


def table(what: str, costs: Mapping[str, Cost]) -> list[Row]:
    return [
        {"what": what, "case": name, "CPU ms/row": cost.cpu, "wall ms/row": cost.wall}
        for name, cost in costs.items()
    ]


def image_source(folder: Path, names: Sequence[str]) -> PairSource:
    return PairSource(
        tuple(Pair(key=name, captions=(), languages=()) for name in names),
        media=FolderMedia(root=folder),
    )


def text_source(texts: Sequence[str]) -> PairSource:
    return PairSource((Pair(key="text", captions=tuple(texts), languages=("",) * len(texts)),))


class Bench:
    def __init__(self, folder: Path, scale: Scale) -> None:
        self.folder = folder
        self.scale = scale
        self.count = 0
        self.lite, self.minilm = write_packaged_encoders(folder / "encoders")
        self.vit = write_vit(folder / "encoders" / "vit-s16")
        most = max(scale.photos, scale.vit_photos, scale.decoded)
        self.photos = {size: write_photographs(folder / str(size), size, most) for size in SIZES}

    def store(self) -> Path:
        self.count += 1
        return self.folder / f"store-{self.count}"

    def spec(self, **settings: Any) -> ExtractSpec:
        return ExtractSpec(
            image_batch=BATCH,
            text_batch=TEXT_BATCH,
            device="cpu",
            shard_rows=4096,
            **settings,
        )

    def run(
        self,
        source: PairSource,
        encoders: OpenEncoders,
        spec: ExtractSpec,
        progress: Any = lambda _: None,
    ) -> Path:
        """An extraction with encoders that are loaded."""
        store = self.store()
        segment = Segment(store=LocalFiles(store), folder="", part=source)
        make_segment(segment)
        extract_pending(segment, encoders=encoders, spec=spec, progress=progress)
        return store

    # --- images -----------------------------------------------------------------------------------

    def images(self) -> tuple[list[Row], list[Goal]]:
        rows = list[Row]()
        goals = list[Goal]()
        wanted = [("efficientnet-lite0", self.lite, size, self.scale.photos) for size in SIZES]
        wanted += [
            ("ViT-S/16", self.vit, size, self.scale.vit_photos) for size in self.scale.vit_sizes
        ]
        for name, folder, size, count in wanted:
            costs = interleaved(self._image_cases(folder, size, count), count, self.scale.repeats)
            what = f"{name}, {size} px"
            rows += table(what, costs)
            goals += image_goals(what, costs)
        return rows, goals

    def _image_cases(self, folder: Path, size: int, count: int) -> dict[str, Callable[[], object]]:
        spec = self.spec(image=parse_encoder(f"timm:{folder}", "image"))
        encoders = open_encoders(spec)
        root = self.folder / str(size)
        names = self.photos[size][:count]
        encoder = encoders.image[0]
        source = image_source(root, names)
        media = FolderMedia(root=root)
        pixels = torch.stack([encoder.preprocess(load_image(name, media).image) for name in names])
        loop = timm_loop(folder, WORKERS)
        paths = [root / name for name in names]

        quick = replace(spec, image=replace(spec.images[0], resize="torchvision"))
        quick_encoders = open_encoders(quick)
        compiled = compile_images([encoder])
        return {
            "bare model": lambda: [encoder.encode(batch) for batch in padded_batches(pixels)],
            "bare model, compiled": lambda: [compiled(batch) for batch in padded_batches(pixels)],
            "bare decoding": lambda: [
                encoder.preprocess(load_image(name, media).image) for name in names
            ],
            "timm with a DataLoader": lambda: loop(paths),
            "apecache": lambda: self.run(source, encoders, spec),
            "apecache, threads": lambda: self.run(source, encoders, replace(spec, workers=0)),
            "apecache, processes": lambda: self.run(
                source,
                encoders,
                replace(spec, workers=WORKERS),
            ),
            "apecache, torchvision": lambda: self.run(source, quick_encoders, quick),
        }

    def decoding(self) -> tuple[list[Row], list[Goal]]:
        """Decoding and resizing alone on one thread, by Pillow and by torchvision, and how many
        values that changes."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        spec = parse_encoder(f"timm:{self.lite}", "image")
        reference = open_encoders(self.spec(image=spec)).image[0]
        faster = open_encoders(self.spec(image=replace(spec, resize="torchvision"))).image[0]
        rows = list[Row]()
        goals = list[Goal]()
        for size in SIZES:
            files = [
                (self.folder / str(size) / name).read_bytes()
                for name in self.photos[size][: self.scale.decoded]
            ]
            costs = interleaved(
                decoding_cases(files, reference, faster),
                len(files),
                self.scale.repeats,
            )
            changed, most = changed_values(files, reference, faster)
            rows += [
                {**row, "changed %": 100 * changed, "most / 255": most}
                for row in table(f"decode, {size} px", costs)
            ]
            ratio = costs["Pillow"].cpu / costs["torchvision"].cpu
            if size == max(SIZES):
                goals.append(
                    Goal(
                        name=f"torchvision / Pillow, CPU, {size} px",
                        value=ratio,
                        target=2.5,
                        better="higher",
                    )
                )
            goals.append(
                Goal(
                    name=f"largest change in 255, {size} px",
                    value=most,
                    target=2.0,
                    better="lower",
                )
            )
        torch.set_num_threads(threads)
        return rows, goals

    # --- texts ------------------------------------------------------------------------------------

    def texts(self) -> tuple[list[Row], list[Goal]]:
        spec = self.spec(text=parse_encoder(f"hf:{self.minilm}", "text"))
        encoders = open_encoders(spec)
        texts = list(captions(self.scale.texts))
        encoder = encoders.text[0]
        source = text_source(texts)
        ids = sorted(encoder.tokenize(texts).ids, key=len)
        cases: dict[str, Callable[[], object]] = {
            "bare model": lambda: [
                encoder.encode_ids(ids[i : i + TEXT_BATCH]) for i in range(0, len(ids), TEXT_BATCH)
            ],
            "tokenizing": lambda: encoder.tokenize(texts),
        }
        loops = {
            "padded to 77": transformers_loop(self.minilm, 77),
            "transformers with a DataLoader": transformers_loop(self.minilm, None),
            "sentence-transformers": sentence_transformers_encode(self.minilm),
        }
        cases |= {name: lambda loop=loop: loop(texts) for name, loop in loops.items()}  # type: ignore[misc]
        cases |= {"apecache": lambda: self.run(source, encoders, spec)}
        for n_tokens in TEXT_BATCH_TOKENS:
            in_tokens = replace(spec, text_batch=None, text_batch_tokens=n_tokens)
            cases[f"apecache, {n_tokens:,} tokens a batch"] = partial(
                self.run, source, encoders, in_tokens
            )
        costs = interleaved(cases, len(texts), self.scale.repeats)
        own = costs["apecache"].cpu
        goals = [Goal(name="captions: bare model and tokenizing / apecache, CPU",
                      value=(costs["bare model"].cpu + costs["tokenizing"].cpu) / own, target=0.95, better="higher")]  # fmt: skip
        least = {
            "padded to 77": 5.5,
            "transformers with a DataLoader": 1.0,
            "sentence-transformers": 1.0,
        }
        goals += [Goal(name=f"captions: {name} / apecache, CPU", value=costs[name].cpu / own, target=low, better="higher")
                  for name, low in least.items()]  # fmt: skip
        return table("captions, MiniLM-L6", costs), goals

    # --- a run as a whole -------------------------------------------------------------------------

    def growth(self) -> tuple[list[Row], list[Goal]]:
        """Cost and memory of N, 2N and 4N images; memory is the resident set of this process at its
        largest."""
        spec = replace(
            self.spec(image=parse_encoder(f"timm:{self.lite}", "image")),
            shard_rows=BATCH,
        )
        encoders = open_encoders(spec)
        names = self.photos[500][: self.scale.photos]
        resident: dict[int, list[float]] = {times: [] for times in (1, 2, 4)}

        def grown(times: int) -> None:
            keys = [f"{'./' * turn}{name}" for turn in range(times) for name in names]
            most = [0.0]

            def watch(_: ExtractionState) -> None:
                most[0] = max(most[0], resident_mb())

            self.run(
                image_source(self.folder / "500", keys),
                encoders=encoders,
                spec=spec,
                progress=watch,
            )
            resident[times].append(most[0])

        costs = interleaved({f"{times} N": lambda t=times: grown(t) for times in resident},  # type: ignore[misc]
                            len(names), self.scale.repeats)  # fmt: skip
        per_row = {
            times: Cost(*(part / times for part in costs[f"{times} N"])) for times in resident
        }
        rows = [
            {**row, "resident MB": statistics.median(resident[times])}
            for times in resident
            for row in table(f"growth, N = {len(names)}", {f"{times} N": per_row[times]})
        ]
        spread = max(abs(cost.cpu / per_row[1].cpu - 1) for cost in per_row.values())
        memory = statistics.median(resident[4]) / statistics.median(resident[1])
        return rows, [
            Goal(
                name="CPU a row at 2N and 4N, change against N",
                value=spread,
                target=0.05,
                better="lower",
            ),
            Goal(name="memory at 4N / at N", value=memory, target=1.05, better="lower"),
        ]

    def resume(self) -> tuple[list[Row], list[Goal]]:
        """kill -9 at half of the shards, and the same command again. CPU seconds from when the
        encoder is loaded."""
        count = max(8 * KILL_SHARDS, self.scale.photos // KILL_SHARDS * KILL_SHARDS)
        keys = [
            f"{'./' * (n // len(self.photos[500]))}{self.photos[500][n % len(self.photos[500])]}"
            for n in range(count)
        ]
        (self.folder / "keys.json").write_text(json.dumps(keys))
        whole = list[float]()
        parts = list[float]()
        shards = 2 * KILL_SHARDS
        for _ in range(5):
            straight = self.store()
            broken = self.store()
            whole.append(self._child(straight, None))
            parts.append(self._child(broken, shards // 2) + self._child(broken, None))
            if tree(straight) != tree(broken):
                raise SystemExit(
                    "a resumed store has other bytes than one that was never interrupted"
                )
        once = statistics.median(whole)
        twice = statistics.median(parts)
        what = f"killed at half of {shards} shards"
        rows = [
            {"what": what, "case": case, "CPU s": cost}
            for case, cost in (("uninterrupted", once), ("killed and resumed", twice))
        ]
        return rows, [Goal(name="killed and resumed, less one shard / uninterrupted, CPU",
                           value=(twice - once / shards) / once, target=1.03, better="lower")]  # fmt: skip

    def _child(self, store: Path, kill_at: int | None) -> float:
        """CPU seconds of one process after its encoder is loaded; killed when so many shards are
        committed."""
        arguments = [
            str(path) for path in (self.lite, self.folder / "500", self.folder / "keys.json", store)
        ]
        command = [sys.executable, "-m", "benchmarks.speed.extract", "--child", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        loaded = float(process.stdout.readline())
        while kill_at and process.poll() is None:
            if len(list(store.glob("records/image/*/commits/*.json"))) >= kill_at:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        process.stdout.close()
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
        return usage.ru_utime + usage.ru_stime - loaded

    def finished(self) -> tuple[list[Row], list[Goal]]:
        """The same extraction again when all is done, encoders loaded anew; the libraries are
        imported."""
        spec = self.spec(
            image=parse_encoder(f"timm:{self.lite}", "image"),
            text=parse_encoder(f"hf:{self.minilm}", "text"),
        )
        root = self.folder / "500"
        names = self.photos[500]
        texts = list(captions(len(self.photos[500])))
        pairs = tuple(
            Pair(key=name, captions=(text,), languages=("",))
            for name, text in zip(names, texts, strict=True)
        )
        source = PairSource(pairs, media=FolderMedia(root=root))
        store = self.store()
        extract(source, store, spec)
        costs = interleaved(
            {"nothing to do": lambda: extract(source, store, spec)},
            1,
            self.scale.repeats,
        )
        seconds = costs["nothing to do"].wall / 1000
        rows = [{"what": "finished store", "case": "nothing to do", "wall s": seconds}]
        return rows, [
            Goal(name="nothing to do, seconds", value=seconds, target=2.0, better="lower")
        ]


def image_goals(what: str, costs: Mapping[str, Cost]) -> list[Goal]:
    model = costs["bare model"]
    decoding = costs["bare decoding"]
    own = costs["apecache"]
    loop = costs["timm with a DataLoader"]
    faster = min(costs["apecache, threads"].wall, costs["apecache, processes"].wall)
    slower = max(model.wall, decoding.wall / WORKERS)
    return [
        Goal(
            name=f"{what}: bare model and decoding / apecache, CPU",
            value=(model.cpu + decoding.cpu) / own.cpu,
            target=0.95,
            better="higher",
        ),
        Goal(
            name=f"{what}: the slower of both / apecache, wall",
            value=slower / own.wall,
            target=0.95,
            better="higher",
        ),
        Goal(
            name=f"{what}: timm with a DataLoader / apecache, CPU",
            value=loop.cpu / own.cpu,
            target=1.0,
            better="higher",
        ),
        Goal(
            name=f"{what}: the faster of threads and processes / apecache, wall",
            value=faster / own.wall,
            target=0.95,
            better="higher",
        ),
        Goal(
            name=f"{what}: Pillow / torchvision, CPU",
            value=own.cpu / costs["apecache, torchvision"].cpu,
            target=1.0,
            better="higher",
        ),
    ]


def padded_batches(pixels: torch.Tensor) -> list[torch.Tensor]:
    """Of one fixed shape, as extraction makes them."""
    missing = -len(pixels) % BATCH
    return list(torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])]).split(BATCH))


def decoding_cases(
    files: Sequence[bytes],
    reference: ImageEncoder,
    faster: ImageEncoder,
) -> dict[str, Callable[[], object]]:
    quick: Any = faster.preprocess
    return {
        "Pillow": lambda: [reference.preprocess(decode_image(data, "")) for data in files],
        "torchvision": lambda: [quick(decode_tensor(data, "")) for data in files],
    }


def changed_values(
    files: Sequence[bytes],
    reference: ImageEncoder,
    faster: ImageEncoder,
) -> tuple[float, float]:
    """Share of the values that differ, and the largest difference, both of 255 before
    normalization."""
    quick: Any = faster.preprocess
    assert isinstance(quick, TensorPreprocess)
    scale = 255 * torch.tensor(quick.std)[:, None, None]
    pairs = [
        (reference.preprocess(decode_image(data, "")), quick(decode_tensor(data, "")))
        for data in files
    ]
    found = torch.stack([((there - here).abs() * scale).round() for there, here in pairs])
    return float((found > 0).float().mean()), float(found.max())


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def tree(store: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file()
    }


def extract_as_child(encoder: Path, root: Path, keys: Path, store: Path) -> None:
    """Decoding in threads, so that the process's own CPU time is all of it."""
    names = json.loads(keys.read_text())
    spec = ExtractSpec(
        image=parse_encoder(f"timm:{encoder}", "image"),
        image_batch=4,
        device="cpu",
        workers=0,
    )
    spec = replace(spec, shard_rows=len(names) // (2 * KILL_SHARDS))
    source = image_source(root, names)
    encoders = open_encoders(spec)
    encoders.image[0].encode(torch.zeros(4, *encoders.image[0].input_shape))
    print(cpu_seconds(), flush=True)
    segment = Segment(store=LocalFiles(store), folder="", part=source)
    make_segment(segment)
    extract_pending(segment, encoders, spec)


if __name__ == "__main__":
    main()
