"""Presets of `configs/` and the number of parameters each must have, and models small enough to be trained here."""

from __future__ import annotations

PARAMETERS = {
    # The phases of the earlier AC-HOPE-ViT, as it was counted.
    "phase1": 41_580_160,
    "depth_matched": 82_360_960,
    "phase3": 78_766_720,
    "phase4": 42_884_800,
    "phase5": 43_554_280,
    "phase6": 46_509_165,
    "phase7": 46_511_085,
    "phase8": 46_643_210,
    "phase8_d12": 55_811_980,
    "phase8_d12_no_longterm": 48_720_256,
    # Attention baselines, as they were counted.
    "vit_ac": 43_378_816,
    "vjepa2_ac": 305_220_992,
    # By closed forms.
    "titan": 45_123_640,
    "ththt_m3": 20_275_600,
    "ththt_m4": 23_224_720,
    "thththt_m3": 29_126_488,
    "thththt_m4": 33_550_168,
    "thththth_m3": 36_202_912,
    "thththth_m4": 42_101_152,
    "hope_178m": 178_058_176,
    "hope_315m": 314_650_048,
    "hope_626m": 626_368_000,
    "hope_1b": 1_180_534_528,
    "hope_2b": 2_103_882_304,
}

PHASE_5_OF_5M = ["model=phase5", "model.width=128", "model.encoder_dim=256", "model.grid=[6,6]"]
"""Phase 5 with narrower tokens and fewer of them: 4.8 M parameters."""
TRAINED_HERE = {"demo": ["experiment=demo"], "phase5": PHASE_5_OF_5M}
"""Settings by short name."""
