"""Studies of low rank: models that are compressed after training, or trained with fewer numbers."""
