"""The harness asks a model of this library, of tasks that a folder has, and scores its answers."""

import json
import math
import types

import numpy as np
import pytest

from ssm_moe.config import ModelConfig
from ssm_moe.data.tokenizer import ByteTokenizer
from ssm_moe.errors import UserError
from tests.models import small_model

pytest.importorskip('lm_eval', reason='needs the extra [eval]')

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from ssm_moe.interop import harness, likelihood

TOKENIZER = ByteTokenizer()
DOCUMENTS = [
  {'question': 'ab', 'choices': [' cd', ' e'], 'answer': 0},
  {'question': 'x y ', 'choices': ['z', 'zz'], 'answer': 1},
  {'question': 'x y ', 'choices': ['q', 'zz'], 'answer': 0},
]
SHARED = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
validation_split: test
"""
TASKS = {
  'own_choice': """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list: [{metric: acc}]
""",
  'own_rolling': """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
  'own_generation': """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{question}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with tasks and their data; what the library that reads them keeps is there, too."""
  folder = tmp_path_factory.mktemp('tasks')
  data = folder / 'data.jsonl'
  data.write_text(''.join(json.dumps(document) + '\n' for document in DOCUMENTS))
  for name, text in TASKS.items():
    (folder / f'{name}.yaml').write_text(f'task: {name}\n' + SHARED.format(data=data) + text)
  (folder / 'broken.yaml').write_text(
    'task: broken\n' + SHARED.format(data=folder / 'none.jsonl') + TASKS['own_choice']
  )
  return folder


@pytest.fixture(autouse=True)
def cache(folder, monkeypatch):
  import datasets

  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', folder / 'cache')


def make_model(**options):
  return harness.HarnessModel(
    small_model.params(), small_model.CONFIG, TOKENIZER, **({'batch_tokens': 64} | options)
  )


def requests(*arguments):
  return [
    Instance('loglikelihood', {}, args, i, metadata=('task', i, 1))
    for i, args in enumerate(arguments)
  ]


@pytest.mark.slow
def test_a_folder_of_tasks_is_run_and_scored_as_the_logits_say(folder):
  tasks, names = harness.find_tasks(['own_*'], str(folder))
  assert sorted(names) == sorted(TASKS)
  results = harness.run(make_model(), tasks, names, limit=2)
  found = results['results']

  right, bits, num_bytes = [], 0.0, 0
  for document in DOCUMENTS[:2]:
    pairs = [
      likelihood.encode_pair(TOKENIZER, document['question'], choice)
      for choice in document['choices']
    ]
    values = [small_model.likelihood(*pair)[0] for pair in pairs]
    right.append(int(np.argmax(values)) == document['answer'])
    text = document['question'].encode()
    bits -= small_model.likelihood([TOKENIZER.end_of_text], list(text))[0] / math.log(2)
    num_bytes += len(text)
  assert found['own_choice']['acc,none'] == np.mean(right)
  assert found['own_rolling']['bits_per_byte,none'] == pytest.approx(bits / num_bytes, rel=1e-5)
  assert found['own_generation']['exact_match,none'] == 0
  assert json.loads(harness.as_json(results))['results'] == harness.scores(results)


@pytest.mark.slow
def test_answers_come_in_the_order_of_the_requests():
  arguments = [('ab', ' cd'), ('', 'xyz'), ('a long context ', 'b'), ('ab', ' c')]
  answers = make_model().loglikelihood(requests(*arguments))
  for (context, continuation), (value, greedy) in zip(arguments, answers):
    pair = likelihood.encode_pair(TOKENIZER, context, continuation)
    expected = small_model.likelihood(*pair)
    assert (value, greedy) == (pytest.approx(expected[0], rel=1e-5), expected[1])
  # A context that does not fit loses its beginning.
  (short,) = make_model(max_length=4).loglikelihood(requests(('a long context ', 'b')))
  expected = small_model.likelihood([ord(letter) for letter in 'ext'], [ord(' '), ord('b')])
  assert short == (pytest.approx(expected[0], rel=1e-5), expected[1])


@pytest.mark.slow
def test_generation_ends_at_the_first_stop_string_and_at_its_length():
  context = 'abc'
  tokens = small_model.greedy(context.encode(), 6)
  text = TOKENIZER.decode(tokens)
  stop = text[3:5]
  end = text.index(stop)
  settings = ({'until': [], 'max_gen_toks': 6}, {'until': ['never', stop]}, {'until': text[0]})
  answers = make_model().generate_until(requests(*((context, each) for each in settings)))
  assert answers == [text, text[:end], '']


