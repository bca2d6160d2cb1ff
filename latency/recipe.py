"""A readable text that carries every hyperparameter of a module, read off the live module alone.

Equal texts stand for equal operations, so a candidate that nobody foresaw is measured without a
line of code for it. `Conv2d(16,96,1x1,bias=None)` is a layer of PyTorch with what differs from
its constructor's defaults; `package.Block(has_skip=True)[conv:Conv2d(...),act:ReLU]` is a class of
any package with its attributes, its own tensors' shapes and its children.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
_INTERNALS = frozenset(vars(nn.Module()))
_USUAL_TENSORS = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})


def recipe(module: nn.Module) -> str:
    """The class, its hyperparameters and, in brackets, its children's recipes.

    Plain attributes, enumerations, functions and classes count as hyperparameters; of any other
    object only the type shows. Children named by their position stand without a name, and named
    children that are `Identity` are left out.
    """
    arguments = ",".join(_arguments(module))
    children = []
    for name, child in module.named_children():
        if name.isdigit():
            children.append(recipe(child))
        elif type(child) is not nn.Identity:
            children.append(f"{name}:{recipe(child)}")
    return (
        _class_name(type(module))
        + (f"({arguments})" if arguments else "")
        + (f"[{','.join(children)}]" if children else "")
    )


def _arguments(module: nn.Module) -> list[str]:
    cls: type = type(module)
    signature = _signature(cls)
    attributes = {name: value for name, value in vars(module).items() if name not in _INTERNALS}
    if _is_torch(cls):  # the rest is derived from its arguments
        attributes = {name: value for name, value in attributes.items() if name in signature}
    required = [name for name in signature if signature[name].default is inspect.Parameter.empty]
    shown = [_text(attributes[name]) for name in required if name in attributes]
    for name, value in sorted(attributes.items()):
        default = signature[name].default if name in signature else None
        if name not in required and not _equal(value, default):
            shown.append(f"{name}={_text(value)}")
    return shown + _tensors(module, set(signature))


@functools.cache
def _signature(cls: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(cls).parameters


def _tensors(module: nn.Module, arguments: set[str]) -> list[str]:
    """Shapes of the module's own tensors, unless it is a layer whose arguments imply them."""
    is_layer = any(_is_torch(base) and base not in _CONTAINERS for base in type(module).__mro__)
    shown = []
    for name, tensor in {**module._parameters, **module._buffers}.items():
        if tensor is None:
            if name in arguments or not is_layer:
                shown.append(f"{name}=None")
        elif not (is_layer and name in _USUAL_TENSORS):
            shown.append(f"{name}={_text(tuple(tensor.shape))}")
    return shown


def _is_torch(cls: type) -> bool:
    return cls.__module__.startswith("torch.nn.")


def _class_name(cls: type) -> str:
    return cls.__qualname__ if _is_torch(cls) else f"{cls.__module__}.{cls.__qualname__}"


def _equal(value: Any, default: Any) -> bool:
    """Whether the value is its default; PyTorch expands a number to a tuple of equal numbers."""
    if isinstance(value, tuple) and not isinstance(default, tuple):
        return bool(value) and all(_text(item) == _text(default) for item in value)
    return _text(value) == _text(default)


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return str(value)
    if isinstance(value, tuple | list):
        if len(value) > 1 and all(type(item) is int for item in value):
            return "x".join(map(str, value))
        return "[" + ",".join(map(_text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_text(k)}:{_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, functools.partial):
        return f"{_text(value.func)}({_text(value.args)},{_text(value.keywords)})"
    if isinstance(value, type):
        return _class_name(value)
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    return f"<{_class_name(type(value))}>"
