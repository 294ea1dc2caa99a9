"""Laws from the command to the page, at smoke size, with tiny random encoders."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import make_shapes
from typer.testing import CliRunner

from apecache.data.sources import open_pairs
from apecache.encoders.spec import parse_encoder
from apecache.errors import OptionError
from apecache.recipes.recipe import load_recipe
from apecache.store.reader import FeatureStore
from apecache.train.fit_encoder import fit_encoder
from benchmarks.laws import jobs
from benchmarks.laws import measure as measuring
from benchmarks.laws import run as running
from benchmarks.laws.__main__ import app as laws_app
from benchmarks.laws.jobs import jobs_in_turn
from benchmarks.laws.measure import Bench
from benchmarks.laws.outcome import load_outcome
from benchmarks.laws.page import laws_page
from benchmarks.laws.results import load_results, too_small
from benchmarks.laws.run import plan_laws, run_laws
from benchmarks.laws.setting import SIZES, LawsSetting, parse_roles, part_of, translated

runner = CliRunner()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images, 40 of them for training."""
    return make_shapes(tmp_path_factory.mktemp("laws") / "shapes", copies=5)


@pytest.fixture
def setting(
    table: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    tmp_path: Path,
) -> LawsSetting:
    image = parse_encoder(f"timm:{tiny_image_encoder}", "image")
    text = parse_encoder(f"hf:{tiny_text_encoder}", "text")
    roles = {"image": image, "text": text, "multilingual-text": text}
    return LawsSetting(
        open_pairs(table),
        encoders=roles,
        work=tmp_path / "work",
        size=SIZES["smoke"],
        seeds=1,
        device="cpu",
    )


def test_the_command_trains_judges_writes_a_page_and_has_nothing_left(
    table: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    tmp_path: Path,
) -> None:
    work = tmp_path / "work"
    page = tmp_path / "laws.html"
    encoders = ["--image", f"timm:{tiny_image_encoder}", "--text", f"hf:{tiny_text_encoder}"]
    command = [
        "--pairs",
        str(table),
        *encoders,
        "--size",
        "smoke",
        "--seeds",
        "2",
        "--work",
        str(work),
    ]
    command += ["--only", "L4,L8", "--out", str(page), "--device", "cpu"]
    result = runner.invoke(laws_app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["n_left"], report["n_failed"]) == (0, 0)
    assert set(report["verdicts"]) == {"L4", "L8"}
    for law in report["laws"]:
        assert law["cpu_hours"] > 0
        assert law["made_flops"] > law["left_flops"] == 0
    compared = {one["name"]: one for law in report["laws"] for one in law["compared"]}
    measured = compared["cls-alone > cls-frozen"]
    assert measured["published"] == pytest.approx(18.1)
    assert measured["judgement"]["source"] == "seeds and images"
    assert measured["judgement"]["n_images"] == 20
    assert compared["norms > 0"]["judgement"]["difference"] is not None
    html = page.read_text(encoding="utf-8")
    assert html.count("<svg") >= 3
    assert "L8. Which norms move" in html
    assert not list((work / "runs").iterdir())
    again = runner.invoke(laws_app, command)
    assert again.exit_code == 0, again.output
    assert "runs to be made" not in again.output
    assert "0 are left" in again.output


def test_runs_that_laws_share_are_one_and_large_published_gaps_come_first(
    setting: LawsSetting,
) -> None:
    alone = [
        jobs_in_turn([one for law in plan_laws(setting, [name]) for one in law])
        for name in ("L3", "L4")
    ]
    both = jobs_in_turn([one for law in plan_laws(setting, ["L3", "L4"]) for one in law])
    assert len(both) < sum(map(len, alone))
    assert set(both) == set(alone[0]) | set(alone[1])
    assert list(both)[-1].recipe.name == "cca"
    ordered = [job.recipe.name.removeprefix("freeze/") for job in both]
    assert ordered[:4] == ["Vcf-Tcu", "Vff-Tfu", "Vff-Tuu", "Vuf-Tfu"]


