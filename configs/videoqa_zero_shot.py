"""Questions about videos, by a model that was trained on images alone.

  pip install -e '.[video]'
  python -m blip_jax.main --config configs/videoqa_zero_shot.py --workdir W

Section 5.6 of arXiv 2201.12086, Table 11: the model for VQA v2 sees 16 frames
of each video and has seen no question about one.  Its answers are ranked from a
list, and one is right if it equals the annotation: `accuracy`, and
`accuracy/what`, `who`, `how`, `when` and `where`.

Data: `test_qa.json` of MSRVTT-QA, rows of {video_id, question, answer}, and the
videos videoNUMBER.mp4.  MSVD-QA has the names of its videos in a list:
`test_qa.json?image_file=vid{video_id}.avi&names=youtube_mapping.txt`.  Your own
questions are rows of {video, question, answer}, CSV, JSON or JSON lines.

The paper does not say which answers are ranked, so the list is a file of your
choice, with an answer on each line; the answers of the training questions,
without the rarest, are usual.  `--config.vqa.inference=generate` needs none.
Expect 19.2 on MSRVTT-QA and 35.2 on MSVD-QA, if the lists are alike.  Not run
here.
"""

from blip_jax.tasks import vqa


def get_config():
  config = vqa.defaults()
  config.job = "evaluate"
  config.init.weights = "model_base_vqa_capfilt_large"
  config.vqa.answer_list = "data/msrvtt_qa/answers.txt"
  config.evals.test.source = (
    "data/msrvtt_qa/test_qa.json?image_file=video{video_id}.mp4"
  )
  config.evals.test.image_root = "data/msrvtt/videos"
  config.evals.test.num_frames = 16
  return config
