"""What a training run needs besides the model: optimizer, checkpoints, resuming, shared flags."""
