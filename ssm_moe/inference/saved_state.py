"""The state of a document in a file, to go on with it another day.

A file is a NumPy archive of plain arrays, without pickled objects, and a description as JSON: which
model it is of, and each array's dtype. Whatever does not fit the model that it is loaded for is an
error, so that no document goes on from the state of another model.
"""

import hashlib
import io
import json
import os
import pathlib
import zipfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssm_moe.config import ModelConfig, to_dict
from ssm_moe.errors import UserError
from ssm_moe.models import lm
from ssm_moe.models.block import PeriodState
from ssm_moe.shapes import PyTree

_KIND, _VERSION, _HEADER = 'ssm_moe state', 1, 'header'
# How a model is run, which its state knows nothing of.
_HOW = ('initialization', 'remat', 'scan_periods')


class Document(NamedTuple):
  """Where a document is.

  Attributes:
    state: Of all its tokens but the last; of one row.
    token: The last.
    num_tokens: All that there are.
  """

  state: PeriodState
  token: int
  num_tokens: int


def fingerprint(params: PyTree, tokenizer_sha256: str) -> str:
  """Returns what tells parameters, with the tokenizer of their text, from others."""
  digest = hashlib.sha256(tokenizer_sha256.encode())
  for path, leaf in jax.tree.leaves_with_path(params):
    digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
  return digest.hexdigest()


def save(path: str | os.PathLike, document: Document, config: ModelConfig, model: str) -> None:
  """Writes a file, at once: it is whole or it is not there.

  Args:
    path: Of the file; one that is there is replaced.
    document: What to keep.
    config: Of the model.
    model: Its `fingerprint`.

  Raises:
    OSError: it cannot be written.
  """
  arrays, dtypes = {}, {}
  for name, leaf in _named(document.state).items():
    leaf = np.asarray(leaf)
    dtypes[name] = leaf.dtype.name
    # NumPy has no bfloat16 of its own, and would pickle it.
    arrays[name] = leaf.view(f'u{leaf.dtype.itemsize}') if leaf.dtype.kind == 'V' else leaf
  header = {
    'kind': _KIND,
    'version': _VERSION,
    'config': _config_of(config),
    'model': model,
    'token': int(document.token),
    'num_tokens': int(document.num_tokens),
    'dtypes': dtypes,
  }
  content = io.BytesIO()
  text = np.frombuffer(json.dumps(header).encode(), np.uint8)
  np.savez(content, **{_HEADER: text, **arrays})
  path = pathlib.Path(path)
  temporary = path.with_name(path.name + '.unfinished')
  with open(temporary, 'wb') as file:
    file.write(content.getbuffer())
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)


def load(path: str | os.PathLike, config: ModelConfig, model: str) -> Document:
  """Reads what `save` wrote.

  Args:
    path: Of the file.
    config: Of the model that is to go on.
    model: Its `fingerprint`.

  Raises:
    UserError: the file is missing, is none of these or damaged, or is of another model.
  """
  try:
    with np.load(path, allow_pickle=False) as archive:
      arrays = {name: archive[name] for name in archive.files}
    header = json.loads(arrays.pop(_HEADER).tobytes())
    if header['kind'] != _KIND:
      raise ValueError
    version = header['version']
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror or error})') from None
  except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
    raise UserError(f'{path}: not a saved state, or damaged') from None
  if version != _VERSION:
    raise UserError(f'{path}: a saved state of version {version}; this code reads {_VERSION}')
  if difference := _difference(header['config'], _config_of(config)):
    raise UserError(f'{path}: the state of another model: {difference}')
  if header['model'] != model:
    raise UserError(f'{path}: the state of another checkpoint or tokenizer')
  return Document(
    _state(path, arrays, header['dtypes'], config), header['token'], header['num_tokens']
  )


def _state(
  path: str | os.PathLike,
  arrays: dict[str, np.ndarray],
  dtypes: dict[str, str],
  config: ModelConfig,
) -> PeriodState:
  expected = jax.eval_shape(lambda: lm.initial_state(config, 1))
  names = _named(expected)
  if names.keys() != arrays.keys() or names.keys() != dtypes.keys():
    raise UserError(f'{path}: not a saved state, or damaged')
  leaves = []
  for name, leaf in names.items():
    array = arrays[name]
    if dtypes[name] != leaf.dtype.name or array.shape != leaf.shape:
      raise UserError(
        f'{path}: {name} is {dtypes[name]} {array.shape}; it must be {leaf.dtype} {leaf.shape}'
      )
    leaves.append(jnp.asarray(array.view(leaf.dtype)))
  return jax.tree.unflatten(jax.tree.structure(expected), leaves)


def _named(state: PeriodState) -> dict[str, Any]:
  """Returns the arrays of a state, each by its layer and its name there."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree.leaves_with_path(state)
  }


def _config_of(config: ModelConfig) -> dict[str, Any]:
  values = to_dict(config)
  for name in _HOW:
    values.pop(name)
  for mixer in ('mamba', 'mamba2'):
    values[mixer].pop('scan_implementation')
  values['attention'].pop('implementation')
  return json.loads(json.dumps(values))


def _difference(there: Any, here: Any, name: str = 'model') -> str | None:
  """Returns the first field that differs."""
  if not isinstance(there, dict) or not isinstance(here, dict):
    return None if there == here else f'{name} is {there} there and {here} here'
  for key in [*here, *there]:
    if key not in here or key not in there:
      return f'{name}.{key} is known only {"here" if key in here else "there"}'
    if found := _difference(there[key], here[key], f'{name}.{key}'):
      return found
  return None
