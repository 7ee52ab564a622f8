"""pfedmoap doctor: what this machine has, and whether a run with these settings can start here."""

import os
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import open_clip
import psutil
import torch
from rich.console import Console

from pfedmoap_flwr import config, files, methods
from pfedmoap_flwr.assets import asset
from pfedmoap_flwr.cache import ENVIRONMENT_VARIABLE, cache_folder
from pfedmoap_flwr.cli.data import is_here
from pfedmoap_flwr.cli.say import say
from pfedmoap_flwr.clip.features import Reading, feature_files, read_shape
from pfedmoap_flwr.clip.load import FrozenClip, load_clip, resolve_device
from pfedmoap_flwr.clip.weights import find_weights, held_checkpoint
from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.data.catalogue import CATALOGUE, find_source
from pfedmoap_flwr.data.federated import Federated, federated
from pfedmoap_flwr.data.images import ImageData
from pfedmoap_flwr.data.sources.hub import offline
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Method, Split, Work
from pfedmoap_flwr.report.tables import megabytes
from pfedmoap_flwr.settings import Value
from pfedmoap_flwr.training.capacity import clients_that_fit, cores
from pfedmoap_flwr.training.rehearsal import made_up, rehearse
from pfedmoap_flwr.training.whole_prompt import check_whole_prompt

PACKAGES = (
    *("pfedmoap-flwr", "flwr", "ray", "torch", "torchvision", "open_clip_torch", "datasets"),
    *("huggingface_hub", "numpy", "matplotlib"),
)


def examine(values: Mapping[str, Value], console: Console) -> None:
    """Say what this machine has, and whether a run with these settings can start without network.

    The hub is not asked. Raises UsageError with what such a run lacks.
    """
    settings = config.parse(values)
    _say(console, "python", f"{platform.python_version()} on {platform.platform()}")
    _say(console, "packages", ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    _say(console, "cuda", _cuda())
    memory = psutil.virtual_memory()
    _say(console, "cpu", f"{cores()} cores for this process, {platform.machine()}")
    _say(
        console,
        "memory",
        f"{megabytes(memory.total)}, {megabytes(memory.available)} of it available",
    )
    room = shutil.disk_usage(files.nearest(cache_folder())).free
    _say(console, "cache", f"{cache_folder()}, {megabytes(room)} free ({ENVIRONMENT_VARIABLE})")
    _say(console, "data here", ", ".join(s.name for s in CATALOGUE.values() if is_here(s)))
    _say(console, "weights here", f"for {settings.clip.model}: {_weights_here(settings)}")
    hub = "HF_HUB_OFFLINE=1: a run asks it for nothing"
    unset = "not asked now; a run may ask it unless HF_HUB_OFFLINE=1"
    _say(console, "hub", hub if os.environ.get("HF_HUB_OFFLINE", "0") != "0" else unset)
    with offline():
        _check(settings, room, console)
    _say(console, "verdict", "a run with these settings can start, without network")


def _check(settings: Settings, room: int, console: Console) -> None:
    """Do what a run begins with. Raises UsageError that says what is missing."""
    resolve_device(settings.device)
    held = _federated(settings)
    sizes = [len(client.rows["train"]) for client in held.clients.values()]
    about = f"{held.images.name}, {min(sizes)} to {max(sizes)} training images a client"
    _say(console, "data", about)
    clip = _clip(settings)
    _say(console, "weights", f"{clip.checkpoint} on {clip.device.type}")
    reading = methods.load(settings.method).reads(settings.own)
    _say(console, "features", _features(settings, reading, clip, held.images, room))
    if not os.access(files.nearest(cache_folder()), os.W_OK):
        raise UsageError(
            f"{cache_folder()} cannot be written; set {ENVIRONMENT_VARIABLE} to another folder"
        )
    method, work = rehearsal(settings, clip, held)
    at_once = settings.clients_at_once or clients_that_fit(method, work)
    chosen = "clients-at-once" if settings.clients_at_once else "what memory and cores allow"
    _say(console, "at once", f"{at_once} of {len(sizes)} clients train in process ({chosen})")


def rehearsal(
    settings: Settings, clip: FrozenClip, held: Federated
) -> tuple[Method[Any, Any], Work[Any]]:
    """Return the method, and its first client's work in round 2, when it gets all it can get.

    Raises UsageError with the reason where a run's first rounds would fail.
    """
    reading = methods.load(settings.method).reads(settings.own)
    first = min(held.clients)
    sizes = {split: len(rows) for split, rows in held.clients[first].rows.items()}

    def images(split: str) -> Split:
        shape = read_shape(clip, reading.of(split))
        return made_up(method, min(sizes[split], settings.batch_size), shape)

    try:
        # The evaluation before round 1 measures this as well
        clip.zeroshot(held.task.classnames, held.task.template)
        method = methods.make(settings.method, settings, settings.own, clip, held.task)
        check_whole_prompt(method)
        return method, rehearse(method, sorted(held.clients), images)
    except UsageError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"method {settings.method} cannot run with these settings: "
            f"{type(error).__name__}: {reason}"
        ) from error


