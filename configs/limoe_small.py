"""LIMoE on drawings and their English names: the recipe of `limoe_b16.py` with smaller numbers.

python -m mmjax.datasets.build emoji
python -m mmjax.train --config=configs/limoe_small.py --workdir=runs/limoe_small

Settings as there: `limoe_small.py:entropies` (the default), `:classic`, `:none`, `:dense`. Eight experts in each of two
layers, of which pictures are to use five and texts three.

Hardware: a CPU with 2 cores: 300 steps of 9 GFLOP in 1 to 2 minutes, measured beside other work. Results of 300 steps
by Muon (three seeds, `benchmarks/results/imp.md`; of an earlier version, without biases and tables of positions and
with a local entropy loss of pictures): picture to text, recall at 10 of 51.9 % on drawings never seen (chance 4.1 %;
`:dense` 49.2 %) and 28.5 % on concepts never seen (3.5 %; 28.6 %); texts use 3 to 4 of the eight experts, pictures 7
(`:classic`: 6 to 7, and 8).
"""

from pathlib import Path

from ml_collections import ConfigDict

from mmjax.core.config import load_module

limoe = load_module(Path(__file__).with_name("limoe_b16.py"))


def get_config(setting: str = "entropies") -> ConfigDict:
    """The config; `setting` is `entropies`, `classic`, `none` or `dense`."""
    config: ConfigDict = limoe.recipe("b16", setting)
    config.steps = 600
    config.modalities.image.update({"patch": 8, "buckets": 4})
    config.modalities.text.update(
        {"tokenizer": "emoji/1.0.0/tokenizer.model", "vocabulary": 2048, "buckets": 12}
    )
    groups = limoe.layers(setting, 4, 4, 4, 512)
    for experts in (b["experts"] for g in groups for b in g["pattern"] if "experts" in b):
        experts.update({"count": 8, "group": 512, "groups": 1})
        if setting == "entropies":
            experts["threshold"] = {"text": 1.0986, "image": 1.6094}  # log 3 and log 5
    config.model.update({"width": 128, "groups": groups, "remat": "none"})
    task = config.tasks.image_text
    task.batch = 64
    task.inputs.image.size = 32
    task.inputs.text.length = 12
    task.objective.update({"joint": 96, "chunk": 0})
    config.optimizer.update({"learning_rate": 2e-3, "warmup": 50})
    config.dtype.compute = "float32"
    config.mesh = {"data": -1}
    config.checkpoint.every = 200
    config.evaluation.batch = 256
    return config
