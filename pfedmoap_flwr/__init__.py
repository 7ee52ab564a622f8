"""pFedMoAP on Flower: personalised federated prompt learning for a frozen CLIP."""


def __getattr__(name: str) -> str:
    """Look `__version__` up when it is asked for: reading metadata would slow every import."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("pfedmoap-flwr")
