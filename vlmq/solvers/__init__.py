"""Solvers: from a target and a hessian to a quantized weight.

Every solver has one signature,

    solve(weight, target, hessian, format, group_size, *, generator, <own options>) -> QuantizedWeight

and minimises tr[(What - T) H (What - T)^T] on the grid of the format. Names compose with "+": the first
solver makes a start, the refinements after it (`REFINEMENTS`) lower its loss, as in "gptq+cd" or
"kmeans+cd".
"""

from vlmq.solvers.recipe import REFINEMENTS, SOLVERS, default_solver, run_recipe

__all__ = ["REFINEMENTS", "SOLVERS", "default_solver", "run_recipe"]
