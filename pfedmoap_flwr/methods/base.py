"""The one abstraction: what a client learns, what travels, what the server makes of it.

One rule carries all methods: a client keeps its whole head; what it receives overwrites by name;
what it sends is every parameter that is not `personal`, and what the method `reports` besides.

    server  start -> send -> ........................................ -> merge
    client            kept head, overwritten -> prepare -> train -> upload -> kept
    client            kept head -> prepare -> adapt -> measured

All defaults of `Method` together are PromptFL: FedAvg over one prompt.

Shapes: B batch, C classes, M context tokens, D text width, d embedding width, K experts, N clients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import ParamsT
from typing_extensions import TypeVar

from pfedmoap_flwr.clip.features import Reading
from pfedmoap_flwr.clip.load import FrozenClip
from pfedmoap_flwr.clip.names import EachName, Names, NamesEncoder, read_names
from pfedmoap_flwr.clip.template import Template
from pfedmoap_flwr.clip.text import PromptEncoder
from pfedmoap_flwr.data.federated import Task
from pfedmoap_flwr.methods.parts import verbalizers
from pfedmoap_flwr.methods.parts.amsgrad import amsgrad
from pfedmoap_flwr.methods.parts.mean import average
from pfedmoap_flwr.methods.parts.reparametrised import WritesContext
from pfedmoap_flwr.methods.parts.schedules import cosine
from pfedmoap_flwr.methods.settings import LearningSettings
from pfedmoap_flwr.randomness import torch_generator
from pfedmoap_flwr.settings import Section

Tensors = Mapping[str, Tensor]
Deliveries = dict[int, dict[str, Tensor]]
"""What goes down to each client, by client id and name."""
Phase = tuple[int, tuple[str, ...]]
"""Epochs, and the names of the parameters that move in them."""

EVALUATION_IMAGES, EVALUATION_NUMBERS = 1024, 2**22
"""How many images, and numbers read of them, go through `classify` at once at the most."""


@dataclass(frozen=True, eq=False)
class Split:
    """One client's part of a split: what is read of its images (n, ...) and labels (n,)."""

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Upload:
    """What one client sent after training: its tensors by name and its n_k."""

    tensors: dict[str, Tensor]
    num_examples: int


@dataclass
class ServerState:
    """All that the server remembers; saving it is the checkpoint.

    shared: what clients upload, averaged (P_g).
    pool: what a method keeps of each client, by client id; empty for most methods.
    extra: anything else of one method, such as the moments of an optimiser.
    metrics: numbers of a method for the round's line in rounds.jsonl; not part of the checkpoint.
    lent: by client whose prompts `send` gave it to train with, as ids; kept as metrics are.
    """

    shared: dict[str, Tensor]
    pool: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    round: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    lent: dict[int, list[int]] = field(default_factory=dict)


class Head(nn.Module):
    """What is read of images (B, ...) -> logits (B, C).

    Parameters are learned, and travel unless they are personal. Buffers stay at the client. A plain
    attribute must be the same for all clients: it is not saved, and stacked heads all use that of
    the first one.
    """

    def __init__(self, method: Method[Any, Any]) -> None:
        super().__init__()
        self.device = method.clip.device

    def encode(self) -> Tensor:
        """Return what does not depend on images, mostly text features: once an evaluation."""
        raise NotImplementedError

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C); image features come as the tower gives them, not normalised."""
        raise NotImplementedError

    def forward(self, image_features: Tensor) -> Tensor:
        """Return logits (B, C) of what is read of images (B, ...)."""
        return self.classify(image_features, self.encode())

    def predict(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (n, C) of a whole split, computed in parts that fit into memory."""
        fitting = EVALUATION_NUMBERS // max(1, image_features[:1].numel())
        step = min(max(1, fitting), EVALUATION_IMAGES)
        return torch.cat([self.classify(part, encoded) for part in image_features.split(step)])

    @torch.no_grad()
    def load(self, tensors: Tensors) -> None:
        """Overwrite parameters and buffers by name; names that a head does not have are ignored.

        A buffer takes any shape. Raises ValueError where a parameter has another shape.
        """
        for path, module in self.named_modules():
            for leaf in (*module._parameters, *module._buffers):
                name = f"{path}.{leaf}" if path else leaf
                if name not in tensors:
                    continue
                parameter = module._parameters.get(leaf)
                if parameter is None:
                    module._buffers[leaf] = tensors[name].detach().to(self.device, copy=True)
                elif parameter.shape == tensors[name].shape:
                    parameter.copy_(tensors[name])
                else:
                    came, own = tuple(tensors[name].shape), tuple(parameter.shape)
                    raise ValueError(f"{name} has shape {came}, not {own}")

    def state(self) -> dict[str, Tensor]:
        """Return what the client keeps on disk: a CPU copy of parameters and lasting buffers."""
        return {name: t.detach().cpu().clone() for name, t in self.state_dict().items()}


