"""Parse and print: the deepseek-trt command."""
