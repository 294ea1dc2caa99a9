"""Encoders on the card: bare models, decoding, whole extractions, and features beside the CPU's."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from apecache.data.decoding import PrefetchSpec, preprocess_ahead
from apecache.data.images import load_as, load_image
from apecache.data.media import media_below
from apecache.data.pairs import PairSource
from apecache.data.sources import open_pairs
from apecache.data.spec import OpenSpec
from apecache.data.tensors import decode_tensor
from apecache.encoders.encoder import ImageEncoder, encode_images
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.extraction.run import extract
from apecache.extraction.spec import ExtractSpec, default_workers
from apecache.store.reader import FeatureStore
from benchmarks.gpu.clocks import median_seconds
from benchmarks.gpu.made_up import write_bert, write_photographs, write_table, write_vit
from benchmarks.gpu.parts import PartContext, reason

N_IMAGES = 12_288
TINY_IMAGES = 48
BATCH = 256
TINY_BATCH = 8
GFLOP_OF_IMAGE = {"vit-s": 12.2, "vit-b": 46.4}
"""Operations of one image of 224 pixels in patches of 14, twice the multiplications."""


def prepare(context: PartContext) -> None:
    """Write what the other parts read."""
    n_images = context.size(N_IMAGES, TINY_IMAGES)
    begin = time.perf_counter()
    write_photographs(context.work / "images", n_images)
    write_table(context.work / "pairs.tsv", n_images)
    architectures = ("vit_small_patch14_dinov2", "vit_base_patch14_dinov2")
    if context.tiny:
        architectures = ("test_vit", "test_vit2")
    for name, architecture in zip(("vit-s", "vit-b"), architectures, strict=True):
        write_vit(context.work / name, architecture, 64 if context.tiny else 224)
    write_bert(context.work / "bert", context.tiny)
    seconds = round(time.perf_counter() - begin, 2)
    context.add("inputs", images=n_images, cpus=os.cpu_count(), seconds=seconds)


def models(context: PartContext) -> None:
    """Time bare models in each precision, and decoding without a model."""
    size = context.size(BATCH, TINY_BATCH)
    for name in ("vit-b", "vit-s"):
        for precision in ("float16", "float32", "tf32", "bfloat16"):
            try:
                encoder = _image_encoder(context, name, precision)
                pixels = torch.randn(size, *encoder.input_shape, device=context.device)
                run = partial(encode_images, [encoder], pixels)
                rate = size / median_seconds(run, context.device, repeats=3)
                row: dict[str, float] = {"images_s": round(rate)}
                if not context.tiny:
                    row["TFLOP/s"] = round(rate * GFLOP_OF_IMAGE[name] / 1000, 2)
                context.add("bare image model", model=name, precision=precision, **row)
            except (RuntimeError, ValueError) as error:
                context.add(
                    "bare image model", model=name, precision=precision, failed=reason(error)
                )
    for precision in ("float16", "float32"):
        context.add(
            "bare text model", precision=precision, captions_s=_captions_s(context, precision)
        )
    for resize in ("reference", "torchvision"):
        context.add("decoding", resize=resize, images_s=_decoded_s(context, resize))
    _device_decoding(context)


def _spec(context: PartContext, name: str, precision: Any, **settings: Any) -> EncoderSpec:
    modality: Any = "text" if name == "bert" else "image"
    library = "hf" if name == "bert" else "timm"
    spec = parse_encoder(f"{library}:{context.work / name}", modality)
    return replace(spec, dtype=precision, **settings)


def _image_encoder(
    context: PartContext,
    name: str,
    precision: str,
    resize: str = "reference",
) -> ImageEncoder:
    spec = _spec(context, name, precision, resize=resize)
    return load_image_encoder(spec, str(context.device))


def _captions_s(context: PartContext, precision: str) -> int:
    """Return captions a second of the bare text model, padded and on the device before."""
    size = context.size(BATCH, TINY_BATCH)
    encoder = load_text_encoder(_spec(context, "bert", precision), str(context.device))
    captions = _source(context, context.size(4096, TINY_IMAGES) // 5).captions
    ids = sorted(encoder.tokenize(captions).ids, key=len)
    padded = [encoder.pad(ids[first : first + size]) for first in range(0, len(ids), size)]

    def run() -> None:
        with torch.no_grad():
            for batch, mask in padded:
                encoder.forward(batch, mask)

    return round(len(ids) / median_seconds(run, context.device, repeats=3, warm=1))


def _decoded_s(context: PartContext, resize: str) -> int:
    """Return images a second of the decoding processes, with no model behind them."""
    encoder = load_image_encoder(_spec(context, "vit-b", "float32", resize=resize), "cpu")
    names = [path.name for path in sorted((context.work / "images").iterdir())]
    keys = [f"images/{name}" for name in names[: context.size(4096, TINY_IMAGES)]]
    media = media_below(context.work)
    load: Callable[[str], Any] = partial(load_image, media=media)
    if resize == "torchvision":
        load = partial(load_as, decode_tensor, media=media)
    workers = default_workers()
    begin = time.perf_counter()
    with preprocess_ahead(
        keys,
        load=load,
        preprocess=lambda loaded: [encoder.preprocess(loaded.image).unsqueeze(0)],
        shapes=[(1, *encoder.input_shape)],
        ahead=PrefetchSpec(workers=workers, images=2 * BATCH + workers),
    ) as decoded:
        n_decoded = sum(row.value is not None for row in decoded)
    return round(n_decoded / (time.perf_counter() - begin))


def _device_decoding(context: PartContext) -> None:
    """Time torchvision's decoder on the card (nvJPEG), without and with resizing there."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2 import functional as transforms

    if context.device.type != "cuda":
        return
    paths = sorted((context.work / "images").iterdir())[:1024]
    files = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in paths]
    chunks = [files[first : first + 128] for first in range(0, len(files), 128)]

    def decode(resized: bool) -> None:
        for chunk in chunks:
            images = decode_jpeg(chunk, mode=ImageReadMode.RGB, device=context.device)
            if resized:
                small = transforms.resize(torch.stack(images), [224], antialias=True)
                transforms.center_crop(small, [224, 224])

    for resized in (False, True):
        try:
            seconds = median_seconds(partial(decode, resized), context.device, repeats=2, warm=1)
            rate = round(len(files) / seconds)
            context.add("decoding on the device", resized=resized, images_s=rate)
        except RuntimeError as error:
            context.add("decoding on the device", resized=resized, failed=reason(error))


