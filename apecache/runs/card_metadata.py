"""The YAML front matter of a model card, in the form that the Hugging Face hub reads."""

import re
from collections.abc import Iterable
from pathlib import Path

import yaml

from apecache.encoders.spec import EncoderSpec, looks_local
from apecache.fingerprint import Json
from apecache.metrics.retrieval import RetrievalReport

HUB_LIBRARIES = ("hf", "st")
"""Libraries whose encoder names are ids of the hub; timm's and open_clip's names are those of
weights."""
HUB_PREFIX = "hf-hub:"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def front_matter(
    name: str,
    encoders: Iterable[EncoderSpec],
    dev: RetrievalReport,
    origin: str,
) -> str:
    """Write the metadata of a card, with the lines of dashes around it.

    What is not known, such as the license, is left out. Every text is put on one line first, so
    that no name can end the front matter.

    Args:
        name: of the model.
        encoders: those that it is made of; only hub ids are named.
        dev: the recalls on the dev split.
        origin: where the pairs came from; the last part of a path is shown.
    """
    metadata: dict[str, Json] = {
        "library_name": "apecache",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["apecache", "image-text-retrieval", "zero-shot-image-classification"],
    }
    base_models = list(
        dict.fromkeys(hub_id for encoder in encoders if (hub_id := hub_id_of(encoder)) is not None)
    )
    if base_models:
        metadata["base_model"] = base_models
    metadata["model-index"] = [
        {"name": one_printable_line(name), "results": [_result(dev, origin)]}
    ]
    text = yaml.safe_dump(metadata, allow_unicode=True, sort_keys=False, width=float("inf"))
    return f"---\n{text}---\n"


def hub_id_of(encoder: EncoderSpec) -> str | None:
    """Return the hub id that an encoder's name is; None for local folders and for names of other
    kinds."""
    if encoder.folder is not None or looks_local(encoder.name):
        return None
    if encoder.library not in HUB_LIBRARIES and not encoder.name.startswith(HUB_PREFIX):
        return None
    name = encoder.name.removeprefix(HUB_PREFIX)
    return name if HUB_ID.fullmatch(name) else None


def one_printable_line(text: str) -> str:
    """Replace line ends and what cannot be printed by spaces, and join runs of spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _result(dev: RetrievalReport, origin: str) -> dict[str, Json]:
    ways = (
        ("image_to_text", dev.image_to_text, dev.chance_image_to_text),
        ("text_to_image", dev.text_to_image, dev.chance_text_to_image),
    )
    metrics = [
        {
            "type": f"{way}_recall_at_{k}",
            "name": f"{way.replace('_', ' ')} R@{k}, %",
            "value": round(recall, 2),
            "args": {"chance": round(chance[k], 2)},
        }
        for way, recalls, chance in ways
        for k, recall in recalls.items()
    ]
    return {
        "task": {"type": "image-text-retrieval", "name": "Image-text retrieval"},
        "dataset": {
            "type": "image-text-pairs",
            "name": one_printable_line(Path(origin).name) or "not stated",
            "split": "dev",
            "args": {"n_images": dev.n_images, "n_texts": dev.n_texts, "chosen_on": True},
        },
        "metrics": metrics,
    }
