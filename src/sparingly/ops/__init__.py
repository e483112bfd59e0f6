"""Operators on the selected rows of a bank: one folder each, with a PyTorch reference and device kernels beside it."""

from sparingly.ops._registry import Fallback, Op, clear_fallbacks, fallbacks, registered
from sparingly.ops.gated_rows import gated_rows
from sparingly.ops.gather_accumulate import gather_accumulate
from sparingly.ops.gather_dot import gather_dot
from sparingly.ops.mlp_rows import mlp_rows
from sparingly.ops.product_topk import product_topk
from sparingly.ops.row_adamw import row_adamw_
from sparingly.ops.scatter_outer import scatter_outer
from sparingly.ops.table_sums import table_sums
from sparingly.ops.threshold_accumulate import threshold_accumulate
from sparingly.ops.topk_rows import topk_rows

__all__ = [
    "Fallback",
    "Op",
    "clear_fallbacks",
    "fallbacks",
    "gated_rows",
    "gather_accumulate",
    "gather_dot",
    "mlp_rows",
    "product_topk",
    "registered",
    "row_adamw_",
    "scatter_outer",
    "table_sums",
    "threshold_accumulate",
    "topk_rows",
]
