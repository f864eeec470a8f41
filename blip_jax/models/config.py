"""Shapes of the two towers, and the published sizes.

A config is frozen: a module, a checkpoint and a jitted program may all rely on
it.  Special-token ids travel with it, because the vocabulary decides them.
"""

import dataclasses
import math

# CLIP's statistics, which BLIP normalises with (RGB, of pixels in [0, 1]).
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

REMAT_POLICIES = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """Ids that the model itself writes; the defaults are bert-base-uncased's."""

  pad: int = 0
  cls: int = 101  # text-only encoding starts with it
  sep: int = 102  # ends a text
  dec: int = 30522  # starts decoding
  enc: int = 30523  # starts image-grounded encoding


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """Image tower.

  Attributes:
    image_size: (height, width) in pixels of the trained position embeddings.
    drop_path: rate of the last block; earlier blocks ramp up from 0.
    init_std: of fresh weights.
    pos_embed_std: of fresh position embeddings.
    remat: what the backward pass recomputes, one of REMAT_POLICIES.
    dtype: of the activations; parameters are always float32.
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

  def __post_init__(self):
    _check_tower("model (image tower)", self)
    if any(side % self.patch_size for side in self.image_size):
      raise ValueError(
        f"config.model.image_size: {self.image_size} is not a multiple of the "
        f"patch size {self.patch_size}"
      )

  @property
  def grid(self) -> tuple[int, int]:
    height, width = self.image_size
    return height // self.patch_size, width // self.patch_size

  @property
  def num_tokens(self) -> int:
    return 1 + math.prod(self.grid)


@dataclasses.dataclass(frozen=True)
class MedConfig:
  """Text tower, a "mixture of encoder-decoder" (paper section 3.1).

  Attributes:
    dropout: of hidden states and of attention probabilities alike.
    init_std: of fresh weights.
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
  """Both towers; `embed_dim` is the width of the shared ITC space."""

  vit: ViTConfig
  med: MedConfig
  embed_dim: int = 256


_BERT_BASE = dict(width=768, depth=12, num_heads=12, mlp_dim=3072)

# 0.02 is right for BERT's width, where a layer then passes on 0.55 of what it
# gets; a narrow one would pass on almost nothing, and all texts look alike to
# the losses until it has grown.
_TINY_STD = 0.02 * (768 / 128) ** 0.5

# base and large: section 4.1 of the paper (ViT-B/16 and ViT-L/16 with BERT-base
# text); the original always trains ViT-L with drop-path 0.1.  tiny is ours: the
# smallest model that learns Scenes well within minutes on a laptop.  It starts
# from no pre-trained tower, so its positions must be told apart from step one:
# with 0.02 beside patches of size one, "left" is hardly learned in that time.
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
  """The config of a named size.

  Args:
    name: a key of VARIANTS.
    image_size: pixels, square or (height, width).
    vocab_size: of the tokenizer, [DEC] and [ENC] included.
    tokens: the tokenizer's special ids.
    dtype: of both towers' activations.
    vit: fields of ViTConfig that differ from the table.
    med: fields of MedConfig that differ from the table.
  """
  if name not in VARIANTS:
    raise ValueError(
      f"config.model.variant: expected one of {sorted(VARIANTS)}, "
      f"found {name!r}"
    )
  row = VARIANTS[name]
  if isinstance(image_size, int):
    image_size = (image_size, image_size)
  vit_config = ViTConfig(
    **{**row["vit"], **(vit or {})}, image_size=tuple(image_size), dtype=dtype
  )
  med_config = MedConfig(
    **{**row["med"], **(med or {})},
    vocab_size=vocab_size,
    tokens=tokens,
    dtype=dtype,
  )
  return BlipConfig(vit_config, med_config, row["embed_dim"])


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
