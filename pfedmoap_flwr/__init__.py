"""pFedMoAP on Flower: personalised federated prompt learning for a frozen CLIP."""

__version__ = "0.1.0"
