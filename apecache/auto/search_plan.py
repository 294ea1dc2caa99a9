"""Say what an automatic search tries, and divide its time."""

import numpy as np

from apecache.sweeps.space import Dimension, Space

CLOSED_FORMS = ("cca", "weighted-cca", "ridge", "procrustes")
"""All of the zoo but `csa`: `weighted-cca` weights before it normalizes, and retrieves better."""
DEFAULT = "projection"
FAMILIES = ("projection", "gated")
FIRST_TRIALS = ({"recipe": "gated"},)
"""Recipes that are tried as they are. The default one has a rung of its own."""
SEEDS = 3
"""Fits of the default and of the best trial, each with another seed."""
LEAST_SEEDS = 2
"""With one seed alone the variance over seeds would not be known."""
TRIAL_COST = 0.5
"""Cost of a trial in fits of the default, under halving; a `gated` head costs two of them."""
FIT_COST = 2.0
"""Cost of a fit of the best trial in fits of the default."""
N_REFITS = 3
"""Fits of the default that the last rung is expected to cost."""
LEAST_TRIALS = 4
MAX_TRIALS = 256


def plan_seeds(left_seconds: float, fit_seconds: float) -> int:
    """Return how many seeds compare the default with the best trial.

    Args:
        left_seconds: What is left of the budget after the first fit of the default.
        fit_seconds: Time of that fit.
    """
    all_seeds_seconds = (SEEDS - 1 + SEEDS * FIT_COST) * fit_seconds
    # The other half is for the sweep and the last fit.
    return SEEDS if all_seeds_seconds <= left_seconds / 2 else LEAST_SEEDS


def plan_trials(left_seconds: float, fit_seconds: float, n_seeds: int) -> int:
    """Return how many trials the sweep can afford.

    Args:
        left_seconds: What is left of the budget after all fits of the default.
        fit_seconds: Time of one of them.
        n_seeds: Fits of the best trial after the sweep.
    """
    reserved_seconds = (n_seeds * FIT_COST + N_REFITS) * fit_seconds
    affordable = (left_seconds - reserved_seconds) / (TRIAL_COST * max(fit_seconds, 1e-3))
    return int(np.clip(affordable, LEAST_TRIALS, MAX_TRIALS))


def search_space() -> Space:
    """Return what the sweep may choose: families of heads, regularization, and step sizes.

    Ranges lie around the values of the recipes.
    """
    is_gated = {"text.kind": "gated"}
    dimensions = {
        "optimizer.lr": Dimension(log=(1e-3, 4e-3)),
        "optimizer.weight_decay": Dimension(log=(0.3, 3.0)),
        "image.input_dropout": Dimension.model_validate({"float": (0.4, 0.8)}),
        "text.input_dropout": Dimension.model_validate({"float": (0.0, 0.3)}),
        "text.dropout": Dimension.model_validate({"float": (0.4, 0.7), "if": is_gated}),
        "loss.temperature": Dimension(log=(0.03, 0.15)),
        "loss.captions": Dimension(choice=(1, 2)),
    }
    return Space(dimensions, FAMILIES, FIRST_TRIALS)
