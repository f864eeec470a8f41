"""The geometry of Scenes: contours, places and sizes."""

import hashlib

import numpy as np
import pytest

from blip_jax.data.scenes import drawing

PIXELS = 128


def coverage(shape, size="large", number=1, x=0.5, y=0.5):
  """How much of each pixel a shape covers, from 0 (paper) to 1 (ink)."""
  item = drawing.Object(shape, "black", size, x, y)
  far = drawing.Object(shape, "black", size, -9.0, -9.0)
  objects = (item, *[far] * (number - 1))
  image = drawing.render(drawing.Scene(objects, "row", 0), PIXELS)
  levels = image.mean(axis=-1)
  paper, ink = levels[:8].mean(), drawing.COLOURS["black"]
  return (paper - levels) / (paper - np.mean(ink))


def area(contour):
  """The shoelace formula."""
  x, y = np.asarray(contour).T
  return abs(np.sum(x * np.roll(y, 1) - y * np.roll(x, 1))) / 2


def test_contours_never_change():
  """In millionths; a digest, as curves have 64 corners."""
  texts = [
    f"{name} {(np.rint(np.asarray(c) * 1e6) + 0.0).astype(int).tolist()}"
    for name, contours in drawing.SHAPES.items()
    for c in contours
  ]
  digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
  assert digest[:16] == "c8a904daf1838b23"


@pytest.mark.parametrize(
  "name, corners",
  [
    ("square", [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]),
    ("triangle", [(0, -1), (1.1, 0.9), (-1.1, 0.9)]),
    ("diamond", [(0, -1.15), (0.85, 0), (0, 1.15), (-0.85, 0)]),
  ],
)
def test_corners_by_hand(name, corners):
  (contour,) = drawing.SHAPES[name]
  np.testing.assert_allclose(contour, corners, atol=1e-12)


def test_a_star_has_five_points_and_a_cross_twelve_corners():
  (star,) = drawing.SHAPES["star"]
  radii = np.hypot(*(star - (0, 0.1)).T)
  np.testing.assert_allclose(radii, [1.15, 1.15 * 0.45] * 5)
  (cross,) = drawing.SHAPES["cross"]
  assert len(cross) == 12
  assert {*np.abs(cross).ravel().tolist()} == {0.36, 1.0}


def test_a_heart_has_a_notch_above_and_a_point_below():
  (heart,) = drawing.SHAPES["heart"]
  x, y = heart.T
  notch, point = y[0], y[32]
  np.testing.assert_allclose(x[[0, 32]], 0, atol=1e-12)
  # 13 - 5 - 2 - 1 = 5 upwards, and 13 + 5 - 2 + 1 = 17 downwards.
  np.testing.assert_allclose([notch, point], [-7.5 / 15, 14.5 / 15])
  assert y.min() < notch and y.max() == point
  np.testing.assert_allclose(np.abs(x).max(), 16 / 15)


def test_a_ring_is_a_circle_with_a_hole():
  outer, inner = drawing.SHAPES["ring"]
  np.testing.assert_allclose(np.hypot(*outer.T), 1)
  np.testing.assert_allclose(np.hypot(*inner.T), 0.52)


@pytest.mark.parametrize("shape", drawing.SHAPES)
@pytest.mark.parametrize(
  "size, number, radius",
  [
    ("large", 1, 0.21),
    ("large", 2, 0.21),
    ("large", 3, 0.135),
    ("small", 2, 0.21 * 0.68),
  ],
)
def test_a_shape_covers_its_area_around_its_centre(shape, size, number, radius):
  ink = coverage(shape, size, number, x=0.45, y=0.55)
  outer, *holes = drawing.SHAPES[shape]
  expected = area(outer) - sum(area(hole) for hole in holes)
  # OpenCV's antialiasing enlarges shapes by about a pixel.
  around = sum(
    np.hypot(*(np.asarray(c) - np.roll(c, 1, axis=0)).T).sum()
    for c in (outer, *holes)
  )
  excess = ink.sum() - expected * (radius * PIXELS) ** 2
  assert 0.5 < excess / (around * radius * PIXELS) < 1.5
  mask = ink > 0.2
  top, bottom = np.flatnonzero(mask.any(axis=1))[[0, -1]]
  left, right = np.flatnonzero(mask.any(axis=0))[[0, -1]]
  box = np.array([left, right + 1, top, bottom + 1]) / PIXELS
  x, y = np.asarray(outer).T
  edges = np.array([x.min(), x.max(), y.min(), y.max()]) * radius
  np.testing.assert_allclose(
    box, edges + np.repeat([0.45, 0.55], 2), atol=2.2 / PIXELS
  )


@pytest.mark.parametrize("x, y", [(0.5, 0.5), (0.45, 0.55), (0.3, 0.62)])
def test_a_shape_is_centred_to_a_fraction_of_a_pixel(x, y):
  ink = coverage("circle", x=x, y=y)
  centres = np.arange(PIXELS) + 0.5
  found = [np.sum(ink.sum(axis=a) * centres) / ink.sum() for a in (0, 1)]
  np.testing.assert_allclose(found, [x * PIXELS, y * PIXELS], atol=0.15)


def test_places_are_fractions_of_the_side():
  assert drawing.LAYOUTS == {
    1: {
      "middle": ((0.5, 0.5),),
      "left": ((0.25, 0.5),),
      "right": ((0.75, 0.5),),
      "top": ((0.5, 0.25),),
      "bottom": ((0.5, 0.75),),
    },
    2: {
      "row": ((0.25, 0.5), (0.75, 0.5)),
      "column": ((0.5, 0.25), (0.5, 0.75)),
    },
    3: {
      "row": ((0.18, 0.5), (0.5, 0.5), (0.82, 0.5)),
      "column": ((0.5, 0.18), (0.5, 0.5), (0.5, 0.82)),
    },
  }


def test_small_images_are_drawn_at_128_pixels_and_averaged(monkeypatch):
  sides = []
  resize = drawing.cv2.resize
  monkeypatch.setattr(
    drawing.cv2,
    "resize",
    lambda image, *args, **kwargs: (
      sides.append(len(image)) or resize(image, *args, **kwargs)
    ),
  )
  item = drawing.Object("star", "red", "large", 0.5, 0.5)
  for pixels in (32, 43, 64, 100, 128, 384):
    drawing.render(drawing.Scene((item,), "middle", 0), pixels)
  assert sides == [128, 86, 128, 100, 128, 384]
