"""Test sets of the emoji concepts as one more vendor draws them; see `mmjax.datasets.emoji`.

Fields, labels and concept numbers are those of the emoji data. Nothing is for training: one split
has the concepts that training sees, in other drawings, the other one those that it never sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from etils import epath

from mmjax.datasets import emoji, packages, writer
from mmjax.datasets.build import Made
from mmjax.datasets.emoji import Concept
from mmjax.datasets.packages import PackageSource

_TOOLS = {"PIL": "pillow"} | packages.WRITING


@dataclass(frozen=True)
class Vendor:
    """A vendor of drawings, and the name of the data set made from them.

    Attributes:
      dataset: name of the data set.
      label: name of the vendor in the records.
      splits: of the concepts that training sees, and of those that it does not see.
      source: the package that has the drawings.
      description: for people.
    """

    dataset: str
    label: str
    splits: tuple[str, str]
    source: PackageSource
    description: str

    def split_of(self, codepoints: str) -> str:
        """Return the split that the drawing of this concept belongs to."""
        return self.splits[0] if emoji.seen(codepoints) else self.splits[1]

    def check(self) -> None:
        """Raise `UserError` for the first package that is missing."""
        packages.check((self.source, *emoji.SOURCES), _TOOLS)


def make(
    vendor: Vendor,
    root: epath.Path,
    limit: int | None,
    *,
    has: Callable[[Concept], bool],
    draw: Callable[[Concept], bytes],
) -> Made:
    """Write the drawings under `root`; `limit` takes that many concepts.

    `has` returns whether there is a drawing; `draw` gives it as an RGBA PNG of 64x64 pixels.
    """
    sources = (vendor.source, *emoji.SOURCES)
    concepts = emoji.load_concepts()
    chosen = emoji.choose(filter(has, concepts), limit)
    counts = {split: len(_of(vendor, split, chosen)) for split in vendor.splits}
    writer.check_splits(counts, limit)

    def records(split: str) -> Iterator[tuple[str, writer.Record]]:
        for concept in _of(vendor, split, chosen):
            yield concept.codepoints, emoji.record(concept, vendor.label, draw(concept))

    path = writer.write(
        vendor.dataset,
        root,
        description=vendor.description,
        features=emoji.features(concepts, (vendor.label,)),
        licence=packages.licences(sources),
        splits={split: records(split) for split in vendor.splits},
    )
    concept_facts = emoji.concept_facts(concepts, chosen, counts)
    return Made(path, {"concepts": concept_facts, **packages.facts(sources, _TOOLS)})


def _of(vendor: Vendor, split: str, concepts: Sequence[Concept]) -> list[Concept]:
    return [concept for concept in concepts if vendor.split_of(concept.codepoints) == split]
