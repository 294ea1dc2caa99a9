"""Fits on data whose captions are equal word for word: labels put into one prompt, as class data is
given."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from populations import TRAIN, make
from recipes import SMALL

from apecache.errors import DataError, RecipeError
from apecache.evaluate.embeddings import embed_store
from apecache.losses.contrastive import Groups, grouped_info_nce, info_nce
from apecache.metrics.retrieval import retrieval_report
from apecache.recipes.recipe import Recipe, load_recipe
from apecache.runs.folder import read_history
from apecache.runs.heads import load_heads
from apecache.store.reader import FeatureStore
from apecache.sweeps.population.member_generators import MemberGenerators
from apecache.sweeps.population.population import train_together
from apecache.train.augment import mixed_groups
from apecache.train.batches import FeaturePairs, SplitSpec, batches, require_images
from apecache.train.fit import HeadFit, StepCount, seeded
from apecache.train.fit_head import FitReport, fit_head
from apecache.train.head_data import FitSpec, load_splits
from apecache.train.initial import initial_model
from apecache.train.lint.checks import n_negatives
from apecache.train.lint.heads import lint_plan
from apecache.train.loop import run_training

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = ("shirt", "dress", "shoe", "hat", "coat")
N_TRAIN = 120
N_DEV = 60
N_VAL = 60
N_IMAGES = N_TRAIN + N_DEV + N_VAL
SPLITS = ["train"] * N_TRAIN + ["dev"] * N_DEV + ["val"] * N_VAL
OF_IMAGE = [row % len(LABELS) for row in range(N_IMAGES)]
CPU = FitSpec(splits=SplitSpec(dev="dev"), device="cpu")


@pytest.fixture(scope="module")
def store(write_store: Any, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Images around a direction of their label. The texts of one label have one vector, whatever
    their case."""
    chance = np.random.default_rng(0)
    centers = chance.normal(size=(len(LABELS), 12))
    image = centers[OF_IMAGE] + 0.3 * chance.normal(size=(N_IMAGES, 12))
    text = chance.normal(size=(len(LABELS), 10))[OF_IMAGE]
    captions = [f"a photo of a {LABELS[label]}" for label in OF_IMAGE]
    captions[::7] = [f"A photo  of a {LABELS[label]}" for label in OF_IMAGE[::7]]
    made: FeatureStore = write_store(
        tmp_path_factory.mktemp("labels") / "s",
        image.astype(np.float32),
        text.astype(np.float32),
        list(range(N_IMAGES)),
        SPLITS,
        captions=captions,
    )
    return made


def make_recipe(*settings: str) -> Recipe:
    short = [
        "schedule.epochs=6",
        "schedule.batch_size=40",
        "optimizer.lr=0.02",
        "schedule.warmup=0",
    ]
    return load_recipe(SMALL, [*short, *settings])


