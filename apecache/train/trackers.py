"""Log a fit or a sweep to an experiment tracker: TensorBoard, Weights & Biases, Trackio, MLflow.

Each library is an extra. Where it sends the figures is set by its own environment variables:
WANDB_MODE=offline, TRACKIO_DIR, MLFLOW_TRACKING_URI, ….
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import Any, Literal, get_args

from apecache.errors import MissingExtraError, OptionError, nearest
from apecache.fingerprint import Json
from apecache.train.tracking import log_scalars, log_to_tensorboard, scalars_of

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
TRACKERS: tuple[TrackerName, ...] = get_args(TrackerName)
EXTRAS = {"tensorboard": "track", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
PROJECT = "apecache"
Log = Callable[[int, Mapping[str, float]], None]
"""Write the figures of a step."""


def parse_tracker(text: str) -> tuple[TrackerName, str]:
    """Parse `NAME` or `NAME=PROJECT`; of TensorBoard the project is a folder.

    Raises:
        OptionError: an unknown tracker, or TensorBoard without a folder.
    """
    name, _, project = text.partition("=")
    if name not in TRACKERS:
        raise OptionError(
            f"--track {text}: expected one of {', '.join(TRACKERS)}{nearest(name, TRACKERS)}"
        )
    tracker: TrackerName = name
    if tracker == "tensorboard" and not project:
        raise OptionError("--track tensorboard: give its folder, as tensorboard=FOLDER")
    return tracker, project or PROJECT


@contextmanager
def track_fit(
    text: str,
    name: str,
    settings: Mapping[str, Json],
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give a function that logs each line of a fit's history.

    The figures are those of `apecache.train.tracking`.

    Args:
        text: as `parse_tracker` takes it.
        name: of the run.
        settings: of the recipe, logged once.

    Raises:
        OptionError: as `parse_tracker`.
        MissingExtraError: the library is not installed.
    """
    tracker, project = parse_tracker(text)
    if tracker == "tensorboard":
        with log_to_tensorboard(project) as log_line:
            yield log_line
        return
    with _opened(tracker, project, name, settings) as log:

        def log_history(line: dict[str, Any]) -> None:
            log(line["step"], scalars_of(line))

        yield log_history


@contextmanager
def track_sweep(text: str, name: str) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Give a function that logs each trial of a sweep: its number and its figures.

    Raises:
        OptionError: as `parse_tracker`.
        MissingExtraError: the library is not installed.
    """
    tracker, project = parse_tracker(text)
    if tracker == "tensorboard":
        with log_scalars(project) as log_trial:
            yield log_trial
        return
    with _opened(tracker, project, name, {}) as log:
        yield log


def flat_settings(settings: Mapping[str, Json], prefix: str = "") -> dict[str, str]:
    """Return nested settings by dotted names, as texts."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flat_settings(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def _opened(
    tracker: TrackerName,
    project: str,
    name: str,
    settings: Mapping[str, Json],
) -> AbstractContextManager[Log]:
    if find_spec(tracker) is None:
        raise MissingExtraError(tracker, EXTRAS[tracker])
    # Trackers show flat tables, and MLflow takes texts alone.
    flat = flat_settings(settings)
    match tracker:
        case "wandb":
            return _wandb(project, name, flat)
        case "trackio":
            return _trackio(project, name, flat)
        case _:
            return _mlflow(project, name, flat)


@contextmanager
def _wandb(project: str, name: str, settings: Mapping[str, str]) -> Iterator[Log]:
    import wandb

    run: Any = wandb.init(project=project, name=name, config=dict(settings))
    exit_code = 1
    try:
        yield lambda step, figures: run.log(dict(figures), step=step)
        exit_code = 0
    finally:
        # A fit that ended with an error is shown as a failed one.
        run.finish(exit_code=exit_code)


@contextmanager
def _trackio(project: str, name: str, settings: Mapping[str, str]) -> Iterator[Log]:
    import trackio

    # Trackio prints what it does, and standard output is for results.
    with redirect_stdout(sys.stderr):
        run: Any = trackio.init(project=project, name=name, config=dict(settings))
    try:
        yield lambda step, figures: run.log(dict(figures), step=step)
    finally:
        with redirect_stdout(sys.stderr):
            # Not the run's own: Trackio would finish it once more when the process ends.
            trackio.finish()


@contextmanager
def _mlflow(project: str, name: str, settings: Mapping[str, str]) -> Iterator[Log]:
    import mlflow

    mlflow.set_experiment(project)
    # The context manager marks the run as failed after an error.
    with mlflow.start_run(run_name=name):
        mlflow.log_params(dict(settings))

        def log(step: int, figures: Mapping[str, float]) -> None:
            # MLflow allows no @ in a name.
            named = {key.replace("@", "-at-"): value for key, value in figures.items()}
            mlflow.log_metrics(named, step=step)

        yield log
