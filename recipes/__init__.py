"""The training, preparation, generation and export scripts, one job each."""
