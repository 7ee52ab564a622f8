"""What can be set of the images and of who holds them."""

import re

from pydantic import ValidationInfo, field_validator

from pfedmoap_flwr.data.partitioners import CUTS
from pfedmoap_flwr.data.pixels import read_window
from pfedmoap_flwr.settings import FilePath, Section, setting


class ImageSettings(Section):
    """Which images."""

    name: str = setting("emoji-domains", "data set, hub:ORG/NAME, or 'folder' for your own images")
    path: FilePath = setting(
        "", "its local copy, or your folder, CSV or saved data set; empty: the hub"
    )
    classnames: FilePath = setting(
        "", "your images' class list: a text file, or names between commas"
    )
    image_column: str = setting("", "of hub:ORG/NAME; empty: the only one with images")
    label_column: str = setting("", "of hub:ORG/NAME; empty: the only one with class labels")
    strict: bool = setting(False, "end at a broken image instead of skipping it")
    validation: float = setting(
        0.1, "share of train held out where no validation images are published", low=0, high=0.9
    )
    window: str = setting(
        "", "of pixels above 8 bits, black:white as -160:240; empty: the file's own, or its range"
    )
    group_column: str = setting(
        "", "column whose values, as patients, are never divided between splits or clients"
    )
    group_pattern: str = setting(
        "", "the same for a folder: a regular expression that finds a group in an image's path"
    )

    @field_validator("window")
    @classmethod
    def _a_window(cls, text: str) -> str:
        read_window(text)
        return text

    @field_validator("group_pattern")
    @classmethod
    def _a_pattern(cls, text: str) -> str:
        try:
            re.compile(text)
        except re.error as error:
            raise ValueError(f"is no regular expression ({error})") from error
        return text


class DataSettings(ImageSettings):
    """The images and who holds them."""

    template: str = setting(
        "", "zero-shot sentence with {} for the class; empty: the data set's own"
    )
    partition: str = setting("dirichlet-domain", "how images go to clients", choices=tuple(CUTS))
    base_classes: float = setting(
        1.0,
        "share of the classes, the first ones, that are trained; the rest is new",
        above=0,
        high=1,
    )
    left_out_domain: str = setting("", "a domain that nobody holds or trains; measured as unseen")
    num_clients: int = setting(20, "clients N", low=1)
    new_clients: int = setting(
        0, "of them the last ones, who never train and are measured when training is over", low=0
    )
    min_examples: int = setting(10, "training images that every client has at least", low=1)
    shots: int = setting(0, "training images per class and client; 0: all", low=0)
    alpha: float = setting(
        0.3,
        "Dirichlet concentration (dirichlet*, pachinko's coarse classes); small is skewed",
        above=0,
    )
    fine_alpha: float = setting(
        10.0, "pachinko: concentration over the fine classes of a coarse one", above=0
    )
    coarse_column: str = setting("coarse_label", "pachinko: column with the coarse class")
    shards_per_client: int = setting(2, "shards: how many a client is dealt", low=1)
    id_column: str = setting("domain", "natural: column whose values are the clients")

    @field_validator("new_clients")
    @classmethod
    def _somebody_trains(cls, count: int, info: ValidationInfo) -> int:
        if count >= info.data.get("num_clients", count + 1):
            raise ValueError("must be less than data.num-clients, for somebody has to train")
        return count

    def trains(self, client_id: int) -> bool:
        """Tell whether a client may take part in training."""
        return client_id < self.num_clients - self.new_clients

    @field_validator("template")
    @classmethod
    def _one_place_for_the_class(cls, text: str) -> str:
        if text and (text.count("{}") != 1 or text.count("{") + text.count("}") != 2):
            raise ValueError("must hold {} once, for the class, and no other brace")
        return text
