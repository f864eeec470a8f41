"""The command `blip-jax`: what it prints, and with what status it ends."""

import os
import socket
import subprocess
import sys

import pytest

from blip_jax import (
  main,
)
from blip_jax.cli import recipes
from blip_jax.runtime import command
from tests import helpers


def test_results_are_printed(monkeypatch, tmp_path, capsys):
  seen = []

  def job(config, workdir):
    seen.append((config.num_steps, workdir))
    return {"val/r1": 12.5}

  monkeypatch.setitem(main.JOBS, "train", job)
  monkeypatch.setattr(main, "prepare_process", lambda: None)
  words = [
    "--config=quickstart",
    "--config.num_steps=7",
    f"--workdir={tmp_path}",
  ]
  assert main.run(words) == 0
  assert seen == [(7, str(tmp_path))]
  assert capsys.readouterr().out == (
    f"{'val/r1':32} 12.5\nResults are in {tmp_path}\n"
  )


@pytest.mark.parametrize(
  "words, message",
  [
    (["--config=quickstart", "--config.job=trian"], "Did you mean train?"),
    (["--config=quickstart", "--config.job=stauts"], "Did you mean status?"),
    (
      ["--config=quickstart", "--config.job=caption"],
      "them: caption_images",
    ),
    (["--config=search", "--config.job=train"], "pretrain_14m"),
    (["--config=capfilt", "--config.job=evaluate"], "caption_nocaps"),
    (["--config=quickstart", "--distributed=yes"], "HOST:PORT,PROCESSES,INDEX"),
    *(
      (["--config=quickstart", f"--distributed={how}"], "HOST:PORT")
      for how in (
        "",
        ",",
        ",,",
        "localhost,2,0",
        "localhost:,2,0",
        ":9876,2,0",
        "localhost:0,2,0",
        "localhost:65536,2,0",
        "localhost:9876",
        "localhost:9876,2",
        "localhost:9876,2,0,0",
        "localhost:9876,0,0",
        "localhost:9876,2,2",
        "localhost:9876,2,-1",
        "localhost:9876,-2,0",
        "localhost:9876,2,x",
        "localhost:9876,2.0,0",
        "localhost:\u0663\u0663,2,0",
        "http://localhost:9876,2,0",
        "::1:9876,2,0",
        "a b:9876,2,0",
        "AUTO",
      )
    ),
    (
      ["--config=quickstart", "--distributed=no.such.host.invalid:9876,2,1"],
      "no.such.host.invalid: ",
    ),
    *(
      (
        [f"--config={config}", f"--config.job={job}", "--distributed=a:1,2,0"],
        "runs as one process",
      )
      for config, job in [("search", "search")]
      + [("capfilt", job) for job in ("merge", "report", "status", "verify")]
    ),
    (["--config=quickstrat"], "Did you mean 'quickstart'?"),
    (["--config=quickstart", "--config.lr=1"], "--config.optim.lr?"),
    ([], "recipes are answer_images"),
  ],
)
def test_a_wrong_command_has_status_2(monkeypatch, capsys, words, message):
  monkeypatch.setattr(main, "prepare_process", lambda: None)
  assert main.run(words) == 2
  shown = capsys.readouterr()
  assert shown.err.startswith("error: ") and message in shown.err
  assert not shown.out


@pytest.mark.parametrize(
  "job", [job for jobs in main.SAME_KEYS for job in jobs]
)
def test_jobs_with_the_same_keys_may_follow_each_other(job):
  (own, *_) = next(jobs for jobs in main.SAME_KEYS if job in jobs)
  main.check_job(job, own)


def test_every_recipe_has_a_job_of_its_own_keys():
  for name in recipes.names():
    job = recipes.load(name).job
    main.check_job(job, job)


def test_a_task_of_other_recipes_names_them(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(main, "prepare_process", lambda: None)
  words = ["--config=quickstart", "--config.task=caption"]
  assert main.run([*words, f"--workdir={tmp_path}/run"]) == 1
  assert "config.task: this config lacks" in (shown := capsys.readouterr().err)
  for name in ("caption_coco", "caption_folder", "caption_nocaps"):
    assert name in shown


def run(*words, cwd, **env):
  return subprocess.run(
    [sys.executable, "-m", "blip_jax.main", *words],
    cwd=cwd,
    env={**os.environ, **env},
    capture_output=True,
    text=True,
  )


def test_a_mistake_is_one_line_and_a_status(tmp_path):
  words = ("--config=quickstart", "--config.scope=golbal")
  done = run(*words, cwd=tmp_path)
  assert done.returncode == 1 and not done.stdout
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: config.scope: expected one of")
  again = run(*words, cwd=tmp_path, BLIP_JAX_TRACEBACK="1")
  assert again.returncode == 1
  assert "Traceback" in again.stderr and "raise ValueError" in again.stderr


def test_a_scheme_is_refused_before_anything_is_created(tmp_path):
  done = run("--config=quickstart", "--workdir=hdfs://bucket/run", cwd=tmp_path)
  assert done.returncode == 1
  assert done.stderr.startswith("error: --workdir: hdfs://bucket/run: expected")
  assert not list(tmp_path.iterdir())


def start_two(folders, *flags):
  """Two processes of one job; the second has these flags more."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  return [
    subprocess.Popen(
      [
        sys.executable,
        "-m",
        "blip_jax.main",
        "--config=quickstart",
        "--config.data.train=images",
        f"--workdir={folders[0] / 'run'}",
        f"--distributed={address},2,{index}",
        *(flags if index else ()),
      ],
      cwd=folder,
      env={**os.environ, "XLA_FLAGS": ""},
      stderr=subprocess.PIPE,
      text=True,
    )
    for index, folder in enumerate(folders)
  ]


@pytest.mark.slow
def test_an_error_on_one_of_two_processes_ends_both(tmp_path):
  """Neither waits for the other at its exit."""
  folders = [tmp_path / name for name in ("whole", "empty")]
  for folder in folders:
    folder.mkdir()
  helpers.write_pairs(folders[0])
  # The first one waits for the other in its first step.
  processes = start_two(folders)
  try:
    _, shown = processes[1].communicate(timeout=90)
    assert processes[1].returncode == 1, shown
    assert "error: " in shown and "images" in shown
    assert "Traceback" not in shown
    # JAX ends it with a signal once it misses the other.
    processes[0].communicate(timeout=240)
    assert processes[0].returncode != 0
  finally:
    for process in processes:
      process.kill()


@pytest.mark.slow
def test_processes_with_different_settings_end_both(tmp_path):
  processes = start_two([tmp_path] * 2, "--config.optim.lr=1e-5")
  for process in processes:
    _, shown = process.communicate(timeout=240)
    assert process.returncode == 2
    assert "error: the processes of one job were started with" in shown
    assert "--config.optim.lr: 0.001 in process 0, 1e-05 in process 1" in shown
  assert not [*tmp_path.iterdir()]


def test_the_variable_of_the_traceback_is_documented(root):
  assert f"`{command.TRACEBACK}=1`" in (root / "docs/training.md").read_text()
