"""The page of a sweep: its trials by their dev score, how settings and scores go together, what the
best one is."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from apecache.arguments import AnyPath, as_path
from apecache.errors import MissingExtraError, RunError, one_line
from apecache.report.charts.importance import FEWEST, importances
from apecache.report.charts.parallel import Parallel, axis_of, worded
from apecache.report.page import Cell, Chart, Curve, Page, Table, write_page
from apecache.report.records import ends
from apecache.report.run_page import learning_charts, ledger_table
from apecache.runs.heads import DESCRIPTION
from apecache.sweeps.run import COMMAND, DESCRIBED, Trial, read_trials
from apecache.sweeps.space import Dimension

PAGE = "report.html"
STATES = ("done", "stopped", "failed")
SCORE = "dev mean recall, %"
CHOSEN_ON = (
    "Everything was chosen on the dev split: the best figure is the best of many and flatters; "
    "measure it elsewhere."
)


@dataclass(frozen=True, kw_only=True)
class _Sweep:
    """`space`: how each setting was to be chosen. `trials`: the best first. `command`: makes the
    best run again."""

    folder: Path
    about: Mapping[str, Any]
    space: Mapping[str, Dimension]
    trials: Sequence[Trial]
    command: str

    @property
    def scored(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.mean is not None]

    @property
    def best(self) -> Path:
        return self.folder / "best"


def is_sweep(folder: Path) -> bool:
    return (folder / DESCRIBED).is_file()


def sweep_page(folder: AnyPath, out: AnyPath | None = None, title: str = "") -> Path:
    """Write the page of a sweep, finished or not, by default as `report.html` in its folder.

    Raises:
        RunError: no sweep, one without a trial so far, or one that is damaged.
    """
    folder = as_path(folder, "folder")
    page_path = folder / PAGE if out is None else as_path(out, "out")
    sweep = _read(folder)
    fitted = (sweep.best / DESCRIPTION).is_file()
    shares, remark = _importance(sweep)
    costs = (
        replace(ledger_table({"the best run": sweep.best}), title="What the best run has cost")
        if fitted
        else None
    )
    tables = [
        _trials_table(sweep),
        shares,
        _cost_table(sweep),
        costs if costs and costs.rows else None,
    ]
    curves = learning_charts({f"trial {sweep.trials[0].number}": sweep.best}) if fitted else ()
    page = Page(
        title=title or f"Sweep: {folder.resolve().name}",
        subtitle=_subtitle(sweep),
        commands=(sweep.command,) if sweep.command else (),
        tables=tuple(table for table in tables if table),
        parallels=_parallels(sweep),
        charts=(
            *_progress(sweep),
            *(chart for chart in curves if any(c.points for c in chart.curves)),
        ),
        notes=(CHOSEN_ON, *((remark,) if remark else ())),
    )
    return write_page(page, page_path)


def _read(folder: Path) -> _Sweep:
    if not is_sweep(folder):
        raise RunError(
            f"{folder} is no sweep: it has no {DESCRIBED} (make one with: apecache sweep)"
        )
    try:
        about = json.loads((folder / DESCRIBED).read_text(encoding="utf-8"))
        trials = sorted(
            read_trials(folder).values(),
            key=lambda t: (STATES.index(t.state), -(t.mean or 0.0), t.number),
        )
        command = folder / COMMAND
        told = command.read_text(encoding="utf-8").strip() if command.is_file() else ""
        space = {
            name: Dimension.model_validate(dimension) for name, dimension in about["space"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(
            f"{folder} is damaged ({one_line(error)}); sweep again into another --out"
        ) from None
    if not trials:
        raise RunError(f"{folder} has no finished trial yet; go on with the same apecache sweep")
    return _Sweep(folder=folder, about=about, space=space, trials=trials, command=told)


def _subtitle(sweep: _Sweep) -> str:
    recipes = ", ".join(sweep.about.get("recipes", {}))
    states = Counter(trial.state for trial in sweep.trials)
    counts = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
    halving = " with successive halving" if sweep.about.get("halving") else ""
    return f"{sweep.about.get('sampler', '')} search{halving} over {recipes}: {counts}"


def _trials_table(sweep: _Sweep) -> Table:
    several = any(len(trial.recalls) > 1 for trial in sweep.trials)
    seeds = ("each seed",) if several else ()
    failed = any(trial.error for trial in sweep.trials)
    columns = (
        "trial",
        "state",
        SCORE,
        "95 % interval",
        "chance, %",
        *seeds,
        "epochs",
        *sweep.space,
        *(("error",) if failed else ()),
    )
    rows: list[tuple[Cell, ...]] = []
    for trial in sweep.trials:
        interval = None if trial.low is None or trial.high is None else ends(trial.low, trial.high)
        each_seed = (", ".join(f"{recall:.1f}" for recall in trial.recalls),) if several else ()
        settings = (
            worded(trial.values[name]) if name in trial.values else None for name in sweep.space
        )
        end = (trial.error or None,) if failed else ()
        rows.append(
            (
                trial.number,
                trial.state,
                trial.mean,
                interval,
                trial.chance,
                *each_seed,
                trial.epochs,
                *settings,
                *end,
            )
        )
    note = (
        "The best first: whole trials, then those that were stopped early, then those that "
        "failed. Intervals add the "
        "variance over seeds, where there are several, to an upper bound of that over dev images."
    )
    return Table(title="Trials", columns=columns, rows=tuple(rows), note=note)


def _parallels(sweep: _Sweep) -> tuple[Parallel, ...]:
    trials = sweep.scored
    chosen = {name: [trial.values.get(name) for trial in trials] for name in sweep.space}
    axes = [
        axis_of(n, sweep.space[n], values)
        for n, values in chosen.items()
        if any(v != values[0] for v in values)
    ]
    if not axes:
        return ()
    scores = tuple(trial.mean or 0.0 for trial in trials)
    note = (
        "A line for each trial over the settings that vary, the stronger the better; the best one "
        "stands out. "
        "Stopped trials had fewer epochs."
    )
    return (
        Parallel(
            title="Settings and scores",
            note=note,
            axes=(*axes, axis_of(SCORE, None, scores)),
            scores=scores,
        ),
    )


def _importance(sweep: _Sweep) -> tuple[Table | None, str]:
    """The table, or a remark why there is none."""
    whole = [trial for trial in sweep.trials if trial.state == "done" and trial.mean is not None]
    try:
        found = importances(
            sweep.space,
            [trial.values for trial in whole],
            [trial.mean or 0.0 for trial in whole],
        )
    except MissingExtraError as error:
        return None, f"How much each setting mattered is not told: {error}"
    if not found:
        few = (
            f"How much each setting mattered is not told: {len(whole)} whole trials, at least "
            f"{FEWEST} are needed."
        )
        return None, few if len(whole) < FEWEST else ""
    rows = tuple((name, 100 * share) for name, share in found.items())
    note = (
        f"By PED-ANOVA (Optuna) over the {len(whole)} trials that ran to the end; shares add up "
        "to 100."
    )
    return Table(
        title="What mattered",
        columns=("setting", "importance, %"),
        rows=rows,
        note=note,
    ), ""


def _cost_table(sweep: _Sweep) -> Table:
    states = Counter(trial.state for trial in sweep.trials)
    fits = sum(len(trial.recalls) for trial in sweep.trials)
    rows: list[tuple[Cell, ...]] = [
        (f"trials {state}", states[state]) for state in STATES if states[state]
    ]
    rows += [
        ("fits", fits),
        ("epochs of all fits", sum(trial.epochs * len(trial.recalls) for trial in sweep.trials)),
    ]
    seconds = [told for trial in sweep.trials if (told := vars(trial).get("seconds")) is not None]
    rows += [("seconds of all trials", float(sum(seconds)))] if seconds else []
    return Table(title="What the sweep has cost", columns=("", "so far"), rows=tuple(rows))


def _progress(sweep: _Sweep) -> tuple[Chart, ...]:
    """Scores in the order of the trials, and the best so far."""
    trials = sorted(sweep.scored, key=lambda trial: trial.number)
    points = [(trial.number, trial.mean or 0.0) for trial in trials]
    best = accumulate((score for _, score in points), max)
    lines = (
        Curve(name="best so far", points=tuple(zip((x for x, _ in points), best, strict=True))),
        Curve(name="trial", points=tuple(points)),
    )
    return (
        (Chart(title="The search", x_label="trial", y_label=SCORE, curves=lines),)
        if len(points) > 1
        else ()
    )
