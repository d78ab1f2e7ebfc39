"""Slurm: the job that a configuration asks for, its submission, and what a job says of itself."""
