"""A Slurm cluster of one node, for tests; nothing of it is left."""

import contextlib
import os
import pathlib
import secrets
import shutil
import socket
import subprocess
import time

# What is needed: the packages slurmctld, slurmd, slurm-client and munge.
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")


def is_there():
  return os.getuid() == 0 and all(map(shutil.which, PROGRAMS))


class Cluster:
  """Starts the daemons of a cluster, whose files are in a folder.

  Attributes:
    environ: environment variables of its commands.
  """

  def __init__(self, folder, cpus=3):
    self._folder = pathlib.Path(folder)
    self.environ = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf"}
    host = socket.gethostname().partition(".")[0]
    ports = [_free_port() for _ in range(2)]
    key = self._folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    (self._folder / "slurm.conf").write_text(
      f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SchedulerParameters=sched_interval=2
KillWait=5
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES State=UP OverSubscribe=NO
"""
    )
    self._daemons = []
    self._start(
      *("munged", "--foreground", "--force", f"--key-file={key}"),
      f"--socket={folder}/munge.socket",
      f"--pid-file={folder}/munged.pid",
      f"--log-file={folder}/munged.log",
      f"--seed-file={folder}/munged.seed",
      "--num-threads=1",
    )
    self._start("slurmctld", "-D", "-c")
    self._start("slurmd", "-D", "-N", host)

  def _start(self, *command):
    log = (self._folder / f"{command[0]}.out").open("w")
    self._daemons.append(
      subprocess.Popen(
        command, env=self.environ, stdout=log, stderr=subprocess.STDOUT
      )
    )

  def await_node(self):
    deadline = time.monotonic() + 60
    while "idle" not in self.run("sinfo", "-h", "-o", "%T", check=False):
      assert time.monotonic() < deadline, [
        path.read_text()[-1500:] for path in self._folder.glob("slurm*.out")
      ]
      time.sleep(0.5)

  def run(self, *command, check=True, **environ):
    """Runs a command of Slurm; returns what it prints."""
    return subprocess.run(
      command,
      env=self.environ | environ,
      check=check,
      capture_output=True,
      text=True,
      cwd=self._folder,
    ).stdout

  def state(self, job):
    """The states of a job's tasks, as one text."""
    text = self.run("scontrol", "show", "job", job)
    return " ".join(
      word.removeprefix("JobState=")
      for word in text.split()
      if word.startswith("JobState=")
    )

  def close(self):
    self.run("scancel", "--user=root", check=False)
    for daemon in reversed(self._daemons):
      daemon.terminate()
    for daemon in self._daemons:
      daemon.wait(30)


@contextlib.contextmanager
def started(folder, cpus=3):
  cluster = Cluster(folder, cpus)
  try:
    cluster.await_node()
    yield cluster
  finally:
    cluster.close()


def _free_port():
  with socket.socket() as one:
    one.bind(("127.0.0.1", 0))
    return one.getsockname()[1]
