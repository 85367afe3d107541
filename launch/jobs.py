"""Starts one training job: as a pod of processes on this machine, on a Cloud TPU slice, on GKE, on Slurm.

The shell scripts beside this file call it; it needs Python's standard library only. What runs on each machine is the
same everywhere: `mmjax train` with the config, the workdir and whatever `--config.KEY=VALUE` follows. Run
again, a job resumes from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import ctypes
import difflib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
STOPPED = 3  # exit status of a run that was asked to stop, and has saved
STUCK = 4  # exit status of a run that its watchdog has ended
# What a run that was restarted may get over: a watchdog's end, and the signals by which the others of a job are ended.
PASSING = (STUCK, 128 + signal.SIGKILL, 128 + signal.SIGTERM)
LIFELINE = "MMJAX_LIFELINE"  # the end of a pipe that closes when this launcher ends, see `mmjax.engine.processes`
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
GRACE = 15.0  # seconds that the other processes have to end when one has failed
POLL = 0.1
SETTLE = 2.0  # seconds within which one that was killed is the reason why another failed

# Chips of a host, and GKE's name of the accelerator, by the generation as a topology names it.
TPU_HOSTS = {"v4": 4, "v5e": 4, "v5p": 4, "v6e": 4, "tpu7x": 4}
GKE_ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}


class JobError(Exception):
    """An error that the user can fix, in one line."""


# --- arguments ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line and takes no abbreviated flags."""

    def __init__(self, **more: Any):
        super().__init__(allow_abbrev=False, **more)

    def error(self, message: str) -> Any:
        raise JobError(message)


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags, and the words for `mmjax train` among them.

    Raises:
      JobError: an unknown flag; a config that is not there; a control character in a value.
    """
    for word in argv:
        # They would end a line of a script or of a manifest, and begin another.
        if not word.isprintable():
            raise JobError(f"{word!r}: line breaks and other control characters are not taken.")
    given, rest = parser.parse_known_args(argv)
    known = [s for action in parser._actions for s in action.option_strings]
    for word in rest:
        if not word.startswith(("--config.", "--allow_change", "--take_over", "--extra=")):
            near = difflib.get_close_matches(word.split("=")[0], known, 1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise JobError(f"unknown argument '{word}'.{hint}")
    name = given.config.partition(":")[0]
    is_path = name.endswith(".py") or "/" in name
    if not (ROOT / name if is_path else ROOT / "configs" / f"{name}.py").is_file():
        raise JobError(f"--config={given.config}: no such file or config in {ROOT}.")
    return given, rest


def shared(flags: argparse.ArgumentParser) -> None:
    """Add the flags of every kind of job."""
    flags.add_argument(
        "--config",
        required=True,
        help="of the run: a name, or a file from the root of the checkout",
    )
    flags.add_argument("--workdir", required=True, help="of the run; gs:// where machines are many")
    flags.add_argument("--dry_run", action="store_true", help="print what would run, and end")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def name(text: str) -> str:
    """Return a name as Cloud and Kubernetes take it."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(
            f"'{text}': small letters, digits and dashes, a letter first, at most 40"
        )
    return text


def option(text: str) -> str:
    """Return a value that Slurm takes on an #SBATCH line, which it splits at spaces, quotes and number signs."""
    if not re.fullmatch(r"[^\s'\"\\#]*", text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: no spaces, quotes, backslashes or number signs"
        )
    return text


