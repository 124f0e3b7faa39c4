"""Many texts, written a batch at a time; each comes in pieces, and ends on its own."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from ssm_moe.data.tokenizer import Tokenizer
from ssm_moe.inference.sampling import Sampling
from ssm_moe.inference.saved_state import Document
from ssm_moe.inference.text_stream import TextStream
from ssm_moe.inference.writer import Prepared, Writer

End = Literal['end_of_text', 'stop', 'max_tokens']


class Sample:
  """A text that is being written.

  Attributes:
    number: Among all samples.
    text: So far.
    num_tokens: That were written, an end of text not among them.
    end: Why it has ended; None while it goes on.
  """

  def __init__(self, number: int, stream: TextStream):
    self.number, self.text, self.num_tokens = number, '', 0
    self.end: End | None = None
    self._stream = stream

  @property
  def num_shown(self) -> int:
    """Tokens whose whole text is in `text`."""
    return self._stream.num_tokens

  def push(self, tokens: Sequence[int], end_of_text: int) -> str:
    """Returns the text that can be given out after more tokens."""
    pieces = []
    for token in tokens:
      if self.end is not None:
        break
      if token == end_of_text:
        pieces.append(self._stream.finish())
        self.end = 'end_of_text'
        break
      self.num_tokens += 1
      pieces.append(self._stream.push(int(token)))
      if self._stream.stopped:
        self.end = 'stop'
    return self._add(''.join(pieces))

  def finish(self) -> str:
    """Returns what is left when no more tokens are asked for."""
    rest = self._stream.finish()
    # A stop string may have waited for what makes its last letter whole.
    self.end = 'stop' if self._stream.stopped else 'max_tokens'
    return self._add(rest)

  def _add(self, piece: str) -> str:
    self.text += piece
    return piece


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What is to be written.

  Attributes:
    prompts: Tokens that each sample goes on from; at least one.
    sampling: How tokens are drawn.
    seed: Of the draws; of a sample and its number, each has its own.
    max_tokens: Of each sample.
    stop: Strings to end before.
    batch_size: Samples that are written together.
    document: That all go on from; None begins with the prompts.
  """

  prompts: Sequence[Sequence[int]]
  sampling: Sampling
  seed: int = 0
  max_tokens: int
  stop: Sequence[str] = ()
  batch_size: int = 64
  document: Document | None = None


def write(model: Prepared, tokenizer: Tokenizer, request: Request) -> Iterator[tuple[Sample, str]]:
  """Yields pieces of text as they come, each with its sample, which says whether it has ended.

  Every sample comes at least once, and last when it has ended. Those of a batch come in turn.
  """
  for numbers in _batches(request):
    writer = _make_writer(model, tokenizer, request, numbers)
    yield from _write_batch(writer, tokenizer, request, numbers)


def write_document(
  model: Prepared, tokenizer: Tokenizer, request: Request, *, keep: bool
) -> Iterator[tuple[Sample, str, Document | None]]:
  """Yields the pieces of the first sample, and with the last one where the document is then.

  That has read the tokens whose whole text was given out, and nothing after them.

  Args:
    model: What writes.
    tokenizer: Of the text.
    request: Of one prompt.
    keep: Whether to say where the document is.
  """
  writer = _make_writer(model, tokenizer, request, [0], rewinds=keep)
  for sample, piece in _write_batch(writer, tokenizer, request, [0]):
    writer.forget(sample.num_shown)
    document = None
    if keep and sample.end is not None:
      state, last = writer.state_after(sample.num_shown)
      # The first token of the prompt is the last of the document before.
      before = 0 if request.document is None else request.document.num_tokens - 1
      num_tokens = before + len(request.prompts[0]) + sample.num_shown
      document = Document(state, int(last[0]), num_tokens)
    yield sample, piece, document


def _write_batch(
  writer: Writer, tokenizer: Tokenizer, request: Request, numbers: Sequence[int]
) -> Iterator[tuple[Sample, str]]:
  samples = [
    Sample(i, TextStream(tokenizer, context=request.prompts[i], stop=request.stop)) for i in numbers
  ]
  while (tokens := writer.more(request.max_tokens - writer.written)).shape[1]:
    for row, sample in enumerate(samples):
      if sample.end is None:
        piece = sample.push(tokens[row], tokenizer.end_of_text)
        if sample.end is None and writer.written == request.max_tokens:
          piece += sample.finish()
        writer.ended[row] = sample.end is not None
        yield sample, piece
  for sample in samples:
    if sample.end is None:  # nothing was asked for
      yield sample, sample.finish()


def _make_writer(
  model: Prepared,
  tokenizer: Tokenizer,
  request: Request,
  numbers: Sequence[int],
  *,
  rewinds: bool = False,
) -> Writer:
  # Of a last batch that is not full; so that it need not be compiled again.
  missing = 0 if len(request.prompts) < request.batch_size else request.batch_size - len(numbers)
  missing = 0 if rewinds else missing
  filled = [*numbers, *[numbers[-1]] * missing]
  state = None
  if request.document is not None:
    state = jax.tree.map(lambda leaf: jnp.repeat(leaf, len(filled), axis=1), request.document.state)
  writer = Writer(
    model,
    [request.prompts[i] for i in filled],
    jax.random.key(request.seed),
    sampling=request.sampling,
    end_of_text=tokenizer.end_of_text,
    state=state,
    numbers=filled,
    rewinds=rewinds,
  )
  writer.ended[len(numbers) :] = True
  return writer


def _batches(request: Request) -> Iterator[list[int]]:
  """Yields the numbers of the samples of each batch, in order."""
  batch: list[int] = []
  for i, prompt in enumerate(request.prompts):
    # What goes on from a state must be of one length: padding would come between.
    other = request.document is not None and batch and len(prompt) != len(request.prompts[batch[0]])
    if len(batch) == request.batch_size or other:
      yield batch
      batch = []
    batch.append(i)
  yield batch
