"""What a family of published models is: how its config is read and written, and its tensors."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ssm_moe.config import Mamba2Config, MambaConfig, ModelConfig
from ssm_moe.errors import UserError
from ssm_moe.interop.layout import Tensor
from ssm_moe.interop.settings import Settings


class Family(NamedTuple):
  """A family of published models.

  Attributes:
    name: As messages and flags call it.
    recognises: Whether a config.json is of this family.
    letters: Of the layers that it can have, in our patterns.
    read: Returns the model that a config.json describes, in float32, or raises a UserError.
    write: Returns the config.json of a model that `check_writable` has let pass, or raises one.
    tensors: Returns the tensors of a model.
  """

  name: str
  recognises: Callable[[dict[str, Any]], bool]
  letters: str
  read: Callable[[Settings], ModelConfig]
  write: Callable[[ModelConfig], dict[str, Any]]
  tensors: Callable[[ModelConfig], list[Tensor]]


def check_writable(config: ModelConfig, family: Family) -> None:
  """Checks that a model is a stack of one kind of mixer without experts, each behind its RMSNorm.

  Raises:
    UserError: it is not; names the field.
  """

  def require(condition: bool, field: str, value: Any, allowed: str) -> None:
    if not condition:
      raise UserError(f'config.model.{field} is {value!r}; in the format {family.name} {allowed}')

  kinds = set(config.layers)
  one_kind = kinds <= set(family.letters) and len({letter.upper() for letter in kinds}) == 1
  alone = all(len(group) == 1 for group in config.groups)
  letters = ' or '.join(sorted({letter.upper() for letter in family.letters}))
  require(one_kind and alone, 'pattern', config.pattern, f'all layers are {letters}')
  name, mixer = mixer_of(config)
  routed = config.routings()
  require(not routed, f'{name}.rom.kind', mixer.rom.kind, 'mixers have no experts: it must be none')
  require(config.norm.kind == 'rms', 'norm.kind', config.norm.kind, 'it is rms')
  require(config.final_norm, 'final_norm', config.final_norm, 'it is True')
  d_inner = mixer.inner_size(config.d_model)
  require(d_inner % config.d_model == 0, f'{name}.d_inner', d_inner, 'it is a multiple of d_model')


def mixer_of(config: ModelConfig) -> tuple[str, MambaConfig | Mamba2Config]:
  """Returns the name and the config of the mixer that a stack is of."""
  name = 'mamba' if config.layers[0].upper() == 'M' else 'mamba2'
  return name, getattr(config, name)


def expand_of(config: ModelConfig) -> int:
  """Returns d_inner / d_model."""
  return mixer_of(config)[1].inner_size(config.d_model) // config.d_model
