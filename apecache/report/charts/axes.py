"""Choose round values along an axis."""

import math


def ticks(low: float, high: float, whole: bool = False) -> tuple[float, ...]:
    """Return at most eight evenly spaced round values that enclose low…high.

    The step is 1, 2 or 5 times a power of ten, and at least 1 where `whole` asks for integers.
    """
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    candidates = [factor * power for factor in (1, 2, 5, 10)]
    # Rounding may leave a candidate just below the step that it stands for.
    step = next(candidate for candidate in candidates if candidate >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    # Without the tolerance, 0.3 / 0.05 or 0.6 / 0.1 could add an empty interval.
    first = math.floor(low / step + 1e-6)
    last = math.ceil(high / step - 1e-6)
    return tuple(index * step for index in range(first, max(last, first + 1) + 1))


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Return powers of ten within low…high.

    Where there are fewer than three, 2 and 5 times each power are taken too; where there are still
    fewer than two, `low` and `high` themselves.
    """
    first = math.floor(math.log10(low))
    last = math.ceil(math.log10(high))
    for steps in ((1,), (1, 2, 5)):
        marks = []
        for power in range(first, last + 1):
            # Written as a decimal, so that 10.0**-4 * 5 is .0005 exactly.
            marks += [float(f"{step}e{power}") for step in steps]
        marks_within = tuple(mark for mark in marks if low <= mark <= high)
        n_needed = 3 if steps == (1,) else 2
        if len(marks_within) >= n_needed:
            return marks_within
    return (low, high)
