"""IMP (Akbari et al. 2023): one encoder for images, videos, sounds and texts, trained on six tasks in turn.

    mmjax train --config=imp:b --workdir=runs/imp-b

    mmjax build emoji speech notes
    mmjax train --config=imp:small --workdir=runs/imp-small

Settings, each also with `-mixed`, in which videos come in three shapes of as many tokens each (for the published sizes
256: as released, of twice the frames, and of 320 pixels):

| setting | model |
| --- | --- |
| `s`, `b`, `l` | 21, 86 and 300 million parameters |
| `moe-s`, `moe-b`, `moe-l` | the same with 4, 16 and 16 experts in each of the last six layers |
| `small` | width 128, four layers, on drawings, clips of them, spoken names and notes |
| `moe-small` | `small` with four experts in each of the last two layers |
| `small-apart` | `small` with an encoder for each modality (not with `-mixed`) |

Sizes, inputs, losses, batches, intervals and rates are those of the released configuration (google-research, `imp`);
`tests/test_published.py` compares each with its file. The release has no dense large experiment: `l` has the sizes of
its large model, and the rate and the tasks of its sparse one. `s` has the tasks of the base model; the release has
small experiments for texts and for images alone (`imp_small.txt`, `imp_small.img`). Experts choose tokens (capacity 1,
groups of at most 2,048 tokens, softmax over experts, no auxiliary loss).

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
  compared; `concept`, an integer that is equal for examples of the test that belong together, such as their number.
- `images` (ImageNet-21k): `image`; `label`, an integer below 21,843.
- `videos` (Kinetics-700): `video`, the JPEG frames of a clip; `label`, below 700.
- `video_text` (such as HowTo100M, AudioSet): `video`; `audio`, the bytes of a WAV file; `caption`; `concept`.
- `sounds` (such as VGGSound): `audio`; `label`, below 309.

Set `modalities.text.tokenizer` to T5's SentencePiece model, whose 32,100 pieces are the released vocabulary.

`small` differs in sizes and data, and in this: clips are drawings that move, and the third modality of a clip is its
name, spoken. Examples of one concept are positives of each other, as names repeat here, and nothing is mirrored.
Positions begin at 0.05 of IMP's size: as large as the content, they keep contrastive learning still for its first
hundreds of steps.

Hardware: 256 chips of TPU v5e or 128 of v5p, by the plans in `plans/`; results: none, the published sizes have not been
trained here. `small`: a CPU with 2 cores, 360 steps of 6.3 GFLOP in 1 to 3 minutes, measured beside other work. Results
of 360 steps by Muon (three seeds; `benchmarks/results/imp.md` has those of the other settings; of an earlier version,
which classified clips of four frames with half of their tokens dropped), on drawings never seen: picture to text,
recall at 10 of 25.6 % (chance 4.1 %); clip to text 12.7 %; 99 classes of pictures 23.0 % (chance 1 %); 128 instruments,
pitches never heard, 7.4 % (0.8 %); the direction of a clip, of eight, 16.7 %.
"""

from dataclasses import dataclass
from typing import Any, Literal

from ml_collections import ConfigDict

