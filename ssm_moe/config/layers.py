"""The layers without experts of their own: norm, mixers, dense feed-forward."""

import dataclasses
from typing import Literal

from ssm_moe.config.checks import Checked, check, check_positive
from ssm_moe.config.routing import Activation, RoMConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig(Checked):
  kind: Literal['rms', 'layer'] = 'rms'
  epsilon: float = 1e-5

  def __post_init__(self):
    super().__post_init__()
    check_positive(self, 'epsilon')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig(Checked):
  """The Mamba-1 mixer; pattern letter M, or m without its experts."""

  d_inner: int | None = None  # expand * d_model if None
  expand: int = 2
  d_state: int = 16
  d_conv: int = 4
  dt_rank: int | None = None  # ceil(d_model / 16) if None
  bias: bool = False  # of the projections to x and z and of the output; experts share it
  conv_bias: bool = True
  # The step size after softplus is initialised log-uniformly in [dt_min, dt_max].
  dt_min: float = 1e-3
  dt_max: float = 1e-1
  dt_init_floor: float = 1e-4
  scan_implementation: Literal[
    'auto', 'reference', 'associative', 'chunked', 'triton_gpu', 'pallas_tpu'
  ] = 'auto'
  rom: RoMConfig = RoMConfig()

  def __post_init__(self):
    super().__post_init__()
    check_positive(self, 'd_inner', 'expand', 'd_state', 'd_conv', 'dt_rank')
    check_positive(self, 'dt_min', 'dt_max', 'dt_init_floor')
    check(self.dt_min <= self.dt_max, f'dt_min is {self.dt_min}; at most dt_max, {self.dt_max}')

  def inner_size(self, d_model: int) -> int:
    return self.expand * d_model if self.d_inner is None else self.d_inner

  def rank(self, d_model: int) -> int:
    return -(-d_model // 16) if self.dt_rank is None else self.dt_rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(Checked):
  """The Mamba-2 mixer; pattern letter S, or s without its experts."""

  d_inner: int | None = None  # expand * d_model if None
  expand: int = 2
  head_dim: int = 64
  d_state: int = 128
  num_groups: int = 1  # of heads that share B and C
  d_conv: int = 4
  bias: bool = False  # of all projections; experts share it
  conv_bias: bool = True
  norm_epsilon: float = 1e-5  # of the gated norm before the output projection
  # The step size after softplus is initialised log-uniformly in [dt_min, dt_max], and the decay
  # rate -A uniformly in [A_min, A_max].
  dt_min: float = 1e-3
  dt_max: float = 1e-1
  dt_init_floor: float = 1e-4
  A_min: float = 1.0
  A_max: float = 16.0
  scan_implementation: Literal['auto', 'reference', 'chunked'] = 'auto'
  rom: RoMConfig = RoMConfig()

  def __post_init__(self):
    super().__post_init__()
    check_positive(self, 'd_inner', 'expand', 'head_dim', 'd_state', 'num_groups', 'd_conv')
    check_positive(self, 'dt_min', 'dt_max', 'dt_init_floor', 'A_min', 'A_max', 'norm_epsilon')
    check(self.dt_min <= self.dt_max, f'dt_min is {self.dt_min}; at most dt_max, {self.dt_max}')
    check(self.A_min <= self.A_max, f'A_min is {self.A_min}; at most A_max, {self.A_max}')

  def inner_size(self, d_model: int) -> int:
    return self.expand * d_model if self.d_inner is None else self.d_inner

  def num_heads(self, d_model: int) -> int:
    return self.inner_size(d_model) // self.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(Checked):
  """Causal attention; pattern letter A over all tokens before, W over a window of them."""

  num_heads: int = 8
  num_kv_heads: int | None = None  # num_heads if None; fewer is grouped-query attention
  head_dim: int | None = None  # d_model / num_heads if None
  window: int = 2048  # tokens that one of a W layer sees, itself among them
  # Tokens whose keys and values an A layer carries from window to window and in generation; with
  # more tokens, the oldest are forgotten.
  cache_length: int = 4096
  rope: bool = True  # rotary position embedding
  rope_theta: float = 10_000.0
  # cudnn: flash attention on NVIDIA GPUs; auto takes it on a single device.
  implementation: Literal['auto', 'cudnn', 'xla'] = 'auto'

  def __post_init__(self):
    super().__post_init__()
    check_positive(self, 'num_heads', 'num_kv_heads', 'head_dim', 'window', 'cache_length')
    check_positive(self, 'rope_theta')
    check(
      self.num_heads % self.kv_heads == 0,
      f'num_heads is {self.num_heads}; it must be a multiple of num_kv_heads, {self.kv_heads}',
    )

  @property
  def kv_heads(self) -> int:
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

  def head_size(self, d_model: int) -> int:
    return d_model // self.num_heads if self.head_dim is None else self.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig(Checked):
  """The dense feed-forward layer; pattern letter F."""

  d_ff: int | None = None  # 4 * d_model if None
  activation: Activation = 'relu'  # relu: two matrices; swiglu: three

  def __post_init__(self):
    super().__post_init__()
    check_positive(self, 'd_ff')

  def hidden_size(self, d_model: int) -> int:
    return 4 * d_model if self.d_ff is None else self.d_ff
