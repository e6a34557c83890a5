"""A step of training of `examples/digits.py`, its layer solved by whatever comes.

The weight is at the bound on its norm, where training brings it. The unrolled network
is one of its own: it is timed whatever its gradient.
"""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from .contender import Contender
from .libraries import all_contenders
from .ours import by_equilax
from .workload import Workload


def _example(name: str) -> Any:
    """A module of the examples, which import each other by their bare names."""
    folder = str(Path(__file__).parents[2] / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def contenders() -> list[Contender]:
    make = by_equilax(eqlx.Anderson, batching=eqlx.Lockstep())
    as_there = Contender("equilax", "Anderson, as in the example", make, is_tied=True)
    others = [
        dataclasses.replace(c, is_exempt=c.library == "unrolled")
        for c in all_contenders()
    ]
    return [as_there, *others]


def digits(small: bool) -> Workload:
    features, batch = (8, 4) if small else (64, 64)
    example = _example("digits_model")
    images, labels, *_ = _example("digits_data").load_data()
    images, labels = images[:batch].reshape(batch, 64), labels[:batch]
    model = example.Classifier(features, key=jr.key(0))
    where = lambda model: model.layer.cell.weight
    scale = example.LARGEST_NORM / jnp.linalg.norm(where(model), ord=2)
    model = eqx.tree_at(where, model, scale * where(model))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimiser = example.make_optimiser(1000)

    def cell(z, args):
        params, x = args
        return eqx.combine(params, static).layer.cell(z, x)

    def head(zs, params):
        logits = jax.vmap(eqx.combine(params, static).readout)(zs)
        return jnp.mean(jax.vmap(example.cross_entropy)(logits, labels))

    def update(params, grads, memory):
        model = eqx.combine(params, static)
        model, memory = example.update(model, memory, grads, optimiser)
        return eqx.filter(model, eqx.is_inexact_array), memory

    return Workload(
        "digits",
        f"a step of training on digits, {features} features, {batch} images",
        cell,
        params,
        images,
        np.zeros((batch, features)),
        head=head,
        torch_cell="affine",
        labels=labels,
        update=update,
        memory=optimiser.init(params),
    )
