"""What can be set of the images and of who holds them."""

from pfedmoap_flwr.data.partitioners import CUTS
from pfedmoap_flwr.settings import Section, setting


class ImageSettings(Section):
    """Which images."""

    name: str = setting("emoji-domains", "data set, or 'folder' for your own images")
    path: str = setting("", "its local copy, or your folder, CSV or saved data set; empty: the hub")
    classnames: str = setting("", "your images' class list: a text file, or names between commas")
    strict: bool = setting(False, "end at a broken image instead of skipping it")
    validation: float = setting(
        0.1, "share of train held out where no validation images are published", low=0, high=0.9
    )


class DataSettings(ImageSettings):
    """The images and who holds them."""

    template: str = setting(
        "", "zero-shot sentence with {} for the class; empty: the data set's own"
    )
    partition: str = setting("dirichlet-domain", "how images go to clients", choices=tuple(CUTS))
    num_clients: int = setting(20, "clients N", low=1)
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
