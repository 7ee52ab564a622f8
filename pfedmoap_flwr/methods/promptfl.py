"""PromptFL (Guo et al., TMC 2023, arXiv 2208.11625): FedAvg over one prompt."""

from pfedmoap_flwr.methods.base import Method


class PromptFL(Method):
    """Every default of Method: P_g down, E epochs of cross-entropy, P_i up, mean by n_i."""
