"""The model: a pattern of layers, and the settings of each kind."""

import dataclasses
import re
from typing import Literal

from ssm_moe.config.checks import Checked, check, check_positive
from ssm_moe.config.layers import AttentionConfig, Mamba2Config, MambaConfig, MLPConfig, NormConfig
from ssm_moe.config.routing import MoEConfig, RoutingConfig

DType = Literal['float32', 'bfloat16']

# What the letters of a pattern stand for, as the parameters name them. Lower case is the same mixer
# without its experts.
LAYER_WORDS = {
  'M': 'mamba',
  'm': 'mamba',
  'S': 'mamba2',
  's': 'mamba2',
  'A': 'attention',
  'W': 'window',
  'F': 'mlp',
  'E': 'moe',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
  vocab_size: int = 257  # 256 bytes and end-of-text
  d_model: int = 128
  # One period of layers, repeated num_periods times: M Mamba, S Mamba-2, A attention, W windowed
  # attention, F feed-forward, E MoE feed-forward; m and s are mixers without experts. Each has its
  # norm and residual; those joined by +, as in M+E, share them.
  pattern: str = 'M'
  num_periods: int = 4
  norm: NormConfig = NormConfig()
  final_norm: bool = True
  tie_embeddings: bool = True
  mamba: MambaConfig = MambaConfig()
  mamba2: Mamba2Config = Mamba2Config()
  attention: AttentionConfig = AttentionConfig()
  mlp: MLPConfig = MLPConfig()
  moe: MoEConfig = MoEConfig()
  # samba: as in the Samba code base, which RoM builds on; moe_mamba: as in MoE-Mamba's. The model
  # (`models/lm.py`) says what each does.
  initialization: Literal['samba', 'moe_mamba'] = 'samba'
  dtype: DType = 'float32'  # of matrix work; bfloat16 on accelerators
  residual_dtype: DType = 'float32'
  # period: keep only the residual stream between periods, recompute the rest in the backward pass.
  remat: Literal['none', 'period'] = 'none'
  scan_periods: bool = True  # False compiles every period on its own: slower to compile

  def __post_init__(self):
    super().__post_init__()
    check_positive(self, 'vocab_size', 'd_model', 'num_periods')
    check(
      all(group and set(group) <= set(LAYER_WORDS) for group in self.groups) and bool(self.layers),
      f'pattern is {self.pattern!r}; it must be letters out of {", ".join(LAYER_WORDS)}, with + '
      'between those that share a norm',
    )
    if 'S' in self.layers or 's' in self.layers:
      _check_mamba2(self.mamba2, self.d_model)
    if 'A' in self.layers or 'W' in self.layers:
      _check_attention(self.attention, self.d_model)
    if 'E' in self.layers and self.moe.routing == 'mixer':
      self._check_reuse()

  @property
  def groups(self) -> tuple[str, ...]:
    """The layers of one period, in groups that share a norm and a residual."""
    joined = re.sub(r'\s*\+\s*', '+', self.pattern.strip())
    return tuple(group.replace('+', '') for group in re.findall(r'[^\s+](?:\+[^\s+])*|\+', joined))

  @property
  def layers(self) -> tuple[str, ...]:
    """The layers of one period."""
    return tuple(''.join(self.groups))

  def routing_of(self, letter: str) -> RoutingConfig | None:
    """Returns how the layers of a pattern letter route; None if they do not."""
    match letter:
      case 'E':
        return self.moe
      case 'M' | 'S':
        rom = self.mamba.rom if letter == 'M' else self.mamba2.rom
        return None if rom.kind == 'none' else rom
    return None

  def routings(self) -> dict[str, RoutingConfig]:
    """Returns the settings of all routed layers, by their name below the model's."""
    names = {'M': 'mamba.rom', 'S': 'mamba2.rom', 'E': 'moe'}
    routed = {letter: self.routing_of(letter) for letter in dict.fromkeys(self.layers)}
    return {names[letter]: routing for letter, routing in routed.items() if routing is not None}

  def _check_reuse(self):
    before = self.layers[: self.layers.index('E')]
    shared = [
      self.routing_of(letter)
      for letter in before
      if letter in 'MS' and getattr(self.routing_of(letter), 'kind', 'none') in ('shared', 'period')
    ]
    check(
      bool(shared),
      f'moe.routing is mixer; before E, pattern {self.pattern!r} must have a mixer whose rom.kind '
      'is shared or period',
    )
    for name in ('num_experts', 'top_k'):
      there, here = getattr(shared[-1], name), getattr(self.moe, name)
      check(there == here, f'moe.{name} is {here}; with routing by the mixer it must be {there}')


def _check_mamba2(config: Mamba2Config, d_model: int) -> None:
  d_inner, heads = config.inner_size(d_model), config.num_heads(d_model)
  check(
    heads * config.head_dim == d_inner,
    f'mamba2.head_dim is {config.head_dim}; it must divide d_inner, {d_inner}',
  )
  check(
    heads % config.num_groups == 0,
    f'mamba2.num_groups is {config.num_groups}; it must divide the {heads} heads',
  )


def _check_attention(config: AttentionConfig, d_model: int) -> None:
  check(
    config.head_dim is not None or d_model % config.num_heads == 0,
    f'attention.num_heads is {config.num_heads}; it must divide d_model, {d_model}',
  )
  check(
    not config.rope or config.head_size(d_model) % 2 == 0,
    f'attention.head_dim is {config.head_size(d_model)}; with rope it must be even',
  )
