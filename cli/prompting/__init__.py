"""What generate is given: prompts from options, files and standard input, or a conversation on a terminal."""
