"""The porting kit: every tensor of a run, for those who port it, and the checker that finds their first deviation."""

from .check import compare, report
from .kit import Kit, write
from .recording import record
from .run import Run

__all__ = ["Kit", "Run", "compare", "record", "report", "write"]
