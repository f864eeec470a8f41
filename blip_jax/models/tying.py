"""Weights that encoder and decoder of the text share in pre-training."""

from flax import traverse_util

from blip_jax.models import med


def tie(params: med.Params) -> med.Params:
  """Completes the decoder with the parameters it shares with the encoder.

  In pre-training (paper, Table 3) the decoder uses the encoder's embeddings,
  cross-attention and feed-forward layers.  It has its own self-attention,
  LayerNorm included, and LM head.

  Args:
    params: parameters as pre-training stores them; see `drop_tied`.
  """
  encoder = traverse_util.flatten_dict(params["text_encoder"])
  decoder = traverse_util.flatten_dict(params["text_decoder"])
  shared = {path: x for path, x in encoder.items() if is_shared(path)}
  tied = traverse_util.unflatten_dict({**shared, **decoder})
  return {**params, "text_decoder": tied}


def drop_tied(params: med.Params) -> med.Params:
  """Removes the decoder's shared parameters; the inverse of `tie`.

  The result is what pre-training stores, optimises and counts.
  """
  decoder = traverse_util.flatten_dict(params["text_decoder"])
  unshared = {path: x for path, x in decoder.items() if not is_shared(path)}
  return {**params, "text_decoder": traverse_util.unflatten_dict(unshared)}


def is_shared(path: tuple[str, ...]) -> bool:
  """Whether encoder and decoder share the parameter at this path of a text
  tower in pre-training."""
  return "attention" not in path and "lm_head" not in path
