"""Where --loss goes into a pretrain_gpt.py, found in its syntax tree and held to what we wrap.

A script is taken whatever else stands in it, as long as the three places are what
`megatron_dft.stock` wraps: loss_func(loss_mask, output_tensor, model=None) returning (loss, tokens,
report) with a tensor report["lm loss"], and one call of what parses the command line. Anything
else raises `PlaceError`. Nothing of the script is run; torch and Megatron are not imported.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

FUNCTION = "loss_func"
PARAMETERS = ("loss_mask", "output_tensor", "model")
ENTRIES = {"parse_and_validate_args": 0, "pretrain": 5}  # arguments before extra_args_provider


class PlaceError(ValueError):
    """A place where our lines belong is missing or is not what they wrap: (expected, got)."""

    def __init__(self, expected: str, got: str):
        super().__init__(f"expected {expected}, got {got}")
        self.expected, self.got = expected, got


@dataclass(frozen=True)
class Places:
    """Statements of a script: ours come after `imports`, on `function`, before `call`."""

    imports: ast.stmt
    function: ast.FunctionDef
    call: ast.stmt | None  # None: the call is inside a function; the name is wrapped at the top
    entry: str


def _own(function: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a function without those of functions inside it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _own(child)


def _the_function(tree: ast.Module) -> ast.FunctionDef:
    expected = f"one `def {FUNCTION}` at the top level"
    found = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == FUNCTION
    ]
    if len(found) != 1:
        raise PlaceError(expected, f"{len(found) or 'none'}")
    (function,) = found
    if isinstance(function, ast.AsyncFunctionDef) or function.decorator_list:
        raise PlaceError(
            f"a plain `def {FUNCTION}`", f"a decorated or async one in line {function.lineno}"
        )
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.alias | ast.Global) and _binds(node, FUNCTION):
            raise PlaceError(expected, f"another binding of the name in line {_line(node)}")
    return function


def _line(node: ast.AST) -> int:
    return getattr(node, "lineno", 0)


def _binds(node: ast.AST, name: str) -> bool:
    if isinstance(node, ast.Name):
        return node.id == name and not isinstance(node.ctx, ast.Load)
    if isinstance(node, ast.alias):
        return (node.asname or node.name) == name
    return isinstance(node, ast.Global) and name in node.names


def _check_signature(function: ast.FunctionDef) -> None:
    given = function.args
    names = tuple(a.arg for a in (*given.posonlyargs, *given.args))
    extra = [a.arg for a in given.kwonlyargs] + [a.arg for a in (given.vararg, given.kwarg) if a]
    is_ours = names == PARAMETERS and not extra and not given.posonlyargs
    if not is_ours or len(given.defaults) != 1:
        shown = ast.unparse(given)
        raise PlaceError(
            f"`{FUNCTION}(loss_mask, output_tensor, model=None)`",
            f"`{FUNCTION}({shown})` in line {function.lineno}",
        )


def _check_returns(function: ast.FunctionDef) -> None:
    nodes = list(_own(function))
    returns = [node for node in nodes if isinstance(node, ast.Return)]
    expected = f"{FUNCTION} to return (loss, tokens, report)"
    for node in returns:
        value = node.value
        if node in _distillation(function):
            continue
        if not isinstance(value, ast.Tuple) or len(value.elts) != 3:
            shown = ast.unparse(value)[:60] if value else "nothing"
            raise PlaceError(expected, f"`{shown}` in line {node.lineno}")
    if not returns:
        raise PlaceError(expected, "no return")
    if any(isinstance(node, ast.Yield | ast.YieldFrom) for node in nodes):
        raise PlaceError(expected, "a generator")
    reports = [value for node in nodes for key, value in _entries(node) if key == "lm loss"]
    if not reports or any(isinstance(value, ast.Tuple | ast.List) for value in reports):
        got = "a tuple, as Megatron before 0.13 has it" if reports else "no such entry"
        raise PlaceError("a report whose 'lm loss' is a tensor [sum, count]", got)


def _distillation(function: ast.FunctionDef) -> list[ast.Return]:
    """Returns of ModelOpt's loss (until 0.15): under a setting that --loss refuses in the run."""
    return [
        statement
        for node in function.body
        if isinstance(node, ast.If) and "modelopt_enabled" in ast.unparse(node.test)
        for statement in node.body
        if isinstance(statement, ast.Return) and _calls(statement, "loss_func_modelopt")
    ]


def _entries(node: ast.AST) -> Iterator[tuple[object, ast.expr]]:
    """(key, value) of a dict display, or of `x[key] = value`."""
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant):
                yield key.value, value
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
                yield target.slice.value, node.value


def _calls(node: ast.AST, name: str) -> list[ast.Call]:
    return [
        one
        for one in ast.walk(node)
        if isinstance(one, ast.Call) and isinstance(one.func, ast.Name) and one.func.id == name
    ]


def _is_main(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def _the_entry(tree: ast.Module) -> tuple[ast.stmt | None, str]:
    """The statement before which the flags are wrapped, and the name of what parses them."""
    for entry, positional in ENTRIES.items():
        calls = _calls(tree, entry)
        if not calls:
            continue
        # A later call would see a function that is wrapped twice, and add the flags twice.
        if len(calls) != 1 or len(calls[0].args) > positional:
            raise PlaceError(
                f"one call of {entry} with extra_args_provider by its name or not at all",
                f"{len(calls)} calls, the first in line {calls[0].lineno}",
            )
        if not _is_imported(tree, entry):
            raise PlaceError(f"{entry} to be imported at the top level", "another origin")
        for block in filter(_is_main, tree.body):
            for statement in block.body:  # type: ignore[attr-defined]
                if calls[0] in ast.walk(statement) and statement.lineno != block.lineno:
                    return statement, entry
        return None, entry
    raise PlaceError(f"a call of {' or '.join(ENTRIES)}", "none")


def _is_imported(tree: ast.Module, name: str) -> bool:
    return any(
        isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names)
        for node in tree.body
    )


def find(source: bytes) -> Places:
    """The three places. Raises PlaceError, also for a script that is not Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise PlaceError("a Python script", str(error)) from None
    function = _the_function(tree)
    _check_signature(function)
    _check_returns(function)
    call, entry = _the_entry(tree)
    before = [
        node
        for node in tree.body[: tree.body.index(function)]
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    if not before:
        raise PlaceError(f"imports above {FUNCTION}", "none")
    return Places(before[-1], function, call, entry)
