"""Search of a gallery of images by texts or by images.

  python -m blip_jax.main --config configs/search.py \
    --config.images=FOLDER --config.queries='a dog on a beach' \
    --config.out=found.json

`found.json` lists the best images of each query, `found.png` shows them. The
images are embedded once, into WORKDIR/index; a job that was stopped resumes
there, and further queries take seconds.

Useful: `--config.queries=queries.txt` for several queries,
`--config.queries=dog.jpg` for images similar to an image,
`--config.model=WORKDIR` for your own model, `--config.num_frames=8` for a
folder of videos (extra [video]), `--config.faiss=HNSW32` for millions of images
(extra [search]).
"""

from blip_jax import defaults


def get_config():
  return defaults.search()
