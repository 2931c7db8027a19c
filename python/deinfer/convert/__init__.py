"""Import and export of decomposed checkpoints: one module per format, `registry` lists them.

`convert_checkpoint` converts, `detect_format` names the format of a checkpoint. Importing this
package loads nothing; torch comes with the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deinfer.convert.registry import (
        FORMATS,
        ConversionReport,
        convert_checkpoint,
        detect_format,
    )

__all__ = ["FORMATS", "ConversionReport", "convert_checkpoint", "detect_format"]


def __getattr__(name: str) -> Any:
    """Load the registry when it is asked for: `python -m deinfer.convert.gguf` is part of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deinfer.convert import registry

    return getattr(registry, name)
