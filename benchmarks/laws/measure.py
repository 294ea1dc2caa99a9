"""One job: features that it reads, its fit, and what is measured of it. Its weights are not
kept."""

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apecache.data.images import load_image
from apecache.data.pairs import PairSource
from apecache.encoders.spec import EncoderSpec
from apecache.errors import ApecacheError
from apecache.evaluate.analysis import layernorm_shift
from apecache.evaluate.class_names import match_labels
from apecache.evaluate.embeddings import embed_store
from apecache.evaluate.labeled import LabeledSpec, labeled_images, wanted_labels
from apecache.evaluate.prompts import TEMPLATES
from apecache.evaluate.zeroshot import class_embeddings
from apecache.extraction.run import ExtractSpec, extract
from apecache.fingerprint import Modality
from apecache.metrics.relevance import Relevance
from apecache.metrics.retrieval import (
    TIE,
    image_to_text_ranks,
    retrieval_report,
    text_to_image_ranks,
)
from apecache.runs import encoders as trained_encoders
from apecache.runs import heads as checkpoint
from apecache.runs.folder import read_history
from apecache.runs.ledger import load_ledger
from apecache.runs.load import Run, load_run, text_embedder
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.fit_encoder import fit_encoder
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec
from benchmarks.laws.jobs import Job, counted_costs
from benchmarks.laws.outcome import KS, Outcome, Ranks
from benchmarks.laws.random_weights import write_random
from benchmarks.laws.setting import LawsSetting, part_of, translated

Say = Callable[[str], None]
FAILURES = (ApecacheError, RuntimeError, MemoryError)
"""What a run may fail with without ending the others: RuntimeError is what torch raises where
memory ends."""


@dataclass(kw_only=True)
class Bench:
    """What jobs share: one store with a view for each part of the pairs, so that an image and a
    caption are encoded once for all parts. `stores`: by part."""

    setting: LawsSetting
    jobs: tuple[Job, ...]
    say: Say = lambda _: None
    stores: dict[str, FeatureStore] = field(default_factory=dict)
    names: dict[tuple[str, EncoderSpec], str] = field(default_factory=dict)

    def part(self, job: Job) -> PairSource:
        setting = self.setting
        return part_of(
            setting.pairs,
            split=setting.split,
            images=job.images,
            test_images=setting.size.test_images,
            noise=job.noise,
        )

    def store(self, job: Job) -> FeatureStore:
        """With the features of all jobs on the same pairs; encoders of random weights are written
        first."""
        part = self.part(job)
        name = part.digest[:16]
        if name not in self.stores:
            sharing = [
                one
                for one in self.jobs
                if one.fits and (one.images, one.noise) == (job.images, job.noise)
            ]
            self.stores[name] = self._extracted(part, "stores/pairs", sharing)
        return self.stores[name]

    def languages(self, job: Job) -> FeatureStore:
        """The reported images with captions in other languages."""
        assert self.setting.languages is not None
        part = translated(self.part(job), self.setting.languages, self.setting.split)
        name = f"languages-{part.digest[:16]}"
        if name not in self.stores:
            sharing = [one for one in self.jobs if one.fits and one.text == job.text]
            self.stores[name] = self._extracted(part, "stores/languages", sharing)
        return self.stores[name]

    def _extracted(self, part: PairSource, name: str, jobs: Iterable[Job]) -> FeatureStore:
        found: dict[Modality, dict[EncoderSpec, None]] = {"image": {}, "text": {}}
        for job in jobs:
            for spec in (*self.specs(job), *((job.teacher,) if job.teacher else ())):
                found[spec.modality][spec] = None
        path = self.setting.work / name
        images, texts = (tuple(found[side]) for side in ("image", "text"))
        self.say(
            f"features of {len(part):,} images and {len(part.captions):,} captions in {path.name}"
        )
        extract(part, path, ExtractSpec(images, texts, device=self.setting.device, add=True))
        return FeatureStore.open(path)

    def name(self, job: Job, spec: EncoderSpec) -> str:
        """Of its features in the job's store, where those of an equal encoder may be there under
        another name: the pooling `default` may be `cls`."""
        store = self.store(job)
        if spec.slug in [array.name for array in store.arrays(spec.modality)]:
            return spec.slug
        if (known := self.names.get((str(store.path), spec))) is None:
            images, texts = ((spec,), ()) if spec.modality == "image" else ((), (spec,))
            alone = ExtractSpec(images, texts, device=self.setting.device, add=True)
            (array,) = extract(self.part(job), store.path, alone).arrays
            known = self.names[str(store.path), spec] = array.name
        return known

    def specs(self, job: Job) -> list[EncoderSpec]:
        """Features of both sides; of one that runs from its inputs the pooled ones, which another
        job may read."""
        sides: tuple[Modality, ...] = ("image", "text")
        return [self.own(job, job.features(side) or job.encoder(side)) for side in sides]

    def own(self, job: Job, spec: EncoderSpec) -> EncoderSpec:
        """The encoder itself, or for a random start its copy with random weights, one for each
        seed."""
        if job.start == "pretrained":
            return spec
        folder = (
            self.setting.work.resolve()
            / "random"
            / f"{replace(spec, pooling='default').slug}-{job.seed}"
        )
        write_random(spec, folder, job.seed)
        return replace(spec, name=str(folder))


