"""Parameters and floating-point operations of a model, in closed form, by component.

XLA's own counter is no help: it counts a grouped matmul once for every expert. A multiply and an
add are two operations; what a matmul, the scan or the convolution does is counted, elementwise
work (norms, activations, residuals, softmax) is not.
"""

import dataclasses

from ssm_moe.config import MambaConfig, ModelConfig, MoEConfig, NormConfig

# A backward pass computes two products for each product of the forward pass.
BACKWARD_OVER_FORWARD = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
  """Of a component.

  Attributes:
    total_params: All parameters.
    active_params: Those that one token touches: K / E of the weights of experts.
    flops_per_token: Forward pass.
  """

  total_params: int = 0
  active_params: int = 0
  flops_per_token: int = 0

  def __add__(self, other: 'Cost') -> 'Cost':
    return Cost(
      **{
        field.name: getattr(self, field.name) + getattr(other, field.name)
        for field in dataclasses.fields(self)
      }
    )

  def times(self, count: int) -> 'Cost':
    return Cost(**{name: value * count for name, value in dataclasses.asdict(self).items()})


def _matmul(inputs: int, outputs: int) -> Cost:
  size = inputs * outputs
  return Cost(total_params=size, active_params=size, flops_per_token=2 * size)


def _experts(inputs: int, outputs: int, num_experts: int, top_k: int) -> Cost:
  size = inputs * outputs
  return Cost(
    total_params=num_experts * size,
    active_params=top_k * size,
    flops_per_token=2 * top_k * size,
  )


def _vector(size: int) -> Cost:
  return Cost(total_params=size, active_params=size)


def _norm(config: NormConfig, d_model: int) -> Cost:
  return _vector(d_model * (1 if config.kind == 'rms' else 2))


def mamba(config: MambaConfig, d_model: int) -> dict[str, Cost]:
  """Returns the cost of one mixer.

  The scan counts 8 operations for each channel and state: the decay's exponent and its exponential
  (2), the input dt B x (2; dt x is shared by the states), the update (2), the output (2).
  """
  d_inner, rank = config.inner_size(d_model), config.rank(d_model)
  d_state, width = config.d_state, config.d_conv
  rom = config.rom
  if rom.kind == 'none':
    projections = _matmul(d_model, 2 * d_inner) + _matmul(d_inner, d_model)
    router = Cost()
  else:
    projections = _experts(d_model, 2 * d_inner, rom.num_experts, rom.top_k)
    projections += _experts(d_inner, d_model, rom.num_experts, rom.top_k)
    router = _matmul(d_model, rom.num_experts)
  conv_size = d_inner * width
  scan_params = d_inner * d_state + 2 * d_inner  # A_log, D, dt_bias
  return {
    'mamba_projections': projections,
    'mamba_router': router,
    'mamba_conv': Cost(
      total_params=conv_size + d_inner,
      active_params=conv_size + d_inner,
      flops_per_token=2 * conv_size,
    ),
    'mamba_selection': _matmul(d_inner, rank + 2 * d_state) + _matmul(rank, d_inner),
    'mamba_scan': Cost(
      total_params=scan_params,
      active_params=scan_params,
      flops_per_token=8 * d_inner * d_state,
    ),
  }


def moe(config: MoEConfig, d_model: int) -> dict[str, Cost]:
  """Returns the cost of one feed-forward layer; dropped tokens count as if they were kept."""
  d_ff = config.hidden_size(d_model)
  experts = _experts(d_model, d_ff, config.num_experts, config.top_k)
  experts += _experts(d_ff, d_model, config.num_experts, config.top_k)
  return {'moe_experts': experts, 'moe_router': _matmul(d_model, config.num_experts)}


def by_component(config: ModelConfig) -> dict[str, Cost]:
  """Returns the cost of each component of the model, over all its layers."""
  d_model, vocab = config.d_model, config.vocab_size
  costs = {'embedding': _vector(vocab * d_model)}
  for letter in config.layers:
    layer = mamba(config.mamba, d_model) if letter == 'M' else moe(config.moe, d_model)
    layer['norms'] = _norm(config.norm, d_model)
    for name, cost in layer.items():
      costs[name] = costs.get(name, Cost()) + cost.times(config.num_periods)
  if config.final_norm:
    costs['norms'] += _norm(config.norm, d_model)
  head = _matmul(d_model, vocab)
  if config.tie_embeddings:  # its parameters are the embedding's
    head = Cost(flops_per_token=head.flops_per_token)
  costs['head'] = head
  return {name: cost for name, cost in costs.items() if cost != Cost()}


def account(config: ModelConfig) -> dict:
  """Returns the figures of the whole model and, under 'components', of each part.

  `flops_per_token_train` is forward and backward, without what rematerialisation computes again.
  """
  components = by_component(config)
  total = sum(components.values(), Cost())
  vocabulary = sum((components[name] for name in ('embedding', 'head')), Cost())
  return {
    'total_params': total.total_params,
    'active_params': total.active_params,
    'non_embedding_params': total.total_params - vocabulary.total_params,
    'active_non_embedding_params': total.active_params - vocabulary.active_params,
    'flops_per_token_forward': total.flops_per_token,
    'flops_per_token_train': (1 + BACKWARD_OVER_FORWARD) * total.flops_per_token,
    'components': {name: dataclasses.asdict(cost) for name, cost in components.items()},
  }
