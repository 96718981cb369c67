# SPDX-License-Identifier: Apache-2.0
"""Token states of a text model -> one encoding per report or query."""

import torch


def pool_report_states(
    last_hidden_state: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str
) -> torch.Tensor:
    """Pools token states to one report encoding.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, T, R)`, float): token states.
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 for real tokens, 0 for padding on either side.
        pooling (`str`): `"mean"` over real tokens, `"cls"` (the first real token) or `"last"` (the last real token,
            for causal language models).

    Returns:
        `torch.Tensor` of shape `(B, R)`, float.
    """
    if attention_mask is None:
        attention_mask = torch.ones(last_hidden_state.shape[:2], device=last_hidden_state.device)
    if pooling == "mean":
        weights = attention_mask.to(last_hidden_state.dtype)[..., None]
        return (last_hidden_state * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    # Positions grow along the sequence, so the extreme position among real tokens finds them under any padding side.
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    if pooling == "cls":
        index = torch.where(attention_mask.bool(), positions, attention_mask.shape[1]).amin(dim=1)
    else:
        index = torch.where(attention_mask.bool(), positions, -1).amax(dim=1)
    index = index.clamp(0, attention_mask.shape[1] - 1)
    return last_hidden_state[torch.arange(len(index), device=index.device), index]
