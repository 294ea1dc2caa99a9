"""Describe this machine and its libraries: what an issue report needs, and what is wrong."""

import os
import platform
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from apecache.arguments import AnyPath, as_path

FAISS_WHEELS = ("faiss-cpu", "faiss-gpu-cu12", "faiss-gpu-cu11", "faiss-gpu")
"""Wheels that all provide the module `faiss`."""
DEVELOPMENT_EXTRAS = ("dev", "docs")
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
    "TORCH_HOME",
)
"""Environment variables that change what a command does. None of them holds a secret."""
LOW_DISK_BYTES = 5 << 30


@dataclass(frozen=True, kw_only=True)
class DeviceReport:
    """Describe the device that `--device auto` takes."""

    name: str
    """torch's name, such as `cuda:0` or `cpu`."""
    hardware: str
    memory_bytes: int | None
    """Memory of an accelerator; None for the CPU."""
    free_bytes: int | None
    cuda_build: str | None
    """CUDA version that torch was built for; None for a build without CUDA."""


@dataclass(frozen=True, kw_only=True)
class EnvironmentReport:
    """Describe the machine, the libraries and the device."""

    system: str
    python: str
    n_cpus: int
    """Processors that this process may use."""
    n_threads: int
    """Threads that torch uses."""
    memory_bytes: int | None
    available_bytes: int | None
    """Memory that is free or can be freed; None where the system does not say."""
    disk_free_bytes: int
    """Free space where the command runs."""
    device: DeviceReport
    libraries: dict[str, str]
    """Version of apecache and of each package that it needs; empty if it is missing."""
    faiss: dict[str, str]
    """Version of each FAISS wheel that is installed."""
    extras: dict[str, dict[str, str]]
    """Versions of the packages of each extra; empty for those that are missing."""
    variables: dict[str, str]
    """Environment variables that are set."""
    problems: tuple[str, ...]
    """What does not work or is likely to fail, each with its remedy."""


def describe_environment(folder: AnyPath = ".") -> EnvironmentReport:
    """Describe this machine.

    Args:
        folder: Where stores are to be written; its file system's free space is reported.
    """
    import torch

    device = describe_device()
    requirements = own_requirements()
    libraries = {"apecache": installed_version("apecache")}
    libraries |= versions_of(requirements[""])
    extras = {}
    for extra, extra_requirements in requirements.items():
        # The FAISS wheels have a field of their own.
        if extra not in ("", "cpu", "gpu", *DEVELOPMENT_EXTRAS):
            extras[extra] = versions_of(extra_requirements)
    faiss = {}
    for wheel in FAISS_WHEELS:
        if installed_version(wheel):
            faiss[wheel] = installed_version(wheel)
    memory_bytes, available_bytes = _memory()
    disk_free_bytes = shutil.disk_usage(as_path(folder, "folder")).free
    return EnvironmentReport(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        n_cpus=_n_cpus(),
        n_threads=torch.get_num_threads(),
        memory_bytes=memory_bytes,
        available_bytes=available_bytes,
        disk_free_bytes=disk_free_bytes,
        device=device,
        libraries=libraries,
        faiss=faiss,
        extras=extras,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        problems=tuple(_problems(requirements, faiss, device, disk_free_bytes)),
    )


def describe_device() -> DeviceReport:
    """Describe the device that `--device auto` takes."""
    import torch

    from apecache.device import device_name, free_memory_bytes, is_accelerator, resolve_device

    device = resolve_device("auto")
    memory_bytes = None
    if is_accelerator(device):
        _, memory_bytes = torch.get_device_module(device).mem_get_info(device)
    return DeviceReport(
        name=str(device),
        hardware=device_name(device) or platform.processor() or platform.machine(),
        memory_bytes=memory_bytes,
        free_bytes=free_memory_bytes(device),
        cuda_build=torch.version.cuda,
    )


def installed_version(package: str) -> str:
    """Return the version of an installed package; empty if it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def versions_of(requirements: Iterable[Requirement]) -> dict[str, str]:
    """Return the installed version of each required package; empty for missing ones."""
    return {requirement.name: installed_version(requirement.name) for requirement in requirements}


def own_requirements() -> dict[str, list[Requirement]]:
    """Return the packages that apecache needs (key ""), and those of each of its extras."""
    requirements: dict[str, list[Requirement]] = {"": []}
    for line in requires("apecache") or ():
        requirement = Requirement(line)
        if requirement.name == "apecache":
            # An extra that lists other extras.
            continue
        extra = re.search(r"""extra == ['"]([^'"]+)""", str(requirement.marker or ""))
        requirements.setdefault(extra.group(1) if extra else "", []).append(requirement)
    return requirements


def has_nvidia_driver() -> bool:
    """Return whether an NVIDIA driver is loaded, whatever torch can do with it."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _problems(
    requirements: Mapping[str, Sequence[Requirement]],
    faiss: Mapping[str, str],
    device: DeviceReport,
    disk_free_bytes: int,
) -> list[str]:
    """Return what is wrong, each with its remedy."""
    problems = []
    for extra, extra_requirements in requirements.items():
        for requirement in extra_requirements:
            number = installed_version(requirement.name)
            # An extra that is missing is no problem: the user may not need it.
            if not number and not extra:
                problems.append(f"{requirement.name} is not installed; run: pip install apecache")
            if number and not requirement.specifier.contains(number, prereleases=True):
                problems.append(
                    f"{requirement.name} is {number}, expected {requirement.specifier}; run: "
                    f"pip install '{requirement.name}{requirement.specifier}'"
                )
    if not faiss:
        problems.append("no FAISS wheel is installed; run: pip install 'apecache[cpu]'")
    if len(faiss) > 1:
        wheels = " and ".join(faiss)
        problems.append(
            f"{wheels} provide the same module; uninstall both and install one: "
            "pip install 'apecache[cpu]' or 'apecache[gpu]'"
        )
    # Work on the CPU beside an idle GPU is hardly ever meant.
    if device.name == "cpu" and has_nvidia_driver():
        if device.cuda_build is None:
            problems.append(
                "there is an NVIDIA driver, but this torch was built without CUDA; install a CUDA "
                "build of torch (https://pytorch.org/get-started)"
            )
        else:
            problems.append(
                "there is an NVIDIA driver, but torch finds no CUDA device; check "
                "CUDA_VISIBLE_DEVICES and the driver's version with nvidia-smi"
            )
    if disk_free_bytes < LOW_DISK_BYTES:
        problems.append(f"only {disk_free_bytes / 1e9:.1f} GB of disk space are free here")
    return problems


def _n_cpus() -> int:
    # Containers and job schedulers grant fewer CPUs than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> tuple[int | None, int | None]:
    """Return the bytes of memory: all of it, and what is available; None where not known."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = {}
        for line in meminfo.read_text("ascii").splitlines():
            name, _, amount = line.partition(":")
            fields[name] = int(amount.split()[0]) * 1024
        return fields.get("MemTotal"), fields.get("MemAvailable")
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    return None, None
