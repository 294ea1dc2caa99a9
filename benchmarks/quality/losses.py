"""Which losses and tricks are worth their place in the `loss` section of a recipe.

    python -m benchmarks.quality.losses --store flickr8k/store --image-features A --text-features T --work runs
    python -m benchmarks.quality.losses --quick            # made-up features, for a smoke test

Every trick is fitted on the recipe `projection` with up to three strengths and seed 0. The best one
on dev (a seeded 500 of train) is fitted with the other seeds, unless seed 0 is worse than
`projection` beyond the interval over images. Val is only reported. `dev gain` and `val gain` are the
differences of the mean R@1 to `projection` with the same seeds under the ranking in `against`, with
their 95 % intervals over seeds (if there are several) and images. A trick pays if the lower end on
dev is above 0. Runs stay in `--work`; those that are finished there are not fitted again.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import apecache
from apecache.evaluate.comparison import MetricDifference, compare_hits
from apecache.evaluate.embeddings import Embeddings, embed_store, split_mask
from apecache.heads.head import embed
from apecache.heads.normalization import normalize
from apecache.losses.contrastive import Groups
from apecache.losses.registered import ComputeLoss
from apecache.metrics.csls import measure_csls
from apecache.metrics.protocols import measure_retrieval
from apecache.metrics.statistics import RetrievalHits
from apecache.recipes.recipe import load_recipe
from apecache.runs.heads import DESCRIPTION, TrainedHeads, load_heads
from apecache.store.equal import equal_images
from apecache.store.reader import FeatureStore
from apecache.train import batches
from apecache.train.batches import FeaturePairs, SplitSpec, choose_splits
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec, load_splits
from benchmarks.quality.candidate_losses import (
    MinedNegatives,
    MinedRows,
    caption_pairs,
    centering,
    csls_training,
    label_smoothing,
    mine_rows,
    negative_free,
)
from benchmarks.quality.heads import made_up
from benchmarks.quality.options import add_finished, store_parser
from benchmarks.record import Goal, print_goals, print_table, write_result

RECIPE = "projection"
METRIC = "mean R@1"
GUARD_QUANTILE = 0.25
"""Two images are probably positives of each other if their captions are as near as those of one
image are in all but this share of the images."""
SPLITS = ("dev", "val")
Ranking = str
"""`cosine`; `centered`: cosines of embeddings less the mean of the training ones; `csls`."""
Hits = Mapping[tuple[str, Ranking], RetrievalHits]
"""The answers of a run by split and ranking."""


@dataclass(frozen=True, kw_only=True)
class Trick:
    """Say how a trick is fitted and measured."""

    name: str
    strengths: tuple[float, ...] = (0.0,)
    build: Callable[[float], ComputeLoss] | None = None
    """Builds the loss of a strength; None: the recipe's own."""
    settings: tuple[str, ...] = ()
    """Overrides of the recipe."""
    rankings: tuple[Ranking, ...] = ("cosine",)
    """Of the rows. The first one chooses the strength."""
    against: Ranking = ""
    """Ranking of `projection` that rows are compared with; empty: that of the row."""
    control: str = ""
    """Trick that this one adds to: rows have the gain over that one too."""
    is_mined: bool = False
    """Whether the loss needs the rows of the training pairs."""


