# SPDX-License-Identifier: Apache-2.0
"""Part 4, the slide-level contrastive loss: slide projections x report projections -> symmetric InfoNCE.

Letters: B slides on this process, G slides on all processes, E joint width.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F


class _GatherWithGradient(torch.autograd.Function):
    """All-gather whose backward sums what every process sends back for this process's rows."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor) -> torch.Tensor:
        ctx.num_rows = local.shape[0]
        gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, local.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.num_rows
        return gradient[start : start + ctx.num_rows]


def gather_rows(local: torch.Tensor) -> torch.Tensor:
    """Concatenates the rows of all processes, in rank order; gradients flow back to the process that owns a row.

    With gradients averaged over processes, as DistributedDataParallel does, parameters receive exactly the gradient
    of the loss over the global batch.

    Args:
        local (`torch.Tensor` of shape `(B, ...)`): this process's rows; every process must hold as many.

    Returns:
        `torch.Tensor` of shape `(G, ...)`: `local` itself outside of distributed runs.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return local
    return _GatherWithGradient.apply(local)


def similarity_logits(slides: torch.Tensor, reports: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """Scaled cosine similarities, never below float32: at a scale of 100, bfloat16 would round them by 0.4.

    Args:
        slides (`torch.Tensor` of shape `(n, E)`, float): L2-normalised.
        reports (`torch.Tensor` of shape `(m, E)`, float): L2-normalised.
        logit_scale (`torch.Tensor` of shape `()`, float): factor on the cosine similarities (1 / temperature).

    Returns:
        `torch.Tensor` of shape `(n, m)`, float.
    """
    dtype = torch.promote_types(slides.dtype, torch.float32)
    with torch.autocast(slides.device.type, enabled=False):
        return logit_scale.to(dtype) * (slides.to(dtype) @ reports.to(dtype).T)


def slide_level_contrastive_loss(
    slide_projection: torch.Tensor,
    report_projection: torch.Tensor,
    logit_scale: torch.Tensor,
    group_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric InfoNCE between slides and their reports, over the batch of all processes.

    Slides of one group (the same case, or the same report) are positives together and never each other's negatives:
    the target is then uniform over the group.

    Args:
        slide_projection (`torch.Tensor` of shape `(B, E)`, float): L2-normalised.
        report_projection (`torch.Tensor` of shape `(B, E)`, float): L2-normalised; row b belongs to slide b.
        logit_scale (`torch.Tensor` of shape `()`, float): factor on the cosine similarities (1 / temperature).
        group_ids (`torch.Tensor` of shape `(B,)`, int64, *optional*): equal numbers mark slides of one group. By
            default each slide is its own group.

    Returns:
        `torch.Tensor` of shape `()`: the mean of the slide-to-report and the report-to-slide loss, the same on every
        process.
    """
    slides, reports = gather_rows(slide_projection), gather_rows(report_projection)
    logits = similarity_logits(slides, reports, logit_scale)
    if group_ids is None:
        target = torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    else:
        groups = gather_rows(group_ids)
        same_group = (groups[:, None] == groups[None, :]).to(logits.dtype)
        target = same_group / same_group.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