def train_words(given: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    return ["-m", "mmjax", "train", f"--config={given.config}", f"--workdir={given.workdir}", *rest]


def worker_command(given: argparse.Namespace, rest: Sequence[str], python: str) -> str:
    """Return what each machine runs, for a shell: JAX finds the others, unless MMJAX_COORDINATOR names the address."""
    words = " ".join(shlex.quote(word) for word in train_words(given, rest))
    where = 'export MMJAX_COORDINATOR="${MMJAX_COORDINATOR:-auto}"'
    return f"{where} && exec {shlex.quote(python)} {words}"


def need_bucket(given: argparse.Namespace) -> None:
    if "://" not in given.workdir:
        raise JobError(
            f"--workdir={given.workdir}: every machine must see it. Give a bucket, such as gs://BUCKET/RUN."
        )


# --- a pod on this machine ---------------------------------------------------------------------


def local_pod(argv: Sequence[str]) -> int:
    """Run several processes over loopback, each with its own devices."""
    flags = Parser(prog="local_pod.sh", description="A pod of processes on this machine.")
    shared(flags)
    flags.add_argument("--processes", type=positive, default=2, help="how many")
    flags.add_argument("--devices", type=positive, default=1, help="CPU devices of each")
    given, rest = parse(flags, argv)
    words = [sys.executable, *train_words(given, rest)]
    if given.dry_run:
        for index in range(given.processes):
            variables = member(given, index, "127.0.0.1:PORT")
            shown = " ".join(f"{k}={shlex.quote(v)}" for k, v in variables.items())
            print(f"{shown} {shlex.join(words)}")
        return 0
    where = f"127.0.0.1:{free_port()}"
    return Pod([{**os.environ, **member(given, i, where)} for i in range(given.processes)]).run(
        words
    )


def member(given: argparse.Namespace, index: int, where: str) -> dict[str, str]:
    """Return the environment variables that make a process one of the pod."""
    before = os.environ.get("XLA_FLAGS", "")
    devices = f"--xla_force_host_platform_device_count={given.devices}"
    alone = given.processes == 1
    together = {
        "MMJAX_COORDINATOR": where,
        "MMJAX_PROCESSES": str(given.processes),
        "MMJAX_PROCESS": str(index),
    }
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{before} {devices}".strip(),
        **({} if alone else together),
    }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Pod:
    """The processes of a job on this machine: started, signalled and ended together."""

    def __init__(self, environments: Sequence[dict[str, str]]):
        self._environments = environments
        self._started: list[subprocess.Popen[str]] = []
        self._lifeline = os.pipe()  # closed by the system when this process ends, however it ends

    def run(self, words: Sequence[str]) -> int:
        """Wait until all have ended: return 0, or how the first that failed ended."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._tell)
        for index, environment in enumerate(self._environments):
            self._start(index, environment, words)
        try:
            return self._wait()
        finally:
            for each in self._started:
                each.kill()

    def _start(self, index: int, environment: dict[str, str], words: Sequence[str]) -> None:
        # Process 0 prints for all; what the others print to standard error is marked as theirs.
        pipe = None if index == 0 else subprocess.PIPE
        # A signal of the terminal reaches this process only, which passes it on once.
        each = subprocess.Popen(
            words, cwd=ROOT, env={**environment, LIFELINE: str(self._lifeline[0])}, stderr=pipe, text=True,
            start_new_session=True, pass_fds=[self._lifeline[0]], preexec_fn=end_with(os.getpid()),
        )  # fmt: skip
        self._started.append(each)
        if each.stderr is not None:
            threading.Thread(target=marked, args=(index, each.stderr), daemon=True).start()

    def _tell(self, number: int, _: Any) -> None:
        for each in self._started:
            if each.poll() is None:
                each.send_signal(number)

    def _wait(self) -> int:
        while True:
            ended = {i: each.poll() for i, each in enumerate(self._started)}
            if any(status not in (None, 0, STOPPED) for status in ended.values()):
                return self._end(*self._culprit())
            if None not in ended.values():
                return max(status or 0 for status in ended.values())
            time.sleep(POLL)

    def _culprit(self) -> tuple[int, int]:
        """Return which failed first, and how: one killed takes the others with it, which may end before it.

        One that has aborted is no such: JAX ends a process like that when another is gone.
        """
        limit, failed = time.monotonic() + SETTLE, dict[int, int]()
        while True:
            ended = {i: each.poll() for i, each in enumerate(self._started)}
            now = {i: status for i, status in ended.items() if status and status != STOPPED}
            # In the order in which they were seen to end; of those seen together, aborted ones come last.
            new = [i for i in now if i not in failed]
            failed |= {i: now[i] for i in sorted(new, key=lambda i: now[i] == -signal.SIGABRT)}
            killed = {i: s for i, s in failed.items() if s < 0 and s != -signal.SIGABRT}
            if killed or None not in ended.values() or time.monotonic() > limit:
                return next(iter((killed or failed).items()))
            time.sleep(POLL)

    def _end(self, index: int, status: int) -> int:
        """Stop the others, which cannot continue without the one that failed."""
        print(
            f"pod: process {index} {how(status)}; ending the others.", file=sys.stderr, flush=True
        )
        limit = time.monotonic() + GRACE
        while time.monotonic() < limit and any(each.poll() is None for each in self._started):
            time.sleep(POLL)
        for each in self._started:
            each.kill()
            each.wait()
        if status != 2:  # 2: an error that its line explains
            print(
                "pod: run the same command again to resume from the newest checkpoint.",
                file=sys.stderr,
            )
        return status if status > 0 else 128 - status


def end_with(launcher: int) -> Callable[[], None] | None:
    """Return a function that a member calls first, after which Linux kills it with its launcher; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)

    def prepare() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it was killed before
            os._exit(128 + signal.SIGKILL)

    return prepare


