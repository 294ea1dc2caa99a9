"""The model card says what was recorded, and nothing of it can be markup."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from apecache.encoders.spec import EncoderSpec
from apecache.metrics.retrieval import RetrievalReport
from apecache.recipes.recipe import Recipe, load_recipe
from apecache.runs.card_metadata import front_matter, one_printable_line
from apecache.runs.folder import read_history
from apecache.runs.heads import load_heads
from apecache.runs.ledger import load_ledger
from apecache.runs.model_card import literal, model_card
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec


def test_the_card_tells_what_was_recorded(tiny_store: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        "projection",
        ["image.dim=16", "text.dim=16", "schedule.epochs=2", "schedule.batch_size=4"],
    )
    spec = FitSpec(splits=SplitSpec(dev="val"), device="cpu")
    report = fit_head(FeatureStore.open(tiny_store), recipe=recipe, out=tmp_path / "run", spec=spec)
    heads = load_heads(tmp_path / "run")
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: apecache\n")
    assert "\n---\n# projection\n" in card
    assert heads.image.fingerprint.digest.replace(":", r"\:") in card
    assert heads.text.fingerprint.digest.replace(":", r"\:") in card
    assert f"| trained parameters | {report.n_trained_parameters:,} |" in card
    for way, found, chance in (
        ("image to text", report.dev.image_to_text, report.dev.chance_image_to_text),
        ("text to image", report.dev.text_to_image, report.dev.chance_text_to_image),
    ):
        for k in (1, 5, 10):
            assert rf"| {way} R\@{k} | {found[k]:.1f} \(chance {chance[k]:.1f}\) |" in card
    assert f"| flops | {report.ledger.flops:,} |" in card
    assert "| license of the data | not stated |" in card
    assert "| license of these weights | not stated |" in card
    assert "| peak bytes" not in card
    assert r"dev\-size\: the dev split has 4 images" in card
    assert "/tmp" not in card.replace("\\", "")
    assert str(tiny_store.parent.parent) not in card.replace("\\", "")


def test_unknown_lines_say_so_and_paths_stay_at_home(tiny_run: Path) -> None:
    heads = load_heads(tiny_run)
    ledger = load_ledger(tiny_run)
    assert ledger is not None
    report = _dev(heads)
    bare = replace(heads, training={})
    card = model_card(
        bare,
        recipe=Recipe(name="mine"),
        dev=report,
        ledger=ledger,
        origin="/home/someone/secret/pairs.tsv",
    )
    assert "secret" not in card
    assert r"| data | pairs.tsv |" in card
    assert card.count("not stated") >= 7


def _dev(heads):  # type: ignore[no-untyped-def]
    value = dict(heads.training["dev"])
    ways = ("image_to_text", "text_to_image", "chance_image_to_text", "chance_text_to_image")
    return RetrievalReport(
        **{**value, **{way: {int(k): v for k, v in value[way].items()} for way in ways}}
    )


def test_markup_in_a_recipe_is_shown_and_not_obeyed(tiny_run: Path) -> None:
    heads = load_heads(tiny_run)
    ledger = load_ledger(tiny_run)
    assert ledger is not None
    wild = "<script>x</script> | `a` [b](http://c)\n# d ![e](f) \x1b[31m\u202e"
    recipe = Recipe(name=wild, summary=wild, source=wild)
    card = model_card(
        heads,
        recipe=recipe,
        dev=_dev(heads),
        ledger=replace(ledger, warnings=(wild,)),
        origin=wild,
    )
    usual = model_card(
        heads,
        recipe=Recipe(name="n"),
        dev=_dev(heads),
        ledger=replace(ledger, warnings=("w",)),
        origin="o",
    )
    assert card.count("\n") == usual.count("\n")
    body = card.split("\n---\n", 1)[1]  # the front matter is YAML, and has a test of its own
    assert "<script" not in body
    assert "\x1b" not in card
    assert "\u202e" not in card
    assert not re.search(r"(?<!\\)\[b", body)
    for line in body.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3


def test_the_card_shows_the_values_that_were_used(tiny_store: Path, tmp_path: Path) -> None:
    """The batch is as large as the split, patience stops early, and the temperature has moved."""
    settings = [
        "image.dim=16",
        "text.dim=16",
        "schedule.epochs=40",
        "schedule.patience=1",
        "optimizer.lr=0.0123",
    ]
    run = tmp_path / "run"
    spec = FitSpec(splits=SplitSpec(dev="val"), device="cpu")
    fit_head(
        FeatureStore.open(tiny_store),
        recipe=load_recipe("projection", settings),
        out=run,
        spec=spec,
    )
    used = load_heads(run).training["used"]
    history = list(read_history(run))
    assert used["n_epochs"] == history[-1]["epoch"]
    assert used["batch_size"] == 8
    card = (run / "README.md").read_text(encoding="utf-8")
    assert f"| epochs run | {used['n_epochs']} of 40 |" in card
    asked = load_recipe("projection").schedule.batch_size
    assert (
        rf"| images in a batch | 8 \(the recipe says {asked:,}; there are no more images\) |"
        in card
    )
    assert "| optimizer.lr | 0.0123 |" in card
    assert "| image.dim | 16 |" in card
    best = history[load_heads(run).training["best_epoch"]]
    assert (
        used["temperature"]
        == pytest.approx(1 / load_heads(run).scale)
        == pytest.approx(best["temperature"])
    )
    assert f"| temperature at the end | {used['temperature']:.4g} |" in card.replace(r"e\-", "e-")
    assert "loss.temperature |" not in card
    assert "schedule.epochs |" not in card


def test_a_closed_form_shows_what_was_chosen_and_nothing_that_did_not_train(
    tiny_store: Path,
    tmp_path: Path,
) -> None:
    spec = FitSpec(splits=SplitSpec(dev="val"), device="cpu")
    recipe = load_recipe("csa", ["closed_form.ridge=[0.25]", "closed_form.rank=[3]"])
    fit_head(FeatureStore.open(tiny_store), recipe=recipe, out=tmp_path / "run", spec=spec)
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "| closed form, ridge, chosen on dev | 0.25 |" in card
    # Three directions, and the two complements of a canonical head.
    assert "| image.dim | 5 |" in card
    assert "optimizer.lr" not in card
    assert "images in a batch" not in card


def metadata(card: str) -> dict[str, Any]:
    """The front matter, taken as the hub's own client takes it."""
    match = re.match(r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\n|$))", card)
    assert match is not None
    found: dict[str, Any] = yaml.safe_load(match.group(2))
    return found


