"""Documents out of text files: .txt, .jsonl, each also .gz or .xz, and .parquet.

A .txt file is one document; a .jsonl file has one JSON object a line and a .parquet file one row
for each document, with the text in a named field. Files are decompressed and read as a stream, so
that memory holds one document (of Parquet, one batch of rows) at a time.
"""

import contextlib
import glob
import gzip
import io
import json
import lzma
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator

from ssm_moe.data import DataError

_PLAIN = ('.txt', '.jsonl')
_OPENERS = {'': open, '.gz': gzip.open, '.xz': lzma.open}
SUFFIXES = (*(kind + packing for kind in _PLAIN for packing in _OPENERS), '.parquet')
_PARQUET_ROWS = 256  # of one batch


def find_files(pattern: str | os.PathLike) -> list[pathlib.Path]:
  """Returns the text files that a path, a folder (searched in depth) or a glob names, sorted.

  Raises:
    DataError: there are none, or a file that is named has a suffix that this module cannot read.
  """
  if not str(pattern):
    raise DataError('the name of a file is empty; name a file, a folder or a glob')
  path = pathlib.Path(pattern)
  if path.is_dir():
    files = [file for file in path.rglob('*') if file.is_file() and _suffix(file)]
    if not files:
      raise DataError(f'{pattern}: the folder holds no file that ends in {", ".join(SUFFIXES)}')
    return sorted(files)
  if path.exists():
    files = [path]
  else:
    files = sorted(pathlib.Path(name) for name in glob.glob(str(pattern), recursive=True))
    files = [file for file in files if file.is_file()]
  if not files:
    raise DataError(f'{pattern}: no such file or folder, and as a pattern it matches no file')
  for file in files:
    if not _suffix(file):
      raise DataError(f'{file}: cannot tell what it is; the name must end in {", ".join(SUFFIXES)}')
  return files


def read_documents(files: Iterable[str | os.PathLike], text_field: str = 'text') -> Iterator[str]:
  """Yields the documents of `files`, in order. They may be empty; a file may not.

  Raises:
    DataError: a file is missing, empty, damaged, not UTF-8 or not of the format that its name says;
      the message names the file, and the line or row.
  """
  for file in map(pathlib.Path, files):
    kind = _suffix(file).partition('.')[2].partition('.')[0]
    documents = {'txt': _read_text, 'jsonl': _read_json_lines, 'parquet': _read_parquet}[kind]
    count = 0
    with _naming(file):
      for text in documents(file, text_field):
        count += 1
        yield text
    if not count:
      raise DataError(f'{file}: the file is empty')


def _suffix(path: pathlib.Path) -> str:
  return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), '')


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except FileNotFoundError:
    raise DataError(f'{path}: no such file') from None
  except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
    raise DataError(f'{path}: cannot be read; truncated or damaged ({error})') from None


def _open(path: pathlib.Path) -> io.BufferedIOBase:
  packing = path.suffix if path.suffix in _OPENERS else ''
  return _OPENERS[packing](path, 'rb')


def _read_text(path: pathlib.Path, text_field: str) -> Iterator[str]:
  del text_field
  with _open(path) as file:
    data = file.read()
  if data:
    yield _decode(data, f'{path}')


def _read_json_lines(path: pathlib.Path, text_field: str) -> Iterator[str]:
  with _open(path) as file:
    for number, line in enumerate(file, 1):
      where = f'{path}:{number}'
      if not line.strip():
        continue
      line = _decode(line, where)
      try:
        record = json.loads(line)
      except json.JSONDecodeError as error:
        raise DataError(f'{where}: not JSON ({error.msg} at column {error.colno})') from None
      except RecursionError:
        raise DataError(f'{where}: JSON that cannot be read (nested too deep)') from None
      except ValueError:
        raise DataError(f'{where}: JSON that cannot be read (too many digits)') from None
      if not isinstance(record, dict):
        kind = type(record).__name__
        raise DataError(f'{where}: of type {kind}; each line must be a JSON object')
      if text_field not in record:
        fields = ', '.join(record) or 'none'
        raise DataError(f'{where}: no field {text_field!r}; there are: {fields}')
      yield _check_text(record[text_field], where, text_field)


def _read_parquet(path: pathlib.Path, text_field: str) -> Iterator[str]:
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError:
    raise DataError(f"{path} needs the package pyarrow: pip install 'ssm_moe[hf]'") from None
  row = 0
  try:
    with parquet.ParquetFile(path) as file:
      if text_field not in file.schema_arrow.names:
        fields = ', '.join(file.schema_arrow.names)
        raise DataError(f'{path}: no column {text_field!r}; there are: {fields}')
      for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field]):
        for value in batch.column(0):
          row += 1
          yield _check_text(value.as_py(), f'{path}: row {row}', text_field)
  except (pyarrow.ArrowException, UnicodeDecodeError) as error:
    reason = ' '.join(str(error).split())
    raise DataError(f'{path}: not a readable Parquet file ({reason})') from None


def _decode(data: bytes, where: str) -> str:
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as error:
    raise DataError(f'{where}: not UTF-8 (byte {error.start}: {error.reason})') from None


def _check_text(value: object, where: str, text_field: str) -> str:
  if not isinstance(value, str):
    kind = type(value).__name__
    raise DataError(f'{where}: the field {text_field!r} is of type {kind}; it must be a string')
  try:
    value.encode('utf-8')
  except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
    raise DataError(
      f'{where}: not Unicode text (character {error.start}: lone surrogate)'
    ) from None
  return value
