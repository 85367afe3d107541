"""IMP-B (Akbari et al. 2023): one encoder of 86 million for images, videos, sounds and texts, six tasks in turn.

    python -m mmjax.train --config=configs/imp_b.py --workdir=runs/imp_b

Sizes, inputs, losses, batches, intervals and rates are those of the released configuration (google-research, `imp`);
`tests/test_published.py` holds each with its file. `imp_s.py` and `imp_l.py` are other sizes; `imp_moe_s.py`,
`imp_moe_b.py` and `imp_moe_l.py` have experts in the last six layers. With the argument `mixed` (`imp_b.py:mixed`)
videos come in three shapes of 256 tokens each: as released, of twice the frames, and of 320 pixels.

What differs from the release:

- Tasks are keyed by name. In the released loop two loaders share a counter, and one of them never runs.
- A stem is one linear map. The release has three: two before the encoder, with nothing between, and one after it.
- The warm-up starts from 0 and includes the release's pre-warm-up, in which the rate falls from 2e-5 to 5e-6 in 2,000
  steps (large: from 1e-5 to 1e-6 in 5,000; small: none).
- The model computes in bfloat16, the release in float32: `--config.dtype.compute=float32`.
- Images have one label of 21,843 and sounds one of 309. The release names placeholders, of 1,000 classes with several
  labels to an image, and of 50.
- Every text ends with an end token, and padding never competes for experts.
- Experts: at least 256 groups of tokens compete, so that none spans two of 256 devices.
- Colours are not augmented. A crop holds at least half of the area, as released.
- Missing: the experiments `.img` and `.txt`; the sizes M and XL to 11B, IMPeGe and SoftMoE-IMP; several labels of an
  example; zero-shot classification with prompts, linear probes, and the mean over 4 clips in evaluation.

The data are not among those that can be built here. Give ArrayRecord files `train*.array_record*` and
`test*.array_record*` in the folders `~/data/NAME`, or set `tasks.*.source` and `tasks.*.evaluators.*.source`. The
records are `tf.train.Example` messages:

- `image_text` (such as ALIGN): `image`, an encoded picture; `caption`, one or several texts, of which up to five are
  compared; `concept`, an integer that says which examples of the test belong together, such as their number.
- `images` (ImageNet-21k): `image`; `label`, an integer below 21,843.
- `videos` (Kinetics-700): `video`, the JPEG frames of a clip; `label`, below 700.
- `video_text` (such as HowTo100M, AudioSet): `video`; `audio`, the bytes of a WAV file; `caption`; `concept`.
- `sounds` (such as VGGSound): `audio`; `label`, below 309.

Set `modalities.text.tokenizer` to T5's SentencePiece model, whose 32,100 pieces are the released vocabulary.

Hardware: 256 chips of TPU v5e or 128 of v5p, by the plans in `plans/`. Results: none, it has not been trained here; see
`imp_small.py`, the same recipe with smaller numbers.
"""

from typing import Any

from ml_collections import ConfigDict

from mmjax.core.errors import UserError, nearest

SIZES = {"s": (384, 1536, 12, 6), "b": (768, 3072, 12, 12), "l": (1024, 4096, 24, 16)}
EXPERT_LAYERS = 6
# Embeddings by axis, at the size that their norm gives them.
POSITIONS = {"positions": "learned", "positions_scale": 1.0}
# Peak rate, its part at the end, steps of warm-up (the release's pre-warm-up among them) and in all.
RATES = {
    "s": (8e-4, 0.0, 10_000, 200_000),
    "b": (1e-3, 1e-3, 27_000, 500_000),
    "l": (5e-4, 2e-3, 55_000, 500_000),
}


def shapes(frames: int, drop: float, long: float, large: float) -> dict[str, Any]:
    """Buckets of as many tokens: videos as released, of twice the frames, and of 320 pixels."""
    views = {
        "released": {"frames": frames, "size": 256, "drop": drop},
        "long": {"frames": 2 * frames, "size": 256, "drop": long},
        "large": {"frames": frames, "size": 320, "drop": large},
    }
    buckets: dict[str, Any] = {name: {"inputs": {"vision": view}} for name, view in views.items()}
    buckets["released"]["share"] = 2
    return buckets


