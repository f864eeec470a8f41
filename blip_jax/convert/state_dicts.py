"""Finds the state dict in what a training program saved."""

from collections.abc import Mapping
from typing import Any

from blip_jax.convert.pickles import BRIEF, RESAVE, Refusal, Tensor

# Keys under which training programs save a state dict, in any nesting.
CONTAINERS = (
  "model",
  "state_dict",
  "model_state_dict",
  "model_state",
  "module",  # DeepSpeed
  "net",
  "network",
  "params",
  "weights",
  "checkpoint",
  "ema",
  "model_ema",
  "ema_model",
  "ema_state_dict",
)
_MAX_NESTING = 3


def find(saved: Any) -> tuple[dict[str, Tensor], list[str]]:
  """Returns the state dict in a saved value, and the other keys next to it.

  Args:
    saved: a state dict, alone or in CONTAINERS.

  Raises:
    Refusal: there is none, or more than one.
  """
  if not isinstance(saved, dict):
    raise Refusal(
      f"expected a state dict, found a {_kind(saved)}; save one: {RESAVE}"
    )
  ignored = []
  for _ in range(_MAX_NESTING):
    inner = [key for key in CONTAINERS if isinstance(saved.get(key), dict)]
    # Hyper-parameters may have the same keys. If nothing holds weights, the
    # first is what the error is about.
    inner = [key for key in inner if _holds_weights(saved[key])] or inner[:1]
    if not inner:
      break
    if len(inner) > 1:
      found = " and ".join(map(repr, inner))
      raise Refusal(
        f"{found} each hold weights, and only one set can be loaded; save the "
        f"one that you want: {RESAVE}"
      )
    (key,) = inner
    ignored += [str(k) for k in saved if k != key]
    saved = saved[key]
  return checked(saved), ignored


def _holds_weights(value: Any, nesting: int = _MAX_NESTING) -> bool:
  if not isinstance(value, dict) or not nesting:
    return False
  return any(isinstance(x, Tensor) for x in value.values()) or any(
    _holds_weights(value.get(key), nesting - 1) for key in CONTAINERS
  )


def checked(tensors: Mapping[Any, Any]) -> Any:
  """Returns a state dict; raises `Refusal` unless it is names and tensors."""
  others = [
    f"{BRIEF.repr(name)}: {_kind(value)}"
    for name, value in tensors.items()
    if not isinstance(name, str) or not isinstance(value, Tensor)
  ]
  if others or not tensors:
    raise Refusal(
      "expected a state dict (names and tensors), alone or under one of "
      f"{', '.join(CONTAINERS)}; found {', '.join(others[:5]) or 'no tensors'}"
      f"{', ...' if others[5:] else ''}; save one: {RESAVE}"
    )
  return tensors


def _kind(value: Any) -> str:
  return type(value).__name__.lstrip("_")
