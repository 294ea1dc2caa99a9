"""`apecache evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .labeled import LabeledOptions, probes, show_probes, show_zeroshot, zeroshot
from .option_groups import (
    Device,
    Json,
    MaxBad,
    OptionGroup,
    View,
    takes_groups,
)
from .retrieval import RetrievalOptions, retrieval, show_retrieval
from .runs import MovedEncoders
from .source_options import SourceOptions
from .suites import measure_suites, require_suite_options, show_suites
from .terminal import choice, ending, show_json

TASKS = ("retrieval", "zeroshot", "probe", "text-probe")
CLASSES = "Zero-shot classification"
PROBES = "Probes"
SUITES = "Suites of other programs"


TASKS_OF_OPTIONS = {
    "--store": ("retrieval",),
    "--view": ("retrieval",),
    "--folds": ("retrieval",),
    "--by-language": ("retrieval",),
    "--csls": ("retrieval",),
    "--relevance": ("retrieval",),
    "--baseline": ("retrieval", "zeroshot"),
    "--labels": ("zeroshot", "probe", "text-probe"),
    "--dataset": ("zeroshot",),
    "--class-names": ("zeroshot",),
    "--templates": ("zeroshot",),
    "--template": ("zeroshot",),
}
"""The tasks that an option has an effect on; options that are not here have one on all."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions(OptionGroup):
    """Hold the task, and the data that it is measured on."""

    store: Annotated[
        str | None,
        typer.Option(metavar="STORE", help="Feature store to measure retrieval on."),
    ] = None
    view: View = None
    split: Annotated[
        str | None,
        typer.Option(
            metavar="SPLIT",
            help="Split to measure. Default: val for retrieval, all images for zeroshot, test "
            "for probes.",
        ),
    ] = None
    task: Annotated[
        str, typer.Option(metavar="TASK", help="retrieval, zeroshot, probe or text-probe.")
    ] = "retrieval"
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Images with labels: a table, a folder per class, tar files, …. For text-probe: "
            "texts with labels.",
        ),
    ] = None
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="ENCODER",
            help="Also measure a ready-made model on the same data: open_clip:NAME/TAG, or hf:ID "
            "of a CLIP or SigLIP.",
        ),
    ] = None
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="SUITE",
            help="In place of a task: clip-benchmark (every data set of --data-root), "
            "clip-benchmark:NAME,… (data sets that it builds), datacomp-38, mteb:TASK,…, or a file "
            "with one of them per line (extras: zero-shot, mteb).",
            rich_help_panel=SUITES,
        ),
    ] = None
    data_root: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of the data sets of --suite. mteb can do without: it downloads.",
            rich_help_panel=SUITES,
        ),
    ] = None
    probe_train_split: Annotated[
        str,
        typer.Option(
            metavar="SPLIT",
            help="Split that the probes are trained on.",
            rich_help_panel=PROBES,
        ),
    ] = "train"


@dataclass(frozen=True, kw_only=True)
class ClassOptions(OptionGroup):
    """Hold the classes and prompts of zero-shot classification."""

    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Take class names and prompts from a published benchmark: imagenet, cifar10, "
            "svhn, ….",
            rich_help_panel=CLASSES,
        ),
    ] = None
    class_names: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with one class per line: a name, or a label, a tab and a name.",
            rich_help_panel=CLASSES,
        ),
    ] = None
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompt with {} for the class name. Repeat it for an ensemble of prompts.",
            rich_help_panel=CLASSES,
        ),
    ] = None
    templates: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="File of prompts with {} or {c}, or one of the sets single, clip-7 and clip-80.",
            rich_help_panel=CLASSES,
        ),
    ] = None


@takes_groups
def evaluate(
    run: Annotated[str, typer.Argument(help="A finished run: a folder, s3://…, gs://… or az://….")],
    task_options: TaskOptions,
    retrieval_options: RetrievalOptions,
    class_options: ClassOptions,
    source_options: SourceOptions,
    encoders: MovedEncoders,
    max_bad: MaxBad = 0.01,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure a run: retrieval, zero-shot classification or probes.

    Retrieval needs --store. The other tasks need --labels. Probes are classifiers on the features
    before and after the head.

    Example: apecache evaluate run --store store --split val

    Example: apecache evaluate run --task zeroshot --labels labels.tsv --template "a photo of {}"

    Example: apecache evaluate run --task zeroshot --labels food-101/images --dataset food101

    Example: apecache evaluate run --suite datacomp-38 --data-root data
    """
    with ending():
        task = task_options.task
        choice("--task", task, TASKS)
        task_values = {
            "store": task_options.store,
            "view": task_options.view,
            "labels": task_options.labels,
            "baseline": task_options.baseline,
            **vars(retrieval_options),
            **vars(class_options),
        }
        _require_effect(task, [name for name, value in task_values.items() if value])
        task_values["split"] = task_options.split
        require_suite_options(
            task_options.suite,
            task_options.data_root,
            task=task,
            given=[name for name, value in task_values.items() if value],
        )
        # Options are refused before anything is downloaded.
        from apecache.runs.remote import fetched_run

        # A run on object storage is a local copy until the end of the block.
        with fetched_run(run) as run_folder:
            if task_options.suite is not None:
                results = measure_suites(
                    run_folder,
                    task_options.suite,
                    data_root=task_options.data_root,
                    moved=encoders.recorded_in(run_folder),
                    device=device,
                )
                if json:
                    show_json(results[0] if len(results) == 1 else {"suites": results})
                else:
                    show_suites(run, results)
                return
            request = LabeledOptions(
                run=run_folder,
                labels=task_options.labels,
                source_options=source_options,
                split=task_options.split,
                device=device,
                max_bad=max_bad,
                moved=encoders.recorded_in(run_folder),
            )
            result = measure(request, task_options, retrieval_options, class_options)
        if json:
            show_json(result)
        else:
            show_result(run, task, result)


def measure(
    request: LabeledOptions,
    task_options: TaskOptions,
    retrieval_options: RetrievalOptions,
    class_options: ClassOptions,
) -> dict[str, Any]:
    """Measure one task; return the JSON form of its report."""
    match task_options.task:
        case "retrieval":
            return retrieval(
                request,
                store=task_options.store,
                view=task_options.view,
                options=retrieval_options,
                baseline=task_options.baseline,
            )
        case "zeroshot":
            return zeroshot(request, **vars(class_options), baseline=task_options.baseline)
        case "probe":
            return probes(request, "image", task_options.probe_train_split)
        case _:
            return probes(request, "text", task_options.probe_train_split)


def show_result(run: str, task: str, result: dict[str, Any]) -> None:
    """Show what `measure` returns."""
    match task:
        case "retrieval":
            show_retrieval(run, result)
        case "zeroshot":
            show_zeroshot(run, result)
        case _:
            show_probes(run, result)


def _require_effect(task: str, parameters: list[str]) -> None:
    """Refuse options that the task would ignore.

    Args:
        task: The task.
        parameters: Names of the options that were given.

    Raises:
        OptionError: Such an option was given.
    """
    from apecache.errors import OptionError

    for parameter in parameters:
        option = f"--{parameter.replace('_', '-')}"
        tasks = TASKS_OF_OPTIONS[option]
        if task not in tasks:
            raise OptionError(
                f"{option} has no effect on --task {task}: leave it out, or choose --task "
                f"{' or '.join(tasks)}"
            )
