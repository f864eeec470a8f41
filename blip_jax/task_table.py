"""The table of tasks.

To add a task, write a module in `tasks/` (defaults, examples, model family,
loss), a builder of its evaluators in `evaluators/` and a recipe in `configs/`,
and add a line to `TASKS`.
"""

from typing import NamedTuple

from blip_jax.cli import recipes
from blip_jax.evaluators import (
  answering,
  captions,
  choosing,
  comparing,
  retrieval_suite,
)
from blip_jax.evaluators import base as evaluators
from blip_jax.runtime.config import Config
from blip_jax.tasks import base, caption, dialog, nlvr, pretrain, retrieval, vqa


class Entry(NamedTuple):
  """A task.

  Attributes:
    file: the module of the task, which defines what `tasks.base.TaskFile`
      lists.
    evaluators: builds the evaluators of a held-out split.
  """

  file: base.TaskFile
  evaluators: evaluators.Build


TASKS: dict[str, Entry] = {
  "pretrain": Entry(pretrain, retrieval_suite.build_with_losses),
  "caption": Entry(caption, captions.build),
  "retrieval": Entry(retrieval, retrieval_suite.build),
  "vqa": Entry(vqa, answering.build),
  "nlvr": Entry(nlvr, comparing.build),
  "dialog": Entry(dialog, choosing.build),
}


def of(config: Config) -> Entry:
  """Returns the entry of `config.task`.

  Raises:
    ValueError: there is no such task, or the config has the keys of another.
  """
  if config.task not in TASKS:
    raise ValueError(
      f"config.task: expected one of {tuple(TASKS)}, found {config.task!r}"
    )
  if config.task not in config:
    made = ", ".join(recipes.with_value("task", config.task))
    raise ValueError(
      f"config.task: this config lacks the keys of {config.task!r}; recipes "
      f"that have them: {made}"
    )
  return TASKS[config.task]
