"""Completions that share a prompt, laid out in one row without padding, so that the prompt is computed once:

    prompt A | completion A1 | completion A2 | ... | prompt B | completion B1 | ...

A completion attends to its prompt and to itself (attention.py), and its positions go on from its prompt's, as if
each were the only one. One prompt with its completions is a prompt group.

Shape suffixes: B sequences, L tokens of the row, P prompt tokens, K completion tokens that are not padding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apo_lora.family.lookup import closest_family
from apo_lora.policy.batches import Batch, row_slices
from apo_lora.policy.shared_prompt.attention import PromptGroup, PromptGroups


@dataclass(frozen=True)
class PackedRow:
    input_ids_L: Tensor
    position_ids_3L: Tensor
    """Temporal, height and width (M-RoPE)."""
    prompt_groups: PromptGroups
    prompt_rows: list[int]
    """Per group, the sequence of the batch whose prompt and images stand for all of its."""
    sources_K: Tensor
    """Where in the row the k-th completion token is predicted; k counts through completion_mask row by row."""


def pack(inner_model: nn.Module, batch: Batch) -> PackedRow:
    """Sequences with the same batch["group"] share one prompt. They need not lie side by side."""
    device = batch["prompt_ids"].device
    members: dict[int, list[int]] = {}
    for row, group in enumerate(batch["group"].tolist()):
        members.setdefault(group, []).append(row)
    rows = list(row_slices(batch, 1))
    lengths_B = batch["completion_mask"].sum(dim=-1).tolist()

    input_ids, position_ids, prompt_groups, end = [], [], [], 0
    sources: dict[int, Tensor] = {}
    # Masked-out completions need no prompt either.
    members = {group: own_rows for group, own_rows in members.items() if any(lengths_B[row] for row in own_rows)}
    for own_rows in members.values():
        prompt_ids_P, prompt_positions_3P = _prompt(inner_model, rows[own_rows[0]])
        input_ids.append(prompt_ids_P)
        position_ids.append(prompt_positions_3P)
        lengths = tuple(lengths_B[row] for row in own_rows if lengths_B[row])
        prompt_groups.append(PromptGroup(len(prompt_ids_P), lengths))
        end += len(prompt_ids_P)
        last_of_prompt, next_position = end - 1, prompt_positions_3P.max() + 1
        for row in own_rows:
            length, mask_T = lengths_B[row], batch["completion_mask"][row].bool()
            steps = torch.arange(length, device=device)
            input_ids.append(batch["completion_ids"][row][mask_T])
            position_ids.append((next_position + steps).expand(3, -1))
            # The first token is predicted at the end of the prompt, every other one at the token before it.
            sources[row] = torch.where(steps == 0, last_of_prompt, end + steps - 1)
            end += length
    return PackedRow(
        torch.cat(input_ids),
        torch.cat(position_ids, dim=1),
        PromptGroups(*prompt_groups),
        [own_rows[0] for own_rows in members.values()],
        torch.cat([sources[row] for row in sorted(sources)]),
    )


def _prompt(inner_model: nn.Module, row: Batch) -> tuple[Tensor, Tensor]:
    """Tokens (P,) and positions (3, P) of one sequence's prompt, its left padding taken off."""
    mask_P = row["prompt_mask"][0].bool()
    ids_P = row["prompt_ids"][0][mask_P]
    if row.get("image_grid_thw") is None:
        return ids_P, torch.arange(len(ids_P), device=ids_P.device).expand(3, -1)
    token_types_P = row["mm_token_type_ids"][0, : len(mask_P)][mask_P]
    family = closest_family(inner_model)
    return ids_P, family.prompt_positions(inner_model, ids_P, token_types_P, row["image_grid_thw"])
