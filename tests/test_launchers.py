"""The launchers: they parse, name what exists, and run under a real Slurm."""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

import pytest
import yaml

from blip_jax.capfilt import audit
from blip_jax.cli import command_line, recipes
from blip_jax.runtime import files
from tests import QUICK_TO_COMPILE, helpers, jobs, slurm
from tests.test_array import content

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tools" / "launch"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])
MANIFESTS = sorted(FOLDER.glob("*.yaml"))
names = lambda paths: [path.name for path in paths]

# What a launcher leaves to its environment.
ENVIRONMENT = {
  "$CONFIG": "pretrain_14m",
  "$WORKDIR": "/bucket/run",
  "$first:9876,$SKYPILOT_NUM_NODES,$SKYPILOT_NODE_RANK": "localhost:9876,2,1",
  "$FIRST:9876,$NODES,$JOB_COMPLETION_INDEX": "localhost:9876,2,1",
}
_FLAG = re.compile(
  r"--(?:config|workdir|distributed)[\w.]*="
  r"""(?:"[^"]*"|'[^']*'|[^\s\]]+)"""
)


def lint(program, path):
  program = pathlib.Path(sys.executable).with_name(program)
  found = subprocess.run([program, path], capture_output=True, text=True)
  assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=names(SCRIPTS))
def test_scripts_are_checked(path):
  subprocess.run(["bash", "-n", path], check=True)
  lint("shellcheck", path)
  assert os.access(path, os.X_OK)


def flags_of(path):
  """The flags of the command of a launcher, as it would be given."""
  text = path.read_text()
  for name, value in ENVIRONMENT.items():
    text = text.replace(name, value)
  found = [shlex.split(flag.rstrip(","))[0] for flag in _FLAG.findall(text)]
  return list(dict.fromkeys(found))


LAUNCHERS = [*SCRIPTS, *MANIFESTS]


@pytest.mark.parametrize("path", LAUNCHERS, ids=names(LAUNCHERS))
def test_commands_parse(path):
  flags = flags_of(path)
  (recipe,) = [flag for flag in flags if flag.startswith("--config=")]
  assert recipe.removeprefix("--config=") in recipes.names()
  command = command_line.parse(flags)
  if command.config.job == "capfilt":
    assert command.config.engine in ("array", "ray")
    assert command.config.out
  elif command.config.job == "serve":
    assert command.config.model == "MODEL" or "MODEL" in command.config.model
  else:
    assert command.config.job == "train" and command.workdir
    assert command.distributed != "off"


def test_commands_with_a_mistake_do_not_parse(tmp_path):
  text = (FOLDER / "capfilt-job.yaml").read_text()
  wrong = tmp_path / "wrong.yaml"
  wrong.write_text(text.replace("config.engine", "config.engines"))
  with pytest.raises((AttributeError, ValueError), match="engines"):
    command_line.parse(flags_of(wrong))


def validate(kind, version, spec):
  import kubernetes_validate

  body = {"apiVersion": version, "kind": kind, "metadata": {"name": "x"}}
  kubernetes_validate.validate(body | spec, "1.34", strict=True)


def test_the_service_starts_ends_and_is_found():
  text = (FOLDER / "service.yaml").read_text()
  deployment, service = yaml.safe_load_all(text)
  validate("Deployment", "apps/v1", {"spec": deployment["spec"]})
  validate("Service", "v1", {"spec": service["spec"]})
  pod = deployment["spec"]["template"]["spec"]
  (container,) = pod["containers"]
  config = recipes.load("serve")
  ports = {
    config.port,
    container["ports"][0]["containerPort"],
    container["startupProbe"]["httpGet"]["port"],
    service["spec"]["ports"][0]["targetPort"],
  }
  assert len(ports) == 1
  slept = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
  needed = config.body_s + config.deadline_s + slept
  assert needed < pod["terminationGracePeriodSeconds"]


def load(name):
  return yaml.safe_load((FOLDER / name).read_text())


