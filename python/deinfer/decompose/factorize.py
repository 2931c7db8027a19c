"""Closed-form low-rank factors of one linear layer, optimal for second-moment statistics.

A layer y = W x with W[n, k] and gradient g = dL/dy loses, to second order and with the Kronecker
approximation of its curvature (KFAC), tr(B D A Dᵀ) when W changes by D, where A = E[x xᵀ] and
B = E[g gᵀ]. The best rank-r W' is the truncated SVD of B^½ W A^½ with the outer roots undone.
B = I gives activation whitening (SVD-LLM, arXiv 2403.07378; without inverting A as in Swift-SVD,
arXiv 2604.01609); B != I is the two-sided form that KFAC-SVD / LEMS (ICML 2026) use.

Everything here works on the *shorter* side of W, of size s = min(n, k), so that no matrix larger
than s x s is stored or decomposed: a moment of the longer side is only ever needed as seen through
W, e.g. W A Wᵀ = E[y yᵀ].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CUTOFF = 1e-12  # relative to the largest eigenvalue; below it a direction carries no statistics
_ROUNDING = 1e-14  # likewise of energies


@dataclass(frozen=True)
class Moments:
    """Second moments of a linear layer W[n, k] on its shorter side, s = min(n, k); all float64.

    Attributes:
        own: Moment [s, s] of the shorter side. n <= k: E[g gᵀ]; n > k: E[x xᵀ].
        seen: Moment [s, s] of the longer side, seen through W. n <= k: E[(Wx)(Wx)ᵀ];
            n > k: E[(Wᵀg)(Wᵀg)ᵀ].
        own_power: Mean squared entry of the shorter side's vectors (trace / size).
        seen_power: Mean squared entry of the longer side's vectors, before W is applied.
        seen_plain: Whether the longer side's moment is `seen_power` times the identity.
    """

    own: Tensor
    seen: Tensor
    own_power: float
    seen_power: float
    seen_plain: bool = False


@dataclass(frozen=True)
class Spectrum:
    """All ranks of a factorized layer at once; see `factorize`.

    Attributes:
        energies: Squared singular values [s] of B^½ W A^½, descending, float64. The objective at
            rank r is the sum of `energies[r:]`.
        left: [n, c] with c <= s; the first r columns are an (unbalanced) second factor of rank r.
        right: [c, k]; the first r rows are the first factor that belongs to it.
    """

    energies: Tensor
    left: Tensor
    right: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the optimal pair of a rank, with the norms of each column and row balanced.

        Balancing leaves the product as it is and keeps both factors in the range of bf16/fp16.

        Args:
            rank: 1 <= rank <= c.

        Returns:
            u [n, rank] and v [rank, k], float64; the layer becomes y = u (v x).

        Raises:
            ValueError: The rank is out of range.
        """
        if not 1 <= rank <= len(self.right):
            raise ValueError(f"rank {rank} is not in [1, {len(self.right)}]")
        u, v = self.left[:, :rank], self.right[:rank]
        tiny = torch.finfo(u.dtype).tiny
        scale = (v.norm(dim=1).clamp_min(tiny) / u.norm(dim=0).clamp_min(tiny)).sqrt()
        return (u * scale).contiguous(), (v / scale[:, None]).contiguous()

    def truncated(self, rank: int) -> Spectrum:
        """Drop the factors beyond a rank, and their memory; the energies stay complete."""
        return Spectrum(self.energies, self.left[:, :rank].clone(), self.right[:rank].clone())


def assemble_moments(
    weight: Tensor,
    inputs: Tensor | None,
    outputs: Tensor | None,
    input_power: float = 1.0,
    output_power: float = 1.0,
) -> Moments:
    """Bring the moments of the two sides together; a side without one counts as the identity.

    Args:
        weight: W[n, k].
        inputs: A = E[x xᵀ] on the shorter side: [k, k] itself if n > k, else W A Wᵀ [n, n]; or None
            for `input_power` times the identity.
        outputs: B = E[g gᵀ] likewise: [n, n] itself if n <= k, else Wᵀ B W [k, k]; or None for
            `output_power` times the identity.
        input_power: Mean squared entry of x.
        output_power: Mean squared entry of g.

    Returns:
        The moments, float64.
    """
    n, k = weight.shape
    w = weight.double()
    if n > k:  # the same problem transposed
        w = w.T
        inputs, outputs = outputs, inputs
        input_power, output_power = output_power, input_power
    own = torch.eye(len(w), dtype=torch.float64) * output_power if outputs is None else outputs
    seen = w @ w.T * input_power if inputs is None else inputs
    return Moments(own.double(), seen.double(), output_power, input_power, inputs is None)


