"""Tokenises text: python experiments/tokenize.py --input=texts.jsonl.xz --output=tokens/texts"""

import sys

if __name__ == 'tokenize':
  # A script of this folder has the folder first on its path, so that `import tokenize`, which the
  # standard library does itself, finds this file. Hand over to the module that was meant.
  import os

  path, here = list(sys.path), os.path.dirname(os.path.abspath(__file__))
  sys.path[:] = [entry for entry in path if os.path.abspath(entry) != here]
  del sys.modules['tokenize']
  import tokenize  # noqa: F401

  sys.path[:] = path
else:
  import json

  from absl import flags
  from tqdm import tqdm

  from ssm_moe import command_line
  from ssm_moe.data import DataError, text, token_files, tokenizer

  _INPUT = flags.DEFINE_multi_string(
    'input', None, f'A file ({", ".join(text.SUFFIXES)}), a folder or a glob; may be repeated.'
  )
  _OUTPUT = flags.DEFINE_string('output', None, 'The folder of tokens to write; must not exist.')
  _TOKENIZER = flags.DEFINE_string(
    'tokenizer', 'bytes', "'bytes', or the path of a Hugging Face tokenizer.json."
  )
  _TEXT_FIELD = flags.DEFINE_string('text_field', 'text', 'Of JSON Lines and Parquet files.')

  def main():
    for flag in (_INPUT, _OUTPUT):
      if not flag.value:
        raise DataError(f'--{flag.name} is not given')
    files = [file for pattern in _INPUT.value for file in text.find_files(pattern)]
    encoder = tokenizer.load_tokenizer(_TOKENIZER.value)
    # On terminals only: where standard error is kept, a mistake is to be its only line.
    with tqdm(unit='B', unit_scale=True, desc='Tokenising', disable=None) as bar:
      folder = token_files.write_token_folder(
        _OUTPUT.value,
        text.read_documents(files, _TEXT_FIELD.value),
        encoder,
        source=' '.join(_INPUT.value),
        progress=bar.update,
      )
    result = {
      'documents': folder.num_documents,
      'tokens': folder.num_tokens,
      'bytes': folder.num_bytes,
      'bytes_per_token': round(folder.num_bytes / folder.num_tokens, 4),
      'output': _OUTPUT.value,
    }
    print(json.dumps(result))

  if __name__ == '__main__':
    command_line.run(main)