def measure(job: Job, bench: Bench, wants: Iterable[str]) -> Outcome:
    """Train and measure; a run that fails says why. An interrupt is no failure, and the fit goes on
    the next time."""
    outcome = Outcome(digest=job.digest, about=job.about, heads_alone=job.recipe.trains_heads_alone)
    begin = time.perf_counter()
    cpu_begin = time.process_time()
    costs = counted_costs(job)
    if not job.fits:
        return replace(outcome, costs=costs)
    try:
        found = _measured(job, bench=bench, wants=set(wants), outcome=replace(outcome, costs=costs))
    except FAILURES as error:
        found = replace(
            outcome,
            error=f"{type(error).__name__}: {_without_path(error, bench.setting.work)}",
        )
    return replace(
        found,
        seconds=round(time.perf_counter() - begin, 2),
        cpu_seconds=round(time.process_time() - cpu_begin, 2),
    )


def _without_path(error: BaseException, work: Path) -> str:
    """The first line, fit to be published: the work folder goes by its own name."""
    line = (str(error).splitlines() or [""])[0]
    return line.replace(f"{work.resolve()}", work.name).replace(f"{work}", work.name)[:300]


def _measured(job: Job, bench: Bench, wants: set[str], outcome: Outcome) -> Outcome:
    store = bench.store(job)
    media = bench.setting.pairs.media
    out = bench.setting.work / "runs" / job.digest

    def open_image(key: str) -> Any:
        return load_image(key, media).image

    costs = {**outcome.costs, **_fit(job, bench=bench, store=store, out=out, open_image=open_image)}
    run = load_run(out, bench.setting.device)
    embedded = embed_store(run, store=store, split=bench.setting.split, open_image=open_image)
    image_keys = [str(store.pairs.keys[row]) for row in embedded.image_rows]
    ranks, chance = _ranks(
        image_keys,
        image=embedded.image,
        text=embedded.text,
        owners=embedded.image_of_text,
        relevance=embedded.relevance,
    )
    outcome = replace(outcome, retrieval=ranks, costs=costs, chance=chance, **_learnt(job, out))
    if "top1" in wants:
        outcome = _with_labels(outcome, run, bench)
    if "unseen" in wants:
        outcome = _with_languages(
            outcome,
            run=run,
            store=bench.languages(job),
            bench=bench,
            open_image=open_image,
        )
    if wants & {"image-shift-rises", "text-shift-falls"}:
        outcome = replace(outcome, shifts=_shifts(run, bench))
    shutil.rmtree(out)
    return outcome


def _fit(
    job: Job,
    bench: Bench,
    store: FeatureStore,
    out: Path,
    open_image: Callable[[str], Any],
) -> dict[str, float]:
    """Costs as measured. A finished run that was not measured yet is measured without a fit."""
    sides: tuple[Modality, ...] = ("image", "text")
    found = [job.features(side) for side in sides]
    names = [None if spec is None else bench.name(job, bench.own(job, spec)) for spec in found]
    common: Any = {
        "splits": SplitSpec(train="train"),
        "seed": job.seed,
        "device": bench.setting.device,
    }
    common |= {
        "report_split": bench.setting.split,
        "image_features": names[0],
        "text_features": names[1],
    }
    if kept := load_ledger(out) if is_finished(out) else None:
        ledger = kept
    elif job.recipe.trains_heads_alone:
        ledger = fit_head(store, recipe=job.recipe, out=out, spec=FitSpec(**common)).ledger
    else:
        live = [
            bench.own(job, job.encoder(side)) if job.features(side) is None else None
            for side in sides
        ]
        own = FitEncoderSpec(image=live[0], text=live[1], autocast=job.autocast, **common)
        ledger = fit_encoder(
            store,
            recipe=job.recipe,
            out=out,
            spec=own,
            open_image=open_image,
        ).ledger
    measured = {"seconds": ledger.training_seconds, "measured-flops": float(ledger.flops)}
    return measured | (
        {} if ledger.peak_bytes is None else {"measured-peak": float(ledger.peak_bytes)}
    )


