"""What comparisons say: where it went wrong, layer by layer, token by token."""
