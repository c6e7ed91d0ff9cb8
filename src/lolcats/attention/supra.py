"""SUPRA's two changes to pure linear attention: decay, and a group norm in place of the denominator.

Mercat et al. 2024, arXiv 2405.06640. Both exist only for specs of kind ``linear`` (``AttentionSpec.is_supra``), have no
kernels, and are kept here so that no other path knows of them.

Shapes: B batch, H query heads, G key/value heads, T tokens, D head dim, M key maps (H or G), F features, N chunks, C
chunk length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from lolcats.attention.chunked import Context, Past, positions, unchunked
from lolcats.attention.mixer import Mixer
from lolcats.attention.reference import normalize
from lolcats.attention.spec import AttentionSpec
from lolcats.attention.state import Sums

EPS = 1e-5  # default of torch.nn.GroupNorm


class HeadNorm(nn.Module):
    """Normalize each head's output at each token to mean 0 and variance 1 over its channels, then scale and shift each
    channel: ``torch.nn.GroupNorm(H, H * D)`` on one token at a time, in fp32."""

    def __init__(self, heads: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, channels))
        self.bias = nn.Parameter(torch.zeros(heads, channels))

    def forward(self, y: Tensor) -> Tensor:
        """(B, H, T, D) -> the same in fp32."""
        y = layer_norm(y.float(), y.shape[-1:], eps=EPS)
        return y * self.weight.float()[:, None] + self.bias.float()[:, None]


def supra_attention(
    q: Tensor, k: Tensor, v: Tensor, mixer: Mixer, context: Context | None = None,
    lengths: Sequence[int] | Tensor | None = None, final: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Outputs (B, H, T, D) fp32, and the final state. Arguments as for :func:`lolcats.attention.attention`."""
    spec, length = mixer.spec, q.shape[2]
    past = (DecayedPast if spec.decays else Past)(k, v, mixer.phi_k, spec, positions(q, spec, context), context)
    numerator, denominator = (unchunked(x, length) for x in past.read(q, mixer.phi_q))
    S, z = past.final(length, lengths) if final else (None, None)
    return finished(numerator, denominator, mixer), S, z


def finished(numerator: Tensor, denominator: Tensor, mixer: Mixer) -> Tensor:
    """Outputs (B, H, T, D): the quotient, or the numerator, normalized over each head's channels if there is a norm."""
    if mixer.spec.divides:
        return normalize(numerator, denominator)
    return numerator if mixer.norm is None else mixer.norm(numerator)


def decay_of_a_step(sums: Sums, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """What S (B, M, F, D) and z (B, M, F) lose with one token: negative terms to add to them."""
    lost = torch.expm1(spec.log_decay(sums.z.shape[1], sums.z.device))[:, None]
    return lost[..., None] * sums.S.float(), lost * sums.z


class DecayedPast(Past):
    """Keys weighted by γ^m, m tokens later."""

    def _decayed(self, age: Tensor) -> Tensor:
        """(M, *age.shape): weight of a key that is ``age`` tokens old; 0 for negative ages."""
        log_decay = self.spec.log_decay(self.fk.shape[1], age.device)
        return torch.exp(log_decay.view(-1, *(1,) * age.ndim) * age.clamp_min(0)) * (age >= 0)

    def _near(self) -> Tensor:
        return self._decayed(self.place[:, None] - self.place)[:, None]

    def _sums(self) -> tuple[Tensor, Tensor]:
        """The sums as of the last token before each chunk."""
        n, chunk = torch.arange(self.chunks, device=self.place.device), self.spec.chunk
        keys = self.fk * self._decayed(chunk - 1 - self.place)[:, None, :, None]
        between, since = self._decayed((n[:, None] - 1 - n) * chunk), self._decayed(n * chunk)
        S = torch.einsum("hnm,bhmfd->bhnfd", between, keys.mT @ self.v)
        z = torch.einsum("hnm,bhmf->bhnf", between, keys.sum(3))
        if self.context is not None:
            S = S + self.context.S[:, :, None] * since[..., None, None]
            z = z + self.context.z[:, :, None] * since[..., None]
        return S, z

    def _to_state(self, fq: Tensor, shared: int) -> Tensor:
        return fq * self._decayed(self.place + 1).repeat(1, shared)[:, None, :, None]

    def _aged(
        self, S: Tensor, z: Tensor, fk: Tensor, since: Tensor, age: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        kept = self._decayed(since).mT  # (B, M)
        return S * kept[..., None, None], z * kept[..., None], fk * self._decayed(age).transpose(0, 1)[..., None]
