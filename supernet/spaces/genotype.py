"""The text form of DARTS cells (Liu et al. 2019, the official code's `Genotype`)."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

Gene = tuple[str, int]  # operation, and the node that it reads
_FORM = "Genotype(normal=[('op', node), ...], normal_concat=range(2, 6), reduce=[...], ...)"


def write_genotype(cells: Mapping[str, Sequence[Gene]], concat: range) -> str:
    """One line, as the official code prints it.

    Args:
        cells: by kind, what each intermediate node adds, in the order of the nodes.
        concat: nodes whose outputs the cell's output consists of.
    """
    fields = (f"{kind}={list(genes)!r}, {kind}_concat={concat!r}" for kind, genes in cells.items())
    return f"Genotype({', '.join(fields)})"


def read_genotype(text: str, kinds: Sequence[str], concat: range) -> dict[str, list[Gene]]:
    """Read what `write_genotype` wrote, or the official code; nothing in it is run.

    Raises:
        ValueError: another form, or another output than `concat`.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        call = None
    names = {name for kind in kinds for name in (kind, f"{kind}_concat")}
    if (
        not isinstance(call, ast.Call)
        or not isinstance(call.func, ast.Name)
        or call.func.id != "Genotype"
        or call.args
        or {keyword.arg for keyword in call.keywords} != names
        or len(call.keywords) != len(names)
    ):
        raise ValueError(f"{text!r} is not of the form {_FORM}")
    fields = {keyword.arg: _value(keyword.value, text) for keyword in call.keywords}
    for kind in kinds:
        if (found := fields[f"{kind}_concat"]) != list(concat):
            raise ValueError(
                f"{kind}_concat of the genotype is {found}; "
                f"only {list(concat)}, all intermediate nodes, can be built"
            )
    return {kind: [_gene(value, text) for value in fields[kind]] for kind in kinds}


def _value(node: ast.expr, text: str) -> list[object]:
    """A list, or the numbers of a `range`."""
    is_range = isinstance(node, ast.Call) and ast.unparse(node.func) == "range"
    try:
        if is_range:
            assert isinstance(node, ast.Call)
            return list(range(*(ast.literal_eval(argument) for argument in node.args)))
        value = ast.literal_eval(node)
    except (TypeError, ValueError):
        value = None
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{ast.unparse(node)!r} in {text!r} is neither a list nor a range")
    return list(value)


def _gene(value: object, text: str) -> Gene:
    if isinstance(value, tuple) and len(value) == 2:
        operation, source = value
        if isinstance(operation, str) and type(source) is int:
            return operation, source
    raise ValueError(f"{value!r} in {text!r} is not of the form ('op', node)")
