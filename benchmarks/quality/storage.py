"""What float16 and int8 features lose against float32, and what they save: vectors, bytes, reading,
recall.

    python -m benchmarks.quality.storage --pairs captions.tsv --image hf:/folder --text hf:/folder --work w
    python -m benchmarks.quality.storage --quick            # the drawings of the demo, for a smoke test

The same images and captions are extracted three times, both encoders' own pooled features and all
their tokens. Rows say for each array how far stored vectors are from those of float32 (1 - cosine,
the worst and the mean), bytes of a row, and CPU time of loading beside float16's (medians,
interleaved). A head on each cut (`projection`, `freeze-align`) is fitted to each storage with the
same seeds, its epoch chosen on a tenth of train; R@1 is the mean of both ways on val, and its
difference from float32's is paired by seed. All stays in `--work`; what is finished is not done
again.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from apecache.data.sources import open_pairs
from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.evaluate.embeddings import embed_store
from apecache.extraction.run import ExtractSpec, extract
from apecache.metrics.retrieval import retrieval_report
from apecache.recipes.recipe import load_recipe
from apecache.runs.heads import load_heads
from apecache.store.array import FeatureArray
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec
from benchmarks.quality.flickr8k import DRAWINGS, packaged
from benchmarks.record import Goal, print_goals, print_table, write_result

STORAGES: tuple[Any, ...] = ("float32", "float16", "int8")
RECIPES = {"pooled": "projection", "tokens": "freeze-align"}
Row = dict[str, Any]


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        if options.quick:
            options.pairs = DRAWINGS
            options.train_images = 120
            options.val_images = 60
            options.seeds = 1
            options.epochs = 1
            options.repeats = 3
            options.image, options.text = packaged(work)
        stores = {storage: extracted(options, work / storage, storage) for storage in STORAGES}
        vectors = [
            row for side in ("image", "text") for row in vector_rows(stores, side, options.repeats)
        ]
        print_table(vectors)
        print()
        recalls = [
            row
            for cut in cuts(stores["float32"])
            for row in recall_rows(options, stores=stores, cut=cut, work=work)
        ]
    print_table(recalls)
    met = goals(vectors, recalls)
    if not options.quick:
        print_goals(met)
    if options.json or not options.quick:
        write_result("quality-storage", goals=met, rows=[*vectors, *recalls], path=options.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="float32, float16 and int8 features beside each other."
    )
    parser.add_argument(
        "--pairs",
        type=Path,
        help="captions.tsv with columns image, caption, split (train, val)",
    )
    parser.add_argument("--image", help="image encoder with tokens, for example hf:/folder")
    parser.add_argument("--text", help="text encoder, for example hf:/folder")
    parser.add_argument("--resolution", type=int, help="image side in pixels")
    parser.add_argument("--train-images", type=int, default=1500)
    parser.add_argument("--val-images", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--epochs",
        type=int,
        default=4,
        help="of the recipe on tokens; the other keeps its own",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder to keep stores and runs in")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.quick and not (options.pairs and options.image and options.text):
        parser.error("--pairs, --image and --text are needed (or --quick)")
    return options


def extracted(options: argparse.Namespace, folder: Path, storage: Any) -> FeatureStore:
    """Pooled features and, of towers that have them, tokens."""
    whole = open_pairs(options.pairs)
    own = {
        split: [pair for pair in whole.pairs if pair.split == split] for split in ("train", "val")
    }
    chosen = (*own["train"][: options.train_images], *own["val"][: options.val_images])
    image = replace(parse_encoder(options.image, "image"), resolution=options.resolution)
    images = with_tokens(image) if image.library == "hf" else (image,)
    texts = with_tokens(parse_encoder(options.text, "text"))
    spec = ExtractSpec(images, texts, storage_dtype=storage, device="cpu", workers=0)
    extract(replace(whole, pairs=chosen), folder, spec)
    return FeatureStore.open(folder)


def with_tokens(spec: EncoderSpec) -> tuple[EncoderSpec, EncoderSpec]:
    return spec, replace(spec, pooling="tokens")


def cuts(store: FeatureStore) -> list[str]:
    """Those that both sides have."""
    kinds = [{cut_of(array) for array in store.arrays(side)} for side in ("image", "text")]  # type: ignore[arg-type]
    return sorted(kinds[0] & kinds[1])


def cut_of(array: FeatureArray) -> str:
    return "pooled" if array.tokens is None else "tokens"


def array_of(store: FeatureStore, side: Any, cut: str) -> FeatureArray:
    return next(array for array in store.arrays(side) if cut_of(array) == cut)


def vector_rows(stores: dict[str, FeatureStore], side: Any, repeats: int) -> list[Row]:
    rows = []
    for cut in dict.fromkeys(cut_of(array) for array in stores["float32"].arrays(side)):
        arrays = {storage: array_of(store, side, cut) for storage, store in stores.items()}
        exact = vectors_of(arrays["float32"])
        seconds = loading_seconds(arrays, repeats)
        for storage, array in arrays.items():
            off = distances(exact, vectors_of(array))
            rows.append(
                {
                    "side": side,
                    "cut": cut,
                    "storage": storage,
                    "bytes a row": array.row_bytes,
                    "worst 1 - cosine": float(off.max()),
                    "mean 1 - cosine": float(off.mean()),
                    "loading, CPU / float16": round(seconds[storage] / seconds["float16"], 2),
                }
            )
    return rows


def vectors_of(array: FeatureArray) -> NDArray[np.float32]:
    """[n, dim]: rows, or tokens that are there."""
    features = array.load()[array.load_ok()]
    lengths = array.load_lengths()
    if lengths is not None:
        features = features[np.arange(features.shape[1]) < lengths[array.load_ok(), None]]
    return features.reshape(-1, features.shape[-1]).astype(np.float32)


def distances(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float64]:
    """1 - cosine of each pair of vectors, from the difference of the unit vectors: exact also where
    it is tiny."""
    a, b = (v / np.linalg.norm(v.astype(np.float64), axis=1, keepdims=True) for v in (x, y))
    found: NDArray[np.float64] = ((a - b) ** 2).sum(1) / 2
    return found


def loading_seconds(arrays: dict[str, FeatureArray], repeats: int) -> dict[str, float]:
    """Median CPU seconds of reading each array into a buffer that is there."""
    times: dict[str, list[float]] = {storage: [] for storage in arrays}
    buffers = {storage: array.load() for storage, array in arrays.items()}
    for _ in range(repeats):
        for storage, array in arrays.items():
            begin = time.process_time()
            array.load(buffers[storage])
            times[storage].append(time.process_time() - begin)
    return {storage: statistics.median(found) for storage, found in times.items()}


def recall_rows(
    options: argparse.Namespace,
    stores: dict[str, FeatureStore],
    cut: str,
    work: Path,
) -> list[Row]:
    found = {
        storage: [
            recall(options, store=store, cut=cut, seed=seed, run=work / f"{cut}-{storage}-{seed}")
            for seed in range(options.seeds)
        ]
        for storage, store in stores.items()
    }
    rows = []
    for storage, measured in found.items():
        values = [value for value, _ in measured]
        apart = [value - exact for value, (exact, _) in zip(values, found["float32"], strict=True)]
        chance = round(measured[0][1], 2)
        about = {"recipe": RECIPES[cut], "cut": cut, "storage": storage, "seeds": len(values)}
        rows.append(
            {
                **about,
                "R@1": round(statistics.fmean(values), 2),
                "chance": chance,
                "less float32's": [round(v, 2) for v in apart],
            }
        )
    return rows


def recall(
    options: argparse.Namespace,
    store: FeatureStore,
    cut: str,
    seed: int,
    run: Path,
) -> tuple[float, float]:
    """Mean R@1 on val of a head of that cut, and chance."""
    if not (run / "head.json").is_file():
        wanted = [f"schedule.epochs={options.epochs}"] * (cut == "tokens" or options.quick)
        recipe = load_recipe(RECIPES[cut], [*wanted, "schedule.batch_size=256"])
        names = [array_of(store, side, cut).name for side in ("image", "text")]
        splits = SplitSpec(dev_images=options.train_images // 10)
        fit_head(
            store,
            recipe=recipe,
            out=run,
            spec=FitSpec(*names, splits, seed, "cpu", report_split="val"),
        )
    embedded = embed_store(load_heads(run), store, "val")
    report = retrieval_report(
        embedded.image,
        embedded.text,
        embedded.image_of_text,
        relevance=embedded.relevance,
    )
    chance = (report.chance_image_to_text[1] + report.chance_text_to_image[1]) / 2
    return report.mean_recall_at_1, chance


def goals(vectors: list[Row], recalls: list[Row]) -> list[Goal]:
    """Of int8: vectors nearly what they were, tokens half of float16's bytes, recall that moves
    less than seeds do."""
    small = [row for row in vectors if row["storage"] == "int8"]
    half = {
        (row["side"], row["cut"]): row["bytes a row"]
        for row in vectors
        if row["storage"] == "float16"
    }
    found = [
        Goal(
            name="int8, worst 1 - cosine",
            value=max(row["worst 1 - cosine"] for row in small),
            target=1e-3,
            better="lower",
        ),
        Goal(
            name="int8, bytes / float16",
            value=max(r["bytes a row"] / half[r["side"], r["cut"]] for r in small),
            target=0.52,
            better="lower",
        ),
    ]
    for row in recalls:
        if row["storage"] == "int8":
            apart = abs(statistics.fmean(row["less float32's"]))
            found.append(
                Goal(
                    name=f"int8, {row['recipe']}, R@1 apart",
                    value=round(apart, 3),
                    target=0.5,
                    better="lower",
                )
            )
    return found


if __name__ == "__main__":
    main()
