"""PromptFL + FT (Cheng et al., 2021, arXiv 2108.07313): P_g, fine-tuned before it is measured."""

import torch

from pfedmoap_flwr.methods.base import Method, PromptHead, Work
from pfedmoap_flwr.settings import Section, setting


class PromptFLFTSettings(Section):
    """Settings of fine-tuning."""

    epochs: int = setting(5, "of fine-tuning on a client's own images; 0: P_g itself", low=0)


class PromptFLFT(Method[PromptFLFTSettings]):
    """Trains as PromptFL; a client's personal model is P_g after some epochs on its own images."""

    section = PromptFLFTSettings

    def adapt(self, work: Work[PromptHead]) -> None:
        """Fine-tune P_g as in local training, the batches in the order of this client and round.

        The optimizer is a fresh one, and nothing but the head that is measured changes.
        """
        head, images, size = work.head, work.images, self.settings.batch_size
        head.load(work.received)
        optimizer = self.optimizer(work, [{"name": "ctx", "params": [head.ctx]}])
        generator = self.generator("batches", work.client_id, work.round)
        for epoch in range(self.own.epochs):
            optimizer.param_groups[0]["lr"] = self.lr("ctx", epoch, self.own.epochs)
            order = torch.randperm(len(images), generator=generator).to(images.labels.device)
            for start in range(0, len(images), size):
                rows = order[start : start + size]
                features, labels = images.features[rows], images.labels[rows]
                optimizer.zero_grad()
                self.loss(head, features, labels, work.received).backward()
                optimizer.step()
