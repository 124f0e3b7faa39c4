"""The manifest of a checkpoint folder: what it holds, and the checksum of each file.

It is JSON with its own SHA-256 in it, and it is written last: a folder without a good manifest is
no checkpoint.
"""

import hashlib
import json
import pathlib
from typing import Any

from ssm_moe.errors import UserError
from ssm_moe.training import durable

# Raised by one when a reader of the former version could misread a checkpoint. The encoding and the
# keys 'schema_version' and 'sha256' keep their meaning in every version.
SCHEMA_VERSION = 1
FILE_NAME = 'MANIFEST.json'


class DamagedError(Exception):
  """Why a folder is not a whole checkpoint, in a few words."""


def encode(manifest: dict[str, Any]) -> bytes:
  """Returns the one spelling in which a manifest is written.

  Raises:
    ValueError or TypeError: a value that strict JSON does not hold, such as NaN.
  """
  return (json.dumps(manifest, indent=1, allow_nan=False) + '\n').encode()


def write(folder: pathlib.Path, manifest: dict[str, Any]) -> None:
  """Writes `manifest` into `folder` with its checksum, at once and durably."""
  signed = manifest | {'sha256': hashlib.sha256(encode(manifest)).hexdigest()}
  durable.write(folder / FILE_NAME, encode(signed))


def read(folder: pathlib.Path) -> dict[str, Any]:
  """Reads the manifest of `folder`, without a look at the files that it lists.

  Raises:
    DamagedError: it is missing, or any bit of it has changed.
    UserError: a newer version of this library wrote it.
  """
  try:
    text = (folder / FILE_NAME).read_bytes()
  except OSError as error:
    raise DamagedError(f'{FILE_NAME}: {error.strerror}') from None
  try:
    signed = json.loads(text)
    manifest = {key: value for key, value in signed.items() if key != 'sha256'}
    digest = hashlib.sha256(encode(manifest)).hexdigest()
    # Compared as bytes: a flipped bit can turn one spelling of a number into another of the same.
    whole = encode(manifest | {'sha256': digest}) == text
  except (ValueError, AttributeError, RecursionError):
    whole = False
  if not whole:
    raise DamagedError(f'{FILE_NAME} does not have its checksum')
  if manifest['schema_version'] > SCHEMA_VERSION:
    raise UserError(
      f'{folder}: a newer ssm_moe wrote it (schema {manifest["schema_version"]}); '
      f'this one reads up to schema {SCHEMA_VERSION}'
    )
  return manifest


def list_files(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns size and SHA-256 of every file under `folder`, for a manifest to hold."""
  return {
    path.relative_to(folder).as_posix(): {'bytes': path.stat().st_size, 'sha256': _sha256(path)}
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def check_files(folder: pathlib.Path, manifest: dict[str, Any], *, checksums: bool) -> None:
  """Compares the files of `folder` with its manifest: their sizes, and what is in them.

  Raises:
    DamagedError: names the first file that is missing, cut short or altered.
  """
  for name, entry in manifest['files'].items():
    path = folder / name
    try:
      size = path.stat().st_size
      if size != entry['bytes']:
        raise DamagedError(f'{name} has {size} bytes instead of {entry["bytes"]}')
      if checksums and _sha256(path) != entry['sha256']:
        raise DamagedError(f'{name} does not have its checksum')
    except OSError as error:
      raise DamagedError(f'{name}: {error.strerror}') from None


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
