"""The legend of axis letters: names of arrays end with the letters of their axes, in order.

`x_BSD` is an array of rows, tokens and channels; a docstring writes the same as `[B, S, D]`. Letters are those of the
literature, so some depend on the subject.
"""

from __future__ import annotations

from collections.abc import Mapping

LEGEND: Mapping[str, str] = {
    "A": "axes of a position, such as height and width",
    "B": "rows (examples) of a batch",
    "C": "classes; channels of a picture; slots of an expert; candidates of a retrieval; rows of a chunk",
    "D": "width of the model",
    "E": "experts; inner width of a Mamba block; dimension of an embedding",
    "F": "hidden width of an MLP; bins of a Fourier transform",
    "G": "groups of tokens that are routed together",
    "H": "attention heads; height of a picture",
    "K": "dimension of a head; experts chosen for a token; taps of a convolution; tokens that stay",
    "L": "logits of a router, one for each slot or expert; tokens of a text; tokens of a chunk",
    "M": "mel bands; choices of a group's tokens; instances of the other side of a pair",
    "N": "state of a Mamba block; items of a sequence; instances of an example; examples of a split",
    "P": "values of a patch",
    "Q": "queries",
    "R": "sequences of several items; anchors of a loss; rank of a Mamba block's step",
    "S": "tokens of a sequence",
    "T": "tokens that are attended to; tokens of a group; slots of a sequence; frames of a clip or a sound",
    "V": "vocabulary; visits of a task",
    "W": "width of a picture",
}