def how(status: int) -> str:
    """Return how a process ended, in words."""
    return (
        f"was ended by {signal.Signals(-status).name}"
        if status < 0
        else f"ended with status {status}"
    )


def marked(index: int, lines: IO[str]) -> None:
    """Copy standard error of a process, each line with its number before it."""
    for line in lines:
        print(f"[{index}] {line}", end="", file=sys.stderr, flush=True)


# --- a Cloud TPU slice -------------------------------------------------------------------------


def tpu(argv: Sequence[str]) -> int:
    """Request a queued resource, and run the job on all its workers; again after each preemption."""
    flags = Parser(prog="tpu.sh", description="A job on a Cloud TPU slice.")
    shared(flags)
    flags.add_argument("--name", type=name, required=True, help="of the slice")
    flags.add_argument("--zone", required=True)
    flags.add_argument("--accelerator", required=True, help="its type, such as v5litepod-16")
    flags.add_argument("--runtime", required=True, help="its software, such as v2-alpha-tpuv5-lite")
    flags.add_argument("--project", default="", help="gcloud's own if empty")
    flags.add_argument("--spot", action="store_true", help="may be taken away at any time")
    flags.add_argument(
        "--restarts", type=positive, default=100, help="preemptions and hangs that it survives"
    )
    flags.add_argument("--poll", type=positive, default=30, help="seconds between two looks")
    given, rest = parse(flags, argv)
    need_bucket(given)
    return Slice(given, rest).run()


class Slice:
    """A slice by its name, and the job on it."""

    def __init__(self, given: argparse.Namespace, rest: Sequence[str]):
        self._given, self._rest = given, rest
        self._call = dry if given.dry_run else call

    def run(self) -> int:
        for _ in range(self._given.restarts + 1):
            self._acquire()
            status = self._work()
            if status in (0, STOPPED) or self._given.dry_run:
                return status
            if self._state() != "ACTIVE":
                print(f"tpu: the slice was taken away (status {status}); asking for another.", flush=True)  # fmt: skip
            elif status in PASSING:
                print(f"tpu: the run {how(status)}; starting it again.", flush=True)
            else:
                return status
        raise JobError(
            f"the run was started {self._given.restarts + 1} times and has not come to its end; the last "
            f"status was {status}. Run again to resume."
        )

    def _gcloud(self, *words: str) -> list[str]:
        project = [f"--project={self._given.project}"] if self._given.project else []
        return ["gcloud", "compute", "tpus", *words, f"--zone={self._given.zone}", *project]

    def _state(self) -> str:
        """Return ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED and so on; nothing where there is no such slice."""
        words = self._gcloud(
            "queued-resources", "describe", self._given.name, "--format=value(state.state)"
        )
        if self._given.dry_run:
            dry(words)
            return ""
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode and "NOT_FOUND" not in done.stderr:
            raise JobError(f"gcloud could not look for '{self._given.name}': {done.stderr.strip()}")
        return done.stdout.strip()

    def _acquire(self) -> None:
        """Ensure that there is the slice, asking for it where it is not there."""
        given, state = self._given, self._state()
        if state in ("SUSPENDED", "SUSPENDING", "FAILED"):
            must(
                self._call(
                    self._gcloud("queued-resources", "delete", given.name, "--force", "--quiet")
                )
            )
            state = ""
        if not state:
            spot = ["--spot"] if given.spot else []
            made = self._gcloud(
                "queued-resources", "create", given.name, f"--node-id={given.name}",
                f"--accelerator-type={given.accelerator}", f"--runtime-version={given.runtime}", *spot,
            )  # fmt: skip
            must(self._call(made))
        while not given.dry_run and (state := self._state()) != "ACTIVE":
            if state == "FAILED":
                raise JobError(
                    f"the slice '{given.name}' could not be created; see gcloud's message."
                )
            time.sleep(given.poll)

    def _work(self) -> int:
        """Copy the checkout to all workers, and run the job on them."""
        given, archive = self._given, ROOT / ".mmjax-job.tar.gz"
        pack = ["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={archive}", "HEAD"]
        copy = self._gcloud(
            "tpu-vm", "scp", str(archive), f"{given.name}:mmjax.tar.gz", "--worker=all"
        )
        ssh = self._gcloud(
            "tpu-vm", "ssh", given.name, "--worker=all", f"--command={self._worker()}"
        )
        try:
            must(self._call(pack))
            return self._call(copy) or self._call(ssh)
        finally:
            archive.unlink(missing_ok=True)

    def _worker(self) -> str:
        parts = [
            "mkdir -p mmjax && tar -xzf mmjax.tar.gz -C mmjax && cd mmjax",
            "{ [ -x .venv/bin/python ] || python3 -m venv .venv; }",
            ".venv/bin/python -m pip install -q -e '.[tpu]'",
            worker_command(self._given, self._rest, ".venv/bin/python"),
        ]
        return " && ".join(parts)


