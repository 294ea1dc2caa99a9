"""Recipes: the zoo, files, overrides, and the messages for everything that is wrong with one."""

import re
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apecache.errors import RecipeError
from apecache.heads.build import build_heads
from apecache.heads.head import HeadSpec
from apecache.losses.spec import LossSpec
from apecache.recipes.recipe import (
    Recipe,
    count_parameters,
    load_recipe,
    parse_recipe,
    tower_zoo_names,
    zoo_names,
)
from apecache.recipes.schedule import OptimizerSpec, ScheduleSpec
from apecache.recipes.sections import shorthand_names


def refused(name: str, *settings: str) -> str:
    """The message with which a recipe is refused; on one line."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, settings)
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- the zoo --------------------------------------------------------------------------------------


def test_the_zoo_lists_every_file_in_its_folder() -> None:
    found = sorted(path.name for path in (files("apecache.recipes") / "zoo").iterdir())
    assert [f"{name}.toml" for name in zoo_names()] == found
    assert {"ape", "projection"} <= set(zoo_names())


@pytest.mark.parametrize("name", zoo_names())
def test_every_recipe_of_the_zoo_loads_says_its_source_and_fits_the_default_encoders(
    name: str,
) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert len(recipe.source) > 50
    assert 20 < len(recipe.summary) < 120
    # Both sides of one model are equally wide.
    text_dim = 1280 if recipe.init == "pretrained" else 384
    n_parameters = count_parameters(recipe, 1280, text_dim)
    assert (n_parameters > 1000) == (recipe.schedule.epochs > 0)
    if recipe.init == "random":
        image, text = build_heads(recipe.image, text=recipe.text, image_dim=1280, text_dim=384)
        assert image.out_dim == text.out_dim
        trained = sum(p.numel() for head in (image, text) for p in head.parameters())
        assert n_parameters == trained + recipe.loss.learnable + (recipe.loss.kind == "sigmoid")


def test_the_zoo_has_the_recipes_of_the_papers() -> None:
    pooled = {
        "ape",
        "projection",
        "lilt-projection",
        "sharelock",
        "fusemix",
        "sail",
        "structure",
        "gated",
        "whole-set",
    }
    closed = {"csa", "weighted-cca", "asif", "ridge", "procrustes", "cca"}
    cuts = {name: load_recipe(name).cut for name in zoo_names()}
    assert {name for name, cut in cuts.items() if cut == "tokens"} == {
        "deep-adapter",
        "freeze-align",
        "token-anchors",
    }
    assert pooled | closed <= {name for name, cut in cuts.items() if cut == "pooled"}
    assert {name for name in cuts if load_recipe(name).schedule.epochs == 0} == closed | {
        "identity"
    }


def test_lilts_recipes_train_as_many_parameters_as_its_table_says() -> None:
    """The deep adapter's text side has a final norm of its own here (BERT's own last norm stays
    frozen): 1,536 more."""
    assert count_parameters(load_recipe("lilt-projection"), 768, 768) == 393_729
    assert count_parameters(load_recipe("deep-adapter"), 768, 768) == 14_571_009 + 1_536


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["schedule.epochs=0"], "schedule.epochs is 0 and init is random: nothing would be fitted"),
        (["text.kind=dictionary"], "init asif and heads of kind dictionary go together"),
        (["init=asif"], "init asif and heads of kind dictionary go together"),
        (
            ["text.kind=anchors", "augmentation.mixup=1"],
            "mixup mixes pooled features; these heads take tokens",
        ),
    ],
)
def test_parts_that_do_not_work_together_are_refused(settings: list[str], message: str) -> None:
    assert message in refused("ape", *settings)


def test_a_value_of_a_list_is_refused_with_the_nearest_one() -> None:
    assert "did you mean fusemix" in refused("ape", "text.kind=fusmix")
    assert "did you mean adamw, adam?" in refused("ape", "optimizer.kind=adamW")


def test_counting_parameters_of_widths_that_do_not_work_is_refused() -> None:
    with pytest.raises(
        RecipeError,
        match="deep-adapter: 100 features cannot be divided among 3 attention heads",
    ):
        count_parameters(load_recipe("deep-adapter", ["image.n_heads=3"]), 100, 64)


def test_the_tower_zoo_has_the_papers_recipes_under_names_of_their_own() -> None:
    listed = (files("apecache.recipes") / "tower_zoo").iterdir()
    found = sorted(path.name.removesuffix(".toml") for path in listed)
    assert tower_zoo_names() == found
    assert {
        *(f"lilt-{row}" for row in "abcdefghijklmnop"),
        "lilt-pattern-a",
        "freeze",
        "lit",
        "clip",
    } <= set(tower_zoo_names())
    assert not set(tower_zoo_names()) & set(zoo_names())


@pytest.mark.parametrize("name", tower_zoo_names())
def test_every_recipe_of_the_tower_zoo_loads_and_says_its_source(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert len(recipe.source) > 50
    # Features of a tower that trains change, so only a cached side has statistics.
    assert recipe.image.standardize == (name == "lit-warm")
    assert not recipe.text.standardize
    image, text = build_heads(
        recipe.image,
        text=recipe.text,
        image_dim=768,
        text_dim=768 if recipe.shared or recipe.init == "pretrained" else 384,
    )
    assert image.out_dim == text.out_dim
    assert recipe.trains_towers == (name not in ("lilt-a", "lilt-c"))
    assert recipe.trains_heads_alone == (name == "lilt-c")


def test_pixels_are_distorted_only_where_an_image_tower_trains() -> None:
    assert load_recipe("clip").augmentation.image is None
    found = load_recipe(
        "clip",
        ["augmentation.image.scale=[0.2, 1.0]", "augmentation.image.operations=2"],
    )
    assert found.augmentation.image is not None
    assert (found.augmentation.image.scale, found.augmentation.image.operations) == ((0.2, 1.0), 2)
    assert "whose image tower trains" in refused("lit", "augmentation.image.operations=2")
    assert "0 < first <= second" in refused("clip", "augmentation.image.scale=[0.9, 0.2]")
    assert "there are scale, ratio, flip" in refused("clip", "augmentation.image.crop=1")


def test_every_shorthand_is_a_recipe() -> None:
    for name in shorthand_names():
        recipe = load_recipe(f"freeze/{name}")
        assert (recipe.name, recipe.towers.freezing) == (f"freeze/{name}", name)
        assert recipe.optimizer == load_recipe("freeze").optimizer
    assert load_recipe("freeze/V_u^f T_u^u") == load_recipe("freeze/Vuf-Tuu")
    assert not load_recipe("freeze/Vff-Tff").trains_towers
    assert load_recipe("freeze/Vff-Tff", ["towers.freezing=Vcf-Tff"]).trains_towers


def test_no_shorthand_is_refused_with_the_nearest_one() -> None:
    assert "did you mean" in refused("freeze/Vuf-Tu")
    assert "expected one like Vuf-Tuu" in refused("freeze/everything")


def test_recipes_on_pooled_features_train_no_tower() -> None:
    assert all(load_recipe(name).trains_heads_alone for name in zoo_names())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('towers.rules=[{part = "block"}]', "did you mean blocks"),
        (
            'towers.rules=[{parts = "blocks"}]',
            "unknown key 'towers.rules.0.parts'; there are part, train, lr",
        ),
        ("towers.rule=1", "unknown key 'towers.rule'; there are freezing, rules"),
        ("towers.image_adapter.kinds=deep", "did you mean kind"),
        ("towers.image_adapter.kind=wide", "towers.image_adapter.kind"),
        ("towers.freezing=all", "expected one like Vuf-Tuu"),
    ],
)
def test_what_is_wrong_with_the_towers_section(setting: str, message: str) -> None:
    assert message in refused("lit", setting)


def test_ape_keeps_image_features_as_they_are_and_trains_4_to_6_layers_on_text() -> None:
    recipe = load_recipe("ape")
    assert recipe.image.kind == "identity"
    assert recipe.text.kind == "mlp"
    # One linear layer before the blocks of two, and one after them.
    assert 4 <= 2 + 2 * recipe.text.depth <= 6


def test_the_recipes_of_the_guide_are_some(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "guide" / "heads.md"
    short, whole = re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[:2]
    (tmp_path / "mine.toml").write_text(short)
    assert load_recipe(tmp_path / "mine.toml").image.input_dropout == 0.5
    recipe = parse_recipe(tomllib.loads(whole), page.name)
    assert recipe.init == "cca"
    assert count_parameters(recipe, 1280, 384) > 1000


@pytest.mark.parametrize("name", [*zoo_names(), *tower_zoo_names()])
def test_no_text_of_a_recipe_breaks_a_line_within_a_word(name: str) -> None:
    """A line that ends in a hyphen is read as `as- coded`: the value would be refused."""
    recipe = load_recipe(name)
    assert not re.search(r"\w- ", f"{recipe.summary} {recipe.source}")


def test_a_value_that_a_text_names_is_one_that_the_recipe_takes() -> None:
    """`key = "value"` between backticks."""
    for name in (*zoo_names(), *tower_zoo_names()):
        for setting in re.findall(r"`(\w+\.\w+ = [^`]+)`", load_recipe(name).source):
            assert load_recipe(name, [setting.replace(" = ", "=")]) != load_recipe(name)


# --- recipes that extend others -------------------------------------------------------------------


def write_recipes(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = folder / f"{name}.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_a_file_extends_a_packaged_recipe_section_by_section(tmp_path: Path) -> None:
    own = '[optimizer]\nlr = 0.5\n[towers]\nrules = [{part = "image.blocks"}]\n'
    text = f'name = "mine"\nextends = "lilt-d"\n{own}'
    recipe = load_recipe(write(tmp_path, text), ["schedule.epochs=3"])
    base = load_recipe("lilt-d")
    assert (recipe.name, recipe.source, recipe.summary) == ("mine", "", "")
    assert recipe.optimizer == base.optimizer.model_copy(update={"lr": 0.5})
    assert [rule.part for rule in recipe.towers.rules] == ["image.blocks"]
    assert recipe.towers == base.towers.model_copy(update={"rules": recipe.towers.rules})
    assert recipe.schedule == base.schedule.model_copy(update={"epochs": 3})
    assert (recipe.image, recipe.loss) == (base.image, base.loss)


def test_a_section_inside_a_section_is_replaced_whole(tmp_path: Path) -> None:
    text = 'name = "mine"\nextends = "lilt-d"\n[augmentation]\nnoise = 0.1\nimage = {flip = true}\n'
    augmentation = load_recipe(write(tmp_path, text)).augmentation
    assert augmentation.noise == 0.1
    assert augmentation.image is not None
    assert augmentation.image == type(augmentation.image)(flip=True)


def test_paths_of_bases_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    write_recipes(
        tmp_path / "bases",
        linear='name = "linear"\nextends = "../root.toml"\n[image]\ndim = 16\n',
    )
    write_recipes(
        tmp_path,
        root=(
            'name = "root"\nsource = "a paper"\n[image]\nkind = "linear"\ndim = 8\n[text]\ndim = '
            "16\n"
        ),
        mine='name = "mine"\nextends = "bases/linear.toml"\n[text]\nkind = "mlp"\n',
    )
    recipe = load_recipe(tmp_path / "mine.toml")
    assert recipe.source == ""
    assert recipe.image == HeadSpec(kind="linear", dim=16)
    assert recipe.text == HeadSpec(kind="mlp", dim=16)


def test_a_freezing_shorthand_can_be_extended(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, 'name = "mine"\nextends = "freeze/Vuf-Tuu"\n'))
    assert recipe.towers == load_recipe("freeze/Vuf-Tuu").towers


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ('"lilt-dd"', "mine.toml: extends: no recipe 'lilt-dd'; did you mean lilt-d"),
        ('"none.toml"', "none.toml: No such file"),
        ("3", "mine.toml: extends: expected the name of a recipe or a path of a .toml file"),
        ('["lilt-d"]', "found list"),
        ('"mine.toml"', "mine.toml: extends in a circle: "),
        ('"../{folder}/mine.toml"', "extends in a circle: "),
        ('"other.toml"', "extends in a circle: "),
        ('"broken.toml"', "extends: "),
    ],
)
def test_a_base_that_cannot_be_read_is_named(tmp_path: Path, extends: str, message: str) -> None:
    write_recipes(
        tmp_path,
        other='name = "other"\nextends = "mine.toml"\n',
        broken="name = ",
    )
    text = f"""name = "mine"\nextends = {extends.replace("{folder}", tmp_path.name)}\n"""
    assert message in refused(write(tmp_path, text))


def test_a_wrong_key_of_a_base_is_refused_with_the_base_named(tmp_path: Path) -> None:
    write_recipes(tmp_path, base="[text]\nwidht = 8\n")
    message = refused(write(tmp_path, 'name = "mine"\nextends = "base.toml"\n'))
    assert f"mine.toml extending {tmp_path / 'base.toml'}: unknown key 'text.widht'" in message


def test_a_name_is_not_inherited_and_extends_is_no_setting(tmp_path: Path) -> None:
    assert "the recipe has no name" in refused(write(tmp_path, 'extends = "lilt-d"\n'))
    assert "only a recipe file extends another" in refused("lilt-d", "extends=lilt-c")


def test_lilt_rows_share_all_settings_but_what_trains() -> None:
    """The figures are the published ones, written once in row c."""
    for name in tower_zoo_names():
        if name.startswith("lilt-"):
            recipe = load_recipe(name)
            assert (
                recipe.image == recipe.text == HeadSpec(kind="linear", dim=256, standardize=False)
            )
            assert (recipe.towers.image_pooling, recipe.towers.text_pooling) == ("cls", "cls")
            assert (recipe.loss.temperature, recipe.loss.max_temperature) == (0.07, 0.5)
            assert (recipe.optimizer.lr, recipe.optimizer.betas) == (1e-4, (0.9, 0.999))
            assert (recipe.schedule.epochs, recipe.schedule.epoch) == (15, "pairs")
            assert recipe.loss.temperature_parameter == "temperature"
    (rule,) = load_recipe("lilt-p").towers.rules
    assert (rule.part, rule.train) == ("text.token_types", False)
    assert load_recipe("lilt-d").augmentation.image == load_recipe("lilt-p").augmentation.image
    assert load_recipe("lilt-l").augmentation.image is None


# --- files ----------------------------------------------------------------------------------------


def test_a_file_is_read_and_what_it_leaves_out_has_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, 'name = "mine"\n[text]\nkind = "mlp"\n[optimizer]\nbetas = [0.8, 0.9]\n')
    )
    assert recipe == Recipe(
        name="mine",
        text=HeadSpec(kind="mlp"),
        optimizer=OptimizerSpec(betas=(0.8, 0.9)),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "not TOML"),
        ('name = "a"\nname = "b"', "not TOML"),
        ("[loss", "not TOML"),
        ("x = " + "[" * 100_000, "not TOML"),
        ("", "the recipe has no name"),
        ("[image]", "the recipe has no name"),
    ],
    ids=["no value", "key twice", "open bracket", "far too deep", "empty", "no name"],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, message: str, tmp_path: Path) -> None:
    found = refused(write(tmp_path, text))
    assert "mine.toml" in found
    assert message in found


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b'name = "caf\xe9"')
    assert "not TOML" in refused(str(tmp_path / "mine.toml"))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(str(tmp_path / "mine.toml"))


def test_a_folder_named_like_a_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").mkdir()
    assert "directory" in refused(str(tmp_path / "mine.toml"))


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    message = refused("projektion")
    assert message.startswith("no recipe 'projektion'; did you mean projection, ")
    assert "? There are ape, " in message
    assert refused("zzzzz").startswith("no recipe 'zzzzz'; there are ape, ")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("LILT-I", "lilt-i"),
        ("liltI", "lilt-i"),
        ("lilt_i", "lilt-i"),
        ("Fuse Mix", "fusemix"),
        ("FREEZE/vuf-tuu", "freeze/Vuf-Tuu"),
    ],
)
def test_a_name_in_other_letters_or_with_other_separators_is_suggested(
    name: str,
    meant: str,
) -> None:
    assert refused(name).startswith(f"no recipe {name!r}; did you mean {meant}")


# --- keys and values ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "place", "hint"),
    [
        ("optimizr.lr=1", "'optimizr'", "optimizer"),
        ("optimizer.learnin_rate=1", "'optimizer.learnin_rate'", ""),
        ("optimizer.weight_decy=1", "'optimizer.weight_decy'", "weight_decay"),
        ("loss.temprature=0.1", "'loss.temprature'", "temperature"),
        ("schedule.epoc=3", "'schedule.epoc'", "epoch"),
        ("image.dims=3", "'image.dims'", "dim"),
        ("text.standardze=true", "'text.standardze'", "standardize"),
        ("augmentation.nois=1", "'augmentation.nois'", "noise"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(
    setting: str,
    place: str,
    hint: str,
) -> None:
    message = refused("ape", setting)
    assert f"unknown key {place}; there are " in message
    assert (f"did you mean {hint}" in message) if hint else ("did you mean" not in message)


@pytest.mark.parametrize(
    ("setting", "new"),
    [
        ("optimiser.lr=1", "'optimiser' is called 'optimizer' now"),
        ("text.standardise=true", "'text.standardise' is called 'standardize' now"),
    ],
)
def test_the_former_spelling_of_a_key_names_the_new_one(setting: str, new: str) -> None:
    assert new in refused("ape", setting)


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("schedule.epochs=many", "many"),
        ("schedule.epochs=2.5", "2.5"),
        ("schedule.epochs=-1", "-1"),
        ("schedule.epochs=nan", "nan"),
        ("schedule.epochs=[3]", "[3]"),
        ("schedule.batch_size=1", "1"),
        ("schedule.warmup=1.1", "1.1"),
        ("schedule.warmup=-0.1", "-0.1"),
        ("schedule.final=2", "2"),
        ("optimizer.lr=0", "0"),
        ("optimizer.lr=-1e-3", "-0.001"),
        ("optimizer.lr=nan", "nan"),
        ("optimizer.lr=inf", "inf"),
        ("optimizer.lr=fast", "fast"),
        ("optimizer.weight_decay=-0.1", "-0.1"),
        ("optimizer.eps=0", "0"),
        ("optimizer.clip=-1", "-1"),
        ("optimizer.clip=inf", "inf"),
        ("optimizer.betas=0.9", "0.9"),
        ("optimizer.betas=[0.9]", "[0.9]"),
        ("optimizer.betas=[0.9, 0.9, 0.9]", "[0.9, 0.9, 0.9]"),
        ("optimizer.betas=[0.9, 1.0]", "1.0"),
        ("optimizer.betas=[-0.1, 0.9]", "-0.1"),
        ("optimizer.betas=[nan, 0.9]", "nan"),
        ("loss.temperature=0", "0"),
        ("loss.temperature=-0.07", "-0.07"),
        ("loss.temperature=nan", "nan"),
        ("loss.learnable=perhaps", "perhaps"),
        ("augmentation.noise=-1", "-1"),
        ("augmentation.noise=inf", "inf"),
        ("image.kind=perceptron", "perceptron"),
        ("image.dim=0", "0"),
        ("text.expansion=inf", "inf"),
        ("text.dropout=1", "1"),
        ("text.norm=group", "group"),
        ("image=linear", "linear"),
        ("loss=[1]", "[1]"),
        ("name=3", "3"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_its_place_and_itself(
    setting: str,
    found: str,
) -> None:
    message = refused("ape", setting)
    assert message.startswith(f"ape: {setting.split('=')[0]}")
    assert f"(found '{found}')" in message


@pytest.mark.parametrize(
    "loss",
    [
        {"temperature": 0.001},
        {"temperature": 0.6},
        {"temperature": 0.07, "min_temperature": 0.08},
        {"temperature": 0.07, "max_temperature": 0.06},
        {"min_temperature": 0.5, "max_temperature": 0.01},
    ],
    ids=str,
)
def test_a_temperature_outside_its_bounds_is_refused(loss: dict[str, float]) -> None:
    with pytest.raises(
        RecipeError,
        match="loss: temperature must lie between min_temperature and max_temperature",
    ):
        parse_recipe({"name": "mine", "loss": loss}, "mine")


@pytest.mark.parametrize("temperature", [0.001, 0.07, 0.5])
def test_lilts_temperature_bounds_can_be_set(temperature: float) -> None:
    loss = {"temperature": temperature, "min_temperature": 0.001, "max_temperature": 0.5}
    assert parse_recipe({"name": "lilt", "loss": loss}, "lilt").loss == LossSpec(**loss)


def test_the_first_faults_of_a_recipe_are_named_together() -> None:
    message = refused("ape", "optimizer.lr=-1", "schedule.epochs=-1", "color=red")
    assert "optimizer.lr" in message
    assert "schedule.epochs" in message
    assert "'color'" in message


# --- overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "section", "key", "value"),
    [
        ("optimizer.lr=3e-4", "optimizer", "lr", 3e-4),
        (" optimizer.lr = 3e-4 ", "optimizer", "lr", 3e-4),
        ("optimizer.betas=[0.5, 0.75]", "optimizer", "betas", (0.5, 0.75)),
        ("loss.learnable=false", "loss", "learnable", False),
        ("image.kind=linear", "image", "kind", "linear"),
        ('image.kind="linear"', "image", "kind", "linear"),
        ("schedule.epochs=1_0", "schedule", "epochs", 10),
        ("text.depth=6", "text", "depth", 6),
    ],
)
def test_a_setting_replaces_one_value_and_leaves_all_others(
    setting: str,
    section: str,
    key: str,
    value: Any,
) -> None:
    plain = load_recipe("ape").model_dump()
    changed = load_recipe("ape", [setting]).model_dump()
    assert changed[section].pop(key) == value
    del plain[section][key]
    assert changed == plain


def test_a_setting_may_hold_an_equals_sign() -> None:
    assert load_recipe("ape", ["source=a=b"]).source == "a=b"


def test_of_two_settings_of_one_key_the_later_wins() -> None:
    assert load_recipe("ape", ["schedule.epochs=3", "schedule.epochs=4"]).schedule.epochs == 4


def test_a_whole_section_can_be_given_as_a_toml_table() -> None:
    recipe = load_recipe("ape", ["schedule={epochs=3, warmup=0}"])
    assert recipe.schedule == ScheduleSpec(epochs=3, warmup=0)


def test_settings_of_one_call_do_not_stay_for_the_next() -> None:
    before = load_recipe("ape")
    load_recipe("ape", ["text.width=8"])
    assert load_recipe("ape") == before


@pytest.mark.parametrize(
    "setting",
    ["lr", "", "=3", "optimizer..lr=3", ".lr=3", "optimizer.=3", "optimizer.lr"],
)
def test_a_setting_that_is_no_assignment_is_refused_with_an_example(setting: str) -> None:
    assert (
        f"--set {setting!r}: expected section.key=value, for example optimizer.lr=3e-4"
        in refused("ape", setting)
    )


def test_a_setting_inside_a_plain_value_is_refused() -> None:
    assert "lr is inside a plain value, not a section" in refused("ape", "name.lr=3")


def test_a_setting_nested_without_end_is_refused_and_not_a_crash() -> None:
    assert "optimizer.lr" in refused("ape", "optimizer.lr=" + "[" * 100_000)


# --- round trip -----------------------------------------------------------------------------------

HEADS = st.builds(
    HeadSpec,
    kind=st.sampled_from(["identity", "linear", "mlp"]),
    dim=st.none() | st.integers(1, 4096),
    depth=st.integers(1, 64),
    dropout=st.floats(0, 1, exclude_max=True),
    expansion=st.floats(0.01, 16),
    skip=st.booleans(),
)
POSITIVE = st.floats(1e-8, 1e3)
RECIPES = st.builds(
    Recipe,
    name=st.text(),
    source=st.text(),
    image=HEADS,
    text=HEADS,
    loss=st.builds(LossSpec, temperature=st.floats(0.01, 0.5), learnable=st.booleans()),
    optimizer=st.builds(
        OptimizerSpec,
        lr=POSITIVE,
        betas=st.tuples(*[st.floats(0, 0.999)] * 2),
        clip=POSITIVE,
    ),
    schedule=st.builds(ScheduleSpec, epochs=st.integers(1, 10**6), warmup=st.floats(0, 1)),
)


@settings(deadline=None, max_examples=50)
@given(RECIPES)
def test_a_recipe_written_as_json_and_parsed_again_is_the_same(recipe: Recipe) -> None:
    assert parse_recipe(recipe.model_dump(mode="json"), "again") == recipe
