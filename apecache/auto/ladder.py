"""Search for the best heads on a store's features within a budget of time.

The rungs: features (closed form on each choice of encoders), closed forms, the default recipe, a
sweep over families of heads, the best trial again with other seeds, ensembles. Dev chooses among
trials and among ensembles. The decision between them is taken on *confirm* images, which nothing
before has trained or chosen on: see `apecache.auto.decision`. Then the winner is fitted again with
the confirm images.
"""

import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from apecache.arguments import AnyPath, as_path, require_spec, require_type
from apecache.auto.budget import Rung, RungProgress, RungRecord, SearchState, open_state
from apecache.auto.decision import Candidate, Decision, decide, kept_candidate
from apecache.auto.greedy import greedy_ensemble
from apecache.auto.search_fits import SearchFits
from apecache.auto.search_plan import (
    CLOSED_FORMS,
    DEFAULT,
    plan_seeds,
    plan_trials,
    search_space,
)
from apecache.errors import RecipeError, counted
from apecache.evaluate.embeddings import embed_store
from apecache.fingerprint import Json
from apecache.metrics.protocols import retrieval_hits
from apecache.metrics.statistics import RetrievalHits
from apecache.runs.ensemble import ensemble_heads
from apecache.runs.folder import locked
from apecache.runs.heads import DESCRIPTION, load_heads, save_heads
from apecache.store.equal import equal_images
from apecache.store.joined import BETWEEN_NAMES
from apecache.store.reader import FeatureStore
from apecache.sweeps.halving import SweepSpec
from apecache.sweeps.run import run_trials
from apecache.sweeps.trials import Trial
from apecache.train.batches import SplitSpec, choose_splits
from apecache.train.head_data import FitSpec
from apecache.train.keep_list import write_keep_list

BEST = "best"
COMMANDS = "command.txt"
MAX_MEMBERS = 5
CONFIRM_IMAGES = 500
LADDER = 2
"""Version of the rungs: a folder of other rungs is not resumed."""


@dataclass(frozen=True, kw_only=True)
class AutoSpec:
    """Say what a search may use."""

    budget_seconds: float = 600.0
    """Time for all fits. What is running when it ends is finished."""
    image_features: tuple[str, ...] = ()
    """Image features to choose among; empty: all pooled ones of the store."""
    text_features: tuple[str, ...] = ()
    """As `image_features`."""
    splits: SplitSpec = field(default_factory=SplitSpec)
    """Training and dev split."""
    seed: int = 0
    """Seed of the draws and the sweep, and the first seed of the fits."""
    device: str = "auto"
    """Device of the fits."""


@dataclass(frozen=True, kw_only=True)
class AutoReport:
    """Report a finished search."""

    out: Path
    run: Path
    """The winner, an ordinary run folder."""
    chosen: str
    rungs: tuple[RungRecord, ...]
    decisions: tuple[Decision, ...]
    commands: tuple[str, ...]
    """Commands that make the run again."""
    n_confirm_images: int
    spent_seconds: float


def auto_heads(
    store: FeatureStore,
    out: AnyPath,
    spec: AutoSpec | None = None,
    progress: RungProgress = lambda _: None,
) -> AutoReport:
    """Run or resume a search, and write the winner to `out`/best.

    Args:
        store: A complete feature store.
        out: Folder of the search.
        spec: What the search may use.
        progress: Called with each rung that ends.

    Raises:
        RunError: `out` holds something else.
        MismatchError: `out` holds a search with other settings.
        RecipeError: There are too few images, or no pooled features.
        IncompleteError, DamagedError: The store is incomplete or damaged.
    """
    require_type(store, FeatureStore, "store")
    require_spec(spec, AutoSpec, "spec", optional=True)
    spec = spec or AutoSpec()
    out = as_path(out, "out")
    identity: dict[str, Json] = {
        "data": store.digest,
        "image_features": list(_names(store, "image", spec.image_features)),
        "text_features": list(_names(store, "text", spec.text_features)),
        "splits": asdict(spec.splits),
        "seed": spec.seed,
        "rungs": LADDER,
    }
    state = open_state(out, identity, spec.budget_seconds)
    with locked(out):
        return _Search(store, spec, state, progress).run()


