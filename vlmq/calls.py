"""Which modules the code of a forward calls one after the other with the same variable.

    q = self.q_proj(x).view(shape); k = self.k_proj(x); v = self.v_proj(x)      ->  q_proj, k_proj, v_proj

Read from the source, not from a run: so it is known before the first token, also where torch.compile traces. Between
such calls nothing may happen that could change the variable: no assignment to it or to a part of it, no call that is
given it or that is a method of it whose name ends in an underscore, no branch and no loop. It is a guess all the same:
who acts on it checks at each call that the variable is the same tensor.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

Run = tuple[str, ...]


@cache
def runs_of_calls(forward: Callable[..., Any]) -> tuple[Run, ...]:
    """Return names of children of `self`, in the order of the calls, two at least; nothing if there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return ()
    head = tree.body[0]
    if not isinstance(head, ast.FunctionDef):
        return ()
    reader = _Reader()
    reader.read(head.body)
    return tuple(reader.found)


class _Reader(ast.NodeVisitor):
    """Walks over statements in the order in which they are executed."""

    def __init__(self) -> None:
        self.found: list[Run] = []
        self._open: dict[str, list[str]] = {}

    def read(self, statements: Sequence[ast.stmt]) -> None:
        """Read a list of statements; no run goes on beyond its ends."""
        self._close_all()
        for statement in statements:
            self.visit(statement)
        self._close_all()

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        variable = _only_name(node)
        if isinstance(function, ast.Attribute) and _is_name(function.value, "self") and variable:
            self._add(variable, function.attr)
            return
        self.generic_visit(node)
        for value in (*node.args, *(keyword.value for keyword in node.keywords)):
            self._close(value.value if isinstance(value, ast.Starred) else value)
        if isinstance(function, ast.Attribute) and function.attr.endswith("_"):
            self._close(function.value)

    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Load):
            self._close(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.generic_visit(node)
        if not isinstance(node.ctx, ast.Load):
            self._close(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        for part in (node.value, *node.targets):
            self.visit(part)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        for part in (node.value, node.target):
            self.visit(part)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        for part in (node.value, node.target):
            if part is not None:
                self.visit(part)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        for part in (node.value, node.target):
            self.visit(part)

    def generic_visit(self, node: ast.AST) -> None:
        """Read on, but for code that may be run never or more than once: that is read by itself, or not at all."""
        if isinstance(node, _STATEMENTS_WITHIN):
            bodies = [
                getattr(node, field, []) for field in ("body", "handlers", "orelse", "finalbody", "cases")
            ]
            for body in bodies:
                self.read(body)
        elif isinstance(node, (ast.ExceptHandler, ast.match_case)):
            self.read(node.body)
        elif isinstance(node, _NOT_ALWAYS):
            self._close_all()
        else:
            super().generic_visit(node)

    def _add(self, variable: str, module: str) -> None:
        if module in self._open.get(variable, ()):
            self._close_one(variable)
        self._open.setdefault(variable, []).append(module)

    def _close(self, value: ast.expr) -> None:
        if isinstance(value, ast.Name):
            self._close_one(value.id)

    def _close_one(self, variable: str) -> None:
        run = self._open.pop(variable, [])
        if len(run) > 1:
            self.found.append(tuple(run))

    def _close_all(self) -> None:
        for variable in list(self._open):
            self._close_one(variable)


_STATEMENTS_WITHIN = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match, ast.AsyncFor, ast.AsyncWith)
_NOT_ALWAYS = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Lambda,
    ast.IfExp,
    ast.BoolOp,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.Delete,
)


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _only_name(node: ast.Call) -> str | None:
    """The variable that is all a call is given."""
    first = node.args[0] if len(node.args) == 1 and not node.keywords else None
    return first.id if isinstance(first, ast.Name) else None
