"""A folder of tokens: text that was tokenised once, to be read through a memory map.

  tokens.bin             the stream: every document's tokens and end-of-text, one after the other;
                         uint16 if the vocabulary allows, else uint32, little endian
  document_offsets.npy   int64 [documents + 1], where each document begins in the stream
  document_bytes.npy     int64 [documents], the UTF-8 bytes of each document's text
  metadata.json          schema, tokenizer, vocabulary, counts, where the text came from
  tokenizer.json         the tokenizer, if it has a file

A folder appears whole or not at all. Writing holds one batch of documents and 16 bytes a document
in memory, whatever the size of the text.
"""

import array
import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from ssm_moe.data import DataError
from ssm_moe.data.tokenizer import Tokenizer
from ssm_moe.new_folder import new_folder

SCHEMA = 1
_BATCH_CHARACTERS = 1 << 20  # of the documents that are tokenised together
_BATCH_DOCUMENTS = 1024
_CHECKED_TOKENS = 1 << 24  # at a time, when a folder is opened
_COUNTS = ('vocab_size', 'end_of_text', 'num_tokens', 'num_documents', 'num_bytes')


@dataclasses.dataclass(frozen=True)
class TokenFolder:
  """An open folder of tokens.

  Attributes:
    name: The folder, for messages.
    source: Where the text came from.
    vocab_size: One more than the largest id there may be.
    end_of_text: The id that ends each document.
    tokenizer_name: What made the tokens.
    tokenizer_sha256: Tells two tokenizers apart.
    tokens: The stream; a memory map.
    document_offsets: Where each document begins in the stream, and the stream's length.
    document_bytes: UTF-8 bytes of each document's text; end-of-text counts none.
  """

  name: str
  source: str
  vocab_size: int
  end_of_text: int
  tokenizer_name: str
  tokenizer_sha256: str
  tokens: UInt[np.ndarray, 'T']
  document_offsets: Int[np.ndarray, 'documents_and_one']
  document_bytes: Int[np.ndarray, 'documents']

  @property
  def num_tokens(self) -> int:
    """Length of the stream, end-of-text included."""
    return len(self.tokens)

  @property
  def num_documents(self) -> int:
    return len(self.document_bytes)

  @property
  def num_bytes(self) -> int:
    return int(self.document_bytes.sum())


def is_token_folder(path: str | os.PathLike) -> bool:
  """Says whether `path` is meant as a folder of tokens, even a damaged one."""
  return any((pathlib.Path(path) / name).is_file() for name in ('metadata.json', 'tokens.bin'))


def token_dtype(vocab_size: int) -> np.dtype:
  """Returns the smallest type that holds every id."""
  return np.dtype('<u2' if vocab_size <= 1 << 16 else '<u4')


def write_token_folder(
  path: str | os.PathLike,
  documents: Iterable[str],
  tokenizer: Tokenizer,
  *,
  source: str,
  progress: Callable[[int], None] = lambda num_bytes: None,
) -> TokenFolder:
  """Tokenises `documents` into the folder `path`, and opens it.

  Args:
    path: A folder that does not exist yet; the folders above it are made.
    documents: Texts; they may be empty.
    tokenizer: Makes the ids.
    source: Where the text comes from, for the metadata.
    progress: Is told the UTF-8 bytes of each batch of documents.

  Raises:
    FolderExistsError: `path` exists; nothing in it is touched.
    UserError: there are no documents, one of them cannot be read, or `path` cannot be made.
    OSError: the system refuses to write, as on a full disk; `filename` is `path`.
  """
  with new_folder(path) as partial:
    _write_files(partial, documents, tokenizer, source, progress)
  return open_token_folder(path)


def _write_files(
  folder: pathlib.Path,
  documents: Iterable[str],
  tokenizer: Tokenizer,
  source: str,
  progress: Callable[[int], None],
) -> None:
  dtype = token_dtype(tokenizer.vocab_size)
  offsets, sizes = array.array('q', [0]), array.array('q')
  with open(folder / 'tokens.bin', 'wb') as file:
    for texts in _batches(documents):
      batch_sizes = [len(text.encode('utf-8')) for text in texts]
      for ids in tokenizer.encode_batch(texts):
        file.write(np.append(ids, np.uint32(tokenizer.end_of_text)).astype(dtype).tobytes())
        offsets.append(offsets[-1] + len(ids) + 1)
      sizes.extend(batch_sizes)
      progress(sum(batch_sizes))
    _flush(file)
  if not sizes:
    raise DataError(f'{source}: there is no document in it')
  for name, values in (('document_offsets.npy', offsets), ('document_bytes.npy', sizes)):
    with open(folder / name, 'wb') as file:
      _save_array(file, np.frombuffer(values, np.int64))
      _flush(file)
  if tokenizer.serialized is not None:
    (folder / 'tokenizer.json').write_bytes(tokenizer.serialized)
  metadata = {
    'schema': SCHEMA,
    'source': source,
    'tokenizer': {'name': tokenizer.name, 'sha256': tokenizer.sha256},
    'vocab_size': tokenizer.vocab_size,
    'end_of_text': tokenizer.end_of_text,
    'dtype': dtype.name,
    'num_documents': len(sizes),
    'num_tokens': offsets[-1],
    'num_bytes': sum(sizes),
  }
  with open(folder / 'metadata.json', 'wb') as file:
    file.write(json.dumps(metadata, indent=2).encode() + b'\n')
    _flush(file)


