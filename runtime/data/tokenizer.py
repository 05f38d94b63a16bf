"""The tokenizer of a corpus: read from a Hugging Face ``tokenizer.json`` or trained on the inputs."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evermesh.runtime.data.corpus import token_dtype
from evermesh.runtime.data.documents import Document, Spans
from evermesh.runtime.data.errors import TokenizerInvalid

END = "<|end|>"
_END_TOKENS = (END, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
_BYTES = 256


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """Use the tokenizer in a Hugging Face ``tokenizer.json``."""

    path: Path
    end_token: str | None = None
    """Token that ends every document; None: the first known one that the tokenizer has."""


@dataclass(frozen=True, slots=True)
class TrainBpe:
    """Train a byte-level BPE on the inputs; its end token is ``<|end|>``."""

    vocabulary: int
    """Entries, at least 257: all bytes and the end token. Small inputs give fewer than asked."""

    def __post_init__(self) -> None:
        if self.vocabulary <= _BYTES:
            raise TokenizerInvalid(
                f"a byte-level BPE of {self.vocabulary} entries cannot hold {_BYTES} bytes and the end token. "
                f"Ask for at least {_BYTES + 1} entries."
            )


TokenizerSource = TokenizerFile | TrainBpe


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document as it is stored."""

    tokens: NDArray[Any]
    """Token ids and the end token, of the corpus' token type."""
    counts: NDArray[np.uint8] | None
    """For every stored token 1 when it counts in the loss as a target; None: all do."""


class Codec:
    """A tokenizer that maps text to ids and nothing else.

    Nothing is added, truncated or padded, and text that looks like a special token is encoded as the text it is.
    """

    def __init__(self, content: bytes, end_token: str | None = None) -> None:
        """Read ``content``, the bytes of a ``tokenizer.json``.

        Raises:
            TokenizerInvalid: it is not a tokenizer, or has no end token.
        """
        self.content = content
        self._tokenizer = _load(content)
        entries: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.end_token = _end_id(entries, end_token)
        self.vocabulary = max(entries.values()) + 1
        self.digest = _digest(content)
        self.dtype = token_dtype(self.vocabulary)

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """Every document as stored, in order; uses all cores."""
        texts = [document.text for document in documents]
        masked = any(document.spans is not None for document in documents)
        encode = self._tokenizer.encode_batch if masked else self._tokenizer.encode_batch_fast
        encodings = encode(texts, add_special_tokens=False)
        return [self._stored(document, encoding) for document, encoding in zip(documents, encodings, strict=True)]

    def _stored(self, document: Document, encoding: Any) -> Encoded:
        tokens = np.array([*encoding.ids, self.end_token], dtype=self.dtype)
        if document.spans is None:
            return Encoded(tokens, None)
        return Encoded(tokens, _counts(document.spans, encoding.offsets, len(document.text)))


def train_bpe(texts: Iterable[str], vocabulary: int) -> bytes:
    """The ``tokenizer.json`` of a byte-level BPE of at most ``vocabulary`` entries, trained on ``texts``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str().encode()


def _load(content: bytes) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception for anything it cannot read
        raise TokenizerInvalid(
            f"not a Hugging Face tokenizer.json: {error}. Give the file of a fast tokenizer."
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _end_id(entries: dict[str, int], wanted: str | None) -> int:
    for token in _END_TOKENS if wanted is None else (wanted,):
        if token in entries:
            return entries[token]
    asked = f"tokens {', '.join(_END_TOKENS)}" if wanted is None else f"token {wanted!r}"
    raise TokenizerInvalid(
        f"the tokenizer's {len(entries):,} entries hold no end {asked}. Name the token that ends its documents."
    )


def _digest(content: bytes) -> str:
    fields: dict[str, Any] = json.loads(content)
    identity = {key: value for key, value in fields.items() if key not in ("truncation", "padding")}
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()


def _counts(spans: Spans, offsets: Sequence[tuple[int, int]], num_characters: int) -> NDArray[np.uint8]:
    """1 for every token that overlaps a span, and for the end token when a span reaches the end of the text."""
    counted = np.zeros(num_characters + 1, dtype=np.int64)
    for start, end in spans:
        counted[start:end] = 1
    before = np.concatenate(([0], np.cumsum(counted)))
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    overlaps = before[np.maximum(ends, starts + 1)] > before[starts]
    ended = any(start < end == num_characters for start, end in spans)
    return np.append(overlaps, ended).astype(np.uint8)