def tricks(mined: Callable[[], MinedRows]) -> list[Trick]:
    return [
        Trick(name="label smoothing", strengths=(0.05, 0.15), build=label_smoothing),
        Trick(name="two captions of an image", settings=("loss.captions=2",)),
        Trick(
            name="caption-to-caption positives",
            strengths=(0.25, 1.0),
            build=caption_pairs,
            settings=("loss.captions=2",),
            control="two captions of an image",
        ),
        Trick(
            name="CSLS in the fit",
            strengths=(1.0, 0.5),
            build=csls_training,
            rankings=("csls", "cosine"),
        ),
        Trick(name="centering after the fit", rankings=("centered",), against="cosine"),
        Trick(
            name="centering in the fit",
            strengths=(1.0, 0.5),
            build=centering,
            rankings=("centered", "cosine"),
            against="cosine",
        ),
        Trick(
            # 0 mined negatives: the guard alone, within the batch.
            name="mined negatives with a guard",
            strengths=(32.0, 0.0, 8.0),
            build=lambda count: MinedNegatives(mined(), int(count)),
            is_mined=True,
        ),
        Trick(
            name="negative-free with SIGReg",
            strengths=(0.1, 0.02, 0.5),
            build=negative_free,
            # LeVLJEPA's width. A loss without a temperature has none to learn.
            settings=("image.dim=256", "text.dim=256", "loss.learnable=false"),
        ),
    ]


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        store = FeatureStore.open(made_up(work) if options.quick else options.store)
        rows = Bench(store, options, work).rows()
    print_table(rows)
    met = goals(rows)
    if not options.quick:
        print_goals(met)
    if options.json or not options.quick:
        write_result("quality-losses", goals=met, rows=rows, path=options.json)


def parse_arguments() -> argparse.Namespace:
    parser = store_parser("Recall of heads with other losses.")
    parser.add_argument("--tricks", nargs="+", help="names; default: all")
    add_finished(parser)
    options = parser.parse_args()
    if options.quick:
        options.seeds = 1
    elif not options.store:
        parser.error("--store is needed (or --quick)")
    return options


