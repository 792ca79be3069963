"""Reading a checkpoint: its files, its tensors, and what they say of the model."""
