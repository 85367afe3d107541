"""Kills runs again and again, and counts how many kills they survived bit for bit.

    python tests/pod/soak.py --kills=300 --seed=0 [--configs=toy,experts,buffers] [--folder=DIR] [--out=FILE]

Runs of small configs (`smallruns`) take turns. Each is killed (SIGKILL) a few times at moments drawn over init,
compile, restore, step, save, evaluation and the writing behind them, is then left to finish, and is compared with a
run that nothing disturbed: arrays, clock and config of its last checkpoint, metrics and results. A quarter of the
runs also lose the task that diverges and one whose steps are not finite. Exit status 1 if any differs. With --out
the counts go to a table in Markdown, by config and by the activity that a kill interrupted.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "extra"), str(HERE.parent)]

import smallruns  # noqa: E402
import toyrun  # noqa: E402
from harness import ASYNC_SAVE, DELAYS, Aim, Harness, Kill, deterministic  # noqa: E402

ACTIVITIES = ("init", "compile", "restore", "step", "save", "eval", ASYNC_SAVE)
PER_RUN = 5  # kills
PLAIN: tuple[str, ...] = ("--config.steps=40",)
# Task two diverges, task bad is never finite: the run rolls back and leaves both out.
UNWELL = (
    "--config.tasks.two.objective.climbs=true",
    "--config.limits.divergence=1.5",
    "--config.limits.divergence_visits=3",
    "--config.limits.max_non_finite_steps=2",
    "--config.optimizer.learning_rate=0.03",
    "--config.steps=20",
    "--config.tasks.bad={'source': {'name': 'toy'}, 'inputs': {'toy': {}}, 'batch': 8, 'objective': "
    f"{{'name': 'toy', 'bad_loss': {tuple(range(40))}}}}}",
)


@dataclass
class Tally:
    """The outcomes of the kills so far."""

    hits: Counter[str] = field(default_factory=Counter)
    survived: int = 0
    lost: int = 0
    runs: int = 0
    differ: int = 0

    def add(self, kills: Sequence[Kill], is_same: bool) -> None:
        self.runs += 1
        self.differ += not is_same
        self.survived += len(kills) if is_same else 0
        self.lost += 0 if is_same else len(kills)
        self.hits.update(hit for kill in kills for hit in kill.hits)

    @property
    def kills(self) -> int:
        return self.survived + self.lost

    def __str__(self) -> str:
        where = ", ".join(f"{activity} {self.hits[activity]}" for activity in ACTIVITIES)
        return f"{self.survived} of {self.kills} kills survived bit for bit, in {self.runs} runs ({where})"


def together(tallies: Iterable[Tally]) -> Tally:
    """Return the sum of some tallies."""
    total = Tally()
    for each in tallies:
        total.hits.update(each.hits)
        total.survived, total.lost = total.survived + each.survived, total.lost + each.lost
        total.runs, total.differ = total.runs + each.runs, total.differ + each.differ
    return total


def markdown(tallies: Mapping[str, Tally], command: str) -> str:
    """Return a page with a row for each config."""
    rows = [
        f"| {name} | {t.runs} | {t.kills} | {' | '.join(str(t.hits[p]) for p in ACTIVITIES)} | {t.differ} |"
        for name, t in {**tallies, "all": together(tallies.values())}.items()
    ]
    return "\n".join(
        [
            "# soak",
            "",
            "Runs that were killed at random and left to finish, against runs that nothing disturbed. A kill in a",
            "step may also interrupt a save in the background, and is counted in both activities.",
            "",
            f"- Command: `{command}`",
            "",
            f"| config | runs | kills | {' | '.join(ACTIVITIES)} | runs that differ |",
            "| --- | --- | --- |" + " --- |" * (len(ACTIVITIES) + 1),
            *rows,
            "",
        ]
    )


def harness(workdir: Path, words: Sequence[str]) -> Harness:
    extra, config = HERE.parent / "extra", HERE.parent / "configs" / "toy.py"
    root = HERE.parent.parent
    flags = "--xla_force_host_platform_device_count=1"
    environment = {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(root),
    }
    command = [sys.executable, "-m", "mmjax", "train", f"--extra={extra}", f"--config={config}"]
    return Harness([*command, f"--workdir={workdir}", *words], environment, workdir)


def outcome(workdir: Path) -> tuple[str, object, bytes]:
    """Return all that must not differ."""
    results = (workdir / "results.json").read_bytes()
    return toyrun.bits(workdir), deterministic(workdir), results


def one(workdir: Path, words: Sequence[str], count: int, rng: random.Random) -> list[Kill]:
    """Return a run that is killed up to `count` times and then finishes."""
    run, kills = harness(workdir, words), []
    for _ in range(count):
        activity = rng.choice(ACTIVITIES)
        if activity == "restore" and not kills:
            activity = "compile"  # a first start has nothing to restore
        delay = DELAYS[activity] * rng.choice((0.0, 0.1, 0.5))  # the toy's activities are short
        try:
            kills.append(run.kill(Aim(activity, rng.randint(1, 2), delay), rng))
        except AssertionError:
            break  # it came to its end before such an activity
    run.finish()
    return kills


def soak(
    folder: Path, kills: int, seed: int, names: Sequence[str] = tuple(smallruns.RUNS)
) -> dict[str, Tally]:
    """Run each config in turn, until so many kills have been dealt in all."""
    toyrun.block()
    rng, tallies = random.Random(seed), {name: Tally() for name in names}
    expected: dict[tuple[str, ...], object] = {}
    while (dealt := together(tallies.values())).kills < kills:
        name = names[dealt.runs % len(names)]
        small = [f"--config.{word}" for word in smallruns.RUNS[name]]
        words = (*small, *(UNWELL if rng.random() < 0.25 else PLAIN))
        if words not in expected:
            straight = folder / f"straight{len(expected)}"
            toyrun.run(straight, *[word.removeprefix("--config.") for word in words])
            expected[words] = outcome(straight)
        workdir = folder / f"run{dealt.runs}"
        mine = one(workdir, words, min(PER_RUN, kills - dealt.kills), rng)
        is_same = outcome(workdir) == expected[words]
        tallies[name].add(mine, is_same)
        same = "the same" if is_same else "DIFFERENT"
        print(f"{workdir}, {name}: {same}. {together(tallies.values())}", flush=True)
    return tallies


def main() -> int:
    made = argparse.ArgumentParser(description="Kill runs again and again.")
    made.add_argument("--kills", type=int, default=300)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--configs", default=",".join(smallruns.RUNS), help="names, with commas")
    made.add_argument(
        "--folder", default="", help="where the runs lie; a new temporary folder if empty"
    )
    made.add_argument("--out", default="", help="a file for the table, in Markdown")
    given = made.parse_args()
    names = given.configs.split(",")
    unknown = set(names) - smallruns.RUNS.keys()
    if unknown:
        made.error(f"--configs: no run {sorted(unknown)}; there are {', '.join(smallruns.RUNS)}")
    folder = Path(given.folder or tempfile.mkdtemp(prefix="soak"))
    tallies = soak(folder, given.kills, given.seed, names)
    if given.out:
        command = " ".join(["python", "tests/pod/soak.py", *sys.argv[1:]])
        Path(given.out).write_text(markdown(tallies, command))
    total = together(tallies.values())
    print(total)
    return 0 if total.differ == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