def _federated(settings: Settings) -> Federated:
    source = find_source(settings.data.name)
    if source.hub and not settings.data.path and not is_here(source):
        raise UsageError(
            f"the images of {source.name} are not on this machine; get them with "
            f"pfedmoap data prepare data.name={source.name}, or set data.path to a local copy"
        )
    return federated(settings.data, settings.seed)


def _clip(settings: Settings) -> FrozenClip:
    model, pretrained = settings.clip.model, settings.clip.pretrained
    if held_checkpoint(model, find_weights(model, pretrained)) is None:
        raise UsageError(
            f"weights '{pretrained}' for {model} are not on this machine; get them with "
            f"pfedmoap data prepare clip.model={model} clip.pretrained={pretrained}, or give a "
            "local checkpoint with clip.pretrained=/path/to/file"
        )
    return load_clip(settings.clip, settings.device)


def _features(
    settings: Settings, reading: Reading, clip: FrozenClip, images: ImageData, room: int
) -> str:
    """Say what is computed already. Raises UsageError where the rest has no room."""
    dtype = settings.clip.features_dtype
    files = feature_files(clip, images.splits, reading, dtype, images.window)
    missing = [split for split, file in files.items() if not file.exists()]
    if not missing:
        return "computed already"
    numbers = {s: torch.Size(read_shape(clip, reading.of(s))).numel() for s in missing}
    needed = sum(len(images.splits[s]) * numbers[s] for s in missing)
    needed *= getattr(torch, dtype).itemsize
    if needed > room:
        raise UsageError(
            f"image features take {megabytes(needed)} and {cache_folder()} has {megabytes(room)}; "
            f"make room there, or set {ENVIRONMENT_VARIABLE} to another folder"
        )
    return f"{megabytes(needed)} to compute first ({', '.join(missing)})"


def _cuda() -> str:
    """Name the CUDA devices, or why there is none."""
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return ", ".join(f"{device.name} with {megabytes(device.total_memory)}" for device in found)
    if torch.version.cuda is None:
        return "no: this torch was built without it"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"no: {str(error).splitlines()[0]}"
    return "no device"


def _weights_here(settings: Settings) -> str:
    """Name the weights of the chosen model that a run can load without network."""
    model = settings.clip.model
    open_clip.add_model_config(asset("clip"))
    found = []
    if (asset("clip") / f"{model}.safetensors").is_file():
        found.append(f"{model} (bundled)")
    if Path(settings.clip.pretrained).is_file():
        found.append(settings.clip.pretrained)
    tags = open_clip.list_pretrained_tags_by_model(model)
    found += [f"{tag} (cached)" for tag in tags if held_checkpoint(model, tag)]
    return ", ".join(found) or "none"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _say(console: Console, what: str, line: str) -> None:
    say(console, f"{what:13} {line}")
