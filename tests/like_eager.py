"""Runs a layer that writes caches, compiled and eagerly, and compares."""

from __future__ import annotations

import torch
from models import without_code_generation


def assert_like_eager(model, args, cache, *, options, dynamic=None, run=None, tolerance=2e-2):
    """Results and caches of the compiled model are those of eager, of the same shapes and dtypes.

    Args:
        cache: the arguments after ``args`` that the model may write, or need not; each run has copies.
        run: (compiled, *arguments) → results, with code generation; without one the graph is interpreted.

    Returns: what ``cache`` holds after the eager run, and after the compiled one.
    """
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    expected_cache, fused_cache = ([value.clone() for value in cache] for _ in range(2))
    for marked, plain in zip(cache, fused_cache, strict=True):
        plain.__dict__.update(marked.__dict__)  # what torch._dynamo.mark_dynamic noted
    with torch.no_grad():
        expected = model(*args, *expected_cache)
        model.load_state_dict(weights)
        compiled = torch.compile(model, backend="autofuse", dynamic=dynamic, options=options)
        if run is None:
            with without_code_generation():
                results = compiled(*args, *fused_cache)
        else:
            torch._dynamo.reset()
            results = run(compiled, *args, *fused_cache)
    for result, right in zip([*results, *fused_cache], [*expected, *expected_cache], strict=True):
        assert (result.shape, result.dtype) == (right.shape, right.dtype)
        torch.testing.assert_close(result, right, atol=tolerance, rtol=tolerance)
    return expected_cache, fused_cache