# --- GKE ---------------------------------------------------------------------------------------


def gke(argv: Sequence[str]) -> int:
    """Start a JobSet: a job for each slice, a pod for each of its hosts."""
    flags = Parser(prog="gke.sh", description="A job on TPU slices of a GKE cluster.")
    shared(flags)
    flags.add_argument("--name", type=name, required=True, help="of the job")
    flags.add_argument(
        "--image", required=True, help="with the checkout in it, and mmjax[tpu] installed"
    )
    flags.add_argument("--topology", required=True, help="of a slice, such as v5e:4x4")
    flags.add_argument("--slices", type=positive, default=1)
    flags.add_argument("--restarts", type=positive, default=100, help="failures that it survives")
    flags.add_argument("--namespace", default="default")
    given, rest = parse(flags, argv)
    need_bucket(given)
    manifest = json.dumps(jobset(given, rest), indent=2)
    where = f"--namespace={given.namespace}"
    # A JobSet cannot be changed: one that has ended, or runs an older command, makes room.
    remove = ["kubectl", "delete", "jobset", given.name, "--ignore-not-found", where]
    apply = ["kubectl", "apply", "-f", "-", where]
    if given.dry_run:
        dry(remove)
        dry(apply)
        print(manifest)
        return 0
    must(call(remove))
    return call(apply, manifest)


def for_kubernetes(text: str) -> str:
    """Escape `text` for a container's command, where Kubernetes expands `$(NAME)` and turns `$$` into `$`."""
    return text.replace("$", "$$")


def jobset(given: argparse.Namespace, rest: Sequence[str]) -> dict[str, Any]:
    """Return the manifest (jobset.x-k8s.io/v1alpha2)."""
    generation, _, grid = given.topology.partition(":")
    if generation not in TPU_HOSTS or not re.fullmatch(r"\d+x\d+(x\d+)?", grid):
        kinds = ", ".join(TPU_HOSTS)
        raise JobError(
            f"--topology={given.topology}: give GENERATION:GRID, such as v5e:4x4 ({kinds})."
        )
    chips = 1
    for side in grid.split("x"):
        chips *= int(side)
    of_host = min(TPU_HOSTS[generation], chips)
    hosts = chips // of_host
    container = {
        "name": "train",
        "image": given.image,
        "command": ["bash", "-c", for_kubernetes(worker_command(given, rest, "python"))],
        "resources": {"limits": {"google.com/tpu": of_host}},
    }
    pod = {
        "restartPolicy": "Never",
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": GKE_ACCELERATORS[generation],
            "cloud.google.com/gke-tpu-topology": grid,
        },
        "terminationGracePeriodSeconds": 120,
        "containers": [container],
    }
    job = {"parallelism": hosts, "completions": hosts, "backoffLimit": 0, "template": {"spec": pod}}
    slices = {"name": "slice", "replicas": given.slices, "template": {"spec": job}}
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": given.name, "annotations": exclusive},
        "spec": {
            "failurePolicy": {"maxRestarts": given.restarts},
            "replicatedJobs": [slices],
        },
    }


