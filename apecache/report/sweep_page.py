"""Write the page of a sweep: trials by their dev score, settings and scores, the best trial."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from apecache.arguments import AnyPath, as_path
from apecache.errors import MissingExtraError, RunError, one_line, raise_if_refused
from apecache.report.charts.importance import FEWEST, importances
from apecache.report.charts.parallel import Parallel, axis_of, worded
from apecache.report.page import Cell, Chart, Curve, Page, Table, write_page
from apecache.report.records import ends
from apecache.report.run_page import learning_charts, ledger_table, with_points
from apecache.runs.heads import DESCRIPTION
from apecache.sweeps.run import COMMAND, DESCRIBED, Trial, read_trials
from apecache.sweeps.space import Dimension
from apecache.sweeps.trials import TRIALS

PAGE = "report.html"
STATES = ("done", "stopped", "failed")
SCORE = "dev mean recall, %"
CHOSEN_ON = (
    "Everything was chosen on the dev split: the best figure is the best of many and flatters; "
    "measure it elsewhere."
)


@dataclass(frozen=True, kw_only=True)
class _SweepRecord:
    """Hold what the folder of a sweep records."""

    folder: Path
    description: Mapping[str, Any]
    """The sweep's own description."""
    space: Mapping[str, Dimension]
    """How each setting was to be chosen."""
    trials: Sequence[Trial]
    """The best first."""
    command: str
    """Makes the best run again; empty: not recorded yet."""

    @property
    def scored(self) -> list[Trial]:
        """Return the trials that have a score."""
        return [trial for trial in self.trials if trial.mean is not None]

    @property
    def state_counts(self) -> Counter[str]:
        """Return the number of trials in each state."""
        return Counter(trial.state for trial in self.trials)

    @property
    def best(self) -> Path:
        """Return the folder of the best run."""
        return self.folder / "best"


def is_sweep(folder: Path) -> bool:
    """Tell whether a folder is that of a sweep."""
    return (folder / DESCRIBED).is_file()


def sweep_page(folder: AnyPath, out: AnyPath | None = None, title: str = "") -> Path:
    """Write the page of a sweep, finished or not, by default as `report.html` in its folder.

    Raises:
        RunError: no sweep, one without a trial so far, or one that is damaged.
    """
    folder = as_path(folder, "folder")
    page_path = folder / PAGE if out is None else as_path(out, "out")
    sweep = _read(folder)
    # Written last: a sweep that was interrupted has no best run yet.
    is_fitted = (sweep.best / DESCRIPTION).is_file()
    shares, remark = _importance(sweep)
    tables = [_trials_table(sweep)]
    if shares:
        tables.append(shares)
    tables.append(_cost_table(sweep))
    charts = list(_progress(sweep))
    if is_fitted:
        costs = ledger_table({"the best run": sweep.best})
        if costs.rows:
            tables.append(replace(costs, title="What the best run has cost"))
        best_trial = f"trial {sweep.trials[0].number}"
        charts += with_points(learning_charts({best_trial: sweep.best}))
    page = Page(
        title=title or f"Sweep: {folder.resolve().name}",
        subtitle=_subtitle(sweep),
        commands=(sweep.command,) if sweep.command else (),
        tables=tuple(tables),
        parallels=_parallels(sweep),
        charts=tuple(charts),
        notes=(CHOSEN_ON, remark) if remark else (CHOSEN_ON,),
    )
    return write_page(page, page_path)


def _read(folder: Path) -> _SweepRecord:
    if not is_sweep(folder):
        raise RunError(
            f"{folder} is not a sweep: it has no {DESCRIBED} (make one with: apecache sweep)"
        )
    try:
        description = json.loads((folder / DESCRIBED).read_text(encoding="utf-8"))
        # Whole trials before stopped ones, whose scores come from fewer epochs.
        trials = sorted(
            read_trials(folder).values(),
            key=lambda trial: (STATES.index(trial.state), -(trial.mean or 0.0), trial.number),
        )
        command_path = folder / COMMAND
        command = ""
        if command_path.is_file():
            command = command_path.read_text(encoding="utf-8").strip()
        space = {}
        for name, dimension in description["space"].items():
            space[name] = Dimension.model_validate(dimension)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        for name in (DESCRIBED, TRIALS, COMMAND):
            raise_if_refused(folder / name)
        raise RunError(
            f"{folder} is damaged ({one_line(error)}); sweep again into another --out"
        ) from None
    if not trials:
        raise RunError(f"{folder} has no finished trial yet; go on with the same apecache sweep")
    return _SweepRecord(
        folder=folder,
        description=description,
        space=space,
        trials=trials,
        command=command,
    )


def _subtitle(sweep: _SweepRecord) -> str:
    recipes = ", ".join(sweep.description.get("recipes", {}))
    counts_of = sweep.state_counts
    listed = ", ".join(f"{counts_of[state]} {state}" for state in STATES if counts_of[state])
    halving = " with successive halving" if sweep.description.get("halving") else ""
    return f"{sweep.description.get('sampler', '')} search{halving} over {recipes}: {listed}"