@pytest.mark.parametrize("name", ["jobset-gpu.yaml", "jobset-tpu.yaml"])
def test_job_sets(name):
  manifest = load(name)
  assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert manifest["kind"] == "JobSet"
  spec = manifest["spec"]
  assert spec.keys() == {"failurePolicy", "replicatedJobs"}
  (rule,) = spec["failurePolicy"]["rules"]
  assert rule.keys() == {"name", "action", "onJobFailureReasons"}
  (group,) = spec["replicatedJobs"]
  assert group.keys() == {"name", "replicas", "template"}
  validate("Job", "batch/v1", group["template"])
  job_spec = group["template"]["spec"]
  assert job_spec["completions"] == job_spec["parallelism"]
  (container,) = job_spec["template"]["spec"]["containers"]
  variables = {v["name"]: v["value"] for v in container.get("env", [])}
  if variables:
    own = manifest["metadata"]["name"]
    assert variables["NODES"] == str(job_spec["completions"])
    assert variables["FIRST"] == f"{own}-{group['name']}-0-0.{own}"


def test_the_indexed_job():
  manifest = load("capfilt-job.yaml")
  validate("Job", "batch/v1", {"spec": manifest["spec"]})
  (container,) = manifest["spec"]["template"]["spec"]["containers"]
  assert container["env"] == [
    {"name": "JOB_COMPLETIONS", "value": str(manifest["spec"]["completions"])}
  ]


def test_the_ray_job():
  manifest = load("rayjob-capfilt.yaml")
  assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
  spec = manifest["spec"]
  assert spec.keys() == {
    "entrypoint",
    "backoffLimit",
    "shutdownAfterJobFinishes",
    "rayClusterSpec",
  }
  cluster = spec["rayClusterSpec"]
  assert cluster.keys() == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
  assert isinstance(cluster["rayVersion"], str)
  for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
    validate("Pod", "v1", group["template"])
    assert all(isinstance(v, str) for v in group["rayStartParams"].values())


def test_the_task_of_skypilot():
  task = load("skypilot.yaml")
  assert task.keys() == {
    "name",
    "num_nodes",
    "resources",
    "envs",
    "workdir",
    "file_mounts",
    "setup",
    "run",
  }
  for script in (task["setup"], task["run"]):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
  recovery = task["resources"]["job_recovery"]
  assert recovery == {"recover_on_exit_codes": [75, 134]}


def test_the_image_has_what_is_copied_and_what_is_an_extra():
  text = (FOLDER / "Containerfile").read_text()
  for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
    *sources, _ = line.split()
    assert all((ROOT / source).exists() for source in sources)
  (extras,) = re.findall(r'EXTRAS="([^"]*)"', text)
  setup = (ROOT / "setup.cfg").read_text()
  for extra in extras.split(","):
    assert f"\n{extra} =\n" in setup


def test_the_containerfile_is_linted():
  lint("hadolint", FOLDER / "Containerfile")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
  if not slurm.is_there():
    pytest.skip("needs Slurm, munge, and root")
  with slurm.started(tmp_path_factory.mktemp("slurm")) as cluster:
    yield cluster


ENVIRON = {
  "PYTHON": sys.executable,
  "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
  "XLA_FLAGS": QUICK_TO_COMPILE,
}


def submit(cluster, script, *options, flags):
  return cluster.run(
    *("sbatch", "--parsable", *options, FOLDER / script, *flags), **ENVIRON
  ).strip()


def wait(cluster, job, until, log):
  deadline = time.monotonic() + 300
  while not until(cluster.state(job)):
    assert time.monotonic() < deadline, (cluster.state(job), log())
    time.sleep(0.5)


def has_ended(states):
  return {*states.split()} <= {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}


