"""Every field that can be set, with its default, written once.

Frozen dataclasses hold the values; `defaults()` gives them as a `ConfigDict`, which config files
under `experiments/configs` change and command-line flags override; `from_config_dict` turns that
back into dataclasses, and answers an unknown key, a wrong type or a contradiction with one line.

A `None` default is an optional scalar. Units are in the name or in the comment.
"""

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

from ml_collections import config_dict

from ssm_moe.errors import UserError

DType = Literal['float32', 'bfloat16']


class ConfigError(UserError):
  """A key that does not exist, a value of the wrong type, or two values that contradict."""


def _check(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


def _check_positive(config: Any, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    _check(value is None or value > 0, f'{name} is {value}; it must be positive')


def _check_fraction(config: Any, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    _check(0 <= value <= 1, f'{name} is {value}; it must be between 0 and 1')


def _check_not_negative(config: Any, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    _check(value >= 0, f'{name} is {value}; it must not be negative')


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
  kind: Literal['rms', 'layer'] = 'rms'
  epsilon: float = 1e-5

  def __post_init__(self):
    _check_positive(self, 'epsilon')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoMConfig:
  """Routing Mamba: experts on a mixer's conv, gate and output projections, one router a layer."""

  kind: Literal['none', 'shared'] = 'none'
  num_experts: int = 8
  top_k: int = 1
  dispatch: Literal['dropless', 'dense'] = 'dropless'
  # The paper uses no balance loss: the load is reported, not forced.
  load_balancing_coefficient: float = 0.0
  router_z_coefficient: float = 0.0

  def __post_init__(self):
    _check_positive(self, 'num_experts', 'top_k')
    _check_not_negative(self, 'load_balancing_coefficient', 'router_z_coefficient')
    _check(
      self.top_k <= self.num_experts,
      f'top_k is {self.top_k}; it must be at most num_experts, {self.num_experts}',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig:
  """The Mamba-1 mixer; pattern letter M."""

  d_inner: int | None = None  # expand * d_model if None
  expand: int = 2
  d_state: int = 16
  d_conv: int = 4
  dt_rank: int | None = None  # ceil(d_model / 16) if None
  # The step size after softplus is initialised log-uniformly in [dt_min, dt_max].
  dt_min: float = 1e-3
  dt_max: float = 1e-1
  dt_init_floor: float = 1e-4
  scan_implementation: Literal['auto', 'reference', 'associative', 'chunked'] = 'auto'
  rom: RoMConfig = RoMConfig()

  def __post_init__(self):
    _check_positive(self, 'd_inner', 'expand', 'd_state', 'd_conv', 'dt_rank')
    _check_positive(self, 'dt_min', 'dt_max', 'dt_init_floor')
    _check(self.dt_min <= self.dt_max, f'dt_min is {self.dt_min}; at most dt_max, {self.dt_max}')

  def inner_size(self, d_model: int) -> int:
    return self.expand * d_model if self.d_inner is None else self.d_inner

  def rank(self, d_model: int) -> int:
    return -(-d_model // 16) if self.dt_rank is None else self.dt_rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
  """The Switch feed-forward layer of MoE-Mamba; pattern letter E."""

  num_experts: int = 32
  top_k: int = 1
  d_ff: int | None = None  # 3 * d_model if None, the width at which Mamba and expert are equal
  dispatch: Literal['dropless', 'capacity', 'dense'] = 'capacity'
  # expert_capacity = capacity_factor * tokens * top_k / num_experts in each router group, rounded
  # up or down to a multiple of capacity_multiple.
  capacity_factor: float = 1.0
  capacity_rounding: Literal['up', 'down'] = 'up'
  capacity_multiple: int = 1
  # Tokens compete for capacity inside a group only, so drops do not depend on the device count.
  router_groups: int = 1
  load_balancing_coefficient: float = 0.01
  router_z_coefficient: float = 0.0

  def __post_init__(self):
    _check_positive(self, 'num_experts', 'top_k', 'd_ff', 'capacity_factor')
    _check_positive(self, 'capacity_multiple', 'router_groups')
    _check_not_negative(self, 'load_balancing_coefficient', 'router_z_coefficient')
    _check(
      self.top_k <= self.num_experts,
      f'top_k is {self.top_k}; it must be at most num_experts, {self.num_experts}',
    )

  def hidden_size(self, d_model: int) -> int:
    return 3 * d_model if self.d_ff is None else self.d_ff


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  vocab_size: int = 257  # 256 bytes and end-of-text
  d_model: int = 128
  # One period of layers, repeated num_periods times: M Mamba mixer, E MoE feed-forward.
  pattern: str = 'M'
  num_periods: int = 4
  norm: NormConfig = NormConfig()
  final_norm: bool = True
  tie_embeddings: bool = True
  mamba: MambaConfig = MambaConfig()
  moe: MoEConfig = MoEConfig()
  # samba: as in the Samba code base, which RoM builds on; moe_mamba: as in MoE-Mamba's. The models
  # (`models/initialization.py`) say what each does.
  initialization: Literal['samba', 'moe_mamba'] = 'samba'
  dtype: DType = 'float32'  # of matrix work; bfloat16 on accelerators
  residual_dtype: DType = 'float32'
  # period: keep only the residual stream between periods, recompute the rest in the backward pass.
  remat: Literal['none', 'period'] = 'none'
  scan_periods: bool = True  # False compiles every period on its own: slower to compile

  def __post_init__(self):
    _check_positive(self, 'vocab_size', 'd_model', 'num_periods')
    _check(
      bool(self.layers) and set(self.layers) <= {'M', 'E'},
      f'pattern is {self.pattern!r}; it must be letters out of M (Mamba) and E (MoE feed-forward)',
    )

  @property
  def layers(self) -> tuple[str, ...]:
    """The layers of one period."""
    return tuple(self.pattern.replace(' ', ''))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Where tokens come from.

  A source is 'stdlib' (the running Python's standard library), 'selective_copying',
  'induction_heads', 'tfds:NAME', a token folder that `experiments/tokenize.py` wrote, or a text
  file: .txt, .jsonl (each also .gz or .xz) or .parquet.
  """

  train: tuple[str, ...] = ('stdlib',)
  valid: tuple[str, ...] = ('stdlib',)
  weights: tuple[float, ...] = ()  # of the train sources; by their tokens if empty
  tokenizer: str = 'bytes'  # or the path of a Hugging Face tokenizer.json
  text_field: str = 'text'  # of JSON Lines, Parquet and TFDS records
  cache_dir: str | None = None  # of token files made on the way; WORKDIR/tokens if None
  # Rows are consecutive windows of documents, and the model's state is carried from each to the
  # next: truncated backpropagation through time. Otherwise windows are shuffled.
  carry_state: bool = False
  prefetch: int = 2  # batches read ahead

  def __post_init__(self):
    _check(bool(self.train), 'train is empty; name at least one source')
    _check(
      len(self.weights) in (0, len(self.train)),
      f'weights has {len(self.weights)} values; give one for each of the {len(self.train)} train '
      'sources, or none',
    )
    _check(all(w > 0 for w in self.weights), f'weights are {self.weights}; all must be positive')
    _check_positive(self, 'prefetch')
    _check(
      not (self.carry_state and len(self.train) > 1),
      'carry_state reads one source in order; give a single train source',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW with linear warm-up, a schedule and clipping by global norm."""

  peak_learning_rate: float = 1e-3
  schedule: Literal['cosine', 'wsd', 'constant'] = 'cosine'  # wsd: warm-up, stable, decay
  warmup_fraction: float = 0.01  # of num_steps
  decay_fraction: float = 0.2  # of num_steps, at their end; wsd only
  final_learning_rate_ratio: float = 0.1
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.1
  # matrices: not on A_log, D, norms and biases; all: on every parameter, as both papers did.
  decay_mask: Literal['matrices', 'all'] = 'matrices'
  clip_norm: float | None = 1.0

  def __post_init__(self):
    _check_positive(self, 'peak_learning_rate', 'epsilon', 'clip_norm')
    _check_not_negative(self, 'weight_decay')
    _check_fraction(self, 'warmup_fraction', 'decay_fraction', 'final_learning_rate_ratio')
    _check_fraction(self, 'beta1', 'beta2')
    _check(
      self.schedule != 'wsd' or self.warmup_fraction + self.decay_fraction <= 1,
      f'warmup_fraction {self.warmup_fraction} and decay_fraction {self.decay_fraction} add up to '
      'more than 1',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  seed: int = 0
  num_steps: int = 1000
  batch_size: int = 16  # sequences a step, over all devices and accumulation steps
  sequence_length: int = 512  # tokens
  # A step's batch is cut in this many parts, one after the other. Routing, its losses and its
  # capacity are counted in each part on its own.
  accumulation_steps: int = 1
  loss_chunk: int = 4096  # tokens whose float32 logits exist at one time
  log_every: int = 10  # steps
  eval_every: int = 250  # steps
  eval_tokens: int | None = None  # at most about this many, in whole documents; all if None
  checkpoint_every: int = 250  # steps
  keep_checkpoints: int = 2  # the last ones; the best is kept besides

  def __post_init__(self):
    _check_positive(self, 'num_steps', 'batch_size', 'sequence_length', 'accumulation_steps')
    _check_positive(self, 'loss_chunk', 'log_every', 'eval_every', 'eval_tokens')
    _check_positive(self, 'checkpoint_every', 'keep_checkpoints')
    _check_not_negative(self, 'seed')
    _check(
      self.batch_size % self.accumulation_steps == 0,
      f'batch_size is {self.batch_size}; it must be a multiple of accumulation_steps, '
      f'{self.accumulation_steps}',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each mesh axis; their product is the device count."""

  data: int | None = None  # all devices that the other axes leave, if None
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1
  sequence: int = 1

  def __post_init__(self):
    _check_positive(self, 'data', 'fsdp', 'expert', 'tensor', 'sequence')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  """The text that the trained model writes at the end of a run."""

  prompt: str = 'def '
  num_tokens: int = 200  # 0 writes nothing
  temperature: float = 0.7  # 0 takes the likeliest token

  def __post_init__(self):
    _check_not_negative(self, 'num_tokens', 'temperature')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  train: TrainConfig = TrainConfig()
  mesh: MeshConfig = MeshConfig()
  sample: SampleConfig = SampleConfig()


_Dataclass = TypeVar('_Dataclass')


def defaults(cls: type = ExperimentConfig) -> config_dict.ConfigDict:
  """Returns every field of `cls` at its default, for a config file to change."""
  values = config_dict.ConfigDict()
  for field in dataclasses.fields(cls):
    kind = field.type
    if dataclasses.is_dataclass(kind):
      values[field.name] = defaults(kind)
    elif isinstance(kind, types.UnionType):
      scalar = typing.get_args(kind)[0]
      values[field.name] = config_dict.placeholder(scalar)
      if field.default is not None:
        values[field.name] = field.default
    else:
      values[field.name] = field.default
  return values


def from_config_dict(
  values: config_dict.ConfigDict | dict[str, Any],
  cls: type[_Dataclass] = ExperimentConfig,
  path: str = 'config',
) -> _Dataclass:
  """Builds the dataclass `cls` from nested mappings.

  Args:
    values: May leave fields out; they take their defaults.
    cls: The dataclass to build.
    path: Dotted name of `values` in the whole config, for messages.

  Raises:
    ConfigError: an unknown key, a value of the wrong type or a contradiction; one line that names
      the key and what is allowed.
  """
  fields = {field.name: field for field in dataclasses.fields(cls)}
  for name in values:
    check_key(f'{path}.{name}', name, cls)
  converted = {
    name: _convert(value, fields[name].type, f'{path}.{name}') for name, value in values.items()
  }
  try:
    return cls(**converted)
  except ConfigError as error:
    raise ConfigError(f'{path}.{error}') from None


def check_key(path: str, rest: str, cls: type = ExperimentConfig) -> None:
  """Checks that the dotted name `rest` is a field below `cls`.

  Args:
    path: The whole name, for the message.
    rest: The part of it that is below `cls`.

  Raises:
    ConfigError: it is not; names the fields there are.
  """
  name, _, deeper = rest.partition('.')
  kinds = {field.name: field.type for field in dataclasses.fields(cls)}
  if name not in kinds:
    raise ConfigError(f'{path} does not exist; below {cls.__name__} there are: {", ".join(kinds)}')
  if deeper:
    if not dataclasses.is_dataclass(kinds[name]):
      raise ConfigError(f'{path} does not exist; {name} has no fields')
    check_key(path, deeper, kinds[name])


def from_flag(values: config_dict.ConfigDict | None) -> ExperimentConfig:
  """Builds the experiment that `--config=FILE` and its overrides describe.

  Raises:
    ConfigError: no file was given, or as `from_config_dict`.
  """
  if values is None:
    raise ConfigError(
      '--config is missing, or its get_config returns nothing; give a file, such as '
      'experiments/configs/quickstart.py'
    )
  return from_config_dict(values)


def _convert(value: Any, kind: Any, path: str) -> Any:
  if dataclasses.is_dataclass(kind):
    if not hasattr(value, 'items'):
      raise ConfigError(f'{path} is {value!r}; it is a group of fields, set one of them')
    return from_config_dict(value, kind, path)
  if isinstance(kind, types.UnionType):
    return None if value is None else _convert(value, typing.get_args(kind)[0], path)
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin is Literal:
    if value not in arguments:
      raise ConfigError(f'{path} is {value!r}; it must be one of {", ".join(arguments)}')
    return value
  if origin is tuple:
    if not isinstance(value, (tuple, list)):
      raise ConfigError(f'{path} is {value!r}; it must be a tuple')
    return tuple(_convert(item, arguments[0], f'{path}[{i}]') for i, item in enumerate(value))
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
    raise ConfigError(f'{path} is {value!r}; it must be of type {kind.__name__}')
  return value


def to_dict(config: Any) -> dict[str, Any]:
  """Returns a dataclass as plain nested dictionaries and lists, as JSON holds them."""
  result = dataclasses.asdict(config)

  def plain(value):
    if isinstance(value, dict):
      return {key: plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value

  return plain(result)
