"""How large a run is, as far as the config of a model tells: what estimates of time and memory are made from."""

from dataclasses import dataclass

WINDOW = 512
"""Tokens of one window while measuring, for the memory of its logits."""


@dataclass(frozen=True, slots=True)
class RunSize:
    """Sizes of a model and of its calibration text.

    Attributes:
        tokens: calibration tokens run through every block; 0 if none are.
        length: tokens per calibration window.
        blocks: number of decoder blocks.
        block: parameters of the largest block.
        hidden: channels between blocks.
        vocabulary: rows of the embedding.
        widest: inputs of the widest layer that will be quantized.
        weights: number of weights that will be quantized.
        shared: several processes make one second moment of theirs.
    """

    tokens: int
    length: int
    blocks: int
    block: int
    hidden: int
    vocabulary: int
    widest: int
    weights: int
    shared: bool = False
