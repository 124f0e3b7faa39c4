"""The folder of a run that is at its last step, though nothing was trained."""

import jax

from ssm_moe import sharding
from ssm_moe.config import MeshConfig, to_dict
from ssm_moe.training import workdir
from ssm_moe.training.checkpoint import Checkpointer
from ssm_moe.training.program import Program


def write(config, folder):
  """Writes the config, and the initial state as that of the last step."""
  step = config.train.num_steps
  with jax.numpy_dtype_promotion('standard'):
    state = Program(config, sharding.make_mesh(MeshConfig(), jax.devices()[:1])).init_state()
  folder.mkdir()
  workdir.write_config(folder, config)
  with Checkpointer(folder / 'checkpoints', config=to_dict(config), keep_last=1) as checkpointer:
    checkpointer.save(step, state, metadata={'step': step})
    checkpointer.wait()
