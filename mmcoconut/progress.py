"""Progress of long work, with the estimated remaining time: a bar in a terminal or notebook, else log lines."""

import os
import sys

from tqdm import auto, autonotebook, std


BAR_DELAY = 2.0  # seconds of work before a bar is shown
LINE_INTERVAL = 30.0  # seconds between lines, and before the first
LINE_FORMAT = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} so far, {remaining} left"


class ProgressLines(std.tqdm):
    """Progress for a log file: a line every LINE_INTERVAL seconds, and none for short work."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line, except before the first and after the last item."""
        if msg is None and 0 < self.n < (self.total or float("inf")):
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def close(self) -> None:
        """Close without a last line, which would add nothing."""
        self.leave, self.delay = False, float("inf")
        super().close()


def duration(seconds: float) -> str:
    """Format a duration with the precision of an estimate.

    >>> duration(42), duration(600), duration(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Pace:
    """Estimate the remaining time of a few long pieces of work from the finished ones, for a line of text after each.

    Args:
        total: number of pieces.
        at_a_time: number of pieces that run at the same time.
    """

    def __init__(self, total: int, at_a_time: int = 1):
        self.total, self.at_a_time = total, at_a_time
        self.num_done, self.seconds = 0, 0.0

    def add(self, seconds: float) -> None:
        """Count a finished piece that took so long."""
        self.num_done += 1
        self.seconds += seconds

    def leave_out(self) -> None:
        """Count a piece that failed, whose time says nothing of the others."""
        self.total -= 1

    def text(self, unit: str) -> str | None:
        """Return the finished pieces, their mean time and the remaining time; None if no or every piece is done.

        >>> pace = Pace(15)
        >>> pace.add(240.0)
        >>> pace.text("runs trained")
        '1 of 15 runs trained, 4 min each: about 56 min left'
        """
        if not 0 < self.num_done < self.total:
            return None
        mean = self.seconds / self.num_done
        left = duration(mean * (self.total - self.num_done) / self.at_a_time)
        return f"{self.num_done} of {self.total} {unit}, {duration(mean)} each: about {left} left"


def shows_bars() -> bool:
    """Return True if a bar can be redrawn in place: in a terminal or a notebook."""
    return sys.stderr.isatty() or autonotebook.tqdm is not std.tqdm


def progress(items=None, *, desc: str, unit: str = "rows", total: int | None = None, silent: bool = False) -> std.tqdm:
    """Show the progress of work: as an iterator over `items` or, with `total`, by its method `update`.

    Args:
        items: the items to iterate over.
        desc: description of the work, a few words.
        unit: counted unit, in the plural.
        total: the number of items, if `items` is not given.
        silent: show nothing. Processes other than the first never show anything.
    """
    silent = silent or os.environ.get("RANK", "0") != "0"
    shared = {"desc": desc, "unit": f" {unit}" if shows_bars() else unit, "total": total, "disable": silent}
    if shows_bars():
        return auto.tqdm(items, delay=BAR_DELAY, **shared)
    timing = {"mininterval": LINE_INTERVAL, "maxinterval": LINE_INTERVAL, "delay": LINE_INTERVAL}
    return ProgressLines(items, bar_format=LINE_FORMAT, **timing, **shared)