def _trials_table(sweep: _SweepRecord) -> Table:
    # Columns of seeds and errors stand only in tables that have some.
    several_seeds = any(len(trial.recalls) > 1 for trial in sweep.trials)
    seed_columns = ("each seed",) if several_seeds else ()
    any_failed = any(trial.error for trial in sweep.trials)
    error_columns = ("error",) if any_failed else ()
    columns = (
        "trial",
        "state",
        SCORE,
        "95 % interval",
        "chance, %",
        *seed_columns,
        "epochs",
        *sweep.space,
        *error_columns,
    )
    rows: list[tuple[Cell, ...]] = []
    for trial in sweep.trials:
        interval = None if trial.low is None or trial.high is None else ends(trial.low, trial.high)
        of_seeds = ", ".join(f"{recall:.1f}" for recall in trial.recalls)
        settings = (
            worded(trial.values[name]) if name in trial.values else None for name in sweep.space
        )
        cells: tuple[Cell, ...] = (
            trial.number,
            trial.state,
            trial.mean,
            interval,
            trial.chance,
            *((of_seeds,) if several_seeds else ()),
            trial.epochs,
            *settings,
            *((trial.error or None,) if any_failed else ()),
        )
        rows.append(cells)
    note = (
        "The best first: whole trials, then those that were stopped early, then those that "
        "failed. Intervals add the "
        "variance over seeds, where there are several, to an upper bound of that over dev images."
    )
    return Table(title="Trials", columns=columns, rows=tuple(rows), note=note)


def _parallels(sweep: _SweepRecord) -> tuple[Parallel, ...]:
    trials = sweep.scored
    axes = []
    for name, dimension in sweep.space.items():
        values = [trial.values.get(name) for trial in trials]
        if any(value != values[0] for value in values):
            axes.append(axis_of(name, dimension, values))
    if not axes:
        return ()
    scores = tuple(trial.mean or 0.0 for trial in trials)
    note = (
        "A line for each trial over the settings that vary, the stronger the better; the best one "
        "stands out. "
        "Stopped trials had fewer epochs."
    )
    score_axis = axis_of(SCORE, None, scores)
    parallel = Parallel(
        title="Settings and scores",
        note=note,
        axes=(*axes, score_axis),
        scores=scores,
    )
    return (parallel,)


def _importance(sweep: _SweepRecord) -> tuple[Table | None, str]:
    """Return the table of importances, or None and a remark why there is none."""
    # Stopped trials had fewer epochs: their scores cannot be compared with those of whole ones.
    points = []
    scores = []
    for trial in sweep.scored:
        if trial.state == "done":
            points.append(trial.values)
            scores.append(trial.mean or 0.0)
    n_done = len(points)
    try:
        shares = importances(sweep.space, points, scores)
    except MissingExtraError as error:
        return None, f"How much each setting mattered is not known: {error}"
    if not shares:
        too_few = (
            f"How much each setting mattered is not known: {n_done} whole trials, at least "
            f"{FEWEST} are needed."
        )
        return None, too_few if n_done < FEWEST else ""
    note = (
        f"By PED-ANOVA (Optuna) over the {n_done} trials that ran to the end; shares add up to 100."
    )
    table = Table(
        title="What mattered",
        columns=("setting", "importance, %"),
        rows=tuple((name, 100 * share) for name, share in shares.items()),
        note=note,
    )
    return table, ""


def _cost_table(sweep: _SweepRecord) -> Table:
    n_fits = 0
    n_epochs = 0
    recorded_seconds = []
    for trial in sweep.trials:
        # A trial has one fit, and one recall, for every seed.
        n_fits += len(trial.recalls)
        n_epochs += trial.epochs * len(trial.recalls)
        seconds = vars(trial).get("seconds")
        if seconds is not None:
            recorded_seconds.append(seconds)
    rows: list[tuple[Cell, ...]] = []
    for state in STATES:
        n_trials = sweep.state_counts[state]
        if n_trials:
            rows.append((f"trials {state}", n_trials))
    rows.append(("fits", n_fits))
    rows.append(("epochs of all fits", n_epochs))
    if recorded_seconds:
        rows.append(("seconds of all trials", float(sum(recorded_seconds))))
    return Table(title="What the sweep has cost", columns=("", "so far"), rows=tuple(rows))


def _progress(sweep: _SweepRecord) -> tuple[Chart, ...]:
    """Draw the scores in the order of the trials, and the best so far."""
    trials = sorted(sweep.scored, key=lambda trial: trial.number)
    if len(trials) < 2:
        return ()
    numbers = [trial.number for trial in trials]
    scores = [trial.mean or 0.0 for trial in trials]
    best_so_far = accumulate(scores, max)
    curves = (
        Curve(name="best so far", points=tuple(zip(numbers, best_so_far, strict=True))),
        Curve(name="trial", points=tuple(zip(numbers, scores, strict=True))),
    )
    return (Chart(title="The search", x_label="trial", y_label=SCORE, curves=curves),)
