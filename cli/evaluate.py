"""`apecache evaluate`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apecache.errors import counted

from .inputs import SourceOptions, takes_source
from .labeled import LabeledOptions, probes, show_left_out, show_probes, show_zeroshot, zeroshot
from .runs import MovedImage, MovedText, moved_encoders, opener
from .terminal import Device, Json, choice, ending, show_json, show_table, warn

if TYPE_CHECKING:
    from apecache.metrics.protocols import RecallIntervals
    from apecache.metrics.retrieval import RetrievalReport

TASKS = ("retrieval", "zeroshot", "probe", "text-probe")


TASKS_OF_OPTIONS = {
    "--store": ("retrieval",),
    "--folds": ("retrieval",),
    "--by-language": ("retrieval",),
    "--csls": ("retrieval",),
    "--labels": ("zeroshot", "probe", "text-probe"),
    "--dataset": ("zeroshot",),
    "--class-names": ("zeroshot",),
    "--templates": ("zeroshot",),
    "--template": ("zeroshot",),
}
"""The tasks that an option has an effect on; options that are not here have one on all."""


@takes_source
def evaluate(
    opening: SourceOptions,
    run: Annotated[str, typer.Argument(help="A finished run folder; s3://… and the like too.")],
    store: Annotated[
        str | None, typer.Option(help="The feature store with the split (retrieval).")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="The split to report. Default: retrieval val, zero-shot all, probes test."
        ),
    ] = None,
    task: Annotated[
        str, typer.Option(help="retrieval, zeroshot, probe or text-probe.")
    ] = "retrieval",
    labels: Annotated[
        str | None,
        typer.Option(
            help=(
                "Images with labels: a table, a folder per class, tars, …. Text-probe: texts with "
                "labels."
            )
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help=(
                "Zero-shot: class names and prompts of a published benchmark: imagenet, cifar10, "
                "svhn, …."
            )
        ),
    ] = None,
    class_names: Annotated[
        Path | None, typer.Option(help="Zero-shot: a class name on each line, or label, tab, name.")
    ] = None,
    templates: Annotated[
        str | None,
        typer.Option(
            help="Zero-shot: a file of prompts with {} or {c}, or single, clip-7, clip-80."
        ),
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="Zero-shot prompt with {}; repeat it for an ensemble.")
    ] = None,
    probe_train_split: Annotated[
        str, typer.Option(help="Probes: the split that the classifiers learn.")
    ] = "train",
    image: MovedImage = None,
    text: MovedText = None,
    folds: Annotated[
        int | None,
        typer.Option(min=2, help="Retrieval: mean over folds of so many images (COCO's 1k: 1000)."),
    ] = None,
    by_language: Annotated[
        bool, typer.Option("--by-language", help="Retrieval: each language by itself too.")
    ] = False,
    csls: Annotated[
        bool,
        typer.Option(
            "--csls",
            help="Retrieval: one more row, corrected for hubs; the plain figures stay.",
        ),
    ] = False,
    max_bad: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of unreadable images that is still a success."),
    ] = 0.01,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure a run: retrieval on a split of a store; on labeled images zero-shot classification,
    or probes of their features before and after the head; on labeled texts such probes too.

    Example: apecache evaluate run --store store --split val

    Example: apecache evaluate run --task zeroshot --labels labels.tsv --template "a photo of {}"

    Example: apecache evaluate run --task zeroshot --labels food-101/images --dataset food101
    """
    with ending():
        choice("--task", task, TASKS)
        given: dict[str, object] = {
            "--store": store,
            "--folds": folds,
            "--by-language": by_language,
            "--csls": csls,
            "--labels": labels,
            "--dataset": dataset,
            "--class-names": class_names,
            "--templates": templates,
            "--template": template,
        }
        _require_effect(task, [option for option, value in given.items() if value])
        from apecache.runs.remote import fetched_run

        # A run on object storage is a local copy until the end of the block.
        with fetched_run(run) as run_folder:
            moved = moved_encoders(run_folder, image, text)
            request = LabeledOptions(
                run=run_folder,
                labels=labels,
                opening=opening,
                split=split,
                device=device,
                max_bad=max_bad,
                moved=moved,
            )
            match task:
                case "retrieval":
                    result = retrieval(
                        run_folder,
                        store=store,
                        split=split or "val",
                        device=device,
                        folds=folds,
                        by_language=by_language,
                        csls=csls,
                        root=opening.root,
                        moved=moved,
                    )
                case "zeroshot":
                    result = zeroshot(
                        request,
                        dataset=dataset,
                        class_names=class_names,
                        templates=templates,
                        template=template,
                    )
                case _:
                    result = probes(
                        request,
                        "image" if task == "probe" else "text",
                        probe_train_split,
                    )
        if json:
            show_json(result)
            return
        shows: dict[str, Any] = {"retrieval": show_retrieval, "zeroshot": show_zeroshot}
        shows.get(task, show_probes)(run, result)


def _require_effect(task: str, options: list[str]) -> None:
    """Refuse options that the task would ignore.

    Raises:
        OptionError: Such an option was given.
    """
    from apecache.errors import OptionError

    for option in options:
        tasks = TASKS_OF_OPTIONS[option]
        if task not in tasks:
            raise OptionError(
                f"{option} has no effect on --task {task}; it is for {' and '.join(tasks)}: "
                "leave one of the two out"
            )


