"""Cleans a noisy collection: a captioner writes, a filter throws out.

  python -m blip_jax.main --config configs/capfilt.py \
    --config.source='shards/*.tar' --config.out=cleaned

captions every picture and judges every text, once: OUT has a row per text in
a .parquet per shard.  Start it on as many hosts as share the folder; started
again it goes on where it was stopped.  Then, cheaply and as often as wanted,

  python -m blip_jax.main --config configs/capfilt.py --config.job=merge \
    --config.out=cleaned --config.merge.out=clean --config.merge.threshold=0.5

writes the new training set, which `--config.data.train='clean/*.tar'` reads,
and `--config.job=report` shows what was kept and why.  `--config.job=status`
says how far a job is, `verify` whether all that it wrote is whole.
"""

from blip_jax import defaults


def get_config():
  return defaults.capfilt()
