"""Groups chosen for images by learned keys, and what the server makes of keys (SGPT, 2310.18285).

    q = unit(ReLU(x))    apart_g = 1 - cos(q, key_g)
    in a test      the group that is the least apart
    in training    the smallest apart_g (share_g + 0.0005): groups that few images had are preferred

Shapes: B images, G groups, d embedding width, N clients.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RARE = 5e-4
"""What is added to a group's share, so that distances still count where it is 0."""


class Keys(nn.Module):
    """G keys (G, d), orthogonal at the start; `share` (G,) is what each group had of all images.

    together: in training all images of a batch get the group that most of them chose.
    """

    share: Tensor

    def __init__(
        self, count: int, width: int, generator: torch.Generator, *, together: bool = False
    ) -> None:
        super().__init__()
        self.together = together
        self.keys = nn.Parameter(torch.empty(count, width))
        nn.init.orthogonal_(self.keys, generator=generator)
        self.register_buffer("share", torch.ones(count))

    def apart(self, image_features: Tensor) -> Tensor:
        """Return 1 - cos (B, G) of image features (B, d), not normalised, and keys."""
        queries = F.normalize(F.relu(image_features), dim=-1)
        return 1 - queries @ F.normalize(self.keys, dim=-1).t()

    def nearest(self, image_features: Tensor) -> Tensor:
        """Return the groups (B,) of images in a test."""
        return self.apart(image_features).argmin(-1)

    def choose(self, image_features: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Return a training batch's groups (B,) and the loss of keys, -mean cos(q, key_g).

        Images that are not `counted` (B,) have no say in the loss, nor in what others choose.
        """
        apart = self.apart(image_features)
        groups = (apart * (self.share + RARE)).argmin(-1)
        if self.together:
            votes = members(groups, len(self.share)) * counted[:, None]
            groups = votes.sum(0).argmax().expand(len(groups))
        own = apart.take_along_dim(groups[:, None], dim=1).squeeze(1)
        return groups, ((own - 1) * counted).sum() / counted.sum().clamp_min(1)


def members(groups: Tensor, count: int) -> Tensor:
    """Return who is in which group (B, G), as 0 and 1."""
    return (groups[:, None] == torch.arange(count, device=groups.device)).float()


def average_keys(keys: Tensor, counts: Tensor, few: int) -> Tensor:
    """Return the mean (G, d) of clients' keys (N, G, d), weighted by their images in each group.

    counts (N, G). A group that all clients together chose `few` times or less: the plain mean.
    """
    total = counts.sum(0)
    weights = torch.where(total > few, counts / total.clamp_min(1), 1 / len(counts))
    return (weights[..., None].double() * keys).sum(0).to(keys.dtype)
