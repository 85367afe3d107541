"""CoCa on drawings and their English names: the recipe of `coca_2b.py` with smaller numbers.

python -m mmjax.datasets.build emoji
python -m mmjax.train --config=configs/coca_small.py --workdir=runs/coca_small

Hardware: a CPU with 2 cores: 1,200 steps of 11.5 GFLOP, 5 to 9 minutes in all, measured beside other work. Results (one
seed, of an earlier version with a cosine decay and without biases, tables of positions and the poolers' norms): picture
to text, recall at 10 of 69 % on drawings never seen (chance 4 %) and 35 % on concepts never seen (chance 3.5 %);
captions of drawings never seen, 1.50 nats per token (5.1 knowing nothing), token F1 of 15 % (0.5 %), 4 % word for word;
of concepts never seen, whose names it never met, 6.5 nats (5.1) and F1 of 16 % (1.7 %).
"""

from pathlib import Path

from ml_collections import ConfigDict

from mmjax.core.config import load_module

coca = load_module(Path(__file__).with_name("coca_2b.py"))


def get_config() -> ConfigDict:
    encoder, decoder = coca.model(128, 4, 4, 512, 2, 512)
    config = coca.get_config()
    config.steps = 1200
    config.modalities.image.update({"patch": 8, "buckets": 4})
    config.modalities.text.update(
        {"tokenizer": "emoji/1.0.0/tokenizer.model", "vocabulary": 2048, "buckets": 12}
    )
    config.model.update({**encoder, "remat": "none"})
    task = config.tasks.captions
    task.batch = 64
    task.inputs.image.size = 32
    task.inputs.text.length = 12
    task.objective.update({**decoder, "queries": 16, "joint": 96, "remat": "none"})
    config.optimizer.update({"learning_rate": 2e-3, "warmup": 50, "weight_decay": 0.1})
    config.dtype.compute = "float32"
    config.checkpoint.every = 400
    config.evaluation.batch = 256
    return config
