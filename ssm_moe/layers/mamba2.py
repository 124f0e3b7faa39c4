"""The Mamba-2 mixer, dense or with routed projections."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ssm_moe.config import Mamba2Config
from ssm_moe.layers import initializers, rom
from ssm_moe.layers.projection import Projection
from ssm_moe.layers.rom import Decisions, MixerAux, MixerRoutes, ProjectionRouting
from ssm_moe.layers.router import Routing
from ssm_moe.ops.causal_conv1d import causal_conv1d
from ssm_moe.ops.ssd import ssd
from ssm_moe.shapes import Array, Bool, Float, Int

_NORM_EPSILON = 1e-5


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


class Mamba2(nn.Module):
  """A state-space layer with one decay a head, between projections that all read the input.

  x, z = in_proj(input);  B, C = x_proj(input);  dt = softplus(dt_proj(input))
  x, B, C = SiLU(conv1d(x, B, C));  y = ssd(x, dt, A, B, C)
  output = out_proj(RMSNorm(y * SiLU(z)))
  Mamba-2, figure 6 on the right (https://arxiv.org/abs/2405.21060): parameters and function are
  those of the published block (`mamba_ssm/modules/mamba2.py`), whose one projection and one
  convolution stand apart here. x, z and dt go over `tensor` with their heads; B and C are few and
  every head of a group reads them, so each device keeps them whole.

  With `mamba2.rom` a router chooses experts for each token, as in `Mamba`: of the projections to x
  ('conv'), to z ('gate'), to B and C ('x'), to dt ('dt') and of the output ('out'). Routing Mamba
  (https://arxiv.org/abs/2506.18145).

  Attributes:
    mamba2: Its config.
    d_model: M.
    router_init: Gives the routers' initializer by their fan-in.
    output_scale: Scales the initial output projection; 1 / sqrt(residual branches) in Samba.
    dtype: Of the matrix work. dt, A_log, D, the norm, the router and the state are float32.
    record_routes: Whether to report every token's routes.
  """

  mamba2: Mamba2Config
  d_model: int
  router_init: Callable[[int], nn.initializers.Initializer]
  output_scale: float
  dtype: jnp.dtype
  record_routes: bool = False

  def setup(self):
    config = self.mamba2
    d_inner, num_heads = config.inner_size(self.d_model), config.num_heads(self.d_model)
    self.routing = ProjectionRouting(config.rom, self.router_init, self.record_routes)
    in_init = initializers.linear(self.d_model)
    if rom.one_in_projection(config.rom):
      # Conv and gate are one matmul, their axis apart from d_inner, as in Mamba.
      self.in_proj = self._projection('conv', in_init, ('embed', 'branch', 'inner'), (2, d_inner))
    else:
      self.conv_proj = self._projection('conv', in_init, ('embed', 'inner'), (d_inner,))
      self.gate_proj = self._projection('gate', in_init, ('embed', 'inner'), (d_inner,))
    BC_axes, BC_features = ('branch', 'groups', 'state'), (2, config.num_groups, config.d_state)
    self.x_proj = self._projection('x', in_init, ('embed', *BC_axes), BC_features)
    self.dt_proj = self._projection('dt', in_init, ('embed', 'heads'), (num_heads,))
    self.out_proj = self._projection(
      'out', initializers.linear(d_inner, self.output_scale), ('inner', 'embed'), (self.d_model,)
    )
    self.conv1d = _Convolution(config.d_conv, (d_inner,), ('inner',))
    self.BC_conv1d = _Convolution(config.d_conv, BC_features, BC_axes)
    self.dt_bias = self._head_param(
      'dt_bias', initializers.dt_bias(config.dt_min, config.dt_max, config.dt_init_floor)
    )
    self.A_log = self._head_param('A_log', _log_uniform(config.A_min, config.A_max))
    self.D = self._head_param('D', nn.initializers.ones)
    self.norm = _GatedRMSNorm(config.num_groups)

  def __call__(
    self,
    x: Float[Array, 'B L M'],
    *,
    segment_ids: Int[Array, 'B L'] | None = None,
    mask: Bool[Array, 'B L'] | None = None,
    state: Mamba2State | None = None,
    routes: MixerRoutes | None = None,
    given: Routing | None = None,
  ) -> tuple[Float[Array, 'B L M'], Mamba2State, MixerAux, Routing | None]:
    """Runs over a sequence.

    Args:
      x: Input.
      segment_ids: Document of each token: nothing flows from one to the next.
      mask: Tokens that count in the routing statistics and take capacity; all if None.
      state: What came before the first token; nothing if None.
      routes: By router, decisions to take in place of its own.
      given: The decision of the period's first routed mixer, where that is shared.

    Returns:
      The output, the state after the last token, by router its losses and statistics, and the
      decision that all projections shared, if they did.
    """
    scan = self.mamba2.scan_implementation
    return self._mix(x, segment_ids, mask, state, routes, given, scan)

  def step(
    self, x: Float[Array, 'B M'], state: Mamba2State, *, given: Routing | None = None
  ) -> tuple[Float[Array, 'B M'], Mamba2State, Routing | None]:
    """Runs over one more token. Equal to `__call__`, at a cost that no length enters."""
    # One step of the sequential form is the recurrence itself, without matrices of one row.
    y, state, _, routing = self._mix(x[:, None], None, None, state, None, given, 'reference')
    return y[:, 0], state, routing

  def _mix(self, inputs, segment_ids, mask, state, routes, given, scan_implementation):
    if state is None:
      state = Mamba2State(None, None, None)
    decisions = self.routing(inputs, mask=mask, routes=routes, given=given)

    x, z = self._project_in(inputs, decisions)
    BC = self.x_proj(inputs, decisions.of('x', inputs))
    dt = self.dt_proj(inputs, decisions.of('dt', inputs))
    x, conv_state = self.conv1d(x, segment_ids, state.conv_state)
    BC, BC_conv_state = self.BC_conv1d(BC, segment_ids, state.BC_conv_state)
    y, ssm_state = ssd(
      x.reshape(*x.shape[:2], -1, self.mamba2.head_dim),
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
    state = Mamba2State(conv_state, BC_conv_state, ssm_state)
    return decisions.scale_output(y), state, decisions.aux, decisions.routing

  def _project_in(self, inputs: Array, decisions: Decisions) -> tuple[Array, Array]:
    if rom.one_in_projection(self.mamba2.rom):
      xz = self.in_proj(inputs, decisions.of('conv', inputs))
      return xz[:, :, 0], xz[:, :, 1]
    return (
      self.conv_proj(inputs, decisions.of('conv', inputs)),
      self.gate_proj(inputs, decisions.of('gate', inputs)),
    )

  def _projection(self, projection, init, axes, features) -> Projection:
    experts = rom.experts_of(self.mamba2.rom, projection)
    return Projection(features, axes, init, self.dtype, **experts)

  def _head_param(self, name, init):
    boxed = nn.with_logical_partitioning(init, ('heads',))
    return self.param(name, boxed, (self.mamba2.num_heads(self.d_model),), jnp.float32)


class _Convolution(nn.Module):
  """SiLU of a depthwise causal convolution with bias; the state is flat over the features."""

  width: int
  features: tuple[int, ...]
  axes: tuple[str, ...]

  @nn.compact
  def __call__(self, x: Array, segment_ids: Array | None, state: Array | None):
    init = initializers.linear(self.width)
    kernel = self._param('kernel', init, ('conv', *self.axes), (self.width, *self.features))
    bias = self._param('bias', init, self.axes, self.features)
    y, state = causal_conv1d(
      x.reshape(*x.shape[:2], -1),
      kernel.reshape(self.width, -1),
      bias.reshape(-1),
      segment_ids=segment_ids,
      state=state,
    )
    return jax.nn.silu(y).reshape(x.shape), state

  def _param(self, name, init, axes, shape):
    return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


class _GatedRMSNorm(nn.Module):
  """RMSNorm(y * SiLU(z)) * scale, in float32; each group of channels has statistics of its own."""

  num_groups: int

  @nn.compact
  def __call__(self, y: Float[Array, 'B L D'], z: Float[Array, 'B L D']) -> Float[Array, 'B L D']:
    init = nn.with_logical_partitioning(nn.initializers.ones, ('inner',))
    scale = self.param('scale', init, y.shape[-1:], jnp.float32)
    gated = y.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
    groups = gated.reshape(*gated.shape[:2], self.num_groups, -1)
    mean_square = jnp.mean(jnp.square(groups), axis=-1, keepdims=True)
    normed = (groups * jax.lax.rsqrt(mean_square + _NORM_EPSILON)).reshape(gated.shape)
    return (normed * scale[None, None, :]).astype(y.dtype)


def _log_uniform(low: float, high: float) -> nn.initializers.Initializer:
  """The logarithm of values drawn uniformly from [low, high]."""

  def init(key, shape, dtype=jnp.float32):
    return jnp.log(jax.random.uniform(key, shape, dtype, low, high))

  return init
