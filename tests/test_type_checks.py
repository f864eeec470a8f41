"""Types in signatures of blip_jax are checked while tests run."""

from collections.abc import Callable, Mapping, Sequence

import beartype.roar
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jaxtyping import Float, Int, PRNGKeyArray

from blip_jax.evaluators.scores import ngrams
from blip_jax.models import config
from blip_jax.tasks import losses
from tests import type_checks


def test_a_wrong_type_is_an_error():
  with pytest.raises(beartype.roar.BeartypeCallHintParamViolation):
    ngrams.count(3)


def test_wrong_axes_of_an_array_are_an_error():
  logits, labels = jnp.zeros((2, 3, 5)), jnp.zeros((2, 4), jnp.int32)
  losses.token_losses(logits, labels[:, :3])
  with pytest.raises(jaxtyping.TypeCheckError, match="labels"):
    losses.token_losses(logits, labels)


@pytest.mark.parametrize(
  "annotation, expected",
  [
    (Float[jax.Array, "B"], True),
    (Float[jax.Array, "B"] | None, True),
    (Mapping[str, Int[np.ndarray, "N"]], True),
    (Sequence[tuple[int, Float[np.ndarray, "4"]]], True),
    (Callable[[Float[jax.Array, "B"]], int], True),
    (PRNGKeyArray, True),
    ("not resolved yet", True),
    (Callable[..., int], False),
    (Sequence[str], False),
    (config.BlipConfig, False),
    (None, False),
  ],
)
def test_signatures_that_name_arrays(annotation, expected):
  def function(x):
    pass

  function.__annotations__["return"] = annotation
  assert type_checks.names_arrays(function) == expected
