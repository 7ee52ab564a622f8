"""FedSP (Dong et al., EMNLP Findings 2023, arXiv 2311.06805): prompts as messengers to a model.

Clients hold only the first blocks of the text tower and a small layer behind them, their own:

    text_features^(c) = unit(t + W_up tanh(W_down t)), t = the first blocks' feature of class c

A round trains the layer, then the prompt. The prompt alone travels. The server, which has the whole
tower but no image, averages prompts and moves the mean (see parts.towers) until the whole tower
reads in it what the first blocks read in it before.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Method, Phase, PromptHead, ServerState, Upload
from pfedmoap_flwr.methods.parts.towers import apart, told_to_both
from pfedmoap_flwr.settings import Section, setting


class FedSPSettings(Section):
    """Settings of FedSP."""

    blocks: int = setting(1, "first blocks of a client's text tower; all where it is more", low=1)
    auxiliary: int = setting(16, "width of a client's own layer behind them; 0: none", low=0)
    steps: int = setting(10, "steps of the server through the whole tower", low=0)
    server_lr: float = setting(0.02, "learning rate of these steps", above=0)


class FedSPHead(PromptHead):
    """The prompt, the text tower's first blocks, and the client's own layer, 0 at the start."""

    def __init__(self, method: "FedSP") -> None:
        super().__init__(method)
        own, depth = method.own, method.settings.prompt.depth
        if depth > own.blocks:
            raise UsageError(f"setting prompt.depth={depth}: must be <= fedsp.blocks={own.blocks}")
        self.encoder = self.verbalized(method.encoder(self.template, own.blocks))
        width = self.encoder.embed_dim
        self.down = self.normal("auxiliary", width, own.auxiliary, std=width**-0.5)
        self.up = nn.Parameter(torch.zeros(own.auxiliary, width, device=self.device))

    def encode(self) -> Tensor:
        """Return text features (C, d)."""
        text = self.encoder(self.ctx)
        if not self.down.numel():
            return text
        return F.normalize(text + (text @ self.down).tanh() @ self.up, dim=-1)


class FedSP(Method[FedSPSettings, FedSPHead]):
    """The prompt is averaged, and then moved through the whole text tower."""

    section = FedSPSettings
    head = FedSPHead
    personal = ("down", "up")
    fidelity = "nearest version: a truncated text tower, and a server without images"

    def schedule(self, head: FedSPHead, epochs: int) -> list[Phase]:
        """Return the two stages: the client's own layer, then the prompt."""
        return [(epochs, self.personal * bool(head.down.numel())), (epochs, head.prompt)]

    def merge(self, state: ServerState, uploads: Mapping[int, Upload]) -> None:
        """Average the prompts, and move the mean until both towers read the same in it."""
        super().merge(state, uploads)
        heads = PromptHead(self), self.build()
        for head in heads:
            head.load(state.shared)
        whole, part = (head.encoder for head in heads)
        before = state.shared["ctx"].to(self.clip.device)
        after = told_to_both(before, whole, part, self.own.steps, self.own.server_lr)
        state.shared["ctx"] = after.cpu()
        with torch.no_grad():
            read = part(before)
            distances = {"before": apart(whole(before), read), "after": apart(whole(after), read)}
        state.metrics = {f"apart-{when}": float(value) for when, value in distances.items()}
