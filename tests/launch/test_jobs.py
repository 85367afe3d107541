"""The launchers, under stand-ins for gcloud, kubectl and sbatch that record what they are asked."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import toyrun
from harness import finished_steps

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((Path(__file__).parent / "jobset.schema.json").read_text())
TOY = f"--extra={ROOT / 'tests' / 'extra'}"
CONFIG = "--config=tests/configs/toy.py"

# Notes its arguments and its standard input; answers `describe` with the next line of `states`, of which the
# last stays, and `ssh` with the next of `statuses`.
STAND_IN = """#!{python}
import json, sys
from pathlib import Path
here = Path({folder!r})
words = sys.argv[1:]
given = sys.stdin.read() if words[:1] != ["compute"] else ""
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps([Path(sys.argv[0]).name, *words, given]) + "\\n")
def next_of(name):
    lines = (here / name).read_text().split("\\n")
    if len(lines) > 1:
        (here / name).write_text("\\n".join(lines[1:]))
    return lines[0]
if "describe" in words:
    state = next_of("states")
    if not state:
        sys.exit("NOT_FOUND: there is no such thing")
    print(state)
if "ssh" in words:
    sys.exit(int(next_of("statuses")))
"""


@dataclass(frozen=True)
class Cloud:
    """A PATH on which the tools are stand-ins."""

    folder: Path

    def launch(self, kind: str, *words: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.folder}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", str(ROOT / "launch" / f"{kind}.sh"), *words],
            env={**os.environ, "PATH": path, "PYTHON": sys.executable},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def say(self, states: list[str], statuses: list[int]) -> None:
        (self.folder / "states").write_text("\n".join(states))
        (self.folder / "statuses").write_text("\n".join(map(str, statuses)))

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    for tool in ("gcloud", "kubectl", "sbatch"):
        path = tmp_path / tool
        path.write_text(STAND_IN.format(python=sys.executable, folder=str(tmp_path)))
        path.chmod(0o755)
    return Cloud(tmp_path)


TPU = (
    "--name=slice", "--zone=us-west4-a", "--accelerator=v5litepod-16",
    "--runtime=v2-alpha-tpuv5-lite", CONFIG, "--workdir=gs://bucket/run", "--poll=1",
)  # fmt: skip
GKE = ("--name=job", "--image=image:1", "--topology=v5e:4x4", CONFIG, "--workdir=gs://bucket/run")
SLURM = ("--name=job", "--nodes=2", "--gpus=4", CONFIG, f"--python={sys.executable}")


# --- Cloud TPU ---------------------------------------------------------------------------------


def verbs(calls: list[list[str]]) -> list[str]:
    return [
        next(w for w in call if w in ("describe", "create", "delete", "scp", "ssh"))
        for call in calls
    ]


def test_a_slice_is_asked_for_waited_for_and_used(cloud: Cloud) -> None:
    cloud.say(["", "WAITING_FOR_RESOURCES", "ACTIVE"], [0])
    done = cloud.launch("tpu", *TPU, "--spot", "--config.steps=7")
    assert done.returncode == 0, done.stderr
    calls = cloud.calls()
    assert verbs(calls) == ["describe", "create", "describe", "describe", "scp", "ssh"]
    assert all(call[:3] == ["gcloud", "compute", "tpus"] for call in calls)
    assert all("--zone=us-west4-a" in call for call in calls)
    create, ssh = calls[1], calls[-1]
    wanted = {"queued-resources", "slice", "--node-id=slice", "--accelerator-type=v5litepod-16"}
    assert wanted | {"--runtime-version=v2-alpha-tpuv5-lite", "--spot"} <= set(create)
    assert "--worker=all" in ssh
    command = next(w for w in ssh if w.startswith("--command="))
    assert "--workdir=gs://bucket/run --config.steps=7" in command and ".[tpu]" in command


def test_a_slice_that_is_taken_away_is_asked_for_again(cloud: Cloud) -> None:
    # There; the job ends badly and the slice is suspended; deleted, made again, and used to the end.
    cloud.say(["ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"], [255, 0])
    done = cloud.launch("tpu", *TPU)
    assert done.returncode == 0, done.stderr
    assert [v for v in verbs(cloud.calls()) if v != "describe"] == [
        "scp", "ssh", "delete", "create", "scp", "ssh",
    ]  # fmt: skip
    assert "taken away" in done.stdout


def test_a_job_that_fails_on_a_slice_that_is_there_is_not_tried_again(cloud: Cloud) -> None:
    cloud.say(["ACTIVE"], [2])
    assert cloud.launch("tpu", *TPU).returncode == 2
    assert verbs(cloud.calls()).count("ssh") == 1


@pytest.mark.parametrize("status", [4, 137, 143])
def test_a_job_that_its_watchdog_ended_is_started_again_on_the_same_slice(
    cloud: Cloud, status: int
) -> None:
    """4 of the watchdog; 128 and a signal of those that ended with it."""
    cloud.say(["ACTIVE"], [status, 0])
    done = cloud.launch("tpu", *TPU)
    assert done.returncode == 0, done.stderr
    assert [v for v in verbs(cloud.calls()) if v != "describe"] == ["scp", "ssh", "scp", "ssh"]
    assert f"ended with status {status}; starting it again" in done.stdout


def test_a_job_that_is_ended_again_and_again_is_given_up(cloud: Cloud) -> None:
    cloud.say(["ACTIVE"], [4])
    done = cloud.launch("tpu", *TPU, "--restarts=2")
    assert done.returncode == 2 and verbs(cloud.calls()).count("ssh") == 3
    assert "started 3 times" in done.stderr and "status was 4" in done.stderr


def test_a_run_that_was_told_to_stop_has_not_failed(cloud: Cloud) -> None:
    cloud.say(["ACTIVE"], [3])
    assert cloud.launch("tpu", *TPU).returncode == 3
    assert verbs(cloud.calls()).count("ssh") == 1


# --- GKE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "slices", "hosts", "chips"),
    [("v5e:4x4", 1, 4, 4), ("v5p:2x2x2", 2, 2, 4), ("v6e:1x1", 1, 1, 1), ("v5e:16x16", 4, 64, 4)],
)
def test_a_jobset_is_valid_and_has_a_pod_for_each_host(
    cloud: Cloud, topology: str, slices: int, hosts: int, chips: int
) -> None:
    words = [w for w in GKE if not w.startswith("--topology")]
    done = cloud.launch("gke", *words, f"--topology={topology}", f"--slices={slices}")
    assert done.returncode == 0, done.stderr
    delete, apply = cloud.calls()
    assert delete[:5] == ["kubectl", "delete", "jobset", "job", "--ignore-not-found"]
    assert apply[:4] == ["kubectl", "apply", "-f", "-"]
    manifest = json.loads(apply[-1])
    jsonschema.validate(manifest, SCHEMA)
    (job,) = manifest["spec"]["replicatedJobs"]
    assert job["replicas"] == slices
    inner = job["template"]["spec"]
    assert inner["parallelism"] == inner["completions"] == hosts
    pod = inner["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology.split(":")[1]


def test_a_manifest_with_a_wrong_key_is_not_valid(cloud: Cloud) -> None:
    """The control of the schema."""
    cloud.launch("gke", *GKE)
    manifest = json.loads(cloud.calls()[-1][-1])
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 2
    with pytest.raises(jsonschema.ValidationError, match="paralelism"):
        jsonschema.validate(manifest, SCHEMA)


def expanded(text: str, variables: dict[str, str]) -> str:
    """Return what Kubernetes makes of a word of a command (k8s.io/kubernetes/third_party/forked/golang/expansion).

    `$$` is `$`; `$(NAME)` the variable, or itself where there is none; any other `$` is itself.
    """
    result, i = "", 0
    while i < len(text):
        if text[i] != "$" or i + 1 == len(text):
            result, i = result + text[i], i + 1
        elif text[i + 1] == "$":
            result, i = result + "$", i + 2
        elif text[i + 1] == "(" and ")" in text[i + 2 :]:
            name, _, _ = text[i + 2 :].partition(")")
            result, i = result + variables.get(name, f"$({name})"), i + len(name) + 3
        else:
            result, i = result + text[i : i + 2], i + 2
    return result


HOSTILE = (
    "$(HOME)", "$$", "$$(HOME)", "$HOME", "`id`", "$", "a b", "'", '"', "\\", "$(", "(*)", "{x,y}", "~", ";", "ü",
)  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE)
def test_a_value_comes_to_the_run_as_it_was_given(cloud: Cloud, tmp_path: Path, value: str) -> None:
    """Through the manifest, Kubernetes, bash and Slurm's script, to the arguments of a stand-in for Python."""
    word = f"--config.tasks.one.source.name={value}"
    noted = tmp_path / "noted.json"
    python = tmp_path / "my python"
    python.write_text(
        f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open({str(noted)!r}, 'w'))\n"
    )
    python.chmod(0o755)
    (tmp_path / "python").symlink_to(python)
    (tmp_path / "srun").write_text('#!/usr/bin/env bash\nshift\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    assert cloud.launch("gke", *GKE, word).returncode == 0
    manifest = json.loads(cloud.calls()[-1][-1])
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    command = [expanded(w, {"HOME": "/root"}) for w in pod["containers"][0]["command"]]
    subprocess.run(command, env=environment, check=True)
    assert json.loads(noted.read_text())[-1] == word

    noted.unlink()
    words = [w for w in SLURM if not w.startswith("--python")]
    done = cloud.launch("slurm", *words, f"--workdir={tmp_path}/run", f"--python={python}", word)
    assert done.returncode == 0, done.stderr
    subprocess.run(["bash"], input=cloud.calls()[-1][-1], text=True, env=environment, check=True)
    assert json.loads(noted.read_text())[-1] == word


# --- Slurm -------------------------------------------------------------------------------------


def test_a_batch_script_asks_for_a_process_per_gpu_and_is_queued_again(
    cloud: Cloud, tmp_path: Path
) -> None:
    done = cloud.launch("slurm", *SLURM, f"--workdir={tmp_path}/run", "--partition=gpu")
    assert done.returncode == 0, done.stderr
    ((tool, script),) = cloud.calls()
    assert tool == "sbatch"
    options = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    for wanted in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "partition=gpu", "requeue"):
        assert f"#SBATCH --{wanted}" in options
    assert not any("account" in option for option in options)
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize(
    ("status", "restarts", "queued"),
    [
        (0, "", False), (3, "", True), (1, "", False), (2, "0", False),
        (4, "", True), (4, "6", True), (4, "7", False),  # of --restarts=7, so many were before
        (137, "0", True), (143, "7", False), (3, "700", True),
    ],
)  # fmt: skip
def test_a_run_is_queued_again_that_saved_or_that_its_watchdog_ended(
    cloud: Cloud, tmp_path: Path, status: int, restarts: str, queued: bool
) -> None:
    cloud.launch("slurm", *SLURM, f"--workdir={tmp_path}/run", "--restarts=7")
    script = cloud.calls()[0][-1]
    for tool, body in (("srun", f"exit {status}"), ("scontrol", f'echo "$@" >{tmp_path}/queued')):
        (tmp_path / tool).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / tool).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    environment |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    done = subprocess.run(["bash"], input=script, text=True, env=environment)
    assert done.returncode == status
    assert (tmp_path / "queued").exists() == queued
    if queued:
        assert (tmp_path / "queued").read_text() == "requeue 77\n"


