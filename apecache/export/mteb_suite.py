"""Measure a run on tasks of mteb; extra `mteb`. The figures are its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apecache.errors import DataError, OptionError, nearest, one_line
from apecache.export.mteb_model import MtebModel, require_mteb
from apecache.export.suite_report import SuiteRow, data_source, folder_stamp, share_intervals


def find_tasks(names: Sequence[str]) -> dict[str, Any]:
    """Return tasks of mteb by their names.

    Raises:
        OptionError: mteb has no task of that name.
        MissingExtraError: mteb is not installed.
    """
    require_mteb()
    import mteb

    tasks = {}
    for name in names:
        try:
            tasks[name] = mteb.get_task(name)
        except KeyError:
            known = [task.metadata.name for task in mteb.get_tasks(modalities=["image"])]
            raise OptionError(
                f"--suite mteb:{name}: mteb has no task {name}{nearest(name, known)}; list them "
                "with: mteb available-tasks"
            ) from None
    return tasks


def local_folder(task: Any, data_root: Path | None) -> Path | None:
    """Return the folder of a task's data below a folder, or None if they are not there.

    The data of `mteb/cifar10` are expected in `DATA_ROOT/mteb/cifar10` or `DATA_ROOT/cifar10`, as
    `hf download --repo-type dataset --local-dir` writes them.
    """
    repository = str(task.metadata.dataset["path"])
    if data_root is None:
        return None
    candidates = (data_root / repository, data_root / repository.rpartition("/")[2])
    return next((folder for folder in candidates if folder.is_dir()), None)


def measure_task(
    name: str,
    task: Any,
    model: MtebModel,
    folder: Path | None,
) -> SuiteRow:
    """Measure one task.

    Args:
        name: of the task.
        task: the task.
        model: the run.
        folder: of the data; None: mteb takes them from the Hugging Face hub or its cache.

    Raises:
        DataError: the data cannot be read.
    """
    import mteb

    published = task.metadata
    if folder is not None:
        local = {**published.dataset, "path": str(folder)}
        task.metadata = published.model_copy(update={"dataset": local})
    try:
        task.load_data()
    except Exception as error:  # of datasets, the hub's client and mteb
        place = folder or f"{task.metadata.dataset['path']} on the Hugging Face hub"
        raise DataError(
            f"mteb:{name}: {place} cannot be read ({one_line(error)}); download the data set to a "
            "folder of that name below --data-root"
        ) from error
    finally:
        task.metadata = published
    # Before the evaluation, which may change or free the data.
    n_images = sum(_n_items(task.dataset, split) for split in task.eval_splits)
    result = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    (measured,) = result.task_results
    shares = _figures(measured.scores, task.metadata.main_score)
    # The mean over splits and languages, as mteb itself reports it.
    shares = {task.metadata.main_score: float(measured.get_score()), **shares}
    return SuiteRow(
        data_set=name,
        title=name,
        metrics=shares,
        intervals=share_intervals(shares, n_images),
        n_images=n_images,
        main_metric=task.metadata.main_score,
        source="" if folder is None else data_source(folder),
        stamp="" if folder is None else folder_stamp(folder),
    )


def _figures(scores: Mapping[str, Sequence[Mapping[str, Any]]], main: str) -> dict[str, float]:
    """Return all figures of a task with one split in one language, else the main ones."""
    found = [(split, entry) for split, entries in scores.items() for entry in entries]
    if len(found) == 1:
        entry = found[0][1]
        numbers = {name: value for name, value in entry.items() if isinstance(value, int | float)}
        return {name: float(value) for name, value in numbers.items() if name != "main_score"}
    return {
        f"{main} {split} {entry['hf_subset']}": float(entry["main_score"]) for split, entry in found
    }


def _n_items(data: Any, split: str) -> int:
    """Return the number of items that are classified or searched for; 0 where it is unknown."""
    if split in data:
        part = data[split]
        queries = part["queries"] if isinstance(part, dict) and "queries" in part else part
        return len(queries) if hasattr(queries, "__len__") else 0
    return sum(_n_items(subset, split) for subset in data.values() if split in subset)
