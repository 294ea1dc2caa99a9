"""Choose runs for an ensemble one after another, by the recall of their mean cosine.

Source: Caruana et al. 2004, Ensemble selection from libraries of models; here without repetition.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apecache.evaluate.embeddings import embed_store
from apecache.metrics.relevance import Relevance
from apecache.metrics.retrieval import retrieval_report
from apecache.runs.heads import TrainedHeads
from apecache.store.reader import FeatureStore


@dataclass(frozen=True, kw_only=True)
class GreedyStep:
    """Report a run that was added."""

    added: int
    """Position of the run."""
    recall: float
    """Mean of R@1, 5 and 10 of both directions with it, in per cent."""


def greedy_ensemble(
    store: FeatureStore,
    runs: Sequence[TrainedHeads],
    images: NDArray[np.bool_],
    max_members: int,
) -> list[GreedyStep]:
    """Add the run that helps most until none does.

    Args:
        store: Store of the features.
        runs: Runs on the same features.
        images: bool [n_images], the images that decide.
        max_members: Largest number of runs.

    Returns:
        The runs that were added, in order; at least one.
    """
    sides: list[tuple[Tensor, Tensor]] = []
    owners = torch.empty(0, dtype=torch.long)
    relevance: Relevance | None = None
    for run in runs:
        embedded = embed_store(run, store, among=images)
        # Each single head of an ensemble weighs as much as any other one.
        sides.append((embedded.image, embedded.text))
        owners = embedded.image_of_text
        relevance = embedded.relevance
    steps: list[GreedyStep] = []
    while len(steps) < min(max_members, len(runs)):
        chosen_runs = [step.added for step in steps]
        best: GreedyStep | None = None
        for number in range(len(runs)):
            if number in chosen_runs:
                continue
            members = [sides[position] for position in (*chosen_runs, number)]
            image = torch.cat([side[0] for side in members], dim=1) / len(members) ** 0.5
            text = torch.cat([side[1] for side in members], dim=1) / len(members) ** 0.5
            recall = retrieval_report(image, text, owners, relevance=relevance).mean_recall
            if best is None or recall > best.recall:
                best = GreedyStep(added=number, recall=recall)
        assert best is not None
        if steps and best.recall <= steps[-1].recall:
            break
        steps.append(best)
    return steps
