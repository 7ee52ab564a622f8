"""A module with one part exchanged, while the module itself stays as it is."""

import copy

from torch import nn


def twin(module: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """Return a twin of `module` that shares everything with it but the submodule at `path`.

    Others can use the module at the same time; a forward hook would change it for them too.
    """
    name, _, rest = path.partition(".")
    other = copy.copy(module)
    other._modules = dict(module._modules)
    other._modules[name] = twin(module.get_submodule(name), rest, new) if rest else new
    return other
