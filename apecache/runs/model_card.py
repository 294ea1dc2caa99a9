"""The model card of a run: `README.md` in its folder, filled from what was recorded. What is not
known says so.

The settings are those that were used: after overrides, with the widths of the finished heads, the
batch that fitted the data, what was chosen of a closed form, and the temperature at the end.
"""

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from apecache.encoders.spec import EncoderSpec, spec_from_json
from apecache.fingerprint import Fingerprint, Json
from apecache.heads.head import HeadSpec
from apecache.metrics.retrieval import RetrievalReport
from apecache.recipes.recipe import Recipe
from apecache.runs.card_metadata import front_matter, one_printable_line
from apecache.runs.heads import TrainedHeads, TrainedSide
from apecache.runs.ledger import Ledger

CARD = "README.md"
UNKNOWN = "not stated"
SHOWN_AS_USED = (
    "loss.temperature",
    "schedule.epochs",
    "schedule.steps",
    "schedule.batch_size",
    "schedule.accumulate",
)
"""Settings of a recipe in whose place the card shows what was used."""
Row = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A run of either trainer: a sentence on what it is, what it says of its training, both
    encoders (image first). `heads`: the specs of the finished heads, or those of the recipe;
    `encoders`: those that the run names."""

    what: str
    about: Mapping[str, Json]
    image: Sequence[Row]
    text: Sequence[Row]
    heads: tuple[HeadSpec, HeadSpec]
    encoders: tuple[EncoderSpec, ...]


def save_card(
    heads: TrainedHeads,
    recipe: Recipe,
    dev: RetrievalReport,
    ledger: Ledger,
    origin: str,
    run: Path,
) -> None:
    """`origin`: where the pairs came from; of a path the last part only, since cards are
    published."""
    (run / CARD).write_text(
        model_card(heads, recipe=recipe, dev=dev, ledger=ledger, origin=origin),
        encoding="utf-8",
    )


def save_encoder_card(
    about: Mapping[str, Json],
    recipe: Recipe,
    dev: RetrievalReport,
    ledger: Ledger,
    origin: str,
    run: Path,
) -> None:
    """The same for a run of fit-encoder; `about`: its description."""
    (run / CARD).write_text(
        encoder_card(about, recipe=recipe, dev=dev, ledger=ledger, origin=origin),
        encoding="utf-8",
    )


def model_card(
    heads: TrainedHeads,
    recipe: Recipe,
    dev: RetrievalReport,
    ledger: Ledger,
    origin: str,
) -> str:
    """Markdown. Every text that comes from outside is shown literally: no markup, no HTML, one
    line."""
    what = (
        f"Alignment heads for two frozen encoders, {heads.image.head.out_dim} dimensions, fitted "
        "by apecache."
    )
    sides = (heads.image, heads.text)
    subject = Subject(
        what=what,
        about=heads.training,
        image=_head_side(heads.image),
        text=_head_side(heads.text),
        heads=(heads.image.head.spec, heads.text.head.spec),
        encoders=tuple(spec_from_json(side.encoder) for side in sides if side.encoder),
    )
    return _card(subject, recipe=recipe, dev=dev, ledger=ledger, origin=origin)


def encoder_card(
    about: Mapping[str, Json],
    recipe: Recipe,
    dev: RetrievalReport,
    ledger: Ledger,
    origin: str,
) -> str:
    """The same for a run of fit-encoder, from its description."""
    what = (
        "Two encoders and what aligns them, trained by apecache. The files hold only what "
        "training changed."
    )
    sides = (
        _tower_side(about["image"], recipe.image.kind, recipe),
        _tower_side(about["text"], recipe.text.kind, recipe),
    )
    subject = Subject(
        what=what,
        about=about,
        image=sides[0],
        text=sides[1],
        heads=(recipe.image, recipe.text),
        encoders=(
            spec_from_json(about["image"]["encoder"]),
            spec_from_json(about["text"]["encoder"]),
        ),
    )
    return _card(subject, recipe=recipe, dev=dev, ledger=ledger, origin=origin)


def _card(
    subject: Subject,
    recipe: Recipe,
    dev: RetrievalReport,
    ledger: Ledger,
    origin: str,
) -> str:
    about = subject.about
    splits = about.get("splits") or {}
    facts = [
        ("recipe", recipe.name),
        ("what it is", recipe.summary or UNKNOWN),
        ("source", recipe.source or UNKNOWN),
        ("trained parameters", f"{about.get('n_trained_parameters', 0):,}"),
        ("best epoch, chosen on dev", str(about.get("best_epoch", UNKNOWN))),
        ("seed", str(about.get("seed", UNKNOWN))),
    ]
    if about.get("init_from"):
        facts.append(("begins with the heads of fingerprint", str(about["init_from"])))
    data = [
        ("data", Path(origin).name or UNKNOWN),
        ("licence of the data", UNKNOWN),
        ("licence of these weights", UNKNOWN),
        ("fingerprint of the pairs", str(about.get("data", UNKNOWN))),
        ("training split", splits.get("train") or "train, or the only one"),
        (
            "dev split",
            splits.get("dev")
            or f"a share of the training images, seed {splits.get('seed', UNKNOWN)}",
        ),
        ("training images", f"{about.get('n_train_images', 0):,}"),
        ("dev images", f"{about.get('n_dev_images', 0):,}"),
    ]
    return front_matter(recipe.name, encoders=subject.encoders, dev=dev, origin=origin) + "\n".join(
        (
            f"# {literal(recipe.name)}",
            "",
            subject.what,
            "",
            *_table(("training", ""), [*facts, *_used_rows(about, recipe)]),
            *_table(("setting", "value used"), _setting_rows(subject, recipe)),
            "Settings of heads that are not listed have their defaults.",
            "",
            *_table(("image encoder", ""), subject.image),
            *_table(("text encoder", ""), subject.text),
            *_table(("data", ""), data),
            *_measured(dev),
            *_table(("cost", ""), [(what, _number(value)) for what, value in ledger.rows()]),
            *_warnings(ledger),
            "## Use",
            "",
            "```python",
            "import apecache",
            "",
            'model = apecache.load("this folder")',
            (
                'scores = model.similarity(model.encode_image(["photo.jpg"]), '
                'model.encode_text(["a dog"]))'
            ),
            "```",
            "",
        )
    )


def literal(text: str) -> str:
    """Text as itself in Markdown and HTML, on one line."""
    return re.sub(
        r"([\\`*_{}\[\]()#+!|~$:@-])",
        r"\\\1",
        html.escape(one_printable_line(text), quote=False),
    )


def _used_rows(about: Mapping[str, Json], recipe: Recipe) -> Iterator[Row]:
    """What the fit used where the recipe only says what was asked for; nothing for runs that do not
    record it."""
    used = about.get("used") or {}
    if used:
        yield "epochs run", f"{used['n_epochs']:,} of {used['planned_epochs']:,}"
        yield "steps", f"{used['n_steps']:,}"
        yield "temperature at the start", f"{used['first_temperature']:.4g}"
        yield "temperature at the end", f"{used['temperature']:.4g}"
    if "batch_size" in used:
        asked = recipe.schedule.batch_size
        more = (
            ""
            if used["batch_size"] == asked
            else f" (the recipe says {asked:,}; there are no more images)"
        )
        yield "images in a batch", f"{used['batch_size']:,}{more}"
        yield "batches in a step", f"{used['accumulate']:,}"
    if used.get("slice_size"):
        yield "pairs in memory at once", f"{used['slice_size']:,}"
    if about.get("autocast"):
        yield "computation of the towers", str(about["autocast"])
    for name, value in (about.get("closed_form") or {}).items():
        yield f"closed form, {name}, chosen on dev", _number(value)


def _setting_rows(subject: Subject, recipe: Recipe) -> Iterator[Row]:
    """The recipe after overrides, without what played no role: candidates of a closed form, and the
    optimizer, loss and schedule where nothing trained."""
    fixed = recipe.schedule.epochs == 0 and recipe.schedule.steps == 0
    idle = {"name", "summary", "source", "image", "text", "closed_form"}
    idle |= {"loss", "optimiser", "schedule", "augmentation"} if fixed else set()
    idle |= set() if recipe.trains_towers else {"towers"}
    values = recipe.model_dump(mode="json", exclude=idle, exclude_none=True)
    for side, spec in zip(("image", "text"), subject.heads, strict=True):
        values[side] = {
            "kind": spec.kind,
            "dim": spec.dim,
            **spec.model_dump(mode="json", exclude_defaults=True),
        }
    yield from (row for row in _flat("", values) if row[0] not in SHOWN_AS_USED)


def _flat(name: str, value: Json) -> Iterator[Row]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}" if name else key, inner)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _head_side(side: TrainedSide) -> list[Row]:
    return [
        ("encoder", public_name(spec_from_json(side.encoder)) if side.encoder else UNKNOWN),
        ("fingerprint", side.fingerprint.digest),
        ("width", str(side.head.in_dim)),
        ("head", side.head.spec.kind),
    ]


def _tower_side(side: Mapping[str, Json], head: str, recipe: Recipe) -> list[Row]:
    """Fingerprint and width are those of the encoder before training."""
    return [
        ("encoder", public_name(spec_from_json(side["encoder"]))),
        ("fingerprint", Fingerprint(fields=side["fingerprint"]).digest),
        ("width", str(side["dim"])),
        ("head", head if recipe.shared is None else "a block that both sides share"),
        ("trained parameters", f"{side['n_trained_parameters']:,}"),
        ("in training it ran", _ran(side)),
    ]


def _ran(side: Mapping[str, Json]) -> str:
    if side["cached"]:
        return "not at all: its features were read from the cache"
    return (
        "from its inputs"
        if side["cut"] is None
        else f"from the cached tokens after {side['cut']} blocks"
    )


def public_name(spec: EncoderSpec) -> str:
    """A local folder by its last part."""
    return str(replace(spec, name=spec.folder.resolve().name) if spec.folder else spec)


def _measured(dev: RetrievalReport) -> list[str]:
    """Recalls on dev, beside chance."""
    ways = (
        ("image to text", dev.image_to_text, dev.chance_image_to_text),
        ("text to image", dev.text_to_image, dev.chance_text_to_image),
    )
    rows = [
        (f"{way} R@{k}", f"{found[k]:.1f} (chance {chance[k]:.1f})")
        for way, found, chance in ways
        for k in found
    ]
    title = f"dev, {dev.n_images:,} images, {dev.n_texts:,} captions"
    return [
        *_table((title, "recall, %"), rows),
        "The epoch was chosen on these images: they are no measure of generalisation.",
        "",
    ]


def _warnings(ledger: Ledger) -> list[str]:
    if not ledger.warnings:
        return []
    return [
        "Warnings of the checks:",
        "",
        *(f"- {literal(warning)}" for warning in ledger.warnings),
        "",
    ]


def _table(columns: Row, rows: Iterable[Row]) -> list[str]:
    lines = [f"| {literal(columns[0])} | {literal(columns[1])} |", "|---|---|"]
    return [*lines, *(f"| {literal(what)} | {literal(value)} |" for what, value in rows), ""]


def _number(value: str | int | float) -> str:
    match value:
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
    return value
