"""Architecture configs of the image and the text tower, and the named sizes.

A config is frozen, so modules, checkpoints and jitted programs can share it.
It includes the special token ids, which depend on the vocabulary.
"""

import dataclasses
import math

# CLIP's pixel statistics, which BLIP also uses: RGB, for values in [0, 1].
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

REMAT_POLICIES = ("none", "dots", "full")
# By matrix products that XLA compiles, or by one kernel for a GPU or for a TPU.
ATTENTION = ("xla", "cudnn", "splash")


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """Special token ids; the defaults are bert-base-uncased's."""

  pad: int = 0
  cls: int = 101  # first token of text that is encoded without an image
  sep: int = 102  # last token of every text
  dec: int = 30522  # first token of text that is decoded
  enc: int = 30523  # first token of text that is encoded with its image


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """Image tower.

  Attributes:
    image_size: (height, width) in pixels for which the position embeddings
      were trained.
    drop_path: stochastic depth rate of the last block; the rate increases
      linearly from 0 at the first block.
    init_std: standard deviation of newly initialised weights.
    pos_embed_std: standard deviation of newly initialised position embeddings.
    remat: what the backward pass recomputes, one of REMAT_POLICIES.
    dtype: dtype of the activations; parameters are always float32.
    attention: how it is computed, one of ATTENTION.
    images_at_once: how many images a block takes at a time where nothing is
      dropped; 0: all of them.

  Raises:
    ValueError: the numbers do not fit each other.
  """

  image_size: tuple[int, int]
  patch_size: int
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  drop_path: float = 0.0
  init_std: float = 0.02
  pos_embed_std: float = 0.02
  remat: str = "none"
  dtype: str = "float32"
  attention: str = "xla"
  images_at_once: int = 0

  def __post_init__(self):
    _check_tower("model (image tower)", self)
    if self.attention not in ATTENTION:
      raise ValueError(
        f"config.model.attention: expected one of {ATTENTION}, found "
        f"{self.attention!r}"
      )
    if any(side % self.patch_size for side in self.image_size):
      raise ValueError(
        f"config.model.image_size: {self.image_size} is not a multiple of the "
        f"patch size {self.patch_size}"
      )

  @property
  def grid(self) -> tuple[int, int]:
    """Number of patches (vertically, horizontally)."""
    height, width = self.image_size
    return height // self.patch_size, width // self.patch_size

  @property
  def num_tokens(self) -> int:
    """Number of image tokens, [CLS] included."""
    return 1 + math.prod(self.grid)


@dataclasses.dataclass(frozen=True)
class MedConfig:
  """Text tower, a "mixture of encoder-decoder" (paper section 3.1).

  Attributes:
    dropout: rate for hidden states and for attention probabilities.
    init_std: standard deviation of newly initialised weights.
    remat: what the backward pass recomputes, one of REMAT_POLICIES.
    dtype: dtype of the activations; parameters are always float32.

  Raises:
    ValueError: the numbers do not fit each other.
  """

  vocab_size: int
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  max_positions: int = 512
  dropout: float = 0.1
  init_std: float = 0.02
  tokens: SpecialTokens = SpecialTokens()
  remat: str = "none"
  dtype: str = "float32"

  def __post_init__(self):
    _check_tower("model (text tower)", self)


@dataclasses.dataclass(frozen=True)
class BlipConfig:
  """Both towers; `embed_dim` is the dimension of the joint ITC space."""

  vit: ViTConfig
  med: MedConfig
  embed_dim: int = 256


_BERT_BASE = dict(width=768, depth=12, num_heads=12, mlp_dim=3072)

# 0.02 suits BERT's width, at which the output of a layer has 0.55 of its
# input's scale.  In a narrow layer the signal would almost vanish, and all
# texts would look alike to the losses until the weights have grown.
_TINY_STD = 0.02 * (768 / 128) ** 0.5

# base and large: section 4.1 of the paper (ViT-B/16 and ViT-L/16 with BERT-base
# text); the original always trains ViT-L with drop-path 0.1.  tiny is not in
# the paper: it is the smallest model that learns Scenes well within minutes on
# a laptop.  It starts without a pre-trained tower, so its position embeddings
# must differ from the first step: with a standard deviation of 0.02, next to
# patch embeddings of scale one, it hardly learns "left" in that time.
VARIANTS = {
  "tiny": dict(
    vit=dict(
      patch_size=8,
      width=128,
      depth=3,
      num_heads=2,
      mlp_dim=512,
      init_std=_TINY_STD,
      pos_embed_std=0.3,
    ),
    med=dict(
      width=128,
      depth=2,
      num_heads=2,
      mlp_dim=512,
      max_positions=64,
      init_std=_TINY_STD,
    ),
    embed_dim=64,
  ),
  "base": dict(
    vit=dict(patch_size=16, width=768, depth=12, num_heads=12, mlp_dim=3072),
    med=_BERT_BASE,
    embed_dim=256,
  ),
  "large": dict(
    vit=dict(
      patch_size=16,
      width=1024,
      depth=24,
      num_heads=16,
      mlp_dim=4096,
      drop_path=0.1,
    ),
    med=_BERT_BASE,
    embed_dim=256,
  ),
}


# What tells variants apart; the patch size is a key of its own in configs.
_SHAPES = ("width", "depth", "num_heads", "mlp_dim")


def variant(
  name: str,
  *,
  image_size: int | tuple[int, int],
  vocab_size: int,
  tokens: SpecialTokens,
  dtype: str = "float32",
  vit: dict | None = None,
  med: dict | None = None,
) -> BlipConfig:
  """Returns the config of a named size.

  Args:
    name: a key of VARIANTS.
    image_size: side of a square in pixels, or (height, width).
    vocab_size: number of tokens, [DEC] and [ENC] included.
    tokens: special token ids of the tokenizer.
    dtype: dtype of the activations of both towers.
    vit: fields of ViTConfig that override the named size.
    med: fields of MedConfig that override the named size.

  Raises:
    ValueError: there is no such variant, or the numbers do not fit each other.
  """
  if name not in VARIANTS:
    raise ValueError(
      f"config.model.variant: expected one of {sorted(VARIANTS)}, "
      f"found {name!r}"
    )
  sizes = VARIANTS[name]
  if isinstance(image_size, int):
    image_size = (image_size, image_size)
  height, width = image_size
  vit_config = ViTConfig(
    **{**sizes["vit"], **(vit or {})}, image_size=(height, width), dtype=dtype
  )
  med_config = MedConfig(
    **{**sizes["med"], **(med or {})},
    vocab_size=vocab_size,
    tokens=tokens,
    dtype=dtype,
  )
  return BlipConfig(vit_config, med_config, sizes["embed_dim"])


def variant_of(config: BlipConfig) -> str | None:
  """Returns the name of a config's sizes, None if they have no name."""
  for name, sizes in VARIANTS.items():
    tower_sizes = ((config.vit, sizes["vit"]), (config.med, sizes["med"]))
    if sizes["embed_dim"] == config.embed_dim and all(
      getattr(tower, key) == size
      for tower, named in tower_sizes
      for key, size in named.items()
      if key in _SHAPES
    ):
      return name
  return None


def _check_tower(where: str, config: ViTConfig | MedConfig) -> None:
  if config.width % config.num_heads:
    raise ValueError(
      f"{where}: width {config.width} is not divisible by "
      f"{config.num_heads} heads"
    )
  if config.remat not in REMAT_POLICIES:
    raise ValueError(
      f"{where}: remat must be one of {REMAT_POLICIES}, found {config.remat!r}"
    )
