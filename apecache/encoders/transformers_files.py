"""Open saved models of transformers: their parts, weights and settings. No code of theirs runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.utils import logging

from apecache.encoders.library_types import LibraryModel
from apecache.encoders.snapshot import cannot_open, refuse_kernels
from apecache.encoders.spec import EncoderSpec
from apecache.errors import EncoderError
from apecache.fingerprint import Json

NOT_IDENTITY = (
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "id2label",
    "label2id",
)


def open_saved(factory: Any, spec: EncoderSpec, folder: Path, **options: Any) -> Any:
    """Open one part of a saved model. Python code in its folder never runs."""
    refuse_kernels(spec, folder)
    try:
        return factory.from_pretrained(str(folder), **_no_code(factory), **options)
    except Exception as error:  # the libraries below share no base class of errors
        raise cannot_open(spec, error) from error


def _no_code(factory: Any) -> dict[str, bool]:
    # Where nothing is said, the library asks on standard input and runs the code after a yes.
    # Its classes for one architecture never ask, and take the option as one of the model's.
    asks = factory in (AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer)
    return {"trust_remote_code": False} if asks else {}


def load_model(
    spec: EncoderSpec,
    folder: Path,
    factory: Any,
    may_lack: tuple[str, ...],
    **options: Any,
) -> tuple[Any, list[str]]:
    """Load the model in float32.

    Args:
        may_lack: words in the names of parameters that are not used, so may be missing.
        options: of the library's `from_pretrained`.

    Returns:
        The model, and the sorted names of its parameters that the files do not hold.

    Raises:
        EncoderError: a parameter is missing or has another shape.
    """
    # Without ignore_mismatched_sizes transformers raises an error of its own at the first one.
    with _quiet(local=spec.folder is not None):
        module, report = open_saved(
            factory,
            spec,
            folder,
            output_loading_info=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            **options,
        )
    missing = sorted(report["missing_keys"])
    lost = [name for name in missing if not any(word in name for word in may_lack)]
    lost += [name for name, *_ in report["mismatched_keys"]]
    if lost:
        is_pooler = all("pooler" in name for name in lost)
        remedy = "; its own pooling is not known, so give --image-cut mean or cls"
        raise EncoderError(
            f"encoder {spec}: its files lack {len(lost)} parameters of "
            f"{type(module).__name__}: {lost[0]}, …{remedy if is_pooler else ''}"
        )
    return module, missing


@contextmanager
def _quiet(local: bool) -> Iterator[None]:
    """Silence the library's report of unused weights, and its progress bar for a local folder."""
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if local:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def describe_architecture(module: LibraryModel, folder: Path) -> Json:
    """Return the class and the settings of config.json.

    The same weights with another number of heads give other features.
    """
    settings, _ = module.config.get_config_dict(str(folder))
    identity = {key: settings[key] for key in sorted(settings) if key not in NOT_IDENTITY}
    return {"class": type(module).__name__, **identity}