# --- a pod on this machine ---------------------------------------------------------------------


def pod(workdir: Path, *words: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    common = [CONFIG, f"--workdir={workdir}", TOY, *words]
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / "local_pod.sh"), *common],
        env={**environment, "PYTHON": sys.executable}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for_checkpoint(workdir: Path, started: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 300
    while started.poll() is None and not finished_steps(workdir):
        assert time.monotonic() < limit
        time.sleep(0.02)


def children(of: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(of)], capture_output=True, text=True)
    return sorted(int(x) for x in found.stdout.split())


@pytest.fixture
def machine(environment_of: Callable[..., dict[str, str]]) -> dict[str, str]:
    made = environment_of(1)
    return {k: v for k, v in made.items() if k != "XLA_FLAGS"}


def test_a_pod_loses_a_process_is_told_to_stop_and_comes_to_its_end_on_a_cluster(
    cloud: Cloud, tmp_path: Path, machine: dict[str, str]
) -> None:
    """SIGKILL of one: the others end, and that is reported. SIGTERM: all save one step, status 3. Then the rest."""
    workdir = tmp_path / "run"
    long = ("--processes=2", "--devices=2", "--config.steps=100000", "--config.checkpoint.every=20")
    started = pod(workdir, *long, environment=machine)
    wait_for_checkpoint(workdir, started)
    os.kill(children(started.pid)[-1], signal.SIGKILL)
    _, said = started.communicate(timeout=300)
    assert "process 1 was ended by SIGKILL; ending the others" in said
    assert "run the same command again to resume" in said
    assert started.returncode not in (0, 3)

    last = finished_steps(workdir)[-1]
    started = pod(workdir, *long, environment=machine)
    while finished_steps(workdir)[-1] == last:
        assert started.poll() is None, started.communicate()
        time.sleep(0.02)
    started.send_signal(signal.SIGTERM)
    out, said = started.communicate(timeout=300)
    assert started.returncode == 3, said
    step = finished_steps(workdir)[-1]
    assert f"Resuming from step {last}" in out and f"saved step {step}" in out

    statuses, out = by_workers(slurm_command(cloud, workdir, f"--config.steps={step + 2}"), machine)
    assert statuses == [0, 0], out
    assert finished_steps(workdir)[-1] == step + 2 and f"Resuming from step {step}" in out
    toyrun.block()
    assert toyrun.meta(workdir)["environment"]["processes"] == 2


