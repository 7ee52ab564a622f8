"""Context vectors that a small network writes (P-tuning: Liu et al., 2021, arXiv 2103.10385).

What is learned are embeddings e_1 .. e_M (M, D) and a network over them, the prompt encoder:

    "mlp":   h_i = W2 ReLU(W1 e_i + b1) + b2
    "lstm":  h_i = W2 ReLU(W1 [l_i : r_i] + b1) + b2

with l and r the outputs of an LSTM read forwards and backwards over e (the paper's Eq. 5), of
D / 2 numbers each and in two layers, as in its code (THUDM/P-tuning). The cell is

    c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g),   l_t = sigmoid(o) tanh(c_t)

The context is ctx_i = s_i + h_i - h_i^0: s is what it would be without a network, drawn or words,
and h^0 what the network writes at first, both constant. The paper has h_i alone, but its networks
write vectors ten times as long as CLIP's words. So training starts from the same prompt.

Shapes: M context tokens, D text width, H hidden width of one direction.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from pfedmoap_flwr.methods.parts.gate import linear
from pfedmoap_flwr.randomness import torch_generator

Kind = Literal["mlp", "lstm"]
LAYERS = 2


class BiLSTM(nn.Module):
    """A bidirectional LSTM, its parameters named and laid out as those of `nn.LSTM`.

    That one cannot be stacked: PyTorch's kernels for it have no rule for vmap.
    """

    def __init__(self, width: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.hidden = hidden
        for layer in range(LAYERS):
            inputs = 2 * hidden if layer else width
            for end in (f"l{layer}", f"l{layer}_reverse"):
                sizes = {
                    "weight_ih": (inputs,),
                    "weight_hh": (hidden,),
                    "bias_ih": (),
                    "bias_hh": (),
                }
                for name, rest in sizes.items():
                    drawn = torch.empty(4 * hidden, *rest)
                    drawn.uniform_(-(hidden**-0.5), hidden**-0.5, generator=generator)
                    self.register_parameter(f"{name}_{end}", nn.Parameter(drawn))

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs (..., M, 2H) of both directions, of inputs (..., M, D)."""
        for layer in range(LAYERS):
            backwards = self._read(x.flip(-2), f"l{layer}_reverse").flip(-2)
            x = torch.cat([self._read(x, f"l{layer}"), backwards], dim=-1)
        return x

    def _read(self, x: Tensor, end: str) -> Tensor:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        of_input, of_hidden, *biases = (getattr(self, f"{name}_{end}") for name in names)
        outputs = []
        h = c = x.new_zeros(*x.shape[:-2], self.hidden)
        for now in (x @ of_input.t() + biases[0] + biases[1]).unbind(-2):
            i, f, g, o = (now + h @ of_hidden.t()).chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs, dim=-2)


class PromptWriter(nn.Module):
    """Embeddings and the network that writes a context from them, first the context `start`.

    Args:
        kind: "mlp" or "lstm".
        start: (..., M, D), on the device where all of it shall be.
        generator: what embeddings, of N(0, 1), and network are drawn from.
    """

    def __init__(self, kind: Kind, start: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        width = start.shape[-1]
        self.embeddings = nn.Parameter(torch.empty(start.shape).normal_(generator=generator))
        self.lstm = BiLSTM(width, width // 2, generator) if kind == "lstm" else None
        read = width // 2 * 2 if kind == "lstm" else width
        self.mlp = nn.Sequential(
            linear(read, width, generator), nn.ReLU(), linear(width, width, generator)
        )
        self.to(start.device)
        # The same for all clients: a function of the seed
        self.constant = start - self.written().detach()

    def written(self) -> Tensor:
        """Return h (..., M, D)."""
        x = self.embeddings if self.lstm is None else self.lstm(self.embeddings)
        written: Tensor = self.mlp(x)
        return written

    def forward(self) -> Tensor:
        """Return the context (..., M, D)."""
        return self.constant + self.written()


class WritesContext(nn.Module):
    """A head whose `ctx` may be written by a network, its `writer`, and is read as before.

    PyTorch's own parametrizations would give every head a class of its own, and heads of different
    classes are never stacked.
    """

    prompt: tuple[str, ...] = ("ctx",)
    writer: PromptWriter

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        # A parameter of that name is found before: a head may have put another in its place
        if name == "ctx" and name not in self._parameters and "writer" in self._modules:
            written: Tensor = self.writer()
            return written
        return super().__getattr__(name)

    def let_write(self, kind: Kind, start: Tensor, seed: int) -> None:
        """Put a network in the place of the parameter `ctx`; it begins with `start` (M, D)."""
        writer = PromptWriter(kind, start, torch_generator(seed, "writer"))
        del self.ctx
        self.writer = writer
        own = tuple(f"writer.{name}" for name, _ in writer.named_parameters())
        self.prompt = own + tuple(name for name in self.prompt if name != "ctx")
