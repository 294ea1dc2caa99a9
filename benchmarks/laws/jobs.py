"""Jobs: what has to be trained and measured so that laws can be decided. Jobs that laws share are
one job."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from typing import Any, Literal

from apecache.encoders.load import count_classes, shape_tower
from apecache.encoders.spec import EncoderSpec
from apecache.encoders.tower import Tower
from apecache.errors import EncoderError, RecipeError
from apecache.fingerprint import Fingerprint, Json, Modality
from apecache.plan.counting import PlanSpec
from apecache.plan.counting_shared import TeacherSizes, count_teacher
from apecache.plan.devices import Device
from apecache.plan.plan import Cost, ModelCosts, cost_of, count_model
from apecache.recipes.recipe import Recipe, load_recipe, parse_recipe
from apecache.recipes.schedule import OptimizerSpec, ScheduleSpec
from benchmarks.laws.law import COUNTED, SHIFTS, Arm, Claim, Law
from benchmarks.laws.setting import LawsSetting, Size
from benchmarks.laws.testable import HEADS_ALONE

EVALUATIONS = 10
"""On dev, of a run whose steps the size says: about so many."""
DEV_SHARE = 10
DEV_IMAGES = 500
FEWEST = 20
"""Training images of an arm, dev among them, however small its share."""
TOKENS = 16
"""Of a caption, where costs are counted."""
COUNTED_ON = Device(name="counted", flops=1.0, memory_bytes=None, source="operations alone matter")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run. `image`, `text`, `teacher`: encoders with their own weights; `images`: of training,
    dev among them (None: all); `fits` False: it is only counted. `autocast`: as fit-encoder takes
    it."""

    recipe: Recipe
    image: EncoderSpec
    text: EncoderSpec
    teacher: EncoderSpec | None
    start: str
    images: int | None
    noise: float
    seed: int
    fits: bool = True
    autocast: Literal["float32", "bfloat16"] = "float32"

    @cached_property
    def about(self) -> dict[str, Json]:
        """What makes it this job, without paths."""
        specs = {"image": self.image, "text": self.text, "teacher": self.teacher}
        names = {side: None if spec is None else _plain(spec) for side, spec in specs.items()}
        own = {
            "start": self.start,
            "images": self.images,
            "noise": self.noise,
            "seed": self.seed,
            "fits": self.fits,
        }
        own |= {"autocast": self.autocast} if self.autocast != "float32" else {}
        recipe = {
            k: v
            for k, v in self.recipe.model_dump(mode="json").items()
            if k not in ("source", "summary")
        }
        return {"recipe": recipe, **names, **own}

    @cached_property
    def digest(self) -> str:
        return Fingerprint(fields=self.about).digest[:16]

    def encoder(self, side: Modality) -> EncoderSpec:
        """With the pooling that the recipe asks for."""
        towers = self.recipe.towers
        spec, pooling = (
            (self.image, towers.image_pooling)
            if side == "image"
            else (self.text, towers.text_pooling)
        )
        return spec if pooling == "default" else replace(spec, pooling=pooling)

    def features(self, side: Modality) -> EncoderSpec | None:
        """What is read from the cache; None: the side runs from its inputs."""
        head = self.recipe.image if side == "image" else self.recipe.text
        if head.cut == "tokens":
            return replace(self.encoder(side), pooling="tokens")
        if not self.recipe.towers.may_train(side):
            return self.encoder(side)
        seen_otherwise = side == "image" and self.recipe.augmentation.image is not None
        if seen_otherwise or self.recipe.shared or self.start == "random":
            return None
        cut = count(self).sides[side == "text"].cut
        return (
            replace(self.encoder(side), pooling="tokens", layer=cut)
            if isinstance(cut, int)
            else None
        )


def _plain(spec: EncoderSpec) -> dict[str, Json]:
    return {**asdict(spec), "name": spec.slug if spec.folder else spec.name}


