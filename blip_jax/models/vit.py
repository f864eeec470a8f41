"""Image tower: a pre-norm vision transformer that returns all tokens.

Dimensions: B batch, H and W image height and width in pixels, N tokens ([CLS]
first), M tokens of another grid, D width.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import spmd
from jaxtyping import Array, Bool, Float

from blip_jax.models import config as model_config
from blip_jax.models import initial, layers, stack


class ViT(nn.Module):
  """The image encoder (paper, section 3.1); layout and numerics are timm's.

  Takes normalised pixels.  Height and width may be any multiples of the patch
  size; position embeddings are interpolated if they differ from
  `config.image_size`.
  """

  config: model_config.ViTConfig

  @nn.compact
  def __call__(
    self, image: Float[Array, "B H W 3"], deterministic: bool = True
  ) -> Float[Array, "B N D"]:
    c = self.config
    height, width = image.shape[1:3]
    if height % c.patch_size or width % c.patch_size:
      raise ValueError(
        f"images of {height} x {width} pixels: both sides must be multiples "
        f"of the patch size {c.patch_size}"
      )
    grid = height // c.patch_size, width // c.patch_size
    x = PatchEmbed(c.width, c.patch_size, c.dtype, name="patch_embed")(image)
    cls_token = self.param(
      "cls_token", initial.normal(c.init_std), (1, 1, c.width)
    )
    pos_embed = self.param(
      "pos_embed",
      initial.normal(c.pos_embed_std),
      (1, c.num_tokens, c.width),
    )
    cls_token = jnp.broadcast_to(cls_token, (x.shape[0], 1, c.width))
    x = jnp.concatenate([cls_token.astype(x.dtype), x], axis=1)
    x = x + resize_pos_embed(pos_embed, c.grid, grid).astype(x.dtype)

    num_tokens = x.shape[1]
    if c.attention == "cudnn":  # whose gradient needs an even number
      x = jnp.pad(x, ((0, 0), (0, num_tokens % 2), (0, 0)))

    block = Block(c, num_tokens, parent=None)
    start = functools.partial(block.init, x=x, drops=None)
    stack.declare(self, "blocks", c.depth, start)
    blocks = stack.params(self, "blocks")

    def apply(x, layer):
      params, drops = layer
      x = spmd.with_logical_constraint(x, ("batch", "seq", None))
      return block.apply({"params": params}, x, drops), None

    drops = None
    if not deterministic and c.drop_path > 0:
      rates = jnp.linspace(0, c.drop_path, c.depth)
      shape = c.depth, 2, x.shape[0]
      keep = jax.random.bernoulli(
        self.make_rng("dropout"), 1 - rates[:, None, None], shape
      )
      drops = rates, keep
    apply = layers.remat(apply, c.remat)
    if deterministic and 0 < c.images_at_once < x.shape[0]:
      apply = _in_turns(apply, c.images_at_once)
    x, _ = stack.run(apply, x, blocks, drops)
    return layer_norm(c.dtype, "ln_post")(x[:, :num_tokens])


def _in_turns(apply: Callable, number: int) -> Callable:
  """Applies a block to a number of images after the other."""

  def in_turns(x: Float[Array, "B N D"], layer: Any) -> tuple[Array, None]:
    one = lambda image: apply(image[None], layer)[0][0]
    size = None if number == 1 else number
    return jax.lax.map(one, x, batch_size=size), None

  return in_turns


class Block(nn.Module):
  """A pre-norm transformer block.

  Attributes:
    config: of the tower.
    num_tokens: how many of the N tokens are not padding.
  """

  config: model_config.ViTConfig
  num_tokens: int

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B N D"],
    drops: tuple[Float[Array, ""], Bool[Array, "2 B"]] | None,
  ) -> Float[Array, "B N D"]:
    """Applies the block.

    Args:
      x: all tokens.
      drops: of stochastic depth: the rate, and which examples keep each of the
        two branches; None keeps all.
    """
    c = self.config
    branch = lambda y, i: (
      y
      if drops is None
      else layers.drop(y, drops[1][i, :, None, None], drops[0])
    )
    attention = layers.Attention(
      c.width, c.num_heads, 0.0, c.init_std, c.dtype, name="attention"
    )
    y = layer_norm(c.dtype, "ln_1")(x)
    if c.attention == "xla":
      y = attention(y, attention.key_value(y))
    else:
      y = attention.fused(y, self.num_tokens, c.attention)
    x = x + branch(y, 0)
    y = layers.normal_dense(c.mlp_dim, c, "fc_in")(
      layer_norm(c.dtype, "ln_2")(x)
    )
    y = layers.normal_dense(c.width, c, "fc_out")(layers.gelu(y))
    return x + branch(y, 1)


class PatchEmbed(nn.Module):
  """Patch embedding: the convolution with stride `patch_size`, as a matmul."""

  width: int
  patch_size: int
  dtype: str

  @nn.compact
  def __call__(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B N D"]:
    p = self.patch_size
    shape = (p, p, image.shape[-1], self.width)
    fan_in = p * p * image.shape[-1]
    kernel = self.param("kernel", layers.torch_init(fan_in), shape)
    bias = self.param("bias", layers.torch_init(fan_in), (self.width,))
    batch, height, width, channels = image.shape
    x = image.reshape(batch, height // p, p, width // p, p, channels)
    x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
    x = jnp.einsum("bhpwqc,pqcd->bhwd", x, kernel)
    return (x + bias[None, None, None]).reshape(batch, -1, self.width)


def layer_norm(dtype: str, name: str) -> nn.Module:
  return layers.layer_norm(1e-6, dtype, name)


def resize_pos_embed(
  pos_embed: Float[Array, "1 N D"],
  grid: tuple[int, int],
  new_grid: tuple[int, int],
) -> Float[Array, "1 M D"]:
  """Interpolates position embeddings to another grid; [CLS] stays unchanged.

  Uses PyTorch's bicubic kernel (a = -0.75) without antialiasing, with which the
  released checkpoints were resized.  `jax.image.resize` uses another cubic
  kernel and antialiases.

  Args:
    pos_embed: [CLS] and the patches of `grid` in row-major order.
    grid: number of patches (vertically, horizontally).
    new_grid: the same for the result.
  """
  if grid == new_grid:
    return pos_embed
  cls_token, patches = pos_embed[:, :1], pos_embed[:, 1:]
  patches = patches.reshape(*grid, -1)
  rows = _bicubic_matrix(grid[0], new_grid[0])
  columns = _bicubic_matrix(grid[1], new_grid[1])
  patches = jnp.einsum("ih,hwd,jw->ijd", rows, patches, columns)
  patches = patches.reshape(1, -1, pos_embed.shape[-1])
  return jnp.concatenate([cls_token, patches], axis=1)


def _bicubic_matrix(size: int, new_size: int) -> Float[np.ndarray, "m n"]:
  """Interpolation weights: row i is for new point i, and edges are repeated."""
  a = -0.75
  centre = (np.arange(new_size) + 0.5) * size / new_size - 0.5
  matrix = np.zeros((new_size, size))
  for tap in range(-1, 3):
    index = np.floor(centre).astype(int) + tap
    x = np.abs(centre - index)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    weight = np.where(x <= 1, near, np.where(x < 2, far, 0))
    clamped = np.clip(index, 0, size - 1)
    np.add.at(matrix, (np.arange(new_size), clamped), weight)
  return matrix.astype(np.float32)
