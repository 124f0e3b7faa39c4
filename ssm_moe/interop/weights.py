"""Tensors in the safetensors files of a folder: one file, or several with an index.

No pickle is ever read: to unpickle a file is to run it.
"""

import contextlib
import errno
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ssm_moe.errors import UserError

_FILE, _INDEX = 'model.safetensors', 'model.safetensors.index.json'
_PICKLES = ('*.bin', '*.pt', '*.pth', '*.ckpt')
# Of the files, and here. Without ml_dtypes NumPy has no bfloat16.
_DTYPES = {'F32': np.float32, 'BF16': ml_dtypes.bfloat16, 'F16': np.float16}
# A folder with more than this has several files; so has transformers for long.
SHARD_BYTES = 5_000_000_000


class Reader:
  """Reads tensors one by one, through memory maps.

  Attributes:
    folder: With model.safetensors, or with model.safetensors.index.json and the files that it
      names.

  Raises:
    UserError: there are none, or a file is missing or damaged.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    safe_open = _library().safe_open
    self._stack = contextlib.ExitStack()
    self._files: dict[str, Any] = {}  # by tensor
    self._names: dict[str, str] = {}  # of the file, by tensor
    try:
      for name in _file_names(folder):
        with self._naming(name):
          file = self._stack.enter_context(safe_open(folder / name, framework='np'))
        for tensor in file.keys():  # noqa: SIM118 (no mapping)
          if tensor in self._files:
            raise UserError(f'{folder}: {tensor} is both in {self._names[tensor]} and in {name}')
          self._files[tensor], self._names[tensor] = file, name
    except BaseException:
      self._stack.close()
      raise

  def __enter__(self) -> 'Reader':
    return self

  def __exit__(self, *_) -> None:
    self._stack.close()

  def names(self) -> set[str]:
    """Returns the names of all tensors."""
    return set(self._files)

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._files[name].get_slice(name).get_shape())

  def dtype(self, name: str) -> np.dtype:
    """Returns the type in which a tensor is stored.

    Raises:
      UserError: it is none of those of a model's weights.
    """
    stored = self._files[name].get_slice(name).get_dtype()
    if stored not in _DTYPES:
      raise UserError(f'{self.where(name)} is of type {stored}; it must be {", ".join(_DTYPES)}')
    return np.dtype(_DTYPES[stored])

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor as it is stored."""
    self.dtype(name)
    with self._naming(self._names[name]):
      return self._files[name].get_tensor(name)

  def where(self, name: str) -> str:
    """Returns a tensor's file and name, for messages."""
    return f'{self.folder / self._names[name]}: {name}'

  @contextlib.contextmanager
  def _naming(self, name: str) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise UserError(f'{self.folder / name} cannot be read ({error.strerror})') from None
    except _library().SafetensorError as error:
      raise UserError(
        f'{self.folder / name} is not a whole safetensors file ({_one_line(error)})'
      ) from None


class Written(NamedTuple):
  """A tensor to be written.

  Attributes:
    name: Of the tensor.
    shape: Of the tensor.
    make: Returns it, of any floating type.
  """

  name: str
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]


def write(
  folder: pathlib.Path, tensors: list[Written], dtype: str, *, shard_bytes: int = SHARD_BYTES
) -> None:
  """Writes tensors; each is made when its file is.

  Args:
    folder: Has none yet.
    tensors: In the order of the files.
    dtype: Of all: float32 or bfloat16.
    shard_bytes: What a file holds at most, unless a single tensor is larger.

  Raises:
    OSError: the system refuses, as on a full disk.
  """
  stored = np.dtype(dtype if dtype != 'bfloat16' else ml_dtypes.bfloat16)
  shards, sizes = [[]], [0]
  for tensor in tensors:
    size = math.prod(tensor.shape) * stored.itemsize
    if shards[-1] and sizes[-1] + size > shard_bytes:
      shards.append([])
      sizes.append(0)
    shards[-1].append(tensor)
    sizes[-1] += size
  names = [_FILE]
  if len(shards) > 1:
    count = len(shards)
    names = [f'model-{i:05d}-of-{count:05d}.safetensors' for i in range(1, count + 1)]
    weight_map = {tensor.name: name for name, shard in zip(names, shards) for tensor in shard}
    index = {'metadata': {'total_size': sum(sizes)}, 'weight_map': weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + '\n')
  for name, shard in zip(names, shards):
    # The library writes memory as it lies, whatever the order of the axes.
    arrays = {tensor.name: np.ascontiguousarray(tensor.make(), stored) for tensor in shard}
    _write_file(folder / name, arrays)


def _write_file(file: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  # The library makes files that their owner alone can read.
  file.touch()
  mode = file.stat().st_mode
  file.unlink()
  try:
    # transformers wants to know who wrote the file, and knows no other name than this.
    _library().save_file(arrays, file, metadata={'format': 'pt'})
    os.chmod(file, mode)
  except _library().SafetensorError as error:
    number = re.search(r'os error (\d+)', str(error))
    code = int(number[1]) if number else errno.EIO
    raise OSError(code, os.strerror(code), str(file)) from error


def _file_names(folder: pathlib.Path) -> list[str]:
  if (folder / _FILE).is_file():
    return [_FILE]
  index = folder / _INDEX
  if not index.is_file():
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
      raise UserError(
        f'{folder} has its weights in {pickles[0]} only, a pickle, which is never read because it '
        f'can run code; convert it first: {_conversion(folder / pickles[0])}'
      )
    raise UserError(f'{folder}: has neither {_FILE} nor {_INDEX}')
  try:
    names = sorted(set(json.loads(index.read_bytes())['weight_map'].values()))
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
    raise UserError(f'{index} is not an index of safetensors files') from None
  for name in names:
    if not isinstance(name, str) or pathlib.PurePath(name).name != name:
      raise UserError(f'{index}: {name!r} is no file of the folder')
  return names


def _conversion(pickle: pathlib.Path) -> str:
  return (
    'python -c "import torch; from safetensors.torch import save_file; save_file({name: '
    f"tensor.clone() for name, tensor in torch.load('{pickle}', weights_only=True).items()}}, "
    f"'{pickle.parent / _FILE}')\""
  )


class _Library(NamedTuple):
  safe_open: Any
  save_file: Any
  SafetensorError: type[Exception]


def _library() -> _Library:
  try:
    import safetensors
    import safetensors.numpy
  except ImportError:
    raise UserError(
      "models in Hugging Face's formats need the package safetensors: pip install 'ssm_moe[hf]'"
    ) from None
  return _Library(safetensors.safe_open, safetensors.numpy.save_file, safetensors.SafetensorError)


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split())
