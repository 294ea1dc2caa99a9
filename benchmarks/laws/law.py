"""A law: what a paper claims, as arms, comparisons of them and the published figures. One TOML file
each, in `zoo/`.

A comparison names its arms best first. `order` of several arms is a comparison of each with the
next; `equal` says that two do not differ by as much as counts; `over` compares a difference with
another one; `above` compares one arm with a number. `smaller` names arms of which the paper says
that they train less than the others do. Published figures stand beside arms or
comparisons, with the place that they were read at; none is made up.
"""

import tomllib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from apecache.arguments import require_type
from apecache.errors import OptionError, RecipeError, nearest, one_line

Retrieval = Literal["tr", "ir", "recall", "r1"]
"""Per cent: mean of R@1, R@5 and R@10 image to text, text to image, of both; `r1`: mean of both
R@1."""
Learnt = Literal["top1", "unseen", "image-shift-rises", "text-shift-falls"]
"""`top1`: zero-shot accuracy in per cent. `unseen`: `recall`, mean over languages that were not
trained on. Pearson's correlation of the norms' shift with depth in the image tower, and its
negative in the text tower."""
Counted = Literal["trained", "step-flops", "total-flops", "peak-bytes"]
"""Counted before anything runs: what the arm saves of the other's cost, in per cent of it."""
PerPoint = Literal["flops-per-point", "seconds-per-point", "bytes-per-point"]
"""The same of a cost for each point of `recall`."""
Metric = Retrieval | Learnt | Counted | PerPoint
RETRIEVAL: tuple[str, ...] = get_args(Retrieval)
COUNTED: tuple[str, ...] = get_args(Counted)
PER_POINT: tuple[str, ...] = get_args(PerPoint)
SHIFTS = ("image-shift-rises", "text-shift-falls")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Arm(_Section):
    """One thing that is trained and measured. `settings`: as of `--set`; `without`: sections of the
    recipe left out.

    `image`, `text`, `teacher`: roles of encoders, which the user gives by name; `image` and `text`
    are the main ones. `start`: towers begin with the encoder's weights or with random ones. `data`:
    share of the training images; `noise`: share of these that have another image's captions;
    `steps`: share of the steps. `published`: figures by metric.
    """

    recipe: str
    settings: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    image: str = "image"
    text: str = "text"
    teacher: str = ""
    start: Literal["pretrained", "random"] = "pretrained"
    data: float = Field(default=1.0, gt=0, le=1)
    noise: float = Field(default=0.0, ge=0, lt=1)
    steps: float = Field(default=1.0, gt=0, le=1)
    published: dict[Metric, float] = {}


class ComparisonSpec(_Section):
    """As the module says. `published`: figures of the arms in their order where those of the arms
    do not serve; `place`: where they stand; `smallest`: in place of the law's. Each arm of
    `smaller` must train fewer parameters than every arm of the comparison that it does not name."""

    order: tuple[str, ...] = Field(min_length=1)
    equal: bool = False
    over: tuple[str, str] | None = None
    smaller: tuple[str, ...] = ()
    above: float | None = None
    metric: Metric | None = None
    published: tuple[float, ...] = ()
    place: str = ""
    smallest: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _sound(self) -> "ComparisonSpec":
        single = self.above is not None
        if single != (len(self.order) == 1):
            raise ValueError("one arm alone is compared with `above`, several are not")
        if (self.equal or self.over) and len(self.order) != 2:
            raise ValueError("`equal` and `over` are for an order of two arms")
        if self.published and (self.over or len(self.published) != len(self.order)):
            raise ValueError(
                "`published` has one figure for each arm of `order`, and none with `over`"
            )
        if self.smaller:
            if len(self.order) != 2:
                raise ValueError("`smaller` is for an order of two arms")
            named = {*self.order, *(self.over or ())}
            if not set(self.smaller) < named:
                raise ValueError("`smaller` names some of the arms of its comparison, not all")
        return self


