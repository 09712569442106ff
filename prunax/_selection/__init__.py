"""Exact top-k masks over many arrays, without sorting, flattening or gathering them.

The k-th best score is searched for. Floats order like integers made from their bits, so the threshold is one unsigned
integer, and how many scores rank before an integer is one fused read of the arrays. A few pivots are counted in each
read and the next ones are interpolated from the counts: about five reads settle ten million scores. Ties at the
threshold are cut by a second search of the same kind, over flat indices; or, on one device where many are expected (in
bfloat16, or of very many scores), by counting them in rows once. Last comes one fused write of the masks.

Of the size of a score array nothing is stored but the masks (`keep_largest_along` stores one transposed copy, where
the axis is not the minor one), and only counts travel between devices.

    keys -> reading (counts at pivots, masks) -> search (thresholds) -> pools (whole arrays) | slices (along an axis)
"""

from prunax._selection.keys import absolute, sort_keys
from prunax._selection.pools import keep_largest
from prunax._selection.reading import Score, has_nan, value_of
from prunax._selection.slices import keep_largest_along

__all__ = [
    "Score",
    "absolute",
    "has_nan",
    "keep_largest",
    "keep_largest_along",
    "sort_keys",
    "value_of",
]
