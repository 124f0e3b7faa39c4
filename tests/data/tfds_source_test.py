"""A TFDS data set, built by the test, is read without TensorFlow."""

import sys

import numpy as np
import pytest

from ssm_moe.data import DataError
from ssm_moe.data.tfds_source import open_tfds

tfds = pytest.importorskip('tensorflow_datasets')
pytest.importorskip('array_record')


class SsmMoeTinyText(tfds.core.GeneratorBasedBuilder):
  """Twenty documents to train on, five to validate, three to test."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = {'text': tfds.features.Text(), 'raw': tfds.features.Text(), 'label': np.int64}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {
      'train': self._generate_examples(0, 20),
      'validation': self._generate_examples(20, 25),
      'test': self._generate_examples(25, 28),
    }

  def _generate_examples(self, start, stop):
    for i in range(start, stop):
      yield i, {'text': f'document {i} é', 'raw': b'\xff', 'label': i}


@pytest.fixture(autouse=True, scope='module')
def data_dir(tmp_path_factory):
  # The library reads TFDS_DATA_DIR when it is imported, which may be long ago.
  patch = pytest.MonkeyPatch()
  patch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path_factory.mktemp('tfds')))
  yield
  patch.undo()


@pytest.mark.parametrize(
  ('name', 'split', 'numbers'),
  [
    ('tfds:ssm_moe_tiny_text', 'train', range(20)),
    ('tfds:ssm_moe_tiny_text', 'valid', range(20, 25)),
    ('tfds:ssm_moe_tiny_text:1.0.0@test', 'valid', range(25, 28)),
  ],
)
def test_every_record_of_the_split_is_a_document(name, split, numbers):
  documents = list(open_tfds(name, split).documents('text'))
  assert sorted(documents) == sorted(f'document {i} é' for i in numbers)
  assert 'tensorflow' not in sys.modules


def test_slices_are_parts_with_their_own_identity():
  parts = [open_tfds(f'tfds:ssm_moe_tiny_text@train[{part}]', 'train') for part in ('50%:', ':50%')]
  whole = open_tfds('tfds:ssm_moe_tiny_text', 'train')
  texts = [text for part in parts for text in part.documents('text')]
  assert sorted(texts) == sorted(whole.documents('text'))
  assert len({source.identity for source in (*parts, whole)}) == 3


@pytest.mark.parametrize(
  ('name', 'field', 'reason'),
  [
    ('tfds:no_such_data_set_here', 'text', 'cannot be prepared .*not found'),
    ('tfds:ssm_moe_tiny_text:9.9.9', 'text', 'cannot be prepared'),
    ('tfds:ssm_moe_tiny_text@dev', 'text', 'no train split; name one of train, validation, test'),
    ('tfds:ssm_moe_tiny_text@train[x]', 'text', 'train'),
    ('tfds:ssm_moe_tiny_text', 'body', "no field 'body'; there are: .*text"),
    ('tfds:ssm_moe_tiny_text', 'label', 'it must be text'),
    ('tfds:ssm_moe_tiny_text', 'raw', 'not UTF-8'),
  ],
)
def test_mistakes_are_named_in_one_line(name, field, reason):
  with pytest.raises(DataError, match=reason) as caught:
    list(open_tfds(name, 'train').documents(field))
  assert name in str(caught.value) and '\n' not in str(caught.value)


def test_a_missing_library_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  with pytest.raises(DataError, match=r"pip install 'ssm_moe\[tfds\]'"):
    open_tfds('tfds:ssm_moe_tiny_text', 'train')