def _source(context: PartContext, n_images: int) -> PairSource:
    """Open the pairs of the first images."""
    lines = (context.work / "pairs.tsv").read_text(encoding="utf-8").splitlines()
    path = context.work / f"pairs-{n_images}.tsv"
    path.write_text("\n".join(lines[: 1 + 5 * n_images]) + "\n", encoding="utf-8")
    return open_pairs(str(path), OpenSpec(root=context.work))


class Utilization:
    """Sample how busy the card is, as its driver says, in a thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.samples: list[int] = []
        self.stopped = threading.Event()

    def __enter__(self) -> "Utilization":
        self.thread = threading.Thread(target=self._sample, daemon=True)
        if self.device.type == "cuda":
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        if self.thread.is_alive():
            self.thread.join(2)

    def _sample(self) -> None:
        try:
            while not self.stopped.wait(0.1):
                self.samples.append(torch.cuda.utilization(self.device))
        except (RuntimeError, ImportError, AttributeError):
            # Without NVML's bindings there is nothing to read.
            return

    @property
    def mean_percent(self) -> float | None:
        return round(float(np.mean(self.samples)), 1) if self.samples else None


def extractions(context: PartContext) -> None:
    """Run whole extractions into a fresh store."""
    n_images = context.size(8192, TINY_IMAGES)
    half: Any = "float16"
    text = _spec(context, "bert", half)
    base = partial(_spec, context, "vit-b", half)
    _extraction(context, "captions", n_images, ExtractSpec(text=text))
    _extraction(
        context, "vit-b torchvision", n_images, ExtractSpec(image=base(resize="torchvision"))
    )
    _extraction(context, "vit-b", n_images, ExtractSpec(image=base()))
    tokens = ExtractSpec(image=base(resize="torchvision", pooling="tokens"))
    _extraction(context, "vit-b tokens", n_images // 4, tokens)
    counted = ExtractSpec(text=text, text_batch=BATCH)
    _extraction(context, "captions, 256 in a batch", n_images // 2, counted)
    if context.device.type == "cuda":
        on_device = ExtractSpec(image=base(resize="torchvision"), decode="cuda")
        _extraction(context, "vit-b decoded on the device", n_images, on_device)


def _extraction(context: PartContext, name: str, n_images: int, spec: ExtractSpec) -> None:
    source = _source(context, n_images)
    store = context.work / "store"
    shutil.rmtree(store, ignore_errors=True)
    begin = time.perf_counter()
    with Utilization(context.device) as utilization:
        report = extract(source, store, replace(spec, device=str(context.device)))
    seconds = time.perf_counter() - begin
    rates = {
        f"{array.modality}_rows_s": round(array.n_encoded / array.seconds)
        for array in report.arrays
        if array.seconds
    }
    context.add(
        "extraction",
        run=name,
        seconds=round(seconds, 2),
        utilization_percent=utilization.mean_percent,
        **rates,
    )


def features(context: PartContext) -> None:
    """Compare features of the CPU with those of the card, twice and in other batches."""
    here = _features(context, "cpu", "float32")
    precisions = ("float32", "tf32", "float16", "bfloat16")
    for precision in precisions if not context.tiny else ("float32", "bfloat16"):
        there = _features(context, str(context.device), precision)
        again = _features(context, str(context.device), precision)
        smaller = _features(context, str(context.device), precision, batch=24)
        context.add(
            "features",
            precision=precision,
            error=_worst(here, there),
            other_batch_error=_worst(there, smaller),
            repeats=all(map(np.array_equal, there, again)),
        )


def _features(
    context: PartContext,
    device: str,
    precision: str,
    batch: int = 32,
) -> list[NDArray[np.float64]]:
    store = context.work / "few"
    shutil.rmtree(store, ignore_errors=True)
    spec = ExtractSpec(
        image=_spec(context, "vit-s", precision),
        text=_spec(context, "bert", precision),
        image_batch=batch,
        text_batch=batch,
        storage_dtype="float32",
        shard_rows=64,
        device=device,
    )
    extract(_source(context, context.size(96, 16)), store, spec)
    opened = FeatureStore.open(store)
    sides = [opened.arrays(modality)[0].load() for modality in ("image", "text")]
    return [side.astype(np.float64) for side in sides]


def _worst(
    ours: Sequence[NDArray[np.float64]],
    theirs: Sequence[NDArray[np.float64]],
) -> float:
    """Return the largest 1 - cosine of a row."""
    errors: list[float] = []
    for a, b in zip(ours, theirs, strict=True):
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        errors.append(float(1 - ((a * b).sum(1) / lengths).min()))
    return max(errors)


def search(context: PartContext) -> None:
    """Time exact search on the CPU by NumPy and on the device by torch."""
    from apecache.search.exact import exact_search

    n_vectors, dim, n_queries = (2000, 32, 20) if context.tiny else (200_000, 512, 1000)
    vectors = _unit_vectors(n_vectors, dim, seed=0)
    queries = _unit_vectors(n_queries, dim, seed=1)
    on_host = median_seconds(
        lambda: exact_search(vectors, queries, 10),
        torch.device("cpu"),
        repeats=2,
        warm=1,
    )
    context.add("search", way="exact, CPU", query_ms=round(1000 * on_host / n_queries, 4))
    there = [torch.from_numpy(x).to(context.device) for x in (vectors, queries)]
    on_device = median_seconds(
        lambda: (there[1] @ there[0].T).topk(10, dim=1),
        context.device,
        repeats=3,
    )
    context.add("search", way="exact, device", query_ms=round(1000 * on_device / n_queries, 4))


def _unit_vectors(count: int, dim: int, seed: int) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, dim), np.float32)
    unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
