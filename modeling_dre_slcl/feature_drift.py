# SPDX-License-Identifier: Apache-2.0
"""Where stored features are by now: kernel regression of how features move, on the tiles of a step that are encoded.

A stored feature lags behind the tile encoder, and what counts is not its distance alone: a feature that has gone over
to another codeword leaves the residuals there and enters them here. So every tile gets a movement of its own, from the
pairs (stored, fresh) of the tiles that the step has encoded anyway. Two tiles move alike the more, the more alike they
look and the more steps they have in common since they were stored (the encoder walks on from step to step), so their
movements covary, up to a factor, as

    k(i, j) = min(t_i, t_j) * (exp((x_i . x_j - 1) / 0.49) + 0.2 * (1 + x_i . x_j))

with x stored features (of norm 1) and t their ages in steps. The prediction is the mean of that Gaussian process,
which is ridge regression with this kernel. A tile of age 0 does not move.

Letters: n tiles encoded now of all processes, N stored tiles, B slides of this process, M tiles of each, D feature
width.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

_SQUARED_LENGTH = 0.49  # of features, over which movements are alike: 0.7, where codewords are 0.5 to 1 apart
_LINEAR_SHARE = 0.2  # of what all tiles have in common: one shift, one linear map
_NOISE = 0.005  # of a tile's own movement, relative to the mean of k(i, i)


@dataclass(frozen=True)
class FeatureDrift:
    """How features have moved since they were stored, as `fit_drift` found it.

    Args:
        stored (`torch.Tensor` of shape `(n, D)`, float32): stored features of the tiles it was measured on.
        ages (`torch.Tensor` of shape `(n,)`, float32): their ages, in steps.
        coefficients (`torch.Tensor` of shape `(n, D)`, float32): what each adds to a prediction, by its kernel.
    """

    stored: torch.Tensor
    ages: torch.Tensor
    coefficients: torch.Tensor

    @torch.no_grad()
    def move(self, features: torch.Tensor, ages: torch.Tensor) -> torch.Tensor:
        """Predicts where stored features are by now.

        Args:
            features (`torch.Tensor` of shape `(N, D)`, float): stored features, of norm 1.
            ages (`torch.Tensor` of shape `(N,)`): steps since they were stored.

        Returns:
            `torch.Tensor` of shape `(N, D)`, float32, on this drift's device.
        """
        features, ages = features.to(self.stored), ages.to(self.ages)
        with torch.autocast(features.device.type, enabled=False):
            return features + _kernel(features, ages, self.stored, self.ages) @ self.coefficients


@torch.no_grad()
def fit_drift(fresh: torch.Tensor, stored: torch.Tensor, ages: torch.Tensor, is_stored: torch.Tensor) -> FeatureDrift:
    """Measures the drift of stored features on the tiles that are encoded now. Collective.

    Args:
        fresh (`torch.Tensor` of shape `(B, M, D)`, float): features of the tiles encoded now.
        stored (`torch.Tensor` of shape `(B, M, D)`, float): what the bank holds of them.
        ages (`torch.Tensor` of shape `(B, M)`): steps since it was stored.
        is_stored (`torch.Tensor` of shape `(B, M)`, bool): False for padding and for tiles never stored. Every process
            must hold as many slides and tiles.

    Returns:
        `FeatureDrift`: the same on every process, and for every number of processes.
    """
    # (B, M, ...) -> (B M, 2 D + 2) -> (n, 2 D + 2)
    table = torch.cat([part.to(fresh).double() for part in (stored, fresh, ages[..., None], is_stored[..., None])], -1)
    table = _of_all_processes(table.flatten(0, 1))
    table = table[table[:, -1] > 0]
    width = fresh.shape[-1]
    before, now, steps = table[:, :width], table[:, width:-2], table[:, -2]
    covariance = _kernel(before, steps, before, steps)
    # Where nothing has aged there is nothing to predict, and nothing to invert.
    noise = (_NOISE * covariance.diagonal().mean()).nan_to_num().clamp(min=1e-9)
    covariance.diagonal().add_(noise)
    return FeatureDrift(before.float(), steps.float(), torch.linalg.solve(covariance, now - before).float())


def _kernel(first: torch.Tensor, first_ages: torch.Tensor, second: torch.Tensor, ages: torch.Tensor) -> torch.Tensor:
    """k of the docstring above: features `(N, D)`, ages `(N,)`, `(n, D)`, `(n,)` -> `(N, n)`."""
    cosines = first @ second.T
    alike = ((cosines - 1) / _SQUARED_LENGTH).exp() + _LINEAR_SHARE * (1 + cosines)
    return alike * torch.minimum(first_ages[:, None], ages[None]).clamp(min=0)


def _of_all_processes(rows: torch.Tensor) -> torch.Tensor:
    """Concatenates rows in rank order, which is that of one process with all slides."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


__all__ = ["FeatureDrift", "fit_drift"]
