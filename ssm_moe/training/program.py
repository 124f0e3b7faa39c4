"""The compiled functions of a run: what is built once from a config and a mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ssm_moe import sharding
from ssm_moe.config import ExperimentConfig
from ssm_moe.models import lora
from ssm_moe.ops import implementation
from ssm_moe.shapes import PyTree
from ssm_moe.training import step as step_lib
from ssm_moe.training import trainable
from ssm_moe.training.mesh_checks import check_fits
from ssm_moe.training.optimizer import make_optimizer


class Program:
  """The compiled functions of a run and the layouts of their arrays.

  Attributes:
    state_shardings: Layout of each array of a `TrainState`.
    template: A `TrainState` of shapes with their layouts.
    num_trained: Parameters that steps change.
    batch_template: Likewise a batch.
    logical_axes: A `TrainState` of the logical axes of each array.
  """

  def __init__(self, config: ExperimentConfig, mesh: jax.sharding.Mesh):
    check_fits(config, mesh)
    self._optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    self._init = functools.partial(step_lib.init_train_state, config, self._optimizer)
    self._seed = config.train.seed
    boxed = jax.eval_shape(self._init, jax.random.key(0))
    self.state_shardings = step_lib.state_shardings(mesh, boxed)
    self.logical_axes = nn.get_partition_spec(boxed)
    self.template = step_lib.laid_out(boxed, self.state_shardings)
    learnt = trainable.learnt(self.template.params, self.template.adapters, config)
    self.num_trained = sum(leaf.size for leaf in jax.tree.leaves(learnt))
    shapes = _batch_shapes(config)
    self._batch_shardings = {
      name: sharding.token_sharding(mesh) if len(shape) > 1 else sharding.batch_sharding(mesh)
      for name, (shape, _) in shapes.items()
    }
    self.batch_template = {
      name: jax.ShapeDtypeStruct(shape, dtype, sharding=self._batch_shardings[name])
      for name, (shape, dtype) in shapes.items()
    }
    whole = sharding.replicated(mesh)
    self._train_step = jax.jit(
      for_mesh(step_lib.make_train_step(config, self._optimizer), mesh),
      donate_argnums=0,
      in_shardings=(self.state_shardings, self._batch_shardings),
      out_shardings=(self.state_shardings, whole),
    )
    self._merge = jax.jit(
      functools.partial(lora.merged, config=config.lora), out_shardings=self.state_shardings.params
    )
    self.eval_step = jax.jit(
      for_mesh(step_lib.make_eval_step(config), mesh),
      in_shardings=(self.state_shardings.params, self._batch_shardings),
      out_shardings=whole,
    )

  def init_state(self, params: PyTree | None = None) -> step_lib.TrainState:
    """Returns the state before the first step, the same on every mesh.

    Args:
      params: To begin with, laid out as in `template`; they are donated. New ones if None.
    """

    def init(key, params):
      state = nn.unbox(self._init(key))
      return state if params is None else state.replace(params=params)

    init = jax.jit(init, donate_argnums=1, out_shardings=self.state_shardings)
    return init(jax.random.key(self._seed), params)

  def model_params(self, state: step_lib.TrainState) -> Any:
    """Returns the parameters that the model runs with, whatever of them is trained."""
    return state.params if state.adapters is None else self._merge(state.params, state.adapters)

  def put(self, batch: dict[str, np.ndarray]) -> step_lib.Batch:
    """Moves this process' rows of a batch to its devices."""

    def put(name, rows):
      layout, shape = self._batch_shardings[name], None
      if jax.process_count() > 1:
        # A process has whole rows, also those of which its devices hold a piece only.
        shape = (self.batch_template[name].shape[0], *rows.shape[1:])
      return jax.make_array_from_process_local_data(layout, rows, shape)

    return {name: put(name, rows) for name, rows in batch.items()}

  def compile_train_step(self, state: step_lib.TrainState, batch: step_lib.Batch):
    """Compiles ahead of the first step, so that no step's time has it in."""
    return self.lower_train_step(state, batch).compile()

  def lower_train_step(
    self, state: step_lib.TrainState, batch: step_lib.Batch
  ) -> jax.stages.Lowered:
    """Traces the training step; `template` and `batch_template` will do, without any array."""
    return self._train_step.lower(state, batch)


def for_mesh(function: Callable[..., Any], mesh: jax.sharding.Mesh) -> Callable[..., Any]:
  """Lets what is traced in `function` know how many devices it is for, and by which axes."""

  @functools.wraps(function)
  def traced(*arguments):
    with implementation.on_devices(mesh.size), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*arguments)

  return traced


def _batch_shapes(config: ExperimentConfig) -> dict[str, tuple[tuple[int, ...], jnp.dtype]]:
  rows, length = config.train.batch_size, config.train.sequence_length
  tokens = ((rows, length), jnp.dtype(jnp.int32))
  return {
    'inputs': tokens,
    'targets': tokens,
    'segment_ids': tokens,
    'loss_mask': ((rows, length), jnp.dtype(jnp.float32)),
    'continues': ((rows,), jnp.dtype(jnp.bool_)),
  }