def count(job: Job) -> ModelCosts:
    """The recipe on these encoders, nothing loaded. Raises EncoderError where they are no towers.

    Counting takes seconds, so jobs that differ in what does not matter to it, such as their
    schedule, share it.
    """
    recipe = job.recipe.model_copy(
        update={"schedule": ScheduleSpec(), "optimizer": OptimizerSpec()}
    )
    same: Any = {
        "images": None,
        "noise": 0.0,
        "start": "pretrained",
        "seed": 0,
        "fits": True,
        "autocast": "float32",
    }
    return _count(replace(job, recipe=recipe, **same))


@cache
def _count(job: Job) -> ModelCosts:
    spec = _plan_spec(job)
    teacher = partial(_taught, job, spec) if job.recipe.distillation else None
    return count_model(
        job.recipe,
        image=partial(_shape, job, "image"),
        text=partial(_shape, job, "text"),
        spec=spec,
        teacher=teacher,
    )


def _shape(job: Job, side: Modality) -> Tower:
    """Of a frozen side any encoder can be counted, as `apecache plan` counts it."""
    return shape_tower(job.encoder(side), is_frozen=job.recipe.towers.is_frozen(side))


def _plan_spec(job: Job) -> PlanSpec:
    images = 1000 if job.images is None else job.images
    return PlanSpec(rows=max(2, images - min(DEV_IMAGES, images // DEV_SHARE)), tokens=TOKENS)


def _taught(job: Job, spec: PlanSpec) -> TeacherSizes:
    assert job.teacher is not None
    assert job.recipe.distillation is not None
    if job.recipe.distillation.kind == "classes":
        return TeacherSizes(dim=count_classes(job.teacher))
    return count_teacher(shape_tower(job.teacher), spec)


def counted_costs(job: Job) -> dict[str, float]:
    """The counted metrics; nothing for encoders that cannot be counted."""
    try:
        found = count(job)
    except (EncoderError, RecipeError):
        return {}
    cost = _cost(job, found)
    return {
        "trained": found.n_trained,
        "step-flops": cost.step_flops,
        "total-flops": cost.total_flops,
        "peak-bytes": cost.peak_bytes,
    }


def training_flops(job: Job) -> float:
    """Of all its steps, without what fills the cache; 0 for encoders that cannot be counted."""
    try:
        cost = _cost(job, count(job))
    except (EncoderError, RecipeError):
        return 0.0
    return float(cost.total_flops - cost.once_flops)


def _cost(job: Job, counted: ModelCosts) -> Cost:
    return cost_of(
        job.recipe,
        model=counted,
        spec=_plan_spec(job),
        device=COUNTED_ON,
        cached=True,
    )


# --- from arms to jobs ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A claim of a law with the jobs of each of its arms, one for each seed (a closed form and what
    is only counted have one for all), or why it cannot be tried. `heads`: heads alone on the same
    encoders and images. `wants`: what must be measured of its jobs besides retrieval."""

    law: Law
    claim: Claim
    jobs: dict[str, tuple[Job, ...]]
    heads: Job | None = None
    why_not: str = ""

    @property
    def wants(self) -> str:
        return self.claim.metric

    @property
    def all_jobs(self) -> tuple[Job, ...]:
        heads = () if self.heads is None else (self.heads,)
        return (*(job for jobs in self.jobs.values() for job in jobs), *heads)

    @property
    def gap(self) -> float:
        """Published, without its sign; -1 where none is."""
        return -1.0 if self.claim.published is None else abs(self.claim.published)


def plan_law(law: Law, setting: LawsSetting) -> tuple[Planned, ...]:
    towers = any(not load_recipe(arm.recipe).trains_heads_alone for arm in law.arms.values())
    return tuple(
        _planned(law, claim=claim, setting=setting, towers=towers) for claim in law.claims()
    )


def _planned(law: Law, claim: Claim, setting: LawsSetting, towers: bool) -> Planned:
    reasons = [
        reason for name in claim.weights if (reason := _lacking(law.arms[name], claim, setting))
    ]
    if reasons:
        return Planned(law=law, claim=claim, jobs={}, why_not="; ".join(dict.fromkeys(reasons)))
    plain = sees_plain_images(law)
    try:
        found = {
            name: tuple(
                _jobs(
                    law.arms[name],
                    claim=claim,
                    setting=setting,
                    towers=towers,
                    plain=plain,
                )
            )
            for name in claim.weights
        }
        for job in (jobs[0] for jobs in found.values()):
            if not job.recipe.trains_heads_alone:
                count(job)
    except (EncoderError, RecipeError) as error:
        return Planned(law=law, claim=claim, jobs={}, why_not=str(error))
    first = next(iter(found.values()))[0]
    return Planned(law=law, claim=claim, jobs=found, heads=_heads_alone(first, claim))


def _heads_alone(job: Job, claim: Claim) -> Job | None:
    """A closed form on the encoders and images of an arm; None for what is only counted."""
    if claim.metric in COUNTED:
        return None
    recipe = load_recipe(HEADS_ALONE)
    return replace(job, recipe=recipe, teacher=None, start="pretrained", seed=0, autocast="float32")


def _lacking(arm: Arm, claim: Claim, setting: LawsSetting) -> str:
    for role in (arm.image, arm.text, arm.teacher):
        if role and role not in setting.encoders:
            return f"it needs --encoder {role}=…"
    if arm.teacher and setting.encoders[arm.teacher].name == setting.encoders[arm.image].name:
        return f"--encoder {arm.teacher}=… must be another encoder than the student's"
    if claim.metric == "top1" and setting.labels is None:
        return "it needs --labels"
    if claim.metric == "unseen" and setting.languages is None:
        return "it needs --languages"
    if arm.start == "random" and not all(
        setting.encoders[role].folder for role in (arm.image, arm.text)
    ):
        return "random weights need encoders in local folders"
    return ""


def _jobs(
    arm: Arm,
    claim: Claim,
    setting: LawsSetting,
    towers: bool,
    plain: bool,
) -> Iterator[Job]:
    size = setting.size
    most = sum(pair.split == "train" for pair in setting.pairs)
    whole = min(most, (size.images if towers else size.head_images) or most)
    images = max(min(whole, FEWEST), round(whole * arm.data))
    recipe = recipe_of(arm, setting=setting, images=images, towers=towers, plain=plain)
    teacher = _teacher(arm, setting, recipe)
    specs = setting.encoders[arm.image], setting.encoders[arm.text]
    fits = claim.metric not in COUNTED
    still = not (recipe.schedule.epochs or recipe.schedule.steps) or not fits
    autocast = "float32" if recipe.trains_heads_alone or still else size.autocast
    for seed in range(1 if still else setting.seeds):
        image, text = specs
        yield Job(
            recipe=recipe,
            image=image,
            text=text,
            teacher=teacher,
            start=arm.start,
            images=images,
            noise=arm.noise,
            seed=seed,
            fits=fits,
            autocast=autocast,
        )


def _teacher(arm: Arm, setting: LawsSetting, recipe: Recipe) -> EncoderSpec | None:
    """Classes are taught from the encoder's own pooled features, else the CLS before the final norm
    is."""
    if recipe.distillation is None:
        return None
    spec = setting.encoders[arm.teacher or arm.image]
    return spec if recipe.distillation.kind == "classes" else replace(spec, pooling="cls", layer=-1)


def sees_plain_images(law: Law) -> bool:
    """Whether the arms of a law are trained without augmented images: where some of them read
    images from the cache, all arms see the images as they are."""
    seen = {
        str(load_recipe(arm.recipe, [s for s in arm.settings if "_HALF" not in s]).augmentation)
        for arm in law.arms.values()
    }
    return len(seen) > 1


def recipe_of(
    arm: Arm,
    setting: LawsSetting,
    images: int,
    towers: bool,
    plain: bool = False,
) -> Recipe:
    """The arm's recipe at the size's steps and batch; `plain`: without augmented images.

    Raises:
        RecipeError: its settings do not work. EncoderError: half of a tower is asked for of what is
            none.
    """
    recipe = load_recipe(arm.recipe, [_halved(text, arm, setting) for text in arm.settings])
    values = {k: v for k, v in recipe.model_dump(mode="json").items() if k not in arm.without}
    if plain:
        values["augmentation"] = {**values["augmentation"], "image": None}
    recipe = parse_recipe(values, arm.recipe)
    if teacher := _teacher(arm, setting, recipe):
        values["distillation"] = {**values["distillation"], "teacher": teacher.slug}
    values |= _sized(recipe, size=setting.size, arm=arm, images=images, towers=towers)
    return parse_recipe(values, arm.recipe)


def _sized(recipe: Recipe, size: Size, arm: Arm, images: int, towers: bool) -> dict[str, Any]:
    schedule = recipe.schedule
    optimizer = recipe.optimizer
    if not (schedule.epochs or schedule.steps):
        return {}
    batch = (
        min(schedule.batch_size, size.batch or schedule.batch_size)
        if towers
        else schedule.batch_size
    )
    rate = optimizer.lr * math.sqrt(batch / schedule.batch_size)
    if size.lr is not None and not recipe.trains_heads_alone:
        rate = size.lr
    steps = size.steps if towers else size.head_steps
    if steps is None:
        count = schedule.steps or schedule.epochs
        changed: dict[str, Any] = {
            "steps" if schedule.steps else "epochs": max(1, round(count * arm.steps))
        }
    else:
        steps = max(1, round(steps * arm.steps))
        # Epochs only say when dev is looked at, where steps are given.
        used = images - min(DEV_IMAGES, images // DEV_SHARE)
        n_epochs = -(-steps // max(1, used // min(batch, used)))
        changed = {"steps": steps, "evaluate_every": max(1, n_epochs // EVALUATIONS)}
    schedule = schedule.model_copy(update={"batch_size": batch, **changed})
    return {
        "schedule": schedule.model_dump(mode="json"),
        "optimizer": {**optimizer.model_dump(mode="json"), "lr": rate},
    }


def _halved(text: str, arm: Arm, setting: LawsSetting) -> str:
    """IMAGE_HALF and TEXT_HALF of a setting: half of the tower's blocks."""
    for word, role in (("IMAGE_HALF", arm.image), ("TEXT_HALF", arm.text)):
        if word in text:
            text = text.replace(word, str(_n_blocks(setting.encoders[role]) // 2))
    return text


@cache
def _n_blocks(spec: EncoderSpec) -> int:
    return shape_tower(spec).n_blocks


# --- their order ----------------------------------------------------------------------------------


def in_turn(planned: Sequence[Planned]) -> list[Planned]:
    """The claim with the largest published gap of each law, laws with the largest first; then the
    second ones, and so on. Claims that cannot be tried are left out."""
    laws: dict[str, list[Planned]] = {}
    for one in planned:
        if not one.why_not:
            laws.setdefault(one.law.id, []).append(one)
    for claims in laws.values():
        claims.sort(key=lambda one: -one.gap)
    ranked = sorted(laws.values(), key=lambda claims: -claims[0].gap)
    deepest = max(map(len, ranked), default=0)
    return [claims[place] for place in range(deepest) for claims in ranked if place < len(claims)]


def jobs_in_turn(planned: Sequence[Planned]) -> dict[Job, set[str]]:
    """Every job once, in the order in which they are run, with what must be measured of it."""
    wanted: dict[Job, set[str]] = {}
    for one in in_turn(planned):
        for jobs in one.jobs.values():
            for job in jobs:
                wanted.setdefault(job, set()).add(one.wants)
    # Closed forms of seconds, which all the others are compared with.
    for one in in_turn(planned):
        if one.heads is not None:
            wanted.setdefault(one.heads, set()).update({"recall", one.wants} - {*SHIFTS})
    return wanted
