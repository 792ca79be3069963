"""`python -m deepseek_trt` is the deepseek-trt command."""

from deepseek_trt.cli.main import main

main(prog_name="deepseek-trt")
