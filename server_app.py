"""The ServerApp's door in a clone."""

from pfedmoap_flwr.federation.apps import server_app as app

__all__ = ["app"]
