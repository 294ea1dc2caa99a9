"""What a fit has cost: time, operations, memory, bytes, and energy and money where they are known.
Nothing is guessed: what no reading or report tells is None."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from apecache.errors import RunError
from apecache.store.array import FeatureArray
from apecache.store.layout import chunk_name

LEDGER = "ledger.json"


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """`loading_seconds`: store to device; `training_seconds`: all that is neither loading nor
    evaluation on dev.

    `step_flops`: matrix products of one step, forward and backward, as torch's counter counts them
    (a multiplication and an addition are two); `flops`: of all steps, evaluation left out.
    `n_samples`: pairs of image and caption that were seen. `n_negatives`: wrong candidates of each
    query in a batch, their mean over one batch where captions or images are equal and hence right;
    `nominal_batch`: images in a step. `peak_bytes`: most that torch's allocator held on the GPU
    since the fit began; None on a CPU, where torch counts nothing. `store_bytes`: what loading
    reads. `energy_joules`: the whole GPU's, by NVML; None without it, and for a fit that was broken
    off. `money`: of loading, training and evaluation at a price per hour. `extraction_seconds`:
    from the report of `apecache extract`, for both sides; `runs_until_paid`: fits like this one
    after which the cache has cost less time than the encoders in every epoch would have.
    `warnings`: of `apecache lint`.
    """

    training_seconds: float
    evaluation_seconds: float
    loading_seconds: float
    n_steps: int
    step_flops: int
    flops: int
    n_samples: int
    n_negatives: int
    nominal_batch: int
    store_bytes: int
    peak_bytes: int | None = None
    energy_joules: float | None = None
    money: float | None = None
    extraction_seconds: float | None = None
    runs_until_paid: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return self.loading_seconds + self.training_seconds + self.evaluation_seconds

    def rows(self) -> tuple[tuple[str, str | int | float], ...]:
        """Return (what, value) for tables; what is not known is left out."""
        known = {
            name: value
            for name, value in asdict(self).items()
            if value is not None and name != "warnings"
        }
        return tuple((name.replace("_", " "), value) for name, value in known.items())


def save_ledger(ledger: Ledger, run: Path) -> None:
    (run / LEDGER).write_text(
        json.dumps(asdict(ledger), indent=1, allow_nan=False) + "\n",
        encoding="utf-8",
    )


def load_ledger(run: Path) -> Ledger | None:
    """Read the ledger of a run; None where it has none: of an older version, or a combination.

    Older ledgers say in `peak_of` what `peak_bytes` was read from. The growth of the process's
    resident size is dropped: it depends on what the process did before.

    Raises:
        RunError: it is damaged.
    """
    path = run / LEDGER
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.pop("peak_of", "cuda") != "cuda":
            value["peak_bytes"] = None
        return Ledger(**{**value, "warnings": tuple(value["warnings"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({str(error).splitlines()[0]}); train again") from None


class Meter:
    """Readings from when it is made: peak memory, and energy where NVML is there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._joules = _joules(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def peak_bytes(self) -> int | None:
        """Return the most that torch's allocator held since this was made; None where torch counts
        nothing."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def joules(self) -> float | None:
        now = _joules(self.device)
        return None if now is None or self._joules is None else now - self._joules


def _joules(device: torch.device) -> float | None:
    """The GPU's counter of energy; None without a GPU, NVML's bindings, or a counter."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(
            f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        )
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
    except pynvml.NVMLError:
        return None


def stored_bytes(array: FeatureArray) -> int:
    """Bytes of files that reading the whole array reads."""
    own = sum(
        commit.objects[chunk_name(array.record, part, commit.shard)].bytes
        for commit in array.commits.values()
        for part in array.record.layout.parts
    )
    return own + sum(stored_bytes(part) for part in array.appended)


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Seconds per row that the encoders of both sides took, and of all rows."""

    image_seconds: float
    text_seconds: float
    seconds: float


def read_extraction(path: Path, arrays: tuple[FeatureArray, FeatureArray]) -> Extraction | None:
    """From what `apecache extract --json` printed; None unless that run encoded every row of both
    arrays.

    Raises:
        RunError: the file is no such report.
    """
    try:
        found = {
            (a["modality"], a["name"]): a
            for a in json.loads(path.read_text(encoding="utf-8"))["arrays"]
        }
        sides = [found.get((array.record.modality, array.name)) for array in arrays]
        whole = [
            side for side in sides if side is not None and side["n_encoded"] == side["rows"] > 0
        ]
        counts = [(float(side["seconds"]), int(side["rows"])) for side in whole]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        why = str(error).splitlines()[0]
        raise RunError(
            f"{path} is no report of extract ({why}); write one with: apecache extract --json"
        ) from None
    if len(counts) < 2 or any(
        rows != array.rows for (_, rows), array in zip(counts, arrays, strict=True)
    ):
        return None
    (image, n_images), (text, n_texts) = counts
    return Extraction(
        image_seconds=image / n_images,
        text_seconds=text / n_texts,
        seconds=image + text,
    )


def runs_until_paid(
    extraction: Extraction,
    n_images: int,
    n_samples: int,
    loading_seconds: float,
) -> int | None:
    """Fits after which extracting once and loading every time has taken less time than encoding all
    `n_images` and `n_samples` captions that a fit sees; None where it never does."""
    saved = (
        n_images * extraction.image_seconds + n_samples * extraction.text_seconds - loading_seconds
    )
    return max(1, math.ceil(extraction.seconds / saved)) if saved > 0 else None


def money(seconds: float, price_per_hour: float | None) -> float | None:
    return None if price_per_hour is None else seconds / 3600 * price_per_hour
