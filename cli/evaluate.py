"""`apecache evaluate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .extract import choice
from .inputs import (
    CaptionColumn,
    ImageColumn,
    Root,
    SplitColumn,
    SplitFile,
    SplitFraction,
    SplitSeed,
    open_spec,
)
from .terminal import Device, Json, ending, progress, show_json, show_table, warn


def evaluate(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    store: Annotated[Path | None, typer.Option(help="The feature store with the split (retrieval).")] = None,
    split: Annotated[
        str | None, typer.Option(help="The split to report. Default: retrieval val, zero-shot all, probe test.")
    ] = None,
    task: Annotated[str, typer.Option(help="retrieval, zeroshot or probe.")] = "retrieval",
    labels: Annotated[
        str | None, typer.Option(help="Zero-shot, probe: images with labels: a table, a folder per class, tars, ….")
    ] = None,
    root: Root = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    split_column: SplitColumn = None,
    split_file: SplitFile = None,
    split_fraction: SplitFraction = None,
    split_seed: SplitSeed = 0,
    template: Annotated[
        list[str] | None, typer.Option(help="Zero-shot prompt with {}; repeat it for an ensemble.")
    ] = None,
    probe_train_split: Annotated[str, typer.Option(help="Probe: the split that the classifiers learn.")] = "train",
    image: Annotated[str | None, typer.Option(help="The image encoder's new place, if its folder has moved.")] = None,
    text: Annotated[str | None, typer.Option(help="The text encoder's new place, if its folder has moved.")] = None,
    folds: Annotated[
        int | None, typer.Option(min=2, help="Retrieval: mean over folds of so many images (COCO's 1k: 1000).")
    ] = None,
    by_language: Annotated[bool, typer.Option("--by-language", help="Retrieval: each language by itself too.")] = False,
    csls: Annotated[
        bool, typer.Option("--csls", help="Retrieval: one more row, corrected for hubs; the plain figures stay.")
    ] = False,
    max_bad: Annotated[
        float, typer.Option(min=0, max=1, help="Share of unreadable images that is still a success.")
    ] = 0.01,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure a run: retrieval on a split of a store; on labelled images zero-shot classification, or probes of their
    features before and after the head.

    Example: apecache evaluate run --store store --split val

    Example: apecache evaluate run --task zeroshot --labels labels.tsv --template "a photo of {}"
    """
    with ending():
        choice("--task", task, ("retrieval", "zeroshot", "probe"))
        if task == "retrieval":
            moved = moved_encoders(run, image, text)
            result = retrieval(run, store, split or "val", device, folds, by_language, csls, root, moved)
        else:
            splits = (split_column, split_file, split_fraction, split_seed)
            opening = open_spec(("image", "label"), image_column, caption_column, *splits, root)
            if task == "probe":
                wanted: tuple[str, ...] = (probe_train_split, split or "test")
            else:
                wanted = (split,) if split else ()
            moved = moved_encoders(run, image, text)
            loaded, images = labelled(run, labels, opening, wanted, moved, device, max_bad)
            if task == "probe":
                result = probes(loaded, images, *wanted)
            else:
                result = zeroshot(loaded, images, split, template, moved[1])
        if json:
            show_json(result)
        elif task == "retrieval":
            show_retrieval(run, result)
        elif task == "probe":
            show_probes(run, result)
        else:
            show_zeroshot(run, result)


def retrieval(
    run: Path,
    store: Path | None,
    split: str,
    device: str,
    folds: int | None = None,
    by_language: bool = False,
    csls: bool = False,
    root: Path | None = None,
    moved: tuple[Any, Any] = (None, None),
) -> dict[str, Any]:
    """The JSON form of a retrieval report: recalls in per cent."""
    from apecache.errors import OptionError

    if store is None:
        raise OptionError("--store is missing: give the feature store whose split is to be measured")
    from apecache.evaluate.csls import csls_report
    from apecache.evaluate.embeddings import embed_store
    from apecache.evaluate.protocols import bootstrap_intervals, folded_report, language_reports
    from apecache.evaluate.retrieval import retrieval_report
    from apecache.recipes.runs import load_run
    from apecache.store.reader import FeatureStore

    loaded = load_run(run, device, *moved)
    opened = FeatureStore.open(store)
    embedded = embed_store(loaded, opened, split, opener(root))
    about = (embedded.image, embedded.text, embedded.image_of_text)
    report = folded_report(*about, folds) if folds else retrieval_report(*about)
    measure = csls_report
    corrected = (folded_report(*about, folds, measure=measure) if folds else measure(*about)) if csls else None
    intervals = None if folds else bootstrap_intervals(*about)
    tongues = [str(opened.pairs.languages[row]) for row in embedded.text_rows]
    languages = language_reports(*about, tongues) if by_language else {}
    seen = _seen(loaded.training, opened.digest, split)
    if seen:
        warn(f"split {split!r} was used in training or to choose the epoch: this is no measure of generalisation")
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
        "seen_in_training": seen,
        "mean_recall_at_1": round(report.mean_recall_at_1, 4),
        "folds_of": folds,
        "csls": None if corrected is None else told(corrected),
        "intervals": None if intervals is None else vars(intervals),
        "languages": {language: told(found) for language, found in languages.items()},
    }


def told(report: Any) -> dict[str, Any]:
    """A report in short."""
    return {
        "image_to_text": keyed(report.image_to_text),
        "text_to_image": keyed(report.text_to_image),
        "n_images": report.n_images,
        "n_texts": report.n_texts,
    }


