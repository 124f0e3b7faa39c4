"""What state-space mixers share: their interface, their projections and who routes them."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from ssm_moe.config import Mamba2Config, MambaConfig
from ssm_moe.layers import initializers, rom
from ssm_moe.layers.projection import Decision, Projection
from ssm_moe.layers.rom import Decisions, MixerAux, MixerRoutes, ProjectionRouting
from ssm_moe.layers.router import Routing
from ssm_moe.ops import implementation
from ssm_moe.shapes import Array, Bool, Float, Int


class SSMMixer(nn.Module):
  """A mixer with conv, gate, x, dt and out projections, any of which can have experts.

  A mixer defines `setup`, which begins with `setup_routing`, and `mix`.

  Attributes:
    config: Of the mixer.
    d_model: M.
    router_init: Gives the routers' initializer by their fan-in.
    output_scale: Scales the initial output projection; 1 / sqrt(residual branches) in Samba.
    dtype: Of the matrix work. dt, A_log, D, norms, the router and the state are float32.
    record_routes: Whether to report every token's routes.
  """

  config: MambaConfig | Mamba2Config
  d_model: int
  router_init: Callable[[int], nn.initializers.Initializer]
  output_scale: float
  dtype: jnp.dtype
  record_routes: bool = False

  # Projections that have a bias if the config says so.
  biased = frozenset({'conv', 'gate', 'out'})

  def __call__(
    self,
    x: Float[Array, 'B L M'],
    *,
    segment_ids: Int[Array, 'B L'] | None = None,
    mask: Bool[Array, 'B L'] | None = None,
    state: Any | None = None,
    routes: MixerRoutes | None = None,
    given: Routing | None = None,
  ) -> tuple[Float[Array, 'B L M'], Any, MixerAux, Routing | None]:
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
    decisions = self.routing(x, mask=mask, routes=routes, given=given)
    y, state = self.mix(x, decisions, state, segment_ids, self.config.scan_implementation)
    return decisions.scale_output(y), state, decisions.aux, decisions.routing

  def step(
    self, x: Float[Array, 'B M'], state: Any, *, given: Routing | None = None
  ) -> tuple[Float[Array, 'B M'], Any, Routing | None]:
    """Runs over one more token; none is dropped. Its cost does not depend on the length.

    Equal to `__call__` where that drops nothing.
    """
    x = x[:, None]
    decisions = self.routing(x, given=given, drops=False)
    # One step of the sequential form is the recurrence itself, without chunks to pad.
    y, state = self.mix(x, decisions, state, None, 'reference')
    return decisions.scale_output(y)[:, 0], state, decisions.routing

  def mix(
    self,
    inputs: Float[Array, 'B L M'],
    decisions: Decisions,
    state: Any | None,
    segment_ids: Int[Array, 'B L'] | None,
    scan_implementation: str,
  ) -> tuple[Float[Array, 'B L M'], Any]:
    """Returns the output, before a weight that is to scale all of it, and the last state."""
    raise NotImplementedError

  def setup_routing(self) -> None:
    """Makes the routers, and the projections of the input to x and z."""
    settings, d_inner = self.config.rom, self.config.inner_size(self.d_model)
    self.routing = ProjectionRouting(settings, self.router_init, self.record_routes)
    init = initializers.linear(self.d_model)
    if rom.one_in_projection(settings):
      # Conv and gate are one parameter. Their axis is kept apart from d_inner: fused, sharding over
      # `tensor` would put x and z of a channel on different devices.
      self.in_proj = _InProjection(
        (2, d_inner),
        ('embed', 'branch', 'inner'),
        init,
        self.dtype,
        bias=self.config.bias,
        **rom.experts_of(settings, 'conv'),
      )
    else:
      self.conv_proj = self.projection('conv', init, ('embed', 'inner'), (d_inner,))
      self.gate_proj = self.projection('gate', init, ('embed', 'inner'), (d_inner,))

  def project_in(
    self, inputs: Float[Array, 'B L M'], decisions: Decisions
  ) -> tuple[Float[Array, 'B L D'], Float[Array, 'B L D']]:
    """Returns x before the convolution, and the gate z."""
    if rom.one_in_projection(self.config.rom):
      return self.in_proj(inputs, decisions.of('conv', inputs))
    return (
      self.conv_proj(inputs, decisions.of('conv', inputs)),
      self.gate_proj(inputs, decisions.of('gate', inputs)),
    )

  def projection(
    self,
    name: str,
    init: nn.initializers.Initializer,
    axes: tuple[str, ...],
    features: tuple[int, ...],
  ) -> Projection:
    """Returns the projection `name`, with experts if it is to have them."""
    bias = self.config.bias and name in self.biased
    experts = rom.experts_of(self.config.rom, name)
    return Projection(features, axes, init, self.dtype, bias=bias, **experts)


class _InProjection(Projection):
  """The projection to x and z, which have one parameter, [M, 2, D] or [E, M, 2, D].

  One product for both, except on a GPU: there kernels that XLA knows nothing of read x and z, and
  write their gradients. It would copy the halves of one product apart, and the gradients together,
  which takes longer than to read the input twice and to add up its two gradients.
  """

  @nn.compact
  def __call__(
    self, x: Float[Array, 'B L M'], decision: Decision | None = None
  ) -> tuple[Float[Array, 'B L D'], Float[Array, 'B L D']]:
    if implementation.platform() != 'gpu':
      xz = super().__call__(x, decision)
      return xz[:, :, 0], xz[:, :, 1]
    xz = self._products(x.astype(self.dtype), decision)
    if not self.bias:
      return xz
    return tuple(y + bias.astype(y.dtype)[None, None] for y, bias in zip(xz, self._bias()))

  def _products(self, x: Array, decision: Decision | None) -> tuple[Array, Array]:
    """Returns x and z before the bias, each by a product of its own."""
    shape = (x.shape[-1], *self.features)
    if self.num_experts is None:
      kernel = self._kernel('kernel', self.kernel_init, self.axes, shape)
      return tuple(jnp.einsum('blm,md->bld', x, kernel[:, branch]) for branch in (0, 1))
    kernel = self._experts('kernel', self.kernel_init, shape)
    tokens = decision.order.flatten(x)
    axes = [('expert', self.axes[0], *self.axes[2:])]
    products = (
      decision.plan.apply(tokens, [kernel[:, :, branch]], decision.weights, axes=axes)
      for branch in (0, 1)
    )
    return tuple(decision.order.unflatten(product) for product in products)