def compact_moments(weight: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> Moments:
    """Bring full second moments to the compact form of `Moments`.

    Args:
        weight: W[n, k].
        inputs: A = E[x xᵀ] [k, k], or None for the identity.
        outputs: B = E[g gᵀ] [n, n], or None for the identity.

    Returns:
        The compact moments, float64.

    Raises:
        ValueError: A shape does not fit the weight.
    """
    n, k = weight.shape
    for moment, side in ((inputs, k), (outputs, n)):
        if moment is not None and moment.shape != (side, side):
            raise ValueError(f"moments {tuple(moment.shape)} do not fit a weight {(n, k)}")
    w = weight.double()
    if n <= k and inputs is not None:
        inputs_seen: Tensor | None = w @ inputs.double() @ w.T
    else:
        inputs_seen = inputs
    if n > k and outputs is not None:
        outputs_seen: Tensor | None = w.T @ outputs.double() @ w
    else:
        outputs_seen = outputs
    powers = [
        1.0 if moment is None else moment.double().trace().item() / side
        for moment, side in ((inputs, k), (outputs, n))
    ]
    return assemble_moments(weight, inputs_seen, outputs_seen, *powers)


def shrink(weight: Tensor, moments: Moments, inputs: float, outputs: float) -> Moments:
    """Shrink both moments towards a multiple of the identity with the same trace.

    Few tokens give noisy moments; A <- (1-a) A + a tr(A)/k I, and B likewise.

    Args:
        weight: W[n, k].
        moments: Moments of that layer.
        inputs: Share a of the identity in A, in [0, 1].
        outputs: Share of the identity in B, in [0, 1].

    Returns:
        New moments; the arguments are left as they are.
    """
    n, k = weight.shape
    w = weight.double()
    own_share, seen_share = (outputs, inputs) if n <= k else (inputs, outputs)
    through = w @ w.T if n <= k else w.T @ w
    own = (1 - own_share) * moments.own
    own.diagonal().add_(own_share * moments.own_power)
    seen = (1 - seen_share) * moments.seen + seen_share * moments.seen_power * through
    return Moments(own, seen, moments.own_power, moments.seen_power, moments.seen_plain)


def factorize(weight: Tensor, moments: Moments) -> Spectrum:
    """Factorize a layer for every rank at once, optimally for tr(B D A Dᵀ).

    With W[s, l] wide and B = R Rᵀ, the left singular vectors of B^½ W A^½ are the eigenvectors Q of
    Rᵀ (W A Wᵀ) R, so W' = R⁻ᵀ Q Qᵀ Rᵀ W. A tall W is the same problem transposed. Singular moments
    are allowed: R⁻¹ is then the pseudo-inverse, and A is never inverted. Where A is a multiple of
    the identity neither is R: R⁻ᵀ Q = W A Wᵀ R Q S⁻¹ with the energies S.

    Args:
        weight: W[n, k], any float dtype.
        moments: Its compact moments.

    Returns:
        The spectrum with factors for every rank up to min(n, k), float64.

    Raises:
        ValueError: The weight or a moment is not finite, or a shape does not fit.
    """
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight of shape {tuple(weight.shape)} is not a non-empty matrix")
    side = min(weight.shape)
    if moments.own.shape != (side, side) or moments.seen.shape != (side, side):
        raise ValueError(
            f"moments {tuple(moments.own.shape)} and {tuple(moments.seen.shape)} do not fit "
            f"a weight {tuple(weight.shape)}"
        )
    for name, tensor in (("weight", weight), ("own", moments.own), ("seen", moments.seen)):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} has a non-finite value")
    wide = weight.shape[0] <= weight.shape[1]
    w = weight.double() if wide else weight.double().T
    root, inverse = _root(moments.own.double(), invert=not moments.seen_plain)
    energies, basis = torch.linalg.eigh(root.T @ moments.seen.double() @ root)
    energies, basis = energies.flip(0).clamp_min(0), basis.flip(1)
    right = basis.T @ (root.T @ w)  # [s, l]
    if inverse is None:
        some = energies > energies[0] * _ROUNDING
        scale = torch.where(some, moments.seen_power / energies.where(some, energies[:1]), 0.0)
        left = (w @ right.T) * scale
    else:
        left = inverse.T @ basis  # [s, s]
    return Spectrum(energies, left, right) if wide else Spectrum(energies, right.T, left.T)


def _root(moment: Tensor, *, invert: bool) -> tuple[Tensor, Tensor | None]:
    """Return R and perhaps R⁺ with moment = R Rᵀ; a zero moment counts as the identity."""
    factor, failed = torch.linalg.cholesky_ex(moment)
    diagonal = factor.diagonal()
    eye = torch.eye(len(moment), dtype=moment.dtype)
    if not failed and bool(diagonal.min() > diagonal.max() * 1e-4):  # well conditioned, and fast
        inverse = torch.linalg.solve_triangular(factor, eye, upper=False) if invert else None
        return factor, inverse
    values, vectors = torch.linalg.eigh(moment)
    top = values[-1].item()
    if top <= 0:
        return eye, eye if invert else None
    keep = values > top * _CUTOFF
    scale = torch.where(keep, values.clamp_min(0).sqrt(), 0.0)
    root = vectors * scale
    if not invert:
        return root, None
    return root, torch.where(keep, 1 / scale.where(keep, scale[-1:]), 0.0)[:, None] * vectors.T
