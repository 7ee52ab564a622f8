"""FedPGP (Cui et al., ICML 2024, arXiv 2405.09771): a global prompt plus a low-rank personal part.

P_i = sigma + U_i V_i, where sigma (M, D) is averaged and U (M, r), V (r, D) never leave the client.
The loss is cross-entropy of P_i plus mu times the mean over classes c of

    -log(e^(cos(T0_c, Ts_c) / temp) / (e^(cos(T0_c, Ts_c) / temp) + e^(cos(Ts_c, T_c) / temp)))

T0, Ts and T are the text features of a fixed sentence, of sigma and of P_i: the global prompt is
pulled to what CLIP knows and pushed away from the personal prompt.
"""

from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import Method, PromptHead, Tensors
from pfedmoap_flwr.settings import Section, setting


class FedPGPSettings(Section):
    """Settings of FedPGP."""

    rank: int = setting(4, "r of the personal part U V; 0: none", low=0)
    mu: float = setting(1.0, "weight of the contrastive term", low=0)
    temperature: float = setting(0.5, "of the contrastive term", above=0)


class FedPGPHead(PromptHead):
    """The global prompt `ctx` (sigma), the factors `u` and `v`, and the fixed `anchor` (T0)."""

    def __init__(self, method: "FedPGP") -> None:
        super().__init__(method)
        *classes, n_ctx, width = self.ctx_shape
        self.u = self.normal("u", *classes, n_ctx, method.own.rank)
        self.v = self.normal("v", *classes, method.own.rank, width)
        self.anchor = method.clip.zeroshot(method.task.classnames, method.sentence())

    def encode(self) -> Tensor:
        """Return the text features T (C, d) of the personal prompt."""
        return self.encoder(self.ctx + self.u @ self.v)


class FedPGP(Method[FedPGPSettings, FedPGPHead]):
    """sigma is averaged; U and V stay; all three are trained together."""

    section = FedPGPSettings
    head = FedPGPHead
    personal = ("u", "v")

    def sentence(self) -> str:
        """Return the sentence of T0, with {} for the class.

        "paper": the task's, written by hand. "released": the tokens that CoOp's code puts where the
        learned context goes, the words that it starts from or M times "X".
        """
        if self.settings.compat == "paper":
            return self.task.template
        prompt = self.settings.prompt
        if prompt.template:
            return prompt.layout(self.clip.n_tokens).plain("X")
        words = prompt.ctx_init or " ".join(["X"] * prompt.n_ctx)
        return f"{words} {{}}."

    def loss(self, head: FedPGPHead, features: Tensor, labels: Tensor, received: Tensors) -> Tensor:
        """Return cross-entropy of the personal prompt plus the contrastive term."""
        personal, shared = head.encode(), head.encoder(head.ctx)
        plain = F.cross_entropy(head.classify(features, personal), labels)
        term = contrast(head.anchor, shared, personal, self.own.temperature)
        return plain + self.own.mu * term


def contrast(anchor: Tensor, shared: Tensor, personal: Tensor, temperature: float) -> Tensor:
    """Return the contrastive term of text features T0, Ts and T, each (C, d), of any length.

    With one positive and one negative, -log of the softmax is softplus of their difference.
    """
    near = F.cosine_similarity(anchor, shared, dim=-1)
    apart = F.cosine_similarity(shared, personal, dim=-1)
    return F.softplus((apart - near) / temperature).mean()
