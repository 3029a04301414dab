"""Where the wall time of a run goes."""

import time
from dataclasses import dataclass, field


@dataclass
class Ledger:
    """Wall seconds of a run, over all its parts that were saved, by what they went to."""

    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)

    def charge(self, what: str) -> None:
        """Books the time since the last charge under `what`."""
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self._since
        self._since = now
