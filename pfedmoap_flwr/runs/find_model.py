"""Where a client's personal model is: in a file, in a node's state folder, or to be put together.

A run's folder has the server's state and, where the clients were on this machine, their heads.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pfedmoap_flwr import methods
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Method, Split
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.runs.folder import RunFolder, load_settings
from pfedmoap_flwr.runs.heads import MODEL, RUN_ID, KeptHeads, folder_of, state_folder
from pfedmoap_flwr.runs.model import Model
from pfedmoap_flwr.training.exchange import personal_work
from pfedmoap_flwr.training.node import node_of


def find_model(
    place: Path,
    client: int | None = None,
    weights: str = "",
    device: str = "auto",
    *,
    best: bool = False,
) -> Model:
    """Return a client's personal model, as it was last measured.

    place: a file of a model, a run's folder, or a node's state folder. client: may be left out
    where there is one alone. weights: CLIP's checkpoint, where a file's is elsewhere. best: of a
    run, as it was measured in the best validated round.

    Raises UsageError where there is no such model, and says where to look.
    """
    place = place.expanduser()
    if (place / "settings.json").is_file():
        return RunModels(place, best=best).of(_asked(client, place))
    if best:
        raise UsageError(f"{place}: --best is for a run's folder, with its settings.json")
    if place.is_dir():
        return Model.open(_on_node(place, client), weights, device)
    model = Model.open(place, weights, device)
    if client is not None and client != model.meaning.client:
        raise UsageError(f"{place}: is of client {model.meaning.client}, not {client}")
    return model


class RunModels:
    """The personal models of a run whose clients were on this machine, as its last round has them.

    best: as its best validated round has them, which eval.keep-best kept.

    Raises UsageError where the folder holds no run that has come to a checkpoint.
    """

    def __init__(self, folder: Path, *, best: bool = False) -> None:
        self.folder = folder.expanduser().resolve()
        self.settings = settings = load_settings(self.folder)
        run = RunFolder(self.folder)
        rounds = run.rounds()
        if best and not run.best.is_dir():
            raise UsageError(
                f"{self.folder}: has no best/; a run with eval.keep-best=true keeps its best round"
            )
        self.state = checkpoint.load(run.best if best else run.path, [r.round for r in rounds])
        self.rounds = [record for record in rounds if record.round <= self.state.round]
        reading = methods.load(settings.method).reads(settings.own)
        self.node = node_of(settings.clip, settings.data, settings.seed, settings.device, reading)
        task = self.node.federated.task
        self.method: Method[Any, Any] = methods.make(
            settings.method, settings, settings.own, self.node.clip, task
        )

    @property
    def clients(self) -> list[int]:
        """The ids of all clients."""
        return sorted(self.node.federated.clients)

    def of(self, client: int) -> Model:
        """Put together what was measured: the kept head, what was sent, adapted."""
        place = folder_of(self._state, self._run_id, client)
        kept = KeptHeads(place, self.method.build()).load(before=self.state.round + 1)
        trained = max((r.round for r in self.rounds if client in r.bytes_up), default=0)
        if kept is None and trained:
            raise UsageError(
                f"{self.folder}: client {client} trained in round {trained} and its head is not "
                f"in {place}; heads stay on the clients' machines: give that one's state folder "
                "instead"
            )
        sent, split = self._sent[client], self.split(client)
        work = personal_work(self.method, client, self.state.round, split, sent, kept)
        owners = next((r.lent[client] for r in self.rounds[::-1] if client in r.lent), None)
        return Model.of_work(self.method, work, owners)

    @functools.cached_property
    def _sent(self) -> Mapping[int, Mapping[str, Tensor]]:
        return self.method.send(self.state, self.clients, train=False)

    @functools.cached_property
    def _run_id(self) -> str:
        return RunFolder(self.folder).run_id

    @functools.cached_property
    def _state(self) -> Path:
        """Where the clients' heads of the run are, if they are on this machine."""
        # A folder that was moved or copied has its heads in it
        states = [state_folder(self.settings.state_dir), self.folder / "clients"]
        return next((state for state in states if (state / self._run_id).is_dir()), states[0])

    def split(self, client: int) -> Callable[[str], Split]:
        """Return what gives a client's images by the name of a split."""
        return functools.partial(self.node.split, client)


def _asked(client: int | None, place: Path) -> int:
    clients = load_settings(place).data.num_clients
    if client is None or not 0 <= client < clients:
        said = "" if client is None else f" {client}: there is none;"
        raise UsageError(f"{place}: --client{said} say whose model, from 0 to {clients - 1}")
    return client


def _on_node(place: Path, client: int | None) -> Path:
    """Return the newest model of a client in a state folder, or in a run's folder of it."""
    names = (MODEL, f"client-*/{MODEL}", f"*/client-*/{MODEL}")
    found = [path for name in names for path in place.glob(name)]
    found = [path for path in found if RUN_ID.fullmatch(path.parent.parent.name)]
    clients = sorted({int(path.parent.name.removeprefix("client-")) for path in found})
    if not found:
        raise UsageError(
            f"{place}: is neither a run's folder nor the state folder of a node that was measured; "
            f"there is no settings.json and no RUN-ID/client-N/{MODEL}"
        )
    if client is None and len(clients) > 1:
        raise UsageError(f"{place}: has models of clients {clients}; choose one with --client")
    wanted = clients[0] if client is None else client
    own = [path for path in found if path.parent.name == f"client-{wanted}"]
    if not own:
        raise UsageError(f"{place}: has no model of client {client}, but of {clients}")
    return max(own, key=lambda path: path.stat().st_mtime)
