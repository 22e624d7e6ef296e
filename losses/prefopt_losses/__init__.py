"""Offline preference losses as one algebra; needs torch and nothing else."""
