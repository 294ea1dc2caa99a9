"""Trying laws: jobs in the order of what they decide, each once, until all is done or the time is
up."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from apecache.arguments import as_texts, require_type
from apecache.errors import OptionError, nearest
from benchmarks.laws.jobs import Job, Planned, counted_costs, jobs_in_turn, plan_law
from benchmarks.laws.law import law_ids, load_law
from benchmarks.laws.measure import Bench, Say, measure
from benchmarks.laws.outcome import Outcome, load_outcome, save_outcome
from benchmarks.laws.results import FOLDER, LawResult, law_result, save_result
from benchmarks.laws.setting import LawsSetting


@dataclass(frozen=True, kw_only=True)
class LawsReport:
    """`n_left`: runs that are still to be made, because the time was up; `n_failed` of those that
    were made."""

    laws: tuple[LawResult, ...]
    n_done: int
    n_left: int
    n_failed: int
    work: Path


def plan_laws(setting: LawsSetting, only: Sequence[str] = ()) -> list[tuple[Planned, ...]]:
    """The claims of each law. Raises OptionError for a law that there is not, or seeds that make no
    sense."""
    if setting.seeds < 1:
        raise OptionError(f"{setting.seeds} seeds; expected at least 1")
    return [plan_law(load_law(name), setting) for name in _by_law(only) or law_ids()]


def wanted_claims(plans: Sequence[Sequence[Planned]], only: Sequence[str] = ()) -> list[Planned]:
    """Those that are to be decided: all of a law that `only` names, or, as `L1:l > c`, some of
    them.

    Raises:
        OptionError: a law has no such comparison.
    """
    named = _by_law(only)
    found = list[Planned]()
    for planned in plans:
        wanted = named.get(planned[0].law.id) or {one.claim.name for one in planned}
        known = {one.claim.name for one in planned}
        for name in sorted(wanted - known):
            raise OptionError(
                f"{planned[0].law.id} has no comparison {name!r}{nearest(name, known)}"
            )
        found += [one for one in planned if one.claim.name in wanted]
    return found


def _by_law(only: Sequence[str]) -> dict[str, set[str]]:
    """Names of comparisons by law; none where all are meant."""
    found: dict[str, set[str]] = {}
    for text in only:
        law, colon, name = (part.strip() for part in text.partition(":"))
        found.setdefault(law, set()).update({name} if colon else ())
    return found


def run_laws(
    setting: LawsSetting,
    only: Sequence[str] = (),
    budget_seconds: float | None = None,
    say: Say = lambda _: None,
) -> LawsReport:
    """Make the runs that are still to be made, and say after each what is known. The same call
    again goes on.

    A run is not begun where, at the rate of those before it, it would end after the budget; one
    that failed is tried again by the next call. Raises OptionError as `plan_laws` does.
    """
    require_type(setting, LawsSetting, "setting")
    only = as_texts(only, "only")
    begin = time.monotonic()
    plans = plan_laws(setting, only)
    wanted = jobs_in_turn(wanted_claims(plans, only))
    outcomes = known_outcomes(jobs_in_turn([one for planned in plans for one in planned]), setting)
    bench = Bench(setting=setting, jobs=tuple(wanted), say=say)
    left = [job for job in wanted if not _whole(outcomes.get(job.digest), wanted[job])]
    n_left = len(left)
    for job in left:
        if budget_seconds is not None and not _fits_in(
            job,
            outcomes,
            budget_seconds - (time.monotonic() - begin),
        ):
            continue
        say(f"{job.recipe.name}, seed {job.seed}: {n_left} runs to be made")
        outcomes[job.digest] = outcome = measure(job, bench, wanted[job])
        save_outcome(outcome, setting.work)
        n_left -= 1
        say(
            f"{job.recipe.name}, seed {job.seed}: {outcome.error or 'done'}, "
            f"{outcome.seconds:.0f} s"
        )
        save_results([planned for planned in plans if _asks_for(planned, job)], outcomes, setting)
    found = save_results(plans, outcomes, setting)
    failed = sum(bool(outcomes[job.digest].error) for job in wanted if job.digest in outcomes)
    return LawsReport(
        laws=found,
        n_done=len(wanted) - n_left,
        n_left=n_left,
        n_failed=failed,
        work=setting.work,
    )


def _asks_for(planned: tuple[Planned, ...], job: Job) -> bool:
    return any(job in jobs for one in planned for jobs in one.jobs.values())


def known_outcomes(jobs: Iterable[Job], setting: LawsSetting) -> dict[str, Outcome]:
    found = ((job.digest, load_outcome(job.digest, setting.work)) for job in jobs)
    return {digest: outcome for digest, outcome in found if outcome is not None}


def save_results(
    plans: Sequence[tuple[Planned, ...]],
    outcomes: dict[str, Outcome],
    setting: LawsSetting,
) -> tuple[LawResult, ...]:
    results = tuple(law_result(planned, outcomes, setting) for planned in plans)
    for result in results:
        save_result(result, setting.work / FOLDER)
    return results


def _whole(outcome: Outcome | None, wants: set[str]) -> bool:
    """Whether nothing more can be had of that job. What cannot be counted, and a correlation of too
    few norms, are not asked for again."""
    if outcome is None or outcome.error:
        return False
    return all(outcome.has(metric) for metric in wants & {"top1", "unseen", "recall"})


def _fits_in(job: Job, outcomes: dict[str, Outcome], seconds: float) -> bool:
    """By the operations that the recipe needs and the time that those before it took; the first of
    a kind is tried."""
    if not job.fits:
        return True
    if seconds <= 0:
        return False
    flops = counted_costs(job).get("total-flops")
    alone = job.recipe.trains_heads_alone
    like = [
        outcome.seconds / outcome.costs["total-flops"]
        for outcome in outcomes.values()
        if outcome.costs.get("total-flops") and outcome.heads_alone == alone and not outcome.error
    ]
    return not flops or not like or median(like) * flops <= seconds
