"""Parameters and floating-point operations of a model, in closed form, by component.

XLA's own counter is no help: it counts a grouped matmul once for every expert. A multiply and an
add are two operations; what a matmul, the scan or the convolution does is counted, elementwise
work (norms, activations, residuals, softmax) is not.
"""

import dataclasses

from ssm_moe.config import (
  AttentionConfig,
  Mamba2Config,
  MambaConfig,
  MLPConfig,
  ModelConfig,
  MoEConfig,
  NormConfig,
  RoMConfig,
  RoutingConfig,
)
from ssm_moe.layers.rom import num_matrices

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


def _router(rom: RoutingConfig, inputs: int) -> Cost:
  cost = _matmul(inputs, rom.num_experts)
  return cost + (_vector(rom.num_experts) if rom.selection_bias_rate else Cost())


def _projection(rom: RoMConfig, name: str, inputs: int, outputs: int) -> Cost:
  """A mixer's projection, routed or not, and the router if it has its own."""
  if rom.kind == 'none' or name not in rom.expert_projections:
    return _matmul(inputs, outputs)
  experts = num_matrices(rom)
  if rom.bottleneck is None:
    return _experts(inputs, outputs, experts, rom.top_k)
  down = _experts(inputs, rom.bottleneck, experts, rom.top_k)
  return down + _experts(rom.bottleneck, outputs, experts, rom.top_k)


def _mixer_routers(rom: RoMConfig, d_model: int, inputs: dict[str, int], decides: bool) -> Cost:
  """The routers of a mixer; `inputs` are the widths that its projections read."""
  if rom.kind == 'none':
    return Cost()
  if rom.kind == 'independent':
    return sum((_router(rom, inputs[name]) for name in rom.expert_projections), Cost())
  return _router(rom, d_model) if decides else Cost()


def _conv(size: int, width: int, bias: bool) -> Cost:
  params = size * width + (size if bias else 0)
  return Cost(total_params=params, active_params=params, flops_per_token=2 * size * width)


def _bias(config: MambaConfig | Mamba2Config, size: int) -> Cost:
  """The bias of a mixer's projections, which its experts share."""
  return _vector(size) if config.bias else Cost()


def mamba(config: MambaConfig, d_model: int, decides: bool = True) -> dict[str, Cost]:
  """Returns the cost of one mixer.

  The scan counts 8 operations for each channel and state: the decay's exponent and its exponential
  (2), the input dt B x (2; dt x is shared by the states), the update (2), the output (2).

  Args:
    config: Of the mixer.
    d_model: M.
    decides: Whether it has the router, where that is shared by a period.
  """
  d_inner, rank = config.inner_size(d_model), config.rank(d_model)
  d_state, rom = config.d_state, config.rom
  inputs = {'conv': d_model, 'gate': d_model, 'x': d_inner, 'dt': rank, 'out': d_inner}
  selection = _projection(rom, 'x', d_inner, rank + 2 * d_state)
  scan_params = d_inner * d_state + 2 * d_inner  # A_log, D, dt_bias
  return {
    'mamba_projections': _projection(rom, 'conv', d_model, d_inner)
    + _projection(rom, 'gate', d_model, d_inner)
    + _projection(rom, 'out', d_inner, d_model)
    + _bias(config, 2 * d_inner + d_model),
    'mamba_router': _mixer_routers(rom, d_model, inputs, decides),
    'mamba_conv': _conv(d_inner, config.d_conv, config.conv_bias),
    'mamba_selection': selection + _projection(rom, 'dt', rank, d_inner),
    'mamba_scan': Cost(
      total_params=scan_params,
      active_params=scan_params,
      flops_per_token=8 * d_inner * d_state,
    ),
  }


def mamba2(config: Mamba2Config, d_model: int, decides: bool = True) -> dict[str, Cost]:
  """Returns the cost of one mixer.

  The scan is counted as the recurrence, 6 operations for each channel and state: the input
  dt B x (2; dt x is shared by the states), the update (2), the output (2). Chunked, as matmuls, it
  does more of them, of a cheaper kind.
  """
  d_inner, heads = config.inner_size(d_model), config.num_heads(d_model)
  selected, rom = 2 * config.num_groups * config.d_state, config.rom
  inputs = dict.fromkeys(('conv', 'gate', 'x', 'dt'), d_model) | {'out': d_inner}
  scan_params = 3 * heads + d_inner  # A_log, D, dt_bias, and the scale of the gated norm
  return {
    'mamba2_projections': _projection(rom, 'conv', d_model, d_inner)
    + _projection(rom, 'gate', d_model, d_inner)
    + _projection(rom, 'out', d_inner, d_model)
    + _bias(config, 2 * d_inner + d_model),
    'mamba2_router': _mixer_routers(rom, d_model, inputs, decides),
    'mamba2_conv': _conv(d_inner + selected, config.d_conv, config.conv_bias),
    'mamba2_selection': _projection(rom, 'x', d_model, selected)
    + _projection(rom, 'dt', d_model, heads)
    + _bias(config, selected + heads),
    'mamba2_scan': Cost(
      total_params=scan_params,
      active_params=scan_params,
      flops_per_token=6 * d_inner * config.d_state,
    ),
  }


