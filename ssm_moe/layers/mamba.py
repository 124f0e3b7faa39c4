"""The Mamba-1 mixer, dense or with routed projections (Routing Mamba)."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from ssm_moe.config import MambaConfig
from ssm_moe.layers import initializers
from ssm_moe.layers.rom import Decisions
from ssm_moe.layers.ssm_mixer import SSMMixer
from ssm_moe.ops.causal_conv1d import causal_conv1d
from ssm_moe.ops.selective_scan import selective_scan
from ssm_moe.shapes import Array, Float


class MambaState(NamedTuple):
  """What the mixer remembers of the tokens before.

  Attributes:
    conv_state: The last W - 1 inputs of the convolution.
    ssm_state: h, float32.
  """

  conv_state: Float[Array, 'B W-1 D']
  ssm_state: Float[Array, 'B D N']


def initial_state(config: MambaConfig, *, d_model: int, batch: int, dtype: jnp.dtype) -> MambaState:
  """Returns the state before any token."""
  d_inner = config.inner_size(d_model)
  return MambaState(
    conv_state=jnp.zeros((batch, config.d_conv - 1, d_inner), dtype),
    ssm_state=jnp.zeros((batch, d_inner, config.d_state), jnp.float32),
  )


class Mamba(SSMMixer):
  """A selective state-space layer between two projections.

  x, z = in_proj(input);  x = SiLU(conv1d(x));  dt, B, C = x_proj(x);  dt = softplus(dt_proj(dt))
  y = selective_scan(x, dt, A, B, C) * SiLU(z);  output = out_proj(y)
  Mamba, figure 3 (https://arxiv.org/abs/2312.00752).

  With `config.rom` a router chooses experts for each token. Routing Mamba's own setting chooses
  once, from the layer's input; the decision serves the conv projection (to x), the gate projection
  (to z) and the output projection. x and z are unweighted sums over the chosen experts; the
  router's probability is applied once, at the output. Convolution, x_proj, dt_proj and the scan are
  shared by all experts. Routing Mamba (https://arxiv.org/abs/2506.18145).
  """

  def setup(self):
    config = self.config
    d_inner, dt_rank = config.inner_size(self.d_model), config.rank(self.d_model)
    self.setup_routing()
    self.x_proj = self.projection(
      'x', initializers.linear(d_inner), ('inner', 'rank'), (dt_rank + 2 * config.d_state,)
    )
    self.dt_proj = self.projection(
      'dt', initializers.linear(dt_rank), ('rank', 'inner'), (d_inner,)
    )
    self.out_proj = self.projection(
      'out', initializers.linear(d_inner, self.output_scale), ('inner', 'embed'), (self.d_model,)
    )
    self.conv1d_kernel = self._param(
      'conv1d_kernel',
      initializers.linear(config.d_conv),
      ('conv', 'inner'),
      (config.d_conv, d_inner),
    )
    self.conv1d_bias = None
    if config.conv_bias:
      self.conv1d_bias = self._param(
        'conv1d_bias', initializers.linear(config.d_conv), ('inner',), (d_inner,)
      )
    self.dt_bias = self._param(
      'dt_bias',
      initializers.dt_bias(config.dt_min, config.dt_max, config.dt_init_floor),
      ('inner',),
      (d_inner,),
    )
    self.A_log = self._param(
      'A_log', initializers.A_log(config.d_state), ('inner', 'state'), (d_inner, config.d_state)
    )
    self.D = self._param('D', nn.initializers.ones, ('inner',), (d_inner,))

  def mix(self, inputs, decisions, state, segment_ids, scan_implementation):
    """Runs the layer between the decisions and the state."""
    if state is None:
      state = MambaState(None, None)
    x, z = self.project_in(inputs, decisions)
    x, conv_state = causal_conv1d(
      x,
      self.conv1d_kernel,
      self.conv1d_bias,
      activation='silu',
      segment_ids=segment_ids,
      state=state.conv_state,
    )
    dt, B, C = self._selection(x, decisions)
    y, ssm_state = selective_scan(
      x,
      dt,
      -jnp.exp(self.A_log),
      B,
      C,
      D=self.D,
      z=z,
      dt_bias=self.dt_bias,
      dt_softplus=True,
      segment_ids=segment_ids,
      h0=state.ssm_state,
      implementation=scan_implementation,
    )
    return self.out_proj(y, decisions.of('out', y)), MambaState(conv_state, ssm_state)

  def _selection(self, x: Array, decisions: Decisions) -> tuple[Array, Array, Array]:
    """Returns dt before bias and softplus, B and C, all functions of the token."""
    rank, d_state = self.config.rank(self.d_model), self.config.d_state
    selected = self.x_proj(x, decisions.of('x', x))
    dt, B, C = jnp.split(selected, (rank, rank + d_state), axis=-1)
    return self.dt_proj(dt, decisions.of('dt', dt)), B, C

  def _param(self, name, init, axes, shape):
    return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
