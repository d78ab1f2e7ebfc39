"""Figures, tables and one self-contained HTML page for a finished run."""
