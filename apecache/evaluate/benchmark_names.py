"""Read class names and templates of published benchmarks from the packages that ship them.

ImageNet and its variants: names and CLIP's templates from open_clip, ordered WordNet ids from timm.
All others: the JSON files of clip_benchmark. It has templates for all of them, and class names
where the labels of the images are not names (Flowers, Pets, Caltech-101, EuroSAT, SVHN, MNIST, …).
Images of CIFAR, Food-101, DTD and similar sets have labels that are names.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from apecache.arguments import require_type
from apecache.errors import MissingExtraError, OptionError, nearest
from apecache.evaluate.class_names import ClassNames

ENSEMBLES = {"clip-7": "SIMPLE_IMAGENET_TEMPLATES", "clip-80": "OPENAI_IMAGENET_TEMPLATES"}
"""CLIP's ensembles (Radford et al. 2021, section 3.1.4), by their names in open_clip."""
IMAGENETS = {"imagenet1k": False, "imagenetv2": False, "imagenetsketch": False}
IMAGENETS |= {"imageneta": True, "imagenetr": True, "imageneto": True}
"""Whether a variant has some of ImageNet's classes only. The other classes are then not candidates,
as in the publications."""
OTHER_NAMES = {
    "imagenet": "imagenet1k",
    "flowers102": "flowers",
    "oxfordpets": "pets",
    "oxfordiiitpet": "pets",
}
"""Other spellings of names of clip_benchmark."""
FROM_ONE = ("flowers",)
"""Classes are numbered from 1 where they are published."""


@dataclass(frozen=True)
class Benchmark:
    """Hold the classes and templates of a benchmark."""

    name: str
    classes: ClassNames
    """Without names if the labels of the images are the names."""
    templates: tuple[str, ...]
    """With `{}` for the class name."""


def load_benchmark(name: str) -> Benchmark:
    """Load a benchmark by its name: `cifar10`, `imagenet-r`, `svhn`, ….

    Case, `-` and `_` do not matter.

    Raises:
        MissingExtraError: the package that ships it is not installed.
        OptionError: the package has no such benchmark.
    """
    require_type(name, str, "name")
    plain_name = _plain(name)
    key = OTHER_NAMES.get(plain_name, plain_name)
    if key in IMAGENETS:
        return Benchmark(key, _imagenet(IMAGENETS[key]), clip_templates("clip-80"))
    templates = _by_plain_name(_clip_benchmark("zeroshot_classification_templates"))
    names = _by_plain_name(_clip_benchmark("classnames"))
    if key not in templates:
        benchmarks = sorted({*templates, *IMAGENETS})
        raise OptionError(
            f"data set {name!r} is not known to clip_benchmark: give "
            f"--class-names{nearest(key, benchmarks)}"
        )
    classes = ClassNames(names=tuple(names.get(key, ())), origin=key, first=int(key in FROM_ONE))
    prompts = tuple(template.replace("{c}", "{}") for template in templates[key])
    return Benchmark(key, classes, prompts)


def clip_templates(name: str) -> tuple[str, ...]:
    """Return the templates of `clip-7` or `clip-80`.

    Raises:
        MissingExtraError: open_clip is not installed.
    """
    templates = getattr(_open_clip(), ENSEMBLES[name])
    # In open_clip a template is a function of the class name.
    return tuple(template("{}") for template in templates)


def _imagenet(present_only: bool) -> ClassNames:
    from timm.data import imagenet_info

    info: Any = imagenet_info.ImageNetInfo("imagenet-1k")
    synsets = tuple(info.label_names())
    return ClassNames(
        names=tuple(_open_clip().IMAGENET_CLASSNAMES),
        origin="ImageNet",
        labels=synsets,
        present_only=present_only,
    )


def _open_clip() -> ModuleType:
    try:
        from open_clip import zero_shot_metadata
    except ImportError:
        raise MissingExtraError("open_clip", "open-clip") from None
    metadata: ModuleType = zero_shot_metadata
    return metadata


@cache
def _clip_benchmark(table_name: str) -> dict[str, list[str]]:
    """Read one of its English tables, by name of data set."""
    # Found, not imported: the import would load every library that it can measure.
    package = find_spec("clip_benchmark")
    if package is None or not package.submodule_search_locations:
        raise MissingExtraError("clip_benchmark", "zero-shot")
    path = Path(package.submodule_search_locations[0]) / "datasets" / f"en_{table_name}.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    return {name: values for name, values in table.items() if isinstance(values, list)}


def _by_plain_name(table: dict[str, list[str]]) -> dict[str, list[str]]:
    return {_plain(data_set): values for data_set, values in table.items()}


def _plain(name: str) -> str:
    """Return a name for comparison: lower case, without `-`, `_` and spaces."""
    return re.sub(r"[-_ ]", "", name.casefold())
