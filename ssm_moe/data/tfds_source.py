"""Documents out of any TensorFlow Datasets data set, by name, without TensorFlow (extra `[tfds]`).

A TFDS data source reads array_record files by index. A data set that is not on this machine in that
format is downloaded and prepared once, under TFDS_DATA_DIR or ~/tensorflow_datasets.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from ssm_moe.data import DataError

PREFIX = 'tfds:'
_DEFAULT_SPLITS = {'train': ('train',), 'valid': ('validation', 'valid')}


@dataclasses.dataclass(frozen=True)
class TfdsText:
  """One split of a data set, prepared on this machine.

  Attributes:
    name: The whole name that the user gave.
    identity: What decides its documents: data set, config, version and split.
    records: Random access to the records.
  """

  name: str
  identity: str
  records: Any

  def documents(self, text_field: str) -> Iterator[str]:
    """Yields the text of each record.

    Raises:
      DataError: a record has no such field, or it is not UTF-8 text.
    """
    for i in range(len(self.records)):
      record = self.records[i]
      if text_field not in record:
        raise DataError(f'{self.name}: no field {text_field!r}; there are: {", ".join(record)}')
      value = record[text_field]
      if not isinstance(value, bytes):
        kind = type(value).__name__
        raise DataError(f'{self.name}: the field {text_field!r} is of type {kind}; it must be text')
      try:
        yield value.decode('utf-8')
      except UnicodeDecodeError as error:
        raise DataError(f'{self.name}: record {i} is not UTF-8 ({error.reason})') from None


def open_tfds(name: str, split: Literal['train', 'valid']) -> TfdsText:
  """Opens 'tfds:NAME[/CONFIG][:VERSION][@SPLIT]'.

  Args:
    name: SPLIT may be a slice, such as train[99%:].
    split: Decides SPLIT if `name` does not: 'train', or 'validation' or 'valid'. There is no
      fallback to a test split.

  Raises:
    DataError: the library or the data set is missing, or it has no such split.
  """
  try:
    import tensorflow_datasets as tfds
  except ImportError:
    raise DataError(
      f"{name} needs the package tensorflow_datasets: pip install 'ssm_moe[tfds]'"
    ) from None
  data_set, _, wanted = name.removeprefix(PREFIX).partition('@')
  try:
    builder = tfds.builder(data_set, file_format='array_record')
    builder.download_and_prepare()
  except Exception as error:  # downloads, checksums and builders raise of many kinds
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise DataError(f'{name} cannot be prepared ({reason})') from error
  there_are = list(builder.info.splits)
  if not wanted:
    wanted = next((known for known in _DEFAULT_SPLITS[split] if known in there_are), '')
  if wanted.partition('[')[0] not in there_are:
    raise DataError(
      f'{name}: no {split} split; name one of {", ".join(there_are)}, as in '
      f'{PREFIX}{data_set}@{there_are[0]}[90%:]'
    )
  try:
    records = builder.as_data_source(split=wanted)
  except Exception as error:
    raise DataError(f'{name}: {" ".join(str(error).split())}') from error
  return TfdsText(name=name, identity=f'{builder.info.full_name}@{wanted}', records=records)