def test_the_budget_ends_between_runs_and_the_next_call_goes_on(
    setting: LawsSetting,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = list[str]()
    whole = running.measure

    def counted(job, bench, wants):  # type: ignore[no-untyped-def]
        made.append(job.digest)
        return whole(job, bench, wants)

    monkeypatch.setattr(running, "measure", counted)
    first = run_laws(setting, ["L4"], budget_seconds=0.0)
    assert (len(made), first.n_left) == (0, 4)
    compared = first.laws[0].compared[0]
    assert "still to be made: 1 of embeddings" in compared.judgement.why
    assert (
        f"published difference, 5.5, is less than they detect, {compared.detectable:.1f}"
        in compared.judgement.why
    )
    second = run_laws(setting, ["L4"])
    assert (len(made), second.n_left, second.n_failed) == (4, 0, 0)
    run_laws(setting, ["L4"])
    assert len(made) == 4


def test_runs_that_could_detect_what_was_published_are_not_called_too_small(
    setting: LawsSetting,
) -> None:
    claims = {one.claim.name: one.claim for one in plan_laws(setting, ["L1"])[0]}
    assert too_small(claims["i > g"], 6.7) == ""
    assert (
        too_small(claims["i > g"], 6.9)
        == "; the published difference, 6.8, is less than they detect, 6.9"
    )
    assert too_small(claims["i = p"], 6.9) == ""
    unpublished = plan_laws(setting, ["L6"])[0][0].claim
    assert too_small(unpublished, 99.0) == ""


def test_a_run_that_fails_is_said_and_tried_again(
    setting: LawsSetting,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(f"out of memory at {setting.work}/runs\nwith a trace")

    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.laws.measure.fit_encoder", broken)
        failed = run_laws(setting, ["L4"])
    # The three arms; heads alone do not train towers.
    assert failed.n_failed == 3
    judgement = failed.laws[0].compared[0].judgement
    assert (
        judgement.verdict,
        "failed: RuntimeError: out of memory at work/runs" in judgement.why,
    ) == (
        "not decided",
        True,
    )
    assert failed.laws[0].arms[0].failed == ("RuntimeError: out of memory at work/runs",)
    assert run_laws(setting, ["L4"]).n_failed == 0


def test_a_killed_measurement_goes_on_with_the_finished_fit(
    setting: LawsSetting,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.laws.measure.embed_store", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_laws(setting, ["L4"])
    fitted = [path.name for path in (setting.work / "runs").iterdir()]
    assert len(fitted) == 1
    assert load_outcome(fitted[0], setting.work) is None
    assert run_laws(setting, ["L4"]).n_failed == 0
    outcome = load_outcome(fitted[0], setting.work)
    assert outcome is not None
    assert outcome.costs["seconds"] > 0


@pytest.mark.slow
def test_labels_languages_and_random_towers_are_measured(setting: LawsSetting, table: Path) -> None:
    pairs = open_pairs(table)
    spoken = tuple(replace(pair, languages=("de", "fr")) for pair in pairs)
    roles = {
        **setting.encoders,
        "other-image": setting.encoders["image"],
        "other-text": setting.encoders["text"],
    }
    languages = replace(pairs, pairs=spoken)
    full = replace(setting, encoders=roles, labels=pairs, languages=languages)
    report = run_laws(full, ["L5", "L7", "L9"])
    assert report.n_failed == 0
    by_name = {one.name: one for law in report.laws for one in law.compared}
    assert by_name["other-text > main"].judgement.n_images == 60
    assert by_name["lwa > clip"].judgement.difference is not None
    assert by_name["pretrained > random"].judgement.difference is not None
    assert any(path.name.endswith("-0") for path in (full.work / "random").iterdir())


def test_results_and_pages_hold_no_path_of_this_machine(
    setting: LawsSetting,
    tmp_path: Path,
) -> None:
    report = run_laws(setting, ["L12"], budget_seconds=0.0)
    page = laws_page(report.laws, tmp_path / "laws.html", "apecache laws")
    for path in (
        page,
        *(setting.work / "results").iterdir(),
        *(setting.work / "outcomes").iterdir(),
    ):
        assert str(tmp_path.parent) not in path.read_text(encoding="utf-8")
    assert load_results(setting.work / "results") == list(report.laws)
    (counted,) = [one for one in report.laws[0].compared if one.name == "lwa costs less than lit"]
    assert counted.judgement.source == "counted, exact"


def test_money_is_that_of_the_seconds_that_runs_took_also_where_the_price_comes_later(
    setting: LawsSetting,
    tmp_path: Path,
) -> None:
    free = run_laws(setting, ["L4"]).laws[0]
    priced = run_laws(replace(setting, price=36.0), ["L4"], budget_seconds=0.0).laws[0]
    for before, after in zip(free.arms, priced.arms, strict=True):
        assert "money" not in before.costs
        assert after.costs["money"] == pytest.approx(after.costs["seconds"] / 100)
        assert after.per_point["money"] == pytest.approx(
            after.costs["money"] / after.values["recall"]
        )
    page = laws_page([priced], tmp_path / "laws.html", "apecache laws").read_text(encoding="utf-8")
    assert "an hour costs 36" in page
    assert "Settings" not in page
    both = laws_page([free, priced], tmp_path / "laws.html", "apecache laws").read_text(
        encoding="utf-8"
    )
    assert "see Settings" in both
    assert both.count("reported on val") == 2


def test_rate_and_autocast_are_of_towers_that_train_and_make_other_runs(
    setting: LawsSetting,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = replace(setting, size=replace(setting.size, lr=3e-4, autocast="bfloat16"))
    plain, changed = (
        jobs_in_turn([one for law in plan_laws(each, ["L6"]) for one in law])
        for each in (setting, other)
    )
    assert {job.recipe.optimizer.lr for job in changed if job.recipe.name == "lit"} == {3e-4}
    heads = [job for job in changed if job.recipe.trains_heads_alone]
    # `cca` says what heads alone reach.
    assert {job.recipe.name for job in heads} == {"ape", "cca"}
    assert {job.digest for job in heads} == {
        job.digest for job in plain if job.recipe.trains_heads_alone
    }
    assert not {job.digest for job in changed if job not in heads} & {job.digest for job in plain}
    seen = list[str]()

    def watched(*arguments: Any, **named: Any) -> Any:
        seen.append(named["spec"].autocast)
        return fit_encoder(*arguments, **named)

    monkeypatch.setattr("benchmarks.laws.measure.fit_encoder", watched)
    assert run_laws(other, ["L4"]).n_failed == 0
    assert seen == ["bfloat16"] * 3


def test_jobs_of_other_schedules_share_what_is_counted(
    setting: LawsSetting,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Towers are made once; costs are of each job's own steps."""
    made = list[str]()
    shape = jobs.shape_tower
    monkeypatch.setattr(
        jobs,
        "shape_tower",
        lambda spec, **named: made.append(spec.modality) or shape(spec, **named),
    )
    jobs._count.cache_clear()
    planned = jobs_in_turn([one for law in plan_laws(setting, ["L6"]) for one in law])
    costs = [jobs.counted_costs(job)["total-flops"] for job in planned if job.recipe.name == "lit"]
    assert made == ["image", "text"]
    assert len(set(costs)) > 1
    # Without what fills the cache, operations go with the steps.
    lit = [job for job in planned if job.recipe.name == "lit"]
    a_step = {round(jobs.training_flops(job) / job.recipe.schedule.steps) for job in lit}
    assert len(a_step) == 1


def test_an_image_encoder_that_stays_frozen_can_be_any(setting: LawsSetting) -> None:
    """LiT reads the image side from the cache, so that it needs no tower; row m trains it."""
    convolutional = parse_encoder("timm:resnet18", "image")
    given = replace(setting, encoders={**setting.encoders, "image": convolutional})
    (planned,) = plan_laws(given, ["L6"])
    assert {one.why_not for one in planned} == {""}
    assert jobs.counted_costs(planned[0].jobs["lit-little"][0])["trained"] > 0
    (refused,) = [one for one in plan_laws(given, ["L1"])[0] if one.claim.name == "m > c"]
    assert "cannot be seen as a tower" in refused.why_not


@pytest.mark.parametrize("name", ["L6", "L11"])
def test_with_all_data_every_arm_sees_as_many_samples_as_the_law_gives_it(
    name: str,
    setting: LawsSetting,
) -> None:
    roles = {**setting.encoders, "other-image": setting.encoders["image"]}
    (planned,) = plan_laws(replace(setting, size=SIZES["all-data"], encoders=roles), [name])
    samples = set[int]()
    for one in planned:
        for arm, arm_jobs in one.jobs.items():
            schedule = arm_jobs[0].recipe.schedule
            if schedule.steps:
                share = one.law.arms[arm].steps
                samples.add(round(schedule.steps * schedule.batch_size / share))
    assert len(samples) == 1


def test_parts_of_the_pairs_share_what_is_encoded(
    setting: LawsSetting,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tenth of the data, all of it, and all of it with wrong captions."""
    encoded = list[int]()
    extract = measuring.extract

    def watched(*arguments: Any, **named: Any) -> Any:
        report = extract(*arguments, **named)
        encoded.extend(array.n_encoded for array in report.arrays if array.modality == "image")
        return report

    monkeypatch.setattr(measuring, "extract", watched)
    planned = [one for law in plan_laws(setting, ["L6"]) for one in law]
    bench = Bench(setting=setting, jobs=tuple(jobs_in_turn(planned)))
    parts = {job.images: bench.store(job) for job in bench.jobs if not job.noise}
    noisy = next(bench.store(job) for job in bench.jobs if job.noise)
    paths = {store.path for store in [*parts.values(), noisy]}
    assert paths == {setting.work / "stores" / "pairs"}
    assert len(encoded) == len(parts) + 1
    assert sum(encoded) == max(len(store.pairs.keys) for store in parts.values())
    # Each keeps its own view.
    assert [len(store.pairs.keys) for store in parts.values()] == [n + 20 for n in parts]


def test_one_comparison_of_a_law_needs_its_own_runs_alone(setting: LawsSetting) -> None:
    report = run_laws(setting, ["L1:c > b", "L1: b > a"], budget_seconds=0.0)
    # b, c and what they begin with, and heads alone.
    assert report.n_left == 4
    (law,) = report.laws
    assert len(law.compared) > 10
    assert (law.cpu_hours, law.made_flops) == (0, 0)
    assert law.left_flops > 0
    assert run_laws(setting, ["L1:b > a", "L1:c > b", "L4"], budget_seconds=0.0).n_left == 7
    with pytest.raises(OptionError, match="L1 has no comparison 'a > b'; did you mean"):
        run_laws(setting, ["L1:a > b"])


def test_heads_alone_are_measured_on_what_is_compared(setting: LawsSetting) -> None:
    given = replace(setting, labels=setting.pairs, languages=setting.pairs)
    for name, metrics in (("L2", {"recall", "tr", "top1"}), ("L9", {"recall", "unseen"})):
        planned = plan_laws(given, [name])[0]
        wanted = jobs_in_turn(planned)
        assert {job.digest for job in wanted if job.recipe.name == "cca"} == {
            one.heads.digest for one in planned if one.heads is not None
        }
        assert [wanted[job] for job in wanted if job.recipe.name == "cca"] == [metrics]


def test_the_loss_of_an_outcome_is_the_contrastive_term_alone(setting: LawsSetting) -> None:
    """The structure term of this recipe is a thousand times as large."""
    (planned,) = plan_laws(setting, ["L6"])
    (ape,) = {one.jobs["ape-much"][0] for one in planned if "ape-much" in one.jobs}
    settings = ["loss.structure=1e6", "loss.structure_warmup=0", "schedule.steps=3"]
    job = replace(ape, recipe=load_recipe("structure", [*settings, "schedule.batch_size=8"]))
    outcome = measuring.measure(job, Bench(setting=setting, jobs=(job,)), {"recall"})
    assert not outcome.error
    assert outcome.loss is not None
    assert 0 < outcome.loss < 10 * math.log(outcome.candidates)


def test_features_that_are_there_under_another_name_are_found(setting: LawsSetting) -> None:
    """`default` is what the encoder pools by, and one of the two names is in the store when the
    other comes."""
    assert run_laws(setting, ["L6:ape-brief > lit-brief"]).n_failed == 0
    (store,) = (setting.work / "stores").iterdir()
    (known,) = FeatureStore.open(store).arrays("text")
    pooling = known.record.fingerprint.fields["encoder"]["inputs"]["pooling"]
    named = {**setting.encoders, "text": replace(setting.encoders["text"], pooling=pooling)}
    assert named["text"].slug != known.name
    report = run_laws(replace(setting, encoders=named), ["L6:ape-brief > lit-brief"])
    assert (report.n_failed, report.n_left) == (0, 0)
    assert len(FeatureStore.open(store).arrays("text")) == 1


def test_what_cannot_be_tried_says_what_is_missing(setting: LawsSetting) -> None:
    (untaught,) = [
        one
        for law in plan_laws(setting, ["L10"])
        for one in law
        if one.claim.name == "taught > untaught"
    ]
    assert untaught.why_not == "it needs --encoder teacher=…"
    (heads,) = [
        one for law in plan_laws(setting, ["L11"]) for one in law if len(one.claim.weights) == 4
    ]
    assert heads.why_not == "it needs --encoder other-image=…"
    with pytest.raises(OptionError, match="no law 'L99'"):
        run_laws(setting, ["L99"])


def test_parts_are_nested_and_noise_gives_captions_of_others(table: Path) -> None:
    source = open_pairs(table)
    small, large = (
        part_of(source, split="val", images=count, test_images=8, noise=0.0) for count in (10, 30)
    )
    assert set(small.keys) < set(large.keys)
    assert [pair.split for pair in small].count("val") == 8
    noisy = part_of(source, split="val", images=30, test_images=8, noise=0.5)
    changed = [a.key for a, b in zip(large, noisy, strict=True) if a.captions != b.captions]
    assert 10 <= len(changed) <= 15  # neighbors may have the same captions
    assert sorted(noisy.captions) == sorted(large.captions)
    assert all(pair.split == "train" for pair in noisy if pair.key in changed)
    assert {pair.split for pair in translated(large, source, "val")} == {"val"}


@pytest.mark.parametrize(
    ("encoders", "sizes", "said"),
    [
        (["timm"], [], "ROLE=ENCODER"),
        (["image=timm:resnet18", "image=timm:resnet50"], [], "each role once"),
        (["image=timm:resnet18"], ["other=56"], "that is given"),
        (["image=timm:resnet18"], ["0"], "PIXELS"),
        (["text=hf:x"], ["text=56"], "of an image encoder"),
    ],
)
def test_roles_that_make_no_sense_are_refused(
    encoders: list[str],
    sizes: list[str],
    said: str,
) -> None:
    with pytest.raises(OptionError, match=said):
        parse_roles(encoders, sizes)


def test_roles_are_of_their_modality_and_resolution() -> None:
    found = parse_roles(
        ["image=timm:resnet18", "small-text=hf:x", "other=timm:resnet50"],
        ["56", "other=64"],
    )
    about = [(spec.modality, spec.resolution) for spec in found.values()]
    assert about == [
        ("image", 56),
        ("text", None),
        ("image", 64),
    ]


def test_jobs_on_the_same_pairs_share_one_extraction(setting: LawsSetting) -> None:
    said = list[str]()
    jobs = tuple(jobs_in_turn([one for law in plan_laws(setting, ["L4"]) for one in law]))
    bench = Bench(setting=setting, jobs=jobs, say=said.append)
    stores = {bench.store(job).path for job in jobs}
    assert (len(jobs), len(stores), len(said)) == (4, 1, 1)
