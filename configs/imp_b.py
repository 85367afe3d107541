"""IMP-B (Akbari et al. 2023): one encoder of 86 million for pictures, videos, sounds and texts, six tasks in turn.

    python -m mmjax.train --config=configs/imp_b.py --workdir=runs/imp_b

Sizes, losses, batches, intervals and rates are those of the released configuration. `imp_s.py` and `imp_l.py` are its
other sizes; `imp_moe_s.py`, `imp_moe_b.py` and `imp_moe_l.py` have experts in the last six layers. With the argument
`mixed` (`imp_b.py:mixed`) videos come in three shapes of 256 tokens each: as released, twice as long, and larger.

What differs: tasks are keyed by name (in the released loop two loaders share a counter, and one of them never runs); a
picture is one frame, repeated on the device; a stem is one linear map (theirs: three, two of them in a row without
anything between); the released code takes steps without a rate first
(2,000; here the warm-up has them); videos are classified by one label of 700, sounds by one of 309.

The data are not among those that can be built here (the released names are placeholders). Give ArrayRecord files
`train*.array_record*` and `test*.array_record*` in the folders `~/data/NAME`, or set each task's source, whose records
are `tf.train.Example` messages:

- `image_text` (such as ALIGN): `image`, an encoded picture; `caption`, one or several texts; `concept`, an integer
  that says which examples of the test belong together, such as their number.
- `images` (ImageNet-21k): `image`; `label`, an integer below 21,843.
- `videos` (Kinetics-700): `video`, the JPEG frames of a clip; `label`, below 700.
- `video_text` (such as HowTo100M, AudioSet): `video`; `audio`, the bytes of a WAV file; `caption`; `concept`.
- `sounds` (such as VGGSound): `audio`; `label`, below 309.

Hardware: 256 chips of TPU v5e or 128 of v5p, by the plans in `plans/`. Results: none, it has not been trained here; see
`imp_small.py`, the same recipe with smaller numbers.
"""

from typing import Any

from ml_collections import ConfigDict

from mmjax.errors import UserError, nearest

SIZES = {"s": (384, 1536, 12, 6), "b": (768, 3072, 12, 12), "l": (1024, 4096, 24, 16)}
EXPERT_LAYERS = 6
BUCKETS = {  # of 1,024, 2,048 and 1,600 tokens, 256 are kept
    "released": {"inputs": {"vision": {"frames": 16, "size": 256, "drop": 0.75}}, "share": 2},
    "long": {"inputs": {"vision": {"frames": 32, "size": 256, "drop": 0.875}}},
    "large": {"inputs": {"vision": {"frames": 16, "size": 320, "drop": 0.84}}},
}
SETTINGS = ("released", "mixed")


def data(name: str, split: str = "train") -> dict[str, Any]:
    return {"name": "array_record", "path": f"~/data/{name}", "glob": f"{split}*.array_record*"}


