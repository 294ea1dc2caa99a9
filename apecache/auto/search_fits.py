"""Fit the runs of an automatic search once each, and fit the winner again with all images."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from apecache.auto.budget import SearchState
from apecache.metrics.retrieval import RetrievalReport
from apecache.recipes.recipe import load_recipe
from apecache.runs.heads import DESCRIPTION, load_heads
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec


@dataclass(frozen=True, kw_only=True)
class SearchFits:
    """Fit recipes into folders of a search."""

    store: FeatureStore
    state: SearchState
    base: FitSpec
    """Settings of all fits. Its keep list leaves out the images that decide."""

    def spec(self) -> FitSpec:
        """Return `base` with the features that the search chose."""
        choices = self.state.choices
        return replace(self.base, image_features=choices["image"], text_features=choices["text"])

    def run(self, name: str) -> Path:
        """Return the folder of a run."""
        return self.state.out / "members" / name

    def fit(
        self,
        name: str,
        recipe: str,
        settings: Sequence[str] = (),
        spec: FitSpec | None = None,
    ) -> float:
        """Fit a recipe into a folder, or read the fit that is there.

        Args:
            name: Name of the run.
            recipe: Name of the recipe.
            settings: `section.key=value`, as `--set` takes them.
            spec: Settings of the fit; None: those of the search.

        Returns:
            Mean of R@1, 5 and 10 of both directions on dev, in per cent.
        """
        run = self.run(name)
        spec = spec or self.spec()
        recorded = self.state.choices.setdefault("made", {})
        recorded[str(run.relative_to(self.state.out))] = {
            "recipe": recipe,
            "settings": list(settings),
            "seed": spec.seed,
        }
        self._fit_once(run, recipe, settings, spec)
        return RetrievalReport.from_json(load_heads(run).training["dev"]).mean_recall

    def refit(self, run: Path, final: Path) -> str:
        """Fit a run again with the images that decided; return the command."""
        recorded = self.state.choices["made"][str(run.relative_to(self.state.out))]
        spec = replace(self.spec(), keep=None, seed=int(recorded["seed"]))
        self._fit_once(final, recorded["recipe"], recorded["settings"], spec)
        return fit_command(
            self.store,
            recipe=recorded["recipe"],
            settings=recorded["settings"],
            run=final,
            spec=spec,
        )

    def _fit_once(self, run: Path, recipe: str, settings: Sequence[str], spec: FitSpec) -> None:
        if (run / DESCRIPTION).is_file():
            return
        run.parent.mkdir(exist_ok=True)
        fit_head(self.store, recipe=load_recipe(recipe, settings), out=run, spec=spec)


def fit_command(
    store: FeatureStore,
    recipe: str,
    settings: Sequence[str],
    run: Path,
    spec: FitSpec,
) -> str:
    """Return the `apecache fit-head` command of a fit, with all options that are not defaults."""
    words = ["apecache", "fit-head", str(store.path), "--recipe", recipe, "--out", str(run)]
    for setting in settings:
        words += ["--set", setting]
    usual = SplitSpec()
    options = {
        "--train-split": (spec.splits.train, usual.train),
        "--dev-split": (spec.splits.dev, usual.dev),
        "--dev-images": (spec.splits.dev_images, usual.dev_images),
        "--dev-seed": (spec.splits.seed, usual.seed),
        "--seed": (spec.seed, 0),
        "--image-features": (spec.image_features, None),
        "--text-features": (spec.text_features, None),
        "--view": (store.older_view, None),
    }
    for name, (value, default) in options.items():
        if value != default:
            words += [name, str(value)]
    return shlex.join(words)