def keyed(recalls: dict[int, float]) -> dict[str, float]:
    return {str(k): round(value, 4) for k, value in recalls.items()}


def _seen(training: Any, data: str, split: str) -> bool:
    splits = training.get("splits") or {}
    return training.get("data") == data and split in ((splits.get("train") or "train"), splits.get("dev"))


def labelled(
    run: Path,
    labels: str | None,
    opening: Any,
    splits: tuple[str, ...],
    moved: tuple[Any, Any],
    device: str,
    max_bad: float,
) -> tuple[Any, Any]:
    """The run, and what to open of the images with labels."""
    from apecache.errors import OptionError

    if labels is None:
        raise OptionError("--labels is missing: give images with labels, as a table or a folder per class")
    from apecache.data.sources import open_pairs

    source = open_pairs(labels, opening)
    from apecache.evaluate.labelled import LabelledSpec
    from apecache.recipes.runs import load_run

    loaded = load_run(run, device, *moved)
    return loaded, LabelledSpec(source, run / "caches", splits, moved[0], device, max_bad)


def zeroshot(run: Any, images: Any, split: str | None, templates: list[str] | None, moved: Any) -> dict[str, Any]:
    """The JSON form of a zero-shot report: accuracies in per cent."""
    from apecache.evaluate.zeroshot import TEMPLATES, ZeroShotSpec, zero_shot

    spec = ZeroShotSpec(images, tuple(templates or TEMPLATES), moved)
    with progress() as update:
        report = zero_shot(run, spec, update)
    return {"task": "zeroshot", "split": split, **vars(report)}


def probes(run: Any, images: Any, train_split: str, split: str) -> dict[str, Any]:
    """The JSON form of two probe reports: of the encoder's features, and of the embeddings by the run."""
    from apecache.evaluate.labelled import labelled_features
    from apecache.evaluate.probe import probe

    with progress() as update:
        found = labelled_features(run, images, update)
    rows = {name: [i for i, other in enumerate(found.splits) if other == name] for name in (train_split, split)}
    labels = {name: [found.labels[i] for i in chosen] for name, chosen in rows.items()}
    told: dict[str, Any] = {"task": "probe", "train_split": train_split, "split": split}
    for what, features in (("before", found.features.float()), ("after", found.embedded.cpu())):
        train, test = (features[rows[name]].numpy() for name in (train_split, split))
        told[what] = vars(probe(train, labels[train_split], test, labels[split]))
    return told


def moved_encoders(run: Path, image: str | None, text: str | None) -> tuple[Any, Any]:
    """The recorded encoders' settings under new names; None where no name was given."""
    if image is None and text is None:
        return None, None
    from apecache.recipes.runs import recorded_encoder

    names: tuple[tuple[Any, str | None], ...] = (("image", image), ("text", text))
    found = [recorded_encoder(run, side).with_name(name) if name else None for side, name in names]
    return found[0], found[1]


def opener(root: Path | None) -> Any:
    """Reads the image of a key below `root`; None without one."""
    if root is None:
        return None
    from apecache.data.images import load_image
    from apecache.data.media import FolderMedia

    media = FolderMedia(root)
    return lambda key: load_image(key, media).image


def show_retrieval(run: Path, result: dict[str, Any]) -> None:
    ks = list(result["image_to_text"])
    tables = [(str(run), result), ("chance", result["chance"])]
    tables += [("with CSLS", result["csls"])] if result["csls"] else []
    tables += [
        (f"{language or '(no language)'}: {r['n_texts']:,} texts", r) for language, r in result["languages"].items()
    ]
    rows: list[tuple[object, ...]] = [
        (what, *values["image_to_text"].values(), *values["text_to_image"].values()) for what, values in tables
    ]
    if result["intervals"]:
        ends = [e for side in ("image_to_text", "text_to_image") for e in result["intervals"][side].values()]
        rows.insert(1, ("95 % interval", *(f"{low:.1f} to {high:.1f}" for low, high in ends)))
    columns = ("", *(f"image to text R@{k}" for k in ks), *(f"text to image R@{k}" for k in ks))
    fold = f", folds of {result['folds_of']:,}" if result["folds_of"] else ""
    show_table(f"{result['split']}: {result['n_images']:,} images, {result['n_texts']:,} texts{fold}", columns, rows)


def show_zeroshot(run: Path, result: dict[str, Any]) -> None:
    title = (
        f"zero-shot: {result['n_images']:,} images, {result['n_classes']} classes, {len(result['templates'])} prompts"
    )
    rows = [
        (str(run), result["top1"], result["top5"], result["mean_per_class"]),
        ("chance", result["chance_top1"], result["chance_top5"], result["chance_top1"]),
    ]
    show_table(title, ("", "top-1", "top-5", "mean per class"), rows)


def show_probes(run: Path, result: dict[str, Any]) -> None:
    before = result["before"]
    title = f"probes of {run}: {before['n_train']:,} images of {result['train_split']}, {before['n_test']:,} of "
    rows: list[tuple[object, ...]] = [
        (what, r["linear"], r["linear_per_class"], f"C {r['regularisation']:g}", r["knn"], f"k {r['neighbours']}")
        for what, r in (("encoder's features", before), ("after the head", result["after"]))
    ]
    rows.append(("most frequent class", before["chance"], 100 / before["n_classes"], "", before["chance"], ""))
    columns = ("", "linear", "linear per class", "chosen", "nearest neighbours", "chosen ")
    show_table(title + str(result["split"]), columns, rows)
