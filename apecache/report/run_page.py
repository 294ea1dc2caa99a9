"""From runs to a page: learning curves of each run, and a gallery of what a run finds and misses."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from apecache.data.images import load_image
from apecache.data.media import Media
from apecache.errors import RowError
from apecache.evaluate.embeddings import Embeddings, embed_store
from apecache.evaluate.retrieval import text_to_image_ranks
from apecache.recipes.runs import Run
from apecache.report.gallery import Gallery, Hit, Result, thumbnail
from apecache.report.page import Chart, Curve, Table
from apecache.store.reader import FeatureStore
from apecache.train.ledger import load_ledger
from apecache.train.run_folder import read_history


def learning_charts(runs: Mapping[str, Path]) -> tuple[Chart, Chart]:
    """Training loss, and mean recall on the dev split (epoch 0: untrained), by run name."""
    histories = {name: list(read_history(path)) for name, path in runs.items()}
    losses = tuple(
        Curve(name, tuple((line["epoch"], line["loss"]) for line in lines if line["loss"] is not None))
        for name, lines in histories.items()
    )
    recalls = tuple(
        Curve(name, tuple((line["epoch"], line["dev"]["mean_recall"]) for line in lines))
        for name, lines in histories.items()
    )
    return (
        Chart("Training loss", "epoch", "InfoNCE", losses),
        Chart("Dev split: mean of R@1, 5, 10, both ways", "epoch", "recall, %", recalls),
    )


def ledger_table(runs: Mapping[str, Path]) -> Table:
    """What each run has cost, a column each; what a run's ledger does not know is left empty."""
    ledgers = {name: load_ledger(path) for name, path in runs.items()}
    costs = {name: dict(ledger.rows()) if ledger else {} for name, ledger in ledgers.items()}
    lines = dict.fromkeys(what for found in costs.values() for what in found)
    rows = tuple((what, *(found.get(what) for found in costs.values())) for what in lines)
    return Table("What it has cost", ("", *costs), rows)


def retrieval_galleries(
    run: Run, store: FeatureStore, split: str, media: Media, n_items: int = 6, top: int = 5
) -> tuple[Gallery, Gallery]:
    """Captions that find their image first, and captions that miss it in the top 10, evenly spread over the split."""
    embedded = embed_store(run, store, split, lambda key: load_image(key, media).image)
    ranks = text_to_image_ranks(embedded.image, embedded.text, embedded.image_of_text)
    hits = spread(torch.nonzero(ranks == 0).flatten().tolist(), n_items)
    misses = spread(torch.nonzero(ranks >= 10).flatten().tolist(), n_items)
    make = _ItemMaker(embedded, store, media, ranks, top)
    return (
        Gallery("Found", "Captions whose image came first.", tuple(make.item(text) for text in hits)),
        Gallery(
            "Missed", "Captions whose image is not among the first ten.", tuple(make.item(text) for text in misses)
        ),
    )


def spread(rows: Sequence[int], count: int) -> list[int]:
    """`count` of the rows at even distances (all of them, if there are fewer)."""
    return [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else list(rows)


class _ItemMaker:
    def __init__(self, embedded: Embeddings, store: FeatureStore, media: Media, ranks: Tensor, top: int) -> None:
        self.embedded, self.pairs, self.media, self.ranks, self.top = embedded, store.pairs, media, ranks, top
        texts = embedded.text_rows[::-1]  # so that an image's first usable caption stays
        self.captions = {int(self.pairs.image_rows[text]): int(text) for text in texts}

    def item(self, text: int) -> Hit:
        scores = self.embedded.image @ self.embedded.text[text]
        best = scores.topk(min(self.top, len(scores)))
        own = int(self.embedded.image_of_text[text])
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        results = tuple(self._result(image, score, image == own) for image, score in pairs)
        caption = str(self.pairs.captions[self.embedded.text_rows[text]])
        return Hit(caption, None, results, int(self.ranks[text]) + 1)

    def _result(self, image: int, score: float, correct: bool) -> Result:
        row = int(self.embedded.image_rows[image])
        try:
            picture = thumbnail(load_image(str(self.pairs.keys[row]), self.media).image)
        except RowError:
            picture = None
        return Result(picture, str(self.pairs.captions[self.captions[row]]), score, correct)
