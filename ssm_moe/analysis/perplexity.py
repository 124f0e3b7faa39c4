"""What a sum of losses says of a model: nats a token, perplexity, bits per byte."""

import math
from typing import Any

from ssm_moe.errors import UserError

# Beyond it, floats may not hold exp(loss).
_MAX_LOSS = 700.0


def summary(nats: float, tokens: int, num_bytes: float | None) -> dict[str, Any]:
  """Returns means over tokens, ready for JSON.

  Args:
    nats: Sum of -log p over the tokens.
    tokens: How many, at least one.
    num_bytes: UTF-8 bytes of the text that they stand for; None where there is no text.

  Returns:
    loss: Mean nats a token.
    perplexity: exp(loss); None if a float does not hold it.
    bits_per_byte: Bits of all tokens over the bytes; None without bytes.

  Raises:
    UserError: the sum is not finite.
  """
  loss = nats / tokens
  if not math.isfinite(loss):
    raise UserError(f'the loss is {loss}: the parameters of this checkpoint are of no use')
  return {
    'loss': loss,
    'perplexity': math.exp(loss) if loss < _MAX_LOSS else None,
    'bits_per_byte': nats / math.log(2) / num_bytes if num_bytes else None,
  }
