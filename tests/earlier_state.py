"""State dicts as AC-HOPE-ViT wrote them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MEMORIES = ("M_k", "M_v", "M_eta", "M_alpha", "M_memory")


def earlier_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a predictor of compat=ac_hope under their earlier names, with the encoder that was never used."""
    width, action = model.get_parameter("action_encoder.weight").shape
    state = {
        "extrinsics_encoder.weight": torch.zeros(width, action - 1),
        "extrinsics_encoder.bias": torch.zeros(width),
    }
    for name, parameter in model.named_parameters():
        value = parameter.detach().clone()
        for ours, theirs in (
            ("blocks.", "hope_blocks."),
            ("frame_position.", "frame_pos_embed."),
            ("target_position.", "target_pos_embed."),
            ("embed.", "predictor_embed."),
            ("norm.", "predictor_norm."),
            ("project.", "predictor_proj."),
        ):
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        block, inside, which = name.partition(".memory.")
        if not inside:
            name = name.replace(".cms.levels.", ".cms.blocks.")
            name = name.replace("spatial_mixing.first", "spatial_mix.0").replace(
                "spatial_mixing.second", "spatial_mix.2"
            )
            state[name] = value
        elif which in ("w1", "w2"):
            state |= {f"{block}.{m}.{which}.weight": v for m, v in zip(MEMORIES, value.squeeze(1), strict=True)}
        elif which.startswith("norm_"):
            kind = which.removeprefix("norm_")
            state |= {f"{block}.{m}.norm.{kind}": v for m, v in zip(MEMORIES, value, strict=True)}
        else:
            state[f"{block}.{which.replace('query', 'q_proj').replace('out.', 'out_proj.')}"] = value
    return state
