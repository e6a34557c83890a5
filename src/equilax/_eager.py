"""Compile a solve once for each `fn`, and forget it when the `fn` is gone."""

import dataclasses
import functools as ft
import re
import weakref
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from jax.core import Tracer


@jtu.register_static
@dataclasses.dataclass(frozen=True)
class _Fixed:
    """What of a tree is part of a program: all that is no array.

    With types, of which one and true, say, are equal without.
    """

    leaves: tuple[Any, ...]
    types: tuple[type, ...]
    treedef: Any


def _split(tree: Any) -> tuple[list[Any], _Fixed]:
    leaves, treedef = jtu.tree_flatten(tree)
    arrays = [x if eqx.is_array(x) else None for x in leaves]
    others = [None if eqx.is_array(x) else x for x in leaves]
    return arrays, _Fixed(tuple(others), tuple(map(type, others)), treedef)


def _join(arrays: list[Any], fixed: _Fixed) -> Any:
    pairs = zip(arrays, fixed.leaves, strict=True)
    return jtu.tree_unflatten(fixed.treedef, [b if a is None else a for a, b in pairs])


def _program(solve: Callable, fn: Callable) -> Callable:
    """`solve(fn, ...)` of split arguments, which does not keep `fn` alive."""
    known = weakref.ref(fn)

    @ft.partial(jax.jit, static_argnums=1)
    def run(arrays, fixed):
        return _split(solve(known(), *_join(arrays, fixed)))

    return run


def _is_mortal(fn: Any) -> bool:
    """Whether `fn` is known by its identity alone, and nobody can make it again.

    Not so a bound method, equal to the next one of its object, and not so a pytree, of
    which the structure is compared.
    """
    is_leaf = jtu.all_leaves([fn]) and not eqx.is_array(fn)
    return is_leaf and type(fn).__hash__ is object.__hash__


_RAISED = re.compile(r"_EquinoxRuntimeError: (.*?)\n\n\n-{20}", re.DOTALL)


def _run(program: Callable, args: tuple[Any, ...]) -> Any:
    """Call it, and have what it raises raised here, in as many words as it has."""
    try:
        arrays, fixed = program(*_split(args))
        if not any(isinstance(x, Tracer) for x in arrays):
            jax.block_until_ready(arrays)
    except jax.errors.JaxRuntimeError as error:
        found = _RAISED.search(str(error))
        if found is None:
            raise
        raise eqx.EquinoxRuntimeError(found.group(1)) from None
    return _join(arrays, fixed)


def compiled_for_each(solve: Callable) -> Callable:
    """Compile `solve(fn, ...)` for each `fn`, as [`equinox.filter_jit`][] does.

    But for its cache, which would hold on to every `fn` and its program: to those of
    each lambda that a loop defines anew.
    """
    shared = eqx.filter_jit(solve)
    programs: weakref.WeakKeyDictionary[Any, Callable] = weakref.WeakKeyDictionary()

    @ft.wraps(solve)
    def call(fn, *args):
        if not _is_mortal(fn):
            return shared(fn, *args)
        try:
            program = programs.get(fn)
            if program is None:
                program = programs[fn] = _program(solve, fn)
        except TypeError:  # Nothing can hold it weakly.
            return shared(fn, *args)
        return _run(program, args)

    return call