class PromptHead(WritesContext, Head):
    """CoOp's learner: ctx (M, D), or (C, M, D) class-specific, in front of the frozen text tower.

    Where its vectors stand in a prompt is the setting's template. With prompt.depth those that
    enter deeper layers follow in the same ctx, so that M is depth times the template's. With
    prompt.verbalizer=weights, `name_weights` (V,) is learned besides; with prompt.reparametrise,
    `writer` in place of ctx, which is then computed whenever it is read.

    logit^(c) = sim(f(x), g(P^(c))) / tau (pFedMoAP, Eq. 3 and 4).

    prompt: the names of the parameters that make the prompt. They are trained in the same phases,
    and travel or stay together.
    """

    def __init__(self, method: Method[Any, Any]) -> None:
        super().__init__(method)
        prompt, classnames = method.settings.prompt, method.task.classnames
        self.template = prompt.layout(method.clip.n_tokens)
        self.verbalizer = prompt.verbalizer
        if self.verbalizer == "max":
            verbalizers.check_best(type(self), PromptHead)
        if self.verbalizer == "weights":
            count = sum(map(len, method.names))
            self.name_weights = nn.Parameter(torch.zeros(count, device=self.device))
            self.prompt += ("name_weights",)
        self.encoder = self.verbalized(method.encoder(self.template))
        self.logit_scale = method.clip.logit_scale
        self.seed = method.settings.seed
        size = (self.encoder.n_ctx, self.encoder.width)
        self.ctx_shape = (len(classnames),) * prompt.class_specific + size
        self.ctx = self.normal("ctx", *self.ctx_shape)
        for first, words in self.template.starts:
            start = method.clip.embed(words)
            self.ctx.data[..., first : first + len(start), :] = start
        if prompt.reparametrise != "none":
            self.let_write(prompt.reparametrise, self.ctx.detach(), self.seed)

    def verbalized(self, encoder: PromptEncoder | NamesEncoder) -> PromptEncoder | NamesEncoder:
        """Return an encoder that makes of a class's names what this head makes of them.

        Raises UsageError where no class has several.
        """
        return verbalizers.verbalized(encoder, self.verbalizer, lambda: self.name_weights)

    def normal(self, name: str, *shape: int, std: float = 0.02) -> nn.Parameter:
        """Return a parameter drawn from N(0, std^2), a function of (seed, name)."""
        drawn = torch.empty(shape).normal_(std=std, generator=torch_generator(self.seed, name))
        return nn.Parameter(drawn.to(self.device))

    def encode(self) -> Tensor:
        """Return text features (C, d), unit-norm; with prompt.verbalizer=max (V, d)."""
        return self.encoder(self.ctx)

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C) of image features (B, d) and text features as `encode` has them."""
        logits = self.logit_scale * (F.normalize(image_features, dim=-1) @ encoded.t())
        return self.encoder.largest(logits) if isinstance(self.encoder, EachName) else logits


S = TypeVar("S", bound=Section, default=Section)
H = TypeVar("H", bound=Head, default=PromptHead)


@dataclass(frozen=True, eq=False)
class Work(Generic[H]):
    """What the hooks of a client get when a message came.

    head: has what the client kept and what it received. received: on the head's device.
    split: the client's images by the name of a split, read when they are asked for.
    rate: what every learning rate of local training is multiplied by, as the round has it.
    """

    client_id: int
    round: int
    head: H
    split: Callable[[str], Split]
    received: Tensors
    rate: float = 1.0

    @functools.cached_property
    def images(self) -> Split:
        """The client's training images."""
        return self.split("train")

    @functools.cached_property
    def validation(self) -> Split:
        """The client's validation images; there may be none."""
        return self.split("validation")


