"""The text files of a checkpoint: tokenizer, special tokens, and how answers are generated."""
