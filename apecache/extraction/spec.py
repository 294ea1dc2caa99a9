"""Choose what an extraction encodes, with which encoders, and how."""

from dataclasses import dataclass
from os import cpu_count
from typing import Literal

from apecache.arguments import AnyPath, require_type
from apecache.data.augment import Views
from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.spec import EncoderSpec, Precision
from apecache.extraction.device_decoding import DecodeDevice
from apecache.extraction.shard_range import WHOLE, ShardRange
from apecache.fingerprint import Json

FEW_CORES = 2
MAX_WORKERS = 16
LEAST_TOLERANCE = 1e-4
"""1 - cosine up to which equal rows may differ by libraries, batches and devices."""


def default_workers(cores: int | None = None) -> int:
    """Return the number of decoding processes: one for each core, 0 for threads.

    Args:
        cores: None: those of this machine.
    """
    cores = cores or cpu_count() or 1
    # On few cores processes take time from the model's own threads, and decoding in threads is
    # faster (benchmarks/speed/extract compares both).
    return 0 if cores <= FEW_CORES else min(MAX_WORKERS, cores)


@dataclass(frozen=True, kw_only=True)
class MeasuredPrecision:
    """Hold the error of a model in one precision against float32, on real rows."""

    model: EncoderSpec
    """In that precision, whichever its cuts."""
    error: float
    """Largest 1 - cosine of a row."""
    n_rows: int
    seconds: float
    """Of encoding these rows."""

    @property
    def tolerance(self) -> float:
        """Return the 1 - cosine up to which rows of this precision count as equal."""
        # Two roundings of one row are each as far as the error from float32.
        return max(LEAST_TOLERANCE, 2 * self.error)

    def to_json(self) -> Json:
        return {
            "name": self.model.dtype,
            "error": self.error,
            "rows": self.n_rows,
            "tolerance": self.tolerance,
        }


@dataclass(frozen=True)
class ExtractSpec:
    """Say what to encode and how.

    `None` leaves a choice to the store (when resuming) or to the machine (when new).
    """

    image: EncoderSpec | tuple[EncoderSpec, ...] | None = None
    """One encoder or several; cuts of one model cost one forward pass."""
    text: EncoderSpec | tuple[EncoderSpec, ...] | None = None
    """As `image`."""
    image_batch: int | None = None
    text_batch: int | None = None
    text_batch_tokens: int | None = None
    """Most tokens of a batch of captions, padding included: a batch has more captions where they
    are short. None: for new arrays 16,384 on accelerators, unless `text_batch` is given; on a CPU
    only `text_batch` limits a batch."""
    shard_rows: int | None = None
    storage_dtype: Literal["float16", "float32", "int8"] = "float16"
    workers: int | None = None
    """Processes that decode, 0 for threads of this process; None: `default_workers`."""
    hang_seconds: float = 30.0
    """How long a decoding process may take for one image."""
    max_bad: float = 0.01
    """Share of rows that may be unreadable. Beyond it the run ends as an error, after encoding all
    other rows."""
    device: str = "auto"
    add: bool = False
    """Put features of another encoder beside those that the store has."""
    recheck: bool = False
    """Hash every image, also where size and time of its file have not changed."""
    retry: bool = False
    """Try rows again that could not be encoded, also where their inputs have not changed."""
    reuse: AnyPath | None = None
    """Another store, whose features are taken where content and fingerprint are equal."""
    single_writer: bool = False
    """Nobody else writes to the store, so object storage without put-if-absent can be used."""
    views: Views | None = None
    """Augmentations to encode in place of each image."""
    compiled: bool | None = None
    """Run encoders by TorchInductor, unless the cut is after a block. Captions are then padded to
    one of a few lengths, each of which is compiled. None: image encoders only, for 4,096 images and
    ten minutes of encoding or more, if a measured compiled batch takes less than 0.9 of the
    time."""
    decode: DecodeDevice | None = None
    """Where JPEG files are decoded: on the CPU, or by nvJPEG on CUDA, whose pixels differ. None:
    for arrays that the store has, where theirs were; for new ones on the CPU."""
    precision: Precision | None = None
    """Precision of all encoders. None: for arrays that the store has, theirs; for new ones that of
    each `EncoderSpec` unless it is float32; on a CPU float32; else the fastest one whose features
    of 256 rows have 1 - cosine to float32 of at most 1e-4. Ray's actors do not measure: they use
    float32."""
    measured: tuple[MeasuredPrecision, ...] = ()
    """Errors of the precisions of new arrays; `extract` fills it in."""
    part: ShardRange = WHOLE
    """The shards to encode; other jobs may encode the rest at the same time."""

    @property
    def images(self) -> tuple[EncoderSpec, ...]:
        return _several(self.image, "image")

    @property
    def texts(self) -> tuple[EncoderSpec, ...]:
        return _several(self.text, "text")

    @property
    def decoders(self) -> int:
        """Return the number of decoding processes; 0 for threads."""
        return default_workers() if self.workers is None else self.workers

    def batch(self, encoder: ImageEncoder | TextEncoder) -> int | None:
        """Return the batch size that is asked for, if any."""
        return self.image_batch if isinstance(encoder, ImageEncoder) else self.text_batch


def _several(
    specs: EncoderSpec | tuple[EncoderSpec, ...] | None,
    name: str,
) -> tuple[EncoderSpec, ...]:
    """Return one or several encoders as a tuple without repetitions."""
    if specs is None:
        return ()
    several = specs if isinstance(specs, tuple | list) else (specs,)
    for spec in several:
        require_type(spec, EncoderSpec, name)
    return tuple(dict.fromkeys(several))