REPORT = RetrievalReport(
    image_to_text={1: 25.0},
    text_to_image={1: 12.5},
    n_images=4,
    n_texts=8,
    chance_image_to_text={1: 3.0},
    chance_text_to_image={1: 25.0},
)


def test_the_front_matter_is_that_of_the_hub(tiny_run: Path) -> None:
    card = (tiny_run / "README.md").read_text(encoding="utf-8")
    found = metadata(card)
    dev = _dev(load_heads(tiny_run))
    assert found["library_name"] == "apecache"
    assert found["pipeline_tag"] == "zero-shot-image-classification"
    assert "license" not in found
    (model,) = found["model-index"]
    (result,) = model["results"]
    assert result["dataset"]["split"] == "dev"
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert values["image_to_text_recall_at_1"] == pytest.approx(dev.image_to_text[1], abs=0.01)
    assert values["text_to_image_recall_at_10"] == pytest.approx(dev.text_to_image[10], abs=0.01)
    chances = {metric["type"]: metric["args"]["chance"] for metric in result["metrics"]}
    assert chances["text_to_image_recall_at_1"] == pytest.approx(
        dev.chance_text_to_image[1],
        abs=0.01,
    )


def test_the_hubs_own_client_reads_the_card(tiny_run: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(
        (tiny_run / "README.md").read_text(encoding="utf-8"),
        ignore_metadata_errors=False,
    )
    assert card.data.library_name == "apecache"
    assert card.data.model_name
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["text_to_image_recall_at_5"].dataset_split == "dev"
    assert card.text.lstrip().startswith("# ")


@pytest.mark.parametrize(
    ("encoder", "expected"),
    [
        (
            EncoderSpec(
                "hf",
                name="sentence-transformers/all-MiniLM-L6-v2",
                modality="text",
                revision="main",
            ),
            "sentence-transformers/all-MiniLM-L6-v2",
        ),
        (EncoderSpec("st", "intfloat/e5-small", "text"), "intfloat/e5-small"),
        (EncoderSpec("open_clip", "hf-hub:laion/CLIP-x", "image"), "laion/CLIP-x"),
        (EncoderSpec("open_clip", "ViT-B-32/openai", "image"), None),
        (EncoderSpec("timm", "vit_small_patch14_dinov2.lvd142m", "image"), None),
        (EncoderSpec("hf", "/home/me/secret", "text"), None),
        (EncoderSpec("hf", "./model", "text"), None),
        (EncoderSpec("hf", "a b: c", "text"), None),
    ],
)
def test_base_models_are_hub_ids_alone(encoder: EncoderSpec, expected: str | None) -> None:
    found = metadata(front_matter("n", encoders=[encoder, encoder], dev=REPORT, origin="pairs.tsv"))
    assert found.get("base_model") == (None if expected is None else [expected])


@given(
    st.one_of(
        st.text(),
        st.sampled_from(
            ["---", "a\n---\nb", "'\"\n: - #", "\U0001f63a", "yes", "1", "null", "\ud800"]
        ),
    )
)
def test_no_name_can_break_the_front_matter(text: str) -> None:
    shown = front_matter(text, encoders=[], dev=REPORT, origin=text)
    found = metadata(f"{shown}# title")
    assert found["model-index"][0]["name"] == one_printable_line(text)
    assert found["pipeline_tag"] == "zero-shot-image-classification"
    shown.encode("utf-8")


@given(st.text())
def test_no_text_can_break_a_line_or_open_a_tag(text: str) -> None:
    shown = literal(text)
    assert len(shown.splitlines()) <= 1
    assert "<" not in shown
    assert not re.search(
        r"(?<!\\)(?:\\\\)*[`*_\[\]|]",
        re.sub(r"\\[\\`*_{}\[\]()#+!|~$:@-]", "", shown),
    )
