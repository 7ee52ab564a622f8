"""FedLALR (arXiv 2309.09719): local AMSGrad; the prompt, m and v-hat travel and are averaged.

The step is that of `parts/amsgrad.py`. PromptFL with optimizer.name=amsgrad is the same but for the
weights of the mean: here they are equal.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pfedmoap_flwr.methods.base import PromptHead, ServerState, Upload, Work
from pfedmoap_flwr.methods.parts.amsgrad import amsgrad
from pfedmoap_flwr.methods.parts.averaged_moments import AveragedMoments
from pfedmoap_flwr.methods.parts.mean import average
from pfedmoap_flwr.settings import Section


class FedLALR(AveragedMoments[Section, PromptHead]):
    """PromptFL with another optimizer, whose moments are averaged like the prompt."""

    def optimizer(self, work: Work[PromptHead], groups: ParamsT) -> torch.optim.Optimizer:
        """Return AMSGrad, whatever optimizer.name says."""
        said = self.settings.optimizer
        return amsgrad(groups, work.head, said.beta1, said.beta2)

    def combine(self, state: ServerState, uploads: Mapping[int, Upload]) -> dict[str, Tensor]:
        """Return the plain mean over the participants, whatever their number of images."""
        return average(uploads, state.shared, weights=dict.fromkeys(uploads, 1.0))
