"""Results of a scan and the gradients of everything that goes into it."""

import jax
import jax.numpy as jnp


def value_and_gradients(function, arguments, cotangents):
  """Returns (y, last state) and the cotangent of every floating argument, by name."""
  floating = {
    name: v
    for name, v in arguments.items()
    if isinstance(v, jax.Array) and jnp.issubdtype(v.dtype, jnp.floating)
  }
  rest = {name: v for name, v in arguments.items() if name not in floating}
  rest.pop('dt_softplus')

  @jax.jit
  def run(floating, rest, cotangents):
    outputs, pullback = jax.vjp(
      lambda floating: function(**floating, **rest, dt_softplus=arguments['dt_softplus']), floating
    )
    return outputs, pullback(cotangents)[0]

  return run(floating, rest, cotangents)
