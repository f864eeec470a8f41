"""Text-video retrieval on MSR-VTT, by a model fine-tuned on COCO alone.

  pip install -e '.[video]'
  python -m blip_jax.main --config configs/retrieval_msrvtt.py --workdir W

Section 5.6 of arXiv 2201.12086, Table 10; `configs/retrieval_msrvtt.yaml` of
the original: evaluation alone, 8 frames of each video, 128 candidates
re-ranked.

Data: `msrvtt_test.jsonl` of the original, 1,000 rows of {clip_name, caption},
and the videos CLIP_NAME.mp4.  Expect 43.3 `t2v_r1` and 2 `t2v_mdR`.  Not run
here.  Your own clips are rows of {video, caption}: name the file with
--config.evals.test.source=clips.json.
"""

from blip_jax.tasks import retrieval


def get_config():
  config = retrieval.defaults()
  config.job = "evaluate"
  config.init.weights = "model_base_retrieval_coco"
  config.evals.test.source = "data/msrvtt_test.jsonl?image=clip_name"
  config.evals.test.image_root = "data/msrvtt"
  config.evals.test.k_test = 128
  config.evals.test.num_frames = 8
  return config
