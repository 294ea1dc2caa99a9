"""Find the folder with an encoder's files: a local one, or the snapshot of a hub repository.

Everything else reads that folder, so a model gives the same features by folder and by hub id.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from apecache.encoders.spec import EncoderSpec
from apecache.errors import EncoderError, nearest, one_line

DESCRIPTION_PATTERNS = ("*.json", "*.jinja", "*.md", "*.model", "*.tiktoken", "*.txt")
IGNORED_PATTERNS = ("onnx/*", "openvino/*", ".git*")
CARD = "README.md"
CONFIG_PATTERNS = ("config.json", "sentence_*_config.json", "[0-9]*_*/config.json")
ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")
OWN_ATTENTIONS = ("eager", "sdpa")
"""Attentions that need no other package."""
WELL_KNOWN = (
    "bert-base-uncased",
    "facebook/dino-vitb16",
    "facebook/dinov2-base",
    "facebook/dinov2-small",
    "google-bert/bert-base-multilingual-cased",
    "google/vit-base-patch16-224",
    "intfloat/multilingual-e5-small",
    "princeton-nlp/unsup-simcse-bert-base-uncased",
    "roberta-base",
    "sentence-transformers/all-MiniLM-L6-v2",
    "sentence-transformers/all-mpnet-base-v2",
)
"""Only to suggest a name when one cannot be found."""


def resolve_folder(
    spec: EncoderSpec,
    weights: Sequence[Sequence[str]] = (),
    modules: Sequence[str] = (),
    repository: str | None = None,
) -> Path:
    """Return the folder with the files of an encoder.

    A hub repository is downloaded to the hub's cache; offline the cached snapshot is taken.

    Args:
        weights: patterns of weight files, the preferred ones first. The later ones are fetched
            only if the repository has no file of an earlier one. Empty: descriptions only.
        modules: patterns of other files that are needed.
        repository: the hub id; None: the spec's name.

    Raises:
        EncoderError: no such repository or revision, or no network and no cached snapshot.
    """
    if spec.folder is not None:
        return spec.folder
    repository = repository or spec.name
    described = (*DESCRIPTION_PATTERNS, *modules)
    folder = download(
        spec,
        repository=repository,
        patterns=described,
        revision=spec.revision,
    )
    for patterns in weights:
        # Files that are cached already are not fetched again, and some may be missing.
        download(
            spec,
            repository=repository,
            patterns=(*described, *patterns),
            revision=spec.revision,
        )
        if any(any(folder.glob(pattern)) for pattern in patterns):
            break
    return folder


def download(
    spec: EncoderSpec,
    repository: str,
    patterns: Sequence[str] = DESCRIPTION_PATTERNS,
    revision: str | None = None,
) -> Path:
    """Return the snapshot of a hub repository. Raises EncoderError as `resolve_folder` does."""
    from huggingface_hub import constants

    try:
        return _snapshot(
            repository,
            revision=revision,
            patterns=tuple(patterns),
            cache_folder=str(constants.HF_HUB_CACHE),
        )
    except Exception as error:  # the hub client's errors share no base class
        raise cannot_open(spec, error) from error


@lru_cache(maxsize=256)
def _snapshot(
    repository: str,
    revision: str | None,
    patterns: tuple[str, ...],
    cache_folder: str,
) -> Path:
    """Download what fits the patterns, once in a process: every load asks several times."""
    from huggingface_hub import snapshot_download

    snapshot = snapshot_download(
        repository,
        revision=revision,
        cache_dir=cache_folder,
        allow_patterns=list(patterns),
        ignore_patterns=list(IGNORED_PATTERNS),
    )
    return Path(snapshot)


def cannot_open(spec: EncoderSpec, error: Exception) -> EncoderError:
    """Return the error for files that a library cannot open, with its first line and a remedy."""
    message = str(error)
    if "trust_remote_code" in message:
        return EncoderError(
            f"encoder {spec} needs Python code of its own repository, which apecache never runs; "
            "choose a model that the installed library knows"
        )
    if _lacks_tokenizer_package(message):
        return EncoderError(
            f"encoder {spec} has no tokenizer.json, and its tokenizer needs sentencepiece; install "
            "it with: pip install 'apecache[sentencepiece]'"
        )
    lines = (line for line in message.splitlines() if line.strip())
    first_line = next(lines, type(error).__name__)
    suggestion = nearest(spec.name, WELL_KNOWN) if spec.library == "hf" else ""
    return EncoderError(
        f"encoder {spec} cannot be opened ({one_line(first_line)}){suggestion} "
        f"Or give {spec.library}:/folder"
    )


def _lacks_tokenizer_package(message: str) -> bool:
    """Tell whether an error asks for one of the packages that read other tokenizers' files."""
    lowered = message.lower()
    asks = any(word in lowered for word in ("install", "no module named", "requires"))
    # Without sentencepiece transformers tries tiktoken, and names only that one.
    return asks and any(name in lowered for name in ("sentencepiece", "tiktoken", "protobuf"))