# --- Slurm -------------------------------------------------------------------------------------


def slurm(argv: Sequence[str]) -> int:
    """Start a batch job: a process for each GPU, queued again when it is preempted or runs out of time."""
    flags = Parser(prog="slurm.sh", description="A job on GPU nodes of a Slurm cluster.")
    shared(flags)
    flags.add_argument("--name", type=name, required=True, help="of the job")
    flags.add_argument("--nodes", type=positive, default=1)
    flags.add_argument("--gpus", type=positive, default=8, help="of each node")
    flags.add_argument("--cpus", type=positive, default=8, help="of each process")
    flags.add_argument("--time", type=option, default="1-00:00:00", help="limit, in Slurm's form")
    flags.add_argument("--partition", type=option, default="")
    flags.add_argument("--account", type=option, default="")
    flags.add_argument(
        "--restarts", type=positive, default=100, help="preemptions and hangs that it survives"
    )
    flags.add_argument(
        "--python", default=".venv/bin/python", help="with mmjax installed, on every node"
    )
    given, rest = parse(flags, argv)
    script = batch_script(given, rest)
    if given.dry_run:
        dry(["sbatch"])
        print(script)
        return 0
    return call(["sbatch"], script)


def batch_script(given: argparse.Namespace, rest: Sequence[str]) -> str:
    """Return the script for `sbatch`."""
    options = {
        "job-name": given.name,
        "nodes": given.nodes,
        "ntasks-per-node": given.gpus,
        "gpus-per-node": given.gpus,
        "cpus-per-task": given.cpus,
        "time": given.time,
        "partition": given.partition,
        "account": given.account,
        "signal": "TERM@180",  # to the steps: they save, and end with status 3
        "output": f"{given.name}-%j.log",
        "open-mode": "append",
    }
    again = " | ".join([f"{STOPPED}:*", *(f"{status}:1" for status in PASSING)])
    lines = ["#!/usr/bin/env bash"]
    lines += [f"#SBATCH --{key}={value}" for key, value in options.items() if value != ""]
    lines += [
        "#SBATCH --requeue",
        f"cd {shlex.quote(str(ROOT))} || exit 2",
        f"srun --kill-on-bad-exit=1 bash -c {shlex.quote(worker_command(given, rest, given.python))}",
        "status=$?",
        # The status is the highest of all tasks: of those that end because another did, the signal's.
        f'case "$status:$((${{SLURM_RESTART_COUNT:-0}} < {given.restarts}))" in',  # 1 below the limit
        f'  {again}) scontrol requeue "$SLURM_JOB_ID" ;;',
        "esac",
        'exit "$status"',
    ]
    return "\n".join(lines) + "\n"


# --- running -----------------------------------------------------------------------------------


def call(words: Sequence[str], given: str | None = None) -> int:
    """Run a tool; its exit status."""
    try:
        return subprocess.run(words, input=given, text=True).returncode
    except FileNotFoundError as error:
        raise JobError(f"'{words[0]}' is not installed, or not on PATH.") from error


def dry(words: Sequence[str], given: str | None = None) -> int:
    """Print what would be run."""
    print(shlex.join(words))
    return 0


def must(status: int) -> None:
    if status:
        raise JobError(f"what it called failed with status {status}; the reason stands above.")


KINDS: dict[str, Callable[[Sequence[str]], int]] = {
    "local_pod": local_pod,
    "tpu": tpu,
    "gke": gke,
    "slurm": slurm,
}


def main(argv: Sequence[str]) -> int:
    try:
        return KINDS[argv[0]](argv[1:])
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
