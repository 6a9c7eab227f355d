"""autofuse: fused LLM kernels, tuned per GPU and shape, used where they are measured to be faster.

``import autofuse`` registers the fused ops as ``torch.ops.autofuse.*``; ``torch.compile(model, backend="autofuse")``
uses them. ``autofuse.tune`` measures them, ``autofuse.explain`` says what becomes of a model and why,
``autofuse.load_plan`` pins what was measured.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from autofuse.errors import AutofuseError
from autofuse.runtime import layer_ops
from autofuse.runtime.dispatch import registry

if TYPE_CHECKING:
    from autofuse.graph.explain import explain
    from autofuse.graph.pinned import load_plan
    from autofuse.tuner.api import tune

try:
    __version__ = version("autofuse-kernels")
except PackageNotFoundError:  # a source tree that nobody installed
    __version__ = "0+unknown"

__all__ = ["AutofuseError", "__version__", "explain", "load_plan", "tune"]

# Imported on first use: whoever only runs a compiled model needs neither optuna nor the graph passes.
_LAZY = {"explain": "autofuse.graph.explain", "load_plan": "autofuse.graph.pinned", "tune": "autofuse.tuner.api"}

registry.define()
layer_ops.define()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'autofuse' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
