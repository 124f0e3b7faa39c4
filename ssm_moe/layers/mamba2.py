"""The Mamba-2 mixer, dense or with routed projections."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ssm_moe.config import Mamba2Config
from ssm_moe.layers import initializers
from ssm_moe.layers.ssm_mixer import SSMMixer
from ssm_moe.ops.causal_conv1d import causal_conv1d
from ssm_moe.ops.ssd import ssd
from ssm_moe.shapes import Array, Float


class Mamba2State(NamedTuple):
  """What the mixer remembers of the tokens before.

  Attributes:
    conv_state: The last W - 1 inputs of the convolution of x.
    BC_conv_state: Of that of B and C, B of every group before C of every group.
    ssm_state: h, float32.
  """

  conv_state: Float[Array, 'B W-1 D']
  BC_conv_state: Float[Array, 'B W-1 2*G*N']
  ssm_state: Float[Array, 'B H P N']


def initial_state(
  config: Mamba2Config, *, d_model: int, batch: int, dtype: jnp.dtype
) -> Mamba2State:
  """Returns the state before any token."""
  past, d_inner = config.d_conv - 1, config.inner_size(d_model)
  heads = (config.num_heads(d_model), config.head_dim)
  return Mamba2State(
    conv_state=jnp.zeros((batch, past, d_inner), dtype),
    BC_conv_state=jnp.zeros((batch, past, 2 * config.num_groups * config.d_state), dtype),
    ssm_state=jnp.zeros((batch, *heads, config.d_state), jnp.float32),
  )


class Mamba2(SSMMixer):
  """A state-space layer with one decay a head, between projections that all read the input.

  x, z = in_proj(input);  B, C = x_proj(input);  dt = softplus(dt_proj(input))
  x, B, C = SiLU(conv1d(x, B, C));  y = ssd(x, dt, A, B, C)
  output = out_proj(RMSNorm(y * SiLU(z)))
  Mamba-2, figure 6 on the right (https://arxiv.org/abs/2405.21060): parameters and function are
  those of the published block (`mamba_ssm/modules/mamba2.py`), whose one projection and one
  convolution stand apart here. x, z and dt go over `tensor` with their heads; B and C are few and
  every head of a group reads them, so each device keeps them whole.

  With `config.rom` a router chooses experts for each token, as in `Mamba`: of the projections to x
  ('conv'), to z ('gate'), to B and C ('x'), to dt ('dt') and of the output ('out'). Routing Mamba
  (https://arxiv.org/abs/2506.18145).
  """

  biased = frozenset({'conv', 'gate', 'x', 'dt', 'out'})

  def setup(self):
    config = self.config
    d_inner, num_heads = config.inner_size(self.d_model), config.num_heads(self.d_model)
    self.setup_routing()
    in_init = initializers.linear(self.d_model)
    BC_axes, BC_features = ('branch', 'groups', 'state'), (2, config.num_groups, config.d_state)
    self.x_proj = self.projection('x', in_init, ('embed', *BC_axes), BC_features)
    self.dt_proj = self.projection('dt', in_init, ('embed', 'heads'), (num_heads,))
    self.out_proj = self.projection(
      'out', initializers.linear(d_inner, self.output_scale), ('inner', 'embed'), (self.d_model,)
    )
    width, bias = config.d_conv, config.conv_bias
    self.conv1d = _Convolution(width, (d_inner,), ('inner',), bias)
    self.BC_conv1d = _Convolution(width, BC_features, BC_axes, bias)
    self.dt_bias = self._head_param(
      'dt_bias', initializers.dt_bias(config.dt_min, config.dt_max, config.dt_init_floor)
    )
    self.A_log = self._head_param('A_log', _log_uniform(config.A_min, config.A_max))
    self.D = self._head_param('D', nn.initializers.ones)
    self.norm = _GatedRMSNorm(config.num_groups, config.norm_epsilon)

  def mix(self, inputs, decisions, state, segment_ids, scan_implementation):
    """Runs the layer between the decisions and the state."""
    if state is None:
      state = Mamba2State(None, None, None)
    x, z = self.project_in(inputs, decisions)
    BC = self.x_proj(inputs, decisions.of('x', inputs))
    dt = self.dt_proj(inputs, decisions.of('dt', inputs))
    x, conv_state = self.conv1d(x, segment_ids, state.conv_state)
    BC, BC_conv_state = self.BC_conv1d(BC, segment_ids, state.BC_conv_state)
    y, ssm_state = ssd(
      x.reshape(*x.shape[:2], -1, self.config.head_dim),
      dt,
      -jnp.exp(self.A_log),
      BC[:, :, 0],
      BC[:, :, 1],
      D=self.D,
      dt_bias=self.dt_bias,
      dt_softplus=True,
      segment_ids=segment_ids,
      h0=state.ssm_state,
      implementation=scan_implementation,
    )
    y = self.norm(y.reshape(x.shape), z)
    y = self.out_proj(y, decisions.of('out', y))
    return y, Mamba2State(conv_state, BC_conv_state, ssm_state)

  def _head_param(self, name, init):
    boxed = nn.with_logical_partitioning(init, ('heads',))
    return self.param(name, boxed, (self.config.num_heads(self.d_model),), jnp.float32)


class _Convolution(nn.Module):
  """SiLU of a depthwise causal convolution; the state is flat over the features."""

  width: int
  features: tuple[int, ...]
  axes: tuple[str, ...]
  bias: bool

  @nn.compact
  def __call__(self, x: Array, segment_ids: Array | None, state: Array | None):
    init = initializers.linear(self.width)
    kernel = self._param('kernel', init, ('conv', *self.axes), (self.width, *self.features))
    bias = None
    if self.bias:
      bias = self._param('bias', init, self.axes, self.features).reshape(-1)
    y, state = causal_conv1d(
      x.reshape(*x.shape[:2], -1),
      kernel.reshape(self.width, -1),
      bias,
      activation='silu',
      segment_ids=segment_ids,
      state=state,
      # B and C are whole on every device.
      channels='inner' if self.axes == ('inner',) else None,
    )
    return y.reshape(x.shape), state

  def _param(self, name, init, axes, shape):
    return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


class _GatedRMSNorm(nn.Module):
  """RMSNorm(y * SiLU(z)) * scale, in float32; each group of channels has statistics of its own."""

  num_groups: int
  epsilon: float

  @nn.compact
  def __call__(self, y: Float[Array, 'B L D'], z: Float[Array, 'B L D']) -> Float[Array, 'B L D']:
    init = nn.with_logical_partitioning(nn.initializers.ones, ('inner',))
    scale = self.param('scale', init, y.shape[-1:], jnp.float32)
    gated = y.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
    groups = gated.reshape(*gated.shape[:2], self.num_groups, -1)
    mean_square = jnp.mean(jnp.square(groups), axis=-1, keepdims=True)
    normed = (groups * jax.lax.rsqrt(mean_square + self.epsilon)).reshape(gated.shape)
    return (normed * scale[None, None, :]).astype(y.dtype)


def _log_uniform(low: float, high: float) -> nn.initializers.Initializer:
  """The logarithm of values drawn uniformly from [low, high]."""

  def init(key, shape, dtype=jnp.float32):
    return jnp.log(jax.random.uniform(key, shape, dtype, low, high))

  return init
