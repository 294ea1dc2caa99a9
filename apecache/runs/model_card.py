"""Write the model card of a run: `README.md` in its folder, filled from what was recorded.

Unknown values are marked as such. Settings are shown as used: after overrides, with the widths of
the finished heads, the batch size that the data allowed, the chosen settings of a closed form, and
the temperature at the end.
"""

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from apecache.encoders.spec import EncoderSpec, spec_from_json
from apecache.errors import counted
from apecache.fingerprint import Fingerprint, Json
from apecache.heads.head import HeadSpec
from apecache.metrics.retrieval import RetrievalReport
from apecache.recipes.recipe import Recipe
from apecache.runs.card_metadata import front_matter, one_printable_line
from apecache.runs.heads import TrainedHeads, TrainedSide
from apecache.runs.ledger import Ledger
from apecache.storage.replace import replace_text

CARD = "README.md"
UNKNOWN = "not stated"
SHOWN_AS_USED = (
    "loss.temperature",
    "schedule.epochs",
    "schedule.steps",
    "schedule.batch_size",
    "schedule.accumulate",
)
"""Settings that the card replaces by the values that were used."""
USE = (
    "## Use",
    "",
    "```python",
    "import apecache",
    "",
    'model = apecache.load("this folder")',
    'scores = model.similarity(model.encode_image(["photo.jpg"]), model.encode_text(["a dog"]))',
    "```",
    "",
)
"""Lines at the end of a card: how to load the run."""
Row = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class CardSubject:
    """Describe a run of either trainer."""

    what: str
    """Sentence that says what the run is."""
    about: Mapping[str, Json]
    """What the run recorded of its training."""
    image: Sequence[Row]
    """Rows on the image encoder."""
    text: Sequence[Row]
    """Rows on the text encoder."""
    heads: tuple[HeadSpec, HeadSpec]
    """Specs of the finished heads, or those of the recipe, image before text."""
    encoders: tuple[EncoderSpec, ...]
    """Encoders that the run names."""


def save_card(
    heads: TrainedHeads,
    recipe: Recipe,
    dev: RetrievalReport,
    ledger: Ledger,
    origin: str,
    run: Path,
) -> None:
    """Write the card of a run of fit-head into its folder.

    Args:
        heads: Finished heads.
        recipe: Recipe after overrides.
        dev: Retrieval on the dev split.
        ledger: Costs of the fit.
        origin: Where the pairs came from. Of a path only the last part is shown, since cards are
            published.
        run: Run folder.
    """
    card = model_card(heads, recipe=recipe, dev=dev, ledger=ledger, origin=origin)
    replace_text(run / CARD, card)


def save_encoder_card(
    about: Mapping[str, Json],
    recipe: Recipe,
    dev: RetrievalReport,
    ledger: Ledger,
    origin: str,
    run: Path,
) -> None:
    """Write the card of a run of fit-encoder, as `save_card` does. `about` is its description."""
    card = encoder_card(about, recipe=recipe, dev=dev, ledger=ledger, origin=origin)
    replace_text(run / CARD, card)


def model_card(
    heads: TrainedHeads,
    recipe: Recipe,
    dev: RetrievalReport,
    ledger: Ledger,
    origin: str,
) -> str:
    """Return the card of a run of fit-head as Markdown.

    Every text that comes from outside is shown literally: no markup, no HTML, one line.
    """
    sentence = (
        f"Alignment heads for two frozen encoders, {heads.image.head.out_dim} dimensions, fitted "
        "by apecache."
    )
    sides = (heads.image, heads.text)
    subject = CardSubject(
        what=sentence,
        about=heads.training,
        image=_head_side(heads.image),
        text=_head_side(heads.text),
        heads=(heads.image.head.spec, heads.text.head.spec),
        encoders=tuple(
            single
            for side in sides
            if side.encoder
            for single in spec_from_json(side.encoder).singles
        ),
    )
    return _card(subject, recipe=recipe, dev=dev, ledger=ledger, origin=origin)


