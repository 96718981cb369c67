# SPDX-License-Identifier: Apache-2.0
"""Part 4, the slide-level contrastive loss: slide projections x report projections -> symmetric InfoNCE or SigLIP.

Letters: B slides on this process, G slides on all processes, P further reports, C ways to be of one group, E joint
width.
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
    *,
    logit_bias: torch.Tensor | None = None,
    negative_projection: torch.Tensor | None = None,
    negative_group_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss between slides and their reports, over the batch of all processes: symmetric InfoNCE, or SigLIP's.

    Slides of one group (the same case, or the same report) are positives together and never each other's negatives.
    For InfoNCE the target is then uniform over the group.

    Args:
        slide_projection (`torch.Tensor` of shape `(B, E)`, float): L2-normalised.
        report_projection (`torch.Tensor` of shape `(B, E)`, float): L2-normalised; row b belongs to slide b.
        logit_scale (`torch.Tensor` of shape `()`, float): factor on the cosine similarities (1 / temperature).
        group_ids (`torch.Tensor` of shape `(B,)` or `(B, C)`, int64, *optional*): slides that share a number in any
            column are of one group; -1 marks a slide without report, which takes no part. By default each slide is
            its own group.
        logit_bias (`torch.Tensor` of shape `()`, float, *optional*): SigLIP's bias; the loss is SigLIP's then.
        negative_projection (`torch.Tensor` of shape `(P, E)`, float, *optional*): reports of slides that are not in
            the batch, L2-normalised, the same on every process: further negatives of each slide.
        negative_group_ids (`torch.Tensor` of shape `(P,)` or `(P, C)`, int64, *optional*): their groups; those that
            the batch holds are left out, so that neither a positive nor a report of the batch counts again.

    Returns:
        `torch.Tensor` of shape `()`: the same on every process. InfoNCE: the mean of the slide-to-report and the
        report-to-slide loss. SigLIP: the sum over pairs, divided by the number of slides.
    """
    slides, reports = gather_rows(slide_projection), gather_rows(report_projection)
    if group_ids is None:
        groups = torch.arange(len(slides), device=slides.device)[:, None]
    else:
        groups = gather_rows(group_ids).reshape(len(slides), -1)
    takes_part = (groups >= 0).all(dim=1)
    is_positive = (groups[:, None] == groups[None, :]).any(dim=-1)
    logits = similarity_logits(slides, reports, logit_scale)
    counts, negative_logits = takes_part, None
    if negative_projection is not None:
        in_batch = torch.isin(negative_group_ids.reshape(len(negative_projection), -1), groups).any(dim=1)
        counts = torch.cat([takes_part, ~in_batch])
        negative_logits = similarity_logits(slides, negative_projection, logit_scale)
    if logit_bias is not None:
        return _siglip(logits, negative_logits, is_positive, takes_part, counts, logit_bias)
    to_reports = logits if negative_logits is None else torch.cat([logits, negative_logits], dim=1)
    return (
        _cross_entropy(to_reports, is_positive, takes_part, counts)
        + _cross_entropy(logits.T, is_positive, takes_part, takes_part)
    ) / 2


def _cross_entropy(
    logits: torch.Tensor, is_positive: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Mean over the marked rows of the cross-entropy with targets uniform over a row's positives.

    Args:
        logits (`torch.Tensor` of shape `(G, G + P)`): the first G columns may be positives.
        is_positive (`torch.Tensor` of shape `(G, G)`, bool): which are.
        rows (`torch.Tensor` of shape `(G,)`, bool), columns (`(G + P,)`, bool): those that take part.
    """
    # The lowest number instead of minus infinity: as far away, and no NaN where nothing takes part.
    log_shares = logits.masked_fill(~columns, torch.finfo(logits.dtype).min).log_softmax(dim=1)
    target = (is_positive & rows[:, None] & rows[None, :]).to(logits.dtype)
    target = target / target.sum(dim=1, keepdim=True).clamp(min=1)
    return -(target * log_shares[:, : len(logits)]).sum() / rows.sum().clamp(min=1)


def _siglip(
    logits: torch.Tensor,
    negative_logits: torch.Tensor | None,
    is_positive: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    logit_bias: torch.Tensor,
) -> torch.Tensor:
    """SigLIP's loss (arXiv 2303.15343): each pair is a yes or no of its own; arguments as in `_cross_entropy`."""
    sign = torch.where(is_positive, 1.0, -1.0).to(logits)
    if negative_logits is not None:
        logits = torch.cat([logits, negative_logits], dim=1)
        sign = torch.cat([sign, -torch.ones_like(negative_logits)], dim=1)
    losses = -F.logsigmoid(sign * (logits + logit_bias.to(logits.dtype)))
    return (losses * (rows[:, None] & columns[None, :])).sum() / rows.sum().clamp(min=1)
