"""Finds stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence as Seq


class StopFinder:
    """Gives text on as soon as it cannot be the beginning of a stop string."""

    def __init__(self, stops: Seq[str]) -> None:
        """`stops` are not empty strings; the sampling parameters bound their number and length."""
        self._stops = tuple(stops)
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Takes the next piece; returns what can be given out and whether a stop was found.

        Of several stop strings the one that begins first counts. After True feed no more.
        """
        if not self._stops:
            return text, False
        text = self._held + text
        begins = [at for at in map(text.find, self._stops) if at >= 0]
        if begins:
            self._held = ""
            return text[: min(begins)], True
        held = self._held_from(text)
        self._held = text[held:]
        return text[:held], False

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        text, self._held = self._held, ""
        return text

    def _held_from(self, text: str) -> int:
        """Where the longest end of `text` begins that may become a stop; `len(text)` if none."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first_chars:
                end = text[start:]
                if any(stop.startswith(end) for stop in self._stops):
                    return start
        return len(text)
