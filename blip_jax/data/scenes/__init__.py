"""Scenes: rendered pictures with known truth, for runs that download nothing.

A scene is one to three shapes on quiet paper. What is in it (`Scene`), how it
looks (`render`) and what may be said of it (`describe`, `descriptions`) are
kept apart, so that a question or a statement about two pictures is one more
function of the same `Scene`.

The defaults are chosen so that a model of about a million parameters learns
to retrieve and to caption within minutes on a CPU: shapes as large as the
layout allows, little jitter, weak grain, objects mostly named in reading
order, and sizes named only where they differ. Geometry matters most: with
small and scattered shapes, colours are learnt and shapes are not.

Train on Scenes without flips and without crops: "left" would become untrue.
"""

import pathlib

from blip_jax.data.scenes.drawing import (
  COLOURS,
  RADIUS,
  SHAPES,
  Object,
  Scene,
  render,
)
from blip_jax.data.scenes.source import SPLITS, Scenes
from blip_jax.data.scenes.texts import READING_ORDER, describe, descriptions

__all__ = [
  "COLOURS",
  "RADIUS",
  "READING_ORDER",
  "SHAPES",
  "SPLITS",
  "Object",
  "Scene",
  "Scenes",
  "describe",
  "descriptions",
  "render",
  "vocab_dir",
]


def vocab_dir() -> str:
  """Folder with the WordPiece vocabulary (`vocab.txt`) made for Scenes.

  It holds the words of captions, junk, questions and statements, and single
  characters, so that nothing in plain ASCII becomes [UNK].
  """
  return str(pathlib.Path(__file__).with_name("vocab"))
