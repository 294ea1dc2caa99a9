"""Find and measure data sets of clip_benchmark; extra `zero-shot`.

A data set is a folder with `test/nshards.txt`, `test/0.tar`, …, and `classnames.txt` and
`zeroshot_classification_templates.txt`, or `dataset_type.txt` with the word retrieval
(`clip_benchmark_export_wds` writes them). Or it is one that clip_benchmark builds from the
publisher's own files: `winoground`, `sugar_crepe/add_att`, `crossmodal3600@de`, …. All figures are
clip_benchmark's own.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apecache.errors import DataError, MissingExtraError, one_line
from apecache.export.datacomp import DATACOMP
from apecache.export.open_clip_triple import OpenClipTriple
from apecache.export.suite_report import SuiteRow, data_source, folder_stamp, share_intervals

KS = (1, 5, 10)
BATCH = 64
DOWNLOADERS = (
    "builder",
    "crossmodal3600",
    "flickr30k_200",
    "multilingual_mscoco",
    "xtd10",
    "xtd200",
)
"""Modules of clip_benchmark that start a program to download what is missing."""


def find_data_sets(root: Path) -> dict[str, Path]:
    """Return the data sets below a folder by their names: a path with slashes, without `wds_`."""
    data_sets = {}
    for marker in sorted(root.rglob("nshards.txt")):
        if marker.parent.name == "test":
            folder = marker.parent.parent
            data_sets[folder.relative_to(root).as_posix().removeprefix("wds_")] = folder
    return data_sets


def require_clip_benchmark() -> None:
    """Raise MissingExtraError unless clip_benchmark and webdataset are installed."""
    for module in ("clip_benchmark", "webdataset"):
        try:
            __import__(module)
        except ImportError:
            raise MissingExtraError(module, "zero-shot") from None


def measure_folder(name: str, folder: Path, triple: OpenClipTriple, device: str) -> SuiteRow:
    """Measure a data set in clip_benchmark's webdataset layout.

    Args:
        name: of the data set, as `find_data_sets` returns it.
        folder: of the data set.
        triple: the model.
        device: of the model.
    """
    from clip_benchmark.datasets.builder import build_wds_dataset

    data_set = build_wds_dataset(name, triple[1], split="test", data_dir=str(folder))
    loader: Any = torch.utils.data.DataLoader(
        data_set.batched(BATCH),
        batch_size=None,
        num_workers=0,
    )
    task = "zeroshot_retrieval" if data_set.classes is None else "zeroshot_classification"
    return _measure(
        name,
        folder=folder,
        loader=_Counted(loader, data_set),
        task=task,
        triple=triple,
        device=device,
    )


def measure_built(name: str, data_root: Path, triple: OpenClipTriple, device: str) -> SuiteRow:
    """Measure a data set that clip_benchmark builds from the publisher's own files.

    Args:
        name: as clip_benchmark names it, with `@LANGUAGE` if it is not English.
        data_root: holds a folder of the part of the name before the first slash. clip_benchmark's
            downloads are off: it starts programs for them.
        triple: the model.
        device: of the model.

    Raises:
        DataError: no such data set, or a file of it is missing.
    """
    from clip_benchmark.datasets.builder import (
        build_dataset,
        get_dataset_collate_fn,
        get_dataset_default_task,
    )

    plain_name, _, language = name.partition("@")
    folder = data_root / plain_name.partition("/")[0]
    if not folder.is_dir():
        raise DataError(f"{name}: {folder} is missing; put the files of the data set there")
    task = get_dataset_default_task(plain_name)
    try:
        with _no_downloads(name, folder):
            data_set = build_dataset(
                plain_name,
                root=str(folder),
                transform=triple[1],
                split="test",
                download=False,
                language=language or "en",
                task=task,
            )
    except DataError:
        raise
    except (Exception, SystemExit) as error:  # its builders share no base class of errors
        raise DataError(
            f"{name}: clip_benchmark cannot build it from {folder} ({one_line(error)})"
        ) from error
    loader: Any = torch.utils.data.DataLoader(
        data_set,
        batch_size=BATCH,
        num_workers=0,
        collate_fn=get_dataset_collate_fn(plain_name),
    )
    return _measure(
        name,
        folder=folder,
        loader=_Counted(loader, data_set),
        task=task,
        triple=triple,
        device=device,
    )


def _measure(
    name: str,
    folder: Path,
    loader: "_Counted",
    task: str,
    triple: OpenClipTriple,
    device: str,
) -> SuiteRow:
    """Measure one data set by clip_benchmark's own functions."""
    model, _, tokenizer = triple
    if task == "zeroshot_retrieval":
        from clip_benchmark.metrics import zeroshot_retrieval

        metrics = zeroshot_retrieval.evaluate(
            model,
            loader,
            tokenizer,
            device,
            amp=False,
            recall_k_list=list(KS),
        )
        two_recalls = (metrics["image_retrieval_recall@1"], metrics["text_retrieval_recall@1"])
        metrics["mean_recall@1"] = sum(two_recalls) / 2
    elif task == "image_caption_selection":
        from clip_benchmark.metrics import image_caption_selection

        metrics = image_caption_selection.evaluate(model, loader, tokenizer, device, amp=False)
    else:
        from clip_benchmark.metrics import zeroshot_classification

        with _any_numpy(zeroshot_classification):
            metrics = zeroshot_classification.evaluate(
                model,
                loader,
                tokenizer,
                loader.dataset.classes,
                loader.dataset.templates,
                device,
                amp=False,
            )
    # With fewer than five classes there is no top-5 accuracy, which is then NaN.
    shares = {key: float(value) for key, value in metrics.items() if not math.isnan(value)}
    datacomp = DATACOMP.get(name)
    return SuiteRow(
        data_set=name,
        title=datacomp.name if datacomp else name,
        metrics=shares,
        intervals=share_intervals(shares, loader.n_images),
        n_images=loader.n_images,
        main_metric=datacomp.main_metric if datacomp else None,
        source=data_source(folder),
        stamp=folder_stamp(folder),
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

    def __len__(self) -> int:
        return len(self.loader)


@contextmanager
def _no_downloads(name: str, folder: Path) -> Iterator[None]:
    """Refuse what clip_benchmark starts to download a file that is missing."""
    from importlib import import_module

    def refuse(command: str | Sequence[str], **_: Any) -> int:
        program = command.split()[0] if isinstance(command, str) else command[0]
        raise DataError(
            f"{name}: a file is missing in {folder}, and clip_benchmark would start {program} to "
            "download it; download the data set there yourself"
        )

    with ExitStack() as stack:
        for module_name in DOWNLOADERS:
            module = import_module(f"clip_benchmark.datasets.{module_name}")
            if hasattr(module, "call"):
                stack.enter_context(_replaced(module, "call", refuse))
        yield


@contextmanager
def _any_numpy(module: Any) -> Iterator[None]:
    """Replace clip_benchmark's accuracy, which numpy 2.4 refuses.

    Version 1.6.2 converts an array of one element by `float`, which numpy allows for arrays without
    axes only. The figures are the same.
    """

    def accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[float]:
        best = output.topk(max(topk), dim=1).indices
        hits = best == target.view(-1, 1)
        return [float(hits[:, :k].any(dim=1).double().mean()) for k in topk]

    with _replaced(module, "accuracy", accuracy):
        yield


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
