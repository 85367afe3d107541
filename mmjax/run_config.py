"""The whole config of a run: every block with its keys, types and defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mmjax.core.bounds import COUNT, SIZE, check
from mmjax.core.config import FREE, SCHEDULE, holds
from mmjax.core.low_rank import LowRankConfig
from mmjax.core.sharding import MeshConfig
from mmjax.engine.checkpoint import CheckpointConfig
from mmjax.engine.compile import LimitsConfig
from mmjax.engine.loader import LoaderConfig
from mmjax.engine.profiling import ProfileConfig
from mmjax.engine.warm_start import Sources, WarmStartConfig
from mmjax.model import ModelConfig
from mmjax.optim.config import OptimizerConfig
from mmjax.schedule.config import ScheduleConfig
from mmjax.task import TaskConfig


@dataclass(frozen=True)
class DtypeConfig:
    """Precision.

    Attributes:
      parameters: of the parameters. Second moments, averages and sums of gradients are float32 or wider whatever it
        is, and an update is computed in float32; but a bfloat16 parameter loses steps below 1/512 of its value.
      compute: of the model's arithmetic.
    """

    parameters: str = "float32"
    compute: str = "float32"


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation during training.

    Attributes:
      every: steps between evaluations; 0 for only after the last step.
      batch: examples per evaluation step, over all devices.
    """

    every: int = 0
    batch: int = 128

    def __post_init__(self) -> None:
        check(self, every=SIZE, batch=COUNT)


@dataclass(frozen=True)
class LogConfig:
    """The logs of a run.

    Attributes:
      flush_every: steps after which the lines of `metrics.jsonl` are sure to be on the disk.
      report: write `report.html` at the end.
      wandb: project of Weights & Biases that gets the numbers too; empty for none.
    """

    flush_every: int = 20
    report: bool = True
    wandb: str = ""

    def __post_init__(self) -> None:
        check(self, flush_every=COUNT)


@dataclass(frozen=True)
class RunConfig:
    """A whole config; every key is checked against this and against what the blocks name.

    What a change of a key means for a run that exists is metadata of its field (see `mmjax.core.config.key_class`).

    Attributes:
      steps: length of the run.
      modalities: what the tasks read, by a name of your choice: `{name: ..., ...}` each.
      tasks: what is trained, by a name of your choice.
      seed: of parameters, order, augmentation and masks.
      lora: low-rank deltas of matrices; all else is then frozen unless `optimizer.rules` state otherwise.
      init_from: parameters of another run or a file, to begin with; or a list of such, each with its own part.
    """

    steps: int = field(metadata=FREE)
    modalities: dict[str, dict[str, Any]] = field(metadata=holds("modalities"))
    model: ModelConfig
    tasks: dict[str, dict[str, Any]] = field(metadata=holds(TaskConfig))
    seed: int = 0
    dtype: DtypeConfig = field(default_factory=DtypeConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig, metadata=SCHEDULE)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig, metadata=SCHEDULE)
    lora: tuple[LowRankConfig, ...] = ()
    init_from: Sources = field(default_factory=WarmStartConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig, metadata=FREE)
    loader: LoaderConfig = field(default_factory=LoaderConfig, metadata=FREE)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=FREE)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig, metadata=FREE)
    limits: LimitsConfig = field(default_factory=LimitsConfig, metadata=FREE)
    log: LogConfig = field(default_factory=LogConfig, metadata=FREE)
    profile: ProfileConfig = field(default_factory=ProfileConfig, metadata=FREE)

    def __post_init__(self) -> None:
        check(self, steps=COUNT)
