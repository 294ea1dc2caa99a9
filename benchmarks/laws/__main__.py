"""Try which claims of the papers hold: `python -m benchmarks.laws --help`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from apecache_cli.option_groups import SOURCE, Device, Json, takes_groups
from apecache_cli.source_options import SplitSourceOptions
from apecache_cli.terminal import choice, command_line, ending, show_json, show_table

SIZES = ("smoke", "small", "all-data", "full")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@takes_groups
def laws(
    opening: SplitSourceOptions,
    pairs: Annotated[
        str | None, typer.Option(help=f"{SOURCE} Without it the laws are listed.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="The main image encoder, as extract takes it.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="The main text encoder.")] = None,
    encoder: Annotated[
        list[str] | None, typer.Option(help="ROLE=ENCODER for other roles of the laws. Repeat.")
    ] = None,
    resolution: Annotated[
        list[str] | None, typer.Option(help="Pixels of --image, or ROLE=PIXELS. Repeat.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Images of classes, for zero-shot classification.")
    ] = None,
    languages: Annotated[
        str | None, typer.Option(help="Captions of the reported images in other languages.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="These laws alone: L1,L4; or comparisons: L1:i > l.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm.")] = 3,
    budget: Annotated[
        float | None, typer.Option(min=0, help="Minutes; the same command goes on later.")
    ] = None,
    size: Annotated[str, typer.Option(help="smoke, small, all-data or full.")] = "small",
    images: Annotated[
        int | None, typer.Option(min=20, help="Training images where towers train.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps where towers train.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=2, help="Largest batch where towers train.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Rate where towers train; default: each recipe's own.")
    ] = None,
    autocast: Annotated[
        str, typer.Option(help="Computation of towers that train: float32 or bfloat16.")
    ] = "float32",
    report_split: Annotated[
        str, typer.Option(help="What is reported; nothing is trained or chosen on it.")
    ] = "val",
    work: Annotated[
        Path | None, typer.Option(help="Folder of stores, runs and results; what is done stays.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write all laws as one HTML page.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="What could be detected, and which runs; no run.")
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Of this machine, for the costs.")
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Try which claims of the papers hold for these encoders and this data: differences with
    intervals, beside the published ones, and held, broken or not decided.

    Compute goes first to the laws with the largest published gaps. Runs that laws share are made
    once.

    Example: python -m benchmarks.laws --pairs pairs.tsv --image timm:vit_small_patch16_224 --text
    hf:sentence-transformers/all-MiniLM-L6-v2 --only L1,L4 --budget 120 --work laws --out laws.html
    """
    with ending():
        from apecache.errors import OptionError

        choice("--size", size, SIZES)
        choice("--autocast", autocast, ("float32", "bfloat16"))
        if pairs is None:
            show_laws(json)
            return
        if image is None or text is None or work is None:
            raise OptionError(
                "--image, --text and --work are needed besides --pairs; without --pairs laws "
                "are listed"
            )
        if out is not None and (out.is_dir() or not out.resolve().parent.is_dir()):
            raise OptionError(
                f"--out {out}: no file can be made there; name a file in a folder that exists"
            )
        from dataclasses import replace

        from apecache.data.sources import open_pairs
        from benchmarks.laws.run import plan_laws, run_laws, wanted_claims
        from benchmarks.laws.setting import SIZES as KNOWN
        from benchmarks.laws.setting import LawsSetting, parse_roles

        if lr is not None and not 0 < lr < float("inf"):
            raise OptionError(f"--lr {lr}: expected a positive number")
        changes: dict[str, Any] = {
            "images": images,
            "steps": steps,
            "batch": batch,
            "lr": lr,
            "autocast": autocast,
        }
        chosen = replace(
            KNOWN[size],
            **{name: value for name, value in changes.items() if value is not None},
        )
        roles = parse_roles([f"image={image}", f"text={text}", *(encoder or [])], resolution or [])
        source = open_pairs(pairs, opening.spec("image", "caption"))
        others = (open_labels(labels), None if languages is None else open_pairs(languages))
        setting = LawsSetting(
            source,
            roles,
            work,
            chosen,
            seeds,
            report_split,
            *others,
            device,
            price_per_hour,
        )
        names = [] if only is None else [name.strip() for name in only.split(",")]
        if dry_run:
            plans = plan_laws(setting, names)
            show_plans(plans, wanted=wanted_claims(plans, names), setting=setting, json=json)
            return
        seconds = None if budget is None else 60 * budget
        report = run_laws(
            setting,
            only=names,
            budget_seconds=seconds,
            say=lambda line: typer.echo(line, err=True),
        )
        if out is not None:
            from benchmarks.laws.page import laws_page

            laws_page(report.laws, out, command_line())
        show_report(report, json)


