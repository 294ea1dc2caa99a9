"""`apecache doctor`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .option_groups import Json
from .terminal import FAILURE, ending, show_json, show_table, warn

if TYPE_CHECKING:
    from apecache.plan.environment import EnvironmentReport


def doctor(
    folder: Annotated[
        Path,
        typer.Argument(help="Where stores will be written; its free space is shown."),
    ] = Path(),
    json: Json = False,
) -> None:
    """Show versions, device, memory and disk space, and what is wrong with them.

    Add the output to an issue report. It holds no names, paths of yours or secrets, except the
    values of a few environment variables, which are listed. Exit code 1 if there is a problem.

    Example: apecache doctor
    """
    with ending():
        from apecache.errors import OptionError
        from apecache.plan.environment import describe_environment

        if not folder.is_dir():
            raise OptionError(f"{folder} is not a folder; give the folder for your stores")
        report = describe_environment(folder)
        if json:
            show_json(asdict(report))
        else:
            _show(report)
        if report.problems:
            raise typer.Exit(FAILURE)


def _show(report: "EnvironmentReport") -> None:
    """Show the report as tables, and problems as warnings at the end."""
    device = report.device
    uses_gpu = "yes" if device.name != "cpu" else "no; commands run on the CPU"
    show_table(
        "machine",
        ("property", "value"),
        [
            ("system", report.system),
            ("Python", report.python),
            ("processors", report.n_cpus),
            ("threads of torch", report.n_threads),
            ("memory", _gigabytes(report.memory_bytes)),
            ("available memory", _gigabytes(report.available_bytes)),
            ("free disk space", _gigabytes(report.disk_free_bytes)),
            ("device", f"{device.name} ({device.hardware})"),
            ("device memory", _gigabytes(device.memory_bytes)),
            ("CUDA of torch", device.cuda_build or "none"),
            ("GPU is used", uses_gpu),
        ],
    )
    rows = [(name, number or "missing") for name, number in report.libraries.items()]
    faiss = ", ".join(f"{wheel} {number}" for wheel, number in report.faiss.items())
    show_table("libraries", ("package", "version"), [*rows, ("FAISS", faiss or "missing")])
    extras = [(extra, _extra_state(extra, report.extras[extra])) for extra in report.extras]
    show_table("extras", ("extra", "packages"), extras)
    if report.variables:
        show_table("environment variables", ("name", "value"), list(report.variables.items()))
    for problem in report.problems:
        warn(problem)
    if not report.problems:
        typer.echo("no problems were found")


def _extra_state(extra: str, packages: dict[str, str]) -> str:
    if not all(packages.values()):
        return f"missing; pip install 'apecache[{extra}]'"
    return ", ".join(f"{package} {number}" for package, number in packages.items())


def _gigabytes(n_bytes: int | None) -> str:
    return "not known" if n_bytes is None else f"{n_bytes / 1e9:.1f} GB"