class Bench:
    """Fit and measure tricks on one store.

    Args:
        store: Store with the splits train and val; with `--quick` also dev.
        options: Options of the command.
        work: Folder of the runs.
    """

    def __init__(self, store: FeatureStore, options: argparse.Namespace, work: Path) -> None:
        self.store = store
        self.options = options
        self.work = work
        self.splits = SplitSpec(dev="dev" if options.quick else None)
        self.image = store.array("image", options.image_features)
        self.text = store.array("text", options.text_features)
        self.masks = dict(
            zip(
                ("train", "dev"),
                choose_splits(store.pairs, self.splits, equal_images(self.image)),
                strict=True,
            )
        )
        self.masks["val"] = split_mask(store, "val")
        self._mined: MinedRows | None = None

    def rows(self) -> list[dict[str, Any]]:
        seeds = range(self.options.seeds)
        plain = Trick(name=RECIPE, rankings=("cosine", "csls"))
        base = [self.measured(plain, 0.0, seed) for seed in seeds]
        rows = [self.row(plain, 0.0, ranking, base, base) for ranking in plain.rankings]
        chosen_tricks = [
            trick
            for trick in tricks(self.mined)
            if not self.options.tricks or trick.name in self.options.tricks
        ]
        # Round by round, and seeds last: a measurement that is broken off has tried every trick.
        for number in range(max(len(trick.strengths) for trick in chosen_tricks)):
            for trick in chosen_tricks:
                for strength in trick.strengths[number : number + 1]:
                    self.try_to_fit(trick, strength, 0)
        answers_of: dict[str, list[Hits]] = {}
        for trick in chosen_tricks:
            first = self.first_seed(trick)
            if not first:
                continue
            dev_values = {strength: value(hits, "dev", trick) for strength, hits in first.items()}
            chosen = max(dev_values, key=lambda strength: dev_values[strength])
            answers = [first[chosen]]
            one_seed = self.row(trick, chosen, trick.rankings[0], answers, base[:1])
            if one_seed["dev high"] >= 0:
                answers += [
                    self.measured(trick, chosen, seed)
                    for seed in seeds[1:]
                    if self.try_to_fit(trick, chosen, seed)
                ]
            answers_of[trick.name] = answers
            tried = {f"{strength:g}": round(dev, 2) for strength, dev in dev_values.items()}
            for ranking in trick.rankings:
                # A trick with one seed is compared with that seed alone: over images.
                row = self.row(trick, chosen, ranking, answers, base[: len(answers)])
                if trick.control in answers_of:
                    control = answers_of[trick.control][: len(answers)]
                    row |= gains_over_control(answers, control, ranking)
                rows.append({**row, "dev R@1 of strengths, seed 0": tried})
                print(rows[-1], flush=True)
        return rows

    def first_seed(self, trick: Trick) -> dict[float, Hits]:
        """Measure every strength with seed 0."""
        return {
            strength: self.measured(trick, strength, 0)
            for strength in trick.strengths
            if self.try_to_fit(trick, strength, 0)
        }

    def try_to_fit(self, trick: Trick, strength: float, seed: int) -> bool:
        """Fit a run unless the command is told to fit none; return whether there is one."""
        if (
            self.options.finished
            and not (self.folder(trick, strength, seed) / DESCRIPTION).is_file()
        ):
            return False
        self.fitted(trick, strength, seed)
        return True

    def measured(self, trick: Trick, strength: float, seed: int) -> Hits:
        """Fit a run unless it is finished, and rank both splits."""
        heads = load_heads(self.fitted(trick, strength, seed))
        hits: dict[tuple[str, Ranking], RetrievalHits] = {}
        for split in SPLITS:
            embedded = embed_store(heads, self.store, among=self.masks[split])
            for ranking in {"cosine", *trick.rankings}:
                hits[split, ranking] = self.ranked(heads, embedded, ranking)
        return hits

    def fitted(self, trick: Trick, strength: float, seed: int) -> Path:
        """Return the folder of a finished run."""
        run = self.folder(trick, strength, seed)
        if (run / DESCRIPTION).is_file():
            return run
        run.parent.mkdir(parents=True, exist_ok=True)
        settings = list(trick.settings)
        settings += ["schedule.epochs=2"] if self.options.quick else []
        if trick.build is not None:
            loss = f"{trick.name} {strength:g}"
            apecache.register_loss(loss)(trick.build(strength))
            settings += ["loss.kind=custom", f"loss.custom={loss}"]
        spec = FitSpec(
            self.options.image_features,
            text_features=self.options.text_features,
            splits=self.splits,
            seed=seed,
            device="cpu",
        )
        recipe = load_recipe(RECIPE, settings)
        with numbered_rows(trick.is_mined):
            fit_head(self.store, recipe=recipe, out=run, spec=spec)
        return run

    def folder(self, trick: Trick, strength: float, seed: int) -> Path:
        # Centering after the fit takes the runs of the recipe.
        is_plain = trick.build is None and not trick.settings
        name = RECIPE if is_plain else f"{trick.name.replace(' ', '-')}-{strength:g}"
        return self.work / "runs" / f"{name}-{seed}"

    def ranked(self, heads: TrainedHeads, embedded: Embeddings, ranking: Ranking) -> RetrievalHits:
        image = embedded.image
        text = embedded.text
        if ranking == "centered":
            train = embed_store(heads, self.store, among=self.masks["train"])
            image = normalize(image - train.image.mean(0))
            text = normalize(text - train.text.mean(0))
        measure = measure_csls if ranking == "csls" else measure_retrieval
        return measure(image, text, embedded.image_of_text, relevance=embedded.relevance).hits

    def mined(self) -> MinedRows:
        """Mine all training rows once, with the heads of the plain recipe and seed 0."""
        if self._mined is not None:
            return self._mined
        heads = load_heads(self.fitted(Trick(name=RECIPE), 0.0, 0))
        # In the order of the rows that a fit of the same splits draws.
        train, _ = load_splits(
            self.store,
            image=self.image,
            text=self.text,
            spec=self.splits,
            device=torch.device("cpu"),
        )
        captions = mean_of_captions(normalize(train.text), train)
        self._mined = mine_rows(
            embed(heads.image.head, train.image),
            text=normalize(mean_of_captions(embed(heads.text.head, train.text), train)),
            captions=captions,
            least=guard(captions, train),
            count=min(32, len(train) - 1),
        )
        left_out = 1 - float(self._mined.allowed.float().mean()) - 1 / len(train)
        print(f"the guard leaves out {100 * left_out:.2f} % of all pairs", flush=True)
        return self._mined

    def row(
        self,
        trick: Trick,
        strength: float,
        ranking: Ranking,
        answers: Sequence[Hits],
        base: Sequence[Hits],
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"trick": trick.name, "strength": strength, "ranking": ranking}
        row["against"] = trick.against or ranking
        for split in SPLITS:
            difference = compare_hits(
                [hits[split, ranking] for hits in answers],
                [hits[split, row["against"]] for hits in base],
                metric=METRIC,
                chance=0.0,
            )
            row[f"{split} R@1"] = round(difference.value_a, 2)
            if trick.name != RECIPE:
                row |= gain_columns(difference, split)
        seconds = [
            float(load_heads(self.fitted(trick, strength, seed)).training["seconds"])
            for seed in range(len(answers))
        ]
        row["seconds"] = round(statistics.median(seconds), 1)
        counts = {f"n_{split}_images": answers[0][split, ranking].n_images for split in SPLITS}
        return {**row, "seeds": len(answers), **counts}


