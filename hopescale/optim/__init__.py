"""M3 (multi-scale-momentum Muon) and AdamW in one optimizer, with the table that routes parameters to them."""
