"""A run in the suites of other programs, beside our own figures on the same images.

    python -m benchmarks.quality.suites --store store --flickr8k flickr8k --clothing10 clothing10
    python -m benchmarks.quality.suites --quick      # small encoders with random weights, drawings

`--store` is a store of Flickr8k with one image and one text encoder (`--image-encoder` and
`--text-encoder` choose among several). A `projection` head is fitted on its train split. Data sets
are written in clip_benchmark's webdataset layout. None is the published one, and each says so in
its `source.txt`:

- `mnist`: digits of scikit-learn, 8 px.
- `cifar10`: the demo's drawings of nine of CIFAR-10's classes at 32 px, twelve variants each.
- `clothing10` (with `--clothing10`): its test photos. It is no task of DataComp.
- `retrieval/flickr30k` (with `--flickr8k`): the photos of Flickr8k's split `val`.

A row has the figure of a program (`clip-benchmark`, `datacomp-38`, or `mteb` where it is
installed) and ours: `apecache.evaluate.zeroshot` with the same class names and prompts, or
`retrieval_report`. Hits are counted, so equal means equal. `mteb folder` is mteb on the exported
sentence-transformers folder.
"""

import argparse
import io
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

import apecache
from apecache.evaluate.class_names import read_class_names
from apecache.evaluate.labeled import LabeledSpec
from apecache.evaluate.zeroshot import ZeroShotSpec, zero_shot
from apecache.export.benchmark_suite import read_suites, run_suite
from apecache.export.datacomp import DATACOMP
from apecache.metrics.retrieval import retrieval_report
from apecache.runs.load import load_run
from apecache.runs.model import ImageTextModel
from apecache.store.reader import FeatureStore
from benchmarks.record import Goal, print_goals, print_table, write_result