def layers(repeat: int, heads: int, hidden: int, experts: int = 0) -> list[dict[str, Any]]:
    """The trunk; with experts, those of the last layers, and queries and keys are normalised."""
    block: dict[str, Any] = {"name": "transformer", "heads": heads, "hidden": hidden}
    if not experts:
        return [{"repeat": repeat, "pattern": [block]}]
    block["qk_norm"] = True
    # No group of tokens spans two of 256 devices (IMP's code makes as many groups as there are).
    routed = {
        "count": experts, "router": {"name": "expert_choice", "capacity": 1.0}, "group": 2048, "groups": 256,
    }  # fmt: skip
    sparse = min(EXPERT_LAYERS, repeat // 2)
    return [
        {"repeat": repeat - sparse, "pattern": [block]},
        {"repeat": sparse, "pattern": [{**block, "experts": routed}]},
    ]


def compared(*modalities: str, initial: float) -> dict[str, Any]:
    """All pairs of modalities, each in spaces of its own; several clips or sentences are a bag (MIL-NCE)."""
    return {
        "name": "cross_modal", "between": list(modalities), "space": "disjoint", "joint": 1024,
        "initial": initial, "head": "joint",
    }  # fmt: skip


def classified(modality: str, classes: int) -> dict[str, Any]:
    return {"name": "classification", "modalities": [modality], "classes": classes}


def tasks(initial: float) -> dict[str, Any]:
    """The six tasks; under the rule `interval`, a share is the passes from one visit to the next."""
    image = {"field": "image", "frames": 1, "size": 256, "crop": 0.7, "flip": True}
    video = {"frames": 16, "stride": 2, "size": 256, "crop": 0.7, "flip": True, "drop": 0.75}
    sound, text = {"frames": 128}, {"field": "caption", "length": 16}
    retrieval, accuracy = {"name": "retrieval"}, {"name": "accuracy"}

    def task(
        folder: str, inputs: dict[str, Any], objective: dict[str, Any], interval: int, batch: int, **more: Any
    ) -> dict[str, Any]:  # fmt: skip
        return {
            "source": data(folder), "inputs": inputs, "objective": objective, "share": interval, "batch": batch,
            "evaluators": {"test": {**more, "source": data(folder, "test")}},
        }  # fmt: skip

    pair = {"between": ["vision", "text"]}
    return {
        "image_text": task(
            "image_text", {"vision": image, "text": text}, compared("vision", "text", initial=initial),
            1, 8192, **retrieval,
        ),
        "images": task("images", {"vision": image}, classified("vision", 21_843), 1, 8192, **accuracy),
        "video_text": task(
            "video_text", {"vision": video, "text": text}, compared("vision", "text", initial=initial),
            12, 8192, **retrieval,
        ),
        "videos": task("videos", {"vision": video}, classified("vision", 700), 5, 2048, **accuracy),
        "video_audio_text": task(
            "video_text", {"vision": video, "spectrogram": sound, "text": text},
            compared("vision", "spectrogram", "text", initial=initial), 12, 8192, **retrieval, **pair,
        ),
        "sounds": task("sounds", {"spectrogram": sound}, classified("spectrogram", 309), 8, 2048, **accuracy),
    }  # fmt: skip


def recipe(size: str, experts: int = 0, setting: str = "released") -> ConfigDict:
    """The config of a size, dense or with so many experts in a layer."""
    if setting not in SETTINGS:
        raise UserError(f"There is no setting '{setting}'.{nearest(setting, SETTINGS)}")
    width, hidden, repeat, heads = SIZES[size]
    config = ConfigDict(sort_keys=False)
    config.steps = {"s": 200_000, "b": 500_000, "l": 500_000}[size]
    config.seed = 0
    config.modalities = {
        "vision": {"name": "video", "tube": 4, "patch": 16, "time_buckets": 64, "buckets": 512},
        "spectrogram": {
            "name": "spectrogram", "patch_frames": 16, "patch_mels": 16, "mels": 128, "rate": 16_000,
            "window": 2048, "hop": 1024, "low": 80.0, "high": 7600.0, "buckets": 8,
        },
        # No tokenizer: give T5's, of 32,000 pieces and 100 sentinels.
        "text": {"name": "text", "tokenizer": "", "vocabulary": 32_100, "buckets": 4096},
    }  # fmt: skip
    config.model = {
        "width": width, "groups": layers(repeat, heads, hidden, experts), "remat": "full",
    }  # fmt: skip
    config.tasks = tasks(1.0 if experts else 0.2)
    if setting == "mixed":
        for name in ("video_text", "videos", "video_audio_text"):
            config.tasks[name].buckets = BUCKETS
    config.schedule = {"rule": "interval"}
    config.optimizer = {
        "name": "adamw", "learning_rate": {"s": 8e-4, "b": 1e-3, "l": 5e-4}[size],
        "warmup": {"s": 12_000, "b": 27_000, "l": 55_000}[size], "final": 1e-3, "b1": 0.9, "b2": 0.999,
        "eps": 1e-7, "weight_decay": 1e-4, "clip": 1.0,
    }  # fmt: skip
    config.dtype = {"compute": "bfloat16"}
    config.mesh = {"data": 1, "fsdp": -1}
    if experts:
        config.mesh = {"data": 1, "fsdp": -1, "expert": experts}
    config.checkpoint = {"every": 5_000, "keep": 2}
    config.evaluation = {"every": 0, "batch": 2048}
    return config


def get_config(setting: str = "released") -> ConfigDict:
    """The config; `setting` is `released` or `mixed`."""
    return recipe("b", setting=setting)
