"""Samples are the same in any batch, end for a reason, and can be gone on with."""

import jax
import numpy as np
import pytest

from ssm_moe.data.tokenizer import ByteTokenizer
from ssm_moe.inference import samples, saved_state, writer
from ssm_moe.inference.sampling import Sampling
from ssm_moe.inference.text_stream import TextStream
from tests.inference import models

_BYTES = ByteTokenizer()
_END = _BYTES.end_of_text


@pytest.fixture(scope='module')
def model():
  return writer.prepare(models.params('mamba'), models.SMALL)


def _request(*prompts, max_tokens=24, **options):
  settings = {'sampling': Sampling(), 'seed': 3} | options
  return samples.Request(
    prompts=[[_END, *prompt.encode()] for prompt in prompts], max_tokens=max_tokens, **settings
  )


def _written(model, request):
  """Returns text and end of each sample; pieces add up to its text."""
  pieces, ended = {}, {}
  for sample, piece in samples.write(model, _BYTES, request):
    assert sample.number not in ended
    pieces[sample.number] = pieces.get(sample.number, '') + piece
    if sample.end is not None:
      assert sample.text == pieces[sample.number]
      ended[sample.number] = (sample.text, sample.end, sample.num_tokens)
  assert sorted(ended) == list(range(len(request.prompts)))
  return [ended[number] for number in range(len(request.prompts))]


def test_a_sample_does_not_depend_on_its_batch(model):
  prompts = ['a prompt', 'b', 'another one', 'c', 'd']
  together = _written(model, _request(*prompts))
  # Two full batches, and one that is filled up.
  assert _written(model, _request(*prompts, batch_size=2)) == together
  assert len({text for text, _, _ in together}) == 5


@pytest.mark.slow
def test_a_stop_string_ends_a_sample_before_it(model):
  (whole, end, count) = _written(model, _request('x'))[0]
  assert (end, count) == ('max_tokens', 24)
  stop = whole[9:12]
  text, end, count = _written(model, _request('x', stop=[stop, 'never there']))[0]
  assert end == 'stop' and text == whole[: whole.find(stop)] and count < 24


@pytest.mark.slow
def test_an_end_of_text_ends_a_sample_and_is_not_part_of_it(model):
  # A tokenizer whose end of text is a byte that comes.
  tokens = writer.Writer(model, _request('x').prompts, jax.random.key(3), sampling=Sampling())
  drawn = np.concatenate([tokens.more(24), tokens.more(23)], axis=1)[0].tolist()
  ends = ByteTokenizer()
  ends.end_of_text = drawn[5]
  ended = [s for s, _ in samples.write(model, ends, _request('x')) if s.end is not None]
  first = drawn.index(drawn[5])
  assert (ended[0].end, ended[0].num_tokens) == ('end_of_text', first)
  assert ended[0].text == ends.decode(drawn[:first]) != ''


def test_what_waited_is_given_out_at_the_end():
  def sample(stop):
    return samples.Sample(0, TextStream(_BYTES, stop=[stop]))

  one = sample('xyz')
  assert (one.push([*b'ax'], _END), one.end) == ('a', None)
  assert (one.push([_END, *b'b'], _END), one.end, one.num_tokens) == ('x', 'end_of_text', 2)
  one = sample('\ufffd')
  assert (one.push([0xC3], _END), one.end) == ('', None)
  assert (one.finish(), one.end) == ('', 'stop')
  one = sample('xyz')
  assert one.push([*b'ax'], _END) + one.finish() == one.text == 'ax'
  assert one.end == 'max_tokens'


def test_a_document_goes_on_from_a_file_as_if_never_left(model, tmp_path):
  greedy = Sampling(temperature=0.0)
  whole, _, _ = _written(model, _request('a long document', max_tokens=30, sampling=greedy))[0]
  kept = None
  request = _request('a long document', max_tokens=11, sampling=greedy)
  for sample, _, document in samples.write_document(model, _BYTES, request, keep=True):
    kept, first = document, sample
  assert kept.num_tokens == 1 + len('a long document') + first.num_shown
  saved_state.save(tmp_path / 'state', kept, model.config, 'model')
  loaded = saved_state.load(tmp_path / 'state', model.config, 'model')
  assert loaded.num_tokens == kept.num_tokens
  rest = samples.Request(
    prompts=[[loaded.token]], max_tokens=30 - first.num_shown, sampling=greedy, document=loaded
  )
  *_, (second, _, kept) = samples.write_document(model, _BYTES, rest, keep=True)
  assert first.text + second.text == whole
  assert kept.num_tokens == 1 + len('a long document') + 30


@pytest.mark.slow
# Within what is written at once, and from the first such piece to the second.
@pytest.mark.parametrize('place', [slice(9, 12), slice(2, writer.CHUNK + 4)], ids=str)
def test_what_is_kept_has_read_nothing_after_the_text(model, place):
  whole, _, _ = _written(model, _request('x'))[0]
  request = _request('x', stop=[whole[place]])
  *_, (sample, _, document) = samples.write_document(model, _BYTES, request, keep=True)
  assert sample.end == 'stop'
  read = [_END, *b'x', *_tokens(model)[: sample.num_shown]]
  assert document.token == read[-1] and document.num_tokens == len(read)


def _tokens(model):
  rows = writer.Writer(model, _request('x').prompts, jax.random.key(3), sampling=Sampling())
  return [*rows.more(24)[0], *rows.more(23)[0]]


@pytest.mark.slow
def test_nothing_is_written_where_nothing_is_asked_for(model):
  request = _request('a prompt', max_tokens=0)
  ((sample, piece, document),) = samples.write_document(model, _BYTES, request, keep=True)
  assert (piece, sample.end) == ('', 'max_tokens')
  assert document.num_tokens == 9 and document.token == ord('t')


@pytest.mark.extended
def test_samples_of_several_lengths_go_on_from_one_document(model):
  request = _request('a document', max_tokens=0)
  ((_, _, document),) = samples.write_document(model, _BYTES, request, keep=True)
  prompts = [[document.token, *text] for text in (b' x', b' longer', b' y')]
  options = {'max_tokens': 8, 'sampling': Sampling(), 'document': document, 'seed': 3}
  together = _written(model, samples.Request(prompts=prompts, **options))
  direct = [[_END, *b'a document', *prompt[1:]] for prompt in prompts]
  expected = _written(
    model, samples.Request(prompts=direct, max_tokens=8, sampling=Sampling(), seed=3)
  )
  assert together == expected
