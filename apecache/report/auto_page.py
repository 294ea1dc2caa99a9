"""Make the pages of `apecache auto` and `apecache forecast`."""

from pathlib import Path
from statistics import fmean

from apecache.arguments import AnyPath, as_path, require_type
from apecache.auto.forecast import ForecastReport
from apecache.auto.ladder import AutoReport
from apecache.report.page import Chart, Curve, Page, Table, write_page


def write_auto_page(report: AutoReport, path: AnyPath) -> Path:
    """Write what a search tried, what it cost, and why it chose the winner."""
    require_type(report, AutoReport, "report")
    rungs = Table(
        title="Rungs",
        columns=("rung", "outcome", "seconds", "seconds left"),
        rows=tuple(
            (rung.name, rung.outcome, rung.seconds, rung.left_seconds) for rung in report.rungs
        ),
    )
    tried: list[tuple[str, str]] = []
    for rung in report.rungs:
        tried += [(rung.name, entry) for entry in rung.tried]
    attempts = Table(
        title="What was tried",
        columns=("rung", "attempt: mean recall on dev, %"),
        rows=tuple(tried),
    )
    decisions = Table(
        title="Decisions: mean R@1 on images kept aside",
        columns=("candidate", "against", "difference", "from", "to", "replaced it"),
        rows=tuple(
            (
                decision.candidate,
                decision.against,
                decision.difference.difference,
                decision.difference.low,
                decision.difference.high,
                "yes" if decision.replaced else "no",
            )
            for decision in report.decisions
        ),
        note=(
            f"Paired on {report.n_confirm_images:,} images that nothing trained or chose on, over "
            f"seeds that chose nothing. A candidate replaces a simpler one if its interval of "
            f"{100 * report.decisions[0].level:.2f} % lies above 0: all {len(report.decisions)} "
            "together hold with 95 %."
        ),
    )
    page = Page(
        title=f"Search for the best heads: {report.chosen}",
        commands=report.commands,
        tables=(rungs, decisions, attempts),
        notes=("Dev recalls chose the candidates, so they are too good. Report on another split.",),
    )
    return write_page(page, as_path(path, "path"))


def write_forecast_page(report: ForecastReport, path: AnyPath) -> Path:
    """Write a learning curve, its continuation and the measured gains."""
    require_type(report, ForecastReport, "report")
    measured = tuple((float(p.n_images), fmean(p.recalls)) for p in report.curve)
    predicted = tuple((float(p.n_images), p.recall) for p in report.predictions)
    low = tuple((float(p.n_images), p.low) for p in report.predictions)
    high = tuple((float(p.n_images), p.high) for p in report.predictions)
    chart = Chart(
        title="Mean R@1 on dev, %",
        x_label="training images",
        y_label="mean R@1, %",
        curves=(
            Curve(name="measured", points=measured),
            # The curve goes on from the last measured point.
            Curve(name="predicted", points=(measured[-1], *predicted)),
            Curve(name="95 %, lower end", points=low),
            Curve(name="95 %, upper end", points=high),
        ),
    )
    predictions = Table(
        title="With more pairs",
        columns=("training images", "mean R@1, %", "from", "to"),
        rows=tuple((p.n_images, p.recall, p.low, p.high) for p in report.predictions),
        note="The interval covers seeds and subsets, not the choice of a power law.",
    )
    gains = Table(
        title="Other changes, measured with all training images",
        columns=(
            "change",
            "mean R@1, %",
            "from",
            "to",
            "without",
            "paired gain from",
            "paired gain to",
        ),
        rows=tuple(
            (g.change, g.recall, g.low, g.high, g.baseline, g.paired_low, g.paired_high)
            for g in report.gains
        ),
    )
    page = Page(
        title=f"What would help {report.recipe}?",
        subtitle=f"{report.n_train_images:,} training images, {report.n_dev_images:,} dev images",
        tables=(predictions, gains) if report.gains else (predictions,),
        charts=(chart,),
        notes=(f"Chance at R@1: {report.chance:.2f} %.", *_remarks(report)),
    )
    return write_page(page, as_path(path, "path"))


def _remarks(report: ForecastReport) -> list[str]:
    """Return what the measured gains leave open."""
    remarks = [f"{gain.note}." for gain in report.gains if gain.note]
    if report.no_tower:
        remarks.append(f"No trial of the text tower: {report.no_tower}.")
    return remarks
