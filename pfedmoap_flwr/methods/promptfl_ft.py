"""PromptFL + FT (Cheng et al., 2021, arXiv 2108.07313): P_g, fine-tuned before it is measured."""

from pfedmoap_flwr.methods.base import Method, PromptHead, Work
from pfedmoap_flwr.methods.parts.fine_tuning import fine_tune
from pfedmoap_flwr.settings import Section, setting


class PromptFLFTSettings(Section):
    """Settings of fine-tuning."""

    epochs: int = setting(5, "of fine-tuning on a client's own images; 0: P_g itself", low=0)


class PromptFLFT(Method[PromptFLFTSettings]):
    """Trains as PromptFL; a client's personal model is P_g after some epochs on its own images."""

    section = PromptFLFTSettings

    def adapt(self, work: Work[PromptHead]) -> None:
        """Fine-tune P_g as in local training; nothing but the head that is measured changes."""
        head, came = work.head, work.received
        head.load(came)
        fine_tune(
            self, work, head.prompt, self.own.epochs, lambda x, y: self.loss(head, x, y, came)
        )
