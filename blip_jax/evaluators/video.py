"""Text-video retrieval: frames of a video as one picture (paper, 5.6)."""

from blip_jax.data import video
from blip_jax.evaluators import base, retrieval
from blip_jax.evaluators.scores import recall
from blip_jax.tasks import base as tasks


class VideoRetrieval(retrieval.Retrieval):
  """Recall of videos and texts.

  A video's feature is the mean of its frames'; the texts that are ranked anew
  look at the tokens of all frames, one after the other.
  """

  def __init__(
    self, split: base.Split, task: tasks.Task, k_test: int, num_frames: int
  ):
    super().__init__(split, task, k_test)
    self._picture = video.VideoExample(split.example.image, num_frames)
    self._num_frames = num_frames

  def scores(self, sim_v2t, sim_t2v, video_of) -> dict[str, float]:
    return recall.video_recall(sim_v2t, sim_t2v, video_of)
