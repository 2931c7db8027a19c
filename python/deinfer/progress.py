"""Progress bars."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm import tqdm


def progress_bar(show: bool, **arguments: Any) -> tqdm[Any]:
    """Make a progress bar.

    Args:
        show: On a terminal; nowhere else in any case.
        **arguments: Of tqdm.

    Returns:
        The bar.
    """
    return tqdm(disable=None if show else True, dynamic_ncols=True, **arguments)


def report_to(bar: tqdm[Any]) -> Callable[[int, int], None]:
    """Make the function that shows (done, total) on a bar."""

    def report(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return report