@pytest.mark.slow
def test_an_array_that_is_stopped_comes_again(cluster, tmp_path):
  helpers.write_golden("blip_decoder", tmp_path / "captioner")
  helpers.write_golden("blip_retrieval", tmp_path / "filter")
  (tmp_path / "shards").mkdir()
  for n in range(6):
    jobs.write_tar(
      tmp_path / "shards" / f"{n:05d}.tar", jobs.scene_members(8 * n, 8)
    )
  flags = [
    f"--config.source={tmp_path}/shards/*.tar",
    f"--config.captioner={tmp_path}/captioner",
    f"--config.filter={tmp_path}/filter",
    "--config.per_device_batch_size=4",
    "--config.generation.max_length=8",
    "--config.generation.min_length=4",
  ]
  subprocess.run(
    [
      *(sys.executable, "-m", "blip_jax.main", "--config=capfilt", *flags),
      f"--config.out={tmp_path}/local",
    ],
    env=os.environ | ENVIRON,
    check=True,
  )
  flags += [f"--config.out={tmp_path}/out"]
  array = submit(
    cluster,
    "capfilt.sbatch",
    "--array=0-2",
    f"--output={tmp_path}/%a.txt",
    flags=flags,
  )
  text = lambda: "".join(p.read_text() for p in tmp_path.glob("?.txt"))
  wait(cluster, array, lambda _: "Task 1 of 3" in text(), text)
  # As Slurm does before the time is up: to the processes of srun alone.
  cluster.run("scancel", "--signal=TERM", f"{array}_1")
  wait(cluster, array, has_ended, text)
  assert cluster.state(array) == "COMPLETED COMPLETED COMPLETED", text()
  assert "SIGTERM was received" in (tmp_path / "1.txt").read_text()
  assert text().count("Task 1 of 3") == 2
  assert content(tmp_path / "out") == content(tmp_path / "local")
  config = jobs.capfilt_config(f"{tmp_path}/shards/*.tar", tmp_path / "out")
  assert audit.verify(config, config.out)["work_units"] == 6


@pytest.mark.slow
def test_a_training_that_is_stopped_comes_again(cluster, tmp_path):
  flags = [
    "--config=quickstart",
    f"--workdir={tmp_path}/run",
    "--config.num_steps=40",
    "--config.batch_size=8",
    "--config.optim.warmup_steps=1",
    "--config.evals.scenes_val.samples=0",
    "--config.checkpoint.every_steps=1000",
  ]
  run = submit(
    cluster,
    "slurm.sbatch",
    "--ntasks-per-node=2",
    f"--output={tmp_path}/run.txt",
    flags=flags,
  )
  log = tmp_path / "run.txt"
  text = lambda: log.read_text() if log.exists() else ""
  metrics = tmp_path / "run" / "metrics.jsonl"
  steps = lambda: len([*files.json_lines(metrics)]) if metrics.exists() else 0
  wait(cluster, run, lambda s: steps() > 0 or "step 1" in text(), text)
  cluster.run("scancel", "--signal=TERM", run)
  wait(cluster, run, has_ended, text)
  assert cluster.state(run) == "COMPLETED", text()[-3000:]
  assert "the same command resumes" in text()
  assert "resumed" in text()


@pytest.mark.slow
def test_an_error_is_not_repeated(cluster, tmp_path):
  flags = ["--config=quickstart", "--config.no_such_key=1"]
  run = submit(
    cluster, "slurm.sbatch", f"--output={tmp_path}/run.txt", flags=flags
  )
  text = lambda: (tmp_path / "run.txt").read_text()
  wait(cluster, run, has_ended, text)
  assert cluster.state(run) == "FAILED"
  assert "no_such_key" in text()
  assert "Restarts=0" in cluster.run("scontrol", "show", "job", run)


@pytest.mark.slow
@pytest.mark.parametrize(
  "statuses, restarts",
  [((75, 75), 1), ((134, 75), 1), ((1, 75), 0), ((137, 134), 0)],
)
def test_an_error_of_one_process_wins(cluster, tmp_path, statuses, restarts):
  """A stand-in for Python, which succeeds when it is started again."""
  stand_in = tmp_path / "python"
  stand_in.write_text(
    "#!/bin/bash\n((SLURM_RESTART_COUNT)) && exit 0\n"
    f"statuses=({statuses[0]} {statuses[1]})\n"
    "sleep $SLURM_PROCID; exit ${statuses[$SLURM_PROCID]}\n"
  )
  stand_in.chmod(0o755)
  run = cluster.run(
    *("sbatch", "--parsable", "--ntasks-per-node=2"),
    *(f"--output={tmp_path}/run.txt", FOLDER / "slurm.sbatch"),
    PYTHON=str(stand_in),
  ).strip()
  wait(cluster, run, has_ended, (tmp_path / "run.txt").read_text)
  shown = cluster.run("scontrol", "show", "job", run)
  assert f"Restarts={restarts}" in shown
  assert cluster.state(run) == ("COMPLETED" if restarts else "FAILED")
