"""Keep account of what an automatic search has tried and what that cost."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from apecache.errors import MismatchError, OptionError, RunError
from apecache.fingerprint import Json
from apecache.storage.replace import replace_text

STATE = "auto.json"
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, kw_only=True)
class RungRecord:
    """Report one rung of the search."""

    name: str
    tried: tuple[str, ...]
    """What was tried, with its result on dev."""
    outcome: str
    seconds: float
    left_seconds: float
    """What is left of the budget after it."""


RungProgress = Callable[[RungRecord], None]


@dataclass(kw_only=True)
class SearchState:
    """Hold what a search must know when it resumes; written after each rung."""

    out: Path
    identity: dict[str, Json]
    budget_seconds: float
    spent_seconds: float = 0.0
    rungs: dict[str, RungRecord] = field(default_factory=dict)
    choices: dict[str, Json] = field(default_factory=dict)
    """Decisions that depended on the clock, and must not be taken again."""

    @property
    def left_seconds(self) -> float:
        """Return what is left of the budget."""
        return max(0.0, self.budget_seconds - self.spent_seconds)

    def save(self) -> None:
        """Write the state."""
        value = {
            "identity": self.identity,
            "budget_seconds": self.budget_seconds,
            "spent_seconds": self.spent_seconds,
            "rungs": [asdict(rung) for rung in self.rungs.values()],
            "choices": self.choices,
        }
        replace_text(self.out / STATE, json.dumps(value, indent=1, ensure_ascii=False))

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Count the time of a block, also if it is interrupted."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            # Interrupted work counts too: the next call has only what is left.
            self.spent_seconds += time.perf_counter() - begin
            self.save()


class Rung:
    """Time a rung, and record it when its block ends."""

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

    def __enter__(self) -> Callable[[str], None]:
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


def open_state(out: Path, identity: dict[str, Json], budget_seconds: float) -> SearchState:
    """Begin a search in a folder, or resume the one that is there. The budget may differ.

    Raises:
        MismatchError: The folder holds another search.
        RunError: The folder holds something else.
    """
    path = out / STATE
    if not path.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise RunError(f"{out} exists and is not a search; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        state = SearchState(out=out, identity=identity, budget_seconds=budget_seconds)
        state.save()
        return state
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rungs: dict[str, RungRecord] = {}
        # Rungs that ended are not run again.
        for record in value["rungs"]:
            tried = tuple(record["tried"])
            rungs[record["name"]] = RungRecord(**{**record, "tried": tried})
        recorded = value["identity"]
        state = SearchState(
            out=out,
            identity=identity,
            budget_seconds=budget_seconds,
            spent_seconds=float(value["spent_seconds"]),
            rungs=rungs,
            choices=dict(value["choices"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}); choose another --out") from None
    # Through JSON, so that tuples equal the lists of an identity that was read.
    expected = json.loads(json.dumps(identity))
    for key in expected:
        if recorded.get(key) != expected[key]:
            raise MismatchError(
                f"{out} holds another search ({key} differs); choose another --out",
                [(key, expected[key], recorded.get(key))],
            )
    return state


def parse_duration(text: str, option: str = "--budget") -> float:
    """Parse `90s`, `10m` or `2h` as seconds; a number alone is seconds.

    Raises:
        OptionError: Not of that form, or not above 0.
    """
    unit = UNITS.get(text[-1:])
    number = text[:-1] if unit is not None else text
    try:
        seconds = float(number) * (unit or 1.0)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise OptionError(f"{option} {text}: expected a duration like 90s, 10m or 2h")
    return seconds