def retrieval(
    run: Path,
    store: str | None,
    split: str,
    device: str,
    folds: int | None = None,
    by_language: bool = False,
    csls: bool = False,
    root: str | None = None,
    moved: tuple[Any, Any] = (None, None),
) -> dict[str, Any]:
    """Measure retrieval on a split of a store.

    Args:
        run: A finished run folder.
        store: The feature store with the split; None is an error that names --store.
        folds: Images of each fold, over which recalls are averaged; None: no folds.
        by_language: Whether each language is measured by itself too.
        csls: Whether recalls with CSLS are added.
        root: Where the images are, for a run that trained its image tower.
        moved: The image and the text encoder under new names.

    Returns:
        The JSON form of the report: recalls in per cent.
    """
    from apecache.errors import OptionError

    if store is None:
        raise OptionError(
            "--store is missing: give the feature store whose split is to be measured"
        )
    from apecache.evaluate.comparison import was_split_seen
    from apecache.evaluate.embeddings import embed_store
    from apecache.metrics.csls import csls_intervals, csls_report
    from apecache.metrics.protocols import (
        folded_report,
        language_intervals,
        language_reports,
        retrieval_intervals,
    )
    from apecache.metrics.retrieval import retrieval_report
    from apecache.runs.load import load_run
    from apecache.store.reader import FeatureStore

    loaded = load_run(run, device, *moved)
    opened = FeatureStore.open(store)
    embedded = embed_store(loaded, store=opened, split=split, open_image=opener(root))
    tensors = (embedded.image, embedded.text, embedded.image_of_text)
    equal: Any = {"relevance": embedded.relevance}
    if folds:
        report = folded_report(*tensors, folds, **equal)
    else:
        report = retrieval_report(*tensors, **equal)
    corrected = None
    if csls and folds:
        corrected = folded_report(*tensors, folds, measure=csls_report, **equal)
    elif csls:
        corrected = csls_report(*tensors, **equal)
    # Intervals resample the images of a whole split; a mean over folds has none.
    intervals = None if folds else retrieval_intervals(*tensors, **equal)
    corrected_intervals = csls_intervals(*tensors, **equal) if csls and not folds else None
    text_languages = [str(opened.pairs.languages[row]) for row in embedded.text_rows]
    languages: dict[str, Any] = {}
    if by_language:
        reports = language_reports(*tensors, text_languages, **equal)
        intervals_of = language_intervals(*tensors, text_languages, **equal)
        for language, language_report in reports.items():
            languages[language] = report_json(language_report, intervals_of[language])
    was_seen = was_split_seen(loaded.training, opened.digest, split)
    if was_seen:
        warn(
            f"split {split!r} was used in training or to choose the epoch: this is no measure "
            "of generalization"
        )
    return {
        "task": "retrieval",
        "split": split,
        "image_to_text": keyed(report.image_to_text),
        "text_to_image": keyed(report.text_to_image),
        "n_images": report.n_images,
        "n_texts": report.n_texts,
        "chance": {
            "image_to_text": keyed(report.chance_image_to_text),
            "text_to_image": keyed(report.chance_text_to_image),
        },
        "seen_in_training": was_seen,
        "mean_recall_at_1": round(report.mean_recall_at_1, 4),
        "folds_of": folds,
        "csls": None if corrected is None else report_json(corrected, corrected_intervals),
        "intervals": None if intervals is None else vars(intervals),
        "languages": languages,
        "left_out": asdict(embedded.left_out),
    }


def report_json(report: "RetrievalReport", intervals: "RecallIntervals | None") -> dict[str, Any]:
    """Return the JSON form of a report, with chance and with intervals (None for folds)."""
    return {
        "image_to_text": keyed(report.image_to_text),
        "text_to_image": keyed(report.text_to_image),
        "n_images": report.n_images,
        "n_texts": report.n_texts,
        "chance": {
            "image_to_text": keyed(report.chance_image_to_text),
            "text_to_image": keyed(report.chance_text_to_image),
        },
        "intervals": None if intervals is None else vars(intervals),
    }


def keyed(recalls: dict[int, float]) -> dict[str, float]:
    """Return recalls as JSON has them: by K as a text, rounded."""
    return {str(k): round(value, 4) for k, value in recalls.items()}


def show_retrieval(run: str, result: dict[str, Any]) -> None:
    """Show recalls with their intervals, each followed by its chance."""
    ks = list(result["image_to_text"])
    rows = [recall_row(str(run), result)]
    rows += interval_rows(result["intervals"])
    if result["csls"]:
        rows.append(recall_row("with CSLS", result["csls"]))
        rows += interval_rows(result["csls"]["intervals"])
    rows.append(recall_row("chance", result["chance"]))
    for language, report in result["languages"].items():
        name = language or "(no language)"
        rows.append(recall_row(f"{name}: {counted(report['n_texts'], 'text')}", report))
        rows += interval_rows(report["intervals"])
        rows.append(recall_row(f"chance, {name}", report["chance"]))
    columns = ("", *(f"image to text R@{k}" for k in ks), *(f"text to image R@{k}" for k in ks))
    fold = f", folds of {result['folds_of']:,}" if result["folds_of"] else ""
    show_table(
        f"{result['split']}: {counted(result['n_images'], 'image')}, "
        f"{counted(result['n_texts'], 'text')}{fold}",
        columns,
        rows,
    )
    show_left_out(result["left_out"])


def recall_row(what: str, report: dict[str, Any]) -> tuple[object, ...]:
    """Return a table row of recalls, `what` first."""
    return (what, *report["image_to_text"].values(), *report["text_to_image"].values())


def interval_rows(intervals: dict[str, Any] | None) -> list[tuple[object, ...]]:
    """Return one table row of intervals, or none where there are no intervals (folds)."""
    if intervals is None:
        return []
    ends = [*intervals["image_to_text"].values(), *intervals["text_to_image"].values()]
    return [("95 % interval", *(f"{low:.1f} to {high:.1f}" for low, high in ends))]
