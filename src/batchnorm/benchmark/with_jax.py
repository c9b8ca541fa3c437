"""The same operation in JAX, compiled by XLA."""

from collections.abc import Callable
from typing import Any

from batchnorm.benchmark.cases import Case


def jax_step(case: Case) -> Callable[[], Any]:
    """Return a function that does one step of the case's mode and waits for it."""
    import jax
    import jax.numpy as jnp

    axis = len(case.shape) - 1 if case.channels_last else 1
    axes = tuple(i for i in range(len(case.shape)) if i != axis)

    def load(seed: int) -> Any:
        x = case.tensor(seed).float()
        x = x.movedim(1, -1) if case.channels_last else x
        return jnp.asarray(x.numpy(), dtype={"fp32": jnp.float32, "bf16": jnp.bfloat16}[case.dtype])

    def normalize(x: Any, residual: Any, weight: Any, bias: Any, mean: Any, var: Any) -> Any:
        view = [-1 if i == axis else 1 for i in range(len(case.shape))]
        wide = x.astype(jnp.float32)
        if case.mode != "eval":
            mean, var = wide.mean(axes), wide.var(axes)
        scale = weight * jax.lax.rsqrt(var + 1e-5)
        y = (wide - mean.reshape(view)) * scale.reshape(view) + bias.reshape(view)
        y = y.astype(x.dtype) if residual is None else (y + residual).astype(x.dtype)
        y = jnp.maximum(y, 0) if "relu" in case.op else y
        running = 0.9 + 0.1 * mean, 0.9 + 0.1 * var
        return y, running

    channels = case.shape[1]
    x, residual = load(0), load(1) if "add" in case.op else None
    constants = jnp.ones(channels), jnp.zeros(channels), jnp.zeros(channels), jnp.ones(channels)
    if case.mode != "train":
        compiled = jax.jit(normalize)
        return lambda: jax.block_until_ready(compiled(x, residual, *constants))
    dy = load(2)

    def train(x: Any, residual: Any, weight: Any, bias: Any) -> Any:
        def batch(x: Any, residual: Any, weight: Any, bias: Any) -> Any:
            return normalize(x, residual, weight, bias, None, None)

        y, pull, running = jax.vjp(batch, x, residual, weight, bias, has_aux=True)
        return y, pull(dy), running

    compiled_train = jax.jit(train)
    return lambda: jax.block_until_ready(compiled_train(x, residual, *constants[:2]))