def attention(config: AttentionConfig, d_model: int, context: float) -> dict[str, Cost]:
  """Returns the cost of one mixer; `context` is the mean number of tokens that a token sees."""
  head_dim = config.head_size(d_model)
  queries, keys = config.num_heads * head_dim, config.kv_heads * head_dim
  projections = _matmul(d_model, queries + 2 * keys) + _matmul(queries, d_model)
  return {
    'attention_projections': projections,
    'attention_scores': Cost(flops_per_token=round(4 * queries * context)),
  }


def mean_context(sequence_length: int, window: int | None) -> float:
  """Returns how many tokens a token of a sequence sees on average, itself among them."""
  if window is None or window >= sequence_length:
    return (sequence_length + 1) / 2
  return window - window * (window - 1) / (2 * sequence_length)


def _feed_forward(d_model: int, d_ff: int, activation: str) -> list[tuple[int, int]]:
  """The shapes of the matrices of one feed-forward expert."""
  return [(d_model, d_ff)] * (2 if activation == 'swiglu' else 1) + [(d_ff, d_model)]


def mlp(config: MLPConfig, d_model: int) -> dict[str, Cost]:
  """Returns the cost of one dense feed-forward layer."""
  shapes = _feed_forward(d_model, config.hidden_size(d_model), config.activation)
  return {'mlp': sum((_matmul(*shape) for shape in shapes), Cost())}


def moe(config: MoEConfig, d_model: int) -> dict[str, Cost]:
  """Returns the cost of one feed-forward layer; dropped tokens count as if they were kept."""
  d_ff = config.hidden_size(d_model)
  shapes = _feed_forward(d_model, d_ff, config.activation)
  experts = sum((_experts(*shape, config.num_experts, config.top_k) for shape in shapes), Cost())
  shared = _feed_forward(d_model, config.num_shared_experts * d_ff, config.activation)
  own = config.routing == 'own'
  return {
    'moe_experts': experts,
    'moe_shared_experts': sum((_matmul(*shape) for shape in shared), Cost()),
    'moe_router': _router(config, d_model) if own else Cost(),
  }


def by_component(config: ModelConfig, sequence_length: int) -> dict[str, Cost]:
  """Returns the cost of each component of the model, over all its layers."""
  d_model, vocab = config.d_model, config.vocab_size
  costs = {'embedding': _vector(vocab * d_model)}
  one_period: list[dict[str, Cost]] = [{'norms': _norm(config.norm, d_model)}] * len(config.groups)
  period_has_router = False
  for letter in config.layers:
    routing = config.routing_of(letter)
    by_period = letter in 'MS' and routing is not None and routing.kind == 'period'
    decides = not (by_period and period_has_router)
    period_has_router |= by_period
    one_period.append(_layer(config, letter, sequence_length, decides))
  for layer in one_period:
    for name, cost in layer.items():
      costs[name] = costs.get(name, Cost()) + cost.times(config.num_periods)
  if config.final_norm:
    costs['norms'] += _norm(config.norm, d_model)
  head = _matmul(d_model, vocab)
  if config.tie_embeddings:  # its parameters are the embedding's
    head = Cost(flops_per_token=head.flops_per_token)
  costs['head'] = head
  return {name: cost for name, cost in costs.items() if cost != Cost()}


def _layer(
  config: ModelConfig, letter: str, sequence_length: int, decides: bool
) -> dict[str, Cost]:
  d_model = config.d_model
  match letter:
    case 'M' | 'S':
      of_letter, mixer = (mamba, config.mamba) if letter == 'M' else (mamba2, config.mamba2)
      return of_letter(mixer, d_model, decides)
    case 'm':
      return mamba(dataclasses.replace(config.mamba, rom=RoMConfig()), d_model)
    case 's':
      return mamba2(dataclasses.replace(config.mamba2, rom=RoMConfig()), d_model)
    case 'A' | 'W':
      window = config.attention.window if letter == 'W' else None
      return attention(config.attention, d_model, mean_context(sequence_length, window))
    case 'F':
      return mlp(config.mlp, d_model)
    case _:
      return moe(config.moe, d_model)


def account(config: ModelConfig, sequence_length: int) -> dict:
  """Returns the figures of the whole model and, under 'components', of each part.

  `flops_per_token_train` is forward and backward, without what rematerialisation computes again.

  Args:
    config: Of the model.
    sequence_length: L, which the cost of attention depends on: scores and values over the mean
      number of tokens that a token of such a sequence sees.
  """
  components = by_component(config, sequence_length)
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
