"""Scenes: rendered images with exact captions, for runs without downloads.

A scene has one to three shapes on light paper. Its content (`Scene`), its
image (`render`), its captions (`describe`, `descriptions`), the questions about
it (`ask`), the dialogs about it (`talk`) and the statements about two of them
(`state`) are separate.

With the defaults, a model of about a million parameters learns retrieval and
captioning within minutes on a CPU: shapes are as large as the layout allows,
jitter and grain are weak, captions mostly name objects in reading order, and
sizes are named only where they differ. Geometry matters most: if shapes are
small and scattered, the model learns colours but not shapes.

Train on Scenes without flips and crops, which would make "left" untrue.
"""

import pathlib

from blip_jax.data.scenes.asking import ANSWERS, QUESTION_KINDS, ask
from blip_jax.data.scenes.dialogs import Dialogs
from blip_jax.data.scenes.drawing import (
  COLOURS,
  RADIUS,
  SHAPES,
  Object,
  Scene,
  render,
)
from blip_jax.data.scenes.pairs import Statements
from blip_jax.data.scenes.source import SPLITS, Scenes
from blip_jax.data.scenes.stating import STATEMENT_KINDS, state
from blip_jax.data.scenes.talking import talk
from blip_jax.data.scenes.texts import READING_ORDER, describe, descriptions

__all__ = [
  "ANSWERS",
  "COLOURS",
  "QUESTION_KINDS",
  "RADIUS",
  "READING_ORDER",
  "SHAPES",
  "SPLITS",
  "STATEMENT_KINDS",
  "Dialogs",
  "Object",
  "Scene",
  "Scenes",
  "Statements",
  "ask",
  "describe",
  "descriptions",
  "render",
  "state",
  "talk",
  "vocab_dir",
]


def vocab_dir() -> str:
  """Returns the folder with the WordPiece vocabulary of Scenes (`vocab.txt`).

  It contains the words of captions, noise captions, questions, dialogs and
  statements, and single characters, so that no ASCII text becomes [UNK].
  """
  return str(pathlib.Path(__file__).with_name("vocab"))
