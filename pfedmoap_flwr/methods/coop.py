"""CoOp, local only (Zhou et al., IJCV 2022, arXiv 2109.01134): every client for itself."""

from pfedmoap_flwr.methods.base import Method


class CoOp(Method):
    """The whole prompt is personal: nothing is sent, training goes on from the client's own."""

    def is_personal(self, name: str) -> bool:
        """Return True: all that makes the prompt stays."""
        return True
