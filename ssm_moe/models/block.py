"""One period of a model: its layers in a row, each before a norm and around a residual."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from ssm_moe.config import ModelConfig
from ssm_moe.layers import initializers
from ssm_moe.layers.mamba import Mamba, MambaState
from ssm_moe.layers.moe import MoE
from ssm_moe.layers.norm import make_norm
from ssm_moe.layers.router import RoutingAux
from ssm_moe.shapes import Array, Bool, Float, Int

# By layer name; a layer without state or routing is absent.
PeriodState = dict[str, MambaState]
PeriodAux = dict[str, RoutingAux]


def layer_names(config: ModelConfig) -> dict[str, str]:
  """Returns the letter of each layer of a period, by its name in the parameters."""
  words = {'M': 'mamba', 'E': 'moe'}
  return {f'{words[letter]}_{i}': letter for i, letter in enumerate(config.layers)}


def num_residual_branches(config: ModelConfig) -> int:
  """Returns how many outputs are added to the residual stream."""
  return len(config.layers) * config.num_periods


class Period(nn.Module):
  """x = x + layer(norm(x)) for each letter of the pattern.

  MoE-Mamba, section 3.2: M and E in turn; Mamba and Routing Mamba: M alone.
  """

  config: ModelConfig

  def setup(self):
    dtype = jnp.dtype(self.config.dtype)
    make = {'M': self._mamba, 'E': self._moe}
    self.norm = {name: make_norm(self.config.norm) for name in layer_names(self.config)}
    self.layer = {name: make[letter](dtype) for name, letter in layer_names(self.config).items()}

  def __call__(
    self,
    x: Float[Array, 'B L M'],
    state: PeriodState | None = None,
    segment_ids: Int[Array, 'B L'] | None = None,
    mask: Bool[Array, 'B L'] | None = None,
  ) -> tuple[Float[Array, 'B L M'], tuple[PeriodState, PeriodAux]]:
    """Returns the residual stream after the period, its new state and its routing."""
    new_state, new_aux = {}, {}
    for name, letter in layer_names(self.config).items():
      normed = self.norm[name](x.astype(jnp.float32))
      if letter == 'M':
        before = None if state is None else state[name]
        y, new_state[name], aux = self.layer[name](
          normed, segment_ids=segment_ids, mask=mask, state=before
        )
      else:
        y, aux = self.layer[name](normed, mask=mask)
      if aux is not None:
        new_aux[name] = aux
      x = x + y.astype(x.dtype)
    return x, (new_state, new_aux)

  def step(
    self, x: Float[Array, 'B M'], state: PeriodState
  ) -> tuple[Float[Array, 'B M'], PeriodState]:
    """Runs one more token through the period."""
    new_state = {}
    for name, letter in layer_names(self.config).items():
      normed = self.norm[name](x.astype(jnp.float32))
      if letter == 'M':
        y, new_state[name] = self.layer[name].step(normed, state[name])
      else:
        y = self.layer[name](normed[:, None])[0][:, 0]
      x = x + y.astype(x.dtype)
    return x, new_state

  def _mamba(self, dtype: Any) -> Mamba:
    config = self.config
    return Mamba(
      config.mamba,
      config.d_model,
      router_init=self._linear(config.d_model),
      output_scale=(
        num_residual_branches(config) ** -0.5 if config.initialization == 'samba' else 1.0
      ),
      dtype=dtype,
    )

  def _moe(self, dtype: Any) -> MoE:
    config = self.config
    d_ff = config.moe.hidden_size(config.d_model)
    if config.initialization == 'samba':
      wo_init = initializers.linear(d_ff, num_residual_branches(config) ** -0.5)
    else:
      # llm-random counts the experts into the fan-in of the second matrix.
      wo_init = initializers.truncated_normal(config.moe.num_experts * d_ff)
    return MoE(
      config.moe,
      router_init=self._linear(config.d_model),
      wi_init=self._linear(config.d_model),
      wo_init=wo_init,
      dtype=dtype,
    )

  def _linear(self, fan_in: int) -> nn.initializers.Initializer:
    if self.config.initialization == 'samba':
      return initializers.linear(fan_in)
    return initializers.truncated_normal(fan_in)
