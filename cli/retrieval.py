"""`apecache evaluate` on the images and captions of a store."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apecache.errors import OptionError, counted

from .labeled import LabeledOptions, show_left_out
from .option_groups import OptionGroup
from .runs import opener
from .terminal import show_table, warn

if TYPE_CHECKING:
    from apecache.evaluate.baseline import Baseline
    from apecache.evaluate.embeddings import Embeddings, OpenImage
    from apecache.metrics.protocols import RecallIntervals
    from apecache.metrics.retrieval import RetrievalReport
    from apecache.store.reader import FeatureStore

RETRIEVAL = "Retrieval"


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions(OptionGroup):
    """Hold the options of retrieval."""

    folds: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Average over folds of N images. The 1k protocol of COCO: 1000.",
            rich_help_panel=RETRIEVAL,
        ),
    ] = None
    by_language: Annotated[
        bool,
        typer.Option(
            "--by-language",
            help="Also show each language of the captions separately.",
            rich_help_panel=RETRIEVAL,
        ),
    ] = False
    csls: Annotated[
        bool,
        typer.Option(
            "--csls",
            help="Also show recalls with CSLS, which corrects for hubs.",
            rich_help_panel=RETRIEVAL,
        ),
    ] = False
    relevance: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Further right answers: a .tsv, .csv or .jsonl with the columns text (KEY#N or a "
            "caption), image (KEY) and, optionally, grade. Adds mAP@R, R-precision and nDCG.",
            rich_help_panel=RETRIEVAL,
        ),
    ] = None


def retrieval(
    request: LabeledOptions,
    store: str | None,
    view: str | None,
    options: RetrievalOptions,
    baseline: str | None = None,
) -> dict[str, Any]:
    """Measure retrieval on a split of a store.

    Args:
        request: The run and its encoders, the split, and where the images are.
        store: The feature store with the split, which must be given.
        view: Its view; None: the newest.
        options: Folds, languages, CSLS and further right answers.
        baseline: A ready-made model to measure beside the run.

    Returns:
        The JSON form of the report: recalls in per cent.
    """
    if store is None:
        raise OptionError("--store is missing: give the feature store to measure retrieval on")
    from apecache.evaluate.baseline import load_baseline
    from apecache.evaluate.embeddings import embed_store
    from apecache.evaluate.relevance_file import read_relevance
    from apecache.store.reader import FeatureStore

    # Before anything is embedded: a wrong name or file must fail early.
    if options.relevance is not None:
        read_relevance(options.relevance)
    ready_made = None if baseline is None else load_baseline(baseline, request.device)
    split = request.split or "val"
    loaded = request.load()
    opened = FeatureStore.open(store, view)
    embedded = embed_store(
        loaded,
        store=opened,
        split=split,
        open_image=opener(request.source_options.root, opened),
    )
    result = {
        "task": "retrieval",
        "split": split,
        **plain_recalls(embedded, options.folds),
        "csls": csls_recalls(embedded, options.folds) if options.csls else None,
        "folds_of": options.folds,
        "languages": recalls_by_language(embedded, opened) if options.by_language else {},
        "seen_in_training": warn_if_seen(loaded.training, opened, split),
        "left_out": asdict(embedded.left_out),
    }
    if options.relevance is not None:
        result["graded"] = graded(embedded, opened, options.relevance)
    if ready_made is not None:
        result["baseline"] = baseline_recalls(
            ready_made,
            store=opened,
            embedded=embedded,
            open_image=image_opener(opened, request.source_options.root),
            options=options,
        )
    return result


def warn_if_seen(training: Mapping[str, Any], store: "FeatureStore", split: str) -> bool:
    """Tell, and return, whether a run used the images of a split: its recalls are too good then."""
    from apecache.evaluate.comparison import was_split_seen

    was_seen = was_split_seen(training, store.trained_digest(training.get("data")), split)
    if was_seen:
        warn(
            f"split {split!r} was used in training or to choose the epoch: these figures do not "
            "measure generalization"
        )
    return was_seen


def image_opener(store: "FeatureStore", root: str | None) -> "OpenImage":
    """Return a function that reads the images of a store, below `root` or where it was made."""
    from apecache.data.images import load_image
    from apecache.data.media import media_at, media_below

    # A store that was moved does not know where its images are: --root says it.
    media = media_below(root) if root else media_at(str(store.source.get("root", "")))
    return lambda key: load_image(key, media).image


def baseline_recalls(
    baseline: "Baseline",
    store: "FeatureStore",
    embedded: "Embeddings",
    open_image: "OpenImage",
    options: RetrievalOptions,
) -> dict[str, Any]:
    """Return the recalls of a ready-made model on the images and captions of a run, as JSON."""
    from apecache.evaluate.baseline import embed_baseline

    of_baseline = embed_baseline(baseline, store, embedded, open_image)
    result = {"name": baseline.name, **plain_recalls(of_baseline, options.folds)}
    if options.relevance is not None:
        result["graded"] = graded(of_baseline, store, options.relevance)
    return result


def graded(embedded: "Embeddings", store: "FeatureStore", path: Path) -> dict[str, Any]:
    """Return the figures with the right answers of a file, as JSON."""
    from apecache.evaluate.relevance_file import graded_pairs, read_relevance
    from apecache.metrics.graded import graded_report

    pairs, n_unknown = graded_pairs(read_relevance(path), store, embedded)
    if n_unknown:
        warn(f"{path}: {n_unknown:,} lines name an image or a text that is not in the split")
    report = graded_report(
        embedded.image,
        text=embedded.text,
        image_of_text=embedded.image_of_text,
        pairs=pairs,
        relevance=embedded.relevance,
    )
    directions = {}
    for name, direction in asdict(report).items():
        directions[name] = {**direction, "recall": keyed(direction["recall"])}
    return {**directions, "n_pairs": len(pairs.grades), "n_unknown": n_unknown}


def plain_recalls(embedded: "Embeddings", folds: int | None) -> dict[str, Any]:
    """Return recalls as JSON, with intervals unless they are means over folds."""
    from apecache.metrics.protocols import folded_report, measure_retrieval

    tensors = (embedded.image, embedded.text, embedded.image_of_text)
    relevance = embedded.relevance
    if folds:
        report = folded_report(*tensors, folds, relevance=relevance)
        # Intervals resample the images of a whole split; a mean over folds has none.
        intervals = None
    else:
        measured = measure_retrieval(*tensors, relevance=relevance)
        report = measured.report
        intervals = measured.intervals
    mean_recall = round(report.mean_recall_at_1, 4)
    return {**report_json(report, intervals), "mean_recall_at_1": mean_recall}


def csls_recalls(embedded: "Embeddings", folds: int | None) -> dict[str, Any]:
    """Return the same as `plain_recalls`, by CSLS."""
    from apecache.metrics.csls import csls_report, measure_csls
    from apecache.metrics.protocols import folded_report

    tensors = (embedded.image, embedded.text, embedded.image_of_text)
    relevance = embedded.relevance
    if folds:
        report = folded_report(*tensors, folds, measure=csls_report, relevance=relevance)
        return report_json(report, None)
    measured = measure_csls(*tensors, relevance=relevance)
    return report_json(measured.report, measured.intervals)


def recalls_by_language(embedded: "Embeddings", store: "FeatureStore") -> dict[str, Any]:
    """Return recalls of each language of the captions as JSON."""
    from apecache.metrics.protocols import measure_languages

    text_languages = [str(store.pairs.languages[row]) for row in embedded.text_rows]
    tensors = (embedded.image, embedded.text, embedded.image_of_text)
    measured = measure_languages(*tensors, text_languages, relevance=embedded.relevance)
    return {
        language: report_json(measurement.report, measurement.intervals)
        for language, measurement in measured.items()
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
    if result.get("baseline"):
        rows.append(recall_row(result["baseline"]["name"], result["baseline"]))
        rows += interval_rows(result["baseline"]["intervals"])
    rows.append(recall_row("chance", result["chance"]))
    # Chance differs by language, as the numbers of texts do.
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
    show_graded(run, result)
    show_left_out(result["left_out"])


def show_graded(run: str, result: dict[str, Any]) -> None:
    """Show the figures with further right answers, if they were asked for."""
    measured = {run: result.get("graded")}
    if result.get("baseline"):
        measured[result["baseline"]["name"]] = result["baseline"].get("graded")
    rows: list[tuple[object, ...]] = []
    for name, figures in measured.items():
        if figures is None:
            continue
        for direction in ("image_to_text", "text_to_image"):
            values = figures[direction]
            shown = (values["map_at_r"], values["r_precision"], values["ndcg"])
            title = f"{name}, {direction.replace('_', ' ')}"
            rows.append((title, *values["recall"].values(), *shown, values["mean_right"]))
    if rows:
        recalls = [f"R@{k}" for k in result["image_to_text"]]
        columns = ("", *recalls, "mAP@R", "R-precision", "nDCG", "right answers")
        show_table("with the right answers of --relevance", columns, rows)


def recall_row(title: str, report: dict[str, Any]) -> tuple[object, ...]:
    """Return a table row of recalls, `title` first."""
    return (title, *report["image_to_text"].values(), *report["text_to_image"].values())


def interval_rows(intervals: dict[str, Any] | None) -> list[tuple[object, ...]]:
    """Return one table row of intervals, or none where there are no intervals (folds)."""
    if intervals is None:
        return []
    ends = [*intervals["image_to_text"].values(), *intervals["text_to_image"].values()]
    return [("95 % interval", *(f"{low:.1f} to {high:.1f}" for low, high in ends))]
