"""TensorBoard event files, written record by record without TensorFlow.

TensorBoard's own writers import TensorFlow wherever it is installed, which takes seconds, and they
write from a daemon thread. Its protocol buffers need neither.
"""

import itertools
import os
import pathlib
import socket
import struct
import time
from collections.abc import Mapping

import numpy as np
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from ssm_moe.shapes import Float

_count = itertools.count()


class EventFile:
  """One new event file in `directory`, as TensorBoard reads it.

  Args:
    directory: Made if it does not exist.
    first_step: TensorBoard hides what older files there say of this step and of later ones.
  """

  def __init__(self, directory: str | os.PathLike, *, first_step: int):
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads the files of a folder in the order of their names.
    name = (
      f'events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}'
      f'.{next(_count):06d}'
    )
    self._file = (directory / name).open('xb')
    self._write(event_pb2.Event(file_version='brain.Event:2'))
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(event_pb2.Event(step=first_step, session_log=start))
    self._file.flush()

  def write(
    self,
    step: int,
    scalars: Mapping[str, float],
    bars: Mapping[str, Float[np.ndarray, 'E']] | None = None,
  ) -> None:
    """Appends what was measured at a step, and flushes.

    Args:
      step: Training steps done.
      scalars: Value by tag.
      bars: Heights by tag; shown as a histogram whose bucket i is entry i.
    """
    summary = summary_pb2.Summary()
    for tag, value in scalars.items():
      summary.value.add(
        tag=tag,
        metadata=_metadata('scalars', summary_pb2.DATA_CLASS_SCALAR),
        tensor=tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT, float_val=[value]),
      )
    for tag, heights in (bars or {}).items():
      left = np.arange(len(heights))
      buckets = np.stack([left, left + 1, heights], axis=1).astype(np.float64)
      shape = tensor_shape_pb2.TensorShapeProto(
        dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=size) for size in buckets.shape]
      )
      summary.value.add(
        tag=tag,
        metadata=_metadata('histograms', summary_pb2.DATA_CLASS_TENSOR),
        tensor=tensor_pb2.TensorProto(
          dtype=types_pb2.DT_DOUBLE, tensor_shape=shape, tensor_content=buckets.tobytes()
        ),
      )
    self._write(event_pb2.Event(step=step, summary=summary))
    self._file.flush()

  def close(self) -> None:
    self._file.close()

  def _write(self, event: event_pb2.Event) -> None:
    event.wall_time = time.time()
    data = event.SerializeToString()
    length = struct.pack('<Q', len(data))
    self._file.write(
      length
      + struct.pack('<I', masked_crc32c(length))
      + data
      + struct.pack('<I', masked_crc32c(data))
    )


def _metadata(plugin: str, data_class: int) -> summary_pb2.SummaryMetadata:
  return summary_pb2.SummaryMetadata(
    plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name=plugin), data_class=data_class
  )
