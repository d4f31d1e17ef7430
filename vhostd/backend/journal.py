"""What one VM has to tell: log lines, limited where a guest or VMM can cause them, and its news.

Knows the rate limit and who listens. Must not know what any of it means.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import structlog

from vhostd.log import RateLimiter, get_logger

OnNews = Callable[[str, str, dict[str, Any]], None]
"""Called with VM name, event name, fields; must not block."""


class Journal:
    """A VM's log and news; vm_name is the VM's."""

    def __init__(self, vm_name: str, limiter: RateLimiter, on_news: OnNews) -> None:
        self.vm_name = vm_name
        self._limiter = limiter
        self._listeners = [on_news]
        self.log: structlog.typing.FilteringBoundLogger = get_logger(vm=vm_name)

    def guest_caused(self, key: Hashable, event: str, **fields: object) -> None:
        """A line that a guest or VMM can cause as often as it likes: one a second for each key."""
        suppressed = self._limiter.admit((self.vm_name, key))
        if suppressed is not None:
            if suppressed:
                fields["suppressed"] = suppressed
            self.log.warning(event, **fields)

    def publish(self, event: str, fields: dict[str, Any]) -> None:
        """Tell whoever listens to the event stream."""
        for listener in self._listeners:
            listener(self.vm_name, event, fields)

    def listen(self, on_news: OnNews) -> None:
        """Tell somebody else as well, after all others."""
        self._listeners.append(on_news)
