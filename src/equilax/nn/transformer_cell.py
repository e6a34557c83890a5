from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._check import (
    check_callable,
    check_fraction,
    check_instance,
    check_integer,
    check_key,
)
from .initial import parameter_dtype, with_norm
from .sample import check_dtype, check_shape
from .variational_dropout import VariationalDropout


_Sequence = Float[Array, "positions in_features"]
_Sequences = _Sequence | tuple[_Sequence, Bool[Array, "queries keys"]]


class TransformerCell(eqx.Module):
    r"""An injected attention block, whose state is the whole sequence.

    With $N$ a layer normalisation, $A$ multi-head attention, $F$ a perceptron applied
    at each position, and the injection $\hat x = N_0(U x + b)$, post-norm is

    $z' = N_2(h + F(h)), \quad h = N_1(z + \hat x + A(z + \hat x)),$

    and pre-norm is

    $z' = \hat x + A(N_1(z)) + F(N_2(z + A(N_1(z)))).$

    after the weight-tied transformer of Bai et al. (2019). There the input enters the
    attention alone; here it joins the residual stream. With branches $A$ and $F$ that
    are small, as they are at first, the post-norm Jacobian is then that of $N_1$ at
    $z + \hat x$, which has about twice the deviation of $z$: a half, and not one.
    Pre-norm has no skip of the state past both branches, for in $z = z + \hat x + B(z)$
    it would cancel, and an equilibrium be where the branches undo the input. The last
    matrix of each branch is new with a spectral norm of about 0.3, and that keeps the
    branches small.

    Cost of a call, for `length` positions and `d` features: `length * d * (4 * d + 2 *
    width + in_features)` multiplications and `2 * length**2 * d`. Memory: its
    linearisation keeps about `length * (12 * d + 2 * width)` numbers, and
    `num_heads * length**2` attention weights.
    """

    injection: eqx.nn.Linear
    attention: eqx.nn.MultiheadAttention
    hidden: eqx.nn.Linear
    output: eqx.nn.Linear
    norms: tuple[eqx.nn.LayerNorm, eqx.nn.LayerNorm, eqx.nn.LayerNorm]
    activation: Callable
    position: eqx.nn.RotaryPositionalEmbedding | None
    dropout: VariationalDropout
    in_features: int = eqx.field(static=True)
    features: int = eqx.field(static=True)
    causal: bool = eqx.field(static=True)
    pre_norm: bool = eqx.field(static=True)

    def __init__(
        self,
        in_features: int,
        features: int,
        num_heads: int,
        width: int | None = None,
        activation: Callable = jax.nn.gelu,
        *,
        causal: bool = False,
        pre_norm: bool = False,
        position: eqx.nn.RotaryPositionalEmbedding | None = None,
        dropout: float = 0.0,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `in_features`: The size of the input `x` at one position.
        - `features`: The size of the state at one position.
        - `num_heads`: The number of heads, a divisor of `features`.
        - `width`: The size of the hidden layer of the perceptron. Defaults to four
            times `features`.
        - `activation`: Applied elementwise in the perceptron.
        - `causal`: Whether a position sees none after itself. The equilibrium is causal
            then. What a solver returns is so to its tolerance: the weights of
            [`equilax.Anderson`][] and when it stops are those of the whole sequence.
            Keyword only argument.
        - `pre_norm`: Whether the branches are normalised in place of their sum. Keyword
            only argument.
        - `position`: An `equinox.nn.RotaryPositionalEmbedding` of size `features //
            num_heads` and of the dtype of the parameters, which turns queries and keys.
            Without one the cell cannot tell positions apart but by `x`. Keyword only
            argument.
        - `dropout`: The probability that a feature of a branch is dropped, by an
            [`equilax.nn.VariationalDropout`][]. Keyword only argument.
        - `dtype`: The dtype of the parameters. Defaults to JAX's float. Keyword only
            argument.
        - `key`: A PRNG key for the initial parameters. Keyword only argument.
        """
        width = 4 * features if width is None else width
        sizes = {"in_features": in_features, "features": features, "width": width}
        for name, size in (sizes | {"num_heads": num_heads}).items():
            check_integer(name, size, 1)
        check_callable("activation", activation, "activation(z)")
        check_instance("causal", causal, bool)
        check_instance("pre_norm", pre_norm, bool)
        check_fraction("dropout", dropout)
        check_key("key", key)
        dtype = parameter_dtype(dtype)
        _check_heads(num_heads, features, position, dtype)
        x_key, a_key, h_key, o_key = jr.split(key, 4)
        linear, attention = eqx.nn.Linear, eqx.nn.MultiheadAttention
        self.injection = linear(in_features, features, dtype=dtype, key=x_key)
        new = attention(num_heads, features, dtype=dtype, key=a_key)
        self.attention = eqx.tree_at(
            lambda new: new.output_proj, new, with_norm(new.output_proj, 0.3)
        )
        self.hidden = linear(features, width, dtype=dtype, key=h_key)
        output = linear(width, features, dtype=dtype, key=o_key)
        self.output = with_norm(output, 0.3)
        norms = [eqx.nn.LayerNorm(features, dtype=dtype) for _ in range(3)]
        self.norms = (norms[0], norms[1], norms[2])
        self.activation = activation
        self.position = position
        self.dropout = VariationalDropout(dropout, axes=(0,))
        self.in_features = in_features
        self.features = features
        self.causal = causal
        self.pre_norm = pre_norm

    def init(self, x: _Sequences) -> Float[Array, "length features"]:
        """The start of a solve: zero."""
        x, _ = self._sequence_and_mask(x)
        return jnp.zeros((x.shape[0], self.features), self.injection.weight.dtype)

    def __call__(
        self,
        z: Float[Array, "length features"],
        x: _Sequences,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "length features"]:
        """**Arguments:**

        - `z`: The state.
        - `x`: The injected sequence, or a pair of that and a mask: whether the position
            of the row may look at that of the column. Where a row allows none, the
            attention is zero.
        - `key`: A PRNG key, needed for dropout alone. Keyword only argument.

        **Returns:**

        The next state.

        **Raises:**

        - `ValueError`: At trace time, if a shape or a dtype is not that of the cell, or
            a key is missing.
        """
        x, mask = self._sequence_and_mask(x)
        check_shape("z", z, (x.shape[0], self.features))
        for name, value in (("x", x), ("z", z)):
            check_dtype(name, value, self.injection.weight.dtype)
        if self.causal:
            past = jnp.tril(jnp.ones((x.shape[0], x.shape[0]), bool))
            mask = past if mask is None else mask & past
        a_key, f_key = (None, None) if key is None else jr.split(key)
        attend = lambda h: self.dropout(self._attend(h, mask), key=a_key)
        think = lambda h: self.dropout(jax.vmap(self._think)(h), key=f_key)
        n0, n1, n2 = (jax.vmap(norm) for norm in self.norms)
        injected = n0(jax.vmap(self.injection)(x))
        if self.pre_norm:
            attended = attend(n1(z))
            return injected + attended + think(n2(z + attended))
        h = z + injected
        h = n1(h + attend(h))
        return n2(h + think(h))

    def _attend(self, h, mask):
        if mask is None:
            return self.attention(h, h, h, process_heads=self._turn)
        attended = self.attention(h, h, h, mask, process_heads=self._turn)
        sees_any = jnp.any(mask, axis=1, keepdims=True)
        return jnp.where(sees_any, attended, jnp.zeros_like(attended))

    def _turn(self, query, key, value):
        if self.position is not None:
            turn = jax.vmap(self.position, in_axes=1, out_axes=1)
            query, key = turn(query), turn(key)
        return query, key, value

    def _think(self, h):
        return self.output(self.activation(self.hidden(h)))

    def _sequence_and_mask(self, x):
        x, mask = x if isinstance(x, tuple) else (x, None)
        check_shape("x", x, ("length", self.in_features))
        if mask is not None:
            check_shape("mask", mask, (x.shape[0], x.shape[0]))
            if mask.dtype != bool:
                raise ValueError(f"`mask` must be boolean; got {mask.dtype}.")
        return x, mask


def _check_heads(num_heads, features, position, dtype):
    if features % num_heads != 0:
        raise ValueError(
            f"`num_heads` must divide `features`; got {num_heads} heads for {features}."
        )
    if position is None:
        return
    check_instance("position", position, eqx.nn.RotaryPositionalEmbedding)
    expected = (features // num_heads, dtype)
    got = (position.embedding_size, jnp.dtype(position.dtype))
    if got != expected:
        raise ValueError(
            "`position` must have the size and dtype of a head, "
            f"{expected[0]} and {expected[1]}; got {got[0]} and {got[1]}."
        )
