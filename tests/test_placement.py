"""How the image tower is computed on which devices."""

import dataclasses
import types

import pytest

from blip_jax.models import config as model_config
from blip_jax.models import placement

CPU = types.SimpleNamespace(platform="cpu", device_kind="cpu")
GPU = types.SimpleNamespace(platform="gpu", device_kind="one with tensor cores")


def tower(size, side):
  return model_config.variant(
    size,
    image_size=side,
    vocab_size=30524,
    tokens=model_config.SpecialTokens(),
    dtype="float32",
  ).vit


@pytest.mark.parametrize(
  "size, side, number",
  [("base", 384, 1), ("base", 224, 3), ("large", 384, 1), ("base", 1024, 1)],
)
def test_a_cpu_takes_as_many_images_at_once_as_its_caches_hold(
  size, side, number
):
  placed = placement.place(tower(size, side), [CPU])
  assert (placed.images_at_once, placed.attention) == (number, "xla")


def test_what_suits_one_device_can_be_taken_back():
  vit = tower("base", 384)
  assert placement.place(vit, [CPU]) != vit
  assert placement.unplaced(placement.place(vit, [CPU])) == vit
  fused = dataclasses.replace(vit, attention="cudnn")
  assert placement.unplaced(fused) == vit


@pytest.mark.parametrize("devices", [[GPU], [CPU, CPU]])
def test_other_devices_take_all(devices):
  vit = tower("base", 384)
  assert placement.place(vit, devices) == vit
