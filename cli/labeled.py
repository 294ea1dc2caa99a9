"""`apecache evaluate` on labeled images and texts."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from apecache.errors import counted

from .source_options import SourceOptions
from .terminal import progress, show_table, warn

if TYPE_CHECKING:
    from apecache.encoders.spec import EncoderSpec
    from apecache.evaluate.baseline import Baseline
    from apecache.evaluate.labeled import LabeledSpec
    from apecache.evaluate.zeroshot import ZeroShotReport, ZeroShotSpec
    from apecache.fingerprint import Modality
    from apecache.runs.load import Run

SHOWN = 5
"""Confusions, and classes without images, that are named on the terminal."""


@dataclass(frozen=True, kw_only=True)
class LabeledOptions:
    """Hold the options that zero-shot classification and probes share."""

    run: Path
    labels: str | None
    """The source with labels."""
    source_options: SourceOptions
    split: str | None
    device: str
    max_bad: float
    """Share of unreadable images that is still a success."""
    moved: "tuple[EncoderSpec | None, EncoderSpec | None]"
    """The image and the text encoder under new names; None for one that has not moved."""

    def spec(self, modality: "Modality", splits: tuple[str, ...]) -> "LabeledSpec":
        """Open the source.

        Raises:
            OptionError: Without --labels.
        """
        from apecache.errors import OptionError

        if self.labels is None:
            raise OptionError(
                "--labels is missing: give labeled data, e.g. a table or a folder per class"
            )
        from apecache.data.sources import open_pairs

        source = open_pairs(
            self.labels,
            self.source_options.spec("image" if modality == "image" else "caption", "label"),
        )
        from apecache.evaluate.labeled import LabeledSpec, is_writable

        caches = self.run / "caches"
        # Better said before hours of encoding than after them.
        if not caches.exists() and not is_writable(caches):
            warn(
                f"{self.run} is read-only: the features of {self.labels} are not saved and will be "
                "computed again"
            )
        moved = self.moved[0 if modality == "image" else 1]
        return LabeledSpec(
            source,
            caches=caches,
            splits=splits,
            encoder=moved,
            device=self.device,
            max_bad=self.max_bad,
            modality=modality,
        )

    def load(self) -> "Run":
        """Load the run."""
        from apecache.runs.load import load_run

        return load_run(self.run, self.device, *self.moved)


def zeroshot(
    request: LabeledOptions,
    dataset: str | None,
    class_names: Path | None,
    templates: str | None,
    template: list[str] | None,
    baseline: str | None = None,
) -> dict[str, Any]:
    """Classify images by the names of classes.

    Args:
        request: The options shared with probes.
        dataset: A published benchmark, for its class names and prompts.
        class_names: A file of class names, before those of the benchmark.
        templates: A file of prompts, or the name of a set.
        template: Prompts, in place of `templates`.
        baseline: A ready-made model to measure beside the run.

    Returns:
        The JSON form of the report: accuracies in per cent.

    Raises:
        OptionError: Both `template` and `templates` are given, or --labels is missing.
    """
    from apecache.errors import OptionError

    if template and templates:
        raise OptionError(
            "--template and --templates exclude each other: both give the prompts; leave one out"
        )
    images = request.spec("image", (request.split,) if request.split else ())
    from apecache.evaluate.baseline import load_baseline
    from apecache.evaluate.benchmark_names import load_benchmark
    from apecache.evaluate.class_names import read_class_names
    from apecache.evaluate.prompts import find_templates
    from apecache.evaluate.zeroshot import ZeroShotSpec, zero_shot

    benchmark = load_benchmark(dataset) if dataset else None
    names = benchmark.classes if benchmark else None
    if class_names:
        names = read_class_names(class_names)
    prompts = tuple(template) if template else find_templates(templates, benchmark)
    spec = ZeroShotSpec(images, templates=prompts, text=request.moved[1], names=names)
    # Before the images are encoded: a wrong name must fail early.
    ready_made = None if baseline is None else load_baseline(baseline, request.device)
    with progress() as update:
        report = zero_shot(request.load(), spec, update)
    warn_of_labels(report)
    result = {"task": "zeroshot", "split": request.split, **zeroshot_json(report)}
    if ready_made is not None:
        result["baseline"] = {"name": baseline, **baseline_zeroshot(ready_made, spec)}
    return result


def baseline_zeroshot(baseline: "Baseline", spec: "ZeroShotSpec") -> dict[str, Any]:
    """Classify the same images by the same names and prompts with a ready-made model."""
    from dataclasses import replace

    from apecache.arguments import as_path
    from apecache.evaluate.zeroshot import zero_shot

    heads = baseline.heads()
    # The encoders are its own, whatever has moved of the run's. So are the features: a cache holds
    # those of one encoder.
    images = replace(
        spec.images,
        encoder=None,
        caches=as_path(spec.images.caches, "caches") / heads.image.fingerprint.digest[:16],
    )
    with progress() as update:
        return zeroshot_json(zero_shot(heads, replace(spec, images=images, text=None), update))


def zeroshot_json(report: "ZeroShotReport") -> dict[str, Any]:
    """Return a report as JSON, with intervals of the accuracies."""
    from apecache.metrics.statistics import accuracy_interval

    intervals = {
        name: accuracy_interval(getattr(report, name), report.n_images) for name in ("top1", "top5")
    }
    return {**vars(report), "left_out": asdict(report.left_out), "intervals": intervals}


def warn_of_labels(report: "ZeroShotReport") -> None:
    """Warn of classes without images, and of labels that were matched by their order."""
    if report.empty:
        shown = ", ".join(report.empty[:SHOWN])
        if len(report.empty) > SHOWN:
            shown += ", …"
        warn(
            f"{len(report.empty)} of {report.n_classes} classes have no image; they can still be "
            f"predicted: {shown}"
        )
    if report.matched == "by sorted order":
        warn(
            "no label is the name or the number of a class: sorted labels were matched to the "
            "classes in their order; give a --class-names file with a label, a tab and a name per "
            "line to match them by label"
        )


def probes(request: LabeledOptions, modality: "Modality", train_split: str) -> dict[str, Any]:
    """Probe the encoder's features, and the embeddings by the run.

    Returns:
        The JSON form of both reports, `before` and `after`: accuracies in per cent.
    """
    split = request.split or "test"
    spec = request.spec(modality, (train_split, split))
    from apecache.evaluate.labeled import labeled_features
    from apecache.evaluate.probe import probe_features

    with progress() as update:
        features = labeled_features(request.load(), spec, update)
    before, after = probe_features(features, train_split, split)
    header = {
        "task": "probe" if modality == "image" else "text-probe",
        "train_split": train_split,
        "split": split,
    }
    from apecache.metrics.statistics import accuracy_interval

    intervals = {}
    for stage, report in (("before", before), ("after", after)):
        intervals[stage] = {
            "linear": accuracy_interval(report.linear, report.n_test),
            "knn": accuracy_interval(report.knn, report.n_test),
        }
    return {
        **header,
        "before": vars(before),
        "after": vars(after),
        "left_out": asdict(features.left_out),
        "intervals": intervals,
    }


def show_zeroshot(run: str, result: dict[str, Any]) -> None:
    """Show what `zeroshot` returns."""
    title = (
        f"zero-shot: {counted(result['n_images'], 'image')}, "
        f"{counted(result['n_classes'], 'class')}, "
        f"{len(result['templates'])} prompts"
    )
    intervals = result["intervals"]
    rows: list[tuple[object, ...]] = [
        (str(run), result["top1"], result["top5"], result["mean_per_class"]),
        ("95 % interval", span(intervals["top1"]), span(intervals["top5"]), ""),
    ]
    if result.get("baseline"):
        baseline = result["baseline"]
        rows.append(
            (baseline["name"], baseline["top1"], baseline["top5"], baseline["mean_per_class"])
        )
        ends = baseline["intervals"]
        rows.append(("95 % interval", span(ends["top1"]), span(ends["top5"]), ""))
    chance = (result["chance_top1"], result["chance_top5"], result["chance_top1"])
    rows.append(("chance", *chance))
    show_table(title, ("", "top-1", "top-5", "mean per class"), rows)
    if result["confusions"]:
        show_table(
            "most frequent confusions",
            ("class", "predicted as", "images"),
            result["confusions"][:SHOWN],
        )
    show_left_out(result["left_out"])


def show_left_out(counts: dict[str, int]) -> None:
    """Show in one line what was left out, if anything was."""
    from apecache.evaluate.left_out import LeftOut

    left_out = str(LeftOut(**counts))
    if left_out:
        typer.echo(left_out)


def show_probes(run: str, result: dict[str, Any]) -> None:
    """Show what `probes` returns."""
    before = result["before"]
    noun = "images" if result["task"] == "probe" else "texts"
    title = (
        f"probes of {run}: {before['n_train']:,} {noun} of {result['train_split']}, "
        f"{before['n_test']:,} of "
    )
    rows: list[tuple[object, ...]] = []
    for stage, name in (("before", "encoder's features"), ("after", "after the head")):
        report = result[stage]
        ends = result["intervals"][stage]
        linear = (report["linear"], report["linear_per_class"], f"C {report['regularization']:g}")
        rows.append((name, *linear, report["knn"], f"k {report['neighbors']}"))
        rows.append(("95 % interval", span(ends["linear"]), "", "", span(ends["knn"]), ""))
    rows.append(
        (
            "most frequent class",
            before["chance"],
            100 / before["n_classes"],
            "",
            before["chance"],
            "",
        )
    )
    columns = ("", "linear", "linear per class", "chosen", "nearest neighbors", "chosen ")
    show_table(title + str(result["split"]), columns, rows)
    show_left_out(result["left_out"])


def span(ends: tuple[float, float]) -> str:
    """Format the ends of an interval."""
    return f"{ends[0]:.1f} to {ends[1]:.1f}"
