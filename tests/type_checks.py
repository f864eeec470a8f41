"""Checks the types of blip_jax in tests, but those of arrays only where some
are named.

The hook of jaxtyping gives each function the names of axes, which are bound
anew in each call. This takes longer than what most functions do, and without
an array in its signature a function has no axes: beartype alone checks the
same.
"""

import inspect
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping

_jaxtyped = jaxtyping.jaxtyped


def install() -> None:
  """Decides it for all modules that the hook of jaxtyping loads from now on."""
  jaxtyping.jaxtyped = jaxtyped


def jaxtyped(*, typechecker: Callable) -> Callable:
  """Replaces `jaxtyping.jaxtyped`, as the hook applies it."""

  def decorate(checked: Any) -> Any:
    if names_arrays(checked) or inspect.isclass(checked):
      return _jaxtyped(checked, typechecker=typechecker)
    return typechecker(checked)

  return decorate


def names_arrays(function: Any) -> bool:
  """Whether a signature names the dtype or the axes of an array."""
  annotations = getattr(function, "__annotations__", {}).values()
  return any(map(_is_array, annotations))


def _is_array(annotation: Any) -> bool:
  if isinstance(annotation, str):
    return True  # not resolved yet, and may name anything
  if isinstance(annotation, list | tuple):  # arguments of a callable
    return any(map(_is_array, annotation))
  if isinstance(annotation, type) and not typing.get_args(annotation):
    module = annotation.__module__.partition(".")[0]
    return module == "jaxtyping"
  return _is_array(typing.get_args(annotation))
