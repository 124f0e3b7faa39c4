"""Small token folders and a small Hugging Face tokenizer."""

import numpy as np
import pytest

from ssm_moe.data.token_files import TokenFolder
from ssm_moe.data.tokenizer import ByteTokenizer


@pytest.fixture(scope='session')
def folder_of():
  """Returns a function that makes an open folder, in memory, of documents of token ids."""

  def make(documents):
    end = ByteTokenizer.end_of_text
    lengths = [len(document) + 1 for document in documents]
    return TokenFolder(
      name='memory',
      source='test',
      vocab_size=ByteTokenizer.vocab_size,
      end_of_text=end,
      tokenizer_name=ByteTokenizer.name,
      tokenizer_sha256=ByteTokenizer.sha256,
      tokens=np.array([token for document in documents for token in [*document, end]], np.uint16),
      document_offsets=np.cumsum([0, *lengths], dtype=np.int64),
      document_bytes=np.array([len(document) for document in documents], np.int64),
    )

  return make


@pytest.fixture(scope='session')
def tokenizer_json(tmp_path_factory):
  """A byte-level BPE of 300 ids, with a template, truncation and padding that must not apply."""
  tokenizers = pytest.importorskip('tokenizers')
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=['</s>', '<|endoftext|>', '<s>'],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(['the cat sat on the mat, the rat sat on the cat'] * 10, trainer)
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single='<s> $A </s>', special_tokens=[('<s>', 2), ('</s>', 0)]
  )
  tokenizer.enable_truncation(3)
  tokenizer.enable_padding(length=5)
  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.json'
  tokenizer.save(str(path))
  return path
