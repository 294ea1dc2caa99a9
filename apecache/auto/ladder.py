"""Search for the best heads on a store's features within a budget of time.

The rungs: features (closed form on each choice of encoders), closed forms, the default recipe, a
sweep over families of heads, an ensemble. Fits choose on dev. The last decision is taken on
*confirm* images, which nothing before has trained or chosen on: a candidate replaces a simpler one
only if the 95 % interval of the paired difference lies above 0. Then the winner is fitted again
with the confirm images.
"""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apecache.arguments import AnyPath, as_path, require_spec, require_type
from apecache.auto.budget import RungRecord, SearchState, open_state
from apecache.auto.greedy import greedy_ensemble
from apecache.errors import RecipeError, counted
from apecache.evaluate.comparison import MetricDifference, compare_hits
from apecache.evaluate.embeddings import embed_store
from apecache.fingerprint import Json
from apecache.metrics.protocols import retrieval_hits
from apecache.metrics.retrieval import RetrievalReport
from apecache.metrics.statistics import RetrievalHits
from apecache.recipes.recipe import load_recipe
from apecache.runs.ensemble import ensemble_heads
from apecache.runs.folder import locked
from apecache.runs.heads import DESCRIPTION, TrainedHeads, load_heads, save_heads
from apecache.store.equal import equal_images
from apecache.store.joined import BETWEEN_NAMES
from apecache.store.reader import FeatureStore
from apecache.sweeps.halving import SweepSpec
from apecache.sweeps.run import sweep
from apecache.sweeps.space import Dimension, Space
from apecache.sweeps.trials import Trial
from apecache.train.batches import SplitSpec, choose_splits
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec
from apecache.train.keep_list import write_keep_list

BEST = "best"
COMMANDS = "command.txt"
CLOSED_FORMS = ("cca", "csa", "ridge", "procrustes")
FAMILIES = ("projection", "gated", "ape")
DEFAULT = "projection"
METRIC = "mean R@1"
SWEEP_SHARE = 0.5
"""Share of the time that is left for the sweep."""
HALVED_COST = 1 / 3
"""Cost of a trial under successive halving, in fits: a third to each rung."""
LEAST_TRIALS = 4
MAX_TRIALS = 256
MAX_MEMBERS = 5
CONFIRM_IMAGES = 500


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
    """Seed of the draws, the sweep and the fits."""
    device: str = "auto"
    """Device of the fits."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Hold one candidate of the final decision, from simple to complex."""

    name: str
    runs: tuple[Path, ...]
    """Its runs; several make an ensemble."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Report whether a candidate replaced a simpler one."""

    candidate: str
    against: str
    difference: MetricDifference
    replaced: bool


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


