"""The Mamba-1 mixer, dense or with routed projections (Routing Mamba)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ssm_moe.config import MambaConfig
from ssm_moe.layers import initializers, rom
from ssm_moe.layers.projection import Projection
from ssm_moe.layers.rom import Decisions, MixerAux, MixerRoutes, ProjectionRouting
from ssm_moe.layers.router import Routing
from ssm_moe.ops.causal_conv1d import causal_conv1d
from ssm_moe.ops.selective_scan import selective_scan
from ssm_moe.shapes import Array, Bool, Float, Int


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


class Mamba(nn.Module):
  """A selective state-space layer between two projections.

  x, z = in_proj(input);  x = SiLU(conv1d(x));  dt, B, C = x_proj(x);  dt = softplus(dt_proj(dt))
  y = selective_scan(x, dt, A, B, C) * SiLU(z);  output = out_proj(y)
  Mamba, figure 3 (https://arxiv.org/abs/2312.00752).

  With `mamba.rom` a router chooses experts for each token. Routing Mamba's own setting chooses
  once, from the layer's input; the decision serves the conv projection (to x), the gate projection
  (to z) and the output projection. x and z are unweighted sums over the chosen experts; the
  router's probability is applied once, at the output. Convolution, x_proj, dt_proj and the scan are
  shared by all experts. Routing Mamba (https://arxiv.org/abs/2506.18145).

  Attributes:
    mamba: Its config.
    d_model: M.
    router_init: Gives the routers' initializer by their fan-in.
    output_scale: Scales the initial output projection; 1 / sqrt(residual branches) in Samba.
    dtype: Of the matrix work. dt, A_log, D, the router and the state are float32.
    record_routes: Whether to report every token's routes.
  """

  mamba: MambaConfig
  d_model: int
  router_init: Callable[[int], nn.initializers.Initializer]
  output_scale: float
  dtype: jnp.dtype
  record_routes: bool = False

  def setup(self):
    config = self.mamba
    d_inner = config.inner_size(self.d_model)
    dt_rank = config.rank(self.d_model)
    self.routing = ProjectionRouting(config.rom, self.router_init, self.record_routes)
    in_init = initializers.linear(self.d_model)
    if rom.one_in_projection(config.rom):
      # Conv and gate are one grouped matmul. Their axis is kept apart from d_inner: fused, sharding
      # over `tensor` would put x and z of a channel on different devices.
      self.in_proj = self._projection('conv', in_init, ('embed', 'branch', 'inner'), (2, d_inner))
    else:
      self.conv_proj = self._projection('conv', in_init, ('embed', 'inner'), (d_inner,))
      self.gate_proj = self._projection('gate', in_init, ('embed', 'inner'), (d_inner,))
    self.x_proj = self._projection(
      'x', initializers.linear(d_inner), ('inner', 'rank'), (dt_rank + 2 * config.d_state,)
    )
    self.dt_proj = self._projection(
      'dt', initializers.linear(dt_rank), ('rank', 'inner'), (d_inner,)
    )
    self.out_proj = self._projection(
      'out', initializers.linear(d_inner, self.output_scale), ('inner', 'embed'), (self.d_model,)
    )
    self.conv1d_kernel = self._param(
      'conv1d_kernel',
      initializers.linear(config.d_conv),
      ('conv', 'inner'),
      (config.d_conv, d_inner),
    )
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

  def __call__(
    self,
    x: Float[Array, 'B L M'],
    *,
    segment_ids: Int[Array, 'B L'] | None = None,
    mask: Bool[Array, 'B L'] | None = None,
    state: MambaState | None = None,
    routes: MixerRoutes | None = None,
    given: Routing | None = None,
  ) -> tuple[Float[Array, 'B L M'], MambaState, MixerAux, Routing | None]:
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
    return self._mix(x, state, segment_ids=segment_ids, mask=mask, routes=routes, given=given)

  def step(
    self, x: Float[Array, 'B M'], state: MambaState, *, given: Routing | None = None
  ) -> tuple[Float[Array, 'B M'], MambaState, Routing | None]:
    """Runs over one more token; none is dropped. Its cost does not depend on the length.

    Equal to `__call__` where that drops nothing.
    """
    y, state, _, routing = self._mix(x[:, None], state, given=given, one_step=True)
    return y[:, 0], state, routing

  def _mix(
    self, inputs, state, *, segment_ids=None, mask=None, routes=None, given=None, one_step=False
  ):
    if state is None:
      state = MambaState(None, None)
    decisions = self.routing(inputs, mask=mask, routes=routes, given=given, drops=not one_step)

    x, z = self._project_in(inputs, decisions)
    x, conv_state = causal_conv1d(
      x, self.conv1d_kernel, self.conv1d_bias, segment_ids=segment_ids, state=state.conv_state
    )
    x = jax.nn.silu(x)
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
      # One step of the sequential form is the recurrence itself, without chunks to pad.
      implementation='reference' if one_step else self.mamba.scan_implementation,
    )
    y = self.out_proj(y, decisions.of('out', y))
    state = MambaState(conv_state, ssm_state)
    return decisions.scale_output(y), state, decisions.aux, decisions.routing

  def _project_in(self, inputs: Array, decisions: Decisions) -> tuple[Array, Array]:
    if rom.one_in_projection(self.mamba.rom):
      xz = self.in_proj(inputs, decisions.of('conv', inputs))
      return xz[:, :, 0], xz[:, :, 1]
    return (
      self.conv_proj(inputs, decisions.of('conv', inputs)),
      self.gate_proj(inputs, decisions.of('gate', inputs)),
    )

  def _selection(self, x: Array, decisions: Decisions) -> tuple[Array, Array, Array]:
    """Returns dt before bias and softplus, B and C, all functions of the token."""
    rank, d_state = self.mamba.rank(self.d_model), self.mamba.d_state
    selected = self.x_proj(x, decisions.of('x', x))
    dt, B, C = jnp.split(selected, (rank, rank + d_state), axis=-1)
    return self.dt_proj(dt, decisions.of('dt', dt)), B, C

  def _projection(self, projection, init, axes, features) -> Projection:
    experts = rom.experts_of(self.mamba.rom, projection)
    return Projection(features, axes, init, self.dtype, **experts)

  def _param(self, name, init, axes, shape):
    return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