from mmjax.blocks.transformer import PARTS


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model of IMP and its videos.

    Attributes:
      moe: whether the last layers have experts.
      size: size of the model; `small` has data of its own.
      form: the released one, videos in three shapes, or an encoder for each modality.
    """

    moe: bool = False
    size: Literal["s", "b", "l", "small"]
    form: Literal["released", "mixed", "apart"] = "released"

    def __post_init__(self) -> None:
        if self.form == "apart" and (self.moe or self.size != "small"):
            raise ValueError("The encoders of `apart` are those of `small`, without experts.")


# Width, hidden, layers, heads.
SIZES = {
    "s": (384, 1536, 12, 6),
    "b": (768, 3072, 12, 12),
    "l": (1024, 4096, 24, 16),
    "small": (128, 512, 4, 4),
}
EXPERTS = {"s": 4, "b": 16, "l": 16, "small": 4}
EXPERT_LAYERS = 6
# Embeddings by axis, at the size that their norm gives them.
POSITIONS = {"positions": "learned", "positions_scale": 1.0}
# Peak rate, its part at the end, steps of warm-up (the release's pre-warm-up among them) and in all.
RATES = {
    "s": (8e-4, 0.0, 10_000, 200_000),
    "b": (1e-3, 1e-3, 27_000, 500_000),
    "l": (5e-4, 2e-3, 55_000, 500_000),
    "small": (2e-3, 1e-3, 50, 900),
}


def shapes(
    frames: int, drop: float, long: float, large: float, sizes: tuple[int, int] = (256, 320), **more: int
) -> dict[str, Any]:  # fmt: skip
    """Return shapes of as many tokens: videos as released, of twice the frames (with `more`), and of larger ones."""
    size, larger = sizes
    views: dict[str, Any] = {
        "released": {"frames": frames, "size": size, "token_drop": drop},
        "long": {"frames": 2 * frames, **more, "size": size, "token_drop": long},
        "large": {"frames": frames, "size": larger, "token_drop": large},
    }
    shapes: dict[str, Any] = {name: {"inputs": {"vision": view}} for name, view in views.items()}
    shapes["released"]["weight"] = 2
    return shapes


SHAPES = {
    "videos": shapes(4, 0.0, 0.5, 0.36),  # of 256, 512 and 400 tokens, 256 are kept
    "video_text": shapes(16, 0.75, 0.875, 0.84),  # of 1,024, 2,048 and 1,600
    "video_audio_text": shapes(16, 0.75, 0.875, 0.84),
}


def data(name: str, split: str = "train") -> dict[str, Any]:
    return {"name": "array_record", "path": f"~/data/{name}", "glob": f"{split}*.array_record*"}


def layers(repeat: int, heads: int, hidden: int, experts: int = 0) -> list[dict[str, Any]]:
    """Return the trunk; with experts, those of the last layers, and queries and keys are normalised."""
    block: dict[str, Any] = {"name": "transformer", "num_heads": heads, "mlp_dim": hidden}
    if not experts:
        return [{"repeat": repeat, "blocks": [block]}]
    block["qk_norm"] = True
    # No group of tokens spans two of 256 devices (IMP's code makes as many groups as there are).
    routed = {
        "count": experts, "router": {"name": "expert_choice", "capacity": 1.0}, "group_size": 2048, "min_groups": 256,
    }  # fmt: skip
    sparse = min(EXPERT_LAYERS, repeat // 2)
    return [
        {"repeat": repeat - sparse, "blocks": [block]},
        {"repeat": sparse, "blocks": [{**block, "experts": routed}]},
    ]


def compared(*modalities: str, initial: float) -> dict[str, Any]:
    """Return the loss of all pairs of modalities; several clips or sentences are a bag (MIL-NCE)."""
    return {
        "name": "cross_modal", "modalities": list(modalities), "space": "disjoint", "embed_dim": 1024,
        "init_temperature": initial, "head": "joint",
    }  # fmt: skip


def classified(modality: str, classes: int) -> dict[str, Any]:
    return {
        "name": "classification", "modalities": [modality], "classes": classes, "label": "label", "init": "lecun",
    }  # fmt: skip


def tasks(initial: float) -> dict[str, Any]:
    """Return the six tasks; `interval` is the passes from one visit to the next."""
    image = {"field": "image", "frames": 1, "size": 256, "crop": 0.5, "flip": True}
    clip = {"frames": 4, "stride": 2, "size": 256, "crop": 0.5, "flip": True}
    # Captions may read what is written in the picture: it is not mirrored.
    video = {**clip, "frames": 16, "flip": False, "token_drop": 0.75}
    sound, text = {"frames": 128}, {"field": "caption", "length": 16}
    texts = {**text, "instances": 5}
    retrieval, accuracy = {"name": "retrieval"}, {"name": "accuracy"}

    def task(
        folder: str, inputs: dict[str, Any], objective: dict[str, Any], interval: int, batch: int, **more: Any
    ) -> dict[str, Any]:  # fmt: skip
        return {
            "source": data(folder), "inputs": inputs, "objective": objective, "interval": interval, "batch": batch,
            "evaluators": {"test": {**more, "source": data(folder, "test")}},
        }  # fmt: skip

    pair = {"modalities": ["vision", "text"]}
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


def get_config(setting: Setting) -> ConfigDict:
    """Return the config of a setting."""
    width, hidden, repeat, heads = SIZES[setting.size]
    peak, final, warmup, steps = RATES[setting.size]
    experts = EXPERTS[setting.size] if setting.moe else 0
    config = ConfigDict(sort_keys=False)
    config.steps = steps
    config.seed = 0
    config.modalities = {
        "vision": {"name": "video", "tube": 4, "patch": 16, "max_time_positions": 16, "max_positions": 32, **POSITIONS},
        "spectrogram": {
            "name": "spectrogram", "patch_frames": 16, "patch_mels": 16, "mels": 128, "sample_rate": 16_000,
            "window": 2048, "hop": 1024, "low": 80.0, "high": 7600.0, "max_positions": 64, **POSITIONS,
        },
        # No tokenizer: give T5's, of 32,000 pieces and 100 sentinels.
        "text": {
            "name": "text", "tokenizer": "", "vocabulary": 32_100, "max_positions": 4096, **POSITIONS,
        },
    }  # fmt: skip
    config.model = {
        "width": width, "layers": layers(repeat, heads, hidden, experts), "remat": "full",
    }  # fmt: skip
    config.tasks = tasks(1.0 if experts else 0.2)
    if setting.form == "mixed":
        for name, shapes in SHAPES.items():
            config.tasks[name].shapes = shapes
    config.schedule = {"rule": "interval"}
    config.optimizer = {
        "algorithm": {"name": "adamw", "b1": 0.9, "b2": 0.999, "eps": 1e-7},
        "learning_rate": peak, "warmup": warmup, "decay": "cosine", "end_lr_ratio": final,
        "weight_decay": 1e-4, "clip": 1.0,
    }  # fmt: skip
    config.dtype = {"compute": "bfloat16"}
    config.mesh = {"data": 1, "fsdp": -1}
    if experts:
        config.mesh = {"data": 1, "fsdp": -1, "expert": experts}
    config.checkpoint = {"every": 5_000, "keep": 2}
    config.evaluation = {"every": 0, "batch": 2048}
    if setting.size == "small":
        make_small(config)
    if setting.form == "apart":
        keep_apart(config)
    return config


# --- small -------------------------------------------------------------------------------------


def small_shapes(frames: int, drop: float, long: float, large: float) -> dict[str, Any]:
    """Return shapes of 16 tokens each."""
    return shapes(frames, drop, long, large, (32, 48), stride=1)


SMALL_SHAPES = {
    "videos": small_shapes(2, 0.0, 0.5, 0.556),  # of 16, 32 and 36 tokens
    "video_text": small_shapes(4, 0.5, 0.75, 0.778),  # of 32, 64 and 72
    "video_audio_text": small_shapes(4, 0.5, 0.75, 0.778),
}


def built(dataset: str, split: str) -> dict[str, Any]:
    return {"name": "tfds", "dataset": dataset, "split": split}


def clips(split: str) -> dict[str, Any]:
    return {
        "name": "moving_emoji", "split": split, "actors": 1, "frames": 8, "size": 48, "clips": 4,
    }  # fmt: skip


def spoken(split: str, voices: str) -> dict[str, Any]:
    """Return clips with the names of what they show, spoken."""
    right = built("speech", voices)
    return {"name": "joined", "left": clips(split), "right": right, "by": "concept", "take": ["audio"]}  # fmt: skip


SOURCES = {
    "image_text": (built("emoji", "train"), built("emoji", "test_drawing")),
    "images": (built("emoji", "train"), built("emoji", "test_drawing")),
    "video_text": (clips("train"), clips("test_drawing")),
    "videos": (clips("train"), clips("test_drawing")),
    "video_audio_text": (spoken("train", "train"), spoken("test_drawing", "test_voice")),
    "sounds": (built("notes", "train"), built("notes", "test_pitch")),
}
CLASSES = {"images": ("subgroup", 99), "videos": ("direction", 8), "sounds": ("program", 128)}
NUMBERS = {  # batch, interval
    "image_text": (64, 1), "images": (64, 2), "video_text": (32, 2), "videos": (32, 4), "video_audio_text": (32, 2),
    "sounds": (64, 4),
}  # fmt: skip


def on_emoji(name: str, task: ConfigDict) -> None:
    """Set the data of a task, and the sizes that go with them."""
    task.batch, task.interval = NUMBERS[name]
    task.source, test = SOURCES[name]
    task.evaluators.test.source = test
    if "vision" in task.inputs:
        frames = {1: 1, 4: 2, 16: 4}[task.inputs.vision.frames]
        task.inputs.vision.update({"frames": frames, "size": 32, "flip": False})
        if "token_drop" in task.inputs.vision:
            task.inputs.vision.token_drop = 0.5
    if "spectrogram" in task.inputs:
        task.inputs.spectrogram.update({"frames": 40 if name == "sounds" else 64, "gain_db": 6.0})
    if "text" in task.inputs:
        task.inputs.text.length = 12
        if "instances" in task.inputs.text:
            task.inputs.text.instances = 0  # a drawing has one name
        task.objective.update({"embed_dim": 96, "positive_key": "concept", "init_temperature": 0.1})
    if name in CLASSES:
        task.objective.label, task.objective.classes = CLASSES[name]


def keep_apart(config: ConfigDict) -> None:
    """Give each modality a copy of all of the trunk, of the same size."""
    names = list(config.modalities)
    config.model.per_modality = {"parts": ["norm"], "modalities": names}
    for block in (b for group in config.model.layers for b in group["blocks"]):
        block |= {
            "per_modality": {"parts": [p for p in PARTS if p != "qk_norm"], "modalities": names}
        }


def make_small(config: ConfigDict) -> None:
    """Set the data of `small`, and the sizes that go with them."""
    config.modalities.vision.update(
        {"tube": 2, "patch": 8, "max_time_positions": 4, "max_positions": 12}
    )
    config.modalities.spectrogram.update(
        {
            "patch_frames": 4, "patch_mels": 64, "mels": 64, "sample_rate": 11_025, "window": 512, "hop": 256,
            "low": 60.0, "high": 5500.0, "max_positions": 16,
        }
    )  # fmt: skip
    config.modalities.text.update(
        {"tokenizer": "emoji/1.0.0/tokenizer.model", "vocabulary": 2048, "max_positions": 128}
    )
    for modality in config.modalities.values():
        # As large as the content, positions keep contrastive learning from its first hundreds of steps.
        modality.positions_scale = 0.05
    for routed in (
        b["experts"] for g in config.model.layers for b in g["blocks"] if "experts" in b
    ):
        routed["min_groups"] = 1
    config.model.remat = "none"
    for name, task in config.tasks.items():
        on_emoji(name, task)
        if "shapes" in task:
            task.shapes = SMALL_SHAPES[name]
    config.dtype.compute = "float32"
    config.mesh = {"data": -1}
    config.checkpoint.every = 300
    config.evaluation.batch = 256
