"""The pointing game on Scenes: is the peak of a map on the object it names?"""

import numpy as np

import blip_jax
from blip_jax.data import scenes
from blip_jax.data.scenes import drawing


def box(scene, item):
  """Corners (left, top), (right, bottom) of an object, in shares of the side.

  Args:
    scene: with the object.
    item: the object.
  """
  scale = scenes.RADIUS[len(scene.objects)]
  scale *= drawing.SMALL if item.size == "small" else 1
  contours = np.concatenate(scenes.SHAPES[item.shape])
  points = contours * scale + (item.x, item.y)
  return points.min(axis=0), points.max(axis=0)


def inside(box, grid):
  """Which centres of patches [h, w] are in a box."""
  rows, columns = np.mgrid[: grid[0], : grid[1]]
  centres = np.stack([columns, rows], axis=-1) + 0.5
  centres = centres / grid[::-1]
  return ((centres >= box[0]) & (centres <= box[1])).all(axis=-1)


def hits(heat, box):
  return bool(inside(box, heat.shape).flat[heat.argmax()])


def play(model, num_scenes=100):
  """Shares of hits: of matches, of captions, and of random patches.

  What counts is the map of "red circle" in a caption that matches, and in one
  that the model generates, if it says so. "Alone" are maps of "a red circle" as
  a whole text: of few scenes it is all that their captions would say, so that
  the model finds that most do not match ("alone_matches").
  """
  source = scenes.Scenes("val", num=num_scenes)
  images = [source[i]["image"] for i in range(num_scenes)]
  captions = model.caption(images, explain=True)
  matches, generated, alone, fits, chance = [], [], [], [], []
  for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
    scene = source.scene(i)
    match = model.explain(image, source[i]["caption"])
    for item in scene.objects:
      name, where = f"{item.colour} {item.shape}", box(scene, item)
      matches.append(hits(match.map(name), where))
      chance.append(inside(where, match.whole.shape).mean())
      alone.append(hits(model.explain(image, f"a {name}").map(), where))
      fits.append(model.match(image, f"a {name}").itm_prob.item() > 0.5)
      if name in caption.text:
        generated.append(hits(caption.explanation.map(name), where))
  return {
    "match": float(np.mean(matches)),
    "caption": float(np.mean(generated)),
    "alone": float(np.mean(alone)),
    "alone_matches": float(np.mean(fits)),
    "chance": float(np.mean(chance)),
    "objects": len(matches),
    "named": len(generated),
  }


if __name__ == "__main__":
  import sys

  print(play(blip_jax.load(sys.argv[1])))
