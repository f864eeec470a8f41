"""Trainings of the quick start as a user starts them, shrunk to seconds."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

STEPS = 24
QUICK = (
  f"--config.num_steps={STEPS}",
  "--config.batch_size=4",
  "--config.model.image_size=16",
  "--config.optim.warmup_steps=2",
  "--config.log_every_steps=1",
  "--config.checkpoint.every_steps=10",
  "--config.pretrain.queue_size=20",
  "--config.data.augment=True",
  "--config.model.dropout=0.1",
  "--config.evals.scenes_val.source=",
)


def command(workdir, *extra):
  return [
    sys.executable,
    "-m",
    "blip_jax.main",
    f"--config={ROOT}/configs/quickstart.py",
    f"--workdir={workdir}",
    *QUICK,
    *extra,
  ]
