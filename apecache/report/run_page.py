"""Make the charts, the cost table and the galleries of runs for a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apecache.data.images import load_image
from apecache.data.media import Media
from apecache.errors import RowError, RunError, one_line, raise_if_refused
from apecache.evaluate.embeddings import Embeddings
from apecache.metrics.retrieval import text_to_image_ranks
from apecache.report.gallery import Gallery, QueryExample, Result, thumbnail
from apecache.report.page import Cell, Chart, Curve, Table
from apecache.runs.folder import HISTORY, read_history
from apecache.runs.ledger import load_ledger
from apecache.store.reader import FeatureStore


def learning_charts(runs: Mapping[str, Path], marker: float | None = None) -> tuple[Chart, Chart]:
    """Draw the training loss and the mean recall on the dev split, by epoch.

    Args:
        runs: folders by the names of their curves.
        marker: the chosen epoch.
    """
    histories = {name: _history(path) for name, path in runs.items()}
    losses: list[Curve] = []
    recalls: list[Curve] = []
    for name, lines in histories.items():
        # Epoch 0 is the untrained model: it has recalls and no loss.
        trained_lines = [line for line in lines if line["loss"] is not None]
        loss_points = tuple((line["epoch"], line["loss"]) for line in trained_lines)
        losses.append(Curve(name=name, points=loss_points))
        recall_points = tuple((line["epoch"], line["dev"]["mean_recall"]) for line in lines)
        recalls.append(Curve(name=name, points=recall_points))
    recalls += _chance_curves(list(histories.values()))
    loss_chart = Chart(
        title="Training loss",
        x_label="epoch",
        y_label="loss",
        curves=tuple(losses),
        marker=marker,
        marker_label="chosen",
    )
    recall_chart = Chart(
        title="Dev split: mean of R@1, 5, 10, both ways",
        x_label="epoch",
        y_label="recall, %",
        curves=tuple(recalls),
        marker=marker,
        marker_label="chosen",
    )
    return loss_chart, recall_chart


def with_points(charts: Sequence[Chart]) -> list[Chart]:
    """Return the charts that have any points; a combination of runs has no history to draw."""
    drawable = []
    for chart in charts:
        if any(curve.points for curve in chart.curves):
            drawable.append(chart)
    return drawable


def _chance_curves(histories: Sequence[Sequence[dict[str, Any]]]) -> tuple[Curve, ...]:
    """Draw a level line for each chance that the histories have."""
    last_epoch = 0
    levels: dict[float, None] = {}
    for lines in histories:
        for line in lines:
            # Histories of older versions have no chance.
            if "chance" in line["dev"]:
                last_epoch = max(last_epoch, line["epoch"])
                levels[line["dev"]["chance"]] = None
    return tuple(Curve(name="chance", points=((0, level), (last_epoch, level))) for level in levels)


def _history(run: Path) -> list[dict[str, Any]]:
    """Read the history of a run.

    Raises:
        RunError: it is damaged.
    """
    # A combination of runs was not trained, and has none.
    try:
        return list(read_history(run)) if (run / HISTORY).is_file() else []
    except (OSError, ValueError) as error:
        raise_if_refused(run / HISTORY)
        raise RunError(f"{run / HISTORY} is damaged ({one_line(error)}); train again") from None


def ledger_table(runs: Mapping[str, Path]) -> Table:
    """Make a table of what each run has cost, a column each.

    Cells are empty where a run's ledger does not have the figure.
    """
    costs: dict[str, dict[str, Cell]] = {}
    # A dictionary, not a set, keeps the order of the ledgers.
    labels: dict[str, None] = {}
    for name, path in runs.items():
        ledger = load_ledger(path)
        costs[name] = dict(ledger.rows()) if ledger else {}
        labels.update(dict.fromkeys(costs[name]))
    rows: list[tuple[Cell, ...]] = []
    for label in labels:
        rows.append((label, *(figures.get(label) for figures in costs.values())))
    return Table(title="What it has cost", columns=("", *costs), rows=tuple(rows))


def retrieval_galleries(
    embedded: Embeddings,
    store: FeatureStore,
    media: Media,
    n_items: int = 6,
    top: int = 5,
    seed: int = 0,
) -> tuple[Gallery, ...]:
    """Make galleries of captions as queries: worst misses, a random draw, and hits.

    Misses are captions whose image is not among the first ten, the worst first. Hits, whose image
    comes first, are evenly spread. A gallery without items is left out.

    Args:
        media: where pictures lie.
        n_items: queries of each gallery, at most.
        top: results of each query.
        seed: of the random draw.
    """
    ranks = text_to_image_ranks(
        embedded.image,
        text=embedded.text,
        image_of_text=embedded.image_of_text,
        relevance=embedded.relevance,
    )
    # Ranks start at 0. Stable, so that equal ranks give the same gallery everywhere.
    n_misses = int((ranks >= 10).sum())
    misses = ranks.argsort(descending=True, stable=True)[:n_misses].tolist()
    generator = torch.Generator().manual_seed(seed)
    random_order = torch.randperm(len(ranks), generator=generator).tolist()
    hits = torch.nonzero(ranks == 0).flatten().tolist()
    maker = _ItemMaker(embedded, store=store, media=media, ranks=ranks, top=top)
    selections = (
        (
            "Worst misses",
            "Captions whose image ranks last; none is among the first ten.",
            misses[:n_items],
        ),
        ("Drawn at random", "Captions of all kinds, by a fixed seed.", random_order[:n_items]),
        ("Found", "Captions whose image came first, evenly spread.", spread(hits, n_items)),
    )
    galleries = []
    for title, note, texts in selections:
        if texts:
            items = tuple(maker.item(text) for text in texts)
            galleries.append(Gallery(title=title, note=note, items=items))
    return tuple(galleries)


def spread(rows: Sequence[int], count: int) -> list[int]:
    """Return `count` of the rows at even distances, or all of them if there are fewer."""
    if len(rows) <= count:
        return list(rows)
    return [rows[number * len(rows) // count] for number in range(count)]


class _ItemMaker:
    """Make the items of galleries; each picture is read once."""

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
        # Backwards, so that an image's first usable caption is the one that stays.
        texts = embedded.text_rows[::-1]
        self.captions = {int(self.pairs.image_rows[text]): int(text) for text in texts}
        self.pictures: dict[int, str | None] = {}

    def item(self, text: int) -> QueryExample:
        """Make the item of one caption, given by its row among the embedded ones."""
        scores = self.embedded.image @ self.embedded.text[text]
        best = scores.topk(min(self.top, len(scores)))
        correct = self._right_images(text)
        results = []
        for image, score in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            results.append(self._result(image, score, image in correct))
        caption = str(self.pairs.captions[self.embedded.text_rows[text]])
        return QueryExample(
            query_text=caption,
            query_image=None,
            results=tuple(results),
            rank=int(self.ranks[text]) + 1,
        )

    def _right_images(self, text: int) -> set[int]:
        """Return the caption's image, and those of equal captions or equal images."""
        embedded = self.embedded
        if embedded.relevance is None:
            return {int(embedded.image_of_text[text])}
        row = torch.tensor([text], device=embedded.text.device)
        is_right = embedded.relevance.right_images(row)[0]
        return set(torch.nonzero(is_right).flatten().tolist())

    def _result(self, image: int, score: float, correct: bool) -> Result:
        row = int(self.embedded.image_rows[image])
        return Result(
            image=self._picture(row),
            text=str(self.pairs.captions[self.captions[row]]),
            score=score,
            correct=correct,
        )

    def _picture(self, row: int) -> str | None:
        """Return the picture of an image; None: it cannot be read."""
        if row not in self.pictures:
            try:
                image = load_image(str(self.pairs.keys[row]), self.media).image
                self.pictures[row] = thumbnail(image)
            # A page without a few pictures is worth more than none: images may have moved.
            except RowError:
                self.pictures[row] = None
        return self.pictures[row]
