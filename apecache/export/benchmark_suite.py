"""Measure a run by the suites of other programs, and keep the results beside the run.

- `clip-benchmark`: every data set below a folder in clip_benchmark's webdataset layout.
- `clip-benchmark:NAME,…`: data sets that clip_benchmark builds from the publishers' files.
- `datacomp-38`: the tasks of the DataComp challenge that lie below the folder.
- `mteb:TASK,…`: tasks of mteb.

An interrupted suite resumes: what was measured with the same weights on the same files is kept.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apecache.arguments import AnyPath, as_path
from apecache.encoders.spec import EncoderSpec
from apecache.errors import DataError, OptionError, counted, nearest
from apecache.export.clip_benchmark_sets import (
    find_data_sets,
    measure_built,
    measure_folder,
    require_clip_benchmark,
)
from apecache.export.datacomp import DATACOMP, OURS
from apecache.export.mteb_model import MtebModel, mteb_model
from apecache.export.mteb_suite import find_tasks, local_folder, measure_task
from apecache.export.open_clip_triple import OpenClipTriple, open_clip_triple
from apecache.export.suite_report import SuiteReport, SuiteRow, folder_stamp
from apecache.runs.load import load_run
from apecache.storage.replace import replace_text

SUITES = ("clip-benchmark", "datacomp-38", "mteb")
FORMS = "clip-benchmark, clip-benchmark:NAME,…, datacomp-38 or mteb:TASK,…"
FOLDER = "suites"
SAME_PROGRAM = {"clip-benchmark": "datacomp-38", "datacomp-38": "clip-benchmark"}
"""Suites that measure a folder in the same way: a result of one is one of the other."""


@dataclass(frozen=True, kw_only=True)
class SuiteSpec:
    """Say where the encoders of a run are, and on which device they work."""

    image: EncoderSpec | None = None
    """Image encoder at its new place, if it has moved."""
    text: EncoderSpec | None = None
    """Text encoder at its new place, if it has moved."""
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One data set that is to be measured."""

    stamp: str
    measure: Callable[["_Models"], SuiteRow]


class _Models:
    """Open the run in the form that a program needs, once, when it is first needed."""

    def __init__(self, run: Path, spec: SuiteSpec) -> None:
        self.run = run
        self.spec = spec
        self._triple: OpenClipTriple | None = None
        self._mteb: MtebModel | None = None

    @property
    def triple(self) -> OpenClipTriple:
        if self._triple is None:
            self._triple = open_clip_triple(self.run, **vars(self.spec))
        return self._triple

    @property
    def mteb(self) -> MtebModel:
        if self._mteb is None:
            model = mteb_model(self.run, **vars(self.spec))
            assert isinstance(model, MtebModel)
            self._mteb = model
        return self._mteb


def suite_names(suite: str) -> tuple[str, ...]:
    """Return the suites that an option names: itself, or the lines of a file.

    Args:
        suite: a suite, or the path of a file with one suite per line; `#` begins a comment.

    Raises:
        OptionError: neither, or an empty file.
    """
    if suite.partition(":")[0] in SUITES:
        return (suite,)
    path = Path(suite)
    if not path.is_file():
        raise OptionError(
            f"--suite {suite}: expected {FORMS}, or a file with one of them per line"
            f"{nearest(suite.partition(':')[0], SUITES)}"
        )
    lines = [line.partition("#")[0].strip() for line in _lines(path)]
    names = tuple(dict.fromkeys(line for line in lines if line))
    unknown = [name for name in names if name.partition(":")[0] not in SUITES]
    if unknown or not names:
        raise OptionError(
            f"--suite {suite}: each line of the file is expected to be {FORMS}, found "
            f"{unknown[0] if unknown else 'no line'}"
        )
    return names