def is_whole(spec: EncoderSpec, folder: Path) -> bool:
    """Tell whether a folder is known to hold all descriptions of its repository.

    Another program may have cached some files of a hub repository only. A model card, a list of
    modules or the hub client's listing shows that this one's were not left out.
    """
    if spec.folder is not None:
        return True
    listing = folder.parents[1] / "trees" / f"{folder.name}.json"
    return any(path.is_file() for path in (folder / CARD, folder / "modules.json", listing))


def repository_of(spec: EncoderSpec, folder: Path) -> str | None:
    """Return the hub id of an encoder: its name, or what the cache's folder is named after."""
    if spec.folder is None:
        return spec.name
    resolved = folder.resolve()
    for snapshots in (resolved.parent, folder.absolute().parent):
        cached = snapshots.parent.name
        if snapshots.name == "snapshots" and cached.startswith("models--"):
            return cached.removeprefix("models--").replace("--", "/")
    return None


def read_json(path: Path, spec: EncoderSpec) -> dict[str, Any]:
    """Read a JSON object; an empty one if there is no such file.

    Raises:
        EncoderError: not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EncoderError(
            f"encoder {spec}: {path.name} is not JSON ({one_line(error)}); download it again"
        ) from None
    if not isinstance(content, dict):
        raise EncoderError(f"encoder {spec}: {path.name} is not a JSON object; download it again")
    return content


def refuse_code(spec: EncoderSpec, folder: Path, is_known: Callable[[str], bool]) -> None:
    """Refuse a folder whose list of modules names classes of another package.

    Args:
        is_known: whether a dotted class name belongs to the library that will open the folder.

    Raises:
        EncoderError: the class of a module is not the library's.
    """
    for module in read_modules(folder, spec):
        class_name = str(module.get("type", ""))
        if not is_known(class_name):
            raise EncoderError(
                f"encoder {spec}: modules.json names {class_name}, Python code of its own "
                "repository, which apecache never runs; choose another model"
            )


def refuse_kernels(spec: EncoderSpec, folder: Path) -> None:
    """Refuse a folder whose configuration names an attention that is not the library's own.

    With the package `kernels` installed, transformers downloads such code and runs it.

    Raises:
        EncoderError: a configuration names such an attention.
    """
    for pattern in CONFIG_PATTERNS:
        for path in sorted(folder.glob(pattern)):
            described = read_json(path, spec)
            for key in ATTENTION_KEYS:
                for name in true_keys(described, key):
                    _require_own_attention(spec, path.name, name)


def _require_own_attention(spec: EncoderSpec, file_name: str, name: Any) -> None:
    names = list(name.values()) if isinstance(name, dict) else [name]
    for single_name in names:
        if single_name is not None and single_name not in OWN_ATTENTIONS:
            raise EncoderError(
                f"encoder {spec}: {file_name} asks for the attention {single_name!r}, code from "
                "elsewhere, which apecache never runs; take attn_implementation out of the file"
            )


def read_modules(folder: Path, spec: EncoderSpec) -> list[dict[str, Any]]:
    """Read modules.json; an empty list without one.

    Raises:
        EncoderError: not a list of JSON objects.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return []
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        modules = None
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise EncoderError(f"encoder {spec}: modules.json is not a list of modules")
    return modules


def true_keys(value: Any, name: str) -> Iterator[Any]:
    """Yield every value but false and null under `name`, at any depth of a JSON value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == name and inner not in (None, False):
                yield inner
            yield from true_keys(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from true_keys(inner, name)