def encoder_card(
    about: Mapping[str, Json],
    recipe: Recipe,
    dev: RetrievalReport,
    ledger: Ledger,
    origin: str,
) -> str:
    """Return the card of a run of fit-encoder as Markdown, from its description `about`."""
    sentence = (
        "Two encoders and what aligns them, trained by apecache. The files hold only what "
        "training changed."
    )
    sides = (
        _tower_side(about["image"], recipe.image.kind, recipe),
        _tower_side(about["text"], recipe.text.kind, recipe),
    )
    subject = CardSubject(
        what=sentence,
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
    subject: CardSubject,
    recipe: Recipe,
    dev: RetrievalReport,
    ledger: Ledger,
    origin: str,
) -> str:
    """Return the card of a run of either trainer."""
    training = subject.about
    splits = training.get("splits") or {}
    facts = [
        ("recipe", recipe.name),
        ("what it is", recipe.summary or UNKNOWN),
        ("source", recipe.source or UNKNOWN),
        ("trained parameters", f"{training.get('n_trained_parameters', 0):,}"),
        ("best epoch, chosen on dev", str(training.get("best_epoch", UNKNOWN))),
        ("seed", str(training.get("seed", UNKNOWN))),
    ]
    if training.get("init_from"):
        facts.append(("begins with the heads of fingerprint", str(training["init_from"])))
    data = [
        # The card may be published: of the data it names the last part of the path only.
        ("data", Path(origin).name or UNKNOWN),
        ("license of the data", UNKNOWN),
        ("license of these weights", UNKNOWN),
        ("fingerprint of the pairs", str(training.get("data", UNKNOWN))),
        ("training split", splits.get("train") or "train, or the only one"),
        (
            "dev split",
            splits.get("dev")
            or f"a share of the training images, seed {splits.get('seed', UNKNOWN)}",
        ),
        ("training images", f"{training.get('n_train_images', 0):,}"),
        ("dev images", f"{training.get('n_dev_images', 0):,}"),
    ]
    # The hub reads the front matter; people read the tables below it.
    metadata = front_matter(recipe.name, encoders=subject.encoders, dev=dev, origin=origin)
    costs = [(label, _number(value)) for label, value in ledger.rows()]
    lines = [
        f"# {literal(recipe.name)}",
        "",
        subject.what,
        "",
        *_table(("training", ""), [*facts, *_used_rows(training, recipe)]),
        *_table(("setting", "value used"), _setting_rows(subject, recipe)),
        "Settings of heads that are not listed have their defaults.",
        "",
        *_table(("image encoder", ""), subject.image),
        *_table(("text encoder", ""), subject.text),
        *_table(("data", ""), data),
        *_measured(dev),
        *_table(("cost", ""), costs),
        *_warnings(ledger),
        *USE,
    ]
    return metadata + "\n".join(lines)


def literal(text: str) -> str:
    """Escape a text for Markdown and HTML, on one line."""
    # HTML first: without quotes its entities hold no character that Markdown escapes.
    escaped = html.escape(one_printable_line(text), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+!|~$:@-])", r"\\\1", escaped)


def _used_rows(training: Mapping[str, Json], recipe: Recipe) -> Iterator[Row]:
    """Yield the values that the fit used, if the run recorded them."""
    used = training.get("used") or {}
    if used:
        yield "epochs run", f"{used['n_epochs']:,} of {used['planned_epochs']:,}"
        yield "steps", f"{used['n_steps']:,}"
        yield "temperature at the start", f"{used['first_temperature']:.4g}"
        yield "temperature at the end", f"{used['temperature']:.4g}"
    if "batch_size" in used:
        recipe_batch_size = recipe.schedule.batch_size
        remark = (
            ""
            if used["batch_size"] == recipe_batch_size
            else f" (the recipe says {recipe_batch_size:,}; there are no more images)"
        )
        yield "images in a batch", f"{used['batch_size']:,}{remark}"
        yield "batches in a step", f"{used['accumulate']:,}"
    if used.get("slice_size"):
        yield "pairs in memory at once", f"{used['slice_size']:,}"
    if used.get("compile"):
        yield "towers in training", "compiled by torch.compile"
    if training.get("autocast"):
        yield "computation of the towers", str(training["autocast"])
    for name, value in (training.get("closed_form") or {}).items():
        yield f"closed form, {name}, chosen on dev", _number(value)


