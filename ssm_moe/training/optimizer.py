"""AdamW, its schedule, and which parameters decay."""

import functools
from typing import Any

import jax
import optax

from ssm_moe.config import OptimizerConfig

# Parameters that weight decay would pull away from what they mean: decay rates, skips, step sizes,
# norms and biases. mamba_ssm marks some of them by a hidden attribute, which trainers overlook.
NOT_DECAYED = frozenset({'A_log', 'D', 'dt_bias', 'conv1d_bias', 'scale', 'bias'})
# Moved by the balance of the load, outside the gradient: never decayed, whatever the mask.
_NOT_LEARNT = frozenset({'selection_bias'})


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Returns the learning rate by step.

  Linear warm-up from peak / steps, then: 'cosine' down to the final ratio; 'wsd' (warm-up, stable,
  decay) constant, with a linear fall to the final ratio over the last part; 'constant'.
  """
  peak = config.peak_learning_rate
  final = peak * config.final_learning_rate_ratio
  warmup = round(config.warmup_fraction * num_steps)
  warm_up = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup, 1))
  start = [warm_up] if warmup else []
  match config.schedule:
    case 'cosine':
      rest = max(num_steps - warmup, 1)
      parts = [*start, optax.cosine_decay_schedule(peak, rest, config.final_learning_rate_ratio)]
      boundaries = [warmup] if warmup else []
    case 'wsd':
      decay = round(config.decay_fraction * num_steps)
      fall = optax.linear_schedule(peak, final, max(decay, 1))
      parts = [*start, optax.constant_schedule(peak), fall]
      boundaries = [*([warmup] if warmup else []), num_steps - decay]
    case 'constant':
      parts = [*start, optax.constant_schedule(peak)]
      boundaries = [warmup] if warmup else []
  return optax.join_schedules(parts, boundaries)


def decay_mask(params: Any, setting: str = 'matrices') -> Any:
  """Returns True for each parameter that decays, by name.

  Args:
    params: Of the model.
    setting: 'matrices' leaves out `NOT_DECAYED`; 'all' leaves out only what is not learnt.
  """
  spared = _NOT_LEARNT | (NOT_DECAYED if setting == 'matrices' else frozenset())

  def decays(path, _):
    # Flax boxes with logical axes add an attribute to the path, below the parameter's own name.
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return names[-1] not in spared

  return jax.tree.map_with_path(decays, params)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
  """Returns clipping by global norm, then AdamW."""
  adamw = optax.adamw(
    make_schedule(config, num_steps),
    b1=config.beta1,
    b2=config.beta2,
    eps=config.epsilon,
    weight_decay=config.weight_decay,
    mask=functools.partial(decay_mask, setting=config.decay_mask),
  )
  if config.clip_norm is None:
    return adamw
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
