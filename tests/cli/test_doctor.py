"""`apecache doctor` says what is installed, and what is wrong with it."""

import json
from pathlib import Path

import pytest
from apecache_cli.app import app
from packaging.requirements import Requirement
from typer.testing import CliRunner

from apecache.plan import environment
from apecache.plan.environment import DeviceReport, describe_environment, own_requirements


def problems_with(
    monkeypatch: pytest.MonkeyPatch,
    versions: dict[str, str],
    device: DeviceReport | None = None,
    has_driver: bool = False,
) -> str:
    """Return the problems where these packages alone have these versions ("" for missing)."""
    installed = environment.installed_version
    monkeypatch.setattr(
        environment,
        "installed_version",
        lambda name: versions[name] if name in versions else installed(name),
    )
    monkeypatch.setattr(environment, "has_nvidia_driver", lambda: has_driver)
    if device is not None:
        monkeypatch.setattr(environment, "describe_device", lambda: device)
    return "\n".join(describe_environment(Path()).problems)


def cpu(cuda_build: str | None) -> DeviceReport:
    return DeviceReport(
        name="cpu",
        hardware="x86_64",
        memory_bytes=None,
        free_bytes=None,
        cuda_build=cuda_build,
    )


def test_the_requirements_are_those_of_the_package() -> None:
    requirements = own_requirements()
    assert {"torch", "zarr", "timm"} <= {requirement.name for requirement in requirements[""]}
    assert [str(requirement.name) for requirement in requirements["cpu"]] == ["faiss-cpu"]
    assert "apecache" not in {requirement.name for requirement in requirements["dev"]}


def test_missing_and_old_packages_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = problems_with(monkeypatch, {"zarr": "", "timm": "0.4.12", "ray": ""})
    assert "zarr is not installed; run: pip install apecache" in problems
    timm = next(one for one in own_requirements()[""] if one.name == "timm")
    assert f"timm is 0.4.12, expected {timm.specifier}" in problems
    # An extra that is not installed is no problem.
    assert "ray" not in problems
    assert Requirement(f"timm{timm.specifier}").specifier.contains("1.0.31")


@pytest.mark.parametrize(
    ("wheels", "message"),
    [
        ({"faiss-cpu": ""}, "no FAISS wheel is installed; run: pip install 'apecache[cpu]'"),
        ({"faiss-cpu": "1.14", "faiss-gpu-cu12": "1.14"}, "provide the same module"),
    ],
)
def test_exactly_one_faiss_wheel_is_expected(
    monkeypatch: pytest.MonkeyPatch,
    wheels: dict[str, str],
    message: str,
) -> None:
    others = dict.fromkeys(environment.FAISS_WHEELS, "")
    assert message in problems_with(monkeypatch, {**others, **wheels})


@pytest.mark.parametrize(
    ("has_driver", "cuda_build", "message"),
    [
        (True, None, "built without CUDA"),
        (True, "13.0", "torch finds no CUDA device"),
        (False, None, ""),
    ],
)
def test_a_gpu_that_would_not_be_used_is_a_problem(
    monkeypatch: pytest.MonkeyPatch,
    has_driver: bool,
    cuda_build: str | None,
    message: str,
) -> None:
    problems = problems_with(monkeypatch, {}, device=cpu(cuda_build), has_driver=has_driver)
    assert message in problems
    assert ("NVIDIA" in problems) == has_driver


def test_the_command_shows_tables_or_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(environment, "has_nvidia_driver", lambda: False)
    monkeypatch.setattr(environment, "LOW_DISK_BYTES", 0)
    shown = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert "no problems were found" in shown.output
    report = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert report["libraries"]["torch"]
    assert report["device"]["name"]
    for output in (shown.output, json.dumps(report)):
        assert "hf_secret" not in output


def test_a_problem_gives_exit_code_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "LOW_DISK_BYTES", 1 << 62)
    shown = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert shown.exit_code == 1
    assert "GB of disk space are free here" in shown.output
    missing = CliRunner().invoke(app, ["doctor", str(tmp_path / "missing")])
    assert missing.exit_code == 2
    assert "is not a folder" in missing.output