def _setting_rows(subject: CardSubject, recipe: Recipe) -> Iterator[Row]:
    """Yield the settings of the recipe after overrides, without those that played no role.

    Left out are the candidates of a closed form, and the optimizer, loss and schedule of a recipe
    that trains nothing.
    """
    # A closed form takes no steps, so settings of steps would mislead.
    fixed = recipe.schedule.epochs == 0 and recipe.schedule.steps == 0
    # These are shown elsewhere on the card.
    idle = {"name", "summary", "source", "image", "text", "closed_form"}
    idle |= {"loss", "optimizer", "schedule", "augmentation"} if fixed else set()
    idle |= set() if recipe.trains_towers else {"towers"}
    values = recipe.model_dump(mode="json", exclude=idle, exclude_none=True)
    for side, spec in zip(("image", "text"), subject.heads, strict=True):
        # Kind and width are shown even where they are defaults.
        changed = spec.model_dump(mode="json", exclude_defaults=True)
        values[side] = {"kind": spec.kind, "dim": spec.dim, **changed}
    for name, value in _flat("", values):
        if name not in SHOWN_AS_USED:
            yield name, value


def _flat(name: str, value: Json) -> Iterator[Row]:
    """Yield the leaves of nested settings by dotted names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}" if name else key, inner)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _head_side(side: TrainedSide) -> list[Row]:
    """Return the rows on a frozen encoder and its head."""
    return [
        ("encoder", public_name(spec_from_json(side.encoder)) if side.encoder else UNKNOWN),
        ("fingerprint", side.fingerprint.digest),
        ("width", str(side.head.in_dim)),
        ("head", side.head.spec.kind),
    ]


def _tower_side(side: Mapping[str, Json], head: str, recipe: Recipe) -> list[Row]:
    """Return the rows on an encoder of a run of fit-encoder.

    They have the encoder's fingerprint before training.
    """
    return [
        ("encoder", public_name(spec_from_json(side["encoder"]))),
        ("fingerprint", Fingerprint(fields=side["fingerprint"]).digest),
        ("width", str(side["dim"])),
        ("head", head if recipe.shared is None else "a block that both sides share"),
        ("trained parameters", f"{side['n_trained_parameters']:,}"),
        ("in training it ran", _ran(side)),
    ]


def _ran(side: Mapping[str, Json]) -> str:
    """Say from which inputs an encoder ran in training."""
    if side["cached"]:
        return "not at all: its features were read from the cache"
    return (
        "from its inputs"
        if side["cut"] is None
        else f"from the cached tokens after {side['cut']} blocks"
    )


def public_name(spec: EncoderSpec) -> str:
    """Return an encoder's name for publication: of a local folder only the last part."""
    singles = spec.singles
    if len(singles) > 1:
        return " + ".join(public_name(single) for single in singles)
    # A full path would show the user's folders to readers of the card.
    if spec.folder:
        spec = replace(spec, name=spec.folder.resolve().name)
    return str(spec)


def _measured(dev: RetrievalReport) -> list[str]:
    """Return a table of the recalls on dev, beside chance, in percent."""
    directions = (
        ("image to text", dev.image_to_text, dev.chance_image_to_text),
        ("text to image", dev.text_to_image, dev.chance_text_to_image),
    )
    rows: list[Row] = []
    for direction, recalls, chance in directions:
        for k, recall in recalls.items():
            rows.append((f"{direction} R@{k}", f"{recall:.1f} (chance {chance[k]:.1f})"))
    title = f"dev, {counted(dev.n_images, 'image')}, {counted(dev.n_texts, 'caption')}"
    return [
        *_table((title, "recall, %"), rows),
        _chosen_by(dev),
        "",
    ]


def _chosen_by(dev: RetrievalReport) -> str:
    """Say on what the epoch was chosen, and by which figure."""
    sentence = "The epoch was chosen on these images: they are no measure of generalization."
    if dev.map_at_r is None:
        return sentence
    return (
        f"{sentence} Few of their captions differ, so it was chosen by mAP@R "
        f"({dev.map_at_r:.1f} %) in place of the mean recall."
        # The hub turns @name into a link to a user.
    ).replace("@", "\\@")


def _warnings(ledger: Ledger) -> list[str]:
    """Return the lines on the warnings of `apecache lint`; none without warnings."""
    if not ledger.warnings:
        return []
    return [
        "Warnings of the checks:",
        "",
        *(f"- {literal(warning)}" for warning in ledger.warnings),
        "",
    ]


def _table(columns: Row, rows: Iterable[Row]) -> list[str]:
    """Return the lines of a Markdown table, with an empty line at the end."""
    lines = [f"| {literal(columns[0])} | {literal(columns[1])} |", "|---|---|"]
    return [*lines, *(f"| {literal(label)} | {literal(value)} |" for label, value in rows), ""]


def _number(value: str | int | float) -> str:
    """Write a number with thousands separators, or with four digits."""
    match value:
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
    return value
