"""Choose the best epoch by its recall on dev, and stop early when no later epoch is better."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(kw_only=True)
class BestEvaluation:
    """Hold the evaluation that is best on dev so far."""

    epoch: int = 0
    """Epoch of the evaluation."""
    recall: float = -math.inf
    """Mean recall on dev, in percent."""
    stale: int = 0
    """Evaluations since then."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Copy of the evaluated weights; empty before the first evaluation that counts."""

    def after(
        self,
        epoch: int,
        recall: float,
        copy_weights: Callable[[], dict[str, Tensor]],
    ) -> "BestEvaluation":
        """Return the best evaluation once one more is known.

        Args:
            epoch: Epoch of the new evaluation.
            recall: Its mean recall on dev, in percent. An equal recall is not better.
            copy_weights: Copies the evaluated weights. Called only if they are the best so far.
        """
        if recall > self.recall:
            return BestEvaluation(epoch=epoch, recall=recall, weights=copy_weights())
        self.stale += 1
        return self

    def stops_early(self, patience: int | None) -> bool:
        """Return whether so many evaluations in a row were not better. 0 or None: never."""
        return bool(patience) and self.stale >= (patience or 0)
