"""Multi-token prediction: the layer behind the last one, which drafts what the model may say next."""
