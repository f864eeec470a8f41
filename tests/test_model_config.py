"""Sizes of the towers: the paper's, and what does not fit."""

import dataclasses

import pytest

from blip_jax.models import config

TOKENS = config.SpecialTokens()


def make(name, image_size=224, **more):
  return config.variant(
    name, image_size=image_size, vocab_size=30524, tokens=TOKENS, **more
  )


def test_pixel_statistics_are_those_of_clip():
  assert config.IMAGE_MEAN == (0.48145466, 0.4578275, 0.40821073)
  assert config.IMAGE_STD == (0.26862954, 0.26130258, 0.27577711)


def test_special_tokens_are_those_of_bert_and_two_of_blip():
  assert dataclasses.asdict(TOKENS) == dict(
    pad=0, cls=101, sep=102, dec=30522, enc=30523
  )


BERT = dict(
  vocab_size=30524,
  width=768,
  depth=12,
  num_heads=12,
  mlp_dim=3072,
  max_positions=512,
  dropout=0.1,
  init_std=0.02,
  tokens=dataclasses.asdict(TOKENS),
  remat="none",
  dtype="float32",
)
VIT = dict(
  image_size=(224, 224),
  patch_size=16,
  init_std=0.02,
  pos_embed_std=0.02,
  remat="none",
  dtype="float32",
  attention="xla",
  images_at_once=0,
)


@pytest.mark.parametrize(
  "name, vit, med, embed_dim",
  [
    (
      "base",
      dict(width=768, depth=12, num_heads=12, mlp_dim=3072, drop_path=0.0),
      {},
      256,
    ),
    (
      "large",
      dict(width=1024, depth=24, num_heads=16, mlp_dim=4096, drop_path=0.1),
      {},
      256,
    ),
    (
      "tiny",
      dict(
        patch_size=8,
        width=128,
        depth=3,
        num_heads=2,
        mlp_dim=512,
        drop_path=0.0,
        # 0.02 at BERT's width of 768, as wide as the square root of its share.
        init_std=0.04898979485566356,
        pos_embed_std=0.3,
      ),
      dict(
        width=128,
        depth=2,
        num_heads=2,
        mlp_dim=512,
        max_positions=64,
        init_std=0.04898979485566356,
      ),
      64,
    ),
  ],
)
def test_named_sizes(name, vit, med, embed_dim):
  assert dataclasses.asdict(make(name)) == {
    "vit": {**VIT, **vit},
    "med": {**BERT, **med},
    "embed_dim": embed_dim,
  }
  assert config.variant_of(make(name)) == name


@pytest.mark.parametrize(
  "image_size, grid, num_tokens",
  [
    (224, (14, 14), 197),
    (384, (24, 24), 577),
    (480, (30, 30), 901),
    ((32, 64), (2, 4), 9),
  ],
)
def test_tokens_of_an_image(image_size, grid, num_tokens):
  vit = make("base", image_size).vit
  assert (vit.grid, vit.num_tokens) == (grid, num_tokens)


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      dict(image_size=(224, 225)),
      r"image_size: \(224, 225\) is not a multiple",
    ),
    (dict(image_size=(230, 224)), r"image_size: \(230, 224\)"),
    (dict(vit=dict(num_heads=7)), "image tower.*768 is not divisible by 7"),
    (dict(med=dict(num_heads=5)), "text tower.*768 is not divisible by 5"),
    (dict(vit=dict(attention="flash")), "model.attention.*found 'flash'"),
    (dict(med=dict(remat="all")), "text tower.*found 'all'"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    make("base", **changes)


def test_an_unknown_variant_is_refused():
  with pytest.raises(ValueError, match=r"variant: .*'base'.*found 'huge'"):
    make("huge")


@pytest.mark.parametrize(
  "changes, name",
  [
    (dict(image_size=384), "base"),
    (dict(vit=dict(patch_size=32)), "base"),
    (dict(vit=dict(drop_path=0.2)), "base"),
    (dict(vit=dict(depth=11)), None),
    (dict(vit=dict(mlp_dim=3073)), None),
    (dict(med=dict(depth=11)), None),
    (dict(med=dict(num_heads=6)), None),
  ],
)
def test_sizes_that_have_a_name(changes, name):
  assert config.variant_of(make("base", **changes)) == name


def test_another_joint_space_has_no_name():
  other = dataclasses.replace(make("base"), embed_dim=255)
  assert config.variant_of(other) is None
