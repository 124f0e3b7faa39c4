"""What is evaluated apart from training is what training evaluates."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from ssm_moe.config import DataConfig, ExperimentConfig, ModelConfig, SampleConfig
from ssm_moe.data import DataError
from ssm_moe.training import evaluation, trained, workdir
from tests import tolerances
from tests.training import finished_run, small_run


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run that is at its end, what it says there, and its text."""
  folder = tmp_path_factory.mktemp('evaluation')
  text = small_run.write_text(folder)
  config = small_run.make_config(text)
  config = dataclasses.replace(config, sample=SampleConfig(num_tokens=0))
  finished_run.write(config, folder / 'run')
  return folder / 'run', small_run.run(config, folder / 'run'), text


def evaluate(folder, data=(), max_tokens=None):
  config = workdir.read_config(folder)
  experiment = evaluation.with_data(config, data)
  batches = evaluation.open_batches(experiment, cache_dir=folder / 'tokens', max_tokens=max_tokens)
  with jax.numpy_dtype_promotion('standard'):
    params, step = trained.read_params(folder, config)
    assert step == small_run.STEPS
    return evaluation.evaluate(experiment, params, batches)


@pytest.mark.slow
def test_the_numbers_are_those_of_training(run):
  folder, summary, _ = run
  result = evaluate(folder)
  assert list(result) == ['loss', 'perplexity', 'bits_per_byte', 'tokens', 'bytes']
  loss, bits = summary['valid_loss'], summary['valid_bits_per_byte']
  for key, expected in (('loss', loss), ('bits_per_byte', bits), ('perplexity', math.exp(loss))):
    rtol = tolerances.FLOAT32_REORDERED
    tolerances.assert_close(np.float64(result[key]), np.float64(expected), rtol=rtol)
  assert result['tokens'] <= 300  # the run's own eval_tokens


@pytest.mark.slow
def test_other_data_is_taken_whole_unless_a_number_of_tokens_is_given(run):
  folder, _, text = run
  with open(text) as file:
    documents = [json.loads(line)['text'] for line in file]
  whole = evaluate(folder, [text])
  assert whole['bytes'] == sum(map(len, documents))
  assert whole['tokens'] == whole['bytes'] + len(documents)
  # As many tokens as the run itself evaluates on, of the same file.
  assert evaluate(folder, [text], max_tokens=300) == evaluate(folder)


@pytest.mark.parametrize(
  ('data', 'tokenizer', 'vocab_size', 'message'),
  [
    ('none.txt', None, 257, '--data: none.txt: no such file or folder'),
    ('empty.jsonl', None, 257, '--data: the documents to evaluate on are all empty'),
    ('empty.jsonl', 'x.json', 257, 'tokenizer x.json cannot be read'),
    ('empty.jsonl', None, 40, "the model's vocabulary is 40; empty.jsonl has token ids up to 256"),
  ],
)
def test_data_that_does_not_fit_is_one_line(
  tmp_path, monkeypatch, data, tokenizer, vocab_size, message
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'empty.jsonl').write_text('{"text": ""}\n')
  model = ModelConfig(vocab_size=vocab_size)
  config = ExperimentConfig(model=model, data=DataConfig(valid=('elsewhere',)))
  experiment = evaluation.with_data(config, [data], tokenizer)
  with pytest.raises(DataError) as raised:
    evaluation.open_batches(experiment, cache_dir=tmp_path / 'tokens')
  assert str(evaluation.in_flags(raised.value)).startswith(message)
