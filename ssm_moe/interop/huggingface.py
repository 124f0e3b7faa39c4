"""Models in folders as Hugging Face has them: config.json and safetensors.

A family is a file with a `FAMILY`; here they are listed.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import ml_dtypes
import numpy as np

from ssm_moe.config import ConfigError, ModelConfig
from ssm_moe.errors import UserError
from ssm_moe.interop import layout, mamba2_family, mamba_family, state_spaces_family, weights
from ssm_moe.interop.family import Family, check_writable
from ssm_moe.interop.settings import Settings
from ssm_moe.new_folder import new_folder
from ssm_moe.shapes import PyTree

# The first that recognises a folder reads it; the first that has a model's layers writes it.
FAMILIES = (mamba_family.FAMILY, mamba2_family.FAMILY, state_spaces_family.FAMILY)
CONFIG, TOKENIZER = 'config.json', 'tokenizer.json'
_HEAD = 'lm_head.weight'


def is_model(folder: pathlib.Path) -> bool:
  """Says whether `folder` is meant as such a folder: its config.json is not that of a run."""
  try:
    return 'model' not in _read_json(folder / CONFIG)
  except UserError:
    return False


def load(folder: pathlib.Path) -> tuple[ModelConfig, PyTree]:
  """Reads a model.

  Args:
    folder: With config.json and safetensors, of one of `FAMILIES`.

  Returns:
    The config, which computes in bfloat16 if the weights are stored so, else in float32; and the
    parameters, float32, as arrays on the host.

  Raises:
    UserError: a file is missing or damaged; a key or a value of the config, or a tensor, is not
      known, is missing or does not fit; the message names it.
  """
  folder = pathlib.Path(folder)
  file = folder / CONFIG
  values = _read_json(file)
  family = next((family for family in FAMILIES if family.recognises(values)), None)
  if family is None:
    known = ', '.join(family.name for family in FAMILIES)
    raise UserError(f'{file}: model_type is {values.get("model_type")!r}; there are: {known}')
  settings = Settings(file, values)
  try:
    config = family.read(settings)
  except ConfigError as error:
    raise UserError(f'{file}: {error}') from None
  settings.close()
  with weights.Reader(folder) as reader:
    if config.num_periods > len(reader.names()):
      # A list of the tensors that are missing would take all memory.
      raise UserError(
        f'{file} lists {config.num_periods} layers; there are {len(reader.names())} tensors'
      )
    tensors = family.tensors(config)
    try:
      shapes = layout.param_shapes(config)
    except (OverflowError, ValueError):
      raise UserError(f'{file} describes arrays that are too large') from None
    names = _check_tensors(reader, config, tensors, shapes)
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
    for name, tensor in zip(names, tensors):
      tensor.put(reader.read(name), params)
    halved = reader.dtype(names[0]) == ml_dtypes.bfloat16
  if halved:
    return dataclasses.replace(config, dtype='bfloat16'), params
  return dataclasses.replace(config, residual_dtype='float32'), params


def save(
  folder: pathlib.Path,
  config: ModelConfig,
  params: PyTree,
  *,
  family: str | None = None,
  dtype: str = 'float32',
  tokenizer: bytes | None = None,
  end_of_text: int | None = None,
  shard_bytes: int = weights.SHARD_BYTES,
) -> None:
  """Writes a model; `load` gives back the same parameters, bit for bit if `dtype` is float32.

  What only training knows, such as `initialization` and `remat`, is not in the folder.

  Args:
    folder: Appears whole or not at all; must not exist.
    config: Of the model: a stack of Mamba or of Mamba-2 without experts.
    params: Of the model, on the host or on devices.
    family: Name of one of `FAMILIES`; the first that has such layers if None.
    dtype: In which the tensors are stored: float32 or bfloat16.
    tokenizer: Contents of a tokenizer.json to put beside them.
    end_of_text: Its id that begins and ends documents.
    shard_bytes: With more than this there are several files.

  Raises:
    UserError: the model has no such format, and the message names the field; or the folder exists
      or cannot be made.
    OSError: the system refuses to write, as on a full disk.
  """
  chosen = _family_to_write(config, family)
  values = _config_values(config, chosen)
  if 'model_type' in values:  # else no key is for these
    values |= {'dtype': dtype}
    values |= dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'), end_of_text)
  params = jax.tree.map(np.asarray, params)
  tensors = [
    weights.Written(tensor.name, tensor.shape(params), functools.partial(tensor.get, params))
    for tensor in chosen.tensors(config)
  ]
  with new_folder(folder) as partial:
    (partial / CONFIG).write_text(json.dumps(values, indent=2) + '\n')
    if tokenizer is not None:
      (partial / TOKENIZER).write_bytes(tokenizer)
    weights.write(partial, tensors, dtype, shard_bytes=shard_bytes)


def check_savable(config: ModelConfig, family: str | None = None) -> None:
  """Checks, without parameters, what `save` checks of the model.

  Raises:
    UserError: the model has no such format; the message names the field.
  """
  _config_values(config, _family_to_write(config, family))


def _config_values(config: ModelConfig, family: Family) -> dict[str, Any]:
  check_writable(config, family)
  return family.write(config)


def _family_to_write(config: ModelConfig, name: str | None) -> Family:
  if name is None:
    able = (family for family in FAMILIES if config.layers[0] in family.letters)
    return next(able, FAMILIES[0])
  chosen = next((family for family in FAMILIES if family.name == name), None)
  if chosen is None:
    known = ', '.join(family.name for family in FAMILIES)
    raise UserError(f'the format {name!r} does not exist; there are: {known}')
  return chosen


def _check_tensors(
  reader: weights.Reader, config: ModelConfig, tensors: list[layout.Tensor], shapes: PyTree
) -> list[str]:
  """Returns the names that the tensors have in the files.

  Raises:
    UserError: one is missing, has another shape or is not of such a model.
  """
  names = []
  left = reader.names()
  for tensor in tensors:
    name = next((name for name in (tensor.name, *tensor.also) if name in left), None)
    if name is None:
      raise UserError(f'{reader.folder}: has no tensor {tensor.name}')
    shape, expected = reader.shape(name), tensor.shape(shapes)
    if shape != expected:
      raise UserError(
        f'{reader.where(name)} has the shape {list(shape)}; by {CONFIG} it must be {list(expected)}'
      )
    reader.dtype(name)
    left.remove(name)
    names.append(name)
  if config.tie_embeddings and _HEAD in left:
    left.remove(_HEAD)
    if not np.array_equal(reader.read(_HEAD), reader.read(names[0])):
      raise UserError(f'{reader.where(_HEAD)} is not {names[0]}, which by {CONFIG} it must be')
  if left:
    raise UserError(f'{reader.where(min(left))} is no tensor of such a model')
  return names


def _read_json(file: pathlib.Path) -> dict[str, Any]:
  try:
    values = json.loads(file.read_bytes())
  except OSError as error:
    raise UserError(f'{file} cannot be read ({error.strerror})') from None
  except (ValueError, RecursionError) as error:
    raise UserError(f'{file} is not JSON ({error})') from None
  if not isinstance(values, dict):
    raise UserError(f'{file} holds no config')
  return values
