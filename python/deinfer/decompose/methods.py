"""The decomposition methods by name."""

from __future__ import annotations

from deinfer.decompose import svd, two_sided, whitened

METHODS = {m.name: m for m in (two_sided.METHOD, whitened.METHOD, svd.METHOD)}
"""The default comes first."""