def _save_array(file: io.BufferedIOBase, values: Int[np.ndarray, '_']) -> None:
  # As np.save, which on a full disk does not say that the disk is full.
  np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
  file.write(values.data)


def _flush(file: io.BufferedIOBase) -> None:
  # Renaming is atomic for other processes, but after a power cut only for what was on the disk.
  file.flush()
  os.fsync(file.fileno())


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
  batch, characters = [], 0
  for text in documents:
    batch.append(text)
    characters += len(text)
    if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
      yield batch
      batch, characters = [], 0
  if batch:
    yield batch


def open_token_folder(path: str | os.PathLike) -> TokenFolder:
  """Opens a folder of tokens and checks it, in one pass over the stream.

  Raises:
    DataError: a file is missing, of another schema or another size than the metadata says, a
      document does not end in end-of-text, or a token id is beyond the vocabulary.
  """
  path = pathlib.Path(path)
  metadata = read_metadata(path)
  dtype = token_dtype(metadata['vocab_size'])
  offsets = _read_array(path / 'document_offsets.npy', metadata['num_documents'] + 1)
  sizes = _read_array(path / 'document_bytes.npy', metadata['num_documents'])
  file = path / 'tokens.bin'
  actual = file.stat().st_size if file.is_file() else 0
  expected = metadata['num_tokens'] * dtype.itemsize
  if actual != expected:
    raise DataError(f'{file}: {actual} bytes, metadata.json says {expected}; truncated or damaged')
  if sizes.min() < 0 or sizes.sum() != metadata['num_bytes']:
    raise DataError(f'{path}: document_bytes.npy does not add up to the bytes in metadata.json')
  if offsets[0] != 0 or offsets[-1] != metadata['num_tokens'] or np.diff(offsets).min() < 1:
    raise DataError(f'{path}: document_offsets.npy does not cut tokens.bin into documents')
  tokens = np.memmap(file, dtype, mode='r')
  for start in range(0, len(tokens), _CHECKED_TOKENS):
    part = tokens[start : start + _CHECKED_TOKENS]
    if part.max() >= metadata['vocab_size']:
      where = start + int(part.argmax())
      raise DataError(
        f'{file}: token id {part.max()} at position {where}; the vocabulary has '
        f'{metadata["vocab_size"]} ids, from 0'
      )
  if not (tokens[offsets[1:] - 1] == metadata['end_of_text']).all():
    raise DataError(f'{path}: a document does not end in end-of-text; tokens.bin is damaged')
  return TokenFolder(
    name=str(path),
    source=str(metadata['source']),
    vocab_size=metadata['vocab_size'],
    end_of_text=metadata['end_of_text'],
    tokenizer_name=str(metadata['tokenizer']['name']),
    tokenizer_sha256=str(metadata['tokenizer']['sha256']),
    tokens=tokens,
    document_offsets=offsets,
    document_bytes=sizes,
  )


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
  """Returns what `path`/metadata.json says of a folder of tokens; nothing else is looked at.

  Raises:
    DataError: it is missing, of another schema, or incomplete.
  """
  path = pathlib.Path(path)
  file = path / 'metadata.json'
  try:
    metadata = json.loads(file.read_bytes())
    schema = metadata['schema']
  except OSError as error:
    raise DataError(f'{file} cannot be read ({error.strerror}); not a folder of tokens') from None
  except (ValueError, KeyError, TypeError, RecursionError):
    raise DataError(f'{file} is not the metadata of a folder of tokens') from None
  if schema != SCHEMA:
    raise DataError(
      f'{path}: written in schema {schema!r}, this version reads {SCHEMA}; tokenise the text again'
    )
  tokenizer = metadata.get('tokenizer')
  if (
    not all(type(metadata.get(name)) is int and metadata[name] >= 0 for name in _COUNTS)
    or not metadata['end_of_text'] < metadata['vocab_size'] <= 1 << 32
    or not 1 <= metadata['num_documents'] <= metadata['num_tokens']
    or not (isinstance(tokenizer, dict) and {'name', 'sha256'} <= tokenizer.keys())
    or metadata.get('dtype') != token_dtype(metadata['vocab_size']).name
    or 'source' not in metadata
  ):
    raise DataError(f'{file}: a field is missing or contradicts another; tokenise the text again')
  return metadata


def _read_array(path: pathlib.Path, length: int) -> Int[np.ndarray, '_']:
  try:
    values = np.load(path, mmap_mode='r', allow_pickle=False)
  except (OSError, ValueError, EOFError):
    raise DataError(f'{path}: missing, truncated or damaged') from None
  if values.dtype != np.int64 or values.shape != (length,):
    raise DataError(
      f'{path}: {values.dtype} {list(values.shape)}, metadata.json says int64 [{length}]'
    )
  return values
