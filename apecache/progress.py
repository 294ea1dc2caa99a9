"""Show the progress of a long call as a bar, on a terminal and in a notebook."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from apecache.arguments import require_integer
from apecache.errors import OptionError


@runtime_checkable
class RowsState(Protocol):
    """Say how many rows of one modality are done, as an extraction and an import report it."""

    @property
    def modality(self) -> str:
        """Return the modality, which names the bar."""

    @property
    def done(self) -> int:
        """Return the rows that are done."""

    @property
    def rows(self) -> int:
        """Return all rows."""


@runtime_checkable
class TrialState(Protocol):
    """Describe a trial of a sweep."""

    @property
    def number(self) -> int:
        """Return the number of the trial."""

    @property
    def mean(self) -> float | None:
        """Return its mean recall on dev in per cent; None if it failed."""


Progress = RowsState | TrialState | Mapping[str, Any]
"""What a `progress` is called with; a mapping is a line of the history of a fit."""


def progress_bar(total: int | None = None) -> Callable[[Progress], None]:
    """Return a `progress` that draws a bar with tqdm: a widget in a notebook, else a line of text.

    `extract`, `add_images`, `import_features`, `zero_shot` and `repair` get a bar of rows for each
    modality, `fit_head` and `fit_encoder` a bar of epochs with loss and recall, `sweep` a bar of
    trials. Make a new one for each call.

    Args:
        total: Number of epochs or trials, if the bar is to show what is left of them.
    """
    require_integer(total, "total", optional=True)
    bars: dict[str, Any] = {}

    def show(progress: Progress) -> None:
        label, done, n_all, figures = _read(progress, total)
        if label not in bars:
            bars[label] = _new_bar(label, done, n_all)
        bar = bars[label]
        bar.total = n_all
        # Not `bar.n`: `update` draws at most ten times a second. Trials are counted here.
        bar.update(1 if done is None else done - bar.n)
        if figures:
            bar.set_postfix_str(figures)
        if n_all is not None and bar.n >= n_all:
            bar.close()

    return show


def _read(
    progress: Progress,
    total: int | None,
) -> tuple[str, int | None, int | None, str]:
    """Return label, number done, number of all, and figures.

    The number done is None for trials, which end in any order and are counted.
    """
    if isinstance(progress, Mapping):
        recall = f"mean recall on dev {progress['dev']['mean_recall']:.1f} %"
        loss = progress["loss"]
        figures = recall if loss is None else f"loss {loss:.3f}, {recall}"
        return "epochs", progress["epoch"], total, figures
    if isinstance(progress, RowsState):
        return progress.modality, progress.done, progress.rows, ""
    if isinstance(progress, TrialState):
        mean = progress.mean
        return "trials", None, total, "failed" if mean is None else f"last {mean:.1f} %"
    raise OptionError(
        f"progress_bar: {type(progress).__name__} has no known form; it is for extract, "
        "import_features, fit_head, fit_encoder and sweep"
    )


def _new_bar(label: str, done: int | None, n_all: int | None) -> Any:
    with warnings.catch_warnings():
        # A notebook without ipywidgets gets a line of text, which is no reason for a warning.
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
    # Rows of an earlier call count as done, but not for the rate.
    return tqdm(desc=label, initial=done or 0, total=n_all, leave=True)
