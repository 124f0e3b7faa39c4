"""Text to token ids and back: bytes, or a Hugging Face `tokenizer.json`.

Every tokenizer has one id that ends a document. No text ever encodes to that id, so a document ends
where the token says so and nowhere else.
"""

import hashlib
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer, UInt

from ssm_moe.data import DataError

END_OF_TEXT_NAMES = ('<|endoftext|>', '</s>', '<|end_of_text|>')


@runtime_checkable  # for the checks of types in tests
class Tokenizer(Protocol):
  """What the rest of the room asks of a tokenizer.

  Attributes:
    name: What the user called it.
    sha256: Tells two tokenizers apart; ids of one mean nothing to the other.
    vocab_size: One more than the largest id.
    end_of_text: The id that ends a document.
    serialized: The contents of its file, to be kept beside the tokens; None if it has no file.
  """

  name: str
  sha256: str
  vocab_size: int
  end_of_text: int
  serialized: bytes | None

  def encode(self, text: str) -> UInt[np.ndarray, 'L']:
    """Returns the ids of `text`, without end-of-text."""

  def encode_batch(self, texts: Sequence[str]) -> list[UInt[np.ndarray, '_']]:
    """Returns the ids of each text, faster than one by one."""

  def decode(self, tokens: Iterable[int | np.integer]) -> str:
    """Returns the text of the ids; never fails, since a model can sample any id."""

  def num_bytes(self, tokens: Integer[np.ndarray, '_']) -> int:
    """Returns how many UTF-8 bytes of a text the ids stand for; end-of-text stands for none."""


class ByteTokenizer:
  """The 256 byte values of UTF-8, and end-of-text."""

  name = 'bytes'
  sha256 = hashlib.sha256(b'256 byte values, end-of-text 256').hexdigest()
  vocab_size = 257
  end_of_text = 256
  serialized = None

  def encode(self, text: str) -> UInt[np.ndarray, 'L']:
    return np.frombuffer(text.encode('utf-8'), np.uint8)

  def encode_batch(self, texts: Sequence[str]) -> list[UInt[np.ndarray, '_']]:
    return [self.encode(text) for text in texts]

  def decode(self, tokens: Iterable[int | np.integer]) -> str:
    """Returns text; a broken UTF-8 sequence becomes U+FFFD, end-of-text its name.

    Ids above end-of-text, which a model with a padded vocabulary can sample, are left out.
    """
    documents = [bytearray()]
    for token in tokens:
      if token == self.end_of_text:
        documents.append(bytearray())
      elif token < self.end_of_text:
        documents[-1].append(token)
    return END_OF_TEXT_NAMES[0].join(text.decode('utf-8', errors='replace') for text in documents)

  def num_bytes(self, tokens: Integer[np.ndarray, '_']) -> int:
    return int(np.sum(tokens < self.end_of_text))


class HuggingFaceTokenizer:
  """A `tokenizer.json`, run by the `tokenizers` library (extra `[hf]`).

  Truncation, padding and the special tokens that a tokenizer puts around a text are turned off: a
  document is all of its text and nothing else. A special token's name in a text is text.
  """

  def __init__(self, path: str | os.PathLike):
    """Reads `path`.

    Raises:
      DataError: the library or the file is missing, the file is not a tokenizer, or it has none of
        the known names of end-of-text.
    """
    try:
      import tokenizers
    except ImportError:
      raise DataError(
        f"tokenizer {path} needs the package tokenizers: pip install 'ssm_moe[hf]'"
      ) from None
    self.name = str(path)
    try:
      self.serialized = pathlib.Path(path).read_bytes()
    except OSError as error:
      raise DataError(
        f"tokenizer {path} cannot be read ({error.strerror}); it is 'bytes' or the path of a "
        'Hugging Face tokenizer.json'
      ) from None
    self.sha256 = hashlib.sha256(self.serialized).hexdigest()
    try:
      self._tokenizer = tokenizers.Tokenizer.from_buffer(self.serialized)
    except Exception as error:  # the library raises bare Exception
      reason = ' '.join(str(error).split())
      raise DataError(f'tokenizer {path} is not a Hugging Face tokenizer.json ({reason})') from None
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = True
    # The library's own count is of entries, and ids may have gaps.
    self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
    ids = [self._tokenizer.token_to_id(name) for name in END_OF_TEXT_NAMES]
    self.end_of_text = next((token for token in ids if token is not None), None)
    if self.end_of_text is None:
      names = ', '.join(END_OF_TEXT_NAMES)
      raise DataError(f'tokenizer {path} has no end-of-text token; it must have one of {names}')

  def encode(self, text: str) -> UInt[np.ndarray, 'L']:
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[UInt[np.ndarray, '_']]:
    encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

  def decode(self, tokens: Iterable[int | np.integer]) -> str:
    known = [int(token) for token in tokens if 0 <= token < self.vocab_size]
    return self._tokenizer.decode(known, skip_special_tokens=False)

  def num_bytes(self, tokens: Integer[np.ndarray, '_']) -> int:
    return len(self.decode(tokens[tokens != self.end_of_text]).encode())


def load_tokenizer(name: str) -> Tokenizer:
  """Returns the tokenizer that `name` means: 'bytes', or the path of a `tokenizer.json`.

  Raises:
    DataError: it cannot be loaded.
  """
  return ByteTokenizer() if name == ByteTokenizer.name else HuggingFaceTokenizer(name)
