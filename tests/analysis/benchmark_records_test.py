"""Records are added to those of a file, and to nothing that is something else."""

import json

import pytest

from ssm_moe.analysis import benchmark_records
from ssm_moe.errors import UserError


def _record(name, milliseconds):
  record = benchmark_records.make_record(
    [milliseconds], name=name, shape='', dtype='', implementation='xla', pass_='forward', tokens=1
  )
  return record.as_dict()


def test_new_records_replace_their_own_and_leave_the_others(tmp_path):
  path = tmp_path / 'records.json'
  assert benchmark_records.read('output', path) == []
  benchmark_records.write(path, [], [_record('a', 1.0), _record('b', 2.0)])
  earlier = benchmark_records.read('output', path)
  benchmark_records.write(path, earlier, [_record('b', 3.0), _record('c', 4.0)])
  records = json.loads(path.read_text())
  assert {r['name']: r['median_ms'] for r in records} == {'a': 1.0, 'b': 3.0, 'c': 4.0}


def test_nothing_measured_writes_nothing(tmp_path):
  benchmark_records.write(tmp_path / 'records.json', [], [])
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('text', ['', 'mine', '3', '{"name": 1}', '[{"name": 1}]', '[1]'])
def test_a_file_of_another_kind_is_left_as_it_is(tmp_path, text):
  path = tmp_path / 'notes'
  path.write_text(text)
  with pytest.raises(UserError, match='no list of records; give another name'):
    benchmark_records.read('output', path)
  assert path.read_text() == text