RungProgress = Callable[[RungRecord], None]


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
        self.spec = spec
        self.state = state
        self.progress = progress
        self.out = state.out
        self.keep = self.out / "without-confirm.tsv"
        self.dev, self.confirm = self._held_out_images()

    def run(self) -> AutoReport:
        """Climb all rungs."""
        if not self.keep.is_file():
            keep_mask = ~self.confirm[self.store.pairs.image_rows]
            write_keep_list(self.keep, self.store.pairs, keep_mask)
        self._choose_features()
        closed = self._closed_forms()
        default = self._default()
        tuned = self._sweep()
        candidates = [closed, default, tuned, self._ensemble((closed, default, tuned))]
        decisions = self._decide(candidates)
        last = decisions[-1]
        best_name = last.candidate if last.replaced else last.against
        winner = next(candidate for candidate in candidates if candidate.name == best_name)
        commands = self._refit(winner)
        return AutoReport(
            out=self.out,
            run=self.out / BEST,
            chosen=best_name,
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
        train, dev = choose_splits(table, self.spec.splits, content)
        rows = np.flatnonzero(train)
        n_confirm = min(CONFIRM_IMAGES, len(rows) // 10)
        if n_confirm < 2:
            raise RecipeError(
                f"{counted(len(rows), 'training image')}; a search needs at least 20, so that some "
                "can be kept aside"
            )
        generator = np.random.default_rng(self.spec.seed)
        drawn_rows = generator.choice(rows, n_confirm, replace=False)
        # A copy of a confirm image must not train either.
        numbers = np.arange(len(table.keys)) if content is None else content
        confirm: NDArray[np.bool_] = train & np.isin(numbers, numbers[drawn_rows])
        return dev, confirm

    # --- rungs ------------------------------------------------------------------------------------

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
                recall = self._fit(f"features-{number}", "cca", image=image, text=text)
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
                recalls[name] = self._fit(f"closed-{name}", name)
                tried.append(f"{name}: {recalls[name]:.1f}")
            best = max(recalls, key=lambda name: recalls[name])
            rung(best)
        return Candidate(name=best, runs=(self._member(f"closed-{best}"),))

    def _default(self) -> Candidate:
        """Fit the default recipe, and measure how long a fit takes."""
        tried: list[str] = []
        with self._rung("default", tried) as rung:
            begin = time.perf_counter()
            recall = self._fit("default", DEFAULT)
            self.state.choices.setdefault("fit_seconds", time.perf_counter() - begin)
            tried.append(f"{DEFAULT}: {recall:.1f}")
            rung(DEFAULT)
        return Candidate(name=DEFAULT, runs=(self._member("default"),))

    def _sweep(self) -> Candidate:
        """Sweep over families of heads with as many trials as the time allows."""
        tried: list[str] = []
        fit_seconds = float(self.state.choices["fit_seconds"])
        affordable = SWEEP_SHARE * self.state.left_seconds / (HALVED_COST * max(fit_seconds, 1e-3))
        n_trials = int(np.clip(affordable, LEAST_TRIALS, MAX_TRIALS))
        # Decided once: a sweep with halving cannot change its number of trials.
        n_trials = int(self.state.choices.setdefault("n_trials", n_trials))
        with self._rung("sweep", tried) as rung:
            self.state.save()
            settings = SweepSpec(
                n_trials,
                halving=True,
                keep_going=True,
                seed=self.spec.seed,
                fit=self._fit_spec(),
            )
            report = sweep(self.store, search_space(), self.out / "sweep", settings)
            self._note(report.run, report.best.recipe, report.best.settings)
            finished = [trial for trial in report.trials if trial.state == "done"]
            tried += [_described(trial) for trial in report.trials[:8]]
            runs = [report.run]
            # The next best trials were never fitted into runs of their own.
            for trial in finished[1:MAX_MEMBERS]:
                name = f"trial-{trial.number}"
                self._fit(name, trial.recipe, settings=trial.settings)
                runs.append(self._member(name))
            rung(f"{n_trials} trials; best: {_described(report.best)}")
        self.state.choices["members"] = [str(run.relative_to(self.out)) for run in runs]
        return Candidate(name="sweep", runs=(report.run,))

    def _ensemble(self, singles: Sequence[Candidate]) -> Candidate:
        """Choose runs whose mean cosine is best on dev, one after another."""
        tried: list[str] = []
        members = [self.out / name for name in self.state.choices["members"]]
        runs = list(dict.fromkeys([*(run for single in singles for run in single.runs), *members]))
        with self._rung("ensemble", tried) as rung:
            steps = greedy_ensemble(
                self.store,
                runs=[load_heads(run) for run in runs],
                images=self.dev,
                max_members=MAX_MEMBERS,
            )
            tried += [f"with {runs[step.added].name}: {step.recall:.1f}" for step in steps]
            rung(" + ".join(runs[step.added].name for step in steps))
        return Candidate(name="ensemble", runs=tuple(runs[step.added] for step in steps))

    def _decide(self, candidates: Sequence[Candidate]) -> list[Decision]:
        """Compare candidates on the confirm images, from simple to complex."""
        tried: list[str] = []
        decisions: list[Decision] = []
        with self._rung("decision", tried) as rung:
            best_candidate = candidates[0]
            best_hits = self._hits(best_candidate)
            for candidate in candidates[1:]:
                hits = self._hits(candidate)
                difference = compare_hits([hits], [best_hits], metric=METRIC, chance=0.0)
                replaced = difference.low > 0
                decision = Decision(
                    candidate=candidate.name,
                    against=best_candidate.name,
                    difference=difference,
                    replaced=replaced,
                )
                decisions.append(decision)
                tried.append(
                    f"{candidate.name} against {best_candidate.name}: {difference.difference:+.1f} "
                    f"({difference.low:+.1f} to {difference.high:+.1f})"
                )
                if replaced:
                    best_candidate = candidate
                    best_hits = hits
            rung(best_candidate.name)
        return decisions

    def _refit(self, winner: Candidate) -> tuple[str, ...]:
        """Fit the winner again with the confirm images; return the commands that do so."""
        tried: list[str] = []
        commands: list[str] = []
        best = self.out / BEST
        with self._rung("refit", tried) as rung:
            finals: list[Path] = []
            for number, run in enumerate(winner.runs):
                final = best if len(winner.runs) == 1 else self.out / "final" / str(number)
                finals.append(final)
                commands.append(self._refit_one(run, final))
                tried.append(commands[-1])
            if len(finals) > 1:
                words = ["apecache", "ensemble", *map(str, finals), "--out", str(best)]
                commands.append(shlex.join(words))
                if not (best / DESCRIPTION).is_file():
                    save_heads(ensemble_heads([load_heads(final) for final in finals]), best)
            (self.out / COMMANDS).write_text("\n".join(commands) + "\n", encoding="utf-8")
            rung(str(best))
        return tuple(commands)

    # --- what the rungs share ---------------------------------------------------------------------

    def _rung(self, name: str, tried: list[str]) -> "_Rung":
        return _Rung(self.state, name, tried, self.progress)

    def _member(self, name: str) -> Path:
        return self.out / "members" / name

    def _fit_spec(self, image: str | None = None, text: str | None = None) -> FitSpec:
        return FitSpec(
            image or self.state.choices["image"],
            text_features=text or self.state.choices["text"],
            splits=self.spec.splits,
            seed=self.spec.seed,
            device=self.spec.device,
            keep=self.keep,
        )

    def _fit(
        self,
        name: str,
        recipe: str,
        settings: Sequence[str] = (),
        image: str | None = None,
        text: str | None = None,
    ) -> float:
        """Fit a recipe into a folder, or read the fit that is there; return its recall on dev."""
        run = self._member(name)
        self._note(run, recipe, settings)
        if not (run / DESCRIPTION).is_file():
            run.parent.mkdir(exist_ok=True)
            fit_head(
                self.store,
                recipe=load_recipe(recipe, settings),
                out=run,
                spec=self._fit_spec(image, text),
            )
        return dev_recall(load_heads(run))

    def _hits(self, candidate: Candidate) -> RetrievalHits:
        """Answer the queries of the confirm images."""
        heads = [load_heads(run) for run in candidate.runs]
        run = heads[0] if len(heads) == 1 else ensemble_heads(heads)
        embedded = embed_store(run, self.store, among=self.confirm)
        return retrieval_hits(
            embedded.image,
            embedded.text,
            embedded.image_of_text,
            relevance=embedded.relevance,
        )

    def _refit_one(self, run: Path, final: Path) -> str:
        """Fit a run again without the keep list; return the command."""
        recorded = self.state.choices["made"][str(run.relative_to(self.out))]
        spec = replace(self._fit_spec(), keep=None)
        if not (final / DESCRIPTION).is_file():
            final.parent.mkdir(exist_ok=True)
            recipe = load_recipe(recorded["recipe"], recorded["settings"])
            fit_head(self.store, recipe=recipe, out=final, spec=spec)
        return fit_command(
            self.store,
            recipe=recorded["recipe"],
            settings=recorded["settings"],
            run=final,
            spec=spec,
        )

    def _note(self, run: Path, recipe: str, settings: Sequence[str]) -> None:
        """Remember how a run was made."""
        recorded = self.state.choices.setdefault("made", {})
        recorded[str(run.relative_to(self.out))] = {"recipe": recipe, "settings": list(settings)}


class _Rung:
    """Record a rung when its block ends."""

    def __init__(
        self,
        state: SearchState,
        name: str,
        tried: list[str],
        progress: RungProgress,
    ) -> None:
        self.state = state
        self.name = name
        self.tried = tried
        self.progress = progress
        self.outcome = ""
        self.before = state.spent_seconds
        self.clock = state.clock()

    def __enter__(self) -> "Callable[[str], None]":
        self.clock.__enter__()
        return self._end

    def _end(self, outcome: str) -> None:
        self.outcome = outcome

    def __exit__(self, *error: object) -> None:
        self.clock.__exit__(None, None, None)
        if error[0] is not None:
            return
        earlier = self.state.rungs.get(self.name)
        seconds = self.state.spent_seconds - self.before
        record = RungRecord(
            name=self.name,
            tried=tuple(self.tried),
            outcome=self.outcome,
            # A rung that a resumed search only reads again keeps its first cost.
            seconds=seconds if earlier is None else max(seconds, earlier.seconds),
            left_seconds=self.state.left_seconds,
        )
        self.state.rungs[self.name] = record
        self.state.save()
        self.progress(record)


def dev_recall(heads: TrainedHeads) -> float:
    """Return the mean of R@1, 5 and 10 of both directions on dev that a run recorded."""
    return RetrievalReport.from_json(heads.training["dev"]).mean_recall


def search_space() -> Space:
    """Return what the sweep may choose: families of heads, regularization, and step sizes."""
    is_linear = {"image.kind": "linear"}
    dimensions = {
        "optimizer.lr": Dimension(log=(5e-4, 4e-3)),
        "optimizer.weight_decay": Dimension(log=(0.1, 3.0)),
        "image.input_dropout": Dimension.model_validate({"float": (0.2, 0.8), "if": is_linear}),
        "text.input_dropout": Dimension.model_validate({"float": (0.0, 0.4)}),
        "text.dropout": Dimension.model_validate(
            {"float": (0.1, 0.7), "if": {"text.kind": ["gated", "mlp"]}}
        ),
        "text.width": Dimension.model_validate(
            {"choice": (512, 1024, 2048), "if": {"text.kind": "mlp"}}
        ),
        "text.depth": Dimension.model_validate({"choice": (1, 2, 4), "if": {"text.kind": "mlp"}}),
        "loss.temperature": Dimension(log=(0.03, 0.15)),
        "loss.captions": Dimension(choice=(1, 2)),
    }
    return Space(dimensions, FAMILIES)


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


def _described(trial: Trial) -> str:
    mean = "failed" if trial.mean is None else f"{trial.mean:.1f}"
    return f"{trial.recipe} {' '.join(trial.settings)}: {mean} ({trial.state})"
