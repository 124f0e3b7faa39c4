"""The dense feed-forward layer, and the activations that experts share with it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from ssm_moe.config.routing import Activation
from ssm_moe.shapes import Array, Float


def activation_of(name: Activation) -> Callable[[Float[Array, '...']], Float[Array, '*B F']]:
  """Returns the nonlinearity between the two products of a feed-forward layer.

  relu: max(hidden, 0), of hidden [..., F]. swiglu: SiLU(gate) * up, of hidden [..., 2, F], gate and
  then up (https://arxiv.org/abs/2002.05202, equation 6).

  Raises:
    ValueError: a name that does not exist.
  """
  match name:
    case 'relu':
      return jax.nn.relu
    case 'swiglu':
      return _swiglu
  raise ValueError(f'there is no activation {name!r}; there are: relu, swiglu')


def _swiglu(hidden: Float[Array, '*B 2 F']) -> Float[Array, '*B F']:
  if hidden.ndim < 2 or hidden.shape[-2] != 2:
    raise ValueError(f'swiglu: hidden has shape {hidden.shape}; it must be [..., 2, F]')
  return jax.nn.silu(hidden[..., 0, :]) * hidden[..., 1, :]


class MLP(nn.Module):
  """Two products with a nonlinearity between them, without biases.

  relu: y = ReLU(x wi) wo, the feed-forward layer of MoE-Mamba's Transformer baselines and the shape
  of its experts. swiglu: y = (SiLU(x wi_gate) * (x wi_up)) wo, as in Samba.

  Attributes:
    d_ff: F.
    activation: Its name.
    wi_init, wo_init: Initialise the first matrices and the last.
    dtype: Of the matrix work.
  """

  d_ff: int
  activation: Activation
  wi_init: nn.initializers.Initializer
  wo_init: nn.initializers.Initializer
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, '*B M']) -> Float[Array, '*B M']:
    """Returns the layer's output, in `dtype`."""
    d_model = x.shape[-1]
    if self.activation == 'swiglu':
      # Gate and up have an axis of their own: in a fused one of 2 F, sharding over `tensor` would
      # put the gate of a channel and what it multiplies on different devices.
      wi = self._kernel('wi', self.wi_init, ('embed', 'branch', 'mlp'), (d_model, 2, self.d_ff))
    else:
      wi = self._kernel('wi', self.wi_init, ('embed', 'mlp'), (d_model, self.d_ff))
    wo = self._kernel('wo', self.wo_init, ('mlp', 'embed'), (self.d_ff, d_model))
    hidden = jnp.tensordot(x.astype(self.dtype), wi, axes=1)
    return activation_of(self.activation)(hidden) @ wo

  def _kernel(self, name, init, axes, shape):
    init = nn.with_logical_partitioning(init, axes)
    return self.param(name, init, shape, jnp.float32).astype(self.dtype)
