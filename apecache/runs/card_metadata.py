"""Write the YAML front matter of a model card, in the form that the Hugging Face hub reads."""

import re
from collections.abc import Iterable
from pathlib import Path

import yaml

from apecache.encoders.spec import EncoderSpec, looks_local
from apecache.fingerprint import Json
from apecache.metrics.retrieval import RetrievalReport

HUB_LIBRARIES = ("hf", "st")
"""Libraries whose encoder names are hub ids. Names of timm and open_clip are names of weights."""
HUB_PREFIX = "hf-hub:"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def front_matter(
    name: str,
    encoders: Iterable[EncoderSpec],
    dev: RetrievalReport,
    origin: str,
) -> str:
    """Write the metadata of a card, with the lines of dashes around it.

    Unknown values, such as the license, are left out.

    Args:
        name: Name of the model.
        encoders: Encoders of the model. Only hub ids are named.
        dev: Recalls on the dev split.
        origin: Where the pairs came from. Of a path only the last part is shown.
    """
    metadata: dict[str, Json] = {
        "library_name": "apecache",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["apecache", "image-text-retrieval", "zero-shot-image-classification"],
    }
    base_models: list[str] = []
    for encoder in encoders:
        hub_id = hub_id_of(encoder)
        if hub_id is not None and hub_id not in base_models:
            base_models.append(hub_id)
    if base_models:
        metadata["base_model"] = base_models
    # On one line no name can hold the dashes that end the front matter.
    model_name = one_printable_line(name)
    metadata["model-index"] = [{"name": model_name, "results": [_result(dev, origin)]}]
    # An infinite width keeps each value on one line.
    text = yaml.safe_dump(metadata, allow_unicode=True, sort_keys=False, width=float("inf"))
    return f"---\n{text}---\n"


def hub_id_of(encoder: EncoderSpec) -> str | None:
    """Return an encoder's name if it is a hub id; None for local folders and other names."""
    if encoder.folder is not None or looks_local(encoder.name):
        return None
    if encoder.library not in HUB_LIBRARIES and not encoder.name.startswith(HUB_PREFIX):
        return None
    name = encoder.name.removeprefix(HUB_PREFIX)
    return name if HUB_ID.fullmatch(name) else None


def one_printable_line(text: str) -> str:
    """Replace line ends and what cannot be printed by spaces, and join runs of spaces."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())


def _result(dev: RetrievalReport, origin: str) -> dict[str, Json]:
    """Return the dev recalls in the hub's `model-index` form, in percent."""
    directions = (
        ("image_to_text", dev.image_to_text, dev.chance_image_to_text),
        ("text_to_image", dev.text_to_image, dev.chance_text_to_image),
    )
    metrics: list[Json] = []
    for direction, recalls, chance in directions:
        for k, recall in recalls.items():
            metric = {
                "type": f"{direction}_recall_at_{k}",
                "name": f"{direction.replace('_', ' ')} R@{k}, %",
                "value": round(recall, 2),
                "args": {"chance": round(chance[k], 2)},
            }
            metrics.append(metric)
    dataset_name = one_printable_line(Path(origin).name)
    return {
        "task": {"type": "image-text-retrieval", "name": "Image-text retrieval"},
        "dataset": {
            "type": "image-text-pairs",
            "name": dataset_name or "not stated",
            "split": "dev",
            "args": {"n_images": dev.n_images, "n_texts": dev.n_texts, "chosen_on": True},
        },
        "metrics": metrics,
    }
