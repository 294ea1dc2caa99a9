"""Measure a run by clip_benchmark, on data sets in its webdataset layout; extra `zero-shot`.

A data set is a folder with `test/nshards.txt`, `test/0.tar`, …, and `classnames.txt` and
`zeroshot_classification_templates.txt`, or `dataset_type.txt` with the word retrieval
(`clip_benchmark_export_wds` writes them). The figures are its own. The run is opened by
`open_clip_triple`. A result is kept beside the run, so an interrupted suite resumes.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apecache.arguments import AnyPath, as_path
from apecache.encoders.spec import EncoderSpec
from apecache.errors import DataError, MissingExtraError, OptionError, counted, nearest
from apecache.export.open_clip_triple import OpenClipTriple, open_clip_triple
from apecache.metrics.statistics import accuracy_interval
from apecache.runs.load import load_run
from apecache.storage.replace import replace_text

SUITES = ("clip-benchmark", "datacomp-38")
FOLDER = "suites"
KS = (1, 5, 10)
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class DataCompTask:
    """Name one task of DataComp (Gadre et al. 2023, appendix N)."""

    name: str
    main_metric: str = "acc1"
    """What counts in the mean of all tasks; `mean_recall@1` is the mean of both directions."""


DATACOMP = {
    "vtab/caltech101": DataCompTask(name="Caltech-101", main_metric="mean_per_class_recall"),
    "cifar10": DataCompTask(name="CIFAR-10"),
    "vtab/cifar100": DataCompTask(name="CIFAR-100"),
    "vtab/clevr_count_all": DataCompTask(name="CLEVR Counts"),
    "vtab/clevr_closest_object_distance": DataCompTask(name="CLEVR Distance"),
    "country211": DataCompTask(name="Country211"),
    "vtab/dtd": DataCompTask(name="Describable Textures"),
    "vtab/eurosat": DataCompTask(name="EuroSAT"),
    "fgvc_aircraft": DataCompTask(name="FGVC Aircraft", main_metric="mean_per_class_recall"),
    "food101": DataCompTask(name="Food-101"),
    "gtsrb": DataCompTask(name="GTSRB"),
    "imagenet1k": DataCompTask(name="ImageNet 1k"),
    "imagenet_sketch": DataCompTask(name="ImageNet Sketch"),
    "imagenetv2": DataCompTask(name="ImageNet v2"),
    "imagenet-a": DataCompTask(name="ImageNet-A"),
    "imagenet-o": DataCompTask(name="ImageNet-O"),
    "imagenet-r": DataCompTask(name="ImageNet-R"),
    "vtab/kitti_closest_vehicle_distance": DataCompTask(name="KITTI Vehicle Distance"),
    "mnist": DataCompTask(name="MNIST"),
    "objectnet": DataCompTask(name="ObjectNet"),
    "vtab/flowers": DataCompTask(name="Oxford Flowers-102", main_metric="mean_per_class_recall"),
    "vtab/pets": DataCompTask(name="Oxford-IIIT Pet", main_metric="mean_per_class_recall"),
    "voc2007": DataCompTask(name="Pascal VOC 2007"),
    "vtab/pcam": DataCompTask(name="PatchCamelyon"),
    "renderedsst2": DataCompTask(name="Rendered SST2"),
    "vtab/resisc45": DataCompTask(name="RESISC45"),
    "cars": DataCompTask(name="Stanford Cars"),
    "stl10": DataCompTask(name="STL-10"),
    "sun397": DataCompTask(name="SUN397"),
    "vtab/svhn": DataCompTask(name="SVHN"),
    "retrieval/flickr30k": DataCompTask(name="Flickr", main_metric="mean_recall@1"),
    "retrieval/mscoco_2014_5k_test_image_text_retrieval": DataCompTask(
        name="MSCOCO",
        main_metric="mean_recall@1",
    ),
    "misc/winogavil": DataCompTask(name="WinoGAViL", main_metric="jaccard_score_10-12"),
    "wilds/iwildcam": DataCompTask(name="iWildCam", main_metric="F1-macro_all"),
    "wilds/camelyon17": DataCompTask(name="Camelyon17"),
    "wilds/fmow": DataCompTask(name="FMoW", main_metric="acc_worst_region"),
    "fairness/dollar_street": DataCompTask(name="Dollar Street", main_metric="acc_top5_wg"),
    "fairness/geode": DataCompTask(name="GeoDE", main_metric="acc_wg"),
}
"""The 38 tasks by the folder of their data, with the names and main metrics of the challenge."""
OURS = ("acc1", "mean_per_class_recall", "mean_recall@1")
"""Main metrics that clip_benchmark computes; the others need code of the challenge."""


@dataclass(frozen=True, kw_only=True)
class SuiteRow:
    """Hold the figures of one data set."""

    data_set: str
    title: str
    metrics: Mapping[str, float]
    """As clip_benchmark names them, 0 to 1."""
    intervals: Mapping[str, tuple[float, float]]
    """95 % intervals of shares of images, 0 to 1."""
    n_images: int
    main_metric: str | None
    """Of DataComp; None outside of it."""


@dataclass(frozen=True, kw_only=True)
class SuiteReport:
    """Hold the figures of all data sets, and what is missing."""

    suite: str
    rows: tuple[SuiteRow, ...]
    missing: tuple[str, ...]
    """Tasks of DataComp without data, or whose main metric is not computed here."""
    main_score: float | None
    """Mean of the main metrics of the tasks that were measured; None outside of DataComp."""


def run_suite(
    run: AnyPath,
    suite: str,
    data_root: AnyPath,
    image: EncoderSpec | None = None,
    text: EncoderSpec | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda _: None,
) -> SuiteReport:
    """Measure a run on every data set of a suite that lies below a folder.

    Results of an earlier call with the same weights are taken from the run's folder.

    Args:
        run: folder of the run.
        suite: `clip-benchmark`, every data set; or `datacomp-38`, those of the challenge.
        data_root: folder of the data sets.
        image: image encoder at its new place, if it has moved.
        text: text encoder at its new place, if it has moved.
        device: of the encoders.
        progress: called with the name of each data set before it is measured.

    Raises:
        OptionError: no such suite.
        DataError: no data set.
        MissingExtraError: clip_benchmark or webdataset is not installed.
    """
    run = as_path(run, "run")
    data_root = as_path(data_root, "data_root")
    if suite not in SUITES:
        raise OptionError(
            f"--suite {suite}: expected one of {', '.join(SUITES)}{nearest(suite, SUITES)}"
        )
    _require_library()
    is_datacomp = suite == "datacomp-38"
    data_sets = find_data_sets(data_root)
    selected = data_sets
    if is_datacomp:
        selected = {name: path for name, path in data_sets.items() if name in DATACOMP}
    if not selected:
        raise DataError(
            f"{data_root} has no data set of {suite}; expected folders with test/nshards.txt "
            f"(found {counted(len(data_sets), 'other data set')})"
        )
    digest = load_run(run, image=image, text=text).digest
    results = run / FOLDER / f"{suite}.json"
    kept_results = _read(results, digest)
    triple: OpenClipTriple | None = None
    rows: dict[str, SuiteRow] = {}
    for name, path in sorted(selected.items()):
        if name not in kept_results:
            progress(name)
            # Loaded only now: a suite that is finished needs no encoder.
            if triple is None:
                triple = open_clip_triple(run, image=image, text=text, device=device)
            # Written after each data set, so that an interrupt loses one at most.
            kept_results[name] = asdict(_measure(name, path, triple, device))
            _write(results, digest, kept_results)
        rows[name] = _row(kept_results[name])
    return _report(suite, rows)


def find_data_sets(root: Path) -> dict[str, Path]:
    """Return the data sets below a folder by their names: a path with slashes, without `wds_`."""
    data_sets = {}
    for marker in sorted(root.rglob("nshards.txt")):
        if marker.parent.name == "test":
            folder = marker.parent.parent
            data_sets[folder.relative_to(root).as_posix().removeprefix("wds_")] = folder
    return data_sets


def read_suites(run: Path) -> list[SuiteReport]:
    """Return the results that are kept beside a run."""
    reports = []
    for suite in SUITES:
        path = run / FOLDER / f"{suite}.json"
        if path.is_file():
            kept_results = json.loads(path.read_text(encoding="utf-8"))["results"]
            reports.append(_report(suite, {name: _row(row) for name, row in kept_results.items()}))
    return reports


def _row(value: Mapping[str, Any]) -> SuiteRow:
    """Restore a row from its JSON, which has lists for pairs."""
    intervals = {name: (low, high) for name, (low, high) in value["intervals"].items()}
    return SuiteRow(**{**value, "intervals": intervals})


def _report(suite: str, rows: Mapping[str, SuiteRow]) -> SuiteReport:
    if suite != "datacomp-38":
        return SuiteReport(suite=suite, rows=tuple(rows.values()), missing=(), main_score=None)
    scores = {}
    for name, row in rows.items():
        main = DATACOMP[name].main_metric
        if main in OURS:
            scores[name] = row.metrics[main]
    missing = [task.name for name, task in DATACOMP.items() if name not in scores]
    return SuiteReport(
        suite=suite,
        rows=tuple(rows.values()),
        missing=tuple(missing),
        main_score=math.fsum(scores.values()) / len(scores) if scores else None,
    )


def _measure(name: str, folder: Path, triple: OpenClipTriple, device: str) -> SuiteRow:
    """Measure one data set by clip_benchmark's own functions."""
    from clip_benchmark.datasets.builder import build_wds_dataset

    model, preprocess, tokenizer = triple
    data_set = build_wds_dataset(name, preprocess, split="test", data_dir=str(folder))
    loader: Any = torch.utils.data.DataLoader(
        data_set.batched(BATCH),
        batch_size=None,
        num_workers=0,
    )
    counted_loader = _Counted(loader, data_set)
    if data_set.classes is None:
        from clip_benchmark.metrics import zeroshot_retrieval

        metrics = zeroshot_retrieval.evaluate(
            model,
            counted_loader,
            tokenizer,
            device,
            amp=False,
            recall_k_list=list(KS),
        )
        two_recalls = (metrics["image_retrieval_recall@1"], metrics["text_retrieval_recall@1"])
        metrics["mean_recall@1"] = sum(two_recalls) / 2
    else:
        from clip_benchmark.metrics import zeroshot_classification

        with _any_numpy(zeroshot_classification):
            metrics = zeroshot_classification.evaluate(
                model,
                counted_loader,
                tokenizer,
                data_set.classes,
                data_set.templates,
                device,
                amp=False,
            )
    n_images = counted_loader.n_images
    # With fewer than five classes there is no top-5 accuracy, which is then NaN.
    shares = {key: float(value) for key, value in metrics.items() if not math.isnan(value)}
    task = DATACOMP.get(name)
    return SuiteRow(
        data_set=name,
        title=task.name if task else name,
        metrics=shares,
        intervals={key: _interval(value, n_images) for key, value in shares.items()},
        n_images=n_images,
        main_metric=task.main_metric if task else None,
    )


