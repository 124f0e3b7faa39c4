"""The Mamba-1 mixer, dense or with routed projections (Routing Mamba)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ssm_moe.config import MambaConfig
from ssm_moe.layers import dispatch, initializers
from ssm_moe.layers.routed_projection import RoutedProjection
from ssm_moe.layers.router import Router, Routing, RoutingAux, routing_aux
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

  With `mamba.rom` the router chooses experts for each token once, from the layer's input; the
  decision serves the conv projection (to x), the gate projection (to z) and the output projection.
  x and z are unweighted sums over the chosen experts; the router's probability is applied once, at
  the output. Convolution, x_proj, dt_proj and the scan are shared by all experts. Routing Mamba
  (https://arxiv.org/abs/2506.18145).

  Attributes:
    mamba: Its config.
    d_model: M.
    router_init: Initialises the router, if there is one.
    output_scale: Scales the initial output projection; 1 / sqrt(residual branches) in Samba.
    dtype: Of the matrix work. dt, A_log, D, the router and the state are float32.
  """

  mamba: MambaConfig
  d_model: int
  router_init: nn.initializers.Initializer
  output_scale: float
  dtype: jnp.dtype

  def setup(self):
    config = self.mamba
    d_inner = config.inner_size(self.d_model)
    dt_rank = config.rank(self.d_model)
    in_init = initializers.linear(self.d_model)
    out_init = initializers.linear(d_inner, self.output_scale)
    if config.rom.kind == 'none':
      self.in_proj = self._kernel(
        'in_proj', in_init, ('embed', 'branch', 'inner'), (self.d_model, 2, d_inner)
      )
      self.out_proj = self._kernel(
        'out_proj', out_init, ('inner', 'embed'), (d_inner, self.d_model)
      )
    else:
      num_experts = config.rom.num_experts
      self.router = Router(num_experts, config.rom.top_k, self.router_init)
      # Conv and gate are one grouped matmul. Their axis is kept apart from d_inner: fused, sharding
      # over `tensor` would put x and z of a channel on different devices.
      self.in_proj_experts = RoutedProjection(
        num_experts, (2, d_inner), ('embed', 'branch', 'inner'), in_init, self.dtype
      )
      self.out_proj_experts = RoutedProjection(
        num_experts, (self.d_model,), ('inner', 'embed'), out_init, self.dtype
      )
    self.conv1d_kernel = self._kernel(
      'conv1d_kernel',
      initializers.linear(config.d_conv),
      ('conv', 'inner'),
      (config.d_conv, d_inner),
    )
    self.conv1d_bias = self._kernel(
      'conv1d_bias', initializers.linear(config.d_conv), ('inner',), (d_inner,)
    )
    self.x_proj = self._kernel(
      'x_proj',
      initializers.linear(d_inner),
      ('inner', 'rank'),
      (d_inner, dt_rank + 2 * config.d_state),
    )
    self.dt_proj = self._kernel(
      'dt_proj', initializers.linear(dt_rank), ('rank', 'inner'), (dt_rank, d_inner)
    )
    self.dt_bias = self._kernel(
      'dt_bias',
      initializers.dt_bias(config.dt_min, config.dt_max, config.dt_init_floor),
      ('inner',),
      (d_inner,),
    )
    self.A_log = self._kernel(
      'A_log', initializers.A_log(config.d_state), ('inner', 'state'), (d_inner, config.d_state)
    )
    self.D = self._kernel('D', nn.initializers.ones, ('inner',), (d_inner,))

  def __call__(
    self,
    x: Float[Array, 'B L M'],
    *,
    segment_ids: Int[Array, 'B L'] | None = None,
    mask: Bool[Array, 'B L'] | None = None,
    state: MambaState | None = None,
  ) -> tuple[Float[Array, 'B L M'], MambaState, RoutingAux | None]:
    """Runs over a sequence.

    Args:
      x: Input.
      segment_ids: Document of each token: nothing flows from one to the next.
      mask: Tokens that count in the routing statistics; all if None.
      state: What came before the first token; nothing if None.

    Returns:
      The output, the state after the last token, and, with routing, its losses and statistics.
    """
    return self._mix(x, segment_ids, mask, state, self.mamba.scan_implementation)

  def step(
    self, x: Float[Array, 'B M'], state: MambaState
  ) -> tuple[Float[Array, 'B M'], MambaState]:
    """Runs over one more token. Equal to `__call__`, at a cost that no length enters."""
    # One step of the sequential form is the recurrence itself, without chunks to pad.
    y, state, _ = self._mix(x[:, None], None, None, state, 'reference')
    return y[:, 0], state

  def _mix(self, inputs, segment_ids, mask, state, scan_implementation):
    routed = self.mamba.rom.kind != 'none'
    plan, routing = self._route(inputs) if routed else (None, None)
    if state is None:
      state = MambaState(None, None)

    x, z = self._project_in(inputs.astype(self.dtype), plan)
    x, conv_state = causal_conv1d(
      x, self.conv1d_kernel, self.conv1d_bias, segment_ids=segment_ids, state=state.conv_state
    )
    x = jax.nn.silu(x)
    dt, B, C = self._selection(x)
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
    y = self._project_out(y, plan, routing)

    aux = None
    if routed:
      flat_mask = None if mask is None else mask.reshape(-1)
      aux = routing_aux(routing, plan.dropped_fraction, flat_mask)
    return y, MambaState(conv_state, ssm_state), aux

  def _route(self, inputs: Array) -> tuple[dispatch.Plan, Routing]:
    """Decides once for all projections of the layer."""
    routing = self.router(inputs.reshape(-1, self.d_model))
    make = {'dropless': dispatch.dropless_plan, 'dense': dispatch.dense_plan}
    plan = make[self.mamba.rom.dispatch](routing.expert_index, self.mamba.rom.num_experts)
    return plan, routing

  def _project_in(self, inputs: Array, plan: dispatch.Plan | None) -> tuple[Array, Array]:
    batch, length, _ = inputs.shape
    if plan is None:
      xz = jnp.einsum('blm,mcd->blcd', inputs, self.in_proj.astype(self.dtype))
    else:
      rows = plan.dispatch(inputs.reshape(batch * length, self.d_model))
      xz = plan.combine(self.in_proj_experts(rows, plan))
      xz = xz.reshape(batch, length, *xz.shape[1:])
    return xz[:, :, 0], xz[:, :, 1]

  def _selection(self, x: Array) -> tuple[Array, Array, Array]:
    """Returns dt before bias and softplus, B and C, all functions of the token."""
    rank, d_state = self.mamba.rank(self.d_model), self.mamba.d_state
    selected = x @ self.x_proj.astype(self.dtype)
    dt, B, C = jnp.split(selected, (rank, rank + d_state), axis=-1)
    return dt @ self.dt_proj.astype(self.dtype), B, C

  def _project_out(self, y: Array, plan: dispatch.Plan | None, routing: Routing | None) -> Array:
    if plan is None:
      return y @ self.out_proj.astype(self.dtype)
    batch, length, d_inner = y.shape
    rows = self.out_proj_experts(plan.dispatch(y.reshape(batch * length, d_inner)), plan)
    return plan.combine(rows, routing.combine_weights).reshape(batch, length, self.d_model)

  def _kernel(self, name, init, axes, shape):
    return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
