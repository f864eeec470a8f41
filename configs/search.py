"""Looks for pictures in a gallery, by texts or by pictures.

  python -m blip_jax.main --config configs/search.py \
    --config.images=FOLDER --config.queries='a dog on a beach' \
    --config.out=found.json

`found.json` lists the best pictures of each query, `found.png` shows them.
The pictures are embedded once, into WORKDIR/index, where a job that was stopped
goes on; further queries take seconds.

Useful: `--config.queries=queries.txt` for many, `--config.queries=dog.jpg` for
what looks like a picture, `--config.model=WORKDIR` for a model of your own,
`--config.num_frames=8` for a folder of videos (extra [video]),
`--config.faiss=HNSW32` for millions of pictures (extra [search]).
"""

from blip_jax import defaults


def get_config():
  return defaults.search()
