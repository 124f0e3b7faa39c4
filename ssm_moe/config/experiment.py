"""A whole experiment: model, data, optimizer, adapters, training, mesh, sample."""

import dataclasses
from typing import Literal

from ssm_moe.config.checks import Checked, check, check_fraction, check_not_negative, check_positive
from ssm_moe.config.model import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
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
    super().__post_init__()
    check(bool(self.train), 'train is empty; name at least one source')
    for name in ('train', 'valid'):
      check(all(getattr(self, name)), f'{name} holds an empty name; a source has a name')
    check(
      len(self.weights) in (0, len(self.train)),
      f'weights has {len(self.weights)} values; give one for each of the {len(self.train)} train '
      'sources, or none',
    )
    check(all(w > 0 for w in self.weights), f'weights are {self.weights}; all must be positive')
    check_positive(self, 'prefetch')
    check(
      not (self.carry_state and len(self.train) > 1),
      'carry_state reads one source in order; give a single train source',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked):
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
  # Parameters that are trained and that are not, by patterns on their paths in the model, such as
  # 'embedding' or '*/out_proj/*' (* is any text): all if train_only is empty, less those of freeze.
  # What is frozen has no moments, and does not count in the gradient's norm.
  train_only: tuple[str, ...] = ()
  freeze: tuple[str, ...] = ()

  def __post_init__(self):
    super().__post_init__()
    for name in ('train_only', 'freeze'):
      check(all(getattr(self, name)), f'{name} holds an empty pattern')
    check_positive(self, 'peak_learning_rate', 'epsilon', 'clip_norm')
    check_not_negative(self, 'weight_decay')
    check_fraction(self, 'warmup_fraction', 'decay_fraction', 'final_learning_rate_ratio')
    for name in ('beta1', 'beta2'):
      beta = getattr(self, name)
      check(0 <= beta < 1, f'{name} is {beta}; it must be at least 0 and below 1')
    check(
      self.schedule != 'wsd' or self.warmup_fraction + self.decay_fraction <= 1,
      f'warmup_fraction {self.warmup_fraction} and decay_fraction {self.decay_fraction} add up to '
      'more than 1',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig(Checked):
  """Low-rank adapters, W + alpha / rank * down up: they alone are trained, the model is frozen.

  LoRA (https://arxiv.org/abs/2106.09685). Each expert has adapters of its own.
  """

  rank: int = 0  # at most that of the matrix; 0 has no adapters
  alpha: float = 16.0
  # Patterns on the paths of matrices in the model; these are all projections of mixers.
  targets: tuple[str, ...] = ('*_proj/kernel',)

  def __post_init__(self):
    super().__post_init__()
    check_not_negative(self, 'rank')
    check_positive(self, 'alpha')
    check(bool(self.targets), 'targets is empty; name at least one')
    check(all(self.targets), 'targets holds an empty pattern')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
  seed: int = 0
  # Workdir of a run whose parameters this one starts from, at step 0: those of its newest
  # checkpoint, or of its best if it has early_stopping_patience.
  initialize_from: str | None = None
  num_steps: int = 1000
  batch_size: int = 16  # sequences a step, over all devices and accumulation steps
  sequence_length: int = 512  # tokens
  # A step's batch is cut in this many parts, one after the other. Routing, its losses and its
  # capacity are counted in each part on its own.
  accumulation_steps: int = 1
  dropout: float = 0.0  # of each layer's output before it joins the stream; in training only
  loss_chunk: int = 4096  # tokens whose float32 logits exist at one time
  log_every: int = 10  # steps
  eval_every: int = 250  # steps
  eval_tokens: int | None = None  # at most about this many, in whole documents; all if None
  checkpoint_every: int = 250  # steps
  keep_checkpoints: int = 2  # the last ones; the best is kept besides
  # Evaluations in a row without a lower validation loss that end the run; None never does. Each
  # evaluation with a lower one is a checkpoint, and what reads the run later takes the best.
  early_stopping_patience: int | None = None

  def __post_init__(self):
    super().__post_init__()
    check(self.initialize_from != '', 'initialize_from is empty; it must be the workdir of a run')
    check(0 <= self.dropout < 1, f'dropout is {self.dropout}; it must be at least 0 and below 1')
    check_positive(self, 'early_stopping_patience')
    check_positive(self, 'num_steps', 'batch_size', 'sequence_length', 'accumulation_steps')
    check_positive(self, 'loss_chunk', 'log_every', 'eval_every', 'eval_tokens')
    check_positive(self, 'checkpoint_every', 'keep_checkpoints')
    check_not_negative(self, 'seed')
    # JAX's keys hold 32 bits of it: larger seeds would repeat smaller ones.
    check(self.seed < 2**32, f'seed is {self.seed}; it must be below 2**32')
    check(
      self.batch_size % self.accumulation_steps == 0,
      f'batch_size is {self.batch_size}; it must be a multiple of accumulation_steps, '
      f'{self.accumulation_steps}',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Checked):
  """Devices along each mesh axis; their product is the device count."""

  data: int | None = None  # all devices that the other axes leave, if None
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1
  sequence: int = 1

  def __post_init__(self):
    super().__post_init__()
    check_positive(self, 'data', 'fsdp', 'expert', 'tensor', 'sequence')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(Checked):
  """The text that the trained model writes at the end of a run."""

  prompt: str = 'def '
  num_tokens: int = 200  # 0 writes nothing
  temperature: float = 0.7  # 0 takes the likeliest token

  def __post_init__(self):
    super().__post_init__()
    check_not_negative(self, 'num_tokens', 'temperature')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig(Checked):
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  lora: LoRAConfig = LoRAConfig()
  train: TrainConfig = TrainConfig()
  mesh: MeshConfig = MeshConfig()
  sample: SampleConfig = SampleConfig()

  def __post_init__(self):
    super().__post_init__()
    for name in ('train_only', 'freeze') * bool(self.lora.rank):
      check(
        not getattr(self.optimizer, name),
        f'optimizer.{name} is set; with lora.rank the adapters alone are trained, it must be empty',
      )
