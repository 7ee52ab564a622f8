"""The ClientApp's door in a clone."""

from pfedmoap_flwr.federation.apps import client_app as app

__all__ = ["app"]
