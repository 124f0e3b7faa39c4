"""From the names in a config to open sources; text is tokenised once and kept.

A name is 'stdlib', a synthetic task, 'tfds:NAME', a folder of tokens, or text: a file, a folder of
files or a glob. Text goes to a folder of tokens under the cache directory, whose name holds a hash
of everything that decides its contents: the files with their sizes and times (or the data set with
its version), the field, the tokenizer and, where the source itself is split, the split.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any, Literal

from absl import logging

from ssm_moe.config import DataConfig
from ssm_moe.data import DataError, standard_library, synthetic, text, tfds_source, token_files
from ssm_moe.data.synthetic import SyntheticTask
from ssm_moe.data.token_files import TokenFolder
from ssm_moe.data.tokenizer import Tokenizer, load_tokenizer
from ssm_moe.new_folder import FolderExistsError

Split = Literal['train', 'valid']
_STDLIB = 'stdlib'
_LOG_SECONDS = 30.0  # between two lines about how far tokenising is


@dataclasses.dataclass(frozen=True)
class TextSource:
  """A source of documents.

  Attributes:
    name: What the user called it.
    folder: Its tokens.
    tokenizer: What made them.
  """

  name: str
  folder: TokenFolder
  tokenizer: Tokenizer

  @property
  def vocab_size(self) -> int:
    return self.folder.vocab_size


Source = TextSource | SyntheticTask


def check_sources(config: DataConfig, *, vocab_size: int) -> None:
  """Looks at every source of `config`, without reading text: tokenising may take hours.

  Args:
    config: Names the sources and the tokenizer.
    vocab_size: Of the model.

  Raises:
    DataError: a source of `config.train` or `config.valid` is missing, or does not fit the model or
      the tokenizer.
  """
  for split in ('valid', 'train'):
    _find_all(config, split, vocab_size)


def open_sources(
  config: DataConfig,
  split: Split,
  *,
  vocab_size: int,
  cache_dir: str | os.PathLike,
) -> tuple[Source, ...]:
  """Opens the sources of `config.train` or `config.valid`; tokenises those that need it.

  All of them are looked at before the first is tokenised.

  Args:
    config: Names the sources and the tokenizer; its `cache_dir`, if set, wins.
    split: Which of the two lists, and which part of a source that is itself split.
    vocab_size: Of the model; it may be larger than a source's.
    cache_dir: Where folders of tokens are kept.

  Raises:
    DataError: a source is missing, damaged or does not fit the model or the tokenizer.
  """
  cache = pathlib.Path(config.cache_dir or cache_dir)
  return tuple(
    source if isinstance(source, SyntheticTask) else _open_text(source, split, cache)
    for source in _find_all(config, split, vocab_size)
  )


@dataclasses.dataclass(frozen=True)
class _FoundText:
  """Text that is there, and that nobody has read yet.

  Attributes:
    name: What the user called it.
    tokenizer: For it.
    identity: What decides its documents; None of a folder of tokens.
    documents: To be tokenised; None of a folder of tokens.
  """

  name: str
  tokenizer: Tokenizer
  identity: dict[str, Any] | None = None
  documents: Iterator[str] | None = None


def _find_all(
  config: DataConfig, split: Split, vocab_size: int
) -> list[SyntheticTask | _FoundText]:
  names = config.train if split == 'train' else config.valid
  if not names:
    raise DataError(f'config.data.{split} is empty; name at least one source')
  is_text = [name not in synthetic.NAMES for name in names]
  tokenizer = load_tokenizer(config.tokenizer) if any(is_text) else None
  # A folder of tokens that another tokenizer made is refused, so the tokenizer's size is every text
  # source's.
  for name, text_source in zip(names, is_text):
    needed = (tokenizer if text_source else SyntheticTask(name)).vocab_size
    if needed > vocab_size:
      raise DataError(
        f'config.model.vocab_size is {vocab_size}; {name} has token ids up to {needed - 1}, so it '
        f'must be at least {needed}'
      )
  found = []
  for name, text_source in zip(names, is_text):
    if not text_source:
      found.append(SyntheticTask(name))
    elif token_files.is_token_folder(name):
      _check_tokenizer(name, tokenizer)
      found.append(_FoundText(name, tokenizer))
    else:
      found.append(_FoundText(name, tokenizer, *_find_text(name, split, config.text_field)))
  return found


def _open_text(found: _FoundText, split: Split, cache: pathlib.Path) -> TextSource:
  name, tokenizer = found.name, found.tokenizer
  if found.identity is None:
    return TextSource(name, token_files.open_token_folder(name), tokenizer)
  identity = found.identity | {'schema': token_files.SCHEMA, 'tokenizer': tokenizer.sha256}
  key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
  slug = re.sub(r'[^\w.-]+', '-', pathlib.Path(name).name)[:40].strip('.-')
  path = cache / f'{slug}-{split}-{key}'
  if path.exists():
    try:
      return TextSource(name, token_files.open_token_folder(path), tokenizer)
    except DataError as error:
      raise DataError(f'{error} (remove {path} to have it made again)') from None
  progress = _Progress(f'{name} ({split}) to {path}')
  try:
    folder = token_files.write_token_folder(
      path, found.documents, tokenizer, source=name, progress=progress
    )
  except FolderExistsError:
    # Another process has made the same folder meanwhile.
    folder = token_files.open_token_folder(path)
  progress.end()
  return TextSource(name, folder, tokenizer)


class _Progress:
  """Logs how far tokenising is, if it lasts: a mistake found soon is to be told in one line."""

  def __init__(self, what: str):
    self._what = what
    self._bytes = 0
    self._start = self._logged = time.perf_counter()

  def __call__(self, num_bytes: int) -> None:
    self._bytes += num_bytes
    now = time.perf_counter()
    if now - self._logged > _LOG_SECONDS:
      self._logged = now
      logging.info('Tokenising %s: %d MB so far', self._what, self._bytes // 1_000_000)

  def end(self) -> None:
    if self._logged > self._start:
      logging.info('Tokenised %s in %.0f s', self._what, time.perf_counter() - self._start)


def _check_tokenizer(name: str, tokenizer: Tokenizer) -> None:
  """Checks that a folder of tokens was made by `tokenizer`."""
  made_by = token_files.read_metadata(name)['tokenizer']
  if str(made_by['sha256']) != tokenizer.sha256:
    file = pathlib.Path(name) / 'tokenizer.json'
    raise DataError(
      f'config.data.tokenizer is {tokenizer.name}; {name} was made by another, set it to '
      f'{file if file.exists() else made_by["name"]}'
    )


def _find_text(name: str, split: Split, text_field: str) -> tuple[dict[str, Any], Iterator[str]]:
  """Returns what decides the documents of a source, and the documents, not yet read."""
  if name == _STDLIB:
    files = standard_library.list_files(split)
    sizes = [[str(file), file.stat().st_size] for file in files]
    return {_STDLIB: sizes, 'split': split}, standard_library.read_documents(split)
  if name.startswith(tfds_source.PREFIX):
    data_set = tfds_source.open_tfds(name, split)
    identity = {'tfds': data_set.identity, 'text_field': text_field}
    return identity, data_set.documents(text_field)
  try:
    files = text.find_files(name)
  except DataError as error:
    special = ', '.join((_STDLIB, *synthetic.NAMES))
    hint = f' (a source that is no file is one of {special}, {tfds_source.PREFIX}NAME)'
    raise DataError(f'config.data.{split}: {error}{"" if os.path.exists(name) else hint}') from None
  stats = [(str(file.resolve()), file.stat()) for file in files]
  identity = {
    'files': [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats],
    'text_field': text_field,
  }
  return identity, text.read_documents(files, text_field)
