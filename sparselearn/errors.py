"""The one error class, and the wording that all messages share."""

import difflib
from collections.abc import Iterable


class SparsityError(ValueError):
    """A user's mistake. The message says where, what was required, what was seen and what to do."""


def closest(name: str, names: Iterable[str], n: int = 3) -> str:
    """The names most like `name`, quoted and joined, for the end of a message: "`a`, `b`"."""
    names = list(names)
    return ", ".join(f"`{m}`" for m in difflib.get_close_matches(name, names, n, 0.0)) or "none"
