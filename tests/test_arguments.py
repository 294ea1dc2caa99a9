"""Public functions take paths as text, and name an argument of a wrong type at once."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import apecache
from apecache.arguments import (
    as_path,
    as_place,
    as_texts,
    require_integer,
    require_spec,
    require_type,
)
from apecache.data.pairs import PairSource
from apecache.errors import ApecacheError, OptionError
from apecache.runs.heads import TrainedHeads
from apecache.store.import_spec import FeatureInput, ImportSpec
from apecache.store.reader import FeatureStore


class Foreign:
    """Of no type that any function expects."""


WRONG: Any = Foreign()


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> FeatureStore:
    return FeatureStore.open(str(tiny_store))


@pytest.fixture(scope="module")
def heads(tiny_run: Path) -> TrainedHeads:
    return apecache.load_heads(str(tiny_run))


# --- the checks themselves ------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["a/b", Path("a/b")])
def test_a_path_may_be_a_text_or_a_path(value: Any) -> None:
    assert as_path(value, "out") == Path("a/b")


def test_a_url_is_kept_as_it_was_written() -> None:
    assert as_place("s3://bucket/store", "store") == "s3://bucket/store"


@pytest.mark.parametrize("value", [None, 3, b"a", [], WRONG])
def test_what_is_no_path_is_named(value: Any) -> None:
    with pytest.raises(
        OptionError,
        match=rf"^out: expected a path \(str or os\.PathLike\), found {type(value).__name__}",
    ):
        as_path(value, "out")


def test_an_empty_path_is_not_the_working_folder() -> None:
    with pytest.raises(OptionError, match="out: expected a path, found an empty text"):
        as_path("", "out")


def test_a_wrong_type_says_how_to_make_the_right_one() -> None:
    with pytest.raises(
        OptionError,
        match=r"store: expected FeatureStore, found str; make one with: FeatureStore\.open",
    ):
        require_type("store", FeatureStore, "store")
    require_type(None, FeatureStore, "store", optional=True)
    with pytest.raises(OptionError, match="found NoneType"):
        require_type(None, FeatureStore, "store")


def test_a_single_text_is_no_list_of_texts() -> None:
    assert as_texts(["a", "b"], "like") == ("a", "b")
    for value, message in (
        ("ab", "put it in brackets"),
        (3, "found int"),
        (["a", 3], r"like\[1\]: expected str"),
    ):
        with pytest.raises(OptionError, match=message):
            as_texts(value, "like")


@pytest.mark.parametrize("value", [True, False, np.True_, 2.0, "2", None])
def test_what_is_no_integer_is_named(value: Any) -> None:
    with pytest.raises(OptionError, match=rf"^k: expected int, found {type(value).__name__}"):
        require_integer(value, "k")


def test_integers_of_numpy_are_integers() -> None:
    require_integer(3, "k")
    require_integer(np.int64(3), "k")
    require_integer(None, "k", optional=True)


@pytest.mark.parametrize("given", [(), (FeatureInput(features="a.npy"),), "a.npy"])
def test_a_field_of_settings_that_holds_something_else_is_named(given: Any) -> None:
    require_spec(ImportSpec(image=None), ImportSpec, "spec")
    expected = rf"spec\.image: expected FeatureInput or None, found {type(given).__name__}"
    with pytest.raises(OptionError, match=expected):
        require_spec(ImportSpec(image=given), ImportSpec, "spec")


@pytest.mark.parametrize("path", ["a\0b", Path("a\0b"), "hf-datasets:~\0", "s3://b/\0"])
def test_a_path_with_a_zero_byte_is_named(path: Any) -> None:
    for opened in (apecache.open_pairs, apecache.FeatureStore.open, apecache.load):
        with pytest.raises(OptionError, match="zero byte"):
            opened(path)


def test_a_bool_in_a_field_of_integers_is_named_in_nested_settings_too() -> None:
    wrong: Any = True
    require_spec(apecache.FitSpec(overwrite=True), apecache.FitSpec, "spec")
    require_spec(None, apecache.FitSpec, "spec", optional=True)
    for spec, field in (
        (apecache.FitSpec(seed=wrong), "seed"),
        (apecache.FitSpec(splits=apecache.SplitSpec(dev_images=wrong)), r"splits\.dev_images"),
        (apecache.FitSpec(splits=apecache.SplitSpec(seed=wrong)), r"splits\.seed"),
    ):
        with pytest.raises(OptionError, match=rf"^spec\.{field}: expected int, found bool"):
            require_spec(spec, apecache.FitSpec, "spec")


# --- the public functions -------------------------------------------------------------------------


def pairs() -> PairSource:
    return PairSource(())


Wrongs = dict[str, tuple[str, Callable[[Any, Any], object]]]
"""By what is called: the argument that is wrong, and the call, given a store and heads."""

CALLS: Wrongs = {
    "FeatureStore.open": ("path", lambda s, h: FeatureStore.open(WRONG)),
    "SearchIndex.open": ("path", lambda s, h: apecache.SearchIndex.open(WRONG)),
    "SearchIndex.open, image": (
        "image",
        lambda s, h: apecache.SearchIndex.open("i", image="timm:x"),
    ),  # type: ignore[arg-type]
    "build_index, run": ("run", lambda s, h: apecache.build_index(WRONG, s, "out")),
    "build_index, store": ("store", lambda s, h: apecache.build_index("run", "store", "out")),  # type: ignore[arg-type]
    "build_index, out": ("out", lambda s, h: apecache.build_index("run", s, WRONG)),
    "ensemble_heads": ("runs", lambda s, h: apecache.ensemble_heads(WRONG)),
    "ensemble_heads, paths": (r"runs\[0\]", lambda s, h: apecache.ensemble_heads(["a", "b"])),  # type: ignore[list-item]
    "embed_store, run": ("run", lambda s, h: apecache.embed_store("run", s)),  # type: ignore[arg-type]
    "embed_store, store": ("store", lambda s, h: apecache.embed_store(h, "store")),  # type: ignore[arg-type]
    "extract, source": (
        "source",
        lambda s, h: apecache.extract("a.tsv", "out", apecache.ExtractSpec()),
    ),  # type: ignore[arg-type]
    "extract, store": (
        "store",
        lambda s, h: apecache.extract(pairs(), WRONG, apecache.ExtractSpec()),
    ),
    "extract, spec": ("spec", lambda s, h: apecache.extract(pairs(), "out", WRONG)),
    "extract, image": (
        "image",
        lambda s, h: apecache.extract(pairs(), "out", apecache.ExtractSpec("timm:test_vit")),  # type: ignore[arg-type]
    ),
    "extract_on_ray": (
        "store",
        lambda s, h: apecache.extract_on_ray(pairs(), WRONG, apecache.ExtractSpec()),
    ),
    "plan_extraction": (
        "store",
        lambda s, h: apecache.plan_extraction(pairs(), WRONG, apecache.ExtractSpec()),
    ),
    "add_images": ("store", lambda s, h: apecache.add_images(WRONG, ["a.jpg"])),
    "delete_images": ("store", lambda s, h: apecache.delete_images(WRONG, keys=["a"])),
    "import_features": (
        "store",
        lambda s, h: apecache.import_features(WRONG, apecache.ImportSpec()),
    ),
    "import_features, spec": ("spec", lambda s, h: apecache.import_features("out", WRONG)),
    "mteb_model": ("source", lambda s, h: apecache.mteb_model(WRONG)),
    "open_clip_triple": ("run", lambda s, h: apecache.open_clip_triple(WRONG)),
    "register_head": ("name", lambda s, h: apecache.register_head(WRONG)),
    "register_loss": ("name", lambda s, h: apecache.register_loss(WRONG)),
    "find_templates": ("name", lambda s, h: apecache.find_templates(WRONG)),
    "fit_head, store": ("store", lambda s, h: apecache.fit_head("store", "projection", "run")),  # type: ignore[arg-type]
    "fit_head, recipe": ("recipe", lambda s, h: apecache.fit_head(s, WRONG, "run")),
    "fit_head, out": ("out", lambda s, h: apecache.fit_head(s, "projection", WRONG)),
    "fit_head, spec": ("spec", lambda s, h: apecache.fit_head(s, "projection", "run", WRONG)),
    "fit_encoder, store": ("store", lambda s, h: apecache.fit_encoder("store", "lit", "run")),  # type: ignore[arg-type]
    "fit_encoder, recipe": ("recipe", lambda s, h: apecache.fit_encoder(s, WRONG, "run")),
    "fit_encoder, out": ("out", lambda s, h: apecache.fit_encoder(s, "lit", WRONG)),
    "load": ("run", lambda s, h: apecache.load(WRONG)),
    "load, text": ("text", lambda s, h: apecache.load("run", text="hf:x")),  # type: ignore[arg-type]
    "load_benchmark": ("name", lambda s, h: apecache.load_benchmark(WRONG)),
    "load_encoders": ("run", lambda s, h: apecache.load_encoders(WRONG)),
    "compare_runs, run": ("run_a", lambda s, h: apecache.compare_runs(WRONG, "b", s)),
    "compare_runs, store": ("store", lambda s, h: apecache.compare_runs("a", "b", WRONG)),
    "load_heads": ("folder", lambda s, h: apecache.load_heads(WRONG)),
    "load_recipe": ("name", lambda s, h: apecache.load_recipe(WRONG)),
    "load_recipe, settings": (
        "settings",
        lambda s, h: apecache.load_recipe("projection", "image.dim=4"),
    ),
    "load_run": ("folder", lambda s, h: apecache.load_run(WRONG)),
    "load_space, path": ("path", lambda s, h: apecache.load_space(WRONG, ["projection"])),
    "load_space, recipes": (
        "recipes",
        lambda s, h: apecache.load_space("space.toml", "projection"),
    ),
    "log_to_tensorboard": ("folder", lambda s, h: apecache.log_to_tensorboard(WRONG).__enter__()),  # type: ignore[attr-defined]
    "open_pairs": ("uri", lambda s, h: apecache.open_pairs(WRONG)),
    "open_pairs, spec": ("spec", lambda s, h: apecache.open_pairs("a.tsv", WRONG)),
    "parse_encoder": ("text", lambda s, h: apecache.parse_encoder(WRONG, "image")),
    "read_class_names": ("path", lambda s, h: apecache.read_class_names(WRONG)),
    "report_page, runs": ("runs", lambda s, h: apecache.report_page("run", "out.html")),
    "report_page, run": (r"runs\[0\]", lambda s, h: apecache.report_page([WRONG], "out.html")),
    "report_page, out": ("out", lambda s, h: apecache.report_page(["run"], WRONG)),
    "retrieval_report": (
        "image",
        lambda s, h: apecache.retrieval_report(np.eye(2), torch.eye(2), torch.arange(2)),
    ),  # type: ignore[arg-type]
    "save_heads, heads": ("heads", lambda s, h: apecache.save_heads(WRONG, "out")),
    "save_heads, folder": ("folder", lambda s, h: apecache.save_heads(h, WRONG)),
    "scout": ("source", lambda s, h: apecache.scout(WRONG, WRONG)),
    "serve": ("spec", lambda s, h: apecache.serve(WRONG)),
    "sweep, store": ("store", lambda s, h: apecache.sweep(WRONG, WRONG, "out")),
    "sweep, space": ("space", lambda s, h: apecache.sweep(s, WRONG, "out")),
    "sweep_on_ray": ("store", lambda s, h: apecache.sweep_on_ray(WRONG, WRONG, "out")),
    "sweep_page": ("folder", lambda s, h: apecache.sweep_page(WRONG)),
    "update_index": ("run", lambda s, h: apecache.update_index(WRONG, s, "out")),
    "zero_shot, run": ("run", lambda s, h: apecache.zero_shot("run", WRONG)),  # type: ignore[arg-type]
    "zero_shot, spec": ("spec", lambda s, h: apecache.zero_shot(h, WRONG)),
    "auto_heads": ("store", lambda s, h: apecache.auto_heads(WRONG, "out")),
    "compact_store": ("store", lambda s, h: apecache.compact_store(WRONG)),
    "copy_store": ("store", lambda s, h: apecache.copy_store(WRONG, "to")),
    "copy_store, to": ("to", lambda s, h: apecache.copy_store(s.path, WRONG)),
    "curate": ("store", lambda s, h: apecache.curate(WRONG, "out")),
    "describe_environment": ("folder", lambda s, h: apecache.describe_environment(WRONG)),
    "export_embeddings": ("store", lambda s, h: apecache.export_embeddings(h, WRONG, "out")),
    "export_embeddings, out": ("out", lambda s, h: apecache.export_embeddings(h, s, WRONG)),
    "export_npz": ("store", lambda s, h: apecache.export_npz(WRONG, "out.npz")),
    "export_npz, out": ("out", lambda s, h: apecache.export_npz(s, WRONG)),
    "export_parquet": ("store", lambda s, h: apecache.export_parquet(WRONG, "out")),
    "export_parquet, out": ("out", lambda s, h: apecache.export_parquet(s, WRONG)),
    "export_run": ("run", lambda s, h: apecache.export_run(WRONG, "out", WRONG)),
    "export_run, spec": ("spec", lambda s, h: apecache.export_run("run", "out", WRONG)),
    "forecast": ("store", lambda s, h: apecache.forecast(WRONG, "out")),
    "layernorm_shift": ("run", lambda s, h: apecache.layernorm_shift(WRONG)),
    "lint_encoder_plan": ("store", lambda s, h: apecache.lint_encoder_plan("lit", WRONG)),
    "lint_encoder_run": ("run", lambda s, h: apecache.lint_encoder_run(WRONG)),
    "lint_plan": ("recipe", lambda s, h: apecache.lint_plan(WRONG)),
    "lint_plan, store": ("store", lambda s, h: apecache.lint_plan("projection", WRONG)),
    "lint_run": ("run", lambda s, h: apecache.lint_run(WRONG)),
    "list_views": ("store", lambda s, h: apecache.list_views(WRONG)),
    "plan_recipe": (
        "image",
        lambda s, h: apecache.plan_recipe("lit", WRONG, WRONG, apecache.PlanSpec(rows=1)),
    ),
    "progress_bar": ("total", lambda s, h: apecache.progress_bar(WRONG)),
    "push_to_hub": ("folder", lambda s, h: apecache.push_to_hub(WRONG, "me/model")),
    "read_history": ("run", lambda s, h: list(apecache.read_history(WRONG))),
    "remove_features": ("store", lambda s, h: apecache.remove_features(WRONG, "name")),
    "rename_view": ("store", lambda s, h: apecache.rename_view(WRONG, "0", "name")),
    "remove_views": ("store", lambda s, h: apecache.remove_views(WRONG, "0")),
    "repair": ("store", lambda s, h: apecache.repair(WRONG, pairs())),
    "repair, source": ("source", lambda s, h: apecache.repair(s.path, WRONG)),
    "run_suite": ("run", lambda s, h: apecache.run_suite(WRONG, "clip-benchmark", "data")),
    "split_store": ("store", lambda s, h: apecache.split_store(WRONG, {"train": 1.0})),
    "upgrade_store": ("store", lambda s, h: apecache.upgrade_store(WRONG, "out")),
    "verify_store": ("store", lambda s, h: apecache.verify_store(WRONG)),
    "write_auto_page": ("report", lambda s, h: apecache.write_auto_page(WRONG, "a.html")),
    "write_bundle": ("run", lambda s, h: apecache.write_bundle(WRONG, "out")),
    "write_curate_page": ("report", lambda s, h: apecache.write_curate_page(WRONG, "a.html")),
    "write_forecast_page": ("report", lambda s, h: apecache.write_forecast_page(WRONG, "a.html")),
    "write_packaged_encoders": ("folder", lambda s, h: apecache.write_packaged_encoders(WRONG)),
    "AlignmentHead": ("name", lambda s, h: apecache.AlignmentHead(WRONG).fit(np.eye(8), np.eye(8))),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_type_is_named_with_the_expected_and_the_found_one(
    call: str,
    store: FeatureStore,
    heads: TrainedHeads,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    argument, function = CALLS[call]
    with pytest.raises(OptionError, match=rf"^{argument}: .*expected.*, found ") as caught:
        function(store, heads)
    assert caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())


TRUE: Any = True
BOOL_CALLS: Wrongs = {
    "SearchIndex.open, nprobe": (
        "nprobe",
        lambda s, h: apecache.SearchIndex.open("i", nprobe=TRUE),
    ),
    "SearchIndex.open, ef_search": (
        "ef_search",
        lambda s, h: apecache.SearchIndex.open("i", ef_search=TRUE),
    ),
    "extract": (
        "spec.shard_rows",
        lambda s, h: apecache.extract(pairs(), "out", apecache.ExtractSpec(shard_rows=TRUE)),
    ),
    "extract, part": (
        "spec.part.count",
        lambda s, h: apecache.extract(
            pairs(),
            "out",
            apecache.ExtractSpec(part=apecache.ShardRange(count=TRUE)),
        ),
    ),
    "plan_extraction": (
        "spec.workers",
        lambda s, h: apecache.plan_extraction(pairs(), "out", apecache.ExtractSpec(workers=TRUE)),
    ),
    "extract_on_ray": (
        "spec.text_batch",
        lambda s, h: apecache.extract_on_ray(
            pairs(),
            "out",
            apecache.ExtractSpec(text_batch=TRUE),
        ),
    ),
    "fit_head": (
        "spec.seed",
        lambda s, h: apecache.fit_head(s, "projection", "run", apecache.FitSpec(seed=TRUE)),
    ),
    "fit_encoder": (
        "spec.slice_size",
        lambda s, h: apecache.fit_encoder(
            s,
            "lit",
            "run",
            apecache.FitEncoderSpec(slice_size=TRUE),
        ),
    ),
    "probe": (
        "seed",
        lambda s, h: apecache.probe(np.eye(2), ["a", "b"], np.eye(2), ["a", "b"], seed=TRUE),
    ),
    "report_page": (
        "spec.top",
        lambda s, h: apecache.report_page(["run"], "out.html", apecache.ReportSpec(top=TRUE)),
    ),
    "scout": (
        "spec.n_pairs",
        lambda s, h: apecache.scout(pairs(), apecache.ScoutSpec(image=(), text=(), n_pairs=TRUE)),
    ),
    "serve": (
        "spec.port",
        lambda s, h: apecache.serve(apecache.ServeSpec(index=Path("index"), port=TRUE)),
    ),
    "sweep": (
        "spec.seeds",
        lambda s, h: apecache.sweep(s, one_point(), "out", apecache.SweepSpec(seeds=TRUE)),
    ),
    "sweep_on_ray": (
        "spec.fit.seed",
        lambda s, h: apecache.sweep_on_ray(
            s,
            one_point(),
            "out",
            apecache.SweepSpec(fit=apecache.FitSpec(seed=TRUE)),
        ),
    ),
}
"""By what is called: the integer that is a bool, and the call."""


def one_point() -> apecache.Space:
    return apecache.Space({}, ["projection"])


@pytest.mark.parametrize("call", BOOL_CALLS)
def test_a_bool_is_no_integer_of_a_public_function(
    call: str,
    store: FeatureStore,
    heads: TrainedHeads,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    argument, function = BOOL_CALLS[call]
    with pytest.raises(OptionError, match=rf"^{re.escape(argument)}: expected int, found bool"):
        function(store, heads)
    assert not list(tmp_path.iterdir())


FREE = {"probe", "build_tower", "recipe_names"}
"""`probe` takes any arrays; `build_tower` any model, and names those that it knows; `recipe_names`
takes nothing."""


def test_every_public_function_is_in_the_table() -> None:
    functions = {name for name in apecache.__all__ if name[0].islower()} - FREE
    assert functions <= {call.partition(",")[0] for call in CALLS}


Given = tuple[Path, Path, Path]
"""A finished run, a finished store, and the table that it was made of."""

BY_TEXT: dict[str, Callable[[Given, FeatureStore], object]] = {
    "FeatureStore.open": lambda g, s: FeatureStore.open(str(g[1])).digest,
    "load": lambda g, s: apecache.load(str(g[0])).dim,
    "load_heads": lambda g, s: apecache.load_heads(str(g[0])).digest,
    "load_run": lambda g, s: apecache.load_run(str(g[0])).digest,
    "save_heads": lambda g, s: apecache.save_heads(apecache.load_heads(str(g[0])), "copy"),
    "build_index": lambda g, s: apecache.build_index(str(g[0]), s, "index").n_images,
    "update_index": lambda g, s: (
        apecache.build_index(str(g[0]), s, "index"),
        apecache.update_index(str(g[0]), s, "index").n_images,
    ),
    "SearchIndex.open": lambda g, s: (
        apecache.build_index(str(g[0]), s, "index"),
        apecache.SearchIndex.open("index").path.name,
    ),
    "open_pairs": lambda g, s: len(
        apecache.open_pairs(str(g[2]), apecache.OpenSpec(root=str(g[2].parent)))
    ),
    "OpenSpec.split_file": lambda g, s: (
        Path("splits.tsv").write_text("key\tsplit\nimages/red-circle-0.png\tval\n"),
        len(apecache.open_pairs(str(g[2]), apecache.OpenSpec(split_file="splits.tsv"))),
    ),
    "fit_head": lambda g, s: (
        apecache.fit_head(
            s,
            "ridge",
            "run",
            apecache.FitSpec(splits=apecache.SplitSpec(dev="val"), device="cpu"),
        ).run
    ),
    "load_recipe": lambda g, s: (
        Path("own.toml").write_text('name = "own"\n'),
        apecache.load_recipe(Path("own.toml")).name,
    ),
    "load_space": lambda g, s: (
        Path("space.toml").write_text('"optimizer.lr" = {log = [1e-4, 1e-2]}\n'),
        apecache.load_space("space.toml", ["projection"]).recipes,
    ),
    "read_class_names": lambda g, s: (
        Path("names.txt").write_text("cat\ndog\n"),
        apecache.read_class_names("names.txt").names,
    ),
    "find_templates": lambda g, s: (
        Path("prompts.txt").write_text("a {}\n"),
        apecache.find_templates(Path("prompts.txt")),
    ),
    "report_page": lambda g, s: apecache.report_page([str(g[0])], "page.html"),
}


@pytest.mark.parametrize("call", BY_TEXT)
def test_a_path_may_be_given_as_a_text(
    call: str,
    tiny_run: Path,
    tiny_store: Path,
    shapes_once: Path,
    store: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    BY_TEXT[call]((tiny_run, tiny_store, shapes_once), store)


@pytest.mark.parametrize(
    "function",
    ["load_encoders", "sweep_page", "log_to_tensorboard", "fit_encoder"],
)
def test_a_path_as_a_text_reaches_the_message_about_it(
    function: str,
    store: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Functions whose success would cost seconds: what they refuse shows that the text was taken
    for the path."""
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("mine")
    calls: dict[str, Callable[[], object]] = {
        "load_encoders": lambda: apecache.load_encoders("taken"),
        "sweep_page": lambda: apecache.sweep_page("taken"),
        "log_to_tensorboard": lambda: apecache.log_to_tensorboard("taken").__enter__(),  # type: ignore[attr-defined]
        "fit_encoder": lambda: apecache.fit_encoder(store, "lit", "taken"),
    }
    with pytest.raises(ApecacheError, match=r"^(run folder )?taken") as caught:
        calls[function]()
    assert not isinstance(caught.value, OptionError)


def test_a_recipe_may_be_its_name(store: FeatureStore, tmp_path: Path) -> None:
    spec = apecache.FitSpec(splits=apecache.SplitSpec(dev="val"), device="cpu")
    apecache.fit_head(store, "ridge", os.fspath(tmp_path / "by-name"), spec)
    apecache.fit_head(store, apecache.load_recipe("ridge"), tmp_path / "by-object", spec)
    digests = {apecache.load_heads(tmp_path / name).digest for name in ("by-name", "by-object")}
    assert len(digests) == 1
