"""States that are small enough for tests, and checkpointers for them."""

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from ssm_moe import config as config_lib
from ssm_moe.training.checkpoint import Checkpointer

CONFIG = config_lib.to_dict(config_lib.ExperimentConfig())


def make(directory, *, keep_last=3, config=CONFIG):
  return Checkpointer(directory, config=config, keep_last=keep_last)


def template_of(state, sharding=None):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state
  )


def small_state(value=0.0):
  device = SingleDeviceSharding(jax.devices()[0])
  state = {'params': {'kernel': jnp.arange(12.0).reshape(3, 4) + value}, 'step': jnp.int32(value)}
  return jax.device_put(state, device)


def save_steps(checkpointer, steps, losses=None):
  for index, step in enumerate(steps):
    loss = losses[index] if losses else None
    checkpointer.save(step, small_state(step), metadata={'tokens': step}, valid_loss=loss)
  checkpointer.wait()
