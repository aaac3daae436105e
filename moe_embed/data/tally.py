"""What was read of a file, and what was bad in it: counted by reason, the first ones quoted, never passed over in silence."""

import collections
import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator

from moe_embed.config import UserError
from moe_embed.data.tables import BadRow

QUOTED = 3


class Tally:
    """Good and bad rows of one file. With `max_bad_fraction` 0 the first bad row is raised."""

    def __init__(self, path: str, *, of: str = "pairs", max_bad_fraction: float = 0.0):
        self.path, self.of, self.max_bad_fraction = path, of, max_bad_fraction
        self.good, self.bad, self.first = 0, collections.Counter(), []

    def good_of(self, rows: Iterable[tuple[str, dict | BadRow]], make: Callable) -> Iterator:
        """make(row, place) of each row that is good; the others are counted, whether unreadable or refused by `make`.

        A BadRow that others are lost with is raised, whatever the fraction.

        After the last row: UserError when the share of bad ones is above `max_bad_fraction`, or none is good.
        """
        # A file that is open ends here, and not when somebody has dropped the fault's traceback.
        with contextlib.closing(rows) if isinstance(rows, Generator) else contextlib.nullcontext():
            for place, row in rows:
                try:
                    if isinstance(row, BadRow):
                        raise row
                    made = make(row, place)
                except BadRow as fault:
                    if not self.max_bad_fraction or fault.more:
                        raise
                    self.bad[fault.reason] += 1
                    if len(self.first) < QUOTED:
                        self.first.append(str(fault))
                else:
                    self.good += 1
                    yield made
        if self.bad.total() > self.max_bad_fraction * (self.good + self.bad.total()):
            raise UserError(f"{str(self).removesuffix('.')}; max_bad_fraction={self.max_bad_fraction} allows less.")
        if not self.good:
            raise UserError(f"{self.path} holds no {self.of}." if not self.bad else f"{self}.")

    def __str__(self) -> str:
        """One sentence: how many rows were bad, of what kinds, and the first of them."""
        kinds = ", ".join(f"{reason}: {count:,}" for reason, count in self.bad.most_common())
        total = self.good + self.bad.total()
        return f"{self.path}: {self.bad.total():,} of {total:,} rows were left out ({kinds}), such as: {' '.join(self.first)}"
