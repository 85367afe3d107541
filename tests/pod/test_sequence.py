"""Long streams over the `sequence` axis: what a device holds during a step falls with the devices that share it."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from mmjax.core.sharding import MeshConfig, make_mesh
from mmjax.engine.requests import train_requests
from mmjax.experiment import Experiment, make_experiment

TOKENS = 1024


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    """Return a clip of 32 frames and 65 thousand samples of sound, each 1,024 tokens, one at a time."""
    inputs = {
        "video": {"frames": 32, "size": 64},
        "waveform": {"samples": TOKENS * 64},
    }
    # All logits at once: what a chunk holds does not grow with the stream anyway.
    layer = {"name": "transformer", "num_heads": 2, "mlp_dim": 64, "attention_impl": "plain"}
    return make_experiment(
        {
            "steps": 1,
            "modalities": {
                "video": {
                    "name": "video",
                    "tube": 2,
                    "patch": 8,
                    "max_time_positions": 16,
                    "max_positions": 8,
                },
                "waveform": {"name": "waveform", "patch": 64, "max_positions": TOKENS},
            },
            "model": {"width": 32, "layers": [{"repeat": 2, "blocks": [layer]}]},
            "tasks": {
                name: {
                    "source": {"name": "array_record", "path": "none"},
                    "inputs": {name: block},
                    "objective": {"name": "classification", "classes": 4, "modalities": [name]},
                    "batch": 1,
                }
                for name, block in inputs.items()
            },
        }
    )


def temporaries(experiment: Experiment, task: str, parts: int, **settings: Any) -> int:
    """Return bytes of one device for a step's temporaries, where `parts` devices share each stream."""
    config = MeshConfig(data=1, sequence=parts, **settings)
    mesh = make_mesh(config, jax.devices()[:parts])
    request = train_requests(experiment, mesh)[task]
    with jax.set_mesh(mesh):
        jitted = jax.jit(request.function, out_shardings=request.out_shardings)
        analysis = jitted.lower(*request.arguments).compile().memory_analysis()
    size: int = analysis.temp_size_in_bytes
    return size


@pytest.mark.parametrize(("task", "counts"), [("video", (1, 8)), ("waveform", (1, 2, 8))])
def test_memory_falls_with_the_devices_that_share_a_stream(
    experiment: Experiment, task: str, counts: tuple[int, ...]
) -> None:
    sizes = {parts: temporaries(experiment, task, parts) for parts in counts}
    print(f"temporary bytes of a device, {task} of {TOKENS} tokens: {sizes}")
    assert all(sizes[parts] < sizes[1] / (0.6 * parts) for parts in counts if parts > 1)
    logits = 2 * TOKENS**2 * 4  # of the heads, in float32
    assert sizes[1] > 4 * logits > 3 * sizes[8], "attention is the bulk of it"


def test_without_the_rule_it_does_not(experiment: Experiment) -> None:
    """The control: eight devices that hold the same."""
    whole = temporaries(experiment, "waveform", 8, rules={"tokens": ()})
    assert whole > 0.9 * temporaries(experiment, "waveform", 1)
