"""The model card says what was recorded, and nothing of it can be markup."""

import re
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from apecache.heads.checkpoint import load_heads
from apecache.recipes.recipe import Recipe, load_recipe
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.fit_head import FitSpec, fit_head
from apecache.train.ledger import load_ledger
from apecache.train.model_card import literal, model_card


def test_the_card_tells_what_was_recorded(tiny_store: Path, tmp_path: Path) -> None:
    recipe = load_recipe("projection", ["image.dim=16", "text.dim=16", "schedule.epochs=2", "schedule.batch_size=4"])
    spec = FitSpec(splits=SplitSpec(dev="val"), device="cpu")
    report = fit_head(FeatureStore.open(tiny_store), recipe, tmp_path / "run", spec)
    heads = load_heads(tmp_path / "run")
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# projection\n")
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
    assert "| licence of the data | not stated |" in card
    assert "| licence of these weights | not stated |" in card
    assert r"dev\-size\: the dev split has 4 images" in card
    assert "/tmp" not in card.replace("\\", "")
    assert str(tiny_store.parent.parent) not in card.replace("\\", "")


def test_unknown_lines_say_so_and_paths_stay_at_home(tiny_run: Path) -> None:
    heads, ledger = load_heads(tiny_run), load_ledger(tiny_run)
    assert ledger is not None
    report = _dev(heads)
    bare = replace(heads, training={})
    card = model_card(bare, Recipe(name="mine"), report, ledger, "/home/someone/secret/pairs.tsv")
    assert "secret" not in card
    assert r"| data | pairs.tsv |" in card
    assert card.count("not stated") >= 7


def _dev(heads):  # type: ignore[no-untyped-def]
    from apecache.evaluate.retrieval import RetrievalReport

    value = dict(heads.training["dev"])
    ways = ("image_to_text", "text_to_image", "chance_image_to_text", "chance_text_to_image")
    return RetrievalReport(**{**value, **{way: {int(k): v for k, v in value[way].items()} for way in ways}})


def test_markup_in_a_recipe_is_shown_and_not_obeyed(tiny_run: Path) -> None:
    heads, ledger = load_heads(tiny_run), load_ledger(tiny_run)
    assert ledger is not None
    wild = "<script>x</script> | `a` [b](http://c)\n# d ![e](f) \x1b[31m\u202e"
    recipe = Recipe(name=wild, summary=wild, source=wild)
    card = model_card(heads, recipe, _dev(heads), replace(ledger, warnings=(wild,)), wild)
    usual = model_card(heads, Recipe(name="n"), _dev(heads), replace(ledger, warnings=("w",)), "o")
    assert card.count("\n") == usual.count("\n")
    assert "<script" not in card
    assert "\x1b" not in card
    assert "\u202e" not in card
    assert not re.search(r"(?<!\\)\[b", card)
    for line in card.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3


@given(st.text())
def test_no_text_can_break_a_line_or_open_a_tag(text: str) -> None:
    shown = literal(text)
    assert len(shown.splitlines()) <= 1
    assert "<" not in shown
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_\[\]|]", re.sub(r"\\[\\`*_{}\[\]()#+!|~$:@-]", "", shown))