def _learnt(job: Job, run: Path) -> dict[str, Any]:
    """How far the training came: what `Outcome` holds of it."""
    ledger = load_ledger(run)
    lines = read_history(run)
    # Of a loss with further terms, such as distillation, the contrastive one is compared with a
    # guess.
    losses = [line.get("contrastive", line["loss"]) for line in lines if line["loss"] is not None]
    return {
        "loss": losses[-1] if losses else None,
        "candidates": 0 if ledger is None else ledger.n_negatives + 1,
        "samples": 0 if ledger is None else ledger.n_samples,
        "augmentation": str(job.recipe.augmentation.image),
    }


def is_finished(run: Path) -> bool:
    return any(
        (run / name).is_file() for name in (checkpoint.DESCRIPTION, trained_encoders.DESCRIPTION)
    )


def _ranks(
    keys: list[str],
    image: Tensor,
    text: Tensor,
    owners: Tensor,
    relevance: Relevance | None,
) -> tuple[Ranks, dict[str, float]]:
    """And the chance of each metric."""
    report = retrieval_report(image, text=text, image_of_text=owners, ks=KS, relevance=relevance)
    to_text = image_to_text_ranks(image, text=text, image_of_text=owners, relevance=relevance)
    to_image = text_to_image_ranks(image, text=text, image_of_text=owners, relevance=relevance)
    chance = [
        sum(table.values()) / len(KS)
        for table in (report.chance_image_to_text, report.chance_text_to_image)
    ]
    ones = (report.chance_image_to_text[1] + report.chance_text_to_image[1]) / 2
    ranks = Ranks(
        keys=tuple(keys),
        image=tuple(to_text.tolist()),
        text=tuple(to_image.tolist()),
        owners=tuple(owners.tolist()),
    )
    return ranks, {"tr": chance[0], "ir": chance[1], "recall": sum(chance) / 2, "r1": ones}


def _with_labels(outcome: Outcome, run: Run, bench: Bench) -> Outcome:
    assert bench.setting.labels is not None
    spec = LabeledSpec(
        bench.setting.labels,
        bench.setting.work / "labeled",
        device=bench.setting.device,
    )
    classes = match_labels(wanted_labels(spec))
    found = labeled_images(run, spec)
    weights = class_embeddings(text_embedder(run.text, spec.device), classes.names, TEMPLATES)
    scores = found.embedded @ weights.to(found.embedded.device).T
    target = torch.tensor([classes.place[label] for label in found.labels], device=scores.device)
    ranks = (scores >= scores.gather(1, target.unsqueeze(1)) - TIE).sum(1) - 1
    keys = tuple(str(row) for row in range(len(ranks)))
    chance = {**outcome.chance, "top1": 100 / len(classes.names)}
    return replace(outcome, labels=Ranks(keys=keys, image=tuple(ranks.tolist())), chance=chance)


def _with_languages(
    outcome: Outcome,
    run: Run,
    store: FeatureStore,
    bench: Bench,
    open_image: Callable[[str], Any],
) -> Outcome:
    embedded = embed_store(run, store=store, split=bench.setting.split, open_image=open_image)
    spoken = [str(store.pairs.languages[row]) for row in embedded.text_rows]
    found = dict[str, Ranks]()
    chances = list[float]()
    for language in sorted(set(spoken)):
        mask = torch.tensor([one == language for one in spoken], device=embedded.text.device)
        images, owners = torch.unique(embedded.image_of_text[mask], return_inverse=True)
        keys = [str(store.pairs.keys[embedded.image_rows[place]]) for place in images.tolist()]
        right = (
            None if embedded.relevance is None else embedded.relevance.select(owners, images, mask)
        )
        found[language], chance = _ranks(
            keys,
            image=embedded.image[images],
            text=embedded.text[mask],
            owners=owners,
            relevance=right,
        )
        chances.append(chance["recall"])
    return replace(
        outcome,
        languages=found,
        chance={**outcome.chance, "unseen": sum(chances) / len(chances)},
    )


def _shifts(run: Run, bench: Bench) -> dict[str, float]:
    """What the norms' weights and biases moved together would need one unit; the weights'
    correlation is taken."""
    found: dict[str, float] = {}
    for report in layernorm_shift(run, bench.setting.device):
        if report.correlation_weight is not None:
            rises = report.side == "image"
            name = "image-shift-rises" if rises else "text-shift-falls"
            found[name] = report.correlation_weight if rises else -report.correlation_weight
    return found