class Law(_Section):
    """`smallest`: the smallest difference that counts, in the metric's unit. `figure`: what a
    published figure is. `needs`: what must be given besides pairs and the two main encoders, for
    people. `missing`: what of the claim cannot be decided, and why."""

    id: str
    title: str
    source: str
    claim: str
    figure: str = ""
    metric: Metric = "recall"
    smallest: float = Field(ge=0)
    needs: tuple[str, ...] = ()
    missing: str = ""
    arms: dict[str, Arm]
    comparisons: tuple[ComparisonSpec, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _arms_exist(self) -> "Law":
        named = [name for one in self.comparisons for name in (*one.order, *(one.over or ()))]
        for name in named:
            if name not in self.arms:
                raise ValueError(
                    f"a comparison names {name!r}; the arms are {', '.join(self.arms)}"
                )
        idle = sorted(set(self.arms) - set(named))
        if idle:
            raise ValueError(f"no comparison names the arms {', '.join(idle)}")
        return self

    def claims(self) -> "tuple[Claim, ...]":
        return tuple(claim for spec in self.comparisons for claim in _claims(self, spec))


class Claim(_Section):
    """One difference: the sum of the arms' values times their `weights`, minus `above`. Expected:
    at least `smallest`, or with `equal` no further from 0 than that. `published`: the difference as
    published, and `figures` what it is of, in the order of the arms. Costs are compared as what the
    first arm saves of the second one's, in per cent. `smaller`: arms that must train fewer parameters
    than the others."""

    weights: dict[str, float]
    metric: Metric
    smallest: float
    equal: bool = False
    above: float = 0.0
    figures: tuple[float, ...] = ()
    published: float | None = None
    place: str = ""
    smaller: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        arms = list(self.weights)
        if len(arms) == 1:
            return f"{arms[0]} > {self.above:g}"
        if self.saves:
            return f"{arms[0]} costs less than {arms[1]}"
        first = f"{arms[0]} {'=' if self.equal else '>'} {arms[1]}"
        return first if len(arms) == 2 else f"({arms[0]} - {arms[1]}) > ({arms[2]} - {arms[3]})"

    @property
    def saves(self) -> bool:
        return self.metric in (*COUNTED, *PER_POINT)

    def difference(self, values: Sequence[float]) -> float:
        """Of values of the arms in their order."""
        if self.saves:
            return 100 * (1 - values[0] / values[1])
        return sum(w * v for w, v in zip(self.weights.values(), values, strict=True)) - self.above


def _claims(law: Law, spec: ComparisonSpec) -> Iterator[Claim]:
    if len(spec.order) == 1:
        yield _claim(law, spec, {spec.order[0]: 1.0})
    for first, second in pairwise(spec.order):
        over = {spec.over[0]: -1.0, spec.over[1]: 1.0} if spec.over else {}
        yield _claim(law, spec, {first: 1.0, second: -1.0, **over})


def _claim(law: Law, spec: ComparisonSpec, weights: dict[str, float]) -> Claim:
    metric = spec.metric or law.metric
    known = {
        name: arm.published[metric] for name, arm in law.arms.items() if metric in arm.published
    }
    known |= dict(zip(spec.order, spec.published, strict=True)) if spec.published else {}
    claim = Claim(
        weights=weights,
        metric=metric,
        smallest=law.smallest if spec.smallest is None else spec.smallest,
        equal=spec.equal,
        above=spec.above or 0.0,
        figures=tuple(known[name] for name in weights) if weights.keys() <= known.keys() else (),
        place=spec.place,
        smaller=spec.smaller,
    )
    return claim.model_copy(update={"published": _gap(claim)})


def _gap(claim: Claim) -> float | None:
    if not claim.figures:
        return None
    return claim.difference(claim.figures)


def law_ids() -> list[str]:
    """In the order of their numbers."""
    paths = (Path(__file__).parent / "zoo").iterdir()
    return sorted(
        (p.name.removesuffix(".toml") for p in paths if p.name.endswith(".toml")),
        key=lambda i: int(i[1:]),
    )


def load_law(name: str) -> Law:
    """Raises OptionError for an unknown one, RecipeError for a file that is none."""
    require_type(name, str, "name")
    if name not in law_ids():
        raise OptionError(
            f"no law {name!r}; there are {', '.join(law_ids())}{nearest(name, law_ids())}"
        )
    return parse_law(
        (Path(__file__).parent / "zoo" / f"{name}.toml").read_text(encoding="utf-8"),
        name,
    )


def parse_law(text: str, where: str) -> Law:
    """Raises RecipeError: not TOML, or not a law."""
    try:
        return Law.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where}: not TOML: {error}") from None
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {one_line(e['msg'])}" for e in error.errors()[:3]
        )
        raise RecipeError(f"{where}: {found}") from None
