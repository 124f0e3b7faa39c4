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

Split = Literal['train', 'valid']
_STDLIB = 'stdlib'


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


def open_sources(
  config: DataConfig,
  split: Split,
  *,
  vocab_size: int,
  cache_dir: str | os.PathLike,
) -> tuple[Source, ...]:
  """Opens the sources of `config.train` or `config.valid`; tokenises those that need it.

  Args:
    config: Names the sources and the tokenizer; its `cache_dir`, if set, wins.
    split: Which of the two lists, and which part of a source that is itself split.
    vocab_size: Of the model; it may be larger than a source's.
    cache_dir: Where folders of tokens are kept.

  Raises:
    DataError: a source is missing, damaged or does not fit the model or the tokenizer.
  """
  names = config.train if split == 'train' else config.valid
  if not names:
    raise DataError(f'config.data.{split} is empty; name at least one source')
  cache = pathlib.Path(config.cache_dir or cache_dir)
  is_text = [name not in synthetic.NAMES for name in names]
  tokenizer = load_tokenizer(config.tokenizer) if any(is_text) else None
  # Looked at before a corpus is tokenised, which may take hours. A folder of tokens that another
  # tokenizer made is refused, so the tokenizer's size is every text source's.
  for name, text_source in zip(names, is_text):
    needed = (tokenizer if text_source else SyntheticTask(name)).vocab_size
    if needed > vocab_size:
      raise DataError(
        f'config.model.vocab_size is {vocab_size}; {name} has token ids up to {needed - 1}, so it '
        f'must be at least {needed}'
      )
  return tuple(
    _open_text(name, split, config, tokenizer, cache) if text_source else SyntheticTask(name)
    for name, text_source in zip(names, is_text)
  )


def _open_text(
  name: str, split: Split, config: DataConfig, tokenizer: Tokenizer, cache: pathlib.Path
) -> TextSource:
  if token_files.is_token_folder(name):
    return TextSource(name, _open_folder(name, tokenizer), tokenizer)
  identity, documents = _find_text(name, split, config.text_field)
  identity |= {'schema': token_files.SCHEMA, 'tokenizer': tokenizer.sha256}
  key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
  slug = re.sub(r'[^\w.-]+', '-', pathlib.Path(name).name)[:40].strip('.-')
  path = cache / f'{slug}-{split}-{key}'
  if path.exists():
    try:
      return TextSource(name, token_files.open_token_folder(path), tokenizer)
    except DataError as error:
      raise DataError(f'{error} (remove {path} to have it made again)') from None
  start = time.perf_counter()
  logging.info('Tokenising %s (%s) to %s', name, split, path)
  try:
    folder = token_files.write_token_folder(path, documents, tokenizer, source=name)
  except token_files.FolderExistsError:
    # Another process has made the same folder meanwhile.
    folder = token_files.open_token_folder(path)
  logging.info(
    'Tokenised %s: %d documents, %d tokens in %.1f s',
    name,
    folder.num_documents,
    folder.num_tokens,
    time.perf_counter() - start,
  )
  return TextSource(name, folder, tokenizer)


def _open_folder(name: str, tokenizer: Tokenizer) -> TokenFolder:
  folder = token_files.open_token_folder(name)
  if folder.tokenizer_sha256 != tokenizer.sha256:
    file = pathlib.Path(name) / 'tokenizer.json'
    made_by = file if file.exists() else folder.tokenizer_name
    raise DataError(
      f'config.data.tokenizer is {tokenizer.name}; {name} was made by another, set it to {made_by}'
    )
  return folder


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
