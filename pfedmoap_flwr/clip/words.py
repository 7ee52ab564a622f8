"""A model's words: from text to token ids, from ids to embeddings, and from either to features.

Shapes: N texts, L the text tower's full length (77 for CLIP), D text width, d embedding width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfedmoap_flwr.clip.twin import twin

Tokenizer = Callable[..., Tensor]
"""`open_clip.get_tokenizer`'s: (texts, context_length=L) -> ids (len(texts), L)."""


class Words:
    """A model's text tower and tokenizer: words to ids, ids to embeddings, either to features.

    Raises:
        ValueError: a text tower without a table of token embeddings.

    Attributes:
        length: L. head, tail: ids around every text (SOS, EOT). pad: the id that fills up a row.
        filler: the id of some word, to stand where a context goes.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        self.model = model
        self.text: Any = getattr(model, "text", model)
        self.tower = type(self.text).__name__
        self.tokenizer = tokenizer
        embedding = _token_embedding(self.text)
        if embedding is None:
            raise ValueError(
                f"prompts cannot be learned for the text tower {self.tower}: it has no table of "
                "token embeddings where open_clip's towers have it"
            )
        self.embedding = embedding
        self.length: int = min(self.text.context_length, tokenizer(["x"]).shape[1])
        # What a tokenizer puts around every text (SOS, EOT, padding) shows in two short ones.
        x, y = self._tokens(["x", "y"])
        self.pad = x[-1]
        x, y = _strip(x, self.pad), _strip(y, self.pad)
        self.head = x[:1] if x[:1] == y[:1] else []
        self.tail = x[-1:] if x[-1:] == y[-1:] else []
        self.filler = x[len(self.head)]

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        return self.embedding.weight.device

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        # A tokenizer silently cuts what is longer than context_length, so ask for plenty.
        rows: list[list[int]] = self.tokenizer(list(texts), context_length=8 * self.length).tolist()
        return rows

    def content(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text itself: no SOS, no EOT, no padding, nothing cut."""
        rows = [_strip(row, self.pad) for row in self._tokens(texts)]
        return [row[len(self.head) : len(row) - len(self.tail)] for row in rows]

    def check_fits(self, what: str, n_tokens: int, advice: str) -> None:
        """Raise ValueError where so many tokens do not fit into the tower's length."""
        room = self.length - (not self.tail)  # where padding is EOT, one of it must fit as well
        if n_tokens > room:
            raise ValueError(
                f"{what} takes {n_tokens} tokens and the text tower reads {room}: "
                f"{n_tokens - room} too many; {advice}"
            )

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings (*, D) of ids (*), frozen."""
        embeddings: Tensor = self.embedding(ids.to(self.device))
        return embeddings.detach()

    def encode(self, ids: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Features (N, d) of ids (N, L), or of embeddings (N, L, D) that take their place.

        By the model's own `encode_text`, which needs the ids for its masks and pooling.
        """
        model: Any = self.model
        if embeddings is not None:
            path = next(name for name, m in model.named_modules() if m is self.embedding)
            model = twin(model, path, _Given(self.embedding, embeddings))
        features: Tensor = model.encode_text(ids.to(self.device))
        return features


def embed_words(model: nn.Module, tokenizer: Tokenizer, words: str) -> Tensor:
    """Token embeddings (n, D) of plain words, without SOS and EOT; underscores are spaces.

    For CoOp's `ctx_init`, where n, the number of tokens, becomes n_ctx.
    """
    lookup = Words(model, tokenizer)
    (content,) = lookup.content([words.replace("_", " ")])
    return lookup.embed(torch.tensor(content, dtype=torch.long))


@torch.no_grad()
def nearest_words(
    model: nn.Module, tokenizer: Any, vectors: Tensor, count: int
) -> list[list[tuple[str, float]]]:
    """Return for each vector (n, D) the words whose embeddings are nearest, and how far they are.

    By Euclidean distance over the whole vocabulary, as CoOp reads its contexts (Zhou et al., IJCV
    2022, arXiv 2109.01134, Table 4). A word is a token; one that goes on in another begins with it.
    """
    table = Words(model, tokenizer).embedding.weight.detach()
    # Not by matrix products, whose rounding would show where a vector is a word itself
    apart = torch.stack([(table - vector.to(table)).norm(dim=-1) for vector in vectors])
    near = apart.topk(min(count, len(table)), largest=False)
    decode = getattr(tokenizer, "decode", None) or tokenizer.tokenizer.decode
    return [
        [(decode([i]).strip(), d) for i, d in zip(ids, distances, strict=True)]
        for ids, distances in zip(near.indices.tolist(), near.values.tolist(), strict=True)
    ]


@torch.no_grad()
def encode_text(model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """L2-normalised features (len(texts), d) of plain sentences, by the model's own `encode_text`.

    Raises:
        ValueError: a sentence that does not fit, which the tokenizer would silently cut.
    """
    words = Words(model, tokenizer)
    for text, content in zip(texts, words.content(texts), strict=True):
        n_tokens = len(words.head) + len(content) + len(words.tail)
        words.check_fits(f'the text "{text}"', n_tokens, "shorten it")
    ids = tokenizer(list(texts), context_length=words.length)
    features = [words.encode(ids[i : i + 256]) for i in range(0, len(ids), 256)]
    return F.normalize(torch.cat(features), dim=-1)


def _strip(row: list[int], pad: int) -> list[int]:
    end = len(row)
    while end and row[end - 1] == pad:
        end -= 1
    return row[:end]


def _token_embedding(text: Any) -> nn.Embedding | None:
    """The table of token embeddings: open_clip's by name, a Hugging Face tower's by asking it."""
    found = getattr(text, "token_embedding", None)
    if found is None and hasattr(getattr(text, "transformer", None), "get_input_embeddings"):
        found = text.transformer.get_input_embeddings()
    return found if isinstance(found, nn.Embedding) else None


class _Given(nn.Module):
    """Takes the place of a tower's token embedding: returns given embeddings, whatever the ids."""

    def __init__(self, table: nn.Embedding, embeddings: Tensor) -> None:
        super().__init__()
        self.weight = table.weight  # some towers read its dtype or device
        self.embeddings = embeddings

    def forward(self, ids: Tensor) -> Tensor:
        return self.embeddings
