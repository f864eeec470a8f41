"""The engine `ray`: actors, what the cluster lacks, and what it loses."""

import sys

import psutil
import pytest

from blip_jax.capfilt import audit, job
from blip_jax.capfilt.engines import ray as engine
from blip_jax.runtime.command import UsageError
from tests import helpers, jobs
from tests.test_array import content, rows


def nodes(*resources):
  return [{"Alive": True, "Resources": each} for each in resources]


GPUS = {"CPU": 32.0, "GPU": 8.0}
TPUS = {"CPU": 48.0, "TPU": 4.0}


@pytest.mark.parametrize(
  "there, accelerator, count, expected",
  [
    (nodes(GPUS, GPUS), "", 0, (16, 16, {"num_gpus": 1}, 4)),
    (nodes(GPUS, {"CPU": 2.0}), "gpu", 3, (3, 8, {"num_gpus": 1}, 4)),
    (nodes(TPUS, TPUS), "", 0, (2, 2, {"resources": {"TPU": 4.0}}, 48)),
    (nodes(GPUS, TPUS), "tpu", 5, (5, 1, {"resources": {"TPU": 4.0}}, 48)),
    (nodes({"CPU": 2.0}, GPUS), "cpu", 0, (2, 2, {"num_cpus": 1}, 2)),
    (nodes({"GPU": 2.0}), "", 0, (2, 2, {"num_gpus": 1}, 1)),
    (
      [{"Alive": False, "Resources": GPUS}, *nodes(TPUS)],
      "",
      0,
      (1, 1, {"resources": {"TPU": 4.0}}, 48),
    ),
  ],
)
def test_which_actors_are_asked_for(there, accelerator, count, expected):
  assert engine.plan(there, accelerator, count) == expected


@pytest.mark.parametrize(
  "there, accelerator, count, message",
  [
    (
      nodes({"CPU": 8.0}, {"CPU": 8.0}),
      "",
      0,
      r"with GPUs or TPUs, found 2 nodes with 16 CPU\. .*accelerator=cpu",
    ),
    (nodes(TPUS), "gpu", 0, "with GPUs, found 1 nodes with 48 CPU, 4 TPU"),
    (nodes(), "cpu", 0, "with CPUs, found 0 nodes with nothing"),
    (nodes(GPUS), "npu", 0, "expected gpu, tpu, cpu, or nothing, found 'npu'"),
    (nodes(GPUS), "", -1, r"ray\.actors: expected 0 or more, found -1"),
    (
      nodes(TPUS, TPUS | {"TPU": 8.0}),
      "",
      0,
      r"equal numbers of chips, found \[4\.0, 8\.0\]",
    ),
  ],
)
def test_what_the_cluster_lacks(there, accelerator, count, message):
  with pytest.raises(UsageError, match=message):
    engine.plan(there, accelerator, count)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "ray", None)
  jobs.write_scene_shards(tmp_path / "shards")
  config = jobs.capfilt_config(
    tmp_path / "shards" / "*.tar", tmp_path / "out", engine="ray"
  )
  with pytest.raises(ImportError, match=r"pip install 'blip_jax\[ray\]'"):
    job.run(config, config.out)
  assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def cluster():
  pytest.importorskip("ray", reason="needs the extra [ray]")
  from ray import cluster_utils

  arguments = {"num_cpus": 3, "include_dashboard": False}
  cluster = cluster_utils.Cluster(True, head_node_args=arguments)
  yield cluster
  cluster.shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """What actors load: they are other processes."""
  folder = tmp_path_factory.mktemp("models")
  helpers.write_golden("blip_decoder", folder / "captioner")
  helpers.write_golden("blip_retrieval", folder / "filter")
  return folder


@pytest.fixture
def config(tmp_path, models):
  shards = jobs.write_scene_shards(tmp_path / "shards")
  return lambda out, **changes: jobs.capfilt_config(
    shards / "*.tar",
    tmp_path / out,
    **dict(captioner=str(models / "captioner"), filter=str(models / "filter"))
    | changes,
  )


def on(cluster, config, actors=2):
  config.engine = "ray"
  config.ray.update(address=cluster.address, accelerator="cpu", actors=actors)
  return job.run(config, config.out)


def test_actors_write_the_bytes_of_local(cluster, config, tmp_path, caplog):
  local = config("local")
  total = job.run(local, local.out)
  ours = config("out")
  with caplog.at_level("INFO", logger="blip_jax"):
    assert on(cluster, ours) == total
    assert rows(tmp_path / "out") == rows(tmp_path / "local")
    assert content(tmp_path / "out") == content(tmp_path / "local")
    assert audit.status(ours, ours.out)["work_units_done"] == 3
  assert "Ray: 2 actors with {'num_cpus': 1} each" in caplog.text
  assert "Ray: process " in caplog.text
  assert audit.verify(ours, ours.out)["work_units"] == 3
  logged = [line for line in caplog.text.splitlines() if " images/s" in line]
  assert sum(int(line.split(" work units")[0][-1]) for line in logged) == 3
  # Nothing is left, and other settings are refused.
  with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
    on(cluster, config("out", seed=1), actors=1)
  assert content(tmp_path / "out") == content(tmp_path / "local")


def test_what_cannot_be_read_ends_the_job_after_all_others(
  cluster, config, tmp_path, caplog
):
  ours = config("out", captioner="")
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "00001.parquet").mkdir()
  with pytest.raises(ValueError, match=r"3 tries, such as \['00001'\].*folder"):
    on(cluster, ours, actors=1)
  names = {path.name for path in (tmp_path / "out").glob("*.done.json")}
  assert names == {"00000.done.json", "00002.done.json"}
  assert "00001 is not done: " in caplog.text


def test_what_is_lost_with_an_actor_goes_to_another(
  cluster, config, tmp_path, monkeypatch, caplog
):
  local = config("local", captioner="")
  job.run(local, local.out)
  hand_out, killed = engine.Pool._hand_out, []

  def and_kill(pool):
    hand_out(pool)
    if not killed and any(unit for _, unit in pool._calls.values()):
      (info,) = cluster.head_node.all_processes["raylet"]
      killed.extend(
        process
        for process in psutil.Process(info.process.pid).children(True)
        if process.cmdline()[0].startswith("ray::Actor")
      )
      for process in killed:
        process.kill()

  monkeypatch.setattr(engine.Pool, "_hand_out", and_kill)
  on(cluster, config("out", captioner=""), actors=1)
  assert len(killed) == 1
  assert "lost with its actor, for the 1. time; another one" in caplog.text
  assert content(tmp_path / "out") == content(tmp_path / "local")


def test_a_cluster_that_is_not_there(config):
  pytest.importorskip("ray", reason="needs the extra [ray]")
  ours = config("out", engine="ray")
  ours.ray.address = "127.0.0.1:1"
  with pytest.raises(UsageError, match=r"reached at 127\.0\.0\.1:1: .*refus"):
    job.run(ours, ours.out)


def test_a_cluster_without_accelerators(cluster, config, tmp_path):
  ours = config("out", engine="ray")
  ours.ray.address = cluster.address
  with pytest.raises(UsageError, match="found 1 nodes with 3 CPU"):
    job.run(ours, ours.out)
  assert not (tmp_path / "out").exists()