def open_labels(name: str | None) -> Any:
    if name is None:
        return None
    from apecache.data.sources import open_pairs
    from apecache.data.spec import OpenSpec

    return open_pairs(name, OpenSpec(require=("image", "label")))


def show_laws(json: bool) -> None:
    from benchmarks.laws.law import law_ids, load_law

    found = [load_law(name) for name in law_ids()]
    if json:
        show_json({"laws": [law.model_dump(mode="json") for law in found]})
        return
    rows = [
        (law.id, law.title, len(law.claims()), "; ".join(law.needs), law.source) for law in found
    ]
    show_table("laws", ("law", "title", "comparisons", "needs besides", "source"), rows)


def show_plans(plans: Any, wanted: Any, setting: Any, json: bool) -> None:
    from benchmarks.laws.jobs import counted_costs, jobs_in_turn
    from benchmarks.laws.results import law_result
    from benchmarks.laws.run import known_outcomes

    jobs = jobs_in_turn(wanted)
    done = known_outcomes(jobs, setting)
    results = [law_result(law, {}, setting) for law in plans]
    flops = {job.digest: counted_costs(job).get("total-flops") for job in jobs if job.fits}
    if json:
        rows = [
            {"law": law.id, **vars(one), "judgement": vars(one.judgement)}
            for law in results
            for one in law.compared
        ]
        runs = [{"digest": job.digest, **job.about, "done": job.digest in done} for job in jobs]
        show_json({"comparisons": rows, "runs": runs})
        return
    show_compared("planned", results)
    known = sum(flop for flop in flops.values() if flop)
    typer.echo(
        f"{len(flops)} runs, {sum(digest in done for digest in flops)} of them done; "
        f"{known / 1e12:,.4g} TFLOP"
    )


def show_report(report: Any, json: bool) -> None:
    if json:
        from dataclasses import asdict

        show_json({**asdict(report), "verdicts": {law.id: law.verdict for law in report.laws}})
        return
    show_compared("laws", report.laws)
    for law in report.laws:
        typer.echo(f"{law.id}: {law.verdict}: {law.title}")
        for arm in law.arms:
            for error in arm.failed:
                typer.echo(f"  a run of {arm.name} failed: {error}")
    typer.echo(
        "intervals: paired; the variances over seeds and over images (bootstrap) are added; "
        "see each source"
    )
    typer.echo(
        f"{report.n_done} runs are done, {report.n_failed} of them failed, {report.n_left} are left"
    )
    if report.n_left:
        typer.echo(f"resume with: {command_line()}")


def show_compared(title: str, laws: Any) -> None:
    columns = (
        "law",
        "comparison",
        "metric",
        "published",
        "detectable",
        "counts from",
        "measured",
        "95 %",
        "verdict",
    )
    rows = [(law.id, one.name, *_cells(one)) for law in laws for one in law.compared]
    show_table(title, columns, rows)


def _cells(one: Any) -> tuple[str, ...]:
    judgement = one.judgement
    unit = f" {one.unit}"
    published = (
        "no figure" if one.published is None else f"{one.published:+.1f}{unit} ({_figures(one)})"
    )
    measured = "" if judgement.difference is None else f"{judgement.difference:+.2f}{unit}"
    span = (
        ""
        if judgement.low is None
        else f"{judgement.low:.2f} to {judgement.high:.2f}, {judgement.source}"
    )
    least = "" if one.detectable is None else f"{one.detectable:.1f}{unit}"
    why = f": {judgement.why}" if judgement.why else ""
    return (
        one.metric,
        published,
        least,
        f"{one.smallest:g}",
        measured,
        span,
        f"{judgement.verdict}{why}",
    )


def _figures(one: Any) -> str:
    return ", ".join(f"{figure:g}" for figure in one.figures)


if __name__ == "__main__":
    app()
