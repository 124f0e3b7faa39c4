"""What a sum of losses says of a model: nats a token, perplexity, bits per byte."""

import math

# Beyond it, a float may not hold exp(loss).
_MAX_LOSS = 700.0


def summary(nats: float, tokens: int, bytes_per_token: float | None) -> dict[str, float | None]:
  """Returns means over tokens, ready for JSON: None for what is not finite.

  Args:
    nats: Sum of -log p over the tokens.
    tokens: How many, at least one.
    bytes_per_token: UTF-8 bytes of the text that a token stands for; None where there is no text.

  Returns:
    loss: Mean nats a token.
    perplexity: exp(loss).
    bits_per_byte: Bits of all tokens over the bytes.
  """
  loss = nats / tokens
  if not math.isfinite(loss):
    return dict.fromkeys(('loss', 'perplexity', 'bits_per_byte'))
  return {
    'loss': loss,
    'perplexity': math.exp(loss) if loss < _MAX_LOSS else None,
    'bits_per_byte': loss / math.log(2) / bytes_per_token if bytes_per_token else None,
  }
