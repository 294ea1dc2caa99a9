"""Write the model card of an exported folder: the card of the run, with the use of the format."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from apecache.errors import DataError, one_line
from apecache.runs.card_metadata import one_printable_line
from apecache.runs.load import Run
from apecache.runs.model_card import CARD, UNKNOWN, literal

USE_TITLE = "## Use"
LIBRARIES = {
    "sentence-transformers": "sentence-transformers",
    "open_clip": "open_clip",
    "transformers": "transformers",
    "onnx": "transformers.js",
    "onnx-heads": "apecache",
    "safetensors": "apecache",
}
"""The hub's `library_name` of each format."""
SNIPPETS = {
    "sentence-transformers": """\
```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("this folder")
print(model.similarity(model.encode([Image.open("photo.jpg")]), model.encode(["a dog"])))
```""",
    "open_clip": """\
```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:this folder")
tokenizer = open_clip.get_tokenizer("local-dir:this folder")
```""",
    "transformers": """\
```python
from transformers import AutoImageProcessor, AutoTokenizer, VisionTextDualEncoderModel

model = VisionTextDualEncoderModel.from_pretrained("this folder")
processor = AutoImageProcessor.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```""",
    "onnx": """\
```js
import { AutoProcessor, AutoTokenizer, CLIPTextModelWithProjection,
         CLIPVisionModelWithProjection } from "@huggingface/transformers";

const vision = await CLIPVisionModelWithProjection.from_pretrained("this folder");
const text = await CLIPTextModelWithProjection.from_pretrained("this folder");
const processor = await AutoProcessor.from_pretrained("this folder");
const tokenizer = await AutoTokenizer.from_pretrained("this folder");
```

`apecache.json` has the scale of the logits, the length of texts, and the prefix of every text.""",
    "onnx-heads": "`heads.json` says what features `image.onnx` and `text.onnx` take.",
    "safetensors": "`heads.json` describes `image.safetensors` and `text.safetensors`.",
}
"""How each format is opened."""


def exported_card(
    folder: Path,
    run: Run,
    format_name: str,
    license_name: str | None = None,
    evaluations: Sequence[Path] = (),
) -> str:
    """Return the card of an exported folder as Markdown.

    Args:
        folder: of the run; its own card has the data, the settings and the cost.
        run: the run that it holds.
        format_name: a key of `SNIPPETS`.
        license_name: as the hub names licenses; None: not stated.
        evaluations: JSON files that `apecache evaluate --json` printed.

    Raises:
        DataError: a file of figures cannot be read.
    """
    metadata, body = _card_of_run(folder)
    metadata["library_name"] = LIBRARIES[format_name]
    tags = ["apecache", *metadata.get("tags", [])]
    metadata["tags"] = list(dict.fromkeys([*tags, format_name]))
    if license_name:
        metadata["license"] = one_printable_line(license_name)
    text = yaml.safe_dump(metadata, allow_unicode=True, sort_keys=False, width=float("inf"))
    encoders = [str(getattr(run, side).encoder.get("name", UNKNOWN)) for side in ("image", "text")]
    lines = [
        f"---\n{text}---",
        body.rstrip(),
        "",
        *_figures(evaluations),
        "## License",
        "",
        "| part | license |",
        "|---|---|",
        f"| heads | {literal(license_name or UNKNOWN)} |",
        f"| image encoder {literal(Path(encoders[0]).name)} | that of its authors |",
        f"| text encoder {literal(Path(encoders[1]).name)} | that of its authors |",
        "",
        USE_TITLE,
        "",
        SNIPPETS[format_name],
        "",
    ]
    return "\n".join(lines)


def _card_of_run(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the metadata and the text of a run's card up to its section on use."""
    path = folder / CARD
    if not path.is_file():
        return {"pipeline_tag": "zero-shot-image-classification"}, "# Alignment heads"
    text = path.read_text(encoding="utf-8")
    # No name in the front matter can hold the dashes: cards are written on single lines.
    _, front, body = text.split("---\n", 2)
    return dict(yaml.safe_load(front)), body.partition(USE_TITLE)[0]


def _figures(evaluations: Sequence[Path]) -> Iterator[str]:
    """Yield a table of the figures of each evaluation, with their intervals."""
    if not evaluations:
        return
    yield "## Evaluation"
    yield ""
    yield "| data | figure | value | 95 % interval |"
    yield "|---|---|---|---|"
    for path in evaluations:
        report = _read_report(path)
        name = literal(f"{report.get('task', path.stem)}, {report.get('split', '')}".strip(", "))
        for label, value, interval in figures_of(report):
            shown = UNKNOWN if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
            yield f"| {name} | {literal(label)} | {value:.2f} | {shown} |"
    yield ""


def figures_of(
    report: Mapping[str, Any],
) -> Iterator[tuple[str, float, tuple[float, float] | None]]:
    """Yield (name, value, interval or None) of what `apecache evaluate --json` printed."""
    intervals = report.get("intervals") or {}
    for direction in ("image_to_text", "text_to_image"):
        ends = intervals.get(direction) or {}
        for k, value in (report.get(direction) or {}).items():
            yield f"{direction.replace('_', ' ')} R@{k}, %", value, _pair(ends.get(k))
    for name, value in report.items():
        # Zero-shot and probe reports are flat numbers, some with an interval beside them.
        if isinstance(value, float) and name not in intervals:
            yield name.replace("_", " "), value, _pair(report.get(f"{name}_interval"))


def _pair(ends: Any) -> tuple[float, float] | None:
    return None if ends is None else (float(ends[0]), float(ends[1]))


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is not a report ({one_line(error)}); write one with: "
            f"apecache evaluate … --json > {path.name}"
        ) from None
    return report
