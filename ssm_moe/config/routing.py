"""How tokens choose experts, in feed-forward layers and in the projections of mixers."""

import dataclasses
from typing import Literal

from ssm_moe.config.checks import Checked, check, check_fraction, check_not_negative, check_positive

Activation = Literal['relu', 'swiglu']
Exchange = Literal['padded', 'ragged']


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingConfig(Checked):
  """How tokens choose experts: of feed-forward layers and of projections alike."""

  num_experts: int = 8
  top_k: int = 1
  score: Literal['softmax', 'sigmoid'] = 'softmax'
  # raw: the score itself, as in both papers; renormalized: divided by the sum over the chosen;
  # uniform: 1 / top_k with the gradient of the score, so that experts which are all equal are
  # together the dense layer that each is a copy of (`interop/upcycle.py`).
  weights: Literal['raw', 'renormalized', 'uniform'] = 'raw'
  # Balance without a loss: a bias that only the selection sees rises by this much a step for an
  # expert with less than its share, and falls for one with more. 0 has no bias; 1e-3 is usual.
  selection_bias_rate: float = 0.0
  dispatch: Literal['dropless', 'capacity', 'dense'] = 'dropless'
  # expert_capacity = capacity_factor * tokens * top_k / num_experts in each router group, rounded
  # up or down to a multiple of capacity_multiple.
  capacity_factor: float = 1.0
  capacity_rounding: Literal['up', 'down'] = 'up'
  capacity_multiple: int = 1
  # Tokens compete for capacity inside a group only, so drops do not depend on the device count.
  router_groups: int = 1
  load_balancing_coefficient: float = 0.0
  router_z_coefficient: float = 0.0
  # A token whose best score is lower takes no routed expert, but what stands in for all of them:
  # the shared expert of a feed-forward layer, one more expert of projections. 0: never.
  fallback_threshold: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    check_positive(self, 'num_experts', 'top_k', 'capacity_factor')
    check_positive(self, 'capacity_multiple', 'router_groups')
    check_not_negative(self, 'load_balancing_coefficient', 'router_z_coefficient')
    check_not_negative(self, 'selection_bias_rate')
    check_fraction(self, 'fallback_threshold')
    check(
      self.top_k <= self.num_experts,
      f'top_k is {self.top_k}; it must be at most num_experts, {self.num_experts}',
    )
    check(
      not (self.weights == 'renormalized' and self.top_k == 1),
      'weights is renormalized; with top_k 1 every weight would be 1 and the router would learn '
      'nothing, it must be raw or uniform',
    )


Projection = Literal['conv', 'gate', 'out', 'x', 'dt']


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoMConfig(RoutingConfig):
  """Experts on a mixer's projections: Routing Mamba, and MoE-Mamba's "inner MoE".

  shared: one router a layer; period: one router for all routed mixers of a period; independent: a
  router for each projection, which reads what the projection reads.

  The paper uses no balance loss: the load is reported, not forced.
  """

  kind: Literal['none', 'shared', 'period', 'independent'] = 'none'
  # conv: to x; gate: to z; x: to B and C (Mamba-1: and to dt's low rank); dt: to dt.
  expert_projections: tuple[Projection, ...] = ('conv', 'gate', 'out')
  # out: the weight multiplies the output projection (of a dense one, the mixer's output), others
  # are the sum over the chosen experts, or the mean with uniform weights; each: every routed
  # projection; straight_through: as out, or as each when independent, with a forward value of 1 and
  # the gradient of the score.
  weight_at: Literal['out', 'each', 'straight_through'] = 'out'
  # Width of two-matrix ReLU experts, as in MoE-Mamba's code; None has experts of one matrix.
  bottleneck: int | None = None

  def __post_init__(self):
    super().__post_init__()
    check_positive(self, 'bottleneck')
    check(bool(self.expert_projections), 'expert_projections is empty; name at least one')
    check(
      len(set(self.expert_projections)) == len(self.expert_projections),
      f'expert_projections is {self.expert_projections}; each may be named once',
    )
    check(
      not (self.kind == 'independent' and self.weight_at == 'out'),
      'weight_at is out; independent routers learn through their own projections, it must be each '
      'or straight_through',
    )
    check(
      not (self.weight_at == 'straight_through' and self.weights == 'uniform'),
      'weights is uniform; weight_at straight_through has a value of its own, it must be out or '
      'each',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(RoutingConfig):
  """The sparse feed-forward layer, Switch as MoE-Mamba has it by default; pattern letter E."""

  num_experts: int = 32
  d_ff: int | None = None  # 3 * d_model if None, the width at which Mamba and expert are equal
  activation: Activation = 'relu'
  dispatch: Literal['dropless', 'capacity', 'dense'] = 'capacity'
  load_balancing_coefficient: float = 0.01
  # token: each token chooses top_k experts. expert: each expert chooses its capacity of tokens,
  # which looks at later tokens: refused where a model must not, unless allow_acausal.
  choice: Literal['token', 'expert'] = 'token'
  allow_acausal: bool = False
  # own: a router in the layer; mixer: the decision of the routed mixer before it in the period.
  routing: Literal['own', 'mixer'] = 'own'
  # How tokens go to the devices of their experts, where there is no capacity, by collectives of
  # fixed size or, on GPUs and TPUs, of uneven sizes. On two H200s padded is faster.
  exchange: Exchange = 'padded'
  num_shared_experts: int = 0  # that every token passes through besides, each as wide as one expert

  def __post_init__(self):
    super().__post_init__()
    check_positive(self, 'd_ff')
    check_not_negative(self, 'num_shared_experts')
    check(
      not (self.choice == 'expert' and self.routing == 'mixer'),
      'choice is expert; with routing by the mixer it must be token',
    )
    check(
      not (self.choice == 'expert' and self.weights == 'uniform'),
      'weights is uniform, by the number of experts that a token chose; with choice expert it must '
      'be raw',
    )
    check(
      not (self.choice == 'expert' and self.selection_bias_rate),
      'selection_bias_rate balances what tokens choose; with choice expert it must be 0',
    )
    check(
      not (self.fallback_threshold and not self.num_shared_experts),
      'fallback_threshold needs an expert that every token can take: num_shared_experts must be at '
      'least 1',
    )
    check(
      not (self.fallback_threshold and self.choice == 'expert'),
      'fallback_threshold asks what a token chose; with choice expert it must be 0',
    )

  def hidden_size(self, d_model: int) -> int:
    return 3 * d_model if self.d_ff is None else self.d_ff