def slurm_command(cloud: Cloud, workdir: Path, *words: str) -> str:
    """Return what the batch script gives each node of a cluster to run."""
    done = cloud.launch("slurm", *SLURM, f"--workdir={workdir}", TOY, *words)
    assert done.returncode == 0, done.stderr
    line = next(x for x in cloud.calls()[-1][-1].splitlines() if x.startswith("srun"))
    return shlex.split(line)[-1]


def by_workers(command: str, machine: dict[str, str]) -> tuple[list[int], str]:
    """Run a worker's command as two nodes, over loopback; return their statuses and all that they print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MMJAX_COORDINATOR": f"127.0.0.1:{port}", "MMJAX_PROCESSES": "2"}
    started = [
        subprocess.Popen(
            ["bash", "-c", command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**machine, **where, "MMJAX_PROCESS": str(index)},
        )
        for index in range(2)
    ]  # fmt: skip
    printed = [each.communicate(timeout=300)[0] for each in started]
    return [each.returncode for each in started], "".join(printed)


@pytest.mark.parametrize(("job", "status"), [("exit 0", 0), ('exit "$WHICH"', 1)])
def test_a_pod_ends_well_where_all_its_processes_do(job: str, status: int) -> None:
    made = (
        f"jobs.Pod([dict(os.environ, WHICH=str(i)) for i in range(2)]).run(['bash', '-c', {job!r}])"
    )
    code = f"import os, sys; sys.path.insert(0, 'launch'); import jobs; sys.exit({made})"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == status


SLEEPER = "import os, sys, time; print(os.getpid(), flush=True); {more} time.sleep(600)"


@pytest.mark.parametrize("by", ["signal", "pipe"])
def test_a_member_ends_when_its_launcher_is_killed(by: str, tmp_path: Path) -> None:
    """By the signal that Linux sends then; and without it, by the pipe that the launcher held."""
    more = {
        "signal": "",
        "pipe": "from mmjax.engine import processes; processes._follow_launcher();",
    }[by]
    words = [sys.executable, "-c", SLEEPER.format(more=more)]
    without = "jobs.end_with = lambda launcher: None; " if by == "pipe" else ""
    code = (
        f"import os, sys; sys.path.insert(0, 'launch'); import jobs; {without}"
        f"sys.exit(jobs.Pod([dict(os.environ)]).run({words!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout
    member = int(launcher.stdout.readline())
    assert Path(f"/proc/{member}").exists()
    launcher.kill()
    launcher.wait()
    limit = time.monotonic() + 120
    while Path(f"/proc/{member}").exists() and "Z" not in status_of(member):
        assert time.monotonic() < limit
        time.sleep(0.01)


def status_of(pid: int) -> str:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return "Z"
    return next(line for line in lines if line.startswith("State"))


def test_a_lifeline_that_was_not_handed_on_ends_nobody() -> None:
    code = "from mmjax.engine import processes; import time; processes._follow_launcher(); time.sleep(0.2)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MMJAX_LIFELINE": "97"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_an_error_of_a_pod_is_said_by_its_processes(
    tmp_path: Path, machine: dict[str, str]
) -> None:
    started = pod(tmp_path / "run", "--processes=2", "--config.stepz=3", environment=machine)
    _, said = started.communicate(timeout=120)
    assert started.returncode == 2
    assert "'config.stepz'" in said


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("tpu", [*TPU[:-2], "--workdir=/home/me/run"], "every machine must see it"),
        ("tpu", [*TPU, "--zon=a"], "unknown argument '--zon=a'. Did you mean '--zone'?"),
        ("tpu", TPU[1:], "required: --name"),
        ("tpu", [*TPU, "--name=My_Slice"], "small letters"),
        ("gke", [*GKE, "--topology=v5:4x4"], "GENERATION:GRID"),
        ("gke", [*GKE, "--slices=0"], "not a whole number above 0"),
        ("slurm", [*SLURM, "--workdir=/r", "--config=configs/none.py"], "no such file"),
        ("slurm", [*SLURM, "--workdir=/r", "--config=none:small"], "no such file or config"),
        ("local_pod", [CONFIG, "--workdir=r", "--proceses=2"], "Did you mean '--processes'?"),
        (
            "slurm",
            [*SLURM, "--workdir=/r", "--partition=a\n#SBATCH --wrap=id"],
            "control characters",
        ),
        ("slurm", [*SLURM, "--workdir=/r\nid"], "control characters"),
        ("slurm", [*SLURM, "--workdir=/r", "--config.x=\r"], "control characters"),
        ("slurm", [*SLURM, "--workdir=/r", "--account=a\u2028b"], "control characters"),
        ("slurm", [*SLURM, "--workdir=/r", "--partition=a --exclusive"], "no spaces"),
        ("slurm", [*SLURM, "--workdir=/r", "--time=1#2"], "number signs"),
        ("gke", [*GKE, "--namespace=a\nb"], "control characters"),
        ("tpu", [*TPU, "--zone=a\x00b".replace("\x00", "\x01")], "control characters"),
        ("local_pod", [CONFIG, "--workdir=r\x1b[2J"], "control characters"),
    ],
)
def test_arguments_that_cannot_be(cloud: Cloud, kind: str, words: list[str], message: str) -> None:
    done = cloud.launch(kind, *words)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not cloud.calls()


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        ("tpu", TPU, "queued-resources create slice"),
        ("gke", GKE, '"kind": "JobSet"'),
        ("slurm", [*SLURM, "--workdir=/r"], "#SBATCH --nodes=2"),
        ("local_pod", [CONFIG, "--workdir=r", "--processes=3"], "MMJAX_PROCESS=2"),
        (
            "local_pod",
            ["--config=quickstart", "--workdir=r", "--processes=3"],
            "--config=quickstart ",
        ),
    ],
)
def test_a_dry_run_prints_and_calls_nothing(cloud: Cloud, kind: str, words: Any, said: str) -> None:
    done = cloud.launch(kind, *words, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert said in done.stdout and "-m mmjax train" in done.stdout
    assert not cloud.calls()


def test_a_tool_that_is_not_installed(tmp_path: Path) -> None:
    done = Cloud(tmp_path).launch("slurm", *SLURM, "--workdir=/r")
    assert done.returncode == 2 and "'sbatch' is not installed" in done.stderr


@pytest.mark.parametrize(
    "ends, blamed",
    [
        ("exit 2; sleep 0.4; kill -9 $$", "process 1 was ended by SIGKILL"),
        ("exit 2; sleep 0.4; exit 3", "process 0 ended with status 2"),
        ("exit 2; sleep 0.4; kill -ABRT $$", "process 0 ended with status 2"),
        ("exit 2; kill -ABRT $$", "process 0 ended with status 2"),
        ("sleep 0.8; exit 2; kill -ABRT $$", "process 1 was ended by SIGABRT"),
    ],
)
def test_the_process_that_was_killed_is_named_though_another_ended_before_it(
    ends: str, blamed: str
) -> None:
    """As when a connection closes at once, and the memory of the one that was killed is given back slowly."""
    first, _, second = ends.partition("exit 2; ")
    first += "exit 2"
    job = f'if [ "$WHICH" = 0 ]; then {first}; else {second}; fi'
    made = f"sys.exit(jobs.Pod([dict(os.environ, WHICH=str(i)) for i in range(2)]).run(['bash', '-c', {job!r}]))"
    done = subprocess.run(
        [sys.executable, "-c", f"import os, sys; sys.path.insert(0, 'launch'); import jobs; {made}"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert f"pod: {blamed}; ending the others." in done.stderr