BUCKETS = {
    "videos": shapes(4, 0.0, 0.5, 0.36),  # of 256, 512 and 400 tokens, 256 are kept
    "video_text": shapes(16, 0.75, 0.875, 0.84),  # of 1,024, 2,048 and 1,600
    "video_audio_text": shapes(16, 0.75, 0.875, 0.84),
}
SETTINGS = ("released", "mixed")


def data(name: str, split: str = "train") -> dict[str, Any]:
    return {"name": "array_record", "path": f"~/data/{name}", "glob": f"{split}*.array_record*"}


def layers(repeat: int, heads: int, hidden: int, experts: int = 0) -> list[dict[str, Any]]:
    """Return the trunk; with experts, those of the last layers, and queries and keys are normalised."""
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
    """Return the loss of all pairs of modalities; several clips or sentences are a bag (MIL-NCE)."""
    return {
        "name": "cross_modal", "between": list(modalities), "space": "disjoint", "joint": 1024,
        "initial": initial, "head": "joint",
    }  # fmt: skip


def classified(modality: str, classes: int) -> dict[str, Any]:
    return {
        "name": "classification", "modalities": [modality], "classes": classes, "label": "label", "init": "lecun",
    }  # fmt: skip


def tasks(initial: float) -> dict[str, Any]:
    """The six tasks; under the rule `interval`, a share is the passes from one visit to the next."""
    image = {"field": "image", "frames": 1, "size": 256, "crop": 0.5, "flip": True}
    clip = {"frames": 4, "stride": 2, "size": 256, "crop": 0.5, "flip": True}
    # Captions may read what is written in the picture: it is not mirrored.
    video = {**clip, "frames": 16, "flip": False, "drop": 0.75}
    sound, text = {"frames": 128}, {"field": "caption", "length": 16}
    texts = {**text, "instances": 5}
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
            "image_text", {"vision": image, "text": texts}, compared("vision", "text", initial=initial),
            1, 8192, **retrieval,
        ),
        "images": task("images", {"vision": image}, classified("vision", 21_843), 1, 8192, **accuracy),
        "video_text": task(
            "video_text", {"vision": video, "text": text}, compared("vision", "text", initial=initial),
            12, 8192, **retrieval,
        ),
        "videos": task("videos", {"vision": clip}, classified("vision", 700), 5, 2048, **accuracy),
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
    peak, final, warmup, steps = RATES[size]
    config = ConfigDict(sort_keys=False)
    config.steps = steps
    config.seed = 0
    config.modalities = {
        "vision": {"name": "video", "tube": 4, "patch": 16, "time_buckets": 16, "buckets": 32, **POSITIONS},
        "spectrogram": {
            "name": "spectrogram", "patch_frames": 16, "patch_mels": 16, "mels": 128, "rate": 16_000,
            "window": 2048, "hop": 1024, "low": 80.0, "high": 7600.0, "buckets": 64, **POSITIONS,
        },
        # No tokenizer: give T5's, of 32,000 pieces and 100 sentinels.
        "text": {
            "name": "text", "tokenizer": "", "vocabulary": 32_100, "buckets": 4096, **POSITIONS,
        },
    }  # fmt: skip
    config.model = {
        "width": width, "groups": layers(repeat, heads, hidden, experts), "remat": "full",
    }  # fmt: skip
    config.tasks = tasks(1.0 if experts else 0.2)
    if setting == "mixed":
        for name, buckets in BUCKETS.items():
            config.tasks[name].buckets = buckets
    config.schedule = {"rule": "interval"}
    config.optimizer = {
        "name": "adamw", "learning_rate": peak, "warmup": warmup, "decay": "cosine", "final": final,
        "b1": 0.9, "b2": 0.999, "eps": 1e-7, "weight_decay": 1e-4, "clip": 1.0,
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
