"""Balance worked out by hand."""

import numpy as np

from ssm_moe.analysis.balance import routing_statistics


def test_routing_statistics_by_hand():
  loads = [[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [1.0]]
  assert routing_statistics([np.float32(load) for load in loads]) == {
    'expert_load_entropy': [1.0, 0.0, 0.5, 1.0],  # ln 2 / ln 4 = 1/2
    'max_violation': [0.0, 3.0, 1.0, 0.0],
    'dead_experts': [0, 3, 2, 0],
  }
