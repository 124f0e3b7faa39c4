"""Where tokens come from: files and generators in, batches of NumPy arrays out.

Text becomes a folder of tokens once (`text`, `standard_library`, `tfds_source`, `tokenizer`,
`token_files`), a name becomes a source (`sources`, `synthetic`), documents become windows
(`packing`), and windows become batches (`pipeline`, `evaluation`). This room is a leaf: it runs no
model, and imports nothing but leaves such as `config` and `errors`.
"""

from ssm_moe.errors import UserError


class DataError(UserError):
  """Data that is missing, damaged or does not fit the rest; one line that names it."""
