"""The one table of what a task is.

A new task is a file in `tasks/` (defaults, examples, model family, losses), a
builder of its evaluators in `evaluators/`, a recipe in `configs/`, and a line
here.
"""

from typing import NamedTuple

from blip_jax.config import Config
from blip_jax.evaluators import base as evaluators
from blip_jax.evaluators import captions, retrieval_suite
from blip_jax.tasks import base, caption, pretrain, retrieval


class Entry(NamedTuple):
  """A task.

  Attributes:
    file: with what `tasks.base.TaskFile` lists.
    evaluators: builds what measures it on a held-out split.
  """

  file: base.TaskFile
  evaluators: evaluators.Build


TASKS: dict[str, Entry] = {
  "pretrain": Entry(pretrain, retrieval_suite.build_with_losses),
  "caption": Entry(caption, captions.build),
  "retrieval": Entry(retrieval, retrieval_suite.build),
}


def of(config: Config) -> Entry:
  """The line of `config.task`.

  Raises:
    ValueError: there is no such task.
  """
  if config.task not in TASKS:
    raise ValueError(
      f"config.task: expected one of {tuple(TASKS)}, found {config.task!r}"
    )
  return TASKS[config.task]
