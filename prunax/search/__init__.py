"""Loss-aware search: what to prune, decided by measured losses.

`sensitivity` measures the loss when one structure alone is pruned, `allocate` shares out a total budget so that the
loss of all is low, and `max_sparsity` prunes as much as a limit of the loss accepts. A structure is a leaf under a
pattern (`leaves`), a channel group (`channels`), a residual branch or block (`branches`) or the experts of a mixture
(`experts`), or some of each (`together`); budgets count weights, bytes, operations or seconds.
"""

from prunax.search._acceptance import Accepted, Decision, max_sparsity
from prunax.search._budgets import Allocated, allocate
from prunax.search._costs import bytes_per_weight, flops_per_weight
from prunax.search._curves import SPARSITIES, Sensitivity, sensitivity
from prunax.search._structures import Structures, channels, leaves, together
from prunax.search._switches import branches, experts

__all__ = [
    "SPARSITIES",
    "Accepted",
    "Allocated",
    "Decision",
    "Sensitivity",
    "Structures",
    "allocate",
    "branches",
    "bytes_per_weight",
    "channels",
    "experts",
    "flops_per_weight",
    "leaves",
    "max_sparsity",
    "sensitivity",
    "together",
]
