"""Record what a fit cost: time, operations, memory, bytes, and, where known, energy and money.

Nothing is guessed: a value without a reading or report is None.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from apecache.device import is_accelerator
from apecache.errors import RunError, raise_if_refused
from apecache.storage.replace import replace_text
from apecache.store.array import FeatureArray
from apecache.store.layout import chunk_name

LEDGER = "ledger.json"


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """List the costs of one fit."""

    training_seconds: float
    """Time that is neither loading nor evaluation on dev."""
    evaluation_seconds: float
    """Time of evaluation on dev."""
    loading_seconds: float
    """Time from the store to the device."""
    n_steps: int
    """Optimizer steps."""
    step_flops: int
    """Operations in the matrix products of one step, forward and backward, by torch's counter.

    A multiplication and an addition are two operations.
    """
    flops: int
    """Operations of all steps, without evaluation."""
    n_samples: int
    """Pairs of image and caption that training read, with repetitions."""
    n_negatives: int
    """Wrong candidates of each query in a batch.

    The mean over one batch if equal captions or images make some candidates right.
    """
    nominal_batch: int
    """Images in a step."""
    store_bytes: int
    """Bytes of the files that loading reads."""
    peak_bytes: int | None = None
    """Most bytes that torch's allocator held on the GPU during the fit; None on a CPU."""
    energy_joules: float | None = None
    """Energy of the whole GPU by NVML; None without NVML, and for a fit that was resumed."""
    money: float | None = None
    """Price of loading, training and evaluation, in the currency of the price per hour."""
    extraction_seconds: float | None = None
    """Time of extraction for both sides, from the report of `apecache extract`."""
    runs_until_paid: int | None = None
    """Fits like this one after which the cache has saved more time than it cost."""
    warnings: tuple[str, ...] = ()
    """Warnings of `apecache lint`."""

    @property
    def seconds(self) -> float:
        """Time of loading, training and evaluation."""
        return self.loading_seconds + self.training_seconds + self.evaluation_seconds

    def rows(self) -> tuple[tuple[str, str | int | float], ...]:
        """Return (label, value) for tables, without unknown values."""
        rows: list[tuple[str, str | int | float]] = []
        for name, value in asdict(self).items():
            if value is not None and name != "warnings":
                rows.append((name.replace("_", " "), value))
        return tuple(rows)


def save_ledger(ledger: Ledger, run: Path) -> None:
    """Write the ledger into a run folder."""
    text = json.dumps(asdict(ledger), indent=1, allow_nan=False)
    replace_text(run / LEDGER, text + "\n")


def load_ledger(run: Path) -> Ledger | None:
    """Read the ledger of a run.

    Returns:
        The ledger; None for runs of older versions and for combinations, which have none.

    Raises:
        RunError: The file is damaged.
    """
    path = run / LEDGER
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        # Older ledgers name the source of `peak_bytes`. Growth of the process's resident size is
        # dropped: it depends on what the process did before the fit.
        if value.pop("peak_of", "cuda") != "cuda":
            value["peak_bytes"] = None
        warnings = tuple(value["warnings"])
        return Ledger(**{**value, "warnings": warnings})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise_if_refused(path)
        raise RunError(f"{path} is damaged ({str(error).splitlines()[0]}); train again") from None


class ResourceMeter:
    """Read peak memory, and energy where NVML is available, since its construction."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._joules = _joules(device)
        # The peak of an earlier fit in this process must not count.
        if is_accelerator(device):
            torch.get_device_module(device).reset_peak_memory_stats(device)

    def peak_bytes(self) -> int | None:
        """Return the most bytes that torch's allocator held; None where torch does not count."""
        if not is_accelerator(self.device):
            return None
        return int(torch.get_device_module(self.device).max_memory_allocated(self.device))

    def joules(self) -> float | None:
        """Return the energy that the GPU used; None if it is not known."""
        now = _joules(self.device)
        return None if now is None or self._joules is None else now - self._joules


def _joules(device: torch.device) -> float | None:
    """Read the GPU's energy counter; None without a GPU, NVML's bindings, or a counter."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        # By UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, but not NVML's.
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        millijoules = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return float(millijoules) / 1000
    except pynvml.NVMLError:
        return None


def stored_bytes(array: FeatureArray) -> int:
    """Add up the bytes of the files that hold a whole array."""
    n_bytes = 0
    for commit in array.commits.values():
        for layout_part in array.record.layout.parts:
            chunk = chunk_name(array.record, layout_part, commit.shard)
            n_bytes += commit.objects[chunk].bytes
    return n_bytes + sum(stored_bytes(appended) for appended in array.appended)


@dataclass(frozen=True, kw_only=True)
class ExtractionSeconds:
    """Hold how long the encoders of both sides took."""

    image_seconds: float
    """Time per image."""
    text_seconds: float
    """Time per caption."""
    seconds: float
    """Time of all rows of both sides."""


def read_extraction(
    path: Path,
    arrays: tuple[FeatureArray, FeatureArray],
) -> ExtractionSeconds | None:
    """Read the times of extraction from what `apecache extract --json` printed.

    Returns:
        The times; None unless that run encoded every row of both arrays.

    Raises:
        RunError: The file is not such a report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        entries = {(entry["modality"], entry["name"]): entry for entry in report["arrays"]}
        complete_entries = []
        for array in arrays:
            entry = entries.get((array.record.modality, array.name))
            # A resumed extraction timed only some of the rows, so its time is not used.
            if entry is not None and entry["n_encoded"] == entry["rows"] > 0:
                complete_entries.append(entry)
        seconds_and_rows = [
            (float(entry["seconds"]), int(entry["rows"])) for entry in complete_entries
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise_if_refused(path)
        why = str(error).splitlines()[0]
        raise RunError(
            f"{path} is not a report of extract ({why}); write one with: apecache extract --json"
        ) from None
    if len(seconds_and_rows) < 2:
        return None
    (image_seconds, n_images), (text_seconds, n_texts) = seconds_and_rows
    if n_images != arrays[0].rows or n_texts != arrays[1].rows:
        return None
    return ExtractionSeconds(
        image_seconds=image_seconds / n_images,
        text_seconds=text_seconds / n_texts,
        seconds=image_seconds + text_seconds,
    )


def runs_until_paid(
    extraction: ExtractionSeconds,
    n_images: int,
    n_samples: int,
    loading_seconds: float,
) -> int | None:
    """Count the fits after which the cache has saved more time than extraction took.

    A fit with the cache loads features; without it a fit encodes all its images and captions.

    Args:
        extraction: Times of the encoders.
        n_images: Images that a fit reads, with repetitions.
        n_samples: Captions that a fit reads, with repetitions.
        loading_seconds: Time to load the features for a fit.

    Returns:
        Number of fits, at least 1; None if loading takes longer than encoding.
    """
    encoding_seconds = n_images * extraction.image_seconds + n_samples * extraction.text_seconds
    saved_seconds = encoding_seconds - loading_seconds
    if saved_seconds > 0:
        return max(1, math.ceil(extraction.seconds / saved_seconds))
    return None


def money(seconds: float, price_per_hour: float | None) -> float | None:
    """Return the price of a time; None without a price per hour."""
    return None if price_per_hour is None else seconds / 3600 * price_per_hour
