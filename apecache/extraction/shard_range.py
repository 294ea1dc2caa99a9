"""Divide a store's shards among jobs that run side by side without talking to one another."""

from dataclasses import dataclass

from apecache.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class ShardRange:
    """Name one part of the shards: number `number` of `count`, counted from 1.

    A shard belongs to the part given by its index modulo `count`, in every array and segment, so
    that arrays that are filled in one pass stay together.
    """

    number: int = 1
    count: int = 1

    def __contains__(self, index: int) -> bool:
        """Tell whether the part has the shard of that index."""
        return index % self.count == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def whole(self) -> bool:
        return self.count == 1


WHOLE = ShardRange()


def parse_part(text: str) -> ShardRange:
    """Parse `2/5`, the second of five parts.

    Raises:
        OptionError: anything else than i/n with 1 <= i <= n.
    """
    number, slash, count = text.partition("/")
    if not (slash and _is_number(number) and _is_number(count) and 1 <= int(number) <= int(count)):
        raise OptionError(f"--part {text}: expected i/n with i from 1 to n, such as 2/5")
    return ShardRange(number=int(number), count=int(count))


def _is_number(text: str) -> bool:
    # isdigit alone also accepts digits of other scripts.
    return text.isascii() and text.isdigit()
