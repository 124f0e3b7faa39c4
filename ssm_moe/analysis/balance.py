"""How evenly a layer's experts are used, as numbers."""

import math
from collections.abc import Sequence

import numpy as np

from ssm_moe.shapes import Float


def routing_statistics(expert_load: Sequence[Float[np.ndarray, '_']]) -> dict[str, list]:
  """Returns what a row says of expert balance, with one number a layer.

  Returns:
    expert_load_entropy: -sum p ln p / ln E; 1 is perfect balance, 0 a single expert.
    max_violation: E max(p) - 1; 0 is perfect balance, E - 1 a single expert.
    dead_experts: Experts that no token chose.
  """
  entropy, violation, dead = [], [], []
  for load in expert_load:
    load = np.asarray(load, np.float64)
    chosen = load[load > 0]
    nats = float(-(chosen * np.log(chosen)).sum())
    entropy.append(nats / math.log(len(load)) if len(load) > 1 else 1.0)
    violation.append(float(len(load) * load.max() - 1))
    dead.append(int((load == 0).sum()))
  return {'expert_load_entropy': entropy, 'max_violation': violation, 'dead_experts': dead}
