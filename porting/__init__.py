"""The porting kit: the tensors of a run, and the checker that finds where a port first deviates from them."""

from .check import compare, report
from .kit import Kit, record, write
from .stages import Run

__all__ = ["Kit", "Run", "compare", "record", "report", "write"]