def run_suite(
    run: AnyPath,
    suite: str,
    data_root: AnyPath | None,
    spec: SuiteSpec | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> SuiteReport:
    """Measure a run on the data sets of a suite.

    Results of an earlier call with the same weights and files are taken from the run's folder. A
    named data set that cannot be measured is reported and does not stop the others.

    Args:
        run: folder of the run.
        suite: one of the forms at the top of this module.
        data_root: folder of the data sets; only mteb can do without.
        spec: encoders and device.
        progress: called with the name of each data set before it is measured.

    Raises:
        OptionError: no such suite or task, or no `data_root`.
        DataError: no data set could be measured.
        MissingExtraError: the other program is not installed.
    """
    run = as_path(run, "run")
    data_root = None if data_root is None else as_path(data_root, "data_root")
    program, _, listed = suite.partition(":")
    names = tuple(name.strip() for name in listed.split(",") if name.strip())
    _require_form(suite, program, names, data_root)
    spec = spec or SuiteSpec()
    failed: dict[str, str] = {}
    jobs = _jobs(program, names, data_root, spec)
    digest = load_run(run, image=spec.image, text=spec.text).digest
    results = run / FOLDER / f"{program}.json"
    kept_results = _read(results, digest)
    if program in SAME_PROGRAM:
        shared_results = _read(run / FOLDER / f"{SAME_PROGRAM[program]}.json", digest)
        # In the order of the data sets, which a set of names would not keep.
        for name in jobs:
            if name in shared_results:
                kept_results.setdefault(name, shared_results[name])
    models = _Models(run, spec)
    rows: dict[str, SuiteRow] = {}
    for name, job in jobs.items():
        kept_row = kept_results.get(name)
        # Loaded only for what is measured: a suite that is finished needs no encoder.
        if kept_row is None or kept_row.get("stamp", job.stamp) != job.stamp:
            progress(name)
            try:
                row = job.measure(models)
            except DataError as error:
                failed[name] = str(error)
                continue
            # Written after each data set, so that an interrupt loses one at most.
            kept_results[name] = asdict(row)
            _write(results, digest, kept_results)
        rows[name] = _row(kept_results[name])
    if rows:
        _write(results, digest, kept_results)
    else:
        raise DataError("; ".join(failed.values()))
    return _report(program, rows, failed)


def read_suites(run: Path) -> list[SuiteReport]:
    """Return the results that are kept beside a run."""
    reports = []
    for suite in SUITES:
        path = run / FOLDER / f"{suite}.json"
        if path.is_file():
            kept_results = json.loads(path.read_text(encoding="utf-8"))["results"]
            rows = {name: _row(row) for name, row in kept_results.items()}
            reports.append(_report(suite, rows))
    return reports


def _require_form(suite: str, program: str, names: tuple[str, ...], data_root: Path | None) -> None:
    wrong = program not in SUITES
    wrong |= program == "mteb" and not names
    wrong |= program == "datacomp-38" and ":" in suite
    wrong |= program == "clip-benchmark" and ":" in suite and not names
    if wrong:
        raise OptionError(f"--suite {suite}: expected {FORMS}{nearest(program, SUITES)}")
    if data_root is None and program != "mteb":
        raise OptionError(
            f"--data-root is missing: give the folder of the data sets of --suite {suite}"
        )
    if data_root is not None and not data_root.is_dir():
        raise OptionError(
            f"--data-root {data_root}: expected a folder, found "
            f"{'a file' if data_root.exists() else 'none'}"
        )


def _jobs(
    program: str,
    names: tuple[str, ...],
    data_root: Path | None,
    spec: SuiteSpec,
) -> dict[str, _Job]:
    """Return what is to be measured, by name."""
    if program == "mteb":
        return {name: _mteb_job(name, task, data_root) for name, task in find_tasks(names).items()}
    require_clip_benchmark()
    assert data_root is not None
    if names:
        return {name: _built_job(name, data_root, spec) for name in names}
    data_sets = find_data_sets(data_root)
    selected = data_sets
    if program == "datacomp-38":
        selected = {name: path for name, path in data_sets.items() if name in DATACOMP}
    if not selected:
        raise DataError(
            f"{data_root} has no data set of {program}; expected folders with test/nshards.txt "
            f"(found {counted(len(data_sets), 'other data set')})"
        )
    return {name: _folder_job(name, folder, spec) for name, folder in sorted(selected.items())}


def _folder_job(name: str, folder: Path, spec: SuiteSpec) -> _Job:
    return _Job(
        stamp=folder_stamp(folder),
        measure=lambda models: measure_folder(name, folder, models.triple, spec.device),
    )


def _built_job(name: str, data_root: Path, spec: SuiteSpec) -> _Job:
    return _Job(
        stamp=folder_stamp(data_root / name.partition("/")[0].partition("@")[0]),
        measure=lambda models: measure_built(name, data_root, models.triple, spec.device),
    )


def _mteb_job(name: str, task: Any, data_root: Path | None) -> _Job:
    folder = local_folder(task, data_root)
    return _Job(
        stamp="" if folder is None else folder_stamp(folder),
        measure=lambda models: measure_task(name, task, models.mteb, folder),
    )


def _row(value: Mapping[str, Any]) -> SuiteRow:
    """Restore a row from its JSON, which has lists for pairs."""
    intervals = {name: (low, high) for name, (low, high) in value["intervals"].items()}
    return SuiteRow(**{**value, "intervals": intervals})


def _report(
    suite: str,
    rows: Mapping[str, SuiteRow],
    failed: Mapping[str, str] | None = None,
) -> SuiteReport:
    if suite != "datacomp-38":
        return SuiteReport(suite=suite, rows=tuple(rows.values()), failed=failed or {})
    scores = {}
    for name, row in rows.items():
        main = DATACOMP[name].main_metric
        if main in OURS and main in row.metrics:
            scores[name] = row.metrics[main]
    missing = [task.name for name, task in DATACOMP.items() if name not in scores]
    return SuiteReport(
        suite=suite,
        rows=tuple(rows.values()),
        missing=tuple(missing),
        main_score=math.fsum(scores.values()) / len(scores) if scores else None,
        failed=failed or {},
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise OptionError(f"--suite {path}: expected a text file, found other bytes") from None


def _read(path: Path, digest: str) -> dict[str, Any]:
    """Return the kept results of the same weights."""
    if not path.is_file():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    return dict(value["results"]) if value.get("run") == digest else {}


def _write(path: Path, digest: str, results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps({"run": digest, "results": dict(results)}, indent=1))
