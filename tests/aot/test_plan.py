"""`mmjax plan`: real compiles for chips that are not here, and what may go wrong with them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mains import Ended, run

from mmjax.core import config as configs
from mmjax.experiment import make_experiment
from mmjax.plan.__main__ import main, program_names

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "configs" / "tiny.py"
TOY = ROOT / "tests" / "configs" / "toy.py"
EXTRA = f"--extra={ROOT / 'tests' / 'extra'}"
PLANS = sorted((ROOT / "configs" / "plans").glob("*.json"))
Plan = Callable[..., Ended]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def plan(cache: Path) -> Iterator[Plan]:
    """Yield the main in fast mode, in this process, with these tests' cache; what compiles is a process as ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        yield lambda *words: run(main, "--fast", *words)


@pytest.fixture(scope="module")
def plan_apart(command: Any, cache: Path) -> Plan:
    """Return what `plan` does, with the main in a process of its own."""

    def run(*words: str) -> Ended:
        done = command("plan", "--fast", *words, env={"XDG_CACHE_HOME": str(cache)})
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


def toy(plan: Plan, tmp_path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """Exit status and plan of the toy config."""
    file = tmp_path / "plan.json"
    done = plan(f"--config={TOY}", EXTRA, f"--json={file}", *words)
    assert done.status in (0, 1), done.err
    return done.status, json.loads(file.read_text())


TINY_WORDS = (f"--config={TINY}", "--topology=v5e:2x2", "--config.mesh.fsdp=2")


@pytest.fixture(scope="module")
def tiny(plan_apart: Plan, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Return what the plan of the tiny config printed, and its JSON."""
    file = tmp_path_factory.mktemp("tiny") / "plan.json"
    done = plan_apart(*TINY_WORDS, f"--json={file}")
    assert done.status == 0, done.err
    return done.out, json.loads(file.read_text())


def test_everything_fits_and_is_said(tiny: tuple[str, dict[str, Any]]) -> None:
    said, found = tiny
    assert "Everything fits." in said and "ESTIMATE" in said and "197 TFLOP/s" in said
    assert max(map(len, said.split("Assumed")[0].splitlines())) <= 80
    assert found["version"] == 1 and found["fits"] and found["topology"]["devices"] == 4
    assert [p["name"] for p in found["programs"] if p["kind"] == "train"] == ["image_text", "masked_image"]  # fmt: skip
    assert {p["kind"] for p in found["programs"]} == {"train", "embed/image", "embed/text", "loss"}


def test_compiled_flops_are_the_models(tiny: tuple[str, dict[str, Any]]) -> None:
    """Loops followed, nothing is done twice: to the last operation."""
    for each in tiny[1]["programs"]:
        assert each["flops"]["compiled"] == each["flops"]["model"] > 0
        assert "rest" not in each["flops"] and not each["unknown"]


def test_bytes_are_those_of_the_state_and_what_the_compiler_adds(
    tiny: tuple[str, dict[str, Any]],
) -> None:
    """Arguments are the state and the batch by hand, each array padded to at most 4 KiB."""
    state = tiny[1]["state_bytes"]
    for each in (p for p in tiny[1]["programs"] if p["kind"] == "train"):
        found = each["bytes"]
        assert state <= found["arguments"] <= state + found["beside"] + 4096 * 300
        parts = sum(found[k] for k in ("arguments", "temporaries", "beside", "code"))
        assert found["needed"] == parts and found["temporaries"] > 0


def test_collectives_lie_along_the_axes_of_the_mesh(tiny: tuple[str, dict[str, Any]]) -> None:
    for each in (p for p in tiny[1]["programs"] if p["kind"] == "train"):
        kinds = {(c["wire"], c["kind"], c["axes"]) for c in each["collectives"]}
        # Parameters lie along fsdp; gradients are summed along data as well.
        assert {("ici", "all-gather", "fsdp"), ("ici", "all-reduce", "data")} <= kinds


def test_a_second_plan_reads_the_cache(plan: Plan, tiny: Any, tmp_path: Path) -> None:
    file = tmp_path / "again.json"
    assert plan(*TINY_WORDS, "--task=image_text", f"--json={file}").status == 0
    first, again = tiny[1]["programs"], json.loads(file.read_text())["programs"]
    assert [p["cached"] for p in first] == [False] * 5 and [p["cached"] for p in again] == [
        True
    ] * 3
    for each in again:
        before = next(p for p in first if p["name"] == each["name"])
        assert each["flops"] == before["flops"] and each["collectives"] == before["collectives"]


def test_what_does_not_fit_is_named_and_the_status_says_so(plan: Plan) -> None:
    """A similarity matrix of 160,000 by 160,000 texts: 26 GB of each of four devices, and more for its gradient."""
    done = plan(*TINY_WORDS, "--task=image_text", "--config.tasks.image_text.batch=160000")
    assert done.status == 1, done.err
    said = done.out.split("DOES NOT FIT: ")[1]
    assert said.startswith("image_text needs ") and "over the 15.8 GiB of a device" in said
    assert "would help: --config.model.remat=full" in said
    assert done.out.count("DOES NOT FIT") == 1  # its evaluation does


BATCHES = ("tasks.one", "tasks.two", "evaluation")
LARGE = tuple(f"--config.{batch}.batch=4096" for batch in BATCHES)


@pytest.mark.parametrize(
    ("topology", "more", "devices"),
    [
        ("v4:2x2x2", ("--task=one",), 8),
        ("v5p:16x16x16", ("--task=two", *LARGE), 4096),
        ("v6e:2x4", ("--task=one",), 8),
        ("tpu7x:2x2x1", ("--task=one",), 8),
        ("v5e:2x2", ("--task=one", "--slices=2"), 8),
    ],
)  # fmt: skip
def test_every_kind_of_tpu(
    plan: Plan, tmp_path: Path, topology: str, more: tuple[str, ...], devices: int
) -> None:
    status, found = toy(plan, tmp_path, f"--topology={topology}", *more)
    assert status == 0 and found["topology"]["devices"] == devices
    train = found["programs"][0]
    assert train["flops"]["model"] > 0
    wires = {c["wire"] for c in train["collectives"] if c["axes"] == "data"}
    assert wires == ({"ici", "dcn"} if "--slices=2" in more else {"ici"})


FAULTY = '--config.tasks.one.objective={"name": "faulty", "fault": "%s"}'


def test_a_crash_costs_its_own_programs_only(plan_apart: Plan, tmp_path: Path) -> None:
    status, found = toy(plan_apart, tmp_path, "--topology=v5e:2x2", FAULTY % "crash")
    assert status == 1
    statuses = {p["name"]: p["status"] for p in found["programs"]}
    assert statuses == {
        "one": "crashed", "two": "compiled", "one/loss": "crashed", "two/loss": "compiled",
    }  # fmt: skip
    assert "SIGSEGV" in found["programs"][0]["message"]


def test_what_takes_too_long_is_given_up(plan_apart: Plan, tmp_path: Path) -> None:
    words = ("--topology=v5e:2x2", "--task=one", "--seconds=1", FAULTY % "hang")
    status, found = toy(plan_apart, tmp_path, *words)
    assert status == 1 and found["hours"] is None
    assert {p["status"] for p in found["programs"]} == {"time_limit"}
    assert found["programs"][0]["message"] == "not compiled after 1 seconds"


def test_advice_is_the_fastest_that_fits(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "advice.json"
    words = ("--advise", "--task=one", "--topology=v5e:2x2", f"--json={file}")
    done = plan(f"--config={TOY}", EXTRA, *words)
    assert done.status == 0, done.err
    found = json.loads(file.read_text())
    tried = found["tried"]
    assert [(t["remat"], t["microbatches"]) for t in tried] == [
        ("none", 1),
        ("dots", 1),
        ("full", 1),
    ]
    (chosen,) = (t for t in tried if t["chosen"])
    assert chosen["seconds"] <= 1.05 * min(t["seconds"] for t in tried)
    changed = chosen["remat"] != "none"
    assert found["overrides"] == ([f"model.remat={chosen['remat']}"] if changed else [])
    assert all(f"--config.{o}" in done.out for o in found["overrides"])


def test_a_mesh_that_does_not_go_with_the_batch_is_one_line(plan: Plan) -> None:
    done = plan(f"--config={TOY}", EXTRA, "--topology=v5e:4x4")
    assert done.status == 2 and done.err.count("\n") == 1
    assert "batch 8 does not divide over the 16 parts" in done.err


def test_no_compiler_is_loaded_beside_the_main(tmp_path: Path) -> None:
    """One that crashes must not take the main with it."""
    words = ["--topology=v5e:2x2", EXTRA, f"--config={TOY}", "--config.mesh.data=3", "--task=one"]
    ended = run(main, *words)  # its worker has loaded one when it reports what is wrong
    assert "does not make up the 4 devices" in ended.err
    assert "libtpu.so" not in Path("/proc/self/maps").read_text()


# --- plans of shipped configs ------------------------------------------------------------------


# Plans that were made before their recipes were given the published values, and are to be made again.
OUTDATED = {
    *(f"{size}@{pod}" for size in ("imp-s", "imp-b", "imp-l", "imp-moe-s", "imp-moe-b", "imp-moe-l", "moma-1b")
      for pod in ("v5e-16x16", "v5p-4x4x8")),
    "mixture_of_mamba-1b@v5p-4x4x4", "mot-7b@v5p-4x8x8", "transfusion-7b@v5p-4x8x8",
}  # fmt: skip


def test_a_committed_plan_is_of_the_config_as_it_is() -> None:
    """Its programs, their model FLOPs and the length of the run; nothing is compiled."""
    pods = ("v5e-16x16", "v5p-4x4x8")
    sizes = ("imp-s", "imp-b", "imp-l", "imp-moe-s", "imp-moe-b", "imp-moe-l")
    sizes += ("limoe-b16", "limoe-l16", "limoe-h14", "moma-1b")
    assert {p.stem for p in PLANS} == {f"{size}@{pod}" for size in sizes for pod in pods} | {
        "coca-2b@v5p-8x16x16", "mbt-b@v5e-4x4", "mixture_of_mamba-1b@v5p-4x4x4", "mot-7b@v5p-4x8x8",
        "quickstart@v5e-2x2", "quickstart@v5e-4x4", "transfusion-7b@v5p-4x8x8", "zorro-b@v5e-4x4",
    }  # fmt: skip
    outdated, flops = set(), dict[str, Any]()
    for path in PLANS:
        then = json.loads(path.read_text())
        block = configs.override(configs.read_file(str(ROOT / then["config"])), then["overrides"])
        experiment = make_experiment(block)
        assert [p["name"] for p in then["programs"]] == program_names(experiment)
        assert then["steps"] == experiment.run.steps and then["fits"]
        told = {p["name"]: p["flops"]["model"] for p in then["programs"] if p["kind"] == "train"}
        key = json.dumps({**block, "mesh": {}})  # they are those of the config on any mesh
        flops[key] = flops.get(key) or experiment.flops
        if told != flops[key]:
            outdated.add(path.stem)
    assert outdated == OUTDATED


# The bytes that a program needs move with the compiler's effort: by so much of the committed plan's.
TOLERANCE = 0.25
SELECTED = {"quickstart": "image_classes"}


@pytest.mark.parametrize(
    "path", [p for p in PLANS if p.stem.split("@")[0] in SELECTED], ids=lambda path: path.stem
)
def test_a_committed_plan_is_still_true(plan: Plan, path: Path, tmp_path: Path) -> None:
    """One task compiled again, with less effort: the same verdict, FLOPs and collectives."""
    then = json.loads(path.read_text())
    assert then["version"] == 1 and then["compiler"]["effort"] == "default" and then["fits"]
    task = SELECTED[path.stem.split("@")[0]]
    where, file = then["topology"], tmp_path / "plan.json"
    overrides = [f"--config.{o}" for o in then["overrides"]]
    words = (f"--topology={where['name']}", f"--slices={where['slices']}", f"--task={task}")
    done = plan(f"--config={ROOT / then['config']}", *words, *overrides, f"--json={file}")
    assert done.status == 0, done.err
    now = json.loads(file.read_text())
    for each in now["programs"]:
        before = next(p for p in then["programs"] if p["name"] == each["name"])
        _agree(each, before)
    assert now["mesh"] == then["mesh"] and now["state_bytes"] == then["state_bytes"]


def _agree(now: dict[str, Any], then: dict[str, Any]) -> None:
    assert (now["fits"], now["flops"]["model"]) == (then["fits"], then["flops"]["model"])
    assert now["flops"]["ratio"] == pytest.approx(then["flops"]["ratio"], abs=0.01)
    kinds = [{(c["wire"], c["kind"], c["axes"]) for c in p["collectives"]} for p in (now, then)]
    assert kinds[0] == kinds[1]
    sizes = [p["bytes"]["needed"] - p["bytes"]["code"] for p in (now, then)]
    assert sizes[0] == pytest.approx(sizes[1], rel=TOLERANCE)
