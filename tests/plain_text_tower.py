"""The text tower in NumPy and float64, whose attention to an image can be set.

Written from the paper's description, for tests of what `jax.grad` finds.
"""

import math

import numpy as np
from scipy.special import erf


def softmax(x):
  x = np.exp(x - x.max(axis=-1, keepdims=True))
  return x / x.sum(axis=-1, keepdims=True)


def dense(params, x):
  return x @ params["kernel"] + params["bias"]


def norm(params, x):
  x = x - x.mean(axis=-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-12)
  return x * params["scale"] + params["bias"]


def gelu(x):
  return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def attend(params, num_heads, x, states, mask, given=None):
  """The output, and the attention probabilities [H, L, N]; `given` replaces
  these."""

  def heads(name, x):
    y = dense(params[name], x)
    return y.reshape(len(y), num_heads, -1).transpose(1, 0, 2)

  query, key, value = (
    heads("query", x),
    heads("key", states),
    heads("value", states),
  )
  scores = query @ key.transpose(0, 2, 1) / math.sqrt(query.shape[-1])
  weights = softmax(np.where(mask, scores, -1e30)) if given is None else given
  merged = (weights @ value).transpose(1, 0, 2).reshape(x.shape)
  return norm(params["ln"], x + dense(params["out"], merged)), weights


def hidden_states(params, num_heads, ids, image, causal=False, given=None):
  """Hidden states [L, D] of a text, and its attention to the image by layer.

  Args:
    params: of the tower; layers stacked.
    num_heads: of a layer.
    ids: tokens without padding.
    image: image tokens [N, E].
    causal: whether a token attends to the ones before it only.
    given: layer -> attention probabilities that replace its own.
  """
  x = params["word_embeddings"][ids] + params["position_embeddings"][: len(ids)]
  x = norm(params["ln_embed"], x)
  mask = np.tri(len(ids), dtype=bool) if causal else True
  depth, attention = len(params["layers"]["ln"]["scale"]), []
  for i in range(depth):
    own = _layer(params["layers"], i)
    x, _ = attend(own["attention"], num_heads, x, x, mask)
    fixed = (given or {}).get(i)
    x, weights = attend(own["crossattention"], num_heads, x, image, True, fixed)
    attention.append(weights)
    y = dense(own["fc_out"], gelu(dense(own["fc_in"], x)))
    x = norm(own["ln"], x + y)
  return x, attention


def log_probs(params, hidden):
  """Log-probabilities [L, V] of the token after each."""
  head = params["lm_head"]
  x = norm(head["ln"], gelu(dense(head["transform"], hidden)))
  logits = x @ params["word_embeddings"].T + head["bias"]
  return np.log(softmax(logits))


def _layer(tree, i):
  if isinstance(tree, dict):
    return {name: _layer(value, i) for name, value in tree.items()}
  return tree[i]
