"""A record of routing: one row per token and routed layer, as JSON Lines or Parquet.

  document, position    of the token; position 0 is the end-of-text that a document starts from
  token, text           its id, and what can be printed of it
  layer, router         depth over all layers, and the router's name in a period
  experts, weights      the best first; the index E is the fallback (where experts choose tokens,
                        column e is expert e, or E if it did not choose this token)
  dropped               for each of the experts, whether the token was over its capacity
  fallback              whether the token took no routed expert

Rows come in the order in which windows of several documents ran, all layers of a token together.
A header says what the record was made of: the first line, or the metadata of the Parquet schema.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ssm_moe.analysis.documents import Window
from ssm_moe.analysis.routing import Layer, Traced, fallback, routes_of
from ssm_moe.data.tokenizer import Tokenizer
from ssm_moe.errors import UserError

SUFFIXES = ('.jsonl', '.parquet')
_KEY = 'ssm_moe_routes'
_VERSION = 1
Row = dict[str, Any]


def rows(
  window: Window, traced: Traced, layers: list[Layer], text: Callable[[int], str]
) -> Iterator[Row]:
  """Yields the rows of a window, none of padding; `text` gives what can be printed of a token."""
  real = np.flatnonzero(window.real.reshape(-1))
  document = (window.segment_ids.reshape(-1)[real] - 1).tolist()
  position = window.position.reshape(-1)[real].tolist()
  tokens = window.inputs.reshape(-1)[real].tolist()
  of_layers = []
  for layer in layers:
    routes = routes_of(traced.routes, layer)
    experts = routes.expert_index[real]
    weights = routes.combine_weights[real].astype(np.float32)
    dropped = traced.dropped[layer.router][layer.period][real]
    # The shortest spelling that reads back as the same float32: 0.1, not 0.10000000149.
    spelled = [[float(str(weight)) for weight in row] for row in weights]
    of_layers.append(
      (experts.tolist(), spelled, dropped.tolist(), fallback(experts, layer).tolist())
    )
  for i, token in enumerate(tokens):
    for layer, (experts, weights, dropped, fallbacks) in zip(layers, of_layers):
      yield {
        'document': document[i],
        'position': position[i],
        'token': token,
        'text': text(token),
        'layer': layer.depth,
        'router': layer.router,
        'experts': experts[i],
        'weights': weights[i],
        'dropped': dropped[i],
        'fallback': fallbacks[i],
      }


def printable(tokenizer: Tokenizer) -> Callable[[int], str]:
  """Returns the function that spells a token: control characters and the like are escaped."""
  known: dict[int, str] = {}

  def text(token: int) -> str:
    if token not in known:
      letters = tokenizer.decode([token])
      known[token] = ''.join(
        c if c.isprintable() else c.encode('unicode_escape').decode() for c in letters
      )
    return known[token]

  return text


def check_name(flag: str, path: str) -> None:
  """Checks that a record can have this name, and that what it needs is installed.

  Raises:
    UserError: another suffix, or there is no pyarrow.
  """
  if pathlib.Path(path).suffix not in SUFFIXES:
    raise UserError(f'--{flag}={path}: the name must end in {" or ".join(SUFFIXES)}')
  if path.endswith('.parquet'):
    _pyarrow(path)


@contextlib.contextmanager
def writer(path: str | os.PathLike, header: dict[str, Any]) -> Iterator[Callable]:
  """Opens a new record, and gives the function that writes rows to it.

  The file is removed again if anything is raised meanwhile.

  Raises:
    UserError: there is a file already, or there is no pyarrow.
  """
  path = pathlib.Path(path)
  header = {'version': _VERSION, **header}
  make = _write_parquet if path.suffix == '.parquet' else _write_json_lines
  if os.path.lexists(path):
    raise UserError(f'{path} is there already; remove it, or give another name')
  with contextlib.ExitStack() as stack:
    try:
      with make(path, header) as write:
        yield write
    except BaseException:
      stack.callback(path.unlink, missing_ok=True)
      raise


@contextlib.contextmanager
def _write_json_lines(path: pathlib.Path, header: dict[str, Any]) -> Iterator[Callable]:
  with path.open('x', encoding='utf-8') as file:
    file.write(json.dumps({_KEY: header}) + '\n')

    def write(some: Iterable[Row]) -> None:
      file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + '\n' for row in some)

    yield write


@contextlib.contextmanager
def _write_parquet(path: pathlib.Path, header: dict[str, Any]) -> Iterator[Callable]:
  pyarrow, parquet = _pyarrow(path)
  integer, text = pyarrow.int32(), pyarrow.string()
  schema = pyarrow.schema(
    {
      'document': integer,
      'position': integer,
      'token': integer,
      'text': text,
      'layer': integer,
      'router': text,
      'experts': pyarrow.list_(integer),
      'weights': pyarrow.list_(pyarrow.float32()),
      'dropped': pyarrow.list_(pyarrow.bool_()),
      'fallback': pyarrow.bool_(),
    },
    metadata={_KEY: json.dumps(header)},
  )
  with path.open('xb') as file, parquet.ParquetWriter(file, schema) as opened:

    def write(some: Iterable[Row]) -> None:
      opened.write_table(pyarrow.Table.from_pylist(list(some), schema))

    yield write


def read(path: str | os.PathLike) -> tuple[dict[str, Any], Iterator[Row]]:
  """Returns the header and the rows of a record.

  Raises:
    UserError: there is no such file, or it is no record; later, a row that cannot be read.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f'{path}: there is no such file')
  header, found = (_read_parquet if path.suffix == '.parquet' else _read_json_lines)(path)
  if not isinstance(header, dict) or header.get('version') != _VERSION:
    raise UserError(f'{path}: no record of routes that this version can read')
  return header, found


def _read_json_lines(path: pathlib.Path) -> tuple[Any, Iterator[Row]]:
  def parsed() -> Iterator[Any]:
    with path.open('rb') as file:
      for number, line in enumerate(file, 1):
        try:
          yield json.loads(line)
        except (ValueError, RecursionError):
          raise UserError(f'{path}: line {number} is not JSON; the record is damaged') from None

  lines = parsed()
  first = next(lines, None)
  return first.get(_KEY) if isinstance(first, dict) else None, lines


def _read_parquet(path: pathlib.Path) -> tuple[Any, Iterator[Row]]:
  pyarrow, parquet = _pyarrow(path)

  @contextlib.contextmanager
  def naming() -> Iterator[None]:
    try:
      yield
    except (pyarrow.ArrowException, ValueError, OSError) as error:
      reason = ' '.join(str(error).split())
      raise UserError(f'{path}: not a readable Parquet file ({reason})') from None

  def parsed(file) -> Iterator[Row]:
    with naming(), file:
      for batch in file.iter_batches():
        yield from batch.to_pylist()

  with naming():
    file = parquet.ParquetFile(path)
    text = (file.schema_arrow.metadata or {}).get(_KEY.encode(), b'null')
    return json.loads(text), parsed(file)


def _pyarrow(path):
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError:
    raise UserError(f"{path} needs the package pyarrow: pip install 'ssm_moe[hf]'") from None
  return pyarrow, parquet
