"""Take pruned models away: files, sparse formats that run, and a check that a pattern holds."""

from prunax.export.bcoo import to_bcoo
from prunax.export.container import FormatError
from prunax.export.files import load_masks, load_params, read_metadata, save_masks, save_params
from prunax.export.packed import BlockSparse, Dense, GatherSparse, pack
from prunax.export.timing import fastest, matmul_seconds
from prunax.export.verify import PatternReport, verify_pattern

__all__ = [
    "BlockSparse",
    "Dense",
    "FormatError",
    "GatherSparse",
    "PatternReport",
    "fastest",
    "load_masks",
    "load_params",
    "matmul_seconds",
    "pack",
    "read_metadata",
    "save_masks",
    "save_params",
    "to_bcoo",
    "verify_pattern",
]