def _names(store: FeatureStore, side: str, named: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the pooled features to choose among."""
    modality = "image" if side == "image" else "text"
    arrays = [store.array(modality, name) for name in named] or store.arrays(modality)  # type: ignore[arg-type]
    names = [array.name for array in arrays if array.tokens is None and array.views is None]
    if not names:
        raise RecipeError(f"{store.path} has no pooled {side} features of one view")
    return tuple(names)


class _Search:
    """Hold what the rungs of a search share."""

    def __init__(
        self,
        store: FeatureStore,
        spec: AutoSpec,
        state: SearchState,
        progress: RungProgress,
    ) -> None:
        self.store = store
        self.state = state
        self.progress = progress
        self.out = state.out
        self.splits = spec.splits
        self.seed = spec.seed
        self.keep = self.out / "without-confirm.tsv"
        base = FitSpec(splits=spec.splits, seed=spec.seed, device=spec.device, keep=self.keep)
        self.fits = SearchFits(store=store, state=state, base=base)
        self.dev, self.confirm = self._held_out_images()

    def run(self) -> AutoReport:
        """Climb all rungs."""
        if not self.keep.is_file():
            keep_mask = ~self.confirm[self.store.pairs.image_rows]
            write_keep_list(self.keep, self.store.pairs, keep_mask)
        self._choose_features()
        closed = self._closed_forms()
        default = self._default()
        trial = self._repeated(self._sweep())
        candidates = [closed, default, trial, *self._ensembles(closed, default, trial)]
        decisions = self._decide(candidates)
        kept_name = kept_candidate(decisions)
        winner = next(candidate for candidate in candidates if candidate.name == kept_name)
        commands = self._refit(winner)
        return AutoReport(
            out=self.out,
            run=self.out / BEST,
            chosen=kept_name,
            rungs=tuple(self.state.rungs.values()),
            decisions=tuple(decisions),
            commands=commands,
            n_confirm_images=int(self.confirm.sum()),
            spent_seconds=self.state.spent_seconds,
        )

    def _held_out_images(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return the masks of the dev images, and of the confirm images."""
        table = self.store.pairs
        first = str(self.state.identity["image_features"][0])
        content = equal_images(self.store.array("image", first))
        # With the same content as in fit_head, so that this is the dev split of the fits.
        train, dev = choose_splits(table, self.splits, content)
        rows = np.flatnonzero(train)
        n_confirm = min(CONFIRM_IMAGES, len(rows) // 10)
        if n_confirm < 2:
            raise RecipeError(
                f"{counted(len(rows), 'training image')}; a search needs at least 20, so that some "
                "can be kept aside"
            )
        generator = np.random.default_rng(self.seed)
        drawn_rows = generator.choice(rows, n_confirm, replace=False)
        # A copy of a confirm image must not train either.
        numbers = np.arange(len(table.keys)) if content is None else content
        confirm: NDArray[np.bool_] = train & np.isin(numbers, numbers[drawn_rows])
        return dev, confirm

    # --- rungs ------------------------------------------------------------------------------------

    def _rung(self, name: str, tried: list[str]) -> Rung:
        return Rung(self.state, name, tried, self.progress)

    def _choose_features(self) -> None:
        """Choose encoders by the closed form on each, and on all of a side together."""
        sides: list[list[str]] = []
        for side in ("image", "text"):
            names = [str(name) for name in self.state.identity[f"{side}_features"]]
            together = [BETWEEN_NAMES.join(names)] if len(names) > 1 else []
            sides.append([*names, *together])
        choices = list(product(*sides))
        tried: list[str] = []
        best: tuple[float, tuple[str, str]] | None = None
        with self._rung("features", tried) as rung:
            for number, (image, text) in enumerate(choices):
                if len(choices) == 1:
                    best = (0.0, (image, text))
                    break
                spec = replace(self.fits.base, image_features=image, text_features=text)
                recall = self.fits.fit(f"features-{number}", "cca", spec=spec)
                tried.append(f"{image} with {text}: {recall:.1f}")
                # Of equal recalls the first wins: single encoders stand before joined ones.
                if best is None or recall > best[0]:
                    best = (recall, (image, text))
            assert best is not None
            self.state.choices["image"], self.state.choices["text"] = best[1]
            rung(f"{best[1][0]} with {best[1][1]}")

    def _closed_forms(self) -> Candidate:
        """Fit the closed forms, and keep the best on dev."""
        tried: list[str] = []
        recalls: dict[str, float] = {}
        with self._rung("closed forms", tried) as rung:
            for name in CLOSED_FORMS:
                recalls[name] = self.fits.fit(f"closed-{name}", name)
                tried.append(f"{name}: {recalls[name]:.1f}")
            best = max(recalls, key=lambda name: recalls[name])
            rung(f"{best}: {recalls[best]:.1f}")
        # A closed form has no seeds.
        return Candidate(name=best, seeds=((self.fits.run(f"closed-{best}"),),))

    def _default(self) -> Candidate:
        """Fit the default recipe with several seeds, and measure how long a fit takes."""
        choices = self.state.choices
        tried: list[str] = []
        with self._rung("default", tried) as rung:
            begin = time.perf_counter()
            recalls = [self.fits.fit(_numbered(DEFAULT, self.seed), DEFAULT)]
            fit_seconds = float(choices.setdefault("fit_seconds", time.perf_counter() - begin))
            # Decided once: a resumed search has less time left, and must not change its mind.
            left_seconds = self.state.left_seconds - fit_seconds
            n_seeds = int(choices.setdefault("n_seeds", plan_seeds(left_seconds, fit_seconds)))
            self.state.save()
            seeds = range(self.seed, self.seed + n_seeds)
            for seed in seeds[1:]:
                spec = replace(self.fits.spec(), seed=seed)
                recalls.append(self.fits.fit(_numbered(DEFAULT, seed), DEFAULT, spec=spec))
            tried += [f"{DEFAULT}, seed {s}: {r:.1f}" for s, r in zip(seeds, recalls, strict=True)]
            rung(f"{DEFAULT}, {n_seeds} seeds: {fmean(recalls):.1f}")
        runs = [self.fits.run(_numbered(DEFAULT, seed)) for seed in seeds]
        return Candidate(name=DEFAULT, seeds=tuple((run,) for run in runs))

    def _sweep(self) -> Trial:
        """Sweep over families of heads with as many trials as the time allows."""
        choices = self.state.choices
        tried: list[str] = []
        with self._rung("sweep", tried) as rung:
            planned = plan_trials(
                self.state.left_seconds,
                fit_seconds=float(choices["fit_seconds"]),
                n_seeds=int(choices["n_seeds"]),
            )
            # Decided once: a sweep with halving cannot change its number of trials.
            n_trials = int(choices.setdefault("n_trials", planned))
            self.state.save()
            settings = SweepSpec(
                n_trials,
                halving=True,
                keep_going=True,
                seed=self.seed,
                fit=self.fits.spec(),
            )
            trials = run_trials(self.store, search_space(), self.out / "sweep", settings)
            tried += [_described(trial) for trial in trials[:8]]
            rung(f"{n_trials} trials; best: {_described(trials[0])}")
        return trials[0]

    def _repeated(self, trial: Trial) -> Candidate:
        """Fit the best trial with seeds that did not choose it."""
        first = self.seed + 1
        seeds = range(first, first + int(self.state.choices["n_seeds"]))
        tried: list[str] = []
        recalls: list[float] = []
        runs: list[Path] = []
        with self._rung("best trial again", tried) as rung:
            for seed in seeds:
                name = _numbered(f"trial-{trial.number}", seed)
                spec = replace(self.fits.spec(), seed=seed)
                recalls.append(self.fits.fit(name, trial.recipe, trial.settings, spec))
                runs.append(self.fits.run(name))
                tried.append(f"trial {trial.number}, seed {seed}: {recalls[-1]:.1f}")
            found = trial.mean or 0.0
            rung(f"{len(runs)} other seeds: {fmean(recalls):.1f}; {found:.1f} in the sweep")
        return Candidate(name="sweep", seeds=tuple((run,) for run in runs))

    def _ensembles(self, *singles: Candidate) -> list[Candidate]:
        """Join the seeds of the default, and runs whose mean cosine is best on dev."""
        tried: list[str] = []
        runs: list[Path] = []
        for single in singles:
            runs += [run for members in single.seeds for run in members]
        default = next(single for single in singles if single.name == DEFAULT)
        joined = tuple(run for members in default.seeds for run in members)
        ensembles = [Candidate(name=f"{len(joined)} seeds of {DEFAULT}", seeds=(joined,))]
        with self._rung("ensembles", tried) as rung:
            steps = greedy_ensemble(
                self.store,
                runs=[load_heads(run) for run in runs],
                images=self.dev,
                max_members=MAX_MEMBERS,
            )
            tried += [f"with {runs[step.added].name}: {step.recall:.1f}" for step in steps]
            greedy = tuple(runs[step.added] for step in steps)
            # One run, or the seeds of the default, compete already.
            if len(greedy) > 1 and set(greedy) != set(joined):
                ensembles.append(Candidate(name="ensemble", seeds=(greedy,)))
            rung(" + ".join(run.name for run in greedy) + f": {steps[-1].recall:.1f}")
        return ensembles

    def _decide(self, candidates: Sequence[Candidate]) -> list[Decision]:
        """Compare candidates on the confirm images, from simple to complex."""
        tried: list[str] = []
        with self._rung("decision", tried) as rung:
            hits: dict[str, list[RetrievalHits]] = {}
            for candidate in candidates:
                hits[candidate.name] = [self._hits(runs) for runs in candidate.seeds]
            decisions = decide(hits)
            for decision in decisions:
                difference = decision.difference
                tried.append(
                    f"{decision.candidate} against {decision.against}: "
                    f"{difference.difference:+.1f} ({difference.low:+.1f} to "
                    f"{difference.high:+.1f}, {100 * decision.level:.2f} %)"
                )
            rung(kept_candidate(decisions))
        return decisions

    def _hits(self, runs: Sequence[Path]) -> RetrievalHits:
        """Answer the queries of the confirm images, with dev among the candidates.

        The more candidates, the closer to a real search: among few images a head that ranks
        coarsely looks better than it is.
        """
        heads = [load_heads(run) for run in runs]
        run = heads[0] if len(heads) == 1 else ensemble_heads(heads)
        embedded = embed_store(run, self.store, among=self.confirm | self.dev)
        hits = retrieval_hits(
            embedded.image,
            embedded.text,
            embedded.image_of_text,
            relevance=embedded.relevance,
        )
        return hits.among(self.confirm[embedded.image_rows])

    def _refit(self, winner: Candidate) -> tuple[str, ...]:
        """Fit the winner again with the confirm images; return the commands that do so."""
        runs = winner.seeds[0]
        tried: list[str] = []
        commands: list[str] = []
        best = self.out / BEST
        with self._rung("refit", tried) as rung:
            finals: list[Path] = []
            for number, run in enumerate(runs):
                final = best if len(runs) == 1 else self.out / "final" / str(number)
                finals.append(final)
                commands.append(self.fits.refit(run, final))
                tried.append(commands[-1])
            if len(finals) > 1:
                words = ["apecache", "ensemble", *map(str, finals), "--out", str(best)]
                commands.append(shlex.join(words))
                if not (best / DESCRIPTION).is_file():
                    save_heads(ensemble_heads([load_heads(final) for final in finals]), best)
            (self.out / COMMANDS).write_text("\n".join(commands) + "\n", encoding="utf-8")
            rung(str(best))
        return tuple(commands)


def _numbered(name: str, seed: int) -> str:
    return f"{name}-seed-{seed}"


def _described(trial: Trial) -> str:
    mean = "failed" if trial.mean is None else f"{trial.mean:.1f}"
    settings = " ".join(trial.settings) or "as it is"
    return f"{trial.recipe} {settings}: {mean} ({trial.state})"