class Method(Generic[S, H]):
    """One federated method: subclasses override what differs from PromptFL, and nothing else.

    S is the type of the method's own settings, H that of its head. A method object is made on the
    server and on every client; it knows the frozen CLIP and the classes, and keeps no state.

    section: the class of its own settings; their keys begin with the method's name.
    head: the class of its head. reading: what the head gets of an image, see `reads`.
    personal: parameters, or modules of them, that never leave a client.
    of_classes: those of them that belong to the trained classes, and that may stay as they start
    where a head is measured on others.
    fidelity: how close it is to its paper, in a few words; its page in docs/methods says more.
    """

    section: ClassVar[type[Section]] = Section
    head: ClassVar[type[Head]] = PromptHead
    reading: ClassVar[Reading] = Reading()
    personal: tuple[str, ...] = ()
    of_classes: ClassVar[tuple[str, ...]] = ()
    fidelity: ClassVar[str] = "faithful"

    def __init__(self, settings: LearningSettings, own: S, clip: FrozenClip, task: Task) -> None:
        self.settings = settings
        self.own = own
        self.clip = clip
        self.task = task

    def generator(self, name: str, client_id: int, round: int) -> torch.Generator:
        """Return the source of one kind of random draws: the same in every process and repeat."""
        return torch_generator(self.settings.seed, name, client_id, round)

    @classmethod
    def reads(cls, own: S) -> Reading:
        """Return what the head gets of an image; a method whose settings decide it says so here."""
        return cls.reading

    def reports(self) -> dict[str, Tensor]:
        """Return an example of each tensor that goes up beside the shared parameters.

        Names, shapes and dtypes are compared with what comes; the values do not matter.
        """
        return {}

    # Of a client

    def encoder(
        self, template: Template, blocks: int | None = None
    ) -> PromptEncoder | NamesEncoder:
        """Return g(.) of the task's classes, by the names that the settings give them.

        blocks: of the text tower its first ones alone.
        """
        prompt = self.settings.prompt
        return self.clip.encoder(self.names, template, prompt.class_specific, prompt.depth, blocks)

    @functools.cached_property
    def names(self) -> Names:
        """Each class's names, read once: a head is built for every message."""
        return read_names(self.settings.prompt.names, self.task.classnames, self.task.held_out)

    def build(self) -> H:
        """Return a fresh head, the same for every client: its start is a function of the seed."""
        return cast(H, self.head(self))

    def prepare(self, work: Work[H]) -> None:
        """Compute once what no training step changes, before a head trains or is measured."""

    def loss(self, head: H, features: Tensor, labels: Tensor, received: Tensors) -> Tensor:
        """Return the training loss of a batch: features (B, ...), labels (B,).

        A function of its arguments alone, so that many clients can be trained in one step.
        """
        return F.cross_entropy(head(features), labels)

    def schedule(self, head: H, epochs: int) -> list[Phase]:
        """Return the phases of a local training, one after the other."""
        return [(epochs, tuple(name for name, _ in head.named_parameters()))]

    def lr(self, name: str, epoch: int, epochs: int) -> float:
        """Return the learning rate of a parameter in an epoch (from 0) of a phase.

        "paper": constant. "released": that code's scheduler, fresh for each client: one epoch at
        1e-5, then a cosine over the local epochs.
        """
        if self.settings.compat == "paper":
            return self.settings.lr
        if epoch == 0:
            return 1e-5
        return cosine(self.settings.lr, epoch - 1, epochs)

    def optimizer(self, work: Work[H], groups: ParamsT) -> torch.optim.Optimizer:
        """Return what moves one head in one phase; groups are {"name": str, "params": [tensor]}.

        What the settings of `optimizer` say goes over `sgd_options`.
        """
        said = self.settings.optimizer
        if said.name == "amsgrad":
            return amsgrad(groups, work.head, said.beta1, said.beta2)
        options = self.sgd_options() | said.of_sgd()
        return torch.optim.SGD(groups, lr=self.settings.lr, **options)

    def sgd_options(self) -> dict[str, Any]:
        """Return momentum and weight decay: "paper": none. "released": those of that code."""
        released = self.settings.compat == "released"
        return {"momentum": 0.9, "weight_decay": 5e-4} if released else {}

    def upload(self, work: Work[H]) -> dict[str, Tensor]:
        """Return what goes up after training: shared parameters that came down, and `reports`."""
        return {n: t for n, t in self.shared(work.head).items() if n in work.received}

    def metrics(self, work: Work[H]) -> dict[str, float]:
        """Return numbers of a trained client for rounds.jsonl, by name."""
        return {}

    def adapt(self, work: Work[H]) -> None:
        """Adapt a head to its client before it is measured as personal, as by fine-tuning."""

    def is_personal(self, name: str) -> bool:
        """Tell whether a parameter never leaves its client."""
        return listed(name, self.personal)

    def shared(self, head: H) -> dict[str, Tensor]:
        """Return a CPU copy of every parameter that is not personal."""
        return {
            name: parameter.detach().cpu().clone()
            for name, parameter in head.named_parameters()
            if not self.is_personal(name)
        }

    # Of the server

    def start(self) -> ServerState:
        """Return the server's state before round 1 (P_g^0)."""
        return ServerState(self.shared(self.build()))

    def send(self, state: ServerState, client_ids: Sequence[int], *, train: bool) -> Deliveries:
        """Return what goes down to each client, to train on or to be measured."""
        return {client_id: dict(state.shared) for client_id in client_ids}

    def expected(self, state: ServerState, sent: Tensors) -> dict[str, Tensor]:
        """Return an example of each tensor that a client must upload which got `sent`."""
        shared = {name: tensor for name, tensor in state.shared.items() if name in sent}
        return shared | self.reports()

    def merge(self, state: ServerState, uploads: Mapping[int, Upload]) -> None:
        """Turn a round's uploads, in client order, into the next server state.

        Eq. 6: P_g^t = SUM p_i P_i^t with p_i = n_i / SUM n over the participants.
        """
        state.shared |= self.combine(state, uploads)

    def combine(self, state: ServerState, uploads: Mapping[int, Upload]) -> dict[str, Tensor]:
        """Return what is shared next: the mean by n_i, or the rule of setting server.rule."""
        return average(uploads, state.shared)


def listed(name: str, entries: Sequence[str]) -> bool:
    """Tell whether a parameter is one of the entries, or of a module that is."""
    return any(name == entry or name.startswith(f"{entry}.") for entry in entries)
