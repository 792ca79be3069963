"""`python -m deepseek_trt` is the deepseek-trt command."""

from deepseek_trt.cli.start import main

main()
