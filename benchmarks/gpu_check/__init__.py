"""gpu-check: what a machine with an NVIDIA GPU is asked in minutes, and its stand-ins where there is none.

`__main__` runs the parts of `parts.PARTS`, each in a child process, and prints what they found as one table.
"""