@pytest.fixture(scope="module")
def fitted(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> FitReport:
    return fit_head(
        store,
        recipe=make_recipe(),
        out=tmp_path_factory.mktemp("runs") / "run",
        spec=CPU,
    )


def loaded(store: FeatureStore) -> tuple[FeaturePairs, FeaturePairs]:
    arrays = store.array("image"), store.array("text")
    return load_splits(store, *arrays, CPU.splits, torch.device("cpu"), make_recipe())


def test_recall_on_labels_is_as_good_as_the_classification(
    store: FeatureStore,
    fitted: FitReport,
) -> None:
    found = embed_store(load_heads(fitted.run), store, "val")
    classes = F.normalize(
        torch.stack([found.text[OF_IMAGE[N_TRAIN + N_DEV :].index(c)] for c in range(5)]),
        dim=-1,
    )
    target = torch.tensor(OF_IMAGE[N_TRAIN + N_DEV :])
    accuracy = 100 * float(((found.image @ classes.T).argmax(1) == target).double().mean())
    plain = retrieval_report(found.image, found.text, found.image_of_text)
    report = retrieval_report(
        found.image,
        found.text,
        found.image_of_text,
        relevance=found.relevance,
    )
    assert accuracy > 95
    assert plain.image_to_text[1] < 5
    assert report.image_to_text[1] == pytest.approx(accuracy)
    assert report.text_to_image[1] > 95
    assert report.chance_image_to_text[1] == pytest.approx(20)


def test_the_epoch_is_chosen_by_what_is_right(fitted: FitReport) -> None:
    """The untrained head is at chance; what was chosen is the first epoch that is best by the
    corrected recall."""
    history = list(read_history(fitted.run))
    recalls = [line["dev"]["mean_recall"] for line in history[1:]]
    assert fitted.best_epoch == 1 + recalls.index(max(recalls))
    assert fitted.dev.image_to_text[1] > 95
    assert fitted.dev.image_to_text[1] > fitted.untrained.image_to_text[1] + 20


def test_no_equal_caption_is_a_negative(store: FeatureStore) -> None:
    train, _ = loaded(store)
    for batch in batches(train, 40, torch.Generator().manual_seed(0)):
        assert batch.groups is not None
        same = batch.groups.image.unsqueeze(1) == batch.groups.text
        equal = (batch.text.unsqueeze(1) == batch.text).all(-1)
        assert torch.equal(same, equal)


def test_a_head_that_is_right_has_no_loss_left() -> None:
    """InfoNCE of row with row cannot fall below the logarithm of the number of equal captions."""
    labels = torch.arange(20) % 5
    vectors = torch.eye(5)[labels]
    assert (
        grouped_info_nce(
            vectors,
            text=vectors,
            scale=100.0,
            groups=Groups(image=labels, text=labels),
        )
        < 1e-6
    )
    assert info_nce(vectors, vectors, 100.0) == pytest.approx(np.log(4), rel=1e-5)


def test_negatives_are_those_that_equal_captions_leave(
    store: FeatureStore,
    fitted: FitReport,
) -> None:
    train, _ = loaded(store)
    batch = next(batches(train, 40, torch.Generator().manual_seed(0)))
    wrong = (batch.text.unsqueeze(1) != batch.text).any(-1).sum(1)
    assert fitted.n_negatives == fitted.ledger.n_negatives == round(float(wrong.double().mean()))
    assert 28 <= fitted.n_negatives <= 33  # four of five labels are others
    assert n_negatives(load_recipe("ridge"), N_TRAIN, train) == 0
    mixed = n_negatives(make_recipe("augmentation.mixup=1"), N_TRAIN, train)
    assert 17 <= mixed <= 19  # of 19 other mixtures few are of the same two labels


def test_mixtures_of_the_same_two_groups_are_equal() -> None:
    groups = mixed_groups(torch.tensor([0, 1, 0, 2, 2, 2, 9]))
    assert groups.unique(return_inverse=True)[1].tolist() == [0, 1, 0]


def test_lint_says_what_equal_captions_do(store: FeatureStore) -> None:
    found = {finding.check: finding for finding in lint_plan(make_recipe(), store, CPU)}
    assert "dev-captions" in found
    assert found["dev-captions"].message.startswith(
        "the dev split has 5 different captions for 60 images"
    )
    assert "equal captions and images are none" in found["negatives"].message
    assert {finding.level for finding in found.values()} == {"warning"}


def test_a_population_ends_where_fits_of_their_own_end(store: FeatureStore) -> None:
    train, dev = loaded(store)
    recipes = [make_recipe("schedule.epochs=3", f"optimizer.lr={lr}") for lr in (0.01, 0.02)]

    def made(recipe: Recipe) -> HeadFit:
        return HeadFit(initial_model(recipe, train=train, dev=dev, seed=0)[0], recipe, 0)

    members = [made(recipe) for recipe in recipes]
    plan = StepCount.of(recipes[0], train)
    assert (
        train_together(
            members,
            streams=MemberGenerators.seeded([1, 1], torch.device("cpu")),
            train=train,
            dev=dev,
            plan=plan,
            n_epochs=1000,
        )
        == {}
    )
    for member, recipe in zip(members, recipes, strict=True):
        alone = made(recipe)
        with seeded(1, torch.device("cpu")):
            run_training(
                alone,
                train=train,
                dev=dev,
                plan=plan,
                log=lambda _: None,
                save=lambda _: None,
            )
        for name, weight in alone.model.state_dict().items():
            torch.testing.assert_close(
                member.model.state_dict()[name],
                weight,
                rtol=1e-4,
                atol=1e-6,
            )
        assert [line["dev"]["mean_recall"] for line in member.history] == pytest.approx(
            [line["dev"]["mean_recall"] for line in alone.history],
            abs=2,
        )


@pytest.mark.parametrize(("name", "field"), [("captions", "caption_ids"), ("images", "content")])
def test_pairs_without_a_wrong_answer_are_refused(name: str, field: str) -> None:
    n_numbers = len(TRAIN.text) if field == "caption_ids" else len(TRAIN)
    equal = replace(TRAIN, **{field: torch.zeros(n_numbers, dtype=torch.int64)})
    with pytest.raises(RecipeError, match=f"all {n_numbers} training {name} are equal"):
        require_images(equal, TRAIN)
    different = torch.zeros(n_numbers, dtype=torch.int64)
    different[0] = 1
    require_images(replace(TRAIN, **{field: different}), TRAIN)


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_closed_form_refuses_features_that_are_all_equal(side: str) -> None:
    constant = torch.ones_like(getattr(TRAIN, side))
    pairs = replace(TRAIN, **{side: constant})
    recipe = load_recipe("cca", ["schedule.epochs=0", "closed_form.rank=[2]"])
    with pytest.raises(DataError, match=f"the {side} features of the training pairs are all equal"):
        initial_model(recipe, train=pairs, dev=TRAIN, seed=0)


def test_training_that_diverges_is_said_with_the_remedy() -> None:
    member, plan = make(["optimizer.lr=1e30", "schedule.epochs=3"], 0)
    with pytest.raises(DataError, match=r"lower optimizer\.lr"):
        run_training(
            member,
            train=TRAIN,
            dev=TRAIN,
            plan=plan,
            log=lambda _: None,
            save=lambda _: None,
        )
