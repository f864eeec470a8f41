"""What a decoder predicts: the next token at every position.

Dimensions: B texts, L text length, D width, V vocabulary, W rows of its padded
matrix.
"""

from typing import NamedTuple

from jaxtyping import Array, Float

from blip_jax.models import layers


class Predictions(NamedTuple):
  """Output of a decoder, whose logits are `features @ matrix.T + bias`.

  They are as wide as the vocabulary, so that training computes those of some
  positions at a time (`tasks.losses.lm_loss`).

  Attributes:
    features: of every position.
    matrix: of the tokens, from `output_matrix`.
    bias: of the tokens.
  """

  features: Float[Array, "B L D"]
  matrix: Float[Array, "W D"]
  bias: Float[Array, " V"]

  def logits(self) -> Float[Array, "B L V"]:
    """Logits of all positions, in float32."""
    logits = layers.scores("bld,vd->blv", self.features, self.matrix)
    return logits[..., : len(self.bias)] + self.bias[None, None]


def output_matrix(
  embeddings: Float[Array, "V D"], dtype: str
) -> Float[Array, "W D"]:
  """Word embeddings as `Predictions` needs them.

  In half precision there are rows of zeros up to a multiple of 128, since
  accelerators are slow at products of odd sizes, such as 30,524.
  """
  return layers.pad(embeddings.astype(dtype), 0, 128)
