"""--loss in a pretrain_gpt.py: three lines put where they belong, taken out, or added in memory.

The lines are an import, a decorator on `loss_func`, and our flags around the function that parses
the command line: `parse_and_validate_args` (0.18 and later) or `pretrain` (before).
"""

import ast
from types import CodeType

from megatron_dft.compat.stock_places import ENTRIES, FUNCTION, PlaceError, Places, find

IMPORT = "from megatron_dft.stock import weighted_loss, with_loss_flags"
DECORATOR = "@weighted_loss"


def wrapped_entry(entry: str) -> str:
    """The line that puts our flags into the parser behind `entry`."""
    return f"{entry} = with_loss_flags({entry})"


def _add_line(lines: list[bytes], place: int, text: str) -> None:
    """Insert before lines[place], ended as that line is."""
    beside = lines[place]
    lines.insert(place, text.encode() + (beside[len(beside.rstrip(b"\r\n")) :] or b"\n"))


def apply(source: bytes) -> bytes:
    """The script with our three lines, each ended as its neighbour is."""
    places = find(source)
    lines = source.splitlines(keepends=True)
    flags = wrapped_entry(places.entry)
    if places.call is None:
        _add_line(lines, places.function.lineno - 1, DECORATOR)
    else:
        # From the bottom up, so that the numbers above stay right.
        place = places.call.lineno - 1
        indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())].decode("ascii")
        for at, text in sorted(
            [(place, indent + flags), (places.function.lineno - 1, DECORATOR)], reverse=True
        ):
            _add_line(lines, at, text)
    last_import = places.imports.end_lineno or places.imports.lineno
    if places.call is None:
        _add_line(lines, last_import, flags)
    _add_line(lines, last_import, IMPORT)
    return b"".join(lines)


def added_lines(source: bytes) -> list[int]:
    """Indices of our lines in a script that has all three; [] where there is none of them.

    Raises PlaceError for a script with some of them only, or with others of ours.
    """
    lines = source.splitlines()
    flags = {wrapped_entry(entry).encode() for entry in ENTRIES}
    found = [
        [i for i, line in enumerate(lines) if line == IMPORT.encode()],
        [i for i, line in enumerate(lines) if line == DECORATOR.encode()],
        [i for i, line in enumerate(lines) if line.strip() in flags],
    ]
    if not any(found) and b"megatron_dft" not in source:
        return []
    is_ours = all(len(places) == 1 for places in found)
    if not is_ours or source.count(b"megatron_dft") != 1:
        raise PlaceError("all of our lines or none", "a changed patch")
    if not lines[found[1][0] + 1].startswith(f"def {FUNCTION}".encode()):
        raise PlaceError(f"{DECORATOR} on {FUNCTION}", "it elsewhere")
    return sorted(places[0] for places in found)


def revert(source: bytes) -> bytes:
    """The script without our lines: the bytes that `apply` was given."""
    lines = source.splitlines(keepends=True)
    for index in reversed(added_lines(source)):
        del lines[index]
    return b"".join(lines)


def compiled(source: bytes, path: str) -> CodeType:
    """Code of the script with our lines in its tree, for `exec`; line numbers are the file's."""
    try:
        tree = ast.parse(source, path)
    except (SyntaxError, ValueError) as error:
        raise PlaceError("a Python script", str(error)) from None
    if not added_lines(source):
        _insert(tree, find(source))
    return compile(tree, path, "exec")


def _insert(tree: ast.Module, places: Places) -> None:
    flags = ast.parse(wrapped_entry(places.entry)).body[0]
    (imports,) = ast.parse(IMPORT).body
    top = next(i for i, n in enumerate(tree.body) if n.lineno == places.imports.lineno) + 1
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.lineno == places.function.lineno:
            name = ast.Name("weighted_loss", ast.Load())
            node.decorator_list.append(ast.copy_location(name, node))
        elif isinstance(node, ast.If) and places.call is not None:
            for i, statement in enumerate(node.body):
                if statement.lineno == places.call.lineno:
                    node.body.insert(i, _moved(flags, statement))
                    break
    added = [imports] if places.call is not None else [imports, flags]
    tree.body[top:top] = [_moved(node, places.imports) for node in added]


def _moved(node: ast.stmt, to: ast.stmt) -> ast.stmt:
    """`node` with the line of `to`, so that a traceback names a line of the file."""
    for one in ast.walk(node):
        if hasattr(one, "lineno"):
            ast.copy_location(one, to)
    return node
