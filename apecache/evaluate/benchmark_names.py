"""Class names and templates of published benchmarks, out of the packages that keep them; none is
copied here.

ImageNet and its variants: names and CLIP's templates from open_clip, WordNet ids in their order
from timm. All others from the JSON files of clip_benchmark, which has templates for all of them,
and class names of those whose labels are no names (Flowers, Pets, Caltech-101, EuroSAT, SVHN,
MNIST, …); images of CIFAR, Food-101, DTD and the like come with labels that are names.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from apecache.arguments import require_type
from apecache.errors import MissingExtraError, OptionError, nearest
from apecache.evaluate.class_names import ClassNames

ENSEMBLES = {"clip-7": "SIMPLE_IMAGENET_TEMPLATES", "clip-80": "OPENAI_IMAGENET_TEMPLATES"}
"""CLIP's ensembles (Radford et al. 2021, section 3.1.4), by their names in open_clip."""
IMAGENETS = {"imagenet1k": False, "imagenetv2": False, "imagenetsketch": False}
IMAGENETS |= {"imageneta": True, "imagenetr": True, "imageneto": True}
"""Whether it has a part of ImageNet's classes only; the others are no candidates then, as
published."""
OTHER_NAMES = {
    "imagenet": "imagenet1k",
    "flowers102": "flowers",
    "oxfordpets": "pets",
    "oxfordiiitpet": "pets",
}
FROM_ONE = ("flowers",)
"""Classes are numbered from 1 where they are published."""


@dataclass(frozen=True)
class Benchmark:
    """`classes` has no names where the labels of the images are the names."""

    name: str
    classes: ClassNames
    templates: tuple[str, ...]


def load_benchmark(name: str) -> Benchmark:
    """`cifar10`, `imagenet-r`, `svhn`, …; case, `-` and `_` do not matter.

    Raises:
        MissingExtraError: the package that keeps it is not installed. OptionError: it knows no such
            benchmark.
    """
    require_type(name, str, "name")
    asked = _plain(name)
    key = OTHER_NAMES.get(asked, asked)
    if key in IMAGENETS:
        return Benchmark(key, _imagenet(IMAGENETS[key]), clip_templates("clip-80"))
    templates = {
        _plain(known): values
        for known, values in _clip_benchmark("zeroshot_classification_templates").items()
    }
    names = {_plain(known): values for known, values in _clip_benchmark("classnames").items()}
    if key not in templates:
        known = sorted({*templates, *IMAGENETS})
        raise OptionError(
            f"data set {name!r} is not known to clip_benchmark: give "
            f"--class-names{nearest(key, known)}"
        )
    classes = ClassNames(names=tuple(names.get(key, ())), origin=key, first=int(key in FROM_ONE))
    return Benchmark(
        key,
        classes,
        tuple(template.replace("{c}", "{}") for template in templates[key]),
    )


def clip_templates(name: str) -> tuple[str, ...]:
    """`clip-7` or `clip-80`. Raises MissingExtraError without open_clip."""
    return tuple(template("{}") for template in getattr(_open_clip(), ENSEMBLES[name]))


def _imagenet(part: bool) -> ClassNames:
    from timm.data import imagenet_info

    info: Any = imagenet_info.ImageNetInfo("imagenet-1k")
    synsets = tuple(info.label_names())
    return ClassNames(
        names=tuple(_open_clip().IMAGENET_CLASSNAMES),
        origin="ImageNet",
        labels=synsets,
        present_only=part,
    )


def _open_clip() -> Any:
    try:
        from open_clip import zero_shot_metadata
    except ImportError:
        raise MissingExtraError("open_clip", "open-clip") from None
    return zero_shot_metadata


@cache
def _clip_benchmark(what: str) -> dict[str, list[str]]:
    """One of its English tables by name of data set; the package itself, which opens all it can
    measure, is not imported."""
    found = find_spec("clip_benchmark")
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError("clip_benchmark", "zero-shot")
    path = Path(found.submodule_search_locations[0]) / "datasets" / f"en_{what}.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    return {name: values for name, values in table.items() if isinstance(values, list)}


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.casefold())
