"""Text as its tokens come: what is incomplete waits, and a stop string ends it.

A token can be part of a letter, or of a stop string. What is given out piece by piece is the text
of all tokens together, up to the stop string that is complete first.
"""

from collections.abc import Sequence

from ssm_moe.data.tokenizer import Tokenizer

_INCOMPLETE = '\ufffd'
# A letter has at most four bytes, so that of an incomplete one there are at most so many tokens.
_MOST_INCOMPLETE = 3
# Tokens that are decoded before new ones: some tokenizers spell the first one otherwise.
_CONTEXT = 8


class TextStream:
  """The text of one row.

  Attributes:
    stopped: Whether a stop string has come. Nothing comes after it.
    num_tokens: Tokens whose text was given out in full, and all before them.
  """

  def __init__(
    self, tokenizer: Tokenizer, *, context: Sequence[int] = (), stop: Sequence[str] = ()
  ):
    """Begins after the tokens `context`, whose text is not given out.

    Args:
      tokenizer: That spells the tokens.
      context: Before the first one; the last few count.
      stop: Strings that end the text; they do not become part of it.
    """
    self._decode, self._stop = tokenizer.decode, [text for text in stop if text]
    self._context, self._waiting = list(context)[-_CONTEXT:], []
    self._held, self._ends = '', []
    self._given, self._spelled, self._taken = 0, 0, 0
    self.stopped, self.num_tokens = False, 0

  def push(self, token: int) -> str:
    """Returns what can be given out after one more token; often nothing, or its text."""
    if self.stopped:
      return ''
    self._waiting.append(token)
    text = self._text(self._waiting)
    if not text.endswith(_INCOMPLETE):
      return self._give(self._take(len(self._waiting)), last=False)
    # Of what no incomplete letter at the end can reach; else what is none would wait for ever.
    for count in range(len(self._waiting) - 1, 0, -1):
      far = len(self._waiting) - count >= _MOST_INCOMPLETE
      if far or not self._text(self._waiting[:count]).endswith(_INCOMPLETE):
        return self._give(self._take(count), last=False)
    return ''

  def finish(self) -> str:
    """Returns what is left when there are no more tokens."""
    if self.stopped:
      return ''
    return self._give(self._take(len(self._waiting)), last=True)

  def _text(self, tokens: list[int]) -> str:
    return self._decode(self._context + tokens)[len(self._decode(self._context)) :]

  def _take(self, count: int) -> str:
    """Returns the text of so many waiting tokens, which then no longer wait."""
    tokens, self._waiting = self._waiting[:count], self._waiting[count:]
    text = self._text(tokens)
    self._context = (self._context + tokens)[-_CONTEXT:]
    self._taken += count
    self._spelled += len(text)
    self._ends.append((self._spelled, self._taken))
    return text

  def _give(self, text: str, *, last: bool) -> str:
    """Returns what of the held text and `text` no stop string can take back."""
    self._held += text
    found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
    if found:
      # The one that is complete first, as if letters came one by one.
      self.stopped = True
      count = min(found)[1]
    else:
      count = len(self._held) if last else len(self._held) - self._beginning_of_stop()
    given, self._held = self._held[:count], self._held[count:]
    self._given += count
    while self._ends and self._ends[0][0] <= self._given:
      self.num_tokens = self._ends.pop(0)[1]
    return given

  def _beginning_of_stop(self) -> int:
    """Returns how many letters at the end may be the beginning of a stop string."""
    longest = max((len(stop) - 1 for stop in self._stop), default=0)
    for count in range(min(longest, len(self._held)), 0, -1):
      if any(stop.startswith(self._held[-count:]) for stop in self._stop):
        return count
    return 0
