"""Where each tensor of a published model lies in the parameters of `models.lm`, and back.

A published matrix has its outputs first, ours has its inputs first; what is one matrix there, such
as the projection to z, x, B, C and dt of Mamba-2, can be several parameters here, or parts of one.
One description serves both directions, so that they are each other's inverse.
"""

import enum
import math
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn

from ssm_moe.config import ModelConfig
from ssm_moe.models import lm
from ssm_moe.models.block import layer_names
from ssm_moe.shapes import PyTree


class Form(enum.Enum):
  """How the rows of a tensor, its first axis, become a parameter."""

  VECTOR = enum.auto()  # [rows], and [*rows] here
  TABLE = enum.auto()  # [rows, columns], and the same here
  MATRIX = enum.auto()  # [rows, inputs], and [inputs, *rows] here
  FILTER = enum.auto()  # [rows, 1, width], and [width, *rows] here


class Part(NamedTuple):
  """A parameter, or a part of one.

  Attributes:
    path: Names of the parameter, from the outermost.
    index: What of it; empty for all.
  """

  path: tuple[str, ...]
  index: tuple[int | slice, ...] = ()


class Tensor(NamedTuple):
  """A tensor of a published model.

  Attributes:
    name: In its files.
    form: How it is turned.
    parts: What its rows are, from the first to the last.
    also: Other names that it goes by.
  """

  name: str
  form: Form
  parts: tuple[Part, ...]
  also: tuple[str, ...] = ()

  def shape(self, params: PyTree) -> tuple[int, ...]:
    """Returns its shape in the files; of `params` only shapes matter."""
    views = [_rows_first(part, params, self.form) for part in self.parts]
    columns = () if self.form is Form.VECTOR else views[0].shape[-1:]
    rows = sum(view.size for view in views) // math.prod(columns)
    return (rows, 1, *columns) if self.form is Form.FILTER else (rows, *columns)

  def put(self, array: np.ndarray, params: PyTree) -> None:
    """Copies the tensor, of shape `shape`, to its place in `params`, arrays on the host."""
    start = 0
    for part in self.parts:
      view = _rows_first(part, params, self.form)
      rows = view.size // math.prod(array.shape[1:])
      view[...] = array[start : start + rows].reshape(view.shape)
      start += rows

  def get(self, params: PyTree) -> np.ndarray:
    """Returns a copy of the tensor that `put` would have taken."""
    below = self.shape(params)[1:]
    views = (_rows_first(part, params, self.form) for part in self.parts)
    return np.concatenate([view.reshape(-1, *below) for view in views])


def model_tensors(
  config: ModelConfig, mixer: list[Tensor], *, embedding: str, also: tuple[str, ...] = ()
) -> list[Tensor]:
  """Returns the tensors of a stack of mixers, as all families here name them.

  Args:
    config: Of the model, all of whose layers are the same mixer.
    mixer: Of the mixer of one layer; their names and paths begin there.
    embedding: What the table of embeddings is called.
    also: What else it can be called.
  """
  tensors = [Tensor(embedding, Form.TABLE, (Part(('embedding',)),), also)]
  names = list(layer_names(config))
  for depth in range(len(names) * config.num_periods):
    period, name = depth // len(names), names[depth % len(names)]
    above = f'backbone.layers.{depth}'
    norm = Part(('periods', f'norm_{name}', 'scale'), (period,))
    tensors.append(Tensor(f'{above}.norm.weight', Form.VECTOR, (norm,)))
    for tensor in mixer:
      parts = tuple(
        Part(('periods', f'layer_{name}', *part.path), (period, *part.index))
        for part in tensor.parts
      )
      tensors.append(Tensor(f'{above}.mixer.{tensor.name}', tensor.form, parts))
  final_norm = Part(('final_norm', 'scale'))
  tensors.append(Tensor('backbone.norm_f.weight', Form.VECTOR, (final_norm,)))
  if not config.tie_embeddings:
    tensors.append(Tensor('lm_head.weight', Form.MATRIX, (Part(('head',)),)))
  return tensors


def param_shapes(config: ModelConfig) -> PyTree:
  """Returns float32 arrays of the parameters' shapes that take no memory."""
  boxed = jax.eval_shape(lambda: lm.boxed_params(config, jax.random.key(0)))
  zero = np.zeros((), np.float32)
  return jax.tree.map(lambda leaf: np.broadcast_to(zero, leaf.shape), nn.unbox(boxed))


def _rows_first(part: Part, params: PyTree, form: Form) -> np.ndarray:
  """Returns a view of the part, its axes in the order of the tensor's."""
  view = params
  for name in part.path:
    view = view[name]
  view = view[part.index]
  return np.moveaxis(view, 0, -1) if form in (Form.MATRIX, Form.FILTER) else view
