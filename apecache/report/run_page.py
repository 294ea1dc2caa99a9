"""From runs to a page: learning curves of each run, and a gallery of what a run finds and
misses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apecache.data.images import load_image
from apecache.data.media import Media
from apecache.errors import RowError, RunError, one_line
from apecache.evaluate.embeddings import Embeddings
from apecache.metrics.retrieval import text_to_image_ranks
from apecache.report.gallery import Gallery, Hit, Result, thumbnail
from apecache.report.page import Chart, Curve, Table
from apecache.runs.folder import HISTORY, read_history
from apecache.runs.ledger import load_ledger
from apecache.store.reader import FeatureStore


def learning_charts(runs: Mapping[str, Path], marker: float | None = None) -> tuple[Chart, Chart]:
    """Training loss, and mean recall on the dev split (epoch 0: untrained), by run name. `marker`:
    the chosen epoch."""
    histories = {name: _history(path) for name, path in runs.items()}
    losses = tuple(
        Curve(
            name=name,
            points=tuple(
                (line["epoch"], line["loss"]) for line in lines if line["loss"] is not None
            ),
        )
        for name, lines in histories.items()
    )
    recalls = tuple(
        Curve(
            name=name,
            points=tuple((line["epoch"], line["dev"]["mean_recall"]) for line in lines),
        )
        for name, lines in histories.items()
    )
    recalls += _chance_curves(list(histories.values()))
    return (
        Chart(
            title="Training loss",
            x_label="epoch",
            y_label="loss",
            curves=losses,
            marker=marker,
            marker_label="chosen",
        ),
        Chart(
            title="Dev split: mean of R@1, 5, 10, both ways",
            x_label="epoch",
            y_label="recall, %",
            curves=recalls,
            marker=marker,
            marker_label="chosen",
        ),
    )


def _chance_curves(histories: Sequence[Sequence[dict[str, Any]]]) -> tuple[Curve, ...]:
    """A level line for each chance that the histories name; histories of older versions name
    none."""
    known = [line for lines in histories for line in lines if "chance" in line["dev"]]
    last = max((line["epoch"] for line in known), default=0)
    levels = dict.fromkeys(line["dev"]["chance"] for line in known)
    return tuple(Curve(name="chance", points=((0, level), (last, level))) for level in levels)


def _history(run: Path) -> list[dict[str, Any]]:
    """Nothing of a run that has none: a combination."""
    try:
        return list(read_history(run)) if (run / HISTORY).is_file() else []
    except (OSError, ValueError) as error:
        raise RunError(f"{run / HISTORY} is damaged ({one_line(error)}); train again") from None


def ledger_table(runs: Mapping[str, Path]) -> Table:
    """What each run has cost, a column each; what a run's ledger does not know is left empty."""
    ledgers = {name: load_ledger(path) for name, path in runs.items()}
    costs = {name: dict(ledger.rows()) if ledger else {} for name, ledger in ledgers.items()}
    lines = dict.fromkeys(what for found in costs.values() for what in found)
    rows = tuple((what, *(found.get(what) for found in costs.values())) for what in lines)
    return Table(title="What it has cost", columns=("", *costs), rows=rows)


def retrieval_galleries(
    embedded: Embeddings,
    store: FeatureStore,
    media: Media,
    n_items: int = 6,
    top: int = 5,
    seed: int = 0,
) -> tuple[Gallery, ...]:
    """Captions that miss their image in the first ten, the worst first; captions drawn at random;
    captions that find it first, evenly spread. A gallery without items is left out."""
    ranks = text_to_image_ranks(
        embedded.image,
        text=embedded.text,
        image_of_text=embedded.image_of_text,
        relevance=embedded.relevance,
    )
    worst = ranks.argsort(descending=True, stable=True)[: int((ranks >= 10).sum())].tolist()
    drawn = torch.randperm(len(ranks), generator=torch.Generator().manual_seed(seed)).tolist()
    hits = spread(torch.nonzero(ranks == 0).flatten().tolist(), n_items)
    make = _ItemMaker(embedded, store=store, media=media, ranks=ranks, top=top)
    chosen = (
        (
            "Worst misses",
            "Captions whose image ranks last; none is among the first ten.",
            worst[:n_items],
        ),
        ("Drawn at random", "Captions of all kinds, by a fixed seed.", drawn[:n_items]),
        ("Found", "Captions whose image came first, evenly spread.", hits),
    )
    return tuple(
        Gallery(title=title, note=note, items=tuple(make.item(text) for text in texts))
        for title, note, texts in chosen
        if texts
    )


def spread(rows: Sequence[int], count: int) -> list[int]:
    """`count` of the rows at even distances (all of them, if there are fewer)."""
    return [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else list(rows)


class _ItemMaker:
    def __init__(
        self,
        embedded: Embeddings,
        store: FeatureStore,
        media: Media,
        ranks: Tensor,
        top: int,
    ) -> None:
        self.embedded = embedded
        self.pairs = store.pairs
        self.media = media
        self.ranks = ranks
        self.top = top
        texts = embedded.text_rows[::-1]  # so that an image's first usable caption stays
        self.captions = {int(self.pairs.image_rows[text]): int(text) for text in texts}
        self.pictures: dict[int, str | None] = {}

    def item(self, text: int) -> Hit:
        scores = self.embedded.image @ self.embedded.text[text]
        best = scores.topk(min(self.top, len(scores)))
        correct = self._right_images(text)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        results = tuple(self._result(image, score, image in correct) for image, score in pairs)
        caption = str(self.pairs.captions[self.embedded.text_rows[text]])
        return Hit(
            query_text=caption,
            query_image=None,
            results=results,
            rank=int(self.ranks[text]) + 1,
        )

    def _right_images(self, text: int) -> set[int]:
        """The caption's own image, and those that it belongs to because captions or images are
        equal."""
        embedded = self.embedded
        if embedded.relevance is None:
            return {int(embedded.image_of_text[text])}
        row = torch.tensor([text], device=embedded.text.device)
        return set(torch.nonzero(embedded.relevance.right_images(row)[0]).flatten().tolist())

    def _result(self, image: int, score: float, correct: bool) -> Result:
        row = int(self.embedded.image_rows[image])
        return Result(
            image=self._picture(row),
            text=str(self.pairs.captions[self.captions[row]]),
            score=score,
            correct=correct,
        )

    def _picture(self, row: int) -> str | None:
        """None where the image cannot be read."""
        if row not in self.pictures:
            try:
                self.pictures[row] = thumbnail(
                    load_image(str(self.pairs.keys[row]), self.media).image
                )
            except RowError:
                self.pictures[row] = None
        return self.pictures[row]
