"""Is the oracle its own witness? It may share no code with the path that it judges."""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
import types
from typing import Any

from torch import nn

from saccade.contract import Mechanism, Weights
from saccade.testing.registry import named
from saccade.testing.subject import Subject

# The rooms of primitives; hosts, which are made of mechanisms and primitives; and torch's own attention.
PRIMITIVES = ("where", "softmax", "scan", "mix", "cache", "parallel", "lens", "steer")
ROOMS = (*PRIMITIVES, "hosts")
FUSED = (nn.functional.scaled_dot_product_attention, nn.functional.multi_head_attention_forward, nn.MultiheadAttention)
FAST = ("compute", "forward", "step", "plan", "__call__")
NOTHING = object()


def _home(value: Any) -> str:
    """The module that the code behind `value` comes from."""
    value = getattr(value, "__func__", value)
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, type) or inspect.isroutine(value):
        return getattr(value, "__module__", None) or ""
    return type(value).__module__


class Reader(ast.NodeVisitor):
    """Walks a function of a mechanism and every helper of its own; collects `forbidden` uses and the helpers `read`."""

    def __init__(self, instance: Mechanism) -> None:
        self.instance = instance
        self.forbidden: list[str] = []
        self.read: dict[Any, str] = {}

    def follow(self, function: Any, owner: Any) -> None:
        """Read `function`, whose first argument, if it is a method, is `owner`."""
        function = inspect.unwrap(getattr(function, "__func__", function))
        if function in self.read:
            return
        self.read[function] = function.__qualname__
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        bound = {a.arg for node in ast.walk(tree) if isinstance(node, ast.arguments) for a in _arguments(node)}
        bound |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        scope = {**vars(builtins), **function.__globals__}
        scope = {name: value for name, value in scope.items() if name not in bound}
        if owner is not None:
            scope |= {"self": owner, "cls": owner if isinstance(owner, type) else type(owner)}
        outer, self.scope, self.at = (getattr(self, "scope", {}), getattr(self, "at", "")), scope, function.__qualname__
        for statement in tree.body[0].body:  # type: ignore[attr-defined]
            self.visit(statement)
        self.scope, self.at = outer

    def resolve(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Name):
            return self.scope.get(node.id, NOTHING)
        if isinstance(node, ast.Attribute):
            owner = self.resolve(node.value)
            return NOTHING if owner is NOTHING else getattr(owner, node.attr, NOTHING)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super":
            return super(type(self.instance), self.instance)
        return NOTHING

    def judge(self, node: ast.AST, value: Any) -> None:
        text, home = ast.unparse(node), _home(value)
        own = home == type(self.instance).__module__ or home.startswith("saccade.mechanisms.")
        method_of = getattr(value, "__self__", None)
        in_room = home.startswith("saccade.") and home.split(".")[1] in ROOMS
        is_fast = isinstance(method_of, Mechanism) and getattr(value, "__name__", "") in FAST
        if value is self.instance and text in ("self", "cls"):
            return
        if in_room or is_fast or value is self.instance or any(value is fused for fused in FUSED):
            self.forbidden.append(f"{self.at} uses {text}")
        elif value is Weights or (home == Mechanism.__module__ and inspect.isfunction(value)):
            self.read[value] = text  # what is written there by the book is for one of the two
        elif own and inspect.isroutine(value):
            self.follow(value, method_of)
        elif own and isinstance(value, nn.Module):
            self.follow(type(value).forward, value)
        elif own and isinstance(value, type) and issubclass(value, nn.Module) and not isinstance(self.instance, value):
            self.follow(value.forward, None)

    def visit_Name(self, node: ast.Name) -> None:
        value = self.resolve(node)
        if value is not NOTHING:
            self.judge(node, value)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        value = self.resolve(node)
        if value is NOTHING:
            self.generic_visit(node)
        else:
            self.judge(node, value)

    def visit_Call(self, node: ast.Call) -> None:
        if self.resolve(node.func) is self.instance:
            self.forbidden.append(f"{self.at} calls itself by {ast.unparse(node.func)}(...)")
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self._imported(node, [alias.name for alias in node.names])

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self._imported(node, [node.module or "."])

    def _imported(self, node: ast.AST, names: list[str]) -> None:
        if any(name.split(".")[0] in ("saccade", "") for name in names):
            self.forbidden.append(f"{self.at} does {ast.unparse(node)}")


def _arguments(node: ast.arguments) -> list[ast.arg]:
    return [a for a in (*node.posonlyargs, *node.args, *node.kwonlyargs, node.vararg, node.kwarg) if a is not None]


@named(applies=lambda subject: subject.case == subject.cls.cases()[0])
def oracle_independent(subject: Subject) -> None:
    """The oracle and its helpers use no primitive of the package, no fused attention, nothing that `compute` uses."""
    instance = subject.module
    oracle, fast = Reader(instance), Reader(instance)
    oracle.follow(type(instance).oracle, instance)
    assert not oracle.forbidden, f"the oracle must be plain torch: {'; '.join(oracle.forbidden)}"
    fast.follow(type(instance).compute, instance)
    shared = sorted(name for function, name in oracle.read.items() if function in fast.read)
    assert not shared, f"the oracle and compute share {', '.join(shared)}; what both get wrong nobody sees"
