"""The loop and what it stands on: optimiser, schedule, checkpoints, the run's folder, several processes."""
