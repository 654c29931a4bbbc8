"""What runs on every rank: model, data order, loop, checkpoints, metrics. Imports no ray."""
