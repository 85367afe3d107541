"""The quickstart's model and tasks, for longer.

    python -m mmjax.datasets.build quickstart
    python -m mmjax.train --config=configs/quickstart_30min.py --workdir=runs/quickstart_30min

With `--config=configs/quickstart_30min.py:noto` it is evaluated on one more vendor's drawings, which need
`pip install 'mmjax[noto]'` and `python -m mmjax.datasets.build emoji_noto`.

Hardware: a CPU with 2 cores: 5,000 steps, 21 to 26 minutes beside other work. Results (three seeds): recall at 10 of
74 % on drawings never seen (chance 4 %), 46 % on another vendor's (chance 0.6 %) and 37 % on concepts never seen
(chance 3.5 %); groups 55 % (majority 21 %); speech in voices never heard, recall at 1 of 44 % (chance 0.06 %); 128
instruments at pitches never heard 99 %.
"""

from pathlib import Path

from ml_collections import ConfigDict

from mmjax.core.config import load_module

quickstart = load_module(Path(__file__).with_name("quickstart.py"))


def get_config(vendor: str = "") -> ConfigDict:
    """The config; `vendor` is empty or `noto`."""
    config = quickstart.get_config()
    config.steps = 5000
    config.checkpoint.every = 500
    if vendor:
        for split in ("test_vendor", "test_vendor_concept"):
            source = quickstart.data(f"emoji_{vendor}", split)
            config.tasks.image_text.evaluators[split] = {"name": "retrieval", "source": source}
    return config
