"""Decoding: greedy search, sampling and beam search over any step function."""

from seqattn.decoding.beam import Beams, beam_search
from seqattn.decoding.candidates import DiverseGroups
from seqattn.decoding.ensemble import Average, ensemble
from seqattn.decoding.filters import MinLogProbability, MinP, Temperature, TopK, TopP
from seqattn.decoding.generate import Generated, generate
from seqattn.decoding.penalties import GNMT, AverageLength, CoveragePenalty, LengthPenalty, NoPenalty
from seqattn.decoding.processors import (
    Banned,
    ForcedPrefix,
    History,
    LogitsProcessor,
    Lowering,
    MinLength,
    NoRepeatNgram,
    PrefixCost,
    RepetitionPenalty,
)
from seqattn.decoding.sampling import Greedy, Sample, Sampling, row_keys
from seqattn.decoding.stopping import Stopping
from seqattn.hypotheses import Branching, Shared, branch, select

__all__ = [
    "GNMT",
    "Average",
    "AverageLength",
    "Banned",
    "Beams",
    "Branching",
    "CoveragePenalty",
    "DiverseGroups",
    "ForcedPrefix",
    "Generated",
    "Greedy",
    "History",
    "LengthPenalty",
    "LogitsProcessor",
    "Lowering",
    "MinLength",
    "MinLogProbability",
    "MinP",
    "NoPenalty",
    "NoRepeatNgram",
    "PrefixCost",
    "RepetitionPenalty",
    "Sample",
    "Sampling",
    "Shared",
    "Stopping",
    "Temperature",
    "TopK",
    "TopP",
    "beam_search",
    "branch",
    "ensemble",
    "generate",
    "row_keys",
    "select",
]