class _Counted:
    """Count the images that a loader gives."""

    def __init__(self, loader: Any, dataset: Any) -> None:
        self.loader = loader
        # clip_benchmark reads the names of the classes from it.
        self.dataset = dataset
        self.n_images = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self.n_images += len(batch[0])
            yield batch


def _interval(share: float, n_images: int) -> tuple[float, float]:
    low, high = accuracy_interval(100 * share, n_images)
    return low / 100, high / 100


@contextmanager
def _any_numpy(module: Any) -> Iterator[None]:
    """Replace clip_benchmark's accuracy, which numpy 2.4 refuses.

    Version 1.6.2 converts an array of one element by `float`, which numpy allows for arrays without
    axes only. The figures are the same.
    """
    original = module.accuracy

    def accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[float]:
        best = output.topk(max(topk), dim=1).indices
        hits = best == target.view(-1, 1)
        return [float(hits[:, :k].any(dim=1).double().mean()) for k in topk]

    module.accuracy = accuracy
    try:
        yield
    finally:
        module.accuracy = original


def _read(path: Path, digest: str) -> dict[str, Any]:
    """Return the kept results of the same weights."""
    if not path.is_file():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    return dict(value["results"]) if value.get("run") == digest else {}


def _write(path: Path, digest: str, results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps({"run": digest, "results": dict(results)}, indent=1))


def _require_library() -> None:
    for module in ("clip_benchmark", "webdataset"):
        try:
            __import__(module)
        except ImportError:
            raise MissingExtraError(module, "zero-shot") from None