def test_sampling_that_is_not_supported_is_refused():
  asked = requests(('a', {'do_sample': True, 'temperature': 1.0, 'top_p': 0.9}))
  with pytest.raises(UserError, match=r'task task samples with top_p=0\.9; only temperature'):
    make_model().generate_until(asked)
  with pytest.raises(UserError, match='--max_length=5: a task generates 5 tokens'):
    make_model(max_length=5).generate_until(requests(('a', {'max_gen_toks': 5})))


class TheirConvention(TemplateLM):
  """What the harness itself does with text, under the tokenizer of these tests."""

  eot_token_id = TOKENIZER.end_of_text

  def tok_encode(self, string, **_):
    return TOKENIZER.encode(string).tolist()

  def _loglikelihood_tokens(self, requests, **_):
    return [(context, continuation) for _, context, continuation in requests]

  loglikelihood_rolling = generate_until = None


def test_text_is_split_as_the_harness_splits_it():
  arguments = [('ab', ' cd'), ('ab ', 'cd'), ('', ' x'), ('ab \n', 'c'), ('é', 'ü'), ('a', ' ')]
  expected = TheirConvention().loglikelihood(requests(*arguments), disable_tqdm=True)
  for args, split in zip(arguments, expected):
    pair = likelihood.encode_pair(TOKENIZER, *args)
    assert tuple(part.tolist() for part in pair) == split
  text = 'abcdefghij'
  for size in (1, 4, 10, 20):
    windows = utils.get_rolling_token_windows(
      list(text.encode()), TOKENIZER.end_of_text, size, context_len=1
    )
    found = likelihood.rolling_pairs(TOKENIZER, text, size)
    assert [tuple(part.tolist() for part in pair) for pair in found] == [
      utils.make_disjoint_window(window) for window in windows
    ]


def test_tasks_that_are_not_there_are_one_line(folder):
  with pytest.raises(UserError, match='--include_path=nowhere: there is no such folder'):
    harness.find_tasks(['own_choice'], 'nowhere')
  tasks, names = harness.find_tasks(['broken'], str(folder))
  with pytest.raises(UserError, match=r'--harness=broken: cannot be loaded \(\w+: .*none\.jsonl'):
    harness.run(make_model(), tasks, names)


def test_tasks_that_run_code_or_show_pictures_are_refused(folder, monkeypatch):
  tasks, _ = harness.find_tasks(['own_choice'], str(folder))
  for attribute in ('UNSAFE_CODE', 'MULTIMODAL'):
    loaded = {'tasks': {'x': types.SimpleNamespace(**{attribute: True})}}
    monkeypatch.setattr(harness.TaskManager, 'load', lambda *_, it=loaded: it)
    with pytest.raises(UserError, match=r'--harness=x: the task .*, which is not supported'):
      tasks.load(['x'])


@pytest.mark.extended
def test_tasks_of_the_harness_are_found_by_name(folder):
  tasks, names = harness.find_tasks(['lambada_openai', 'own_choice'], str(folder))
  assert names == ['lambada_openai', 'own_choice'] and 'hellaswag' in tasks.all_tasks
  with pytest.raises(UserError, match=r'--harness=helaswag: there is no such task; .*hellaswag'):
    harness.find_tasks(['helaswag'])


def test_a_model_of_another_vocabulary_is_refused():
  with pytest.raises(UserError, match='vocabulary of 40 tokens is not that of tokenizer bytes'):
    harness.check_model(ModelConfig(vocab_size=40), TOKENIZER)


def test_what_is_not_finite_is_none():
  found = {'results': {'task': {'acc': 1, 'perplexity': math.inf, 'stderr': 'N/A'}}}
  assert harness.scores(found) == {'task': {'acc': 1.0, 'perplexity': None}}


def test_the_table_has_each_metric_and_its_error():
  metrics = {'sample_len': 3.0, 'acc,none': 0.5, 'acc_stderr,none': 0.25, 'match,strict': None}
  assert harness.table({'a': metrics}).splitlines() == [
    'task  metric          value',
    'a     acc             0.5000  ± 0.2500',
    'a     match (strict)  -',
  ]