DRAWINGS = Path(__file__).parents[2] / "examples" / "drawings"
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
DRAWN = {"automobile": "transport/car", "ship": "transport/ship", "truck": "transport/truck"}
"""Drawings of classes; the others are animals under their own name. There is no airplane."""
N_VARIANTS = 12
PX = 32
TEMPLATES = {
    "mnist": ['a photo of the number: "{c}".'],
    "cifar10": ["a photo of a {c}.", "a blurry photo of a {c}.", "a photo of the {c}."],
    "clothing10": ["a photo of a {c}.", "a photo of {c}, a type of clothing."],
}
RECALLS = {"image_retrieval_recall": "text_to_image", "text_retrieval_recall": "image_to_text"}
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Classified:
    """Hold labeled images of one data set."""

    name: str
    source: str
    classes: Sequence[str]
    images: Sequence[tuple[bytes, str, int]]
    """Bytes of a file, its suffix and the number of the class."""


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(exist_ok=True, parents=True)
        run = quick_run(work) if options.quick else fit_run(options, work)
        data = list(classified(options))
        root = work / "data"
        for each in data:
            write_classified(root, each, work / "labeled" / each.name)
        captioned = [] if options.flickr8k is None else flickr8k_pairs(options)
        if captioned:
            write_captioned(root / "retrieval" / "flickr30k", captioned)
        rows = measure(run, root, work, data, captioned)
        mean = mean_row(run)
    differences = [row["hits that differ"] for row in rows]
    missing = next(row["missing"] for row in rows if row["program"] == "datacomp-38")
    goals = [
        Goal(name="figures measured twice", value=len(rows), target=4, better="higher"),
        Goal(name="hits that differ from ours", value=max(differences), target=0, better="lower"),
        Goal(
            name="tasks of DataComp that are listed as missing, not averaged",
            value=missing,
            target=len(DATACOMP) - sum(name in DATACOMP for name in names_of(data, captioned)),
            better="lower",
        ),
    ]
    rows.append(mean)
    hidden = ("missing", "missing tasks")
    print_table([{key: row[key] for key in row if key not in hidden} for row in rows])
    print_goals(goals)
    if options.json or not options.quick:
        write_result("quality-suites", goals, rows, options.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--image-encoder")
    parser.add_argument("--text-encoder")
    parser.add_argument("--flickr8k", type=Path, help="folder with captions.tsv and images/")
    parser.add_argument("--clothing10", type=Path, help="folder with labels.tsv and photos")
    parser.add_argument("--digits", type=int, default=500, help="of scikit-learn's 1,797")
    parser.add_argument("--photos", type=int, help="of Flickr8k's split val; default: all")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not (options.store or options.quick):
        parser.error("give --store or --quick")
    if options.quick:
        options.digits = 20
        # The small text encoder reads 24 bytes: a longer prompt would cut off the name.
        TEMPLATES.update({name: ["{c}"] for name in TEMPLATES})
    return options


def quick_run(work: Path) -> Path:
    """Write small encoders with random weights and heads on them."""
    from benchmarks.small_encoders import build_run

    return work / "run" if (work / "run").exists() else build_run(work, "timm + hf BERT", "linear")


def fit_run(options: argparse.Namespace, work: Path) -> Path:
    """Fit a projection on the train split of a store; 500 images of it choose the epoch."""
    run = work / "run"
    if (run / "head.json").exists():
        return run
    from apecache.train.head_data import FitSpec

    store = FeatureStore.open(options.store)
    spec = FitSpec(
        image_features=options.image_encoder,
        text_features=options.text_encoder,
        report_split="val",
        device="cpu",
    )
    apecache.fit_head(store, "projection", run, spec)
    return run


def classified(options: argparse.Namespace) -> Iterator[Classified]:
    """Yield the data sets of classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    step = len(digits.images) // options.digits
    images = []
    for pixels, label in list(zip(digits.images, digits.target, strict=True))[::step]:
        gray = Image.fromarray(np.uint8(np.clip(pixels * 16, 0, 255)))
        images.append((png(gray.convert("RGB")), ".png", int(label)))
    yield Classified(
        name="mnist",
        source="digits of scikit-learn at 8 px, not MNIST",
        classes=[str(number) for number in range(10)],
        images=images,
    )
    yield Classified(
        name="cifar10",
        source="drawings at 32 px, none of an airplane, not CIFAR-10",
        classes=CIFAR,
        images=list(drawn_classes()),
    )
    if options.clothing10 is not None:
        yield clothing(options.clothing10)


def drawn_classes() -> Iterator[tuple[bytes, str, int]]:
    """Yield variants of drawings: mirrored, turned by a few degrees, at 32 px."""
    for label, name in enumerate(CIFAR):
        path = DRAWINGS / "images" / f"{DRAWN.get(name, f'animals/{name}')}.jpg"
        if not path.is_file():
            continue
        original = Image.open(path).convert("RGB")
        for variant in range(N_VARIANTS):
            turned = original.rotate(5 * (variant // 2) - 12, fillcolor="white")
            shown = ImageOps.mirror(turned) if variant % 2 else turned
            small = ImageOps.fit(shown, (PX, PX), Image.Resampling.BICUBIC)
            yield png(small), ".png", label


def clothing(folder: Path) -> Classified:
    lines = (folder / "labels.tsv").read_text(encoding="utf-8").splitlines()[1:]
    entries = [line.split("\t") for line in lines]
    test = [(path, label) for path, label, split in entries if split == "test"]
    classes = sorted({label for _, label in test})
    images = [
        ((folder / path).read_bytes(), Path(path).suffix, classes.index(label))
        for path, label in test
    ]
    return Classified(
        name="clothing10",
        source="test photos of clothing10; no task of DataComp",
        classes=classes,
        images=images,
    )


def flickr8k_pairs(options: argparse.Namespace) -> list[tuple[Path, list[str]]]:
    """Return the photos of the split val with their captions."""
    captions: dict[str, list[str]] = {}
    lines = (options.flickr8k / "captions.tsv").read_text(encoding="utf-8").splitlines()
    columns = lines[0].split("\t")
    for line in lines[1:]:
        entry = dict(zip(columns, line.split("\t"), strict=True))
        if entry["split"] == "val":
            captions.setdefault(entry["image"], []).append(entry["caption"])
    pairs = [(options.flickr8k / name, texts) for name, texts in captions.items()]
    return pairs[: options.photos]


def write_classified(root: Path, data: Classified, labeled: Path) -> None:
    """Write a data set for clip_benchmark, as a folder per class for ours, and for mteb."""
    # Files that are there already stay: a suite measures again what has other times.
    if (root / data.name / "classnames.txt").exists():
        return
    samples = []
    shutil.rmtree(labeled, ignore_errors=True)
    for number, (content, suffix, label) in enumerate(data.images):
        samples.append((f"{number:05}", {suffix: content, ".cls": str(label).encode()}))
        path = labeled / data.classes[label] / f"{number:05}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    write_shard(root / data.name, data.source, samples)
    templates = root / data.name / "zeroshot_classification_templates.txt"
    templates.write_text("\n".join(TEMPLATES[data.name]))
    if data.name == "cifar10" and find_spec("mteb"):
        write_for_mteb(root / "mteb" / "cifar10", data)
    # The last file: it says that all are there.
    (root / data.name / "classnames.txt").write_text("\n".join(data.classes))


def write_captioned(folder: Path, pairs: Sequence[tuple[Path, list[str]]]) -> None:
    if (folder / "dataset_type.txt").exists():
        return
    samples = []
    for number, (path, captions) in enumerate(pairs):
        files = {path.suffix: path.read_bytes(), ".txt": "\n".join(captions).encode()}
        samples.append((f"{number:05}", files))
    write_shard(folder, "photos of Flickr8k's split val, not Flickr30k", samples)
    (folder / "dataset_type.txt").write_text("retrieval")


def write_shard(folder: Path, source: str, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    (folder / "test").mkdir(parents=True, exist_ok=True)
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "source.txt").write_text(source + "\n")
    with tarfile.open(folder / "test" / "0.tar", "w") as archive:
        for key, files in samples:
            for suffix, content in files.items():
                entry = tarfile.TarInfo(key + suffix)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def write_for_mteb(folder: Path, data: Classified) -> None:
    """Write the layout of the repository that mteb's task CIFAR10ZeroShot names."""
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    label_names = datasets.ClassLabel(names=list(data.classes))
    features = datasets.Features({"img": datasets.Image(), "label": label_names})
    columns = {
        "img": [{"bytes": content, "path": None} for content, _, _ in data.images],
        "label": [label for _, _, label in data.images],
    }
    split = datasets.Dataset.from_dict(columns, features=features)
    split.to_parquet(folder / "test-00000.parquet")
    (folder / "source.txt").write_text(data.source + "\n")


def measure(
    run: Path,
    root: Path,
    work: Path,
    data: Sequence[Classified],
    captioned: Sequence[tuple[Path, list[str]]],
) -> list[Row]:
    """Return a row per program, data set and figure."""
    model = apecache.load(run, device="cpu")
    ours = {
        each.name: our_accuracy(run, work, root, each.name, TEMPLATES[each.name]) for each in data
    }
    if captioned:
        ours["retrieval/flickr30k"] = our_recalls(model, captioned, work)
    rows = []
    for suite in ("clip-benchmark", "datacomp-38"):
        report = run_suite(run, suite, root, progress=print)
        for measured in report.rows:
            for figure, value in ours[measured.data_set].items():
                made = row_of(suite, measured.data_set, figure, measured.metrics[figure], value)
                made |= {"images": measured.n_images, "source": measured.source}
                rows.append(made | {"missing": len(report.missing)})
    if find_spec("mteb") and any(each.name == "cifar10" for each in data):
        rows += mteb_rows(run, root, work)
    return rows


def mean_row(run: Path) -> Row:
    """Return the main score of DataComp, with the tasks that it does not have."""
    report = next(report for report in read_suites(run) if report.suite == "datacomp-38")
    assert report.main_score is not None
    return {
        "program": "datacomp-38",
        "data set": f"mean of {len(DATACOMP) - len(report.missing)} of {len(DATACOMP)} tasks",
        "figure": "main metrics",
        "%": round(100 * report.main_score, 4),
        "missing tasks": list(report.missing),
    }


def mteb_rows(run: Path, root: Path, work: Path) -> list[Row]:
    """Return rows of mteb's CIFAR10ZeroShot, on the run and on its exported folder."""
    import mteb

    from apecache.errors import ApecacheError
    from apecache.export.export_run import ExportRunSpec, export_run
    from apecache.export.mteb_suite import find_tasks, measure_task

    expected = our_accuracy(run, work, root, "cifar10", ["a photo of a {c}."])["acc1"]
    report = run_suite(run, "mteb:CIFAR10ZeroShot", root, progress=print)
    found = {"mteb": report.rows[0]}
    folder = work / "exported"
    try:
        if not folder.exists():
            export_run(run, folder, spec=ExportRunSpec(to="sentence-transformers"))
        task = find_tasks(["CIFAR10ZeroShot"])["CIFAR10ZeroShot"]
        model: Any = apecache.mteb_model(folder)
        name = "CIFAR10ZeroShot"
        found["mteb folder"] = measure_task(name, task, model, root / "mteb" / "cifar10")
    except ApecacheError as error:
        print(error)
    rows = []
    for program, measured in found.items():
        row = row_of(program, "CIFAR10ZeroShot", "accuracy", measured.metrics["accuracy"], expected)
        rows.append(row | {"images": measured.n_images, "source": measured.source, "missing": None})
    print(f"mteb {mteb.__version__}")
    return rows


def our_accuracy(
    run: Path,
    work: Path,
    root: Path,
    name: str,
    templates: Sequence[str],
) -> dict[str, tuple[float, int]]:
    """Classify a folder per class; return accuracies and the number of images."""
    names = root / name / "classnames.txt"
    report = zero_shot(
        load_run(run, device="cpu"),
        ZeroShotSpec(
            images=LabeledSpec(
                labels=apecache.open_pairs(str(work / "labeled" / name)),
                caches=work / "features",
                device="cpu",
            ),
            templates=tuple(templates),
            names=read_class_names(names),
        ),
    )
    figures = {"acc1": report.top1, "acc5": report.top5}
    return {figure: (value, report.n_images) for figure, value in figures.items()}


def our_recalls(
    model: ImageTextModel,
    pairs: Sequence[tuple[Path, list[str]]],
    work: Path,
) -> dict[str, tuple[float, int]]:
    """Return recalls in per cent by the names of clip_benchmark, with their numbers of queries."""
    texts = [text for _, captions in pairs for text in captions]
    kept = work / "embeddings.npz"
    if not kept.exists():
        image = model.encode_image([path for path, _ in pairs])
        np.savez(kept, image=image, text=model.encode_text(texts))
    with np.load(kept) as arrays:
        image = torch.from_numpy(arrays["image"])
        text = torch.from_numpy(arrays["text"])
    owner = torch.tensor([n for n, (_, captions) in enumerate(pairs) for _ in captions])
    report = retrieval_report(image, text, owner)
    recalls = {}
    for name, direction in RECALLS.items():
        n_queries = len(texts) if direction == "text_to_image" else len(pairs)
        for k, value in getattr(report, direction).items():
            recalls[f"{name}@{k}"] = (value, n_queries)
    return recalls


def row_of(
    program: str,
    data_set: str,
    figure: str,
    value: float,
    ours: tuple[float, int],
) -> Row:
    """Return a row; both figures in per cent."""
    ours_value, n_queries = ours
    hits = round(value * n_queries)
    return {
        "program": program,
        "data set": data_set,
        "figure": figure,
        "%": round(100 * value, 4),
        "ours %": round(ours_value, 4),
        "hits that differ": abs(hits - round(ours_value / 100 * n_queries)),
    }


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def names_of(data: Sequence[Classified], captioned: Sequence[Any]) -> list[str]:
    return [*(each.name for each in data), *(["retrieval/flickr30k"] if captioned else [])]


if __name__ == "__main__":
    main()
