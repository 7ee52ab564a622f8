"""What a site's uploads have cost in all its runs, counted on its own disk, and its own limit.

privacy.budget is the server's word, and of one run. A node whose own configuration has
privacy-budget keeps its own count. Noised sums with noise z_1, z_2, ... are together one Gaussian
mechanism with mu^2 = SUM_i 1 / z_i^2 (Dong, Roth, Su, JRSS-B 2022, Corollary 3.3), whichever run
each belongs to. Before an upload that would bring epsilon above the limit the client refuses.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from pfedmoap_flwr import files
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.federation.privacy import effective_noise, sums_of_a_round
from pfedmoap_flwr.methods.base import Method
from pfedmoap_flwr.methods.parts.privacy import epsilon_of

KEY = "privacy-budget"
DELTA = 1e-5
"""The site's own, whatever a run says."""


@dataclass(frozen=True)
class SiteBudget:
    """A client's count. path: its file, kept for all runs. limit: largest epsilon."""

    path: Path
    limit: float

    @classmethod
    def of(cls, said: object, state: Path, client_id: int) -> "SiteBudget | None":
        """Return the budget that a node's configuration says, or None where it says none."""
        if said is None:
            return None
        if not isinstance(said, int | float) or not 0 < said < math.inf:
            raise UsageError(f"{KEY}={said!r} of this node: must be a number above 0")
        return cls(state / f"privacy-client-{client_id}.json", float(said))

    def check(self, method: Method[Any, Any]) -> float:
        """Return mu^2 with one more upload of a run. Raises UsageError where it is too much."""
        privacy = method.settings.privacy
        if privacy.unit == "none" or privacy.at_server:
            raise UsageError(
                f"this site has {KEY}={self.limit:g} and uploads nothing without noise of its own: "
                "set privacy.unit=client with privacy.where=client, or privacy.unit=example"
            )
        if not privacy.secret_noise or not privacy.noise:
            raise UsageError(
                f"this site has {KEY}={self.limit:g} and wants noise that nobody can take off: set "
                "privacy.noise above 0 and privacy.secret-noise=true"
            )
        spent = self._spent() + sums_of_a_round(method) / effective_noise(privacy) ** 2
        if (epsilon := epsilon_of(math.sqrt(spent), DELTA)) > self.limit:
            raise UsageError(
                f"this site has {KEY}={self.limit:g} for all runs; this upload would make it "
                f"{epsilon:.4g} (delta {DELTA:g}), and is not made"
            )
        return spent

    def charge(self, method: Method[Any, Any]) -> None:
        """Count an upload, lastingly, before it is made. Raises UsageError as `check` does."""
        files.make_folder(self.path.parent)
        # Two runs may be at work on a node, each in processes of its own
        with FileLock(self.path.with_suffix(".lock")):
            files.replace(self.path, json.dumps({"mu_squared": self.check(method)}))

    def _spent(self) -> float:
        if not self.path.exists():
            return 0.0
        try:
            spent = float(json.loads(self.path.read_bytes())["mu_squared"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                "the count of what this site's uploads have cost is damaged; put it back from a "
                "copy"
            ) from error
        if not 0 <= spent < math.inf:
            raise UsageError("the count of what this site's uploads have cost is no number >= 0")
        return spent