def gains_over_control(
    answers: Sequence[Hits],
    control: Sequence[Hits],
    ranking: Ranking,
) -> dict[str, float]:
    columns: dict[str, float] = {}
    for split in SPLITS:
        difference = compare_hits(
            [hits[split, ranking] for hits in answers],
            [hits[split, ranking] for hits in control],
            metric=METRIC,
            chance=0.0,
        )
        columns |= gain_columns(difference, f"{split} over control:")
    return columns


def gain_columns(difference: MetricDifference, prefix: str) -> dict[str, float]:
    return {
        f"{prefix} gain": round(difference.difference, 2),
        f"{prefix} low": round(difference.low, 2),
        f"{prefix} high": round(difference.high, 2),
    }


def value(hits: Hits, split: str, trick: Trick) -> float:
    """Return the mean R@1 of one run under the trick's first ranking."""
    answers = hits[split, trick.rankings[0]]
    return answers.value([("image_to_text", 1), ("text_to_image", 1)])


@contextmanager
def numbered_rows(enabled: bool) -> Iterator[None]:
    """Let the groups of batches hold rows of the training pairs, for losses that need them."""
    usual = batches.groups_of

    def rows_of(
        pairs: FeaturePairs,
        order: Tensor,
        caption_rows: Tensor,
        size: int,
    ) -> Iterator[Groups | None]:
        for rows in order.split(size):
            yield Groups(image=rows, text=rows, n_pairs=len(rows))

    if enabled:
        batches.groups_of = rows_of
    try:
        yield
    finally:
        batches.groups_of = usual


def mean_of_captions(text: Tensor, train: FeaturePairs) -> Tensor:
    """Average the vectors of each image's captions: [m, dim] to [n, dim]."""
    owners = train.image_of_text
    totals = torch.zeros(len(train), text.shape[1]).index_add_(0, owners, text)
    return totals / train.first_text.diff().unsqueeze(1)


def guard(captions: Tensor, train: FeaturePairs) -> float:
    """Return the mean cosine of two captions from which on they may describe the same image.

    It is the quantile `GUARD_QUANTILE` of that between the captions of one image.

    Args:
        captions: Mean unit vector of each image's captions, [n, dim].
        train: Training pairs.
    """
    count = train.first_text.diff()
    # The squared length of a sum of c unit vectors is c + the c (c - 1) cosines of its pairs.
    pair_sums = captions.square().sum(1) * count.square() - count
    several = count > 1
    cosines: NDArray[Any] = (pair_sums / (count * (count - 1)))[several].numpy()
    return float(np.quantile(cosines, GUARD_QUANTILE))


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    return [
        Goal(
            name=f"{row['trick']}, {row['ranking']}: lower end of the gain on dev",
            value=row["dev low"],
            target=0.0,
            better="higher",
        )
        for row in rows
        if "dev low" in row
    ]


if __name__ == "__main__":
    main()
