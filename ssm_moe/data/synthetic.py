"""Selective copying and induction heads: tasks that need content-dependent memory, made on the fly.

Mamba, section 4.1 and its appendix on these tasks (https://arxiv.org/abs/2312.00752): both have a
vocabulary of 16. Example i is a function of (seed, split, i) alone; only the answers are scored.
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from ssm_moe.data import DataError

VOCAB_SIZE = 16
NOISE = 0
MARKER = VOCAB_SIZE - 1  # asks for the answer
NUM_COPIED = 16  # tokens to remember in selective copying

Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class SyntheticTask:
  """An endless supply of examples; token ids are below `vocab_size`.

  selective_copying: 16 data tokens (1 to 14) stand at random places among noise (0); then follow 16
    markers (15), at which the data tokens are to be given in order. Section 4.1 uses 4096 tokens.
  induction_heads: random tokens (0 to 14) with one marker (15) among them; the last input is a
    marker again, where the token that followed the first one is to be given. The paper trains on
    256 tokens.
  """

  name: Literal['selective_copying', 'induction_heads']
  vocab_size: int = VOCAB_SIZE

  def check_length(self, length: int) -> None:
    """Checks that an example fits in `length` tokens.

    Raises:
      DataError: it does not.
    """
    least = 2 * NUM_COPIED if self.name == 'selective_copying' else 3
    if length < least:
      raise DataError(f'{self.name} needs a sequence_length of at least {least}; it is {length}')

  def example(self, index: int, length: int, *, seed: int, split: Literal['train', 'valid']) -> Row:
    """Returns example `index` as `inputs`, `targets`, `segment_ids` and `loss_mask`, each [length].

    Targets that the mask leaves out are zeros.
    """
    # Philox would take (seed, index) as its key, but nearby seeds must also not share streams
    # between the splits and the tasks: SeedSequence hashes all four.
    entropy = (seed, split == 'valid', self.name == 'induction_heads', index)
    random = np.random.default_rng(np.random.SeedSequence(entropy))
    make = _selective_copying if self.name == 'selective_copying' else _induction_heads
    inputs, targets, loss_mask = make(random, length)
    return {
      'inputs': inputs,
      'targets': targets,
      'segment_ids': np.ones(length, np.int32),
      'loss_mask': loss_mask,
    }


NAMES = ('selective_copying', 'induction_heads')


def _selective_copying(
  random: np.random.Generator, length: int
) -> tuple[Int[np.ndarray, 'L'], Int[np.ndarray, 'L'], Float[np.ndarray, 'L']]:
  context = length - NUM_COPIED
  data = random.integers(NOISE + 1, MARKER, NUM_COPIED)
  inputs = np.full(length, NOISE, np.int32)
  inputs[np.sort(random.choice(context, NUM_COPIED, replace=False))] = data
  inputs[context:] = MARKER
  targets = np.zeros(length, np.int32)
  targets[context:] = data
  loss_mask = np.zeros(length, np.float32)
  loss_mask[context:] = 1
  return inputs, targets, loss_mask


def _induction_heads(
  random: np.random.Generator, length: int
) -> tuple[Int[np.ndarray, 'L'], Int[np.ndarray, 'L'], Float[np.ndarray, 'L']]:
  inputs = random.integers(0, MARKER, length).astype(np.int32)
  first = random.integers(0, length - 2)
  inputs[first] = inputs[-1] = MARKER
  targets = np.zeros(length, np.int32)
  targets[-1] = inputs[first + 1]
  loss_mask = np.zeros(length, np.float32)
  loss_mask[-1] = 1
  return inputs, targets, loss_mask
